"""Quality: what Double Sparsity and other ways to choose tokens lose against dense, through the decode code that generates.

Every scored token is decoded: it attends to its own past with its own selection. Nothing is masked after the fact.
Each run prints its rows; with --save it appends them to results/quality.jsonl, whence `table` prints the README's table.
Usage: python eval.py perplexity --data FILE [--context 4096] [--n_tokens 256] [--methods ds exact_topk quest streaming]
       python eval.py agreement --data FILE [--context 4096]      KL to dense and how often the likeliest token is the same
       python eval.py kv_retrieval [--data FILE] [--limit 100]
       python eval.py longbench --data multifieldqa_en.jsonl [--prompts dataset2prompt.json]     or gov_report, triviaqa
       python eval.py mmlu --data DIR         the published archive: DIR/dev and DIR/test with a .csv file per subject
       python eval.py table
"""
import argparse
import csv
import datetime
import gzip
import json
import lzma
import math
import random
import statistics
import string
import subprocess
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from tqdm import tqdm

from ds_attention import attend_ref, live_range, score_ref, select_ref
from generate import HERE, add_sparsity_arguments, default_dtype, load, load_maps, pick_device, read_text, sparsity_from
from model import ArgumentParser, KVCache, LayerCache, run_command
from tiny.tasks import kv_answer, kv_context, kv_question, random_kv


# ---------------------------------------------------------------- other methods at the same budget


class Baseline(LayerCache):
    """A sparse layer that scores tokens in another way; budget, first, newest tokens and dense layers are Double Sparsity's.

    One sequence, its positions as rows, on the reference path. Made of a LayerCache; it has no labels.
    """

    def __init__(self, layer):
        super().__init__(layer.kv, layer.window, layer.ds)

    def row(self, b):
        return type(self)(super().row(b))

    def write(self, k, v, positions, labels=True):
        super().write(k, v, positions, labels=False)

    def scores(self, q, k):
        """q [R, HKV, G, D], k [HKV, S, D], fp32 -> [R, HKV, G, S], or [S] for all alike."""
        raise NotImplementedError

    def choose(self, q, seq_lens):
        """The tokens attended, (indices [R, HKV, N], n_tokens [R]) as in select_ref."""
        S, HKV = int(seq_lens.max()), self.kv.shape[1]
        k = self.past(S)[0][0].float()
        scores = self.scores(q.float().unflatten(1, (HKV, -1)), k).expand(len(q), HKV, q.shape[1] // HKV, S)
        return best_tokens(self, scores.mean(2) if self.ds.pool == "mean" else scores.amax(2), seq_lens)

    def decode(self, q, seq_lens):
        k, v = (x.expand(len(q), -1, -1, -1) for x in self.past(int(seq_lens.max())))
        return attend_ref(q, k, v, seq_lens, *self.choose(q, seq_lens))


def best_tokens(layer, scores, seq_lens):
    """scores [R, HKV, S] -> (indices [R, HKV, N], n_tokens [R]) by the layer's DSConfig."""
    n = layer.ds.budget(live_range(seq_lens, layer.window)[1])
    return select_ref(scores, seq_lens, n, int(n.max()), layer.ds.sink, layer.ds.recent, layer.window), n


class ExactTopK(Baseline):
    """The best tokens by q . k itself (of a group's queries, by their mean or maximum): the ceiling of token sparsity."""

    def scores(self, q, k):
        return torch.einsum("rhgd,hsd->rhgs", q, k)


class Streaming(Baseline):
    """The first and the newest tokens alone (StreamingLLM, arXiv 2309.17453, without its shifted positions)."""

    def scores(self, q, k):
        return torch.arange(k.shape[1], dtype=torch.float32, device=k.device)


class Quest(Baseline):
    """Pages of 16 tokens by a bound of q . k from the page's extremes (arXiv 2406.10774); the last is cut to the budget."""

    PAGE = 16

    def __init__(self, layer):
        super().__init__(layer)
        # a row's last page may hold tokens after it: all of its own are among the newest, which are attended in any case
        if self.ds.recent < self.PAGE - 1:
            raise ValueError(f"recent={self.ds.recent}: quest needs the newest {self.PAGE - 1} tokens at least")

    def scores(self, q, k):
        S = k.shape[1]
        padded = torch.cat([k, k[:, -1:].expand(-1, -S % self.PAGE, -1)], 1)  # repeats a key: no new extreme
        low, high = padded.unflatten(1, (-1, self.PAGE)).aminmax(dim=2)  # [HKV, pages, D]
        bound = torch.einsum("rhgd,hpd->rhgp", q.clamp(min=0), high) + torch.einsum("rhgd,hpd->rhgp", q.clamp(max=0), low)
        return bound.repeat_interleave(self.PAGE, -1)[..., :S]


class H2O(Baseline):
    """Half the budget for the newest tokens, half for those with the most attention so far; the rest is evicted for good
    (arXiv 2306.14048; no tokens are forced). Rows must come in order from the first token on, one by one: it is slow."""

    def __init__(self, layer):
        super().__init__(layer)
        if self.window is not None:
            raise ValueError(f"window={self.window}: h2o is not made for sliding windows")

    def decode(self, q, seq_lens):
        HKV, D = self.kv.shape[1], self.kv.shape[4]
        k, v = (x[0].float() for x in self.past(int(seq_lens.max())))  # [HKV, S, D]
        out = torch.empty_like(q)
        for row, length in enumerate(seq_lens.tolist()):
            if length == 1:
                self.kept = torch.empty(HKV, 0, dtype=torch.long, device=q.device)  # positions, ascending
                self.attention = torch.empty(HKV, 0, device=q.device)  # the sum of what each has got
            n = self.ds.budget(length)
            self.kept = F.pad(self.kept, (0, 1), value=length - 1)
            self.attention = F.pad(self.attention, (0, 1))
            while self.kept.shape[1] > n:
                old = self.attention.masked_fill(self.kept >= length - max(1, n // 2), float("inf"))
                stays = torch.ones_like(self.kept, dtype=torch.bool).scatter_(1, old.argmin(1, keepdim=True), False)
                self.kept, self.attention = (x[stays].view(HKV, -1) for x in (self.kept, self.attention))
            index = self.kept[..., None].expand(-1, -1, D)
            logits = torch.einsum("hgd,hnd->hgn", q[row].float().view(HKV, -1, D), k.gather(1, index)) / math.sqrt(D)
            weights = logits.softmax(-1)
            self.attention += weights.sum(1)
            out[row] = torch.einsum("hgn,hnd->hgd", weights, v.gather(1, index)).flatten(0, 1).to(q.dtype)
        return out


class Probed:
    """A sparse layer that also sums up the attention mass which its tokens hold: share of the exact softmax, per query head."""

    def __init__(self, layer):
        self.layer, self.ds, self.mass, self.rows = layer, layer.ds, 0.0, 0
        self.write, self.past = layer.write, layer.past

    def decode(self, q, seq_lens):
        layer, S = self.layer, int(seq_lens.max())
        if isinstance(layer, Baseline):
            indices, n = layer.choose(q, seq_lens)
        else:
            labels = layer.labels[..., :S].expand(len(q), -1, -1, -1)
            scores = score_ref(q, labels, layer.label_map, seq_lens, layer.window, layer.ds.pool)
            indices, n = best_tokens(layer, scores, seq_lens)
        grouped = q.float().unflatten(1, (layer.kv.shape[1], -1))  # [R, HKV, G, D]
        logits = torch.einsum("rhgd,hsd->rhgs", grouped, layer.past(S)[0][0].float()) / math.sqrt(q.shape[2])
        start, _ = live_range(seq_lens, layer.window)
        position = torch.arange(S, device=q.device)
        eligible = (position >= start[:, None]) & (position < seq_lens[:, None])  # [R, S]
        weights = logits.masked_fill(~eligible[:, None, None], float("-inf")).softmax(-1)
        kept = weights.gather(3, indices.clamp(min=0).long()[:, :, None].expand(-1, -1, weights.shape[2], -1))
        kept = kept.masked_fill((indices < 0)[:, :, None], 0.0).sum(3)
        self.mass, self.rows = self.mass + kept.sum(0).flatten().double(), self.rows + len(q)
        return layer.decode(q, seq_lens)


METHODS = {"ds": None, "exact_topk": ExactTopK, "quest": Quest, "streaming": Streaming, "h2o": H2O}


# ---------------------------------------------------------------- tasks


class Decoder:
    """A model with one cache for one sequence, which it scores as decode rows."""

    def __init__(self, model, tokenizer, max_seq_length, ds=None, label_maps=None, rows=512, method="ds"):
        """ds: None for dense. rows: tokens decoded at once; it changes memory, not results. method: one of METHODS."""
        self.model, self.tokenizer, self.rows, self.method = model, tokenizer, rows, method
        self.cache = KVCache(model.config, 1, max_seq_length, model.device, model.dtype, ds, label_maps)
        if METHODS[method] is not None:
            self.cache.layers = [layer if layer.ds is None else METHODS[method](layer) for layer in self.cache.layers]

    def start(self, tokens=()):
        """Forgets the sequence and prefills another, dense (h2o decodes it: it must see each token's attention)."""
        self.cache.seq_lens.zero_()
        if tokens and self.method == "h2o":
            for _ in self.logits(list(tokens)):
                pass
        elif tokens:
            self.model.prefill([list(tokens)], self.cache)

    def logits(self, tokens):
        """Decodes known tokens (list of ids) one after the other; yields (their logits [rows, vocab], first index)."""
        ids = torch.tensor(tokens, device=self.model.device)
        for first in range(0, len(tokens), self.rows):
            yield self.model.decode_rows(ids[first : first + self.rows], self.cache), first

    def negative_log_likelihood(self, tokens):
        """Nats of tokens[1:], each given all before it, the first ones included: [len(tokens) - 1] fp32."""
        self.start()
        targets = torch.tensor(tokens[1:], device=self.model.device)
        parts = [F.cross_entropy(logits.float(), targets[first : first + len(logits)], reduction="none")
                 for logits, first in self.logits(tokens[:-1])]
        return torch.cat(parts)

    def greedy(self, prompt, max_new_tokens, one_line=False):
        """Token ids that follow prompt (all but its last token prefilled), up to the end of text, or of the first line."""
        self.start(prompt[:-1])
        tokens = prompt[-1:]
        while len(tokens) <= max_new_tokens:
            logits, _ = next(self.logits(tokens[-1:]))
            token = logits[0].argmax().item()
            if token in self.model.config.eos_ids:
                break
            tokens = tokens + [token]
            if one_line and "\n" in self.tokenizer.decode(tokens[1:]).lstrip():
                break
        return tokens[1:]

    def answers(self, context, question, answer):
        """True if greedy decoding after context (prefilled) and question (decoded) gives exactly the answer.

        Teacher forcing decides it in one pass: greedy decoding gives the answer if and only if each of its tokens is
        the most likely one after the right ones before it.
        """
        self.start(context)
        tokens = question + answer
        best = torch.cat([logits.argmax(-1) for logits, _ in self.logits(tokens[:-1])])
        return best[len(question) - 1 :].tolist() == answer


def text_windows(tokenizer, texts, context, limit=None):
    """Non-overlapping windows of `context` tokens, BOS in front of each; short tails are dropped. limit: spread evenly."""
    if tokenizer.bos_id is None:
        raise ValueError("perplexity needs a model with a beginning-of-text token: its config.json has no bos_token_id")
    windows = []
    for text in texts:
        tokens = tokenizer.encode(text, bos=False)
        windows += [[tokenizer.bos_id] + tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)]
    if not windows:
        raise ValueError(f"no text of {context} tokens: give a longer --data or a smaller --context")
    if limit and limit < len(windows):
        windows = [windows[round(i * (len(windows) - 1) / max(1, limit - 1))] for i in range(limit)]
    return windows


def perplexity(decoder, windows, progress=False):
    """windows: lists of ids, the first of each a BOS -> {"perplexity" per token, "bits_per_byte", "n_items" windows}."""
    nats = tokens = text_bytes = 0
    bar = tqdm(windows, desc="perplexity", unit="window", leave=False, disable=not progress)
    for window in bar:
        nll = decoder.negative_log_likelihood(window)
        nats += nll.double().sum().item()
        tokens += len(nll)
        text_bytes += len(decoder.tokenizer.decode(window[1:]).encode())
        bar.set_postfix_str(f"{math.exp(nats / tokens):.3f}")
    return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes, "n_items": len(windows)}


def agreement(decoder, dense, windows, progress=False):
    """decoder against dense, two Decoders, on the same text (windows as in perplexity).

    {"kl": of dense's next token from decoder's, nats per token; "top1": how often their likeliest tokens are the same, percent;
    "mass": per sparse layer and query head, the mean share of the exact attention that the chosen tokens hold; not for h2o}.
    """
    if decoder.method != "h2o":
        decoder.cache.layers = [layer if layer.ds is None else Probed(layer) for layer in decoder.cache.layers]
    kl = same = tokens = 0
    bar = tqdm(windows, desc="agreement", unit="window", leave=False, disable=not progress)
    for window in bar:
        decoder.start()
        dense.start()
        for (ours, _), (theirs, _) in zip(decoder.logits(window[:-1]), dense.logits(window[:-1])):
            ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
            kl += F.kl_div(ours, theirs, reduction="sum", log_target=True).double().item()
            same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
            tokens += len(ours)
        bar.set_postfix_str(f"{kl / tokens:.4f} nats, {100 * same / tokens:.1f}%")
    found = {"kl": kl / tokens, "top1": 100 * same / tokens, "n_items": len(windows)}
    probed = [layer for layer in decoder.cache.layers if isinstance(layer, Probed)]
    return found | ({"mass": [(layer.mass / layer.rows).tolist() for layer in probed]} if probed else {})


def kv_items(path=None, limit=None, n_records=50, seed=0):
    """Key-value items [(records, key, value)]: from a file in the published format (.jsonl or .jsonl.gz), or generated."""
    if path is None:
        rng = random.Random(seed)
        drawn = [(random_kv(rng, n_records), rng.randrange(n_records)) for _ in range(limit or 100)]
        return [(records, *records[i]) for records, i in drawn]
    return [tuple(item) for item in read_json_lines(path, ("ordered_kv_records", "key", "value"))[:limit]]


def encode_kv_item(tokenizer, records, key, value):
    """(context, question, answer) as token ids: the prompt is tokenised whole, then cut where the question starts."""
    whole = tokenizer.encode(kv_context(records) + kv_question(key))
    context = tokenizer.encode(kv_context(records))
    split = next((i for i, (a, b) in enumerate(zip(context, whole)) if a != b), len(context))
    answer = tokenizer.encode(kv_answer(value)[1:], bos=False)  # the encoder puts the leading space itself
    return whole[:split], whole[split:], answer


def kv_retrieval(decoder, items, progress=False):
    """items: (context, question, answer) token ids. Exact match in percent: the context is prefilled, the rest decoded."""
    right = 0
    bar = tqdm(items, desc="kv_retrieval", unit="item", leave=False, disable=not progress)
    for done, item in enumerate(bar, 1):
        right += decoder.answers(*item)
        bar.set_postfix_str(f"{100 * right / done:.1f}%")
    return {"accuracy": 100 * right / len(items), "n_items": len(items)}


def f_measure(common, found, wanted):
    """Harmonic mean of precision and recall, in percent."""
    return 200 * common / (found + wanted) if common else 0.0


def f1(prediction, answer):
    """Of the words that both have, however often both have them; without case, punctuation and articles."""
    found, wanted = ([word for word in "".join(c for c in text.lower() if c not in string.punctuation).split()
                      if word not in ("a", "an", "the")] for text in (prediction, answer))
    return f_measure(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def rouge_l(prediction, answer):
    """Of the longest common subsequence of words, as they stand."""
    found, wanted = prediction.split(), answer.split()
    row = [0] * (len(wanted) + 1)
    for word in found:
        before = 0
        for i, other in enumerate(wanted, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return f_measure(row[-1], len(found), len(wanted))


# LongBench (arXiv 2308.14508): tokens of an answer, metric, whether the answer is one line, and a wording of our own for when
# its prompts are not at hand
LONGBENCH = {
    "multifieldqa_en": (64, f1, False, "{context}\n\nAnswer from the text above, in a few words.\nQuestion: {input}\nAnswer:"),
    "triviaqa": (32, f1, True, "{context}\n\nAnswer in a few words.\n{input}\nAnswer:"),
    "gov_report": (512, rouge_l, False, "{context}\n\nA summary of the report above, on one page.\nSummary:"),
}


def longbench_items(tokenizer, path, name, prompts, size, limit=None):
    """[(prompt ids, tokens of an answer, answers)] of the LongBench dataset `name`; a prompt too long loses its middle."""
    max_new_tokens, *_, wording = LONGBENCH[name]
    if prompts:
        try:
            wording = json.loads(read_text(prompts))[name]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{prompts}: not a JSON object with a prompt for {name}") from None
    room, items = size - max_new_tokens, []
    if room < 2:
        raise ValueError(f"context={size}: leaves no room for an answer of {max_new_tokens} tokens")
    for context, question, answers in read_json_lines(path, ("context", "input", "answers"))[:limit]:
        try:
            ids = tokenizer.encode(wording.format(context=context, input=question))
        except (KeyError, IndexError):
            raise ValueError(f"{prompts}: the prompt for {name} may name {{context}} and {{input}} alone") from None
        if not answers:
            raise ValueError(f"{path}: an item without answers")
        items.append((ids if len(ids) <= room else ids[: room // 2] + ids[-(room - room // 2) :], max_new_tokens, answers))
    if not items:
        raise ValueError(f"{path}: no items in it")
    return items


def longbench(decoder, items, metric, one_line, progress=False):
    """Mean over items of the best metric (f1 or rouge_l) over their answers, in percent. one_line: the first line counts."""
    total = 0.0
    bar = tqdm(items, desc="longbench", unit="item", leave=False, disable=not progress)
    for done, (prompt, max_new_tokens, answers) in enumerate(bar, 1):
        text = decoder.tokenizer.decode(decoder.greedy(prompt, max_new_tokens, one_line)).strip()
        if one_line:
            text = text.split("\n")[0]
        total += max(metric(text, answer) for answer in answers)
        bar.set_postfix_str(f"{total / done:.1f}")
    return {"accuracy": total / len(items), "n_items": len(items)}


def mmlu_items(tokenizer, directory, limit=None):
    """[(prompt ids with five solved questions of the subject in front, ids of the four letters, index of the right one)]."""
    def read(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows or any(len(row) != 6 or row[5] not in tuple("ABCD") for row in rows):
            raise ValueError(f"{path}: each line must hold a question, four choices and a letter")
        return rows

    def ask(question, *choices):
        return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)), "Answer:"])

    letters = [tokenizer.encode(f"Answer: {letter}", bos=False)[-1] for letter in "ABCD"]
    items = []
    for path in sorted(Path(directory, "test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        solved = [f"{ask(*row[:5])} {row[5]}" for row in read(Path(directory, "dev", f"{subject}_dev.csv"))[:5]]
        head = f"Questions about {subject.replace('_', ' ')}, with the letters of their right answers."
        items += [(tokenizer.encode("\n\n".join([head, *solved, ask(*row[:5])])), letters, "ABCD".index(row[5]))
                  for row in read(path)]
    if not items:
        raise ValueError(f"{directory}: no test/*_test.csv in it; --data takes the directory of the published archive")
    if limit and limit < len(items):  # spread over the subjects
        items = [items[i * len(items) // limit] for i in range(limit)]
    return items


def mmlu(decoder, items, progress=False):
    """Percent of items whose right letter is the likeliest of the four. The last token is decoded, all before it prefilled."""
    right = 0
    bar = tqdm(items, desc="mmlu", unit="item", leave=False, disable=not progress)
    for done, (prompt, letters, answer) in enumerate(bar, 1):
        decoder.start(prompt[:-1])
        logits, _ = next(decoder.logits(prompt[-1:]))
        right += logits[0, letters].argmax().item() == answer
        bar.set_postfix_str(f"{100 * right / done:.1f}%")
    return {"accuracy": 100 * right / len(items), "n_items": len(items)}


def read_json_lines(path, keys):
    """The values of these keys in each line of a .jsonl, .jsonl.gz or .jsonl.xz file: a list of lists."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [[item[key] for key in keys] for item in map(json.loads, file)]
    except (json.JSONDecodeError, UnicodeDecodeError, lzma.LZMAError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not a line of JSON with {', '.join(keys)} per item ({error!r})") from None


def read_texts(path):
    """A UTF-8 text file -> [text]; a .jsonl[.gz|.xz] file with a "text" per line -> a list of them."""
    if ".jsonl" not in Path(path).name:
        return [read_text(path)]
    return [text for text, in read_json_lines(path, ("text",))]


# ---------------------------------------------------------------- results

RESULTS = HERE / "results" / "quality.jsonl"


def provenance(device):
    """What a row was measured with: gpu, torch, triton, commit, date."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {"gpu": torch.cuda.get_device_name() if device != "cpu" else "none (CPU)", "torch": torch.__version__,
            "triton": triton.__version__, "commit": git.stdout.strip() or "unknown",
            "date": datetime.date.today().isoformat()}


def budget_name(ds):
    """"1/16", "n=256" or "all" for dense."""
    if ds is None:
        return "all"
    return f"n={ds.n_tokens}" if ds.n_tokens else f"1/{ds.sparsity:g}"


def table(path=RESULTS):
    """The rows of results/quality.jsonl as a Markdown table, the newest of each setting."""
    if not path.exists():
        raise ValueError(f"{path}: no results yet; run eval.py perplexity or kv_retrieval first")
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names = ("task", "checkpoint", "data", "context", "method", "budget", "n_items", "gpu", "config")
        rows[json.dumps([*(row[name] for name in names), row.get("prompts")])] = row
    lines = ["| task | text | context | method | budget | tokens in a sparse layer | score | dense | items |",
             "|---|---|---|---|---|---|---|---|---|"]
    for row in rows.values():
        if row["method"] == "dense":
            continue
        if row["task"] == "perplexity":
            score = f"{row['score']:.3f} ({row['score'] / row['dense_score']:.4f}x)"
            dense = f"{row['dense_score']:.3f} = {row['dense_bits_per_byte']:.4f} bits/byte"
        elif row["task"] == "agreement":
            score, dense = f"KL {row['score']:.4f}, {row['top1']:.1f}% of likeliest tokens", "0"
            if "mass" in row:
                score += f", {100 * statistics.mean(sum(row['mass'], [])):.1f}% of attention"
        else:
            score, dense = f"{row['score']:.1f}%", f"{row['dense_score']:.1f}%"
        lines.append(f"| {row['task']} | {row['data']} | {row['context']} | {row['method']} | {row['budget']} | "
                     f"{row['mean_tokens']:.0f} | {score} | {dense} | {row['n_items']} |")
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("perplexity", "agreement", "kv_retrieval", "longbench", "mmlu", "table"))
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"), help="directory or hub id (default: the tiny model)")
    parser.add_argument("--data", help="perplexity, agreement: UTF-8 text, or .jsonl[.xz] with a \"text\" per line; "
                                       "kv_retrieval: items in the published format, .jsonl[.gz] (default: generated); "
                                       "longbench: NAME.jsonl; mmlu: a directory")
    parser.add_argument("--prompts", metavar="FILE", help="longbench: its dataset2prompt.json (default: our own wording)")
    parser.add_argument("--context", type=int, default=4096, help="tokens per perplexity window, or at most per longbench item "
                                                                    "(default %(default)s)")
    parser.add_argument("--limit", type=int, help="windows or items at most (default: all; 100 generated items)")
    parser.add_argument("--records", type=int, default=50, help="pairs of a generated item (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["ds"],
                        help="ways to choose the tokens, all at the same budget (default: ds)")
    parser.add_argument("--save", action="store_true", help="append the rows to results/quality.jsonl")
    add_sparsity_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    if args.task == "table":
        return print(table())
    for name in ("context", "limit", "records"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least 1")
    ds = sparsity_from(args)
    if args.task != "kv_retrieval" and not args.data:
        raise ValueError(f"{args.task} needs a text: give --data FILE")
    if args.task == "agreement" and ds is None:
        raise ValueError("agreement compares with dense: give a --sparsity above 1")
    device = pick_device(args.device)
    model, tokenizer, checkpoint = load(args.checkpoint, device, default_dtype(device))
    run, lengths, size = prepare(args, tokenizer)
    if size > model.config.max_positions:
        raise ValueError(f"{size} tokens are more than the model's {model.config.max_positions} positions: take a smaller "
                         "--context, or fewer --records")
    label_maps = load_maps(checkpoint, model.config, ds, device, args.channels) if ds else None
    dense = Decoder(model, tokenizer, size)
    if args.task == "agreement":
        run = partial(run, dense=dense)
    dense_row = None
    for method in (["dense"] if args.task != "agreement" else []) + (args.methods if ds else []):
        mode = ds if method != "dense" else None
        found = run(dense if mode is None else Decoder(model, tokenizer, size, ds, label_maps, method=method), progress=True)
        counts = [mode.budget(n) if mode else n for per_item in lengths for n in per_item]
        score = found.pop({"perplexity": "perplexity", "agreement": "kl"}.get(args.task, "accuracy"))
        row = {"task": args.task, "checkpoint": checkpoint.name, "data": Path(args.data).name if args.data else "generated",
               "method": method, "budget": budget_name(mode), "mean_tokens": sum(counts) / len(counts), "score": score,
               "context": size if len(lengths[0]) > 1 else round(sum(map(sum, lengths)) / len(lengths)),
               "config": asdict(mode) if mode else None, **provenance(device), **found}
        dense_row = dense_row or row
        row["dense_score"] = 0.0 if args.task == "agreement" else dense_row["score"]
        if args.task == "perplexity":
            row["dense_bits_per_byte"] = dense_row["bits_per_byte"]
        if args.task == "longbench":
            row["prompts"] = Path(args.prompts).name if args.prompts else "own"
        print(json.dumps(row))
        if args.save:
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def prepare(args, tokenizer):
    """The task: (its function of a Decoder, lists of the live lengths that each item is scored at, tokens of cache)."""
    if args.task == "kv_retrieval":
        items = [encode_kv_item(tokenizer, *item) for item in kv_items(args.data, args.limit, args.records)]
        size = max(sum(map(len, item)) for item in items)
        return partial(kv_retrieval, items=items), [[len(context)] for context, _, _ in items], size
    if args.task == "longbench":
        name = Path(args.data).name.split(".")[0]
        if name not in LONGBENCH:
            raise ValueError(f"{args.data}: must be named after one of {', '.join(LONGBENCH)}")
        items = longbench_items(tokenizer, args.data, name, args.prompts, args.context, args.limit)
        _, metric, one_line, _ = LONGBENCH[name]
        run = partial(longbench, items=items, metric=metric, one_line=one_line)
        return run, [[len(prompt)] for prompt, _, _ in items], args.context
    if args.task == "mmlu":
        items = mmlu_items(tokenizer, args.data, args.limit)
        lengths = [[len(prompt)] for prompt, _, _ in items]
        return partial(mmlu, items=items), lengths, max(map(max, lengths))
    windows = text_windows(tokenizer, read_texts(args.data), args.context, args.limit)
    task = perplexity if args.task == "perplexity" else agreement
    return partial(task, windows=windows), [range(1, args.context + 1)], args.context


if __name__ == "__main__":
    run_command(main)
