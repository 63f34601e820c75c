"""Quality: what Double Sparsity and other ways to choose tokens lose against dense, through the decode code that generates.

Every scored token is decoded: it attends to its own past with its own selection, at every length (as with --dense_below 0).
Nothing is masked after the fact. A context that is not scored is prefilled, dense, as generate.py does. Scores of longbench and
mmlu are not those of the benchmarks' own scripts: without --prompts the wording is ours, too. Rows go to runs/quality.jsonl as
they come; a run that was interrupted continues from there (--force: from the start).

Usage: python eval.py                          the default run: text and retrieval, all methods at 1/16, some at more budgets
       python eval.py --limit 4                                    a small one, for a CPU
       python eval.py perplexity [--data FILE] [--context 4096] [--budgets 1/16 n=256] [--methods ds ds/32x4 ds:qk/4 quest]
       python eval.py agreement [--data FILE]                      KL to dense and how often the likeliest token is the same
       python eval.py kv_retrieval [--data FILE] [--lengths 2048 4096] [--limit 100]               or lines, passkey
       python eval.py longbench --data multifieldqa_en.jsonl [--prompts dataset2prompt.json]       or gov_report, triviaqa
       python eval.py mmlu --data DIR          the published archive: DIR/dev and DIR/test with a .csv file per subject
       python eval.py table [--plot FILE]                          of results/quality.jsonl, the README's
"""
import argparse
import bisect
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
import statistics
import string
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm

import calibrate
from ds_attention import (
    DSConfig, Workspace, attend, attend_ref, bits_of, eligible_tokens, live_range, pool_ref, select_ref, select_tokens,
    widths_name
)
from generate import (
    HERE, add_sparsity_arguments, default_dtype, label_bits, load, load_maps, pick_device, read_text, sparsity_from
)
from model import ArgumentParser, KVCache, LayerCache, fingerprint, open_tensors, run_command
from tiny.tasks import (
    kv_answer, kv_context, kv_question, lines_answer, lines_context, lines_question, needle_answer, needle_pieces,
    needle_question, random_kv, random_lines, random_needles
)

RESULTS = HERE / "results" / "quality.jsonl"  # the README's rows
RUNS = HERE / "runs"  # everybody's own, and what continues an interrupted run; git ignores it


# ---------------------------------------------------------------- methods: how a sparse layer chooses its tokens


class Sparse(LayerCache):
    """A sparse layer of one sequence, whose decode rows are positions of it. A method is how it chooses the rows' tokens.

    Made of a LayerCache; budget, first and newest tokens are its DSConfig's. Counts the tokens that its rows attend to.
    """

    labelled = False  # whether the choice reads labels
    one_by_one = False  # whether each row's choice depends on that of the row before

    def __init__(self, layer, scratch):
        """scratch: {rows: Workspace} of the last number of rows, shared by all layers."""
        super().__init__(layer.kv, layer.window, layer.ds, layer.label_map, layer.labels)
        self.scratch = scratch
        self.start()

    @classmethod
    def unfit(cls, ds, window):
        """Why the method cannot run with this DSConfig and sliding window, or None."""
        return None

    def start(self, probed=False):
        """Counts from nought. probed: also sums up the attention mass which the chosen tokens hold."""
        self.attended, self.mass = 0.0, 0.0 if probed else None

    def row(self, b):
        return self  # there is no other sequence

    def write(self, k, v, positions, labels=True):
        super().write(k, v, positions, labels=self.labelled)

    def choose(self, q, seq_lens):
        """The tokens attended, (indices [R, HKV, N], n_tokens) as from select_tokens."""
        raise NotImplementedError

    def workspace_of(self, q):
        R, HQ, D = q.shape
        if R not in self.scratch:
            self.scratch.clear()
            HKV, S = self.kv.shape[1:3]
            self.scratch[R] = Workspace(R, HQ, HKV, D, S, q.device, self.ds, self.window)
        return self.scratch[R]

    def decode(self, q, seq_lens):
        indices, n = self.choose(q, seq_lens)
        out = self.attend_to(q, seq_lens, indices, n)
        self.attended = self.attended + n.double().mean() * len(q)
        if self.mass is not None:
            self.mass = self.mass + self.kept_mass(q, seq_lens, indices, n)
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
        return select_ref(scores, seq_lens, n, self.ds.budget(S if self.window is None else min(S, self.window)), *forced), n

    def kept_mass(self, q, seq_lens, indices, n):
        """Share of the exact softmax that the chosen tokens hold, summed over the rows: [HQ] fp64."""
        S, (R, _, N) = int(seq_lens.max()), indices.shape
        grouped = q.float().unflatten(1, (self.kv.shape[1], -1))  # [R, HKV, G, D]
        logits = torch.einsum("rhgd,hsd->rhgs", grouped, self.past(S)[0][0].float()) / math.sqrt(q.shape[2])
        eligible = eligible_tokens(seq_lens, S, self.window)[:, None, None]
        weights = logits.masked_fill(~eligible, float("-inf")).softmax(-1)
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


class Baseline(Sparse):
    """By scores of keys and queries as they are, pooled over a group's queries as those of labels."""

    def scores(self, q, k):
        """q [R, HKV, G, D], k [HKV, S, D], fp32 -> [R, HKV, G, S], or [S] for all alike."""
        raise NotImplementedError

    def choose(self, q, seq_lens):
        S, HKV = int(seq_lens.max()), self.kv.shape[1]
        scores = self.scores(q.float().unflatten(1, (HKV, -1)), self.past(S)[0][0].float())
        scores = scores.expand(len(q), HKV, q.shape[1] // HKV, S)
        eligible = eligible_tokens(seq_lens, S, self.window)[:, None, None]
        return self.best(pool_ref(scores.masked_fill(~eligible, float("-inf"))), seq_lens)


class ExactTopK(Baseline):
    """The best tokens by q . k / sqrt(D) itself: the ceiling of token sparsity."""

    def scores(self, q, k):
        return torch.einsum("rhgd,hsd->rhgs", q, k) / math.sqrt(q.shape[3])


class Streaming(Baseline):
    """The first and the newest tokens alone (StreamingLLM, arXiv 2309.17453, without its shifted positions)."""

    def scores(self, q, k):
        return torch.arange(k.shape[1], dtype=torch.float32, device=k.device)


class Quest(Baseline):
    """Pages of 16 tokens by a bound of q . k from the page's extremes (arXiv 2406.10774); the last is cut to the budget."""

    PAGE = 16

    @classmethod
    def unfit(cls, ds, window):
        # a row's last page may hold tokens after it: all of its own are among the newest, which are attended in any case
        if ds.recent < cls.PAGE - 1:
            return f"recent={ds.recent}: quest needs the newest {cls.PAGE - 1} tokens at least"
        return super().unfit(ds, window)

    def scores(self, q, k):
        S = k.shape[1]
        padded = torch.cat([k, k[:, -1:].expand(-1, -S % self.PAGE, -1)], 1)  # repeats a key: no new extreme
        low, high = padded.unflatten(1, (-1, self.PAGE)).aminmax(dim=2)  # [HKV, pages, D]
        bound = torch.einsum("rhgd,hpd->rhgp", q.clamp(min=0), high) + torch.einsum("rhgd,hpd->rhgp", q.clamp(max=0), low)
        return bound.repeat_interleave(self.PAGE, -1)[..., :S] / math.sqrt(q.shape[3])


class H2O(Sparse):
    """Half the budget for the newest tokens, half for those with the most attention so far; the rest is evicted for good
    (arXiv 2306.14048; no tokens are forced). Rows must come in order from the first token on, one by one: it is slow."""

    one_by_one = True

    @classmethod
    def unfit(cls, ds, window):
        if window is not None:
            return f"window={window}: h2o is not made for sliding windows"
        return super().unfit(ds, window)

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


METHODS = {"ds": DoubleSparsity, "exact_topk": ExactTopK, "quest": Quest, "h2o": H2O, "streaming": Streaming}


# ---------------------------------------------------------------- settings


def parse_method(text):
    """"quest"; "ds", or with other labels "ds:qk", "ds/2", "ds:qk/8x4,48x2" -> (key of METHODS, calibration method or None for
    the checkpoint's own labels, DSConfig.label_bits or None for the configuration's)."""
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
    return name, calibration or None, label_bits(bits) if bits else None


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
    """What parse_budget would read, or "all" for dense."""
    if ds is None:
        return "all"
    parts = [f"n={ds.n_tokens}"] if ds.n_tokens else []
    labels_alone = ds.n_tokens and ds.sparsity == DSConfig.sparsity  # what the share is for then, by default
    return ",".join(parts if labels_alone else [f"1/{ds.sparsity:g}", *parts])


# ---------------------------------------------------------------- decoding known text


class Decoder:
    """A model with one cache for one sequence, which it scores as decode rows."""

    def __init__(self, model, tokenizer, max_seq_length, ds=None, label_maps=None, rows=None, method="ds", dense=None):
        """ds: None for dense. rows: tokens decoded at once; it changes memory, not results. method: one of METHODS.
        dense: the Decoder that agreement compares with."""
        self.model, self.tokenizer, self.method, self.dense = model, tokenizer, method, dense
        # scores of all rows and heads take 128 MiB at most; a CPU is fastest with what its caches hold
        most = 2**25 // (model.config.n_heads * max_seq_length)
        self.rows = rows or (64 if model.device.type == "cpu" else max(16, min(512, most)))
        self.cache = KVCache(model.config, 1, max_seq_length, model.device, model.dtype, ds, label_maps)
        scratch = {}
        self.cache.layers = [METHODS[method](layer, scratch) if layer.ds else layer for layer in self.cache.layers]
        self.sparse = [layer for layer in self.cache.layers if layer.ds]

    def start(self, tokens=(), probed=False):
        """Forgets the sequence and prefills another, dense (h2o decodes it: it must see each token's attention)."""
        self.cache.seq_lens.zero_()
        if tokens and self.method == "h2o":
            for first in range(0, len(tokens), self.rows):
                self.model.decode_rows(torch.tensor(tokens[first : first + self.rows], device=self.model.device), self.cache)
        elif tokens:
            self.model.prefill([list(tokens)], self.cache)
        self.length, self.decoded, self.live = len(tokens), 0, 0
        for layer in self.sparse:
            layer.start(probed)

    def logits(self, tokens):
        """Decodes known tokens (list of ids) one after the other; yields (their logits [rows, vocab], first index)."""
        ids = torch.tensor(tokens, device=self.model.device)
        for first, part in zip(range(0, len(tokens), self.rows), ids.split(self.rows)):
            T = len(part)
            window = self.model.config.longest_window or self.length + T
            self.live += sum(min(live, window) for live in range(self.length + 1, self.length + T + 1))
            self.length += T
            self.decoded += T
            yield self.model.decode_rows(part, self.cache), first

    def attended(self):
        """Tokens attended since `start`, of all decoded tokens, mean over sparse layers and KV heads; dense: all live ones."""
        if not self.sparse:
            return float(self.live)
        return sum(float(layer.attended) for layer in self.sparse) / len(self.sparse)

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


# ---------------------------------------------------------------- tasks
# Of each: its items, JSON values all of them; what comes out of one, a dict; and what a row says of all the dicts.


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


def perplexity(decoder, window):
    """window: ids, the first a BOS; every other one is scored given all before it."""
    decoder.start()
    targets = torch.tensor(window[1:], device=decoder.model.device)
    nats = 0.0
    for logits, first in decoder.logits(window[:-1]):
        nll = F.cross_entropy(logits.float(), targets[first : first + len(logits)], reduction="none")
        nats += nll.double().sum().item()
    return {"nats": nats, "tokens": len(targets), "bytes": len(decoder.tokenizer.decode(window[1:]).encode())}


def of_perplexity(results):
    nats, tokens, text_bytes = (sum(r[name] for r in results) for name in ("nats", "tokens", "bytes"))
    return {"score": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes}


def agreement(decoder, window):
    """Against decoder.dense on the same text: KL of its next token from decoder's in nats, summed; how often their likeliest
    tokens are the same; and per sparse layer and query head the share of the exact attention that the chosen tokens hold,
    mean over the window (not for h2o)."""
    decoder.start(probed=True)
    decoder.dense.start()
    kl = same = 0
    for (ours, _), (theirs, _) in zip(decoder.logits(window[:-1]), decoder.dense.logits(window[:-1])):
        ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        kl += F.kl_div(ours, theirs, reduction="sum", log_target=True).double().item()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
    found = {"kl": kl, "same": same, "tokens": decoder.decoded}
    if decoder.sparse and decoder.method != "h2o":
        found["mass"] = [(layer.mass / decoder.decoded).tolist() for layer in decoder.sparse]
    return found


def of_agreement(results):
    kl, same, tokens = (sum(r[name] for r in results) for name in ("kl", "same", "tokens"))
    found = {"score": kl / tokens, "top1": 100 * same / tokens}
    if "mass" in results[0]:
        found["mass"] = torch.tensor([r["mass"] for r in results]).mean(0).tolist()
    return found


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


def passkey_document(rng, n, depth, text):
    if n > len(text):
        raise ValueError(f"a text of {len(text)} characters is too short for passkey: give a longer --data, or smaller "
                         "--lengths")
    (name, number, _), = random_needles(rng, 1)
    start = rng.randrange(len(text) - n + 1)
    passage = text[start : start + n]
    passage = passage[passage.find(" ") + 1 :]  # starts with a whole word
    return "".join(needle_pieces(passage, [(name, number, depth)])), needle_question(name), needle_answer(number)


def question_item(tokenizer, context, question, answer, **more):
    """Texts as token ids: all is tokenised together, then cut where the question and the answer start."""
    def common(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

    whole = tokenizer.encode(context + question + answer)
    answer_at = common(whole, tokenizer.encode(context + question))
    question_at = min(common(whole, tokenizer.encode(context)), answer_at - 1)  # one token is to decode, at least
    return {"context": whole[:question_at], "question": whole[question_at:answer_at], "answer": whole[answer_at:], **more}


def question_size(item):
    return sum(len(item[part]) for part in ("context", "question", "answer"))


def fill(make, length):
    """make(n), an item, for the largest n with which it has at most `length` tokens."""
    make = functools.cache(make)

    def size(n):
        return question_size(make(n))

    high = 1
    while size(high) <= length:
        high *= 2
    most = bisect.bisect_right(range(high), length, lo=1, key=size) - 1
    if most < 1:
        raise ValueError(f"lengths={length}: too short for one fact and the question, which have {size(1)} tokens")
    return make(most)


def generated_items(tokenizer, document, lengths, count, text="", seed=0):
    """`count` questions about documents of at most so many tokens, question and answer included: the lengths in turn, depths
    spread evenly at each. An item is a function of the arguments alone."""
    items = []
    turns = math.ceil(count / len(lengths))
    for i in tqdm(range(count), desc="items", unit="item", leave=False, delay=2):
        length = lengths[i % len(lengths)]
        depth = (i // len(lengths) + random.Random(f"{seed} {i}").random()) / turns

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
        parts = kv_context(records), kv_question(key), kv_answer(value)
        items.append(question_item(tokenizer, *parts, depth=depth, length=None))
    return items


def retrieval(decoder, item):
    """Right if greedy decoding after the context (prefilled) and the question (decoded) gives exactly the answer.

    Teacher forcing decides it in one pass: greedy decoding gives the answer if and only if each of its tokens is the most
    likely one after the right ones before it.
    """
    decoder.start(item["context"])
    tokens = item["question"] + item["answer"]
    best = torch.cat([logits.argmax(-1) for logits, _ in decoder.logits(tokens[:-1])])
    return {"score": 100.0 * (best[len(item["question"]) - 1 :].tolist() == item["answer"]), "depth": item["depth"],
            "length": item["length"], "tokens": question_size(item)}


def of_retrieval(results):
    """Percent right; by length in tokens; and by depth, from the first fifth of the context to the last."""
    def mean(part):
        return statistics.mean(r["score"] for r in part) if part else None

    lengths = sorted({r["length"] for r in results if r["length"]})
    return {"score": mean(results), "context": round(statistics.mean(r["tokens"] for r in results)),
            "by_length": {str(length): mean([r for r in results if r["length"] == length]) for length in lengths},
            "by_depth": [mean([r for r in results if int(5 * r["depth"]) == fifth]) for fifth in range(5)]}


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


def longbench_items(tokenizer, path, prompts, size, limit=None):
    """Items of the LongBench dataset after which the file `path` is named; a prompt too long loses its middle."""
    name = Path(path).name.split(".")[0]
    if name not in LONGBENCH:
        raise ValueError(f"{path}: must be named after one of {', '.join(LONGBENCH)}")
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
        ids = ids if len(ids) <= room else ids[: room // 2] + ids[-(room - room // 2) :]
        items.append({"dataset": name, "prompt": ids, "answers": answers})
    return items


def longbench(decoder, item):
    """The best metric (f1 or rouge_l) over the item's answers, in percent."""
    max_new_tokens, metric, one_line, _ = LONGBENCH[item["dataset"]]
    text = decoder.tokenizer.decode(decoder.greedy(item["prompt"], max_new_tokens, one_line)).strip()
    if one_line:
        text = text.split("\n")[0]
    return {"score": max(metric(text, answer) for answer in item["answers"]), "tokens": len(item["prompt"])}


def of_scores(results):
    score, tokens = (statistics.mean(r[name] for r in results) for name in ("score", "tokens"))
    return {"score": score, "context": round(tokens)}


def mmlu_items(tokenizer, directory, limit=None):
    """Items: a prompt with five solved questions of the subject in front, ids of the four letters, index of the right one."""
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
        items += [{"prompt": tokenizer.encode("\n\n".join([head, *solved, ask(*row[:5])])), "letters": letters,
                   "answer": "ABCD".index(row[5])} for row in read(path)]
    if not items:
        raise ValueError(f"{directory}: no test/*_test.csv in it; --data takes the directory of the published archive")
    if limit and limit < len(items):  # spread over the subjects
        items = [items[i * len(items) // limit] for i in range(limit)]
    return items


def mmlu(decoder, item):
    """Right if the right letter is the likeliest of the four. The last token is decoded, all before it prefilled."""
    decoder.start(item["prompt"][:-1])
    logits, _ = next(decoder.logits(item["prompt"][-1:]))
    return {"score": 100.0 * (logits[0, item["letters"]].argmax().item() == item["answer"]), "tokens": len(item["prompt"])}


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
WIKITEXT2 = "wikitext2-test.raw"
WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def wikitext2():
    """The raw test set of WikiText-2 from the hub. Raises ValueError if that cannot be reached."""
    where = {"repo_id": "ggml-org/ci", "filename": "wikitext-2-raw-v1.zip", "repo_type": "dataset"}
    try:
        archive = try_to_load_from_cache(**where)
        if not isinstance(archive, str):
            get_hf_file_metadata(hf_hub_url(**where), timeout=10)  # without a hub it fails at once, a download retries long
            archive = hf_hub_download(**where)
        data = zipfile.ZipFile(archive).read("wikitext-2-raw/wiki.test.raw")
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise ValueError(f"the Hugging Face hub cannot be reached ({type(error).__name__})") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{archive}: no archive with WikiText-2 in it ({error})") from None
    if hashlib.sha256(data).hexdigest() != WIKITEXT2_SHA256:
        raise ValueError(f"{archive}: another text than the raw test set of WikiText-2")
    return data.decode()


@functools.cache
def texts_of(path):
    """(name, texts) of the file `path`; of WikiText-2 without one; of the built-in text where there is no hub, and says so."""
    if path:
        return Path(path).name, read_texts(path)
    try:
        return WIKITEXT2, [wikitext2()]
    except ValueError as error:
        print(f"no --data, and {error}: the text is {BUILTIN}, on which labels are calibrated by default; give --data for a "
              "figure to quote", file=sys.stderr)
        return BUILTIN, [calibrate.builtin_text()]


@dataclass(frozen=True)
class Task:
    items: Callable  # (tokenizer, args) -> (name of the data, items)
    size: Callable  # (item, args) -> tokens of cache that it needs
    score: Callable  # (decoder, item) -> a dict of what came out
    summary: Callable  # (the dicts of all items) -> the row's score and what else it says


def windows(tokenizer, args):
    name, texts = texts_of(args.data)
    return name, text_windows(tokenizer, texts, args.context, args.limit)


def questions(document):
    def items(tokenizer, args):
        if args.data and document is kv_document:
            return Path(args.data).name, kv_items(tokenizer, args.data, args.limit)
        name, texts = texts_of(args.data) if document is passkey_document else ("generated", [])
        return name, generated_items(tokenizer, document, args.lengths, args.limit or 100, "\n\n".join(texts))
    return Task(items, lambda item, args: question_size(item), retrieval, of_retrieval)


TASKS = {
    "perplexity": Task(windows, lambda item, args: len(item) - 1, perplexity, of_perplexity),
    "agreement": Task(windows, lambda item, args: len(item) - 1, agreement, of_agreement),
    "kv_retrieval": questions(kv_document),
    "lines": questions(lines_document),
    "passkey": questions(passkey_document),
    "longbench": Task(lambda tokenizer, args: (Path(args.data).name, longbench_items(
        tokenizer, args.data, args.prompts, args.context, args.limit)), lambda item, args: args.context, longbench, of_scores),
    "mmlu": Task(lambda tokenizer, args: (Path(args.data).name, mmlu_items(tokenizer, args.data, args.limit)),
                 lambda item, args: len(item["prompt"]), mmlu, of_scores),
}


# ---------------------------------------------------------------- rows

# What makes two rows the same line of the table, of which the newest counts; and the same measurement, not to be repeated.
SETTING = ("task", "checkpoint", "data", "context", "method", "budget", "n_items", "gpu", "config", "channels", "prompts")
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
    found = {name: found.get(name) for name in ("method", "text_sha256", "tokens", "seed")}
    builtin = hashlib.sha256(calibrate.builtin_text().encode()).hexdigest()
    return found | ({"text": BUILTIN} if found.get("text_sha256") == builtin else {})


def score_items(decoder, task, items, partial, name, progress=True):
    """The row's fields. partial: a Path; the items that it has are done, those measured now are added to it."""
    results = []
    if partial.exists():
        lines = partial.read_text(encoding="utf-8").splitlines(keepends=True)
        results = [json.loads(line) for line in lines if line.endswith("\n")]  # not one that was being written
        partial.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    with tqdm(total=len(items), initial=len(results), desc=name, unit="item", leave=False, disable=not progress) as bar:
        for item in items[len(results) :]:
            found = task.score(decoder, item)
            results.append(found | {"attended": decoder.attended(), "decoded": decoder.decoded})
            append_json(partial, results[-1])
            bar.set_postfix_str(f"score {task.summary(results)['score']:.4g}")
            bar.update()
    attended, decoded = (sum(result[name] for result in results) for name in ("attended", "decoded"))
    return {"mean_tokens": attended / decoded, "n_items": len(results), **task.summary(results)}


class Evaluation:
    """One model, its rows, and the file that they go to."""

    def __init__(self, args, ds):
        self.args, self.ds, self.device = args, ds, pick_device(args.device)
        self.model, self.tokenizer, self.checkpoint = load(args.checkpoint, self.device, default_dtype(self.device))
        self.path = Path(args.results or RUNS / "quality.jsonl")
        self.saved = {} if args.force else read_rows(self.path, IDENTITY)
        self.hash = fingerprint(self.checkpoint / "model.safetensors")

    def unfit(self, method, budget):
        """Why a setting cannot be measured, or None."""
        ds = parse_budget(budget, self.ds or DSConfig()) if budget else self.ds
        return METHODS[parse_method(method)[0]].unfit(ds, self.model.config.longest_window)

    def configured(self, method, budget):
        """(DSConfig, label maps, what a row says of them) of a setting; Nones for dense."""
        if method == "dense":
            return None, None, {"budget": "all", "config": None, "calibration": None}
        name, calibration, bits = parse_method(method)
        ds = parse_budget(budget, self.ds) if budget else self.ds
        ds = replace(ds, label_bits=bits) if bits else ds
        channels = self.args.channels
        if calibration:
            channels = labels_file(self.checkpoint, calibration, self.args.calibration_data, self.device)
        label_maps = load_maps(self.checkpoint, self.model.config, ds, self.device, channels)
        widths = ds.widths(self.model.config.head_dim)
        config = asdict(ds) | ({} if ds.label_bits else {"label_bits": bits_of(widths)})  # the default may change
        more = {"budget": budget_name(ds), "config": config, "calibration": None}
        if METHODS[name].labelled:
            more |= {"labels": f"{widths_name(widths)} bit",
                     "calibration": calibration_of(channels or self.checkpoint / "channels.safetensors"),
                     "channels": None if calibration or not channels else Path(channels).name}
        return ds, label_maps, more

    def rows(self, name, settings, args):
        """Yields the rows of a task at [(method, budget)], dense's first. args: data, limit, context, lengths, prompts."""
        task = TASKS[name]
        data, items = task.items(self.tokenizer, args)
        if not items:
            raise ValueError(f"{args.data or data}: no items in it")
        size, most = max(task.size(item, args) for item in items), self.model.config.max_positions
        if size > most:
            raise ValueError(f"{size} tokens are more than the model's {most} positions: take a smaller --context or "
                             "--lengths, or --data with shorter items")
        dense, dense_row = Decoder(self.model, self.tokenizer, size), None
        for method, budget in ([] if name == "agreement" else [("dense", None)]) + settings:
            ds, label_maps, more = self.configured(method, budget)
            row = {"task": name, "checkpoint": self.checkpoint.name, "data": data, "method": method, **more,
                   "model": self.hash, "inputs": hashlib.sha256(json.dumps(items).encode()).hexdigest()[:16],
                   **provenance(self.device)}
            if name == "longbench":
                row["prompts"] = Path(args.prompts).name if args.prompts else "own"
            key = key_of(row, IDENTITY)
            if key in self.saved:
                row = self.saved[key]
                print(f"{name} {method} {row['budget']}: measured on {row['date']} at commit {row['commit']}, taken from "
                      f"{self.path}; --force measures it again", file=sys.stderr)
            else:
                decoder = dense if ds is None else Decoder(self.model, self.tokenizer, size, ds, label_maps,
                                                           method=parse_method(method)[0], dense=dense)
                partial = RUNS / "partial" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
                if self.args.force:
                    partial.unlink(missing_ok=True)
                row |= {"context": size} | score_items(decoder, task, items, partial, f"{name} {method} {row['budget']}")
                row["dense_score"] = 0.0 if name == "agreement" else (dense_row or row)["score"]
                if name == "perplexity":
                    row["dense_bits_per_byte"] = (dense_row or row)["bits_per_byte"]
                append_json(self.path, row)
                self.saved[key] = row
                partial.unlink()
            dense_row = dense_row or row
            yield row


# ---------------------------------------------------------------- table and plot


def score_columns(row):
    """A row's score, and dense's, for people."""
    if row["task"] == "perplexity":
        return (f"{row['score']:.3f} ({row['score'] / row['dense_score']:.4f}x)",
                f"{row['dense_score']:.3f} = {row['dense_bits_per_byte']:.4f} bits/byte")
    if row["task"] == "agreement":
        mass = f", {100 * statistics.mean(sum(row['mass'], [])):.1f}% of attention" if "mass" in row else ""
        return f"KL {row['score']:.4f}, {row['top1']:.1f}% of likeliest tokens{mass}", "0"
    return f"{row['score']:.1f}%", f"{row['dense_score']:.1f}%"


def percents(values):
    return " ".join("-" if value is None else f"{value:.0f}" for value in values)


# The columns that only some rows have: heading, and what stands there
MORE_COLUMNS = {
    "labels": ("labels", lambda row: " of ".join(filter(None, (row["labels"], row.get("channels"))))),
    "config": ("dense layers", lambda row: row["config"]["dense_layers"]),
    "by_length": ("% by length", lambda row: f"{percents(row['by_length'].values())} at {' '.join(row['by_length'])}"),
    "by_depth": ("% by fifth of depth", lambda row: percents(row["by_depth"])),
}


def grouped(rows):
    """{(task, data, context): rows} in the order in which they first came; dense's where there are no others."""
    groups = {}
    for row in rows:
        groups.setdefault((row["task"], row["data"], row["context"]), []).append(row)
    return {key: [row for row in found if row["method"] != "dense"] or found for key, found in groups.items()}


def table(rows):
    """Rows -> Markdown, those of a task and text together."""
    rows = sum(grouped(rows).values(), [])
    more = {name: column for name, column in MORE_COLUMNS.items() if any(row.get(name) for row in rows)}
    headings = ["task", "text", "context", "method", "budget", "tokens in a sparse layer", "score", "dense", "items"]
    headings += [heading for heading, _ in more.values()]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [row["task"], row["data"], row["context"], row["method"], row["budget"], f"{row['mean_tokens']:.0f}",
                 *score_columns(row), row["n_items"]]
        cells += [cell(row) if row.get(name) else "-" for name, (_, cell) in more.items()]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def need_matplotlib():
    """Raises ValueError where it is missing: before anything is measured for a plot."""
    if not find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def plot(rows, path):
    """Score over mean tokens, a panel for each task and text, a line for each method. Needs matplotlib."""
    from matplotlib.figure import Figure

    groups = grouped(rows)
    if not groups:
        raise ValueError(f"plot={path}: no rows to draw but dense's; run some methods first")
    figure = Figure(figsize=(6, 4 * len(groups)), layout="constrained")
    for axes, ((task, data, context), found) in zip(figure.subplots(len(groups), squeeze=False).flat, groups.items()):
        lines = {}
        for row in found:
            score = row["score"] / (row["dense_score"] if task == "perplexity" else 1)
            lines.setdefault(row["method"], []).append((row["mean_tokens"], score))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), "o-", label=name)
        axes.axhline(1 if task == "perplexity" else found[0]["dense_score"], color="black", linewidth=0.8)
        axes.set(title=f"{task}, {data}, context {context}", xlabel="tokens attended in a sparse layer, mean",
                 ylabel={"perplexity": "perplexity over dense", "agreement": "KL to dense, nats"}.get(task, "percent"))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- command line


def default_run(ds, context, evaluation):
    """[(task, items at most, [(method, budget)])]: all methods that can run at one budget, ds and exact_topk at more; without
    --limit slow ones on fewer items."""
    share, n = f"1/{ds.sparsity:g}", max(1, round(context / ds.sparsity))
    # 1/16 of a text is N = context / 16 at every position, as in the paper; the stricter reading stands beside it. Retrieval
    # needs few tokens: its budgets go far down, towards where it breaks.
    text, retrieval = (f"n={n}", [share, f"n={4 * n}", f"n={2 * n}", f"n={max(1, n // 2)}"]), (share, ["n=32", "n=24"])
    # the paper's labels, and what any labels would give; minutes of calibration on a CPU
    methods = [*METHODS, *(["ds:qk/4", "ds:random/4"] if evaluation.device != "cpu" else [])]
    for method in methods.copy():
        if reason := evaluation.unfit(method, share):
            print(f"without {method}: {reason}", file=sys.stderr)
            methods.remove(method)
    runs = []
    for task, limit, (budget, more) in (("perplexity", 16, text), ("agreement", 8, (text[0], [])),
                                        *((task, 36, retrieval) for task in ("kv_retrieval", "lines", "passkey"))):
        slow = [(method, budget) for method in methods if METHODS[parse_method(method)[0]].one_by_one]
        settings = [(method, budget) for method in methods if (method, budget) not in slow]
        runs.append((task, limit, settings + [(method, other) for other in more for method in ("ds", "exact_topk")]))
        if slow:
            runs.append((task, limit // 4, slow))
    return runs


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=("all", *TASKS, "table"), default="all")
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"), help="directory or hub id (default: the tiny model)")
    parser.add_argument("--data", help="perplexity, agreement, passkey: UTF-8 text, or .jsonl[.xz] with a \"text\" per line "
                                       "(default: WikiText-2 from the hub); kv_retrieval: items in the published format, "
                                       ".jsonl[.gz] (default: generated); longbench: NAME.jsonl; mmlu: a directory")
    parser.add_argument("--prompts", metavar="FILE", help="longbench: its dataset2prompt.json (default: our own wording)")
    parser.add_argument("--context", type=int, help="tokens per window, or at most per longbench item (default 4096, on a "
                                                    "CPU 1024)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="generated items: tokens of each, in turn (default "
                                                                            "1024 2048 4096, on a CPU 512 1024)")
    parser.add_argument("--limit", type=int, help="windows or items at most (default: all; 100 generated items; fewer in the "
                                                  "default run)")
    parser.add_argument("--methods", nargs="+", help=f"ways to choose the tokens: {', '.join(METHODS)}; ds:CALIBRATION, "
                                                     "ds/BITS and ds:CALIBRATION/BITS are ds with other labels, of these "
                                                     "--label_bits, calibrated by that --method of calibrate.py (default: ds)")
    parser.add_argument("--budgets", nargs="+", help="1/R as by --sparsity, n=N as by --n_tokens; both with a comma between "
                                                     "(default: as those options say)")
    parser.add_argument("--calibration_data", metavar="FILE", help="text for ds:CALIBRATION (default: the Python language "
                                                                   "reference)")
    parser.add_argument("--results", metavar="FILE", help="rows are added to it, those in it are not measured again (default: "
                                                          "runs/quality.jsonl; of table: results/quality.jsonl)")
    parser.add_argument("--force", action="store_true", help="measure all rows again")
    parser.add_argument("--plot", metavar="FILE", help="draw score over tokens by method (needs matplotlib)")
    add_sparsity_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    if args.plot:
        need_matplotlib()
    if args.task == "table":
        path = Path(args.results or RESULTS)
        rows = list(read_rows(path, SETTING).values())
        if not rows:
            raise ValueError(f"{path}: no results yet; run eval.py --results {path} first")
    else:
        rows = evaluate(args)
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


def evaluate(args):
    """The rows of a command line, from a file or measured."""
    for name in ("context", "limit", "lengths"):
        for value in args.lengths or [] if name == "lengths" else [getattr(args, name)]:
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
    if args.task in ("longbench", "mmlu") and not args.data:
        raise ValueError(f"{args.task} needs the benchmark's own file: give --data")
    if args.task == "lines" and args.data:
        raise ValueError(f"data={args.data}: lines are generated; leave out --data")
    ds = sparsity_from(args)
    if ds is None and (args.task == "agreement" or args.methods or args.budgets):
        raise ValueError(f"sparsity={args.sparsity:g}: dense has no methods, budgets or agreement; give a --sparsity above 1")
    settings = [(method, budget) for budget in args.budgets or [None] for method in args.methods or ["ds"]] if ds else []
    for method, budget in settings:
        parse_method(method)
        parse_budget(budget, ds) if budget else None
    evaluation = Evaluation(args, ds)
    for setting in settings:
        if reason := evaluation.unfit(*setting):
            raise ValueError(reason)
    args.context = args.context or (1024 if evaluation.device == "cpu" else 4096)
    args.lengths = args.lengths or ([512, 1024] if evaluation.device == "cpu" else [1024, 2048, 4096])
    runs = [(args.task, args.limit, settings)]
    if args.task == "all":
        runs = default_run(ds or DSConfig(), args.context, evaluation)
        if ds is None or args.methods or args.budgets or args.n_tokens:
            limits = {}
            for task, limit, _ in runs:
                limits.setdefault(task, limit)
            runs = [(task, limit, settings) for task, limit in limits.items() if ds or task != "agreement"]
    rows = []
    for task, limit, settings in tqdm(runs, desc="tasks", unit="task", leave=False, disable=len(runs) == 1):
        data = None if args.task == "all" and task in ("kv_retrieval", "lines") else args.data
        more = {"data": data, "limit": args.limit or limit}
        rows += evaluation.rows(task, settings, argparse.Namespace(**vars(args) | more))
    print(f"rows are in {evaluation.path}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    run_command(main)
