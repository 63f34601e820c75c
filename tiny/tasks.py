"""Retrieval tasks in our own wording, for training, tests, evaluation and demonstrations.

Three tasks, each in the same four pieces: `*_context` holds the facts, `*_question` asks for one,
`*_answer` is what should follow, and `*_prompt` is context + question. An answer starts with a
space and the prompt ends just before it. SentencePiece starts a new piece at a space, so prompt and
answer tokenise separately exactly as they do together; its encoder adds a space of its own in
front, so encode `answer[1:]`. Several questions about one context follow each other as
`question + answer + end`, with end = "\\n" for key-value items and ".\\n" for the other two.

- key-value: the value of one key in a JSON object of UUIDs, about 74 of our tokens a pair;
- lines: the number that one of many named lines holds, about 18 tokens a line;
- needle: a number mentioned once somewhere in a long text.

The `random_*` helpers draw items from a `random.Random`, so an item is a function of its seed.
Standard library only.

Usage:
    rng = random.Random(0)
    records = random_kv(rng, 75)
    key, value = rng.choice(records)
    prompt, answer = kv_prompt(records, key), kv_answer(value)
"""
import random

KV_INTRO = "Here is a table of keys and values.\n\n"
LINES_INTRO = "Each line below holds a number.\n\n"

WORDS = """acorn amber anchor apple arrow autumn barley basket beacon bell birch blanket boat bottle
branch bread bridge brook butter button candle canvas castle cedar chain cherry clay cliff clock
cloud clover coal copper coral corn cotton cradle crown daisy desert dove drum eagle ember falcon
feather fern field fire flag flute forest fountain fox frost garden gate ginger glass gold grain
granite grass harbor hawk hazel hill honey horn horse island ivory jacket jewel kettle kitchen
ladder lamp lantern lark leaf lemon letter lily linen lion maple marble market meadow mill mirror
moon moss mountain needle nest night north oak ocean olive orange orchard otter owl palm paper pearl
pebble pepper pillow pine planet plum pond prairie quill rabbit rain raven ribbon river robin rock
rope rose saddle sail salmon salt sand scarf shadow shell shepherd silk silver snow sparrow spring
star stone storm stream summer swan table thistle thunder tiger timber tower trumpet tulip valley
velvet village violet wagon walnut water wheat wheel willow window winter wolf yarn""".split()


def random_uuid(rng: random.Random, digits: str = "0123456789abcdef") -> str:
    """A random UUID-shaped string (8-4-4-4-12) over `digits`."""
    return "-".join("".join(rng.choices(digits, k=length)) for length in (8, 4, 4, 4, 12))


def random_name(rng: random.Random) -> str:
    """Two words, like amber-falcon: one of about 28 thousand names."""
    return f"{rng.choice(WORDS)}-{rng.choice(WORDS)}"


def random_number(rng: random.Random, length: int = 5) -> str:
    """A string of `length` decimal digits."""
    return "".join(rng.choices("0123456789", k=length))


def random_names(rng: random.Random, n: int) -> list[str]:
    """`n` different names; n is at most half of the names there are."""
    if n > len(WORDS) ** 2 // 2:
        raise ValueError(f"n={n}: must be at most {len(WORDS) ** 2 // 2}, half of the distinct "
                         "names; ask for fewer")
    names = {}  # a dict keeps the order in which the names were drawn
    while len(names) < n:
        names[random_name(rng)] = None
    return list(names)


def random_kv(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """`n` (key, value) pairs of random UUIDs."""
    return [(random_uuid(rng), random_uuid(rng)) for _ in range(n)]


def random_lines(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """`n` (name, number) pairs; the names differ."""
    return [(name, random_number(rng)) for name in random_names(rng, n)]


def random_needles(rng: random.Random, n: int) -> list[tuple[str, str, float]]:
    """`n` (name, number, depth) triples; the names differ, depths are uniform in [0, 1)."""
    return [(name, random_number(rng), rng.random()) for name in random_names(rng, n)]


def random_text(rng: random.Random, n_words: int) -> str:
    """Sentences of random words, about `n_words` in all: a haystack where no book is at hand."""
    sentences = [rng.choices(WORDS, k=rng.randint(5, 12)) for _ in range(n_words // 8 + 1)]
    return " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)


def kv_context(records: list[tuple[str, str]]) -> str:
    """A JSON object of the (key, value) records, a pair on each line."""
    return KV_INTRO + "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in records) + "}\n"


def kv_question(key: str) -> str:
    return f'\nWhat is stored under "{key}"?\nValue:'


def kv_answer(value: str) -> str:
    return f' "{value}"'


def kv_prompt(records: list[tuple[str, str]], key: str) -> str:
    """Asks for the value of `key` among (key, value) records; `kv_answer(value)` should follow."""
    return kv_context(records) + kv_question(key)


def lines_context(lines: list[tuple[str, str]]) -> str:
    """A sentence on each line for the (name, number) pairs."""
    return LINES_INTRO + "".join(f"Line {name} holds {number}.\n" for name, number in lines)


def lines_question(name: str) -> str:
    return f"\nWhich number does line {name} hold? Line {name} holds"


def lines_answer(number: str) -> str:
    return f" {number}"


def lines_prompt(lines: list[tuple[str, str]], name: str) -> str:
    """Asks which number the line `name` holds; `lines_answer(number)` should follow."""
    return lines_context(lines) + lines_question(name)


def needle_sentence(name: str, number: str) -> str:
    return f" The safe of {name} opens with {number}."


def needle_pieces(text: str, needles: list[tuple[str, str, float]]) -> list[str]:
    """`text` cut at spaces, the needles' sentences between: text, sentence, text, ..., text.

    needles: (name, number, depth); depth 0 puts the sentence near the text's start, 1 at its end.
    """
    pieces, start = [], 0
    for name, number, depth in sorted(needles, key=lambda needle: needle[2]):
        cut = text.find(" ", max(start, int(depth * len(text))))
        cut = len(text) if cut < 0 else cut
        pieces += [text[start:cut], needle_sentence(name, number)]
        start = cut
    return pieces + [text[start:]]


def needle_question(name: str) -> str:
    return f"\n\nWhich number opens the safe of {name}? The safe of {name} opens with"


def needle_answer(number: str) -> str:
    return f" {number}"


def needle_prompt(text: str, needles: list[tuple[str, str, float]], name: str) -> str:
    """Hides `needles` (name, number, depth) in `text` and asks for the number of `name`."""
    return "".join(needle_pieces(text, needles)) + needle_question(name)
