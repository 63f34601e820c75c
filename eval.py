"""Quality: what Double Sparsity and other ways to choose tokens lose against dense, through the decode code that generates.

Every scored token is decoded: it attends to its own past with its own selection, at every length (as with
--dense_below 0). Nothing is masked after the fact. A context that is not scored is prefilled, dense, as generate.py
does. All settings of a command see an item one after the other, and dense is run once for them all. Rows go to
runs/quality.jsonl; a run that was interrupted continues where it was (--force: from the start).

  perplexity    of text, beside how far the next token is from dense's (KL, the same likeliest token) and how much
                of the exact attention the chosen tokens hold
  kv_retrieval, lines, passkey    right if greedy decoding gives exactly the answer's tokens after the question
  ruler, longbench                the benchmarks' own metrics of a greedy answer; ruler without --data: our items
  mmlu          right if the right letter is the likeliest of the four
Scores of longbench and mmlu are not those of their own scripts; without --prompts the wording is ours, too.

Usage: python eval.py --limit 4                             perplexity and key-value retrieval, dense and ds
       python eval.py perplexity --data FILE --context 4096 --budgets n=256 n=128 --methods ds exact_topk quest
       python eval.py perplexity --data FILE --context 32768 --last 4096    the last 4,096 tokens of each window
       python eval.py passkey --checkpoint DIR --lengths 2000 4000 --limit 20
       python eval.py ruler --data ruler.jsonl.xz --chat --lengths 4096     or without --data, at any length
       python eval.py longbench --data multifieldqa_en.jsonl [--prompts dataset2prompt.json]
       python eval.py mmlu --data DIR       the published archive: DIR/dev and DIR/test with a .csv file per subject
       python eval.py table                 of results/quality.jsonl, the README's
"""
import argparse
import contextlib
import csv
import datetime
import functools
import gzip
import hashlib
import json
import lzma
import math
import random
import re
import statistics
import string
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from huggingface_hub import hf_hub_download
from tqdm import tqdm

import calibrate
from ds_attention import (
    DSConfig, Workspace, attend, attend_ref, bits_of, eligible_tokens, live_range, select_ref, select_tokens, widths_name
)
from generate import HERE, add_sparsity_arguments, label_bits, load, load_maps, sparsity_from
from model import (
    ArgumentParser, KVCache, LayerCache, default_dtype, fingerprint, open_tensors, pick_device, run_command
)
from tiny.tasks import (
    kv_answer, kv_context, kv_question, lines_answer, lines_context, lines_question, needle_answer, needle_pieces,
    needle_question, needle_sentence, random_kv, random_lines, random_name, random_names, random_needles, random_number,
    random_uuid
)
from tokenizer import read_text

RESULTS = HERE / "results" / "quality.jsonl"  # the README's rows
RUNS = HERE / "runs"  # everybody's own, and what continues an interrupted run; git ignores it


# ---------------------------------------------------------------- methods: how a sparse layer chooses its tokens


class Sparse(LayerCache):
    """A sparse layer of one sequence, whose decode rows are positions of it. A method is how it chooses the rows' tokens.

    Made of a LayerCache; budget, first and newest tokens are its DSConfig's. Counts the tokens that its rows attend to.
    """

    labelled = False  # whether the choice reads labels
    calibration, bits = None, None  # of the labels, where the method is not for any
    in_order = False  # whether rows must come from the first token on, since a row's choice depends on those before
    EVERY = 8  # of so many rows, one is asked how much of the exact attention its tokens hold

    def __init__(self, layer, scratch):
        """scratch: {shape of the queries: Workspace} of the last number of rows, shared by all layers.

        Raises ValueError for a configuration that the method is not made for.
        """
        super().__init__(layer.kv, layer.window, layer.ds, layer.label_map, layer.labels)
        self.scratch = scratch
        self.start()

    def start(self, probed=False):
        """Counts from nought. probed: also sums up the attention mass which the chosen tokens hold."""
        self.attended, self.mass, self.probes = 0.0, 0.0 if probed else None, 0

    def row(self, b):
        return self  # there is no other sequence

    def write(self, k, v, positions, labels=True):
        super().write(k, v, positions, labels=self.labelled)

    def choose(self, q, seq_lens):
        """The tokens attended, (indices [R, HKV, N], n_tokens) as from select_tokens."""
        raise NotImplementedError

    def workspace_of(self, q):
        R, HQ, D = q.shape
        if q.shape not in self.scratch:
            for shape in [shape for shape in self.scratch if shape[0] != R]:
                del self.scratch[shape]
            HKV, S = self.kv.shape[1:3]
            self.scratch[q.shape] = Workspace(R, HQ, HKV, D, S, q.device, self.ds, self.window)
        return self.scratch[q.shape]

    def decode(self, q, seq_lens):
        indices, n = self.choose(q, seq_lens)
        out = self.attend_to(q, seq_lens, indices, n)
        self.attended = self.attended + n.double().mean() * len(q)
        if self.mass is not None:
            probe = slice(None, None, self.EVERY)
            self.mass = self.mass + self.kept_mass(q[probe], seq_lens[probe], indices[probe], n[probe])
            self.probes += len(q[probe])
        return out

    def attend_to(self, q, seq_lens, indices, n):
        (R, HKV, N), D = indices.shape, q.shape[2]
        if self.ds.use_triton(q):
            k, v = self.kv.expand(R, -1, -1, -1, -1).unbind(3)
            return attend(q, k, v, seq_lens, indices, n, self.window, self.workspace_of(q), overlap=self.labelled)
        heads = torch.arange(HKV, device=q.device)[:, None]
        # gathered by whole rows, which is many times faster than attend_ref's own gather; then each head is a row of its own
        k, v = (x[0][heads, indices.clamp(min=0)].view(R * HKV, 1, N, D) for x in self.kv.unbind(3))
        lengths = n.view(R, -1).expand(R, HKV).flatten()
        return attend_ref(q.reshape(R * HKV, -1, D), k, v, lengths).view_as(q)

    def best(self, scores, seq_lens):
        """scores [R, HKV, S] -> (indices [R, HKV, N], n_tokens [R])."""
        S, forced = scores.shape[2], (self.ds.sink, self.ds.recent, self.window)
        n = self.ds.budget(live_range(seq_lens, self.window)[1])
        most = self.ds.budget(S if self.window is None else min(S, self.window))
        return select_ref(scores, seq_lens, n, most, *forced), n

    def logits(self, q, seq_lens):
        """q . k / sqrt(D) of the past, -inf where a row may not look: [R, HKV, G, S] fp32."""
        S, grouped = int(seq_lens.max()), q.float().unflatten(1, (self.kv.shape[1], -1))
        found = torch.einsum("rhgd,hsd->rhgs", grouped / math.sqrt(q.shape[2]), self.past(S)[0][0].float())
        return found.masked_fill_(~eligible_tokens(seq_lens, S, self.window)[:, None, None], float("-inf"))

    def kept_mass(self, q, seq_lens, indices, n):
        """Share of the exact softmax that the chosen tokens hold, summed over the rows: [HQ] fp64."""
        weights, (R, _, N) = self.logits(q, seq_lens).softmax(-1), indices.shape
        chosen = torch.arange(N, device=q.device) < n.view(R, -1, 1)  # [R, 1, N]; what lies past n is not written
        index = indices.long().where(chosen, 0)[:, :, None].expand(-1, -1, weights.shape[2], -1)
        return (weights.gather(3, index) * chosen[:, :, None]).sum((0, 3)).flatten().double()


class DoubleSparsity(Sparse):
    """By label scores, through the stages that ds_decode runs."""

    labelled = True

    def choose(self, q, seq_lens):
        labels, workspace = self.labels.expand(len(q), -1, -1, -1), None
        if self.ds.use_triton(q):
            workspace = self.workspace_of(q)
        else:
            labels = labels[..., : int(seq_lens.max())]
        return select_tokens(q, labels, self.label_map, seq_lens, self.ds, self.window, workspace)


class Paper(DoubleSparsity):
    """The paper's choice: single channels of 4 bits by mean |q_c k_c|, and the mean of a group's scores, which is the score of
    its mean query."""

    calibration, bits = "qk", 4

    def choose(self, q, seq_lens):
        return super().choose(q.float().unflatten(1, (self.kv.shape[1], -1)).mean(2), seq_lens)


def pooled(scores):
    """One score of a token for a group's query heads: [R, HKV, G, S], -inf where not eligible -> [R, HKV, S].

    The logarithm of the sum of its softmax weights: a head with large scores has no more of a say than others.
    """
    if scores.shape[2] == 1:
        return scores[:, :, 0]
    return (scores - scores.logsumexp(-1, keepdim=True)).logsumexp(2)


class ExactTopK(Sparse):
    """The best tokens by q . k / sqrt(D) itself: the ceiling of token sparsity."""

    def choose(self, q, seq_lens):
        return self.best(pooled(self.logits(q, seq_lens)), seq_lens)


class Streaming(Sparse):
    """The first and the newest tokens alone (StreamingLLM, arXiv 2309.17453, without its shifted positions)."""

    def choose(self, q, seq_lens):
        position = torch.arange(int(seq_lens.max()), dtype=torch.float32, device=q.device)
        return self.best(position.expand(len(q), self.kv.shape[1], -1), seq_lens)


class Quest(Sparse):
    """Pages of 16 tokens by a bound of q . k from the page's extremes (arXiv 2406.10774), pooled over a group as scores are;
    the last page is cut to the budget."""

    PAGE = 16

    def __init__(self, layer, scratch):
        super().__init__(layer, scratch)
        # a row's last page may hold tokens after it: all of its own are among the newest, attended in any case
        if self.ds.recent < self.PAGE - 1:
            raise ValueError(f"recent={self.ds.recent}: quest needs the newest {self.PAGE - 1} tokens at least")

    def choose(self, q, seq_lens):
        S, q = int(seq_lens.max()), q.float().unflatten(1, (self.kv.shape[1], -1)) / math.sqrt(q.shape[2])
        k = self.past(S)[0][0].float()  # [HKV, S, D]
        padded = torch.cat([k, k[:, -1:].expand(-1, -S % self.PAGE, -1)], 1)  # repeats a key: no new extreme
        low, high = padded.unflatten(1, (-1, self.PAGE)).aminmax(dim=2)  # [HKV, pages, D]
        bound = (torch.einsum("rhgd,hpd->rhgp", q.clamp(min=0), high)
                 + torch.einsum("rhgd,hpd->rhgp", q.clamp(max=0), low))
        eligible = F.pad(eligible_tokens(seq_lens, S, self.window), (0, -S % self.PAGE)).unflatten(1, (-1, self.PAGE)).any(2)
        scores = pooled(bound.masked_fill(~eligible[:, None, None], float("-inf")))
        return self.best(scores.repeat_interleave(self.PAGE, -1)[..., :S], seq_lens)


class H2O(Sparse):
    """Half the budget for the newest tokens, half for those with the most attention so far; the rest is evicted for good
    (arXiv 2306.14048; no tokens are forced). Rows come one by one: it is slow."""

    in_order = True

    def __init__(self, layer, scratch):
        super().__init__(layer, scratch)
        if self.window is not None:
            raise ValueError(f"window={self.window}: h2o is not made for sliding windows")

    def decode(self, q, seq_lens):
        """As of any layer, row by row: what one keeps depends on the attention of those before."""
        _, HKV, S, _, D = self.kv.shape
        out, heads = torch.empty_like(q), torch.arange(HKV, device=q.device)
        for row, length in enumerate(seq_lens.tolist()):
            n = self.ds.budget(length)
            if length == 1:  # slots for the tokens that are kept, in no order
                slots = self.ds.budget(S)
                self.kept = torch.zeros(HKV, slots, dtype=torch.long, device=q.device)  # positions
                self.attention = torch.zeros(HKV, slots, device=q.device)  # the sum of what each has got
                self.kept_kv = torch.zeros(HKV, slots, 2, D, device=q.device)
            slot = torch.full_like(heads, n - 1)
            if n == self.ds.budget(length - 1):  # no more than before: the newest takes the place of another
                newest = self.kept[:, :n] >= length - max(1, n // 2)
                slot = self.attention[:, :n].masked_fill(newest, float("inf")).argmin(1)
            self.kept[heads, slot] = length - 1
            self.attention[heads, slot] = 0.0
            self.kept_kv[heads, slot] = self.kv[0, :, length - 1].float()
            k, v = self.kept_kv[:, :n].unbind(2)  # [HKV, n, D]
            logits = torch.einsum("hgd,hnd->hgn", q[row].float().view(HKV, -1, D), k) / math.sqrt(D)
            weights = logits.softmax(-1)
            self.attention[:, :n] += weights.sum(1)
            out[row] = torch.einsum("hgn,hnd->hgd", weights, v).flatten(0, 1).to(q.dtype)
            self.attended += n
        return out


METHODS = {"ds": DoubleSparsity, "exact_topk": ExactTopK, "paper": Paper, "quest": Quest, "streaming": Streaming, "h2o": H2O}


# ---------------------------------------------------------------- settings


def parse_method(text):
    """"quest"; "ds", or with other labels "ds:qk", "ds/2", "ds:qk/8x4,48x2" -> (class, calibration method or None for the
    checkpoint's own labels, DSConfig.label_bits or None for the configuration's)."""
    name, _, calibration = text.partition("/")[0].partition(":")
    bits = text.partition("/")[2]
    if name not in METHODS or (name != "ds" and name != text):
        raise ValueError(f"methods={text}: must be one of {', '.join(METHODS)}; ds:CALIBRATION/BITS is ds with other labels")
    if calibration and calibration not in calibrate.METHODS:
        raise ValueError(f"methods={text}: the calibration must be one of {', '.join(calibrate.METHODS)}")
    if bits:
        try:
            DSConfig(label_bits=label_bits(bits))
        except ValueError as error:
            raise ValueError(f"methods={text}: {error}") from None
    method = METHODS[name]
    return method, calibration or method.calibration, label_bits(bits) if bits else method.bits


def parse_budget(text, ds):
    """"1/16" (as --sparsity 16: of the tokens, and of K's bytes for labels), "n=256", or both, as in "1/16,n=256" -> DSConfig."""
    for part in sorted(text.split(","), key=lambda part: not part.startswith("1/")):  # n=N holds, whichever comes first
        name, value = part[:2], part[2:]
        if name not in ("1/", "n="):
            raise ValueError(f"budgets={text}: must look like 1/16, n=256 or 1/32,n=256")
        try:
            value = int(value) if name == "n=" else float(value)
        except ValueError:
            raise ValueError(f"budgets={text}: {value or 'nothing'} is not a number") from None
        ds = replace(ds, n_tokens=value) if name == "n=" else replace(ds, sparsity=value, n_tokens=None)
    return ds


def budget_name(ds):
    """What parse_budget would read."""
    parts = [f"n={ds.n_tokens}"] if ds.n_tokens else []
    labels_alone = ds.n_tokens and ds.sparsity == DSConfig.sparsity  # what the share is for then, by default
    return ",".join(parts if labels_alone else [f"1/{ds.sparsity:g}", *parts])


# ---------------------------------------------------------------- decoding


class Decoder:
    """A model with one cache for one sequence, which it scores as decode rows."""

    def __init__(self, model, tokenizer, max_seq_length, ds=None, label_maps=None, rows=None, method=DoubleSparsity):
        """ds: None for dense. rows: tokens decoded at once; it changes memory, not results. method: a class of METHODS."""
        self.model, self.tokenizer = model, tokenizer
        # scores of all rows and heads take 512 MiB at most; a CPU is fastest with what its caches hold
        most = 2**27 // (model.config.n_heads * max_seq_length)
        self.rows = rows or (64 if model.device.type == "cpu" else max(16, min(512, most)))
        self.cache = KVCache(model.config, 1, max_seq_length, model.device, model.dtype, ds, label_maps)
        scratch = {}
        self.cache.layers = [method(layer, scratch) if layer.ds else layer for layer in self.cache.layers]
        self.sparse = [layer for layer in self.cache.layers if layer.ds]
        self.in_order = method.in_order and self.sparse

    def start(self, tokens=(), probed=False, like=None):
        """Forgets the sequence and prefills another, dense (or decodes it, where rows must come in order).

        like: a Decoder that has prefilled the same tokens, whose K and V are taken.
        """
        self.cache.seq_lens.zero_()
        if tokens and self.in_order:
            for part in torch.tensor(tokens, device=self.model.device).split(self.rows):
                self.model.decode_rows(part, self.cache)
        elif tokens and like:
            positions = torch.arange(len(tokens), device=self.model.device)[None]
            for layer, other in zip(self.cache.layers, like.cache.layers):
                layer.write(*other.past(len(tokens)), positions)
            self.cache.seq_lens += len(tokens)
        elif tokens:
            self.model.prefill([list(tokens)], self.cache)
        self.length, self.decoded, self.live = len(tokens), 0, 0
        for layer in self.sparse:
            layer.start(probed)

    def logits(self, tokens):
        """Decodes known tokens (list of ids) one after the other; yields their logits [rows, vocab]."""
        for part in torch.tensor(tokens, device=self.model.device).split(self.rows):
            T = len(part)
            window = self.model.config.longest_window or self.length + T
            self.live += sum(min(live, window) for live in range(self.length + 1, self.length + T + 1))
            self.length += T
            self.decoded += T
            yield self.model.decode_rows(part, self.cache)

    def attended(self):
        """Tokens attended since `start`, of all decoded tokens, mean over sparse layers and KV heads; dense: all live ones."""
        if not self.sparse:
            return float(self.live)
        return sum(float(layer.attended) for layer in self.sparse) / len(self.sparse)

    def mass(self):
        """Share of the exact attention that the chosen tokens hold, per sparse layer and query head; None if not probed."""
        if any(not layer.probes for layer in self.sparse) or not self.sparse:
            return None
        return [(layer.mass / layer.probes).tolist() for layer in self.sparse]

    def greedy(self, tokens, max_new_tokens, done=lambda text: False):
        """The text that follows `tokens`, which are decoded; up to the end of text, or until done(text)."""
        new = []
        while len(new) < max_new_tokens:
            *_, logits = self.logits(new[-1:] or tokens)
            new.append(logits[-1].argmax().item())
            if new[-1] in self.model.config.eos_ids or done(self.tokenizer.decode(new)):
                break
        return self.tokenizer.decode(new)


# ---------------------------------------------------------------- texts


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


BUILTIN = "Python language reference"  # calibrate.builtin_text()
WIKITEXT2 = "wikitext2"  # what --data calls it
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def wikitext2():
    """The raw test set of WikiText-2, from the hub. Raises ValueError or OSError if that cannot be reached."""
    path = hf_hub_download("ggml-org/ci", "wikitext-2-raw-v1.zip", repo_type="dataset")
    try:
        data = zipfile.ZipFile(path).read("wikitext-2-raw/wiki.test.raw")
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: no archive with WikiText-2 in it ({error})") from None
    if hashlib.sha256(data).hexdigest() != WIKITEXT2_SHA256:
        raise ValueError(f"{path}: another text than the raw test set of WikiText-2")
    return data.decode()


@functools.cache
def texts_of(data):
    """(name, texts) of --data: a file, or WikiText-2 by that name; without it the built-in text."""
    if data is None:
        print(f"without --data the text is {BUILTIN}, on which labels are calibrated by default: no figures to quote",
              file=sys.stderr)
        return BUILTIN, [calibrate.builtin_text()]
    if data == WIKITEXT2:
        return "wikitext2-test.raw", [wikitext2()]
    return Path(data).name, read_texts(data)


# ---------------------------------------------------------------- items
# JSON values. Of each: "prompt", token ids, of which the first "prefilled" are not decoded, and what is scored:
#   of text nothing more: every decoded token given all before it
#   "answer": token ids, each to be the likeliest (among the ids "among", if given) after the right ones before it
#   "outputs", "metric", "max_new_tokens", "one_line": a greedy answer's best metric, of METRICS
# and "task", "length" and "depth" where a row says its score by them.


def text_windows(tokenizer, texts, context, limit=None):
    """Non-overlapping windows of `context` tokens, BOS in front of each where the tokenizer has it there; short tails are
    dropped. limit: spread evenly over the whole text."""
    windows = []
    for text in texts:
        tokens = tokenizer.encode(text, special=False)
        windows += [tokenizer.prefix + tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)]
    if not windows:
        raise ValueError(f"no text of {context} tokens: give a longer --data or a smaller --context")
    return spread(windows, limit)


def spread(items, limit):
    """At most `limit` items, evenly over all."""
    if not limit or limit >= len(items):
        return items
    return [items[round(i * (len(items) - 1) / max(1, limit - 1))] for i in range(limit)]


def text_items(tokenizer, args):
    name, texts = texts_of(args.data)
    windows = text_windows(tokenizer, texts, args.context, args.limit)
    prefilled = max(0, len(windows[0]) - 1 - (args.last or len(windows[0])))
    return name, [{"prompt": window, "prefilled": prefilled} for window in windows]


# Documents for retrieval from a random.Random: n facts (of running text: n characters), and the text of a question about the
# one at `depth` in [0, 1) and of its answer.


def kv_document(rng, n, depth, text):
    records = random_kv(rng, n)
    key, value = records[int(depth * n)]
    return kv_context(records), kv_question(key), kv_answer(value)


def lines_document(rng, n, depth, text):
    lines = random_lines(rng, n)
    name, number = lines[int(depth * n)]
    return lines_context(lines), lines_question(name), lines_answer(number)


def passage(rng, n, text):
    """n characters of the text or a few less, from a whole word on."""
    if n > len(text):
        raise ValueError(f"a text of {len(text)} characters is too short: give a longer --data, or smaller --lengths")
    start = rng.randrange(len(text) - n + 1)
    return text[start : start + n].partition(" ")[2]


def passkey_document(rng, n, depth, text):
    (name, number, _), = random_needles(rng, 1)
    return "".join(needle_pieces(passage(rng, n, text), [(name, number, depth)])), needle_question(name), needle_answer(number)


def question_item(tokenizer, context, question, answer, **more):
    """Texts as token ids: all is tokenised together, then cut where the question and the answer start."""
    def common(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

    whole = tokenizer.encode(context + question + answer)
    answer_at = common(whole, tokenizer.encode(context + question))
    question_at = min(common(whole, tokenizer.encode(context)), answer_at - 1)  # one token is to decode, at least
    return {"prompt": whole[:answer_at], "prefilled": question_at, "answer": whole[answer_at:], **more}


def size(item):
    """Tokens of cache that an item needs."""
    return len(item["prompt"]) + len(item.get("answer", ())) + item.get("max_new_tokens", 0)


def fill(make, length):
    """make(n), an item whose size grows with n, for nearly the largest n with which that is at most `length` tokens."""
    least = size(make(1))
    if least > length:
        raise ValueError(f"lengths={length}: too short for one fact and the question, which have {least} tokens")
    n = 16
    for _ in range(4):  # tokens grow with n almost evenly
        n = max(2, 1 + int((length - least) * (n - 1) / max(1, size(make(n)) - least)))
    while size(item := make(n)) > length:
        n -= 1 + n // 500
    return item


def generated_items(tokenizer, document, lengths, count, text="", seed=0):
    """Questions about documents of at most so many tokens, question and answer included: `count` of each length, at depths
    spread evenly. An item is a function of the arguments alone."""
    items = []
    for i in tqdm(range(count * len(lengths)), desc="items", unit="item", leave=False, delay=2):
        length, depth = lengths[i % len(lengths)], (i // len(lengths) + random.Random(f"{seed} {i}").random()) / count

        def make(n, i=i, length=length, depth=depth):
            parts = document(random.Random(f"{seed} {i}"), n, depth, text)
            return question_item(tokenizer, *parts, depth=depth, length=length)

        items.append(fill(make, length))
    return items


def kv_items(tokenizer, path, limit=None):
    """Key-value questions from a file in the published format (.jsonl or .jsonl.gz)."""
    items = []
    for records, key, value in read_json_lines(path, ("ordered_kv_records", "key", "value"))[:limit]:
        if [key, value] not in records or any(len(record) != 2 for record in records):
            raise ValueError(f"{path}: an item of which ordered_kv_records are no pairs, or do not hold its key and value")
        depth = records.index([key, value]) / len(records)
        items.append(question_item(tokenizer, kv_context(records), kv_question(key), kv_answer(value), depth=depth))
    return items


def questions(document):
    """The items of a retrieval task, as in TASKS."""
    def items(tokenizer, args):
        if args.data and document is kv_document:
            return Path(args.data).name, kv_items(tokenizer, args.data, args.limit)
        name, texts = texts_of(args.data) if document is passkey_document else ("generated", [])
        return name, generated_items(tokenizer, document, args.lengths or args.default_lengths, args.limit or 20, "\n\n".join(texts))
    return items


def prompt_ids(tokenizer, text, chat, prefix=""):
    """Token ids of a task's text, as a user's message of the chat template if there is to be one; then how the answer begins."""
    if not chat:
        return tokenizer.encode(text + prefix)
    return tokenizer.chat([{"role": "user", "content": text}]) + tokenizer.encode(prefix.lstrip(), special=False)


def answer_item(ids, outputs, metric, max_new_tokens, one_line=False, **more):
    """All of the prompt but its last token is prefilled, as generate.py does."""
    return {"prompt": ids, "prefilled": len(ids) - 1, "outputs": outputs, "metric": metric, "max_new_tokens": max_new_tokens,
            "one_line": one_line, **more}


# ---------------------------------------------------------------- RULER (arXiv 2404.06654): ten tasks, our own wording

# Tokens of an answer; and of the needle tasks: what the needles lie in, keys, how many of them are asked for, values of each,
# and what keys and values are.
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}
NEEDLES = {
    "niah_single_1": ("noise", 1, 1, 1, "words"), "niah_single_2": ("text", 1, 1, 1, "words"),
    "niah_multikey_1": ("text", 4, 1, 1, "words"), "niah_multikey_2": ("needles", 1, 1, 1, "words"),
    "niah_multikey_3": ("needles", 1, 1, 1, "uuids"), "niah_multivalue": ("text", 1, 1, 4, "words"),
    "niah_multiquery": ("text", 4, 4, 1, "words")}
RULER = (*NEEDLES, "vt", "cwe", "fwe")
NOISE = "The wind was low. The road went on. We walked, we sat down, we walked again. "


def hidden(rng, sentences, haystack):
    """The sentences, in their order, at random places of a text, each after a word of it."""
    places = sorted(haystack.find(" ", rng.randrange(len(haystack))) for _ in sentences)
    parts = [haystack[a:b] + sentence for a, b, sentence in zip([0, *places], places, sentences)]
    return "".join(parts) + haystack[places[-1] :]


def needles_task(rng, n, text, haystack, keys, asked, values, kind):
    name, value = (random_uuid, random_uuid) if kind == "uuids" else (random_name, lambda rng: random_number(rng, 7))
    facts = {}
    while len(facts) < keys + n * (haystack == "needles"):
        facts[name(rng)] = [value(rng) for _ in range(values)]
    wanted = list(facts)[:asked]
    sentences = [needle_sentence(key, value) for key, all_values in facts.items() for value in all_values]
    rng.shuffle(sentences)
    body = "\n".join(sentences)
    if haystack != "needles":
        body = hidden(rng, sentences, NOISE * n if haystack == "noise" else passage(rng, 40 * n + 40, text))
    safes = f"the safe{'s' * (asked > 1)} of {', '.join(wanted)}"
    question = f"Some safes are named in this text, with the numbers that open them.\n\n{body}\n\nWhich numbers open {safes}? Name all."
    return question, [value for key in wanted for value in facts[key]], f" T{safes[1:]} open{'s' * (asked < 2)} with"


def chain_task(rng, n, text):
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(10)]
    numbers, sentences = [random_number(rng), random_number(rng)], []
    for i in range(10):  # two chains, turn by turn
        sentences.append(f" VAR {names[i]} = {numbers[i] if i < 2 else f'VAR {names[i - 2]}'}.")
    question = ("Variables are assigned in this text, some of them to others.\n\n"
                f"{hidden(rng, sentences, NOISE * n)}\n\nWhich five variables have the value {numbers[0]}, directly or by others?")
    return question, names[::2], f" The variables of the value {numbers[0]} are:"


def common_words_task(rng, n, text):
    """Ten words 30 times each, n others 3 times."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))
    if n + 10 > len(words):
        raise ValueError(f"a text of {len(words)} different words is too short: give a longer --data, or smaller --lengths")
    words = rng.sample(words, n + 10)
    listed = words[:10] * 30 + words[10:] * 3
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    return f"A list of words:\n\n{numbered}\n\nWhich ten words are in the list most often?", words[:10], " The ten words are:"


def frequent_words_task(rng, n, text):
    """Made-up words, the i-th a 1 / i**2 of the first's times."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(50)]
    coded = [word for i, word in enumerate(words, 1) for _ in range(max(1, 10 * n // i**2))] + ["..."] * (10 * n)
    rng.shuffle(coded)
    return (f"A text in code, with dots that mean nothing:\n\n{' '.join(coded)}\n\nWhich three words are in it most often?",
            words[:3], " The three words are:")


def ruler_items(tokenizer, args):
    """Items of a file in RULER's form (a line for each: task, max_seq_length, input, outputs, answer_prefix), or generated."""
    def item(task, length, text, outputs, prefix):
        ids = prompt_ids(tokenizer, text, args.chat, prefix.rstrip())
        return answer_item(ids, outputs, "found", RULER_TOKENS[task.split("_")[0]], task=task, length=length)

    if args.data and "ruler" in Path(args.data).name:
        keys = ("task", "max_seq_length", "input", "outputs", "answer_prefix")
        groups = {}
        for values in read_json_lines(args.data, keys):
            groups.setdefault(tuple(values[:2]), []).append(values)
        return Path(args.data).name, [item(*values) for (_, length), found in groups.items() for values in found[: args.limit]
                                      if not args.lengths or length in args.lengths]
    name, texts = texts_of(args.data)
    text, others = "\n\n".join(texts), {"vt": chain_task, "cwe": common_words_task, "fwe": frequent_words_task}
    items = []
    for task, length, i in tqdm([(task, length, i) for length in args.lengths or args.default_lengths for task in RULER
                                 for i in range(args.limit or 4)], desc="items", unit="item", leave=False, delay=2):
        def make(n, task=task, length=length, i=i):
            make_text = others.get(task) or functools.partial(needles_task, **dict(zip(
                ("haystack", "keys", "asked", "values", "kind"), NEEDLES[task])))
            return item(task, length, *make_text(random.Random(f"{task} {i}"), n, text))
        items.append(fill(make, length))
    return f"generated, {name}", items


# ---------------------------------------------------------------- LongBench and MMLU


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


METRICS = {  # (an answer's text, the outputs wanted) -> percent
    "f1": lambda text, outputs: max(f1(text, output) for output in outputs),
    "rouge_l": lambda text, outputs: max(rouge_l(text, output) for output in outputs),
    "found": lambda text, outputs: 100 * statistics.mean(output.lower() in text.lower() for output in outputs)}

# LongBench (arXiv 2308.14508): tokens of an answer, metric, whether the answer is one line, and a wording of our own for when
# its prompts are not at hand
LONGBENCH = {
    "multifieldqa_en": (64, "f1", False,
                        "{context}\n\nAnswer from the text above, in a few words.\nQuestion: {input}\nAnswer:"),
    "triviaqa": (32, "f1", True, "{context}\n\nAnswer in a few words.\n{input}\nAnswer:"),
    "gov_report": (512, "rouge_l", False, "{context}\n\nA summary of the report above, on one page.\nSummary:"),
}


def longbench_items(tokenizer, args):
    """Items of the LongBench dataset after which the file --data is named; a prompt too long loses its middle."""
    path, prompts, name = args.data, args.prompts, Path(args.data).name.split(".")[0].removeprefix("longbench_")
    if name not in LONGBENCH:
        raise ValueError(f"{path}: must be named after one of {', '.join(LONGBENCH)}")
    max_new_tokens, metric, one_line, wording = LONGBENCH[name]
    if prompts:
        try:
            wording = json.loads(read_text(prompts))[name]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{prompts}: not a JSON object with a prompt for {name}") from None
    room, items = args.context - max_new_tokens, []
    if room < 2:
        raise ValueError(f"context={args.context}: leaves no room for an answer of {max_new_tokens} tokens")
    for context, question, answers in read_json_lines(path, ("context", "input", "answers"))[: args.limit]:
        try:
            ids = prompt_ids(tokenizer, wording.format(context=context, input=question), args.chat)
        except (KeyError, IndexError):
            raise ValueError(f"{prompts}: the prompt for {name} may name {{context}} and {{input}} alone") from None
        if not answers:
            raise ValueError(f"{path}: an item without answers")
        ids = ids if len(ids) <= room else ids[: room // 2] + ids[-(room - room // 2) :]
        items.append(answer_item(ids, answers, metric, max_new_tokens, one_line))
    return Path(path).name, items


def mmlu_items(tokenizer, args):
    """Prompts with five solved questions of the subject in front; the answer is one of the four letters."""
    def read(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not rows or any(len(row) != 6 or row[5] not in tuple("ABCD") for row in rows):
            raise ValueError(f"{path}: each line must hold a question, four choices and a letter")
        return rows

    def ask(question, *choices):
        return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)), "Answer:"])

    letters = {letter: tokenizer.encode(f"Answer: {letter}", special=False)[-1] for letter in "ABCD"}
    items = []
    for path in sorted(Path(args.data, "test").glob("*_test.csv")):
        subject = path.name.removesuffix("_test.csv")
        solved = [f"{ask(*row[:5])} {row[5]}" for row in read(Path(args.data, "dev", f"{subject}_dev.csv"))[:5]]
        head = f"Questions about {subject.replace('_', ' ')}, with the letters of their right answers."
        for row in read(path):
            ids = tokenizer.encode("\n\n".join([head, *solved, ask(*row[:5])]))
            items.append({"prompt": ids, "prefilled": len(ids) - 1, "answer": [letters[row[5]]], "among": list(letters.values())})
    if not items:
        raise ValueError(f"{args.data}: no test/*_test.csv in it; --data takes the directory of the published archive")
    return Path(args.data).name, spread(items, args.limit)


# (tokenizer, args) -> (name of the data, items)
TASKS = {"perplexity": text_items, "passkey": questions(passkey_document), "kv_retrieval": questions(kv_document),
         "lines": questions(lines_document), "ruler": ruler_items, "longbench": longbench_items, "mmlu": mmlu_items}


# ---------------------------------------------------------------- scores
# Of an item: what comes out of each Decoder, a dict; and what a row says of all these dicts.


def score_text(item, dense, decoders):
    """Per Decoder: the log-likelihood of the decoded tokens; how far it is from dense, by KL of dense's next token from its own
    in nats, summed, and how often the likeliest is the same; and the share of the exact attention that the chosen tokens hold."""
    prompt, first = item["prompt"], item["prefilled"]
    everyone = [dense, *(decoder for decoder in decoders if decoder is not dense)]
    for decoder in everyone:
        decoder.start(prompt[:first], probed=True, like=dense if decoder is not dense else None)
    targets = torch.tensor(prompt[first + 1 :], device=dense.model.device)
    text_bytes = len(dense.tokenizer.decode(prompt[first + 1 :]).encode())
    sums = torch.zeros(len(everyone), 3, dtype=torch.float64, device=targets.device)  # nats, KL, same
    done = 0
    for parts in zip(*(decoder.logits(prompt[first:-1]) for decoder in everyone)):
        wanted = targets[done : done + len(parts[0]), None]
        done += len(wanted)
        for i, logits in enumerate(parts):
            logits = logits.float().log_softmax(-1)
            theirs = logits if i == 0 else theirs
            sums[i, 0] -= logits.gather(1, wanted).double().sum()
            sums[i, 1] += F.kl_div(logits, theirs, reduction="sum", log_target=True).double()
            sums[i, 2] += (logits.argmax(-1) == theirs.argmax(-1)).sum()
    found = {decoder: dict(zip(("nats", "kl", "same"), row)) for decoder, row in zip(everyone, sums.tolist())}
    return [found[decoder] | {"tokens": len(targets), "bytes": text_bytes, "mass": decoder.mass()} for decoder in decoders]


def of_text(results):
    nats, kl, same, tokens, text_bytes = (sum(r[name] for r in results) for name in ("nats", "kl", "same", "tokens", "bytes"))
    masses = [r["mass"] for r in results if r["mass"]]
    return {"score": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes, "kl": kl / tokens,
            "top1": 100 * same / tokens} | ({"mass": torch.tensor(masses).mean(0).tolist()} if masses else {})


def score_answer(item, dense, decoders):
    """Per Decoder: percent right of an answer. Where its tokens are given it is decided in one pass: greedy decoding gives
    them if and only if each is the most likely one after the right ones before it."""
    prompt, first, results = item["prompt"], item["prefilled"], []
    dense.start(prompt[:first])
    for decoder in decoders:
        if decoder is not dense:
            decoder.start(prompt[:first], like=dense)
        if "answer" in item:
            logits = torch.cat(list(decoder.logits(prompt[first:] + item["answer"][:-1])))[-len(item["answer"]) :]
            among = torch.tensor(item.get("among", range(logits.shape[1])), device=logits.device)
            score = 100.0 * (among[logits[:, among].argmax(-1)].tolist() == item["answer"])
        else:
            metric = METRICS[item["metric"]]
            lines = item["one_line"]

            def done(text):  # what follows would change nothing
                return lines and "\n" in text.lstrip() or item["metric"] == "found" and metric(text, item["outputs"]) == 100

            text = decoder.greedy(prompt[first:], item["max_new_tokens"], done).strip()
            score = metric(text.split("\n")[0] if lines else text, item["outputs"])
        results.append({"score": score, **{name: item[name] for name in ("task", "length", "depth") if name in item}})
    return results


def of_answers(results):
    """Percent right; by task, by length in tokens; and by depth, from the first fifth of the context to the last."""
    def mean(part):
        return statistics.mean(r["score"] for r in part) if part else None

    found = {"score": mean(results)}
    for name in ("task", "length"):
        values = dict.fromkeys(r[name] for r in results if name in r)
        if values:
            found[f"by_{name}"] = {str(value): mean([r for r in results if r[name] == value]) for value in values}
    if "depth" in results[0]:
        found["by_depth"] = [mean([r for r in results if int(5 * r["depth"]) == fifth]) for fifth in range(5)]
    return found


def score_items(score, items, dense, decoders, partials, name):
    """What comes out of all items, a list for each Decoder. partials: a Path for each; the items that it has are done, those
    measured now are added to it."""
    results = []
    for path in partials:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        results.append([json.loads(line) for line in lines if line.endswith("\n")])  # not one that was being written
        if lines:
            path.write_text("".join(json.dumps(result) + "\n" for result in results[-1]), encoding="utf-8")
    for i, item in enumerate(tqdm(items, desc=name, unit="item", leave=False)):
        todo = [j for j, found in enumerate(results) if len(found) == i]
        for j, found in zip(todo, score(item, dense, [decoders[j] for j in todo]) if todo else ()):
            results[j].append(found | {"attended": decoders[j].attended(), "decoded": decoders[j].decoded})
            append_json(partials[j], results[j][-1])
    return results


# ---------------------------------------------------------------- rows

# What makes two rows the same line of the table, of which the newest counts; and the same measurement, not to be repeated.
SETTING = ("task", "checkpoint", "data", "context", "last", "method", "budget", "n_items", "gpu", "config", "channels", "prompts",
           "chat")
IDENTITY = ("task", "model", "data", "inputs", "method", "config", "calibration", "gpu")


def key_of(row, names):
    """A string; the configuration's defaults do not count, so that rows from before a new field are the same as with it."""
    values = {name: row.get(name) for name in names}
    if values.get("config"):
        default = json.loads(json.dumps(asdict(DSConfig())))
        values["config"] = {name: value for name, value in values["config"].items() if value != default.get(name)}
    return json.dumps(values, sort_keys=True)


def read_rows(path, names):
    """{key: row} of a file of rows: the newest of each, in the order in which they first came."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {key_of(row, names): row for row in rows}


def append_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def provenance(device):
    """What a row was measured with: gpu, torch, triton, commit, date."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {"gpu": torch.cuda.get_device_name() if device != "cpu" else "none (CPU)", "torch": torch.__version__,
            "triton": triton.__version__, "commit": git.stdout.strip() or "unknown",
            "date": datetime.date.today().isoformat()}


def labels_file(checkpoint, method, path, device):
    """channels.safetensors of a calibration by this method on the text file `path` (None: the built-in text), made once."""
    text = read_text(path) if path else calibrate.builtin_text()
    code = Path(calibrate.__file__).read_bytes()
    tag = hashlib.sha256(fingerprint(checkpoint / "model.safetensors").encode() + code + text.encode()).hexdigest()[:12]
    out = RUNS / "labels" / f"{checkpoint.name}-{method}-{tag}.safetensors"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"calibrating labels of method {method} (once)", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            calibrate.calibrate(checkpoint, text, method, device=device, dtype=default_dtype(device), out=out)
    return out


def calibration_of(path):
    """How the labels of a channels.safetensors were calibrated, and on which text."""
    with open_tensors(path) as file:
        found = file.metadata() or {}
    found = {name: found.get(name) for name in ("method", "text_sha256", "tokens", "context", "seed")}
    builtin = hashlib.sha256(calibrate.builtin_text().encode()).hexdigest()
    return found | ({"text": BUILTIN} if found.get("text_sha256") == builtin else {})


class Evaluation:
    """One model, its rows, and the file that they go to."""

    def __init__(self, args, ds):
        self.args, self.ds, self.device = args, ds, pick_device(args.device)
        self.model, self.tokenizer, self.checkpoint = load(args.checkpoint, self.device, default_dtype(self.device))
        self.path = Path(args.results or RUNS / "quality.jsonl")
        self.saved = {} if args.force else read_rows(self.path, IDENTITY)
        self.hash = fingerprint(self.checkpoint / "model.safetensors")

    def configured(self, method, budget):
        """(what a Decoder takes, what a row says) of a setting."""
        if method == "dense":
            return {}, {"budget": "all", "config": None, "calibration": None}
        way, calibration, bits = parse_method(method)
        ds = parse_budget(budget, self.ds) if budget else self.ds
        ds = replace(ds, label_bits=bits, label_channels=None) if bits else ds
        channels = self.args.channels
        if calibration:
            channels = labels_file(self.checkpoint, calibration, self.args.calibration_data, self.device)
        label_maps = load_maps(self.checkpoint, self.model.config, ds, self.device, channels)
        widths = ds.widths(self.model.config.head_dim)
        config = asdict(ds) | ({} if ds.label_bits else {"label_bits": bits_of(widths)})  # the default may change
        row = {"budget": budget_name(ds), "config": config, "calibration": None}
        if way.labelled:
            row |= {"labels": f"{widths_name(widths)} bit",
                    "calibration": calibration_of(channels or self.checkpoint / "channels.safetensors"),
                    "channels": None if calibration or not channels else Path(channels).name}
        return {"ds": ds, "label_maps": label_maps, "method": way}, row

    def rows(self, task, settings):
        """The rows of a task at [(method, budget)], dense's first, from the file or measured."""
        args = self.args
        data, items = TASKS[task](self.tokenizer, args)
        if not items:
            raise ValueError(f"{args.data or data}: no items in it")
        longest, most = max(map(size, items)), self.model.config.max_positions
        if longest > most:
            raise ValueError(f"{longest} tokens are more than the model's {most} positions: take a smaller --context or "
                             "--lengths, or --data with shorter items")
        text = task == "perplexity"
        row = {"task": task, "checkpoint": self.checkpoint.name, "model": self.hash, "data": data, "n_items": len(items),
               "context": args.context if text else round(statistics.mean(map(size, items))),
               "inputs": hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16], **provenance(self.device),
               **({"last": args.last} if text and args.last else {}), **({"chat": True} if args.chat else {}),
               **({"prompts": Path(args.prompts).name if args.prompts else "own"} if task == "longbench" else {})}
        dense = Decoder(self.model, self.tokenizer, longest)
        rows, new = [], {}  # new: by place in rows, a Decoder and the file of its items
        for method, budget in [("dense", None), *settings]:
            taken, says = self.configured(method, budget)
            rows.append(row | {"method": method} | says)
            key = key_of(rows[-1], IDENTITY)
            if key in self.saved:
                rows[-1] = self.saved[key]
                print(f"{task} {method} {says['budget']}: measured on {rows[-1]['date']} at commit {rows[-1]['commit']}, "
                      f"taken from {self.path}; --force measures it again", file=sys.stderr)
                continue
            partial = RUNS / "partial" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
            if args.force:
                partial.unlink(missing_ok=True)
            new[len(rows) - 1] = (Decoder(self.model, self.tokenizer, longest, **taken) if taken else dense), partial
        results = score_items(score_text if text else score_answer, items, dense, *zip(*new.values()), task) if new else ()
        for (i, (_, partial)), found in zip(new.items(), results):
            attended, decoded = (sum(result[name] for result in found) for name in ("attended", "decoded"))
            rows[i] |= {"mean_tokens": attended / decoded, **(of_text if text else of_answers)(found)}
            rows[i]["dense_score"] = rows[0]["score"]
            if text:
                rows[i]["dense_bits_per_byte"] = rows[0]["bits_per_byte"]
            append_json(self.path, rows[i])
            self.saved[key_of(rows[i], IDENTITY)] = rows[i]
            partial.unlink()
        return rows


# ---------------------------------------------------------------- table


def percents(values):
    return " ".join("-" if value is None else f"{value:.0f}" for value in values)


def by(name):
    return lambda row: ", ".join(f"{key}: {value:.0f}" for key, value in row[f"by_{name}"].items())


def mass_of(row):
    return f"{100 * statistics.mean(sum(row['mass'], [])):.1f}%"


def labels_of(row):
    return " of ".join(filter(None, (row["labels"], row.get("channels"))))


SHARED = {"method": "method", "budget": "budget", "tokens": lambda row: f"{row['mean_tokens']:.0f}"}
LABELS = {"labels": labels_of, "dense layers": lambda row: row["config"]["dense_layers"]}
# Of text and of answers: {heading: a row's field, or what makes the cell of a row}. A cell is "-" where the row lacks the field,
# a column of nothing else is left out.
COLUMNS = (
    {"text": "data", "context": lambda row: f"{row['context']}{', last {}'.format(row['last']) if row.get('last') else ''}"}
    | SHARED | {"perplexity": lambda row: f"{row['score']:.3f}", "over dense": lambda row: f"{row['score'] / row['dense_score']:.4f}",
                "KL": lambda row: f"{row['kl']:.4f}", "same likeliest": lambda row: f"{row['top1']:.1f}%",
                "attention kept": mass_of, "windows": "n_items"} | LABELS,
    {"task": "task", "items": "data", "context": "context"}
    | SHARED | {"right": lambda row: f"{row['score']:.1f}%", "dense": lambda row: f"{row['dense_score']:.1f}%", "n": "n_items",
                "% by length": by("length"), "% by task": by("task"), "% by fifth of depth": lambda row: percents(row["by_depth"])}
    | LABELS)


def cell(row, column):
    try:
        return str(column(row) if callable(column) else row[column])
    except (KeyError, TypeError):  # a field that the row has not
        return "-"


def table(rows):
    """Rows -> Markdown: by model, tiny last, and of each those of one text and context together."""
    models = {}
    for row in sorted(rows, key=lambda row: row["checkpoint"] == "tiny"):
        models.setdefault(row["checkpoint"], []).append(row)
    parts = []
    for name, found in models.items():
        said = [", ".join(dict.fromkeys(row[field] for row in found)) for field in ("model", "gpu", "torch", "triton", "commit")]
        dates = sorted(row["date"] for row in found)
        parts.append("**{}** ({}; {}; torch {}, triton {}; commits {}; {} to {})".format(name, *said, dates[0], dates[-1]))
        for of_text, columns in zip((True, False), COLUMNS):
            groups = {}
            for row in found:
                if (row["task"] == "perplexity") == of_text:
                    key = (row["task"], row["data"], row["context"], row.get("last"), row["n_items"])
                    groups.setdefault(key, []).append(row)
            cells = [[cell(row, column) for column in columns.values()] for group in groups.values() for row in group]
            shown = [i for i in range(len(columns)) if any(row[i] != "-" for row in cells)]
            lines = [[list(columns)[i] for i in shown], ["---"] * len(shown), *([row[i] for i in shown] for row in cells)]
            if cells:
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- command line


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=(*TASKS, "table"), help="(default: perplexity kv_retrieval)")
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"), help="directory or hub id (default: the tiny model)")
    parser.add_argument("--data", help="perplexity, passkey, ruler: UTF-8 text, .jsonl[.xz] with a \"text\" per line, or "
                                       f"{WIKITEXT2}, which the hub has (default: {BUILTIN}); kv_retrieval: items in the "
                                       "published format, .jsonl[.gz] (default: generated); ruler: items in RULER's form, in "
                                       "a file of that name; longbench: NAME.jsonl; mmlu: a directory")
    parser.add_argument("--prompts", metavar="FILE", help="longbench: its dataset2prompt.json (default: our own wording)")
    parser.add_argument("--chat", action="store_true", help="ruler, longbench: ask through the checkpoint's chat template")
    parser.add_argument("--context", type=int, help="tokens per window, or at most per longbench item (default 4096, on a "
                                                    "CPU 1024)")
    parser.add_argument("--last", type=int, metavar="N", help="decode and score only the last N tokens of each window, behind a "
                                                              "prefill (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of generated items, at most (default 1024 "
                                                                            "2048 4096, on a CPU 512 1024), or those of a file")
    parser.add_argument("--limit", type=int, help="windows or items at most, of each length and task of ruler (default: all; "
                                                  "20 generated items, 4 of ruler)")
    parser.add_argument("--methods", nargs="+", help=f"ways to choose the tokens: {', '.join(METHODS)}; ds:CALIBRATION, "
                                                     "ds/BITS and ds:CALIBRATION/BITS are ds with other labels, of these "
                                                     "--label_bits, calibrated by that --method of calibrate.py (default: ds)")
    parser.add_argument("--budgets", nargs="+", help="1/R as by --sparsity, n=N as by --n_tokens; both with a comma between "
                                                     "(default: as those options say)")
    parser.add_argument("--calibration_data", metavar="FILE", help="text for ds:CALIBRATION and paper (default: the Python "
                                                                   "language reference)")
    parser.add_argument("--results", metavar="FILE", help="rows are added to it, those in it are not measured again (default: "
                                                          "runs/quality.jsonl; of table: results/quality.jsonl)")
    parser.add_argument("--force", action="store_true", help="measure all rows again")
    add_sparsity_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    if args.tasks == ["table"]:
        path = Path(args.results or RESULTS)
        rows = list(read_rows(path, SETTING).values())
        if not rows:
            raise ValueError(f"{path}: no results yet; run eval.py --results {path} first")
    else:
        rows = evaluate(args)
    print(table(rows))


def evaluate(args):
    """The rows of a command line, from a file or measured."""
    args.tasks = args.tasks or ["perplexity", "kv_retrieval"]
    if "table" in args.tasks:
        raise ValueError("table: is a command of its own; leave out the tasks")
    for name in ("context", "last", "limit", "lengths"):
        for value in args.lengths or [] if name == "lengths" else [getattr(args, name)]:
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
    for task in args.tasks:
        if task in ("longbench", "mmlu") and not args.data:
            raise ValueError(f"{task} needs the benchmark's own file: give --data")
        if task == "lines" and args.data:
            raise ValueError(f"data={args.data}: lines are generated; leave out --data")
    ds = sparsity_from(args)
    if ds is None and (args.methods or args.budgets):
        raise ValueError(f"sparsity={args.sparsity:g}: dense has no methods or budgets; give a --sparsity above 1")
    settings = [(method, budget) for budget in args.budgets or [None] for method in args.methods or ["ds"]] if ds else []
    for method, budget in settings:
        parse_method(method)
        parse_budget(budget, ds) if budget else None
    evaluation = Evaluation(args, ds)
    args.context = args.context or (1024 if evaluation.device == "cpu" else 4096)
    args.default_lengths = [512, 1024] if evaluation.device == "cpu" else [1024, 2048, 4096]
    rows = [row for task in args.tasks for row in evaluation.rows(task, settings)]
    print(f"rows are in {evaluation.path}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    run_command(main)
