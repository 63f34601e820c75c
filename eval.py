"""Quality: what Double Sparsity and other ways to choose tokens lose against dense, decoded.

Every scored token is decoded: it attends to its own past with its own selection, at every length
(as with --dense_below 0). A context that is not scored is prefilled, dense, as generate.py does. An
item is put to all settings of a command in turn, for which dense runs once. Rows go to
runs/quality.jsonl; a command that was interrupted continues where it was (--force: from the start).

  perplexity   of text, beside how far the next token is from dense's (KL, the same likeliest
               token), and how much of the exact attention the chosen tokens hold
  passkey, kv_retrieval, lines   right if greedy decoding gives exactly the answer
  ruler        share of what is asked for that a greedy answer has; of its file, or items of our own
  lm_eval      any of the tasks of EleutherAI's lm-eval, by its prompts and metrics

Usage: python eval.py      a short tour on this machine: perplexity and retrieval, dense and ds
       python eval.py perplexity --data FILE --budgets n=256 n=128 --methods ds exact_topk quest
       python eval.py perplexity --data FILE --context 32768 --last 2048 --checkpoint DIR
       python eval.py passkey --lengths 2000 4000 --limit 20
       python eval.py ruler --data ruler.jsonl.xz --chat --lengths 4096   without --data: any length
       python eval.py lm_eval --tasks mmlu,longbench_triviaqa --limit 18 --context 8000
       python eval.py table               of results/quality.jsonl, as in results/README.md
"""
import argparse
import contextlib
import hashlib
import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import calibrate
import parallel
from cli import (
    HERE, ArgumentParser, InputFile, Number, OutputFile, add_quantize_argument,
    add_sparsity_arguments, append_json_lines, check_layers, check_value, default_dtype,
    label_bits, pick_device, provenance, read_json_lines, run_command, sparsity_from, widths_name
)
from ds_attention import DSConfig
from generate import load, load_maps
from items import BUILTIN, LENGTHS, TASKS, WIKITEXT2, size
from methods import METHODS, DoubleSparsity
from model import KVCache, fingerprint, open_tensors
from pages import quality_table
from tokenizer import builtin_text, read_text

RESULTS = HERE / "results" / "quality.jsonl"  # the rows of the published tables
RUNS = HERE / "runs"  # everybody's own, and what continues an interrupted run; git ignores it

# ---------------------------------------------------------------- settings


def parse_method(text):
    """"quest"; "ds", or with other labels "ds:qk", "ds/2", "ds:qk/8x4,48x2".

    -> (class, calibration method or None for the checkpoint's own labels, DSConfig.label_bits or
    None for the configuration's).
    """
    name, _, calibration = text.partition("/")[0].partition(":")
    bits = text.partition("/")[2] or None
    if name not in METHODS or (name != "ds" and name != text) or text[-1] in ":/":
        raise ValueError(f"methods={text}: must be one of {', '.join(METHODS)}; "
                         "ds:CALIBRATION/BITS is ds with other labels")
    if calibration and calibration not in calibrate.METHODS:
        raise ValueError(f"methods={text}: the calibration must be one of "
                         f"{', '.join(calibrate.METHODS)}")
    if bits:
        try:
            bits = label_bits(bits)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"methods={text}: {error}") from None
    method = METHODS[name]
    return method, calibration or method.calibration, bits or method.bits


def parse_budget(text, ds):
    """"1/16" (as --sparsity 16: of the tokens, and of K's bytes for labels), "n=256", or both, as
    in "1/16,n=256" -> DSConfig."""
    # n=N holds, whichever comes first
    for part in sorted(text.split(","), key=lambda part: not part.startswith("1/")):
        name, value = part[:2], part[2:]
        if name not in ("1/", "n="):
            raise ValueError(f"budgets={text}: must look like 1/16, n=256 or 1/32,n=256")
        try:
            value = int(value) if name == "n=" else float(value)
        except ValueError:
            raise ValueError(f"budgets={text}: {value or 'nothing'} is not a number") from None
        check_value("budgets", value, Number(int, 1) if name == "n=" else Number(float, 1.01))
        more = {"n_tokens": value} if name == "n=" else {"sparsity": value, "n_tokens": None}
        ds = replace(ds, **more)
    return ds


def budget_name(ds):
    """What parse_budget would read."""
    parts = [f"n={ds.n_tokens}"] if ds.n_tokens else []
    labels_alone = ds.n_tokens and ds.sparsity == DSConfig.sparsity  # what the share is then for
    return ",".join(parts if labels_alone else [f"1/{ds.sparsity:g}", *parts])


# ---------------------------------------------------------------- decoding


class Decoder:
    """A model with one cache for one sequence, which it scores as decode rows."""

    def __init__(self, model, tokenizer, max_seq_length, ds=None, label_maps=None,
                 method=DoubleSparsity, rows=None):
        """ds: None for dense. method: a class of METHODS. rows: tokens decoded at once; it changes
        memory, not results."""
        self.model, self.tokenizer = model, tokenizer
        # scores of all rows and heads take 512 MiB at most; a CPU is fastest with few
        fitting = 2**27 // (model.config.n_heads * max_seq_length)
        self.rows = rows or (64 if model.device.type == "cpu" else max(16, min(512, fitting)))
        device, dtype = model.device, model.dtype
        self.cache = KVCache(model.config, 1, max_seq_length, device, dtype, ds, label_maps)
        self.cache.layers = [method(layer) if layer.ds else layer for layer in self.cache.layers]
        self.sparse = [layer for layer in self.cache.layers if layer.ds]
        self.in_order = any(layer.in_order for layer in self.sparse)
        self.prefilled = []  # tokens whose K, V and labels lie in the cache

    def start(self, tokens=(), probed=False, like=None):
        """Forgets the sequence and prefills another, dense (h2o decodes it, row by row); what was
        prefilled just before is there already.

        like: a Decoder that has prefilled the same tokens, whose K and V are taken.
        """
        tokens = list(tokens)
        self.cache.seq_lens.zero_()
        if tokens == self.prefilled and not self.in_order:
            self.cache.seq_lens += len(tokens)
        elif tokens and self.in_order:
            for part in torch.tensor(tokens, device=self.model.device).split(self.rows):
                self.model.decode_rows(part, self.cache)
        elif tokens and like:
            positions = torch.arange(len(tokens), device=self.model.device)[None]
            for layer, other in zip(self.cache.layers, like.cache.layers):
                layer.write(*other.past(len(tokens)), positions)
            self.cache.seq_lens += len(tokens)
        elif tokens:
            self.model.prefill([tokens], self.cache)
        self.prefilled = tokens
        self.length, self.decoded, self.live = len(tokens), 0, 0
        for layer in self.sparse:
            layer.start(probed)

    def logits(self, tokens):
        """Decodes known tokens (list of ids) one after the other; yields logits [rows, vocab]."""
        for part in torch.tensor(tokens, device=self.model.device).split(self.rows):
            first, self.length = self.length, self.length + len(part)
            window = self.model.config.longest_window or self.length
            self.live += sum(min(live, window) for live in range(first + 1, self.length + 1))
            self.decoded += len(part)
            yield self.model.decode_rows(part, self.cache)

    def attended(self):
        """Tokens attended since `start`, summed over decoded tokens, mean over sparse layers and KV
        heads; dense: all live ones."""
        if not self.sparse:
            return float(self.live)
        return parallel.mean(statistics.mean(float(layer.attended) for layer in self.sparse))

    def mass(self):
        """Share of the exact attention that the chosen tokens hold; None where none was asked."""
        probed = [layer for layer in self.sparse if layer.probes]
        shares = [float(layer.mass) / layer.probes for layer in probed]
        return parallel.mean(statistics.mean(shares)) if shares else None

    def greedy(self, tokens, max_new_tokens, done):
        """The text that follows `tokens`, which are decoded: up to its end, or till done(text)."""
        new = []
        while len(new) < max_new_tokens:
            *_, logits = self.logits(new[-1:] or tokens)
            new.append(logits[-1].argmax().item())
            if new[-1] in self.model.config.eos_ids or done(self.tokenizer.decode(new)):
                break
        return self.tokenizer.decode(new)


# ---------------------------------------------------------------- scores
# Of an item: what comes out of each Decoder, a dict; and what a row says of all these dicts.


def score_text(item, dense, decoders):
    """Per Decoder, in sums over the decoded tokens: nats; KL of dense's next token from its own, in
    nats; how often the likeliest is the same."""
    ids, first = item["prompt"], item["prefilled"]
    everyone = [dense, *(decoder for decoder in decoders if decoder is not dense)]
    for decoder in everyone:
        decoder.start(ids[:first], probed=True, like=None if decoder is dense else dense)
    targets = torch.tensor(ids[first + 1 :], device=dense.model.device)
    sums = torch.zeros(len(everyone), 3, dtype=torch.float64, device=targets.device)
    parts = zip(*(decoder.logits(ids[first:-1]) for decoder in everyone))
    for wanted, logits in zip(targets.split(dense.rows), parts):
        theirs = logits[0].float().log_softmax(-1)
        for ours, found in zip(logits, sums):
            ours = ours.float().log_softmax(-1)
            found[0] += F.nll_loss(ours, wanted, reduction="sum").double()
            found[1] += F.kl_div(ours, theirs, reduction="sum", log_target=True).double()
            found[2] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
    both = {"tokens": len(targets), "bytes": len(dense.tokenizer.decode(targets.tolist()).encode())}
    found = {decoder: dict(zip(("nats", "kl", "same"), row)) | {"mass": decoder.mass()} | both
             for decoder, row in zip(everyone, sums.tolist())}
    return [found[decoder] for decoder in decoders]


def of_text(results):
    """What a row says of score_text's results: perplexity, bits per byte of text, and the means of
    KL, of agreement in the likeliest token (percent) and of the attention held."""
    nats, kl, same, tokens, text_bytes = (
        sum(r[name] for r in results) for name in ("nats", "kl", "same", "tokens", "bytes"))
    mass = None if results[0]["mass"] is None else statistics.mean(r["mass"] for r in results)
    return {"score": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / text_bytes,
            "kl": kl / tokens, "top1": 100 * same / tokens, "mass": mass}


def score_answer(item, dense, decoders):
    """Per Decoder: how right its answer is, in percent.

    Where the answer's tokens are given, one pass decides: greedy decoding gives them if and only if
    each is the likeliest after the right ones before it.
    """
    ids, first, results = item["prompt"], item["prefilled"], []
    dense.start(ids[:first])
    for decoder in decoders:
        if decoder is not dense:
            decoder.start(ids[:first], like=dense)
        if "answer" in item:
            answer = item["answer"]
            logits = torch.cat(list(decoder.logits(ids[first:] + answer[:-1])))[-len(answer) :]
            score = 100.0 * (logits.argmax(-1).tolist() == answer)
        else:
            outputs = [output.lower() for output in item["outputs"]]

            def done(text):  # what follows would change nothing
                return all(output in text.lower() for output in outputs)

            text = decoder.greedy(ids[first:], item["max_new_tokens"], done).lower()
            score = 100 * statistics.mean(output in text for output in outputs)
        groups = {name: item[name] for name in ("task", "length", "depth") if name in item}
        results.append({"score": score} | groups)
    return results


def of_answers(results):
    """The mean, also by task, by length in tokens, by fifth of the depth of what is asked for."""
    found = {"score": statistics.mean(r["score"] for r in results)}
    groups = {"task": lambda r: r["task"], "length": lambda r: str(r["length"]),
              "depth": lambda r: f"{int(5 * r['depth']) + 1}/5"}
    for name, group in groups.items():
        if name in results[0]:
            scores = {}
            for r in sorted(results, key=lambda r: r[name] if name == "depth" else 0):
                scores.setdefault(group(r), []).append(r["score"])
            found[f"by_{name}"] = {key: statistics.mean(values) for key, values in scores.items()}
    return found


def score_items(score, items, dense, decoders, partials, name):
    """What comes out of all items, a list of dicts for each Decoder.

    partials: a Path for each; the items that it has are done, what comes out now is added to it.
    """
    results = []
    with parallel.rank_0_first():
        for path in partials:
            lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # not what was being written
            results.append([json.loads(line) for line in whole])
            if lines:
                path.write_text("".join(whole), encoding="utf-8")
    for i, item in enumerate(tqdm(items, desc=name, unit="item", leave=False)):
        todo = [j for j, done in enumerate(results) if len(done) == i]
        for j, found in zip(todo, score(item, dense, [decoders[j] for j in todo]) if todo else ()):
            found |= {"attended": decoders[j].attended(), "decoded": decoders[j].decoded}
            results[j].append(found)
            append_json_lines(partials[j], [found])
    return results


# ---------------------------------------------------------------- rows

# What makes two rows the same line of the table, of which the newest counts; and the same
# measurement, not to be repeated.
SETTING = ("task", "checkpoint", "data", "context", "last", "method", "budget", "n_items", "gpu",
           "gpus", "config", "channels", "fewshot", "chat")
IDENTITY = ("task", "model", "data", "inputs", "method", "config", "calibration", "gpu", "gpus")


def key_of(row, names):
    """A string; the configuration's defaults do not count, so that rows from before a new field are
    the same as with it."""
    values = {name: row.get(name) for name in names}
    if values.get("config"):
        default = json.loads(json.dumps(asdict(DSConfig())))
        values["config"] = {name: value for name, value in values["config"].items()
                            if value != default.get(name)}
    return json.dumps(values, sort_keys=True)


def read_rows(path, names):
    """{key: row} of a file of rows: the newest of each, in the order in which they first came."""
    rows = read_json_lines(path)
    if not all(row.get("task") and row.get("checkpoint") for row in rows):
        raise ValueError(f"{path}: has lines that are not rows of eval.py")
    return {key_of(row, names): row for row in rows}


def labels_file(checkpoint, method, path, device):
    """channels.safetensors of a calibration by this method on the text file `path` (None: the
    built-in text), made once."""
    text = read_text(path) if path else builtin_text()
    model_hash = fingerprint(checkpoint / "model.safetensors")
    code = Path(calibrate.__file__).read_bytes()
    tag = hashlib.sha256(model_hash.encode() + code + text.encode()).hexdigest()[:12]
    out = RUNS / "labels" / f"{checkpoint.name}-{method}-{tag}.safetensors"
    with parallel.rank_0_first():
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            print(f"calibrating labels of method {method} (once)", file=sys.stderr)
            with contextlib.redirect_stdout(sys.stderr):
                calibrate.calibrate(checkpoint, text, method, device=device,
                                    dtype=default_dtype(device), out=out)
    return out


def calibration_of(path):
    """How the labels of a channels.safetensors were calibrated, and on which text."""
    with open_tensors(path) as file:
        found = file.metadata() or {}
    fields = ("method", "text_sha256", "tokens", "context")
    found = {name: found.get(name) for name in fields}
    found["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    builtin = hashlib.sha256(builtin_text().encode()).hexdigest()
    return found | ({"text": BUILTIN} if found.get("text_sha256") == builtin else {})


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Evaluation:
    """One model, its rows, and the file that they go to."""

    def __init__(self, args, ds):
        self.args, self.ds, self.device = args, ds, pick_device(args.device)
        self.model, self.tokenizer, self.checkpoint = load(
            args.checkpoint, self.device, default_dtype(self.device), args.quantize)
        check_layers(ds, self.model.config)
        self.path = Path(args.results or RUNS / "quality.jsonl")
        self.saved = {} if args.force else read_rows(self.path, IDENTITY)
        weights = f", {args.quantize}" if args.quantize else ""
        self.hash = fingerprint(self.checkpoint / "model.safetensors") + weights
        self.name = self.checkpoint.name + weights

    def decoder(self, longest, method, budget):
        """(a Decoder for so many tokens, a row's fields that describe it) of a setting."""
        if method == "dense":
            fields = {"budget": "all", "config": None, "calibration": None}
            return Decoder(self.model, self.tokenizer, longest), fields
        method_class, calibration, bits = parse_method(method)
        ds = parse_budget(budget, self.ds) if budget else self.ds
        ds = replace(ds, label_bits=bits) if bits else ds
        channels = self.args.channels
        if calibration:
            data = self.args.calibration_data
            channels = labels_file(self.checkpoint, calibration, data, self.device)
        maps = load_maps(self.checkpoint, self.model.config, ds, self.device, channels, longest)
        widths = ds.widths(self.model.config.head_dim)
        bits = ds.label_bits if isinstance(ds.label_bits, int) else widths_name(widths)
        config = asdict(ds) | {"label_bits": bits}  # the default may change
        fields = {"budget": budget_name(ds), "config": config, "calibration": None}
        if method_class.labelled:
            path = channels or self.checkpoint / "channels.safetensors"
            fields |= {"labels": f"{widths_name(widths)} bit", "calibration": calibration_of(path),
                       "channels": None if calibration or not channels else Path(channels).name}
        return Decoder(self.model, self.tokenizer, longest, ds, maps, method_class), fields

    def rows(self, task, settings):
        """The rows of a task at [(method, budget)], dense's first: from the file, or measured."""
        args, text = self.args, task == "perplexity"
        data, items = TASKS[task](self.tokenizer, args)
        if not items:
            raise ValueError(f"{args.data or data}: no items in it")
        longest = max(map(size, items)) - 1  # the last token is not decoded
        positions = self.model.config.max_positions
        if longest > positions:
            raise ValueError(f"{longest} tokens are more than the model's {positions} positions: "
                             "take a smaller --context or --lengths, or --data with shorter items")
        mean_size = round(statistics.mean(map(size, items)))
        common = {"task": task, "checkpoint": self.name, "model": self.hash,
                  "data": data, "inputs": short_hash(json.dumps(items)),
                  "context": args.context if text else mean_size, "n_items": len(items),
                  **provenance(self.device)}
        common |= {"last": args.last} if text and args.last else {}
        common |= {"chat": True} if args.chat else {}
        rows, dense = [], None
        command = json.dumps([str(self.path.resolve()), settings])  # others may run beside it
        new = []  # (row, its Decoder, the file of its items)
        for setting in [("dense", None), *settings]:
            decoder, fields = self.decoder(longest, *setting)
            dense = dense or decoder
            row = common | {"method": setting[0]} | fields
            rows.append(self.saved_or(row))
            if rows[-1] is row:
                name = short_hash(key_of(row, IDENTITY) + command)
                partial = RUNS / "partial" / f"{name}.jsonl"
                if args.force:
                    partial.unlink(missing_ok=True)
                new.append((row, decoder, partial))
        if new:
            score, summary = (score_text, of_text) if text else (score_answer, of_answers)
            _, decoders, partials = zip(*new)
            results = score_items(score, items, dense, decoders, partials, task)
            for (row, _, partial), found in zip(new, results):
                attended, decoded = (sum(r[x] for r in found) for x in ("attended", "decoded"))
                row |= {"mean_tokens": attended / decoded, **summary(found)}
                row["dense_score"] = rows[0]["score"]
                self.save(row)
                partial.unlink(missing_ok=True)
        return rows

    def harness_rows(self, task, settings):
        """As rows, of a task of lm-eval."""
        try:
            import harness  # takes seconds
        except ImportError:
            raise ValueError("lm_eval needs the package: pip install lm-eval") from None
        args = self.args
        size = min(args.context, self.model.config.max_positions)
        inputs = [args.limit, args.fewshot, args.chat, size, harness.lm_eval.__version__]
        common = {"task": "lm_eval", "checkpoint": self.name, "model": self.hash,
                  "data": task, "inputs": short_hash(json.dumps(inputs)), "context": size,
                  "fewshot": args.fewshot, **provenance(self.device)}
        common |= {"chat": True} if args.chat else {}
        rows = []
        for setting in [("dense", None), *settings]:
            decoder, fields = self.decoder(size, *setting)
            row = common | {"method": setting[0]} | fields
            rows.append(self.saved_or(row))
            if rows[-1] is row:
                print(f"{task} of lm-eval by {setting[0]}", file=sys.stderr)
                row |= harness.run(decoder, task, args.limit, args.fewshot, args.chat,
                                   args.include_path)
                row["dense_metrics"] = rows[0]["metrics"]
                self.save(row)
        return rows

    def saved_or(self, row):
        """The saved row of the same measurement; without one the row itself."""
        saved = self.saved.get(key_of(row, IDENTITY))
        if saved:
            print(f"{row['task']} {row['data']} {row['method']} {row['budget']}: measured on "
                  f"{saved['date']} at commit {saved['commit']}, taken from {self.path}; --force "
                  "measures it again", file=sys.stderr)
        return saved or row

    def save(self, row):
        append_json_lines(self.path, [row])
        self.saved[key_of(row, IDENTITY)] = row


# ---------------------------------------------------------------- command line


def main():
    """The command line: measures, or prints a table."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("tasks", nargs="*",
        help=f"{', '.join(TASKS)}, lm_eval (default: perplexity kv_retrieval, and without any "
             "argument little of both); or table")
    add("--checkpoint", default=str(HERE / "tiny"),
        help="directory, GGUF file or hub id (default: the tiny model)")
    add("--data",
        help="perplexity, passkey, ruler: UTF-8 text, .jsonl[.xz] with a \"text\" per line, or "
             f"{WIKITEXT2}, from the hub (default: the {BUILTIN}); kv_retrieval: items in the "
             "published format, .jsonl[.gz] (default: generated); ruler: items in RULER's form, in "
             "a file of that name")
    add("--tasks", dest="harness_tasks", metavar="NAMES",
        help="lm_eval: its tasks or groups of tasks, with commas between")
    add("--fewshot", type=Number(int, 0),
        help="lm_eval: examples in front (default: as the task has it)")
    add("--include_path", metavar="DIR", help="lm_eval: a directory with more tasks (.yaml)")
    add("--chat", action="store_true", help="ruler, lm_eval: ask through the chat template")
    add("--context", type=Number(int, 1), default=4096,
        help="tokens per window, or at most per request of lm_eval (default %(default)s)")
    add("--last", type=Number(int, 1), metavar="N",
        help="decode and score only the last N tokens of each window, the rest is prefilled "
             "(default: all)")
    add("--lengths", type=Number(int, 1), nargs="+", metavar="N",
        help=f"tokens of generated items, at most (default {' '.join(map(str, LENGTHS))}); "
             "of a file in RULER's form: only those")
    add("--limit", type=Number(int, 1),
        help="windows or items at most, of generated and ruler's items of each length and task, of "
             "lm_eval of each task (default: all; of generated items 20, of ruler's 4)")
    add("--methods", nargs="+", default=["ds"],
        help=f"ways to choose the tokens: {', '.join(METHODS)}; ds:CALIBRATION, ds/BITS and "
             "ds:CALIBRATION/BITS are ds with other labels, of these --label_bits, calibrated by "
             "that --method of calibrate.py (default: ds)")
    add("--budgets", nargs="+", default=[None],
        help="1/R as by --sparsity, n=N as by --n_tokens; both with a comma between (default: as "
             "those options say)")
    add("--calibration_data", type=InputFile(), metavar="FILE",
        help=f"text for ds:CALIBRATION and paper (default: the {BUILTIN})")
    add("--results", type=OutputFile(), metavar="FILE",
        help="rows are added to it, those in it are not measured again (default: "
             "runs/quality.jsonl; of table: results/quality.jsonl)")
    add("--force", action="store_true", help="measure all rows again")
    add_sparsity_arguments(parser)
    add_quantize_argument(parser)
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    if args.tasks == ["table"]:
        path = Path(args.results or RESULTS)
        rows = list(read_rows(path, SETTING).values())
        if not rows:
            raise ValueError(f"{path}: no results yet; run eval.py --results {path} first")
    else:
        rows = evaluate(args)
    print(quality_table(rows))


def evaluate(args):
    """The rows of a command line, from a file or measured."""
    if len(sys.argv) == 1:  # a newcomer's tour, of a minute or two
        args.context, args.last, args.lengths, args.limit = 1024, 256, [1024], 4
        print("a tour: the last 256 of 1,024 tokens of text, and retrieval from as many, 4 of "
              "each, decoded by the embedded model; too little to quote, see --help for more",
              file=sys.stderr)
    args.tasks = args.tasks or ["perplexity", "kv_retrieval"]
    for task in args.tasks:
        if task not in (*TASKS, "lm_eval"):
            raise ValueError(f"tasks={task}: must be some of {', '.join(TASKS)}, lm_eval, or table "
                             "alone")
    if ("lm_eval" in args.tasks) != bool(args.harness_tasks):
        raise ValueError("lm_eval takes --tasks, as in: eval.py lm_eval --tasks arc_easy,mmlu")
    if "lines" in args.tasks and args.data:
        raise ValueError(f"data={args.data}: lines are generated; leave out --data")
    ds = sparsity_from(args)
    if ds is None and args.budgets != [None]:
        raise ValueError(f"sparsity={args.sparsity:g}: dense has no budgets; give one above 1")
    settings = [(method, budget) for budget in args.budgets for method in args.methods]
    settings = settings if ds else []
    for method, budget in settings:
        parse_method(method)
        parse_budget(budget, ds) if budget else None
    evaluation = Evaluation(args, ds)
    rows = []
    for task in args.tasks:
        if task != "lm_eval":
            rows += evaluation.rows(task, settings)
            continue
        for name in args.harness_tasks.split(","):
            rows += evaluation.harness_rows(name, settings)
    print(f"rows are in {evaluation.path}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    run_command(main, several=True)
