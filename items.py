"""What eval.py asks: text, retrieval tasks and RULER's, as token ids.

An item is a dict of JSON values. "prompt" is token ids, the first "prefilled" of which are not
decoded. Scored is, with
  nothing more                  text: each decoded token, given all before it
  "answer"                      its ids: each must be the likeliest after the right ones before
  "outputs", "max_new_tokens"   a greedy answer: the share of the outputs that it holds
A row says its score by "task", "length" and "depth", too, where items have them.
"""
import functools
import gzip
import hashlib
import json
import lzma
import random
import re
import string
import sys
import zipfile
from pathlib import Path

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from tiny.tasks import (
    kv_answer, kv_context, kv_question, lines_answer, lines_context, lines_question, needle_answer,
    needle_pieces, needle_question, needle_sentence, random_kv, random_lines, random_name,
    random_needles, random_number, random_uuid
)
from tokenizer import builtin_text, read_text

# ---------------------------------------------------------------- texts

BUILTIN = "Python language reference"  # builtin_text()
WIKITEXT2 = "wikitext2"  # what --data calls it
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def wikitext2():
    """The raw test set of WikiText-2, from the hub."""
    path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    data = zipfile.ZipFile(path).read("wikitext-2-raw/wiki.test.raw")
    if hashlib.sha256(data).hexdigest() != WIKITEXT2_SHA256:
        raise ValueError(f"{path}: another text than the raw test set of WikiText-2")
    return data.decode()


def read_fields(path, keys):
    """The values of these keys in each line of a .jsonl[.gz|.xz] file: a list of lists."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [[item[key] for key in keys] for item in map(json.loads, file)]
    except (ValueError, lzma.LZMAError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not a line of JSON with {', '.join(keys)} per item "
                         f"({error!r})") from None


def read_texts(path):
    """A UTF-8 text file -> [text]; a .jsonl[.gz|.xz] file with a "text" per line -> all of them."""
    if ".jsonl" not in Path(path).name:
        return [read_text(path)]
    return [text for text, in read_fields(path, ("text",))]


@functools.cache
def texts_of(data):
    """(name, texts) of --data: a file, or WikiText-2 by that name; without it the built-in text."""
    if data is None:
        print(f"without --data the text is the {BUILTIN}, on which labels are calibrated by "
              "default: no figures to quote", file=sys.stderr)
        return BUILTIN, [builtin_text()]
    if data == WIKITEXT2:
        return "wikitext2-test.raw", [wikitext2()]
    return Path(data).name, read_texts(data)


def spread(items, limit):
    """At most `limit` items, evenly over all."""
    if not limit or limit >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(1, limit - 1))] for i in range(limit)]


def text_windows(tokenizer, texts, context, limit=None):
    """Windows of `context` tokens, one after the other, behind BOS if the tokenizer has it there;
    short tails are dropped. limit: so many at most, evenly over the whole text."""
    windows = []
    for text in texts:
        tokens = tokenizer.encode(text, special=False)
        starts = range(0, len(tokens) - context + 1, context)
        windows += [tokenizer.prefix + tokens[i : i + context] for i in starts]
    if not windows:
        raise ValueError(f"no text of {context} tokens: give longer --data or a smaller --context")
    return spread(windows, limit)


def text_items(tokenizer, args):
    """(name of the text, windows of it, of which the last args.last tokens are decoded)."""
    name, texts = texts_of(args.data)
    windows = text_windows(tokenizer, texts, args.context, args.limit)
    prefilled = max(0, len(windows[0]) - 1 - args.last) if args.last else 0
    return name, [{"prompt": window, "prefilled": prefilled} for window in windows]


# ---------------------------------------------------------------- retrieval, by tiny/tasks.py


def passage(rng, n, text):
    """n characters of the text or a few less, from a whole word on."""
    if n > len(text):
        raise ValueError(f"a text of {len(text)} characters is too short: give longer --data, or "
                         "smaller --lengths")
    start = rng.randrange(len(text) - n + 1)
    found = text[start : start + n]
    return found[found.find(" ") + 1 :]


# Documents from a random.Random: n facts (of running text: n characters), and the text of a
# question about the one at `depth` in [0, 1) and of its answer.


def kv_document(rng, n, depth, text):
    records = random_kv(rng, n)
    key, value = records[int(depth * n)]
    return kv_context(records), kv_question(key), kv_answer(value)


def lines_document(rng, n, depth, text):
    lines = random_lines(rng, n)
    name, number = lines[int(depth * n)]
    return lines_context(lines), lines_question(name), lines_answer(number)


def passkey_document(rng, n, depth, text):
    (name, number, _), = random_needles(rng, 1)
    document = "".join(needle_pieces(passage(rng, n, text), [(name, number, depth)]))
    return document, needle_question(name), needle_answer(number)


def question_item(tokenizer, context, question, answer, **more):
    """Texts as token ids: tokenised together, then cut where question and answer start."""
    def common(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

    whole = tokenizer.encode(context + question + answer)
    answer_at = common(whole, tokenizer.encode(context + question))
    question_at = common(whole, tokenizer.encode(context))
    return {"prompt": whole[:answer_at], "prefilled": min(question_at, answer_at - 1),
            "answer": whole[answer_at:], **more}


def size(item):
    """Tokens of an item, its answer included."""
    return len(item["prompt"]) + len(item.get("answer", ())) + item.get("max_new_tokens", 0)


def fill(make, length):
    """make(n), an item whose size grows with n, for nearly the largest n that fits in `length`."""
    least = size(make(1))
    if least > length:
        raise ValueError(f"lengths={length}: too short for one fact and the question, which have "
                         f"{least} tokens")
    n = 16
    for _ in range(4):  # tokens grow with n almost evenly
        n = max(2, 1 + int((length - least) * (n - 1) / max(1, size(make(n)) - least)))
    while size(item := make(n)) > length:
        n -= 1 + n // 500
    return item


def generated_items(tokenizer, document, lengths, count, text=""):
    """Questions about documents of at most so many tokens, question and answer included: `count` of
    each length, at depths spread evenly. An item is a function of the arguments alone."""
    items, places = [], [(length, i) for length in lengths for i in range(count)]
    for length, i in tqdm(places, desc="items", leave=False, delay=2):
        depth = (i + random.Random(f"depth {length} {i}").random()) / count

        def make(n):
            parts = document(random.Random(f"{length} {i}"), n, depth, text)
            return question_item(tokenizer, *parts, depth=depth, length=length)

        items.append(fill(make, length))
    return items


def retrieval_items(document, tokenizer, args):
    """(name of the data, questions about documents of this kind): generated, or read where --data
    has published key-value items."""
    if document is kv_document and args.data:
        items, keys = [], ("ordered_kv_records", "key", "value")
        for records, key, value in read_fields(args.data, keys)[: args.limit]:
            if [key, value] not in records or any(len(record) != 2 for record in records):
                raise ValueError(f"{args.data}: an item of which ordered_kv_records are no pairs, "
                                 "or do not hold its key and value")
            parts = kv_context(records), kv_question(key), kv_answer(value)
            depth = records.index([key, value]) / len(records)
            items.append(question_item(tokenizer, *parts, depth=depth))
        return Path(args.data).name, items
    name, texts = texts_of(args.data) if document is passkey_document else ("generated", [])
    lengths, count = args.lengths or LENGTHS, args.limit or 20
    return name, generated_items(tokenizer, document, lengths, count, "\n\n".join(texts))


# ---------------------------------------------------------------- RULER (arXiv 2404.06654)


def prompt_ids(tokenizer, text, chat, prefix=""):
    """Token ids of a task's text, if `chat` as a user's message in the chat template; then of how
    the answer begins."""
    if not chat:
        return tokenizer.encode(text + prefix)
    message = tokenizer.chat([{"role": "user", "content": text}])
    return message + tokenizer.encode(prefix.lstrip(), special=False)


RULER_KEYS = ("task", "max_seq_length", "input", "outputs", "answer_prefix")
ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
# Of needle tasks: what the needles lie in, keys, how many of them are asked for, values of each,
# and what keys and values are
NEEDLES = {
    "niah_single_1": ("noise", 1, 1, 1, "words"), "niah_single_2": ("text", 1, 1, 1, "words"),
    "niah_multikey_1": ("text", 4, 1, 1, "words"), "niah_multikey_2": ("needles", 1, 1, 1, "words"),
    "niah_multikey_3": ("needles", 1, 1, 1, "uuids"), "niah_multivalue": ("text", 1, 1, 4, "words"),
    "niah_multiquery": ("text", 4, 4, 1, "words")}
NOISE = "The wind was low. The road went on. We walked, we sat down, we walked again. "

# Of each task, in our own wording, from a random.Random and with n as large as fits: its text, the
# outputs wanted, and how the answer begins.


def hidden(rng, sentences, haystack):
    """The sentences, in their order, at random places of a text: after sentences, if it has any."""
    gaps = list(re.finditer(r"(?<=\.) ", haystack)) or list(re.finditer(" |$", haystack))
    places = sorted(gap.start() for gap in rng.choices(gaps, k=len(sentences)))
    parts = [haystack[a:b] + sentence for a, b, sentence in zip([0, *places], places, sentences)]
    return "".join(parts) + haystack[places[-1] :]


def needles_task(kind, rng, n, text):
    """RULER's niah tasks: the numbers or UUIDs that a text has for some names. kind: of NEEDLES."""
    haystack, keys, asked, values, what = NEEDLES[kind]
    facts = {}
    while len(facts) < keys + n * (haystack == "needles"):
        key, *found = (random_uuid(rng) for _ in range(values + 1))
        if what == "words":
            key, found = random_name(rng), [random_number(rng, 7) for _ in range(values)]
        facts[key] = found
    wanted = list(facts)[:asked]
    sentences = [needle_sentence(key, value) for key in facts for value in facts[key]]
    rng.shuffle(sentences)
    if haystack == "needles":
        body = "\n".join(sentences)
    else:
        around = NOISE * n if haystack == "noise" else passage(rng, 50 * n, text)
        body = hidden(rng, sentences, around)
    safes = f"he safe{'s' * (asked > 1)} of {', '.join(wanted)}"
    return (f"A text on safes, and what opens them.\n\n{body}\n\nWhat opens t{safes}?",
            [value for key in wanted for value in facts[key]],
            f" T{safes} open{'s' * (asked == 1)} with")


def chain_task(kind, rng, n, text):
    """Two chains of five variables, of which the first is asked for."""
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(10)]
    values = [random_number(rng), random_number(rng), *(f"VAR {name}" for name in names)]
    body = hidden(rng, [f" VAR {name} = {value}." for name, value in zip(names, values)], NOISE * n)
    return (f"A text that gives values to variables, to some of them those of others.\n\n{body}\n\n"
            f"Which five variables have the value {values[0]}?", names[::2],
            f" The value {values[0]} is that of the variables")


def common_words_task(kind, rng, n, text):
    """Ten words, 30 times each (fewer where little fits), and n others, 3 times each."""
    known = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))
    if n + 10 > len(known):
        raise ValueError(f"a text of {len(known)} different words is too short: give longer "
                         "--data, or smaller --lengths")
    words = rng.sample(known, n + 10)
    listed = words[:10] * min(30, n + 5) + words[10:] * 3
    rng.shuffle(listed)
    body = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return (f"A list of words.\n\n{body}\n\nWhich ten words are most often in it?", words[:10],
            " The ten words are:")


def frequent_words_task(kind, rng, n, text):
    """Made-up words, of which the i-th comes 1 / i**2 as often as the first, among as many dots."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(50)]
    coded = [word for i, word in enumerate(words, 1) for _ in range(max(1, 10 * n // i**2))]
    coded += ["..."] * len(coded)
    rng.shuffle(coded)
    return (f"A text in code, with dots that mean nothing.\n\n{' '.join(coded)}\n\n"
            "Which three words are most often in it?", words[:3], " The three words are:")


RULER = {**dict.fromkeys(NEEDLES, needles_task), "vt": chain_task, "cwe": common_words_task,
         "fwe": frequent_words_task}


def ruler_items(tokenizer, args):
    """Items of a file in RULER's form (RULER_KEYS in each line), or generated."""
    def item(task, length, text, outputs, prefix):
        ids = prompt_ids(tokenizer, text, args.chat, prefix.rstrip())
        # all but the last token is prefilled, as generate.py does
        return {"prompt": ids, "prefilled": len(ids) - 1, "outputs": outputs, "task": task,
                "max_new_tokens": ANSWER_TOKENS[task.split("_")[0]], "length": length}

    if args.data and "ruler" in Path(args.data).name:
        groups = {}
        for task, length, *parts in read_fields(args.data, RULER_KEYS):
            if task not in RULER:
                raise ValueError(f"{args.data}: task {task} is none of {', '.join(RULER)}")
            if not args.lengths or length in args.lengths:
                groups.setdefault((task, length), []).append(parts)
        return Path(args.data).name, [item(*kind, *parts) for kind, group in groups.items()
                                      for parts in group[: args.limit]]
    name, texts = texts_of(args.data)
    items, text = [], "\n\n".join(texts)
    places = [(task, length, i) for length in args.lengths or LENGTHS for task in RULER
              for i in range(args.limit or 4)]
    for task, length, i in tqdm(places, desc="items", leave=False, delay=2):
        def make(n):
            rng = random.Random(f"{task} {length} {i}")
            return item(task, length, *RULER[task](task, rng, n, text))

        items.append(fill(make, length))
    return f"generated, {name}", items


LENGTHS = (1024, 2048, 4096)  # tokens of generated items
# (tokenizer, args) -> (name of the data, items)
TASKS = {"perplexity": text_items, "passkey": functools.partial(retrieval_items, passkey_document),
         "kv_retrieval": functools.partial(retrieval_items, kv_document),
         "lines": functools.partial(retrieval_items, lines_document), "ruler": ruler_items}
