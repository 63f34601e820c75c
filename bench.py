"""Speed of Double Sparsity against the fastest dense kernels, on the same inputs, in CUDA graphs, checked first.

Usage: python bench.py attention [--shapes 4x16384,16x16384] [--heads 32/32]
       python bench.py attention --device cpu          a small correctness pass, its times marked as CPU reference
       python bench.py table attention                 the README's table, from results/attention.jsonl
"""
import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import ds_attention as ds
from ds_attention import DSConfig, LabelMap, Selection, Workspace
from eval import provenance
from generate import HERE, pick_device
from model import ArgumentParser, run_command

RESULTS = HERE / "results"
# B, S, HQ, HKV
SHAPES = [(1, 16384, 32, 32), (1, 131072, 32, 32), (4, 16384, 32, 32), (4, 65536, 32, 32), (16, 16384, 32, 32),
          (32, 16384, 32, 32), (16, 65536, 32, 8), (4, 131072, 32, 8)]
SMALLER_LABELS = [(32, 2), (8, 4)]  # label dims and bits that the README's table also shows, at (16, 16384)
L2_BYTES = 128e6  # twice an H200's: inputs that a step touches are cycled through at least as much


def graph_us(calls, repeats=30):
    """Median microseconds of one call among eight or more of one CUDA graph, as in a decode step of that many layers.

    On a CPU: each call once, timed as it is.
    """
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls) * 1e6
    for call in calls:  # compiles
        call()
    torch.cuda.synchronize()
    calls = calls * math.ceil(8 / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth(device):
    """Bytes per second of a large copy on the GPU, read and written bytes both counted."""
    a = torch.empty(2**32, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(10):  # not in a graph, where a copy may become a copy engine's, which is slower than a kernel
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * a.nbytes / statistics.median(times)


class Inputs:
    """One decode call's random inputs: q, an interleaved KV cache, its labels, all tokens live."""

    def __init__(self, B, S, HQ, HKV, D, dtype, config, device, seed):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.q = normal(B, HQ, D)
        self.kv = normal(B, HKV, S, 2, D)
        self.k, self.v = self.kv.unbind(3)
        C = config.channels(D)
        basis = torch.eye(D, device=device)[:, :C].expand(HKV, -1, -1)
        zeros = torch.zeros(HKV, C, device=device)
        self.map = LabelMap.from_statistics(basis, basis, zeros, zeros + 1, config.label_bits)
        self.labels = torch.zeros(B, HKV, config.words(D), S, dtype=torch.int32, device=device)
        write = ds.label if config.use_triton(self.q) else ds.label_ref
        for start in range(0, S, 16384):
            positions = torch.arange(start, min(S, start + 16384), dtype=torch.int32, device=device).expand(B, -1).contiguous()
            write(self.k[:, :, start : start + 16384], positions, self.labels, self.map)
        self.seq_lens = torch.full((B,), S, dtype=torch.int32, device=device)


def dense_kernels(x, workspace):
    """SDPA by backend, and our own, over the same cache: {name: call} of [B, HQ, D] -> [B, HQ, 1, D]."""
    gqa = x.q.shape[1] != x.k.shape[1]

    def call(backend):
        def run():
            query = x.q[:, :, None]
            if backend is None:
                return F.scaled_dot_product_attention(query, x.k, x.v, enable_gqa=gqa)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, x.k, x.v, enable_gqa=gqa)
        return run

    return {"sdpa": call(None), "cudnn": call(SDPBackend.CUDNN_ATTENTION), "flash": call(SDPBackend.FLASH_ATTENTION),
            "ours, all tokens": lambda: ds.dense_decode(x.q, x.k, x.v, x.seq_lens, workspace=workspace)[:, :, None]}


def check(x, config, out):
    """(relative error of out against fp32 attention over the reference's selection, share of the label scores' mass kept)."""
    worst_mass, errors, norms = 1.0, 0.0, 0.0
    indices, n_tokens = ds.select(x.q, x.labels, x.map, x.seq_lens, config) if config.use_triton(x.q) else (None, None)
    for b in range(len(x.q)):
        row = slice(b, b + 1)
        scores = ds.score_ref(x.q[row], x.labels[row], x.map, x.seq_lens[row], pool=config.pool)
        n = config.budget(x.seq_lens[row])
        want = ds.select_ref(scores, x.seq_lens[row], n, int(n), config.sink, config.recent)
        chosen = want if indices is None else indices[row, :, : int(n)]
        mass = scores.softmax(-1)
        kept = mass.gather(-1, chosen.long()).sum(-1) / mass.gather(-1, want.long()).sum(-1)
        worst_mass = min(worst_mass, kept.min().item())
        exact = ds.attend_ref(x.q[row].float(), x.k[row], x.v[row], x.seq_lens[row], want, n)
        errors += (out[row].double() - exact.double()).square().sum().item()
        norms += exact.double().square().sum().item()
    return math.sqrt(errors / norms), worst_mass


def naive_chain(x, config):
    """The obvious way, in eager torch: labels unpacked, all scores written out, torch.topk, gather, SDPA."""
    n = config.budget(x.labels.shape[-1])
    scores = ds.score_ref(x.q, x.labels, x.map, x.seq_lens, pool=config.pool)
    rows = scores.topk(n, -1).indices[..., None].expand(-1, -1, -1, x.q.shape[2])
    k, v = x.k.gather(2, rows), x.v.gather(2, rows)
    return F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=x.q.shape[1] != x.k.shape[1])


def attention_row(B, S, HQ, HKV, D, dtype, config, device, bandwidth):
    """Checks, then times one shape: the row of results/attention.jsonl."""
    n = config.budget(S)
    label_bytes = B * HKV * S * config.words(D) * 4
    token_bytes = 2 * D * dtype.itemsize
    step_bytes = label_bytes + B * HKV * n * token_bytes
    dense_bytes = B * HKV * S * token_bytes
    copies = math.ceil(L2_BYTES / step_bytes) if device != "cpu" else 1
    xs = [Inputs(B, S, HQ, HKV, D, dtype, config, device, seed) for seed in range(copies)]
    workspace = Workspace(B, HQ, HKV, D, S, torch.device(device), config)
    row = {"bench": "attention", "B": B, "S": S, "HQ": HQ, "HKV": HKV, "D": D, "dtype": str(dtype).removeprefix("torch."),
           "label_channels": config.channels(D), "label_bits": config.label_bits, "n_tokens": n, "bytes": step_bytes,
           "dense_bytes": dense_bytes}
    if not config.use_triton(xs[0].q):
        x = xs[0]
        row["ds_us"] = graph_us([lambda: ds.ds_decode(x.q, x.k, x.v, x.labels, x.map, x.seq_lens, config)])
        row["dense_us"] = graph_us([lambda: ds.dense_decode(x.q, x.k, x.v, x.seq_lens)])
        row["dense_kernel"] = "reference"
        out = ds.ds_decode(x.q, x.k, x.v, x.labels, x.map, x.seq_lens, config)
        row["max_rel_err"], row["selected_mass"] = check(x, config, out)
        return row | provenance(device)

    row |= {"copy_gb_per_s": bandwidth / 1e9, "limit_us": step_bytes / bandwidth * 1e6}

    def step(x):
        return ds.ds_decode(x.q, x.k, x.v, x.labels, x.map, x.seq_lens, config, workspace=workspace)

    checks = [check(x, config, step(x)) for x in xs]
    row |= {"max_rel_err": max(error for error, _ in checks), "selected_mass": min(mass for _, mass in checks)}
    exact = ds.attend_ref(xs[0].q[:1].float(), xs[0].k[:1], xs[0].v[:1], xs[0].seq_lens[:1])
    kernels = [dense_kernels(x, workspace) for x in xs]
    for name in kernels[0]:
        try:
            dense = kernels[0][name]()[:1, :, 0]
            if (dense - exact).norm() / exact.norm() > 0.02:
                raise RuntimeError("its result is wrong")
            row[f"{name}_us"] = graph_us([kernel[name] for kernel in kernels])
        except (RuntimeError, torch.OutOfMemoryError) as error:  # a backend that does not take this shape: shown as absent
            row[f"{name}_us"] = None
            row[f"{name}_error"] = str(error).split("\n")[0][:80]
    timed = {name: row[f"{name}_us"] for name in kernels[0] if row[f"{name}_us"]}
    row["dense_kernel"] = min(timed, key=timed.get)
    row["dense_us"] = timed[row["dense_kernel"]]

    def stages(x, last):
        """The step up to its `last`-th kernel."""
        def run():
            selection = Selection(x.q, x.labels, x.map, x.seq_lens, config, workspace)
            for stage in (selection.bracket, selection.emit, selection.choose)[:last]:
                stage()
        return run

    upto = [graph_us([stages(x, last) for x in xs]) for last in (1, 2, 3)]
    row["ds_us"] = graph_us([lambda x=x: step(x) for x in xs])
    row |= {"bracket_us": upto[0], "emit_us": upto[1] - upto[0], "score_us": upto[1], "select_us": upto[2] - upto[1],
            "attend_us": row["ds_us"] - upto[2]}
    try:
        row["naive_us"] = graph_us([lambda x=x: naive_chain(x, config) for x in xs[:1]], 5)
    except torch.OutOfMemoryError:
        row["naive_us"] = None
    right = row["max_rel_err"] < 0.01 and row["selected_mass"] >= 0.999
    row["speedup"] = row["dense_us"] / row["ds_us"] if right else None
    return row | provenance(device)


def attention_table(rows):
    """Rows of results/attention.jsonl -> Markdown. Times in microseconds."""
    lines = ["| B, S | HQ/HKV | labels | sdpa | cudnn | flash | dense best | ours | = score + select + attend | speedup | "
             "GB/s | byte limit | topk chain |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]

    def us(value):
        return "-" if value is None else f"{value:.0f}"

    for r in rows:
        stages = " + ".join(us(r.get(f"{name}_us")) for name in ("score", "select", "attend"))
        speedup = f"{r['speedup']:.1f}x" if r.get("speedup") else "wrong" if "speedup" in r else "CPU reference"
        limit = f"{r['limit_us']:.0f} ({r['limit_us'] / r['ds_us']:.0%})" if "limit_us" in r else "-"
        dense = " | ".join(us(r.get(f"{name}_us")) for name in ("sdpa", "cudnn", "flash", "dense"))
        lines.append(f"| {r['B']}, {r['S']} | {r['HQ']}/{r['HKV']} | {r['label_channels']} x {r['label_bits']} bit | {dense} | "
                     f"{us(r['ds_us'])} | {stages} | {speedup} | {r['bytes'] / r['ds_us'] / 1e3:.0f} | {limit} | "
                     f"{us(r.get('naive_us'))} |")
    return "\n".join(lines)


def plot(rows, path):
    """Speedup over S, a line for each B and head count, into an image file. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines = {}
    for r in rows:
        if r.get("speedup"):
            lines.setdefault((r["B"], f"{r['HQ']}/{r['HKV']}", f"{r['label_channels']} x {r['label_bits']} bit"), []).append(r)
    for (B, heads, labels), found in sorted(lines.items()):
        found.sort(key=lambda r: r["S"])
        axes.plot([r["S"] for r in found], [r["speedup"] for r in found], "o-", label=f"B = {B}, {heads} heads, {labels}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="live tokens S", ylabel="speedup over the fastest dense kernel")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def newest_rows(path):
    """The last row of each setting of a results file, in the order in which the settings first came."""
    if not path.exists():
        raise ValueError(f"{path}: no results yet; run bench.py attention first")
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[tuple(row[k] for k in ("B", "S", "HQ", "HKV", "D", "dtype", "label_channels", "label_bits"))] = row
    return list(rows.values())


def parse_shapes(text, heads):
    """"4x16384,16x16384" and "32/8" -> [(B, S, HQ, HKV)]."""
    try:
        HQ, HKV = map(int, heads.split("/"))
        shapes = [(*map(int, part.split("x")), HQ, HKV) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"shapes={text}, heads={heads}: must look like 4x16384,16x16384 and 32/8") from None
    if any(len(shape) != 4 or min(shape) < 1 for shape in shapes) or HQ % HKV:
        raise ValueError(f"shapes={text}, heads={heads}: sizes must be positive, query heads a multiple of KV heads")
    return shapes


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("attention", "table"))
    parser.add_argument("of", nargs="?", choices=("attention",), help="with table: whose")
    parser.add_argument("--shapes", help="BxS, comma-separated, S in tokens (default: the README's rows)")
    parser.add_argument("--heads", default="32/32", help="query/KV heads for --shapes (default %(default)s)")
    parser.add_argument("--head_dim", type=int, default=128, help="channels per head (default %(default)s)")
    parser.add_argument("--sparsity", type=float, default=DSConfig.sparsity,
                        help="1/R of tokens and label bytes (default %(default)g)")
    parser.add_argument("--label_channels", type=int, help="label dims per KV head (default: from --sparsity)")
    parser.add_argument("--label_bits", type=int, default=DSConfig.label_bits,
                        help="bits per dim: 2, 4, 8 or 16 (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16",
                        help="of q, K and V (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw speedup over S, of this run or of the table (needs matplotlib)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda; a CPU only checks correctness)")
    args = parser.parse_args()
    if args.what == "table":
        rows = newest_rows(RESULTS / "attention.jsonl")
    else:
        if args.device is None and not torch.cuda.is_available():
            raise ValueError("bench.py needs a CUDA GPU for its times; --device cpu runs a small correctness pass")
        device = pick_device(args.device)
        config = DSConfig(sparsity=args.sparsity, label_channels=args.label_channels, label_bits=args.label_bits)
        if args.shapes:
            settings = [(shape, config) for shape in parse_shapes(args.shapes, args.heads)]
        elif device == "cpu":
            settings = [((2, 2000, 4, 2), config)]
        else:
            settings = [(shape, config) for shape in SHAPES]
            settings += [((16, 16384, 32, 32), replace(config, label_channels=C, label_bits=bits))
                         for C, bits in SMALLER_LABELS]
        rows = measure(settings, args.head_dim, getattr(torch, args.dtype), device)
    print(attention_table(rows))
    if args.plot:
        plot(rows, args.plot)


def measure(settings, D, dtype, device):
    """Rows of [((B, S, HQ, HKV), DSConfig)], each written to results/attention.jsonl as it comes (none from a CPU)."""
    bandwidth = copy_bandwidth(device) if device != "cpu" else None
    rows = []
    for shape, config in tqdm(settings, desc="attention", unit="shape", leave=False):
        rows.append(attention_row(*shape, D, dtype, config, device, bandwidth))
        if device != "cpu":
            RESULTS.mkdir(exist_ok=True)
            with open(RESULTS / "attention.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    run_command(main)
