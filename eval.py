"""Quality: what Double Sparsity loses against dense, through the same decode code that generates.

Every scored token is decoded: it attends to its own past with its own selection. Nothing is masked after the fact.
Each run prints its rows; with --save it appends them to results/quality.jsonl, whence `table` prints the README's table.
Usage: python eval.py perplexity --data FILE [--context 4096] [--n_tokens 256]
       python eval.py kv_retrieval [--data FILE] [--limit 100]
       python eval.py table
"""
import argparse
import datetime
import gzip
import json
import lzma
import math
import random
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from tqdm import tqdm

from generate import HERE, add_sparsity_arguments, default_dtype, load, load_maps, pick_device, read_text, sparsity_from
from model import ArgumentParser, KVCache, run_command
from tiny.tasks import kv_answer, kv_context, kv_question, random_kv


class Decoder:
    """A model with one cache for one sequence, which it scores as decode rows."""

    def __init__(self, model, tokenizer, max_seq_length, ds=None, label_maps=None, rows=512):
        """ds: None for dense. rows: tokens decoded at once; it changes memory, not results."""
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.cache = KVCache(model.config, 1, max_seq_length, model.device, model.dtype, ds, label_maps)

    def start(self, tokens=()):
        """Forgets the sequence and prefills another, dense."""
        self.cache.seq_lens.zero_()
        if tokens:
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
        config = row["config"] or {}
        rows[tuple(row[name] for name in ("task", "checkpoint", "data", "context", "method", "budget", "n_items", "gpu")) +
             (config.get("label_channels"), config.get("label_bits"), config.get("dense_layers"))] = row
    lines = ["| task | text | context | budget | tokens in a sparse layer | score | dense | items |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows.values():
        if row["method"] == "dense":
            continue
        if row["task"] == "perplexity":
            score = f"{row['score']:.3f} ({row['score'] / row['dense_score']:.4f}x)"
            dense = f"{row['dense_score']:.3f} = {row['dense_bits_per_byte']:.4f} bits/byte"
        else:
            score, dense = f"{row['score']:.1f}%", f"{row['dense_score']:.1f}%"
        lines.append(f"| {row['task']} | {row['data']} | {row['context']} | {row['budget']} | {row['mean_tokens']:.0f} | {score} | "
                     f"{dense} | {row['n_items']} |")
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("perplexity", "kv_retrieval", "table"))
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"), help="directory or hub id (default: the tiny model)")
    parser.add_argument("--data", help="perplexity: UTF-8 text, or .jsonl[.xz] with a \"text\" per line; kv_retrieval: items in "
                                       "the published format, .jsonl[.gz] (default: generated)")
    parser.add_argument("--context", type=int, default=4096, help="tokens per perplexity window (default %(default)s)")
    parser.add_argument("--limit", type=int, help="windows or items at most (default: all; 100 generated items)")
    parser.add_argument("--records", type=int, default=50, help="pairs of a generated item (default %(default)s)")
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
    if args.task == "perplexity" and not args.data:
        raise ValueError("perplexity needs a text: give --data FILE")
    device = pick_device(args.device)
    model, tokenizer, checkpoint = load(args.checkpoint, device, default_dtype(device))
    if args.task == "perplexity":
        run, size = perplexity, args.context
        items = text_windows(tokenizer, read_texts(args.data), args.context, args.limit)
        lengths = [range(1, args.context + 1)]
    else:
        run = kv_retrieval
        items = [encode_kv_item(tokenizer, *item) for item in kv_items(args.data, args.limit, args.records)]
        lengths = [[len(context)] for context, _, _ in items]
        size = max(sum(map(len, item)) for item in items)
    if size > model.config.max_positions:
        raise ValueError(f"{size} tokens are more than the model's {model.config.max_positions} positions: take a smaller "
                         "--context, or fewer --records")
    label_maps = load_maps(checkpoint, model.config, ds, device, args.channels) if ds else None
    dense = None
    for method, mode in [("dense", None)] + ([("ds", ds)] if ds else []):
        score = run(Decoder(model, tokenizer, size, mode, label_maps), items, progress=True)
        dense = dense or score
        main_score = "perplexity" if args.task == "perplexity" else "accuracy"
        counts = [mode.budget(n) if mode else n for per_item in lengths for n in per_item]
        row = {"task": args.task, "checkpoint": checkpoint.name, "data": Path(args.data).name if args.data else "generated",
               "method": method, "budget": budget_name(mode), "mean_tokens": sum(counts) / len(counts),
               "score": score[main_score], "dense_score": dense[main_score], "n_items": score["n_items"],
               "context": args.context if args.task == "perplexity" else round(sum(map(sum, lengths)) / len(lengths)),
               "config": asdict(mode) if mode else None, **provenance(device)}
        if args.task == "perplexity":
            row |= {"bits_per_byte": score["bits_per_byte"], "dense_bits_per_byte": dense["bits_per_byte"]}
        print(json.dumps(row))
        if args.save:
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    run_command(main)
