"""Speed of Double Sparsity: decode attention against the fastest dense kernels, whole decode steps
against gpt-fast's way, and with K and V in host memory against streaming all of them.

Usage: python bench.py               a short tour, on a CPU too, where its times say nothing
       python bench.py attention [--shapes 4x16384,16x16384] [--heads 32/32]     checked first
       python bench.py generate [--model Llama-2-7B --shapes 1x16384] [--modes gpt_fast dense ds]
       torchrun --standalone --nproc_per_node=2 bench.py generate --modes dense ds     two GPUs
       python bench.py offload [--model Llama-2-7B --shapes 1x131072] [--modes flexgen gpu offload]
       python bench.py offload --checkpoint tiny --shapes 32x4000,1x4000 --steps 64 [--data FILE]
       TRITON_INTERPRET=1 python bench.py attention --device cpu     a small check, times no measure
       python bench.py table attention     of results/, as in its README; or generate, offload
Weights are random without --checkpoint.
"""
import contextlib
import gc
import itertools
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import ds_attention as ds
import parallel
from cli import (
    ArgumentParser, InputFile, Number, append_json_lines, bits_of, check_layers, check_output,
    default_dtype, label_bits, parse_sizes, pick_device, provenance, run_command
)
from config import PRESETS, ModelConfig
from decode import DecodeStep, generate, now
from ds_attention import DSConfig, LabelMap, Workspace, parse_widths, write_labels
from generate import copy_bandwidth, load, load_maps
from gpt_fast import GptFast
from host_memory import check_host_memory, fetch, free_host_bytes, host_layers, packs
from items import generated_items, kv_document, spread, text_windows, texts_of
from linear import largest, quantized
from model import KVCache, Transformer, check_memory, parameter_shapes
from offload import MIN_AGREEMENT, OffloadCache, Placement, idle_heads, predictable_layers
from pages import RESULTS, TABLES, newest_rows

# ---------------------------------------------------------------- attention

# B, S, HQ, HKV
SHAPES = [(1, 16384, 32, 32), (1, 131072, 32, 32), (4, 16384, 32, 32), (4, 65536, 32, 32),
          (16, 16384, 32, 32), (32, 16384, 32, 32), (16, 65536, 32, 8), (4, 131072, 32, 8),
          (1, 131072, 32, 8)]
UNIFORM = 4  # the paper's bits per label dim; all shapes are timed with them, too, in as many bytes
MORE_LABELS = ["48x2", "20x2,24x1", "32x2", "8x4", "32x1"]  # further ones, at (16, 16384)
L2_BYTES = 128e6  # twice an H200's: inputs that a step touches are cycled through at least as much


def graph_us(calls, device, repeats=30):
    """Median microseconds of one call of eight or more in a CUDA graph, a step of so many layers.

    On a CPU: each call once, timed as it is.
    """
    if device == "cpu":
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


def channel_map(HKV, D, config, device):
    """A LabelMap of the first channels, for random keys of unit variance."""
    channels = torch.arange(config.channels(D), device=device).expand(HKV, -1)
    zeros = torch.zeros(channels.shape, device=device)
    return LabelMap.from_statistics(channels, zeros, zeros + 1, config.widths(D))


def label_all(kv, labels, label_map, config):
    """Writes the labels of all tokens of kv [B, HKV, S, 2, D], some at a time."""
    B, _, S, _, _ = kv.shape
    for start in range(0, S, 16384):
        positions = torch.arange(start, min(S, start + 16384), dtype=torch.int32,
                                 device=kv.device).expand(B, -1).contiguous()
        write_labels(kv[:, :, start : start + 16384, 0], positions, labels, label_map, config)


CLUSTERED = 0.08  # share of the positions, in bands, that hold most of what clustered inputs select


class Inputs:
    """One decode call's random inputs: q, an interleaved KV cache and its labels.

    clustered: keys in bands of random length and place, CLUSTERED of each head's, score 3 standard
    deviations above the others, as the passages do that real text attends to.
    """

    def __init__(self, B, S, HQ, HKV, D, dtype, config, device, seed, clustered=False):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.q = normal(B, HQ, D)
        self.kv = normal(B, HKV, S, 2, D)
        self.k, self.v = self.kv.unbind(3)
        if clustered:
            bands = (B, HKV, math.ceil(CLUSTERED * S / 256))  # of 256 tokens on average
            begin, length = (torch.randint(*limits, bands, generator=generator, device=device)
                             for limits in ((0, S), (16, 497)))
            ends = torch.zeros(B, HKV, S + 1, device=device)
            ends.scatter_add_(2, begin, torch.ones(bands, device=device))
            ends.scatter_add_(2, (begin + length).clamp(max=S), -torch.ones(bands, device=device))
            inside = ends.cumsum(2)[..., :S] > 0.5
            q = self.q.float().view(B, HKV, -1, D)
            toward = (3 * math.sqrt(D) * q / q.square().sum(-1, keepdim=True)).sum(2).to(dtype)
            for k, mask, row in zip(self.k, inside, toward):
                for head in range(HKV):
                    k[head] += mask[head][:, None] * row[head]
        self.map = channel_map(HKV, D, config, device)
        self.labels = torch.zeros(B, HKV, config.words(D), S, dtype=torch.int32, device=device)
        label_all(self.kv, self.labels, self.map, config)
        self.seq_lens = torch.full((B,), S, dtype=torch.int32, device=device)


def dense_kernels(x, workspace):
    """SDPA's backends and our own, over one cache: {name: call} of [B, HQ, D] -> [B, HQ, 1, D]."""
    gqa = x.q.shape[1] != x.k.shape[1]

    def call(backend):
        def run():
            query = x.q[:, :, None]
            if backend is None:
                return F.scaled_dot_product_attention(query, x.k, x.v, enable_gqa=gqa)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, x.k, x.v, enable_gqa=gqa)
        return run

    return {"sdpa": call(None), "cudnn": call(SDPBackend.CUDNN_ATTENTION),
            "flash": call(SDPBackend.FLASH_ATTENTION),
            "ours, all tokens": lambda: ds.dense_decode(
                x.q, x.k, x.v, x.seq_lens, workspace=workspace)[:, :, None]}


def check(x, config, out):
    """out's relative error against fp32 attention over the reference's selection."""
    errors, norms = 0.0, 0.0
    for b in range(len(x.q)):
        row = slice(b, b + 1)
        q, k, v, seq_lens = x.q[row], x.k[row], x.v[row], x.seq_lens[row]
        scores = ds.score_ref(q, x.labels[row], x.map, seq_lens, config)
        chosen = ds.select_ref(scores, seq_lens, config)
        for h in range(k.shape[1]):  # one head at a time: less memory
            heads = slice(h * q.shape[1] // k.shape[1], (h + 1) * q.shape[1] // k.shape[1])
            of_head = (x[:, h : h + 1] for x in (k, v))
            exact = ds.attend_ref(q[:, heads].float(), *of_head, seq_lens, chosen[:, h : h + 1])
            errors += (out[row, heads].double() - exact.double()).square().sum().item()
            norms += exact.double().square().sum().item()
    return math.sqrt(errors / norms)


def naive_chain(x, config):
    """The obvious way, in eager torch: labels unpacked, all scores written out, torch.topk, gather,
    SDPA."""
    n = config.budget(x.labels.shape[-1])
    scores = ds.score_ref(x.q, x.labels, x.map, x.seq_lens, config)
    rows = scores.topk(n, -1).indices[..., None].expand(-1, -1, -1, x.q.shape[2])
    k, v = x.k.gather(2, rows), x.v.gather(2, rows)
    gqa = x.q.shape[1] != x.k.shape[1]
    return F.scaled_dot_product_attention(x.q[:, :, None], k, v, enable_gqa=gqa)


def right(row):
    """Whether what an attention row checked is as it should be."""
    return row["max_rel_err"] < 0.01


def attention_row(B, S, HQ, HKV, D, dtype, config, device, bandwidth):
    """Checks, then times one shape: the row of results/attention.jsonl."""
    n, words, token_bytes = config.budget(S), config.words(D), 2 * D * dtype.itemsize
    row = {"bench": "attention", "B": B, "S": S, "HQ": HQ, "HKV": HKV, "D": D,
           "dtype": str(dtype).removeprefix("torch."), "label_channels": config.channels(D),
           "label_bits": bits_of(config.widths(D)), "n_tokens": n,
           "dense_bytes": B * HKV * S * token_bytes}
    workspace = Workspace(B, HQ, HKV, D, S, torch.device(device), config)

    def step(x):
        return ds.ds_decode(x.q, x.k, x.v, x.labels, x.map, x.seq_lens, config, workspace=workspace)

    def inputs(clustered):
        step_bytes = B * HKV * (S * words * 4 + n * token_bytes)
        copies = math.ceil(L2_BYTES / step_bytes) if device != "cpu" else 1
        xs = [Inputs(B, S, HQ, HKV, D, dtype, config, device, seed, clustered)
              for seed in range(copies)]
        error, attended = 0.0, []
        for x in xs:
            workspace.attended.zero_()
            error = max(error, check(x, config, step(x)))
            attended.append(workspace.attended.double())
        return xs, error, torch.stack(attended)

    xs, row["max_rel_err"], attended = inputs(clustered=False)
    if config.use_triton(xs[0].q):
        n = attended.mean().item()
        row |= {"attended": n, "attended_spread": attended.std().item()}
    row["bytes"] = B * HKV * (S * words * 4 + n * token_bytes)
    if device == "cpu":
        row["ds_us"] = graph_us([lambda: step(xs[0])], device)
        x = xs[0]
        row["dense_us"] = graph_us([lambda: ds.dense_decode(x.q, x.k, x.v, x.seq_lens)], device)
        row["dense_kernel"] = "reference"
        if not right(row):
            raise ValueError(f"the kernels are wrong: error {row['max_rel_err']:.2g}")
        return row | provenance(device)

    row |= {"copy_gb_per_s": bandwidth / 1e9, "limit_us": row["bytes"] / bandwidth * 1e6}
    exact = ds.attend_ref(xs[0].q[:1].float(), xs[0].k[:1], xs[0].v[:1], xs[0].seq_lens[:1])
    kernels = [dense_kernels(x, workspace) for x in xs]
    for name in kernels[0]:
        try:
            dense = kernels[0][name]()[:1, :, 0]
            if (dense - exact).norm() / exact.norm() > 0.02:
                raise RuntimeError("its result is wrong")
            row[f"{name}_us"] = graph_us([kernel[name] for kernel in kernels], device)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # it does not take this shape
            row[f"{name}_us"] = None
            row[f"{name}_error"] = str(error).split("\n")[0][:80]
    timed = {name: row[f"{name}_us"] for name in kernels[0] if row[f"{name}_us"]}
    row["dense_kernel"] = min(timed, key=timed.get)
    row["dense_us"] = timed[row["dense_kernel"]]

    def bracket(x):
        ds.bracket(x.q, x.labels, x.map, x.seq_lens, config, None, workspace)

    row["bracket_us"] = graph_us([partial(bracket, x) for x in xs], device)
    row["ds_us"] = graph_us([partial(step, x) for x in xs], device)
    try:
        row["naive_us"] = graph_us([lambda: naive_chain(xs[0], config)], device, 5)
    except torch.OutOfMemoryError:
        row["naive_us"] = None
    del xs, kernels
    xs, error, attended = inputs(clustered=True)
    row |= {"clustered_us": graph_us([partial(step, x) for x in xs], device),
            "clustered_attended": attended.mean().item(),
            "max_rel_err": max(error, row["max_rel_err"])}
    row["speedup"] = row["dense_us"] / row["ds_us"] if right(row) else None
    return row | provenance(device)


def run_attention(args, device):
    """Yields the rows of the settings asked for, a list of one at a time."""
    config = DSConfig(sparsity=args.sparsity, label_bits=args.label_bits, dense_below=0)
    settings = [(shape, config) for shape in SHAPES]
    if args.label_bits is None:
        more = [labels for labels in MORE_LABELS
                if sum(dims for dims, _ in parse_widths(labels)) <= args.head_dim]
        others = ([(shape, UNIFORM) for shape in SHAPES]
                  + [((16, 16384, 32, 32), labels) for labels in more])
        settings += [(shape, replace(config, label_bits=labels)) for shape, labels in others]
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            print("without TRITON_INTERPRET=1 the kernels cannot run here: the reference stands "
                  "in for them", file=sys.stderr)
        else:
            config = replace(config, impl="triton")
        settings = [((1, 1000, 4, 2), config)]
    if args.shapes:
        HQ, HKV = parse_sizes("heads", args.heads, "32/8", "/")[0]
        if HQ % HKV:
            raise ValueError(f"heads={args.heads}: query heads must be a multiple of KV heads")
        settings = [((*shape, HQ, HKV), config)
                    for shape in parse_sizes("shapes", args.shapes, "4x16384,16x16384")]
    bandwidth = copy_bandwidth(device) if device != "cpu" else None
    for shape, config in tqdm(settings, desc="attention", unit="shape", leave=False):
        yield [attention_row(*shape, args.head_dim, getattr(torch, args.dtype), config, device,
                             bandwidth)]


# ---------------------------------------------------------------- generate

# model, B, S: the length at which steps are timed, or of the prompt that is prefilled
STEPS = [("Llama-2-7B", B, S) for B, S in [
    (1, 512), (1, 1024), (1, 4096), (1, 16384), (1, 65536), (4, 16384), (8, 16384), (14, 16384)]]
STEPS += [("Llama-3.1-8B", B, S) for B, S in [(1, 32768), (8, 32768), (16, 32768), (1, 131072)]]
PREFILLS = [("Llama-2-7B", 1, 16384), ("Llama-2-7B", 1, 131072)]
MODES = ("prefill", "gpt_fast", "dense", "ds", "prefill_int8", "dense_int8", "ds_int8")
WARM_UP = 5  # steps before those that are timed
DATASHEET = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}  # bytes per second of memory
CPU_MODEL = ModelConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96,
                        vocab_size=128, max_positions=512)


def random_model(config, device, dtype, quantize=None):
    """A Transformer with random weights, made where they stay; no end of text or sliding window.
    quantize: as for load_model, a tensor at a time."""
    config = replace(config, eos_ids=(), sliding_window=None)
    with torch.device("meta"):
        model = Transformer(config)
    if quantize:
        model.requires_grad_(False).quantize()
    alike, own = (torch.Generator(device).manual_seed(seed) for seed in (0, 1 + parallel.rank()))
    ours, weights = model.state_dict(), {}
    for name, shape in parameter_shapes(config).items():
        weights[name] = torch.ones(shape, device=device, dtype=dtype)
        if len(shape) > 1:
            generator = own if parallel.split(name, config) else alike
            weights[name].normal_(0, 0.02, generator=generator)
        scale = name.removesuffix("weight") + "scale"
        if scale in ours:
            weights[name], weights[scale] = quantized(weights[name], largest(weights[name]))
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval().requires_grad_(False)


def step_seconds(run, steps, device, warm=lambda: None):
    """Median seconds of run() by the device's clock, of `steps` calls after warm-up and warm()."""
    for _ in range(min(WARM_UP, steps)):
        run()
    warm()
    events = [now(torch.device(device))]
    for _ in range(steps):
        run()
        events.append(now(torch.device(device)))
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) * 1e-3 for a, b in zip(events, events[1:]))


def time_gpt_fast(model, B, S, steps, device, _):
    """(seconds per step, bytes of weights and of the allocated cache, which it reads whole).

    The cache has S tokens, a multiple of 8 as in gpt-fast. Attention is left to Inductor, as its
    own loop asks for, or to the kernel that SDPA chooses, which for several sequences is faster:
    the better of the two counts.
    """
    import torch._functorch.config as functorch_config  # here: they take seconds
    import torch._inductor.config as inductor_config

    size = -(-max(S, steps + 3 * WARM_UP) // 8) * 8
    gpt_fast = GptFast(model, B, size)
    tokens = torch.ones(B, 1, dtype=torch.long, device=device)
    position = torch.empty(1, dtype=torch.long, device=device)

    def run():
        tokens.copy_(gpt_fast.step(tokens, position))
        position.add_(1)

    times = []
    for attention in (sdpa_kernel(SDPBackend.MATH), contextlib.nullcontext()):
        position.fill_(size - steps - 3 * WARM_UP)
        settings = inductor_config.patch(coordinate_descent_tuning=True)  # as gpt-fast has it
        # a cache that takes the two kinds of attention for one
        uncached = functorch_config.patch(enable_autograd_cache=False)
        with torch.no_grad(), settings, uncached, attention:
            gpt_fast.compile()
            times.append(step_seconds(captured(run, device), steps, device))
        torch._dynamo.reset()
    kv_bytes = sum(kept.nbytes for cache in gpt_fast.caches for kept in cache)
    return min(times), model.weight_bytes(B) + kv_bytes


def captured(run, device):
    """run, which it calls a few times, as a CUDA graph; on a CPU run itself."""
    for _ in range(WARM_UP):
        run()
    if device == "cpu":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def random_cache(model, B, size, config, device, cache_type=KVCache):
    """A cache full of random K and V and their labels, the same ones for each type of cache.

    K and V are as large as normed vectors through weights like random_model's. The label maps
    choose channels: of random keys all are alike.
    """
    label_map = config and channel_map(model.config.n_kv_heads, model.config.head_dim, config,
                                       device)
    cache = cache_type(model.config, B, size, device, model.dtype, config,
                       [label_map] * model.config.n_layers)
    generator = torch.Generator(device).manual_seed(parallel.rank())
    for b in range(B):
        for layer in cache.prefill_layers(b, 0, size):
            layer.kv.normal_(generator=generator)
            if layer.ds is not None:
                label_all(layer.kv, layer.labels, label_map, config)
    return cache


def time_steps(model, cache, S, steps, device, temperature=0.0):
    """Of generate.py's step from S live tokens on: (seconds, tokens that came out of all steps
    [any, B], logits of one more [B, vocab])."""
    cache.seq_lens.fill_(S - 1)
    sparse = cache.sparse_at(S)
    step, tokens = DecodeStep(model, cache, temperature), []
    step.start([1] * len(cache.seq_lens), [sparse])

    def run():
        step.run(sparse)
        tokens.append(step.sampled.clone())

    seconds = step_seconds(run, steps, device, warm=cache.statistics)
    cache.sparse_steps += sparse  # one more, outside the graph
    return seconds, torch.stack(tokens), model.decode(step.tokens, step.views[sparse])


def time_decode(model, B, S, steps, device, config):
    """(seconds per step, bytes of weights and cache read), config: DSConfig or None for dense."""
    cache = random_cache(model, B, S + steps + WARM_UP, config, device)
    seconds, *_ = time_steps(model, cache, S, steps, device)
    view = cache if cache.sparse_at(S) else cache.all_tokens()
    return seconds, model.weight_bytes(B) + view.read_bytes(torch.full((B,), S))[0]


def time_prefill(model, B, S, device, config):
    """(seconds of a warm prefill, and from the process's start to its first run's first token)."""
    cache = random_cache(model, B, S + 1, config, device)
    prompts = torch.randint(3, model.config.vocab_size, (B, S)).tolist()
    cold_start_s = generate(DecodeStep(model, cache), prompts, 1).cold_start_s
    begin = now(torch.device(device))
    model.prefill(prompts, cache)
    end = now(torch.device(device))
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3, cold_start_s


@contextlib.contextmanager
def measured(row, device):
    """Starts from a tidy GPU; row then has the peak memory of what ran, or why it does not fit."""
    gc.collect()
    try:
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        if device != "cpu":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except (ValueError, torch.OutOfMemoryError) as error:
        row["error"] = str(error).split("\n")[0]


def check_fit(model, B, size, config, device, cache_type=KVCache):
    """check_memory beside a model that is on the GPU already."""
    if device != "cpu":
        held = sum(p.nbytes for p in model.parameters())
        int8 = any(p.dtype == torch.int8 for p in model.parameters())
        check_memory(parallel.least(torch.cuda.mem_get_info()[0]) + held, model.config, B, size,
                     model.dtype, config, cache_type, "int8" if int8 else None)


def time_mode(mode, model, B, S, steps, device, config):
    """What a row says of one of MODES, whose weights the model has: a dict."""
    check_fit(model, B, S + steps + WARM_UP, config, device)
    if mode.startswith("prefill"):
        prefill_s, cold_start_s = time_prefill(model, B, S, device, config)
        return {"prefill_s": prefill_s, "cold_start_s": cold_start_s}
    time_steps_of = time_gpt_fast if mode == "gpt_fast" else time_decode
    seconds, read = time_steps_of(model, B, S, steps, device, config)
    return {"ms_per_step": seconds * 1e3, "tokens_per_s": B / seconds, "bytes_per_step": read}


def generate_rows(name, model_of, B, S, modes, configs, steps, device, first, compiled=False):
    """One shape's rows of results/generate.jsonl, of one mode each. model_of: called with quantize;
    configs: a ds row for each. first: of this process. compiled: whether the model's blocks are."""
    rows = []
    of_mode = {"prefill": configs[:1], "gpt_fast": [None], "dense": [None], "ds": configs}
    for mode in modes:
        weights = "int8" if mode.endswith("_int8") else None
        for config in of_mode[mode.removesuffix("_int8")]:
            row = {"bench": "generate", "model": name, "B": B, "S": S, "mode": mode,
                   "config": config and asdict(config),
                   "dtype": str(default_dtype(device)).removeprefix("torch."), "steps": steps,
                   "ms_per_step": None}
            row |= {"compiled": compiled} if mode.startswith("prefill") else {}
            with measured(row, device):
                row |= time_mode(mode, model_of(weights), B, S, steps, device, config)
            if rows or not first:
                row.pop("cold_start_s", None)
            rows.append(row | provenance(device))
    gc.collect()
    for row in rows:
        if row["ms_per_step"] and device != "cpu":
            read = row["bytes_per_step"] / row["ms_per_step"] / 1e6
            row["copy_gb_per_s"] = copy_bandwidth(device) / 1e9
            row["bandwidth_share"] = read / row["copy_gb_per_s"]
            if row["gpu"] in DATASHEET:
                row["datasheet_share"] = read * 1e9 / DATASHEET[row["gpu"]]
        for mode in ("dense", "gpt_fast", "dense_int8"):
            other = next((r["ms_per_step"] for r in rows if r["mode"] == mode), None)
            row[f"speedup_vs_{mode}"] = (other / row["ms_per_step"]
                                         if other and row["ms_per_step"] else None)
            row[f"{mode}_ms_per_step"] = other  # of the same run: the file's newest may not be
    return rows


def model_shapes(args, device, settings, modes, example):
    """Yields (model_of, (name, B, S, modes)) of the shapes asked for or `settings`; one on a CPU.
    model_of(quantize): the model; the one before must not be in use."""
    presets = {"tiny": CPU_MODEL} if device == "cpu" else PRESETS
    if device == "cpu":
        for name in ("model", "shapes"):
            if getattr(args, name):
                raise ValueError(f"{name}={getattr(args, name)}: without a GPU one small shape is "
                                 "run; leave it out")
        settings = [("tiny", 2, 300, modes)]
    elif args.model or args.shapes:
        shapes = parse_sizes("shapes", args.shapes or example, "4x16384,16x16384")
        settings = [(args.model or "Llama-2-7B", *shape, modes) for shape in shapes]
    if parallel.size() > 1 and (args.compile or "gpt_fast" in modes):
        raise ValueError("gpt_fast and --compile are for one process: take --modes dense ds")
    if any(presets[name].n_experts for name, *_ in settings) and "gpt_fast" in modes:
        raise ValueError("modes=gpt_fast: does not know expert layers; leave it out with "
                         "--modes dense ds")
    for name, *_ in settings:
        check_layers(DSConfig(dense_layers=max(args.dense_layers)), presets[name])
    held = {}

    def model_of(name, quantize=None):
        if (name, quantize) not in held:
            held.clear()
            gc.collect()
            config = parallel.share(presets[name], parallel.size())
            dtype = default_dtype(device)
            if device != "cpu":
                torch.cuda.empty_cache()
                free = parallel.least(torch.cuda.mem_get_info()[0])
                check_memory(free, config, 1, 1, dtype, quantize=quantize)
            model = held[name, quantize] = random_model(config, device, dtype, quantize)
            if args.compile and device != "cpu":
                model.compile_blocks()
        return held[name, quantize]

    for setting in tqdm(settings, desc="bench", unit="shape", leave=False):
        yield partial(model_of, setting[0]), setting


def run_generate(args, device):
    """Yields the rows of the shapes asked for, one shape's at a time, all its modes in turn."""
    modes = args.modes or [mode for mode in MODES if mode != "gpt_fast" or parallel.size() == 1]
    configs = [DSConfig(dense_layers=n, dense_below=args.dense_below) for n in args.dense_layers]
    if device == "cpu":
        configs = [replace(config, min_tokens=16, dense_below=0) for config in configs]
    timed = [mode for mode in modes if not mode.startswith("prefill")]
    settings = ([(*row, ["prefill"]) for row in PREFILLS if "prefill" in modes]
                + [(*row, timed) for row in STEPS if timed])
    for i, (model_of, (name, B, S, of_shape)) in enumerate(
            model_shapes(args, device, settings, modes, "1x16384")):
        yield generate_rows(name, model_of, B, S, of_shape, configs, args.steps, device,
                            first=i == 0, compiled=args.compile and device != "cpu")


# ---------------------------------------------------------------- offload

OFFLOAD_MODES = ("flexgen", "flexgen_packed", "gpu", "offload", "offload_predicted")
# Model, B, S and modes. The largest first: what is pinned for it serves the others.
OFFLOADS = [("Llama-3.1-8B", 1, 786432, ("gpu", "offload")),
            ("Llama-3.1-8B", 1, 524288, ("flexgen", "gpu", "offload")),
            ("Llama-3.1-8B", 1, 262144, ("flexgen", "flexgen_packed", "gpu", "offload")),
            ("Llama-2-7B", 1, 131072, OFFLOAD_MODES),
            ("Llama-2-7B", 4, 32768, ("flexgen", "gpu", "offload"))]
FLEXGEN_STEPS = 3  # at most: they take seconds, and all the same time


class PinnedPool:
    """Pinned memory as large as any cache wanted so far, lent to one after the other: pinning takes
    longer than most measurements."""

    def __init__(self):
        self.held = []

    def layers(self, config, B, size, dtype, device):
        """K and V of a model's layers for B sequences of `size` tokens, a tensor each. Raises
        ValueError if the host's memory is too small."""
        shape = (B, config.n_kv_heads, size, 2, config.head_dim)
        numel = math.prod(shape)
        if len(self.held) < config.n_layers or self.held[0].numel() < numel:
            self.held = []  # before there is more
            check_host_memory(free_host_bytes(), config, B, size, dtype)
            self.held = host_layers(config.n_layers, (numel,), dtype, torch.device(device))
        return [whole[:numel].view(shape) for whole in self.held[: config.n_layers]]


def host_bandwidth(host, device):
    """Bytes per second of a copy of pinned memory to the GPU."""
    to = torch.empty(host.shape, dtype=host.dtype, device=device)
    return host.nbytes / step_seconds(lambda: to.copy_(host, non_blocking=True), 5, device)


def gather_bandwidth(cache, device):
    """Bytes per second of `fetch` alone, of one token in 16 of a layer's, in order, as selections
    are: what a step's fetches can reach. What the cache has on the GPU is overwritten."""
    host = cache.offloaded()[-1].host
    B, HKV, S = host.kv.shape[:3]
    nth = torch.arange(S // 16, dtype=torch.int32, device=device).expand(B, HKV, -1)
    placed = Placement(B, HKV, S // 16, device)
    placed.rows.copy_(nth)
    placed.missing.copy_(nth)
    placed.n_missing.fill_(S // 16)
    tokens = 16 * nth + torch.randint(16, nth.shape, dtype=torch.int32, device=device)
    seconds = step_seconds(lambda: fetch(cache.kv, placed, host, None, tokens, cache.seq_lens), 5,
                           device)
    return nth.numel() * host.row_bytes(cache.seq_lens) / seconds


@dataclass(kw_only=True)
class RandomText:
    """Random K and V, the same ones for all modes, and what random weights make of them."""

    name: str  # of the model
    model: Transformer
    B: int
    S: int
    device: str
    weights: str = "random"
    data: str | None = None  # where the prompts are from
    predictable: list | None = None  # layers: random weights are not calibrated, so all

    def decode(self, size, steps, config, cache_type):
        """(cache, seconds per step, tokens, logits of one more step)"""
        cache = random_cache(self.model, self.B, size, config, self.device, cache_type)
        # sampled: a greedy text of random weights repeats itself, and its selections with it
        return cache, *time_steps(self.model, cache, self.S, steps, self.device, temperature=1.0)


@dataclass(kw_only=True)
class Prompts(RandomText):
    """Prompts of S tokens at most, continued greedily by a trained model."""

    checkpoint: Path
    prompts: list

    @staticmethod
    def of(args, modes, device):
        """The prompts that a command line asks for, cut from --data, or key-value questions: yields
        those of one of --shapes after the other."""
        model, tokenizer, checkpoint = load(args.checkpoint, device, default_dtype(device))
        check_layers(DSConfig(dense_layers=max(args.dense_layers)), model.config)
        # all rows of a batch go on to the end
        model.config = replace(model.config, eos_ids=())
        load_maps(checkpoint, model.config, DSConfig(), device)  # calibrates, if nobody has
        channels = checkpoint / "channels.safetensors"
        mode = "predicted" if "offload_predicted" in modes else "exact"
        source = partial(Prompts, name=checkpoint.name, model=model, device=device,
                         weights="trained", checkpoint=checkpoint,
                         predictable=predictable_layers(channels, MIN_AGREEMENT, mode))
        data, texts = texts_of(args.data) if args.data else ("key-value retrieval", None)
        windows = {}  # of each length, all that the text has: cutting takes longer than decoding
        shapes = parse_sizes("shapes", args.shapes or "32x4000", "32x4000,1x4000")
        longest = max(S for _, S in shapes) + args.steps + WARM_UP
        if longest > model.config.max_positions:
            raise ValueError(f"shapes={args.shapes}: with the steps these are {longest} tokens, "
                             f"more than the model's {model.config.max_positions} positions")
        if min(S for _, S in shapes) <= len(tokenizer.prefix):
            raise ValueError(f"shapes={args.shapes}: a prompt of so few tokens holds no text")
        for B, S in shapes:
            if texts and S not in windows:
                windows[S] = text_windows(tokenizer, texts, S - len(tokenizer.prefix))
            if texts:
                prompts = spread(windows[S], B)
            else:
                items = generated_items(tokenizer, kv_document, [S], B)
                prompts = [item["prompt"] for item in items]
            yield source(B=len(prompts), S=S, data=data, prompts=prompts)

    def decode(self, size, steps, config, cache_type):
        model = self.model
        maps = config and load_maps(self.checkpoint, model.config, config, self.device)
        cache = cache_type(model.config, self.B, size, self.device, model.dtype, config, maps)
        step = DecodeStep(model, cache)
        result = generate(step, self.prompts, steps)
        sparse = cache.sparse_at(self.S + steps)
        cache.sparse_steps += sparse  # one more, outside the graph
        logits = model.decode(step.tokens, step.views[sparse])
        return cache, statistics.median(result.step_s), torch.tensor(result.token_ids), logits


def offload_runs(source, modes, configs, budgets, ahead, size, packed):
    """(mode, DSConfig or None, options of an OffloadCache) of each row; see offload_rows."""
    c, B, dtype, device = source.model.config, source.B, source.model.dtype, source.device
    runs = [("flexgen", None, {"packed": False})]
    runs += [("flexgen_packed", None, {"packed": True})] if packs(c.head_dim, dtype) else []
    runs += [("gpu", config, {}) for config in configs]
    for config, budget in itertools.product(configs, budgets):
        resident = math.ceil(budget * config.budget(size))
        options = {"resident_tokens": resident, "packed": packed}
        for heads in ahead:
            if heads is None:
                heads = idle_heads(c, B, config.budget(size), dtype, device, packed)
            runs.append(("offload", config, options | {"prefetch_heads": heads}))
        runs.append(("offload_predicted", config, options | {"mode": "predicted"}))
    return [run for run in runs if run[0] in modes]


def offload_rows(source, modes, configs, budgets, ahead, steps, packed=True, pool=None):
    """The rows of results/offload.jsonl of one source of K and V. configs: a row of gpu and of each
    way to offload for each; budgets: resident tokens, a row for each, in multiples of the tokens
    attended; ahead: KV heads prefetched, likewise, None for the default; packed: as OffloadCache's;
    pool: a PinnedPool."""
    model, B, S, device = source.model, source.B, source.S, source.device
    c, size, dtype = model.config, S + steps + WARM_UP, model.dtype
    pool, rows, outs, copy_speed = pool or PinnedPool(), [], {}, None
    on_gpu = device != "cpu"
    if max(heads or 0 for heads in ahead) > c.n_kv_heads:
        raise ValueError(f"prefetch_heads={max(ahead)}: must be at most the model's "
                         f"{c.n_kv_heads} KV heads")
    for mode, config, options in offload_runs(source, modes, configs, budgets, ahead, size, packed):
        streams = mode in ("flexgen", "flexgen_packed")
        row = {"bench": "offload", "model": source.name, "weights": source.weights,
               "data": source.data, "B": B, "S": S, "mode": "flexgen" if streams else mode,
               "config": config and asdict(config), "dtype": str(dtype).removeprefix("torch."),
               "resident_tokens": options.get("resident_tokens"),
               "prefetch_heads": options.get("prefetch_heads"),
               "packed": options.get("packed", False) and packs(c.head_dim, dtype),
               "steps": min(steps, FLEXGEN_STEPS) if streams else steps, "ms_per_step": None}
        with measured(row, device):
            cache_type = KVCache
            if mode != "gpu":
                cache_type = partial(OffloadCache, **options, predictable=source.predictable)
            check_fit(model, B, size, config, device, cache_type)
            if mode != "gpu":
                host = pool.layers(c, B, size, dtype, device)
                copy_speed = copy_speed or (host_bandwidth(host[0], device) if on_gpu else None)
                cache_type = partial(cache_type, host=host)
            cache, seconds, *out = source.decode(size, row["steps"], config, cache_type)
            row |= {"ms_per_step": seconds * 1e3, "tokens_per_s": B / seconds,
                    "gpu_kv_bytes": cache.kv_bytes(), "gpu_label_bytes": cache.label_bytes()}
            row |= cache.statistics()
            if mode == "gpu":
                outs[config.dense_layers] = out
            elif config and config.dense_layers in outs:
                # of the predicted mode, too: how far it is from exact
                tokens, logits = outs[config.dense_layers]
                error = (out[1] - logits).float().norm() / logits.float().norm()
                row |= {"same_tokens": torch.equal(out[0], tokens), "logit_error": error.item()}
            if mode != "gpu":
                row |= {"pcie_gbps": row["pcie_bytes_per_step"] / seconds / 1e9,
                        "pcie_copy_gbps": copy_speed and copy_speed / 1e9}
            if config and mode != "gpu" and on_gpu:
                row["pcie_gather_gbps"] = gather_bandwidth(cache, device) / 1e9
        cache = cache_type = host = None
        rows.append(row | provenance(device))
    add_speedups(rows)
    return rows


def add_speedups(rows):
    """To the rows of one source: over streaming, whole and packed, if a row is right."""
    for row in rows:
        wrong = row["mode"] == "offload" and (row.get("same_tokens") is False
                                              or row.get("logit_error", 0) > 1e-3)
        for name, packed in (("flexgen", False), ("flexgen_packed", True)):
            other = next((r["ms_per_step"] for r in rows
                          if r["mode"] == "flexgen" and r["packed"] == packed), None)
            known = other and row["ms_per_step"] and not wrong
            row[f"speedup_vs_{name}"] = other / row["ms_per_step"] if known else None


def run_offload(args, device):
    """Yields the rows of the shapes asked for, one shape's at a time."""
    modes, pool = args.modes or OFFLOAD_MODES, PinnedPool()
    configs = [DSConfig(dense_layers=n, dense_below=0) for n in args.dense_layers]
    if device == "cpu" and not args.checkpoint:
        configs = [replace(config, min_tokens=64) for config in configs]
    options = args.budgets, args.prefetch_heads or [None], args.steps, not args.no_pack, pool
    if args.checkpoint:
        for source in Prompts.of(args, modes, device):
            yield offload_rows(source, modes, configs, *options)
        return
    settings = [(*row[:3], args.modes or row[3]) for row in OFFLOADS]
    shapes = model_shapes(args, device, settings, modes, "1x131072")
    for model_of, (name, B, S, of_shape) in shapes:
        source = RandomText(name=name, model=model_of(), B=B, S=S, device=device)
        yield offload_rows(source, of_shape, configs, *options)


# ---------------------------------------------------------------- command line

BENCHES = {"attention": run_attention, "generate": run_generate, "offload": run_offload}


# Of which benchmarks an option is that not all of them have
OPTIONS = {"attention": ("heads", "head_dim", "sparsity", "label_bits", "dtype"),
           "generate and offload": ("model", "modes", "steps", "dense_layers", "compile"),
           "generate": ("dense_below",),
           "offload": ("budgets", "prefetch_heads", "no_pack", "checkpoint", "data")}


def parse_arguments():
    """The options of the command line; ValueError, in one line, for values that cannot be."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=(*BENCHES, "table"),
                        help="default: a short tour of all three, of which nothing is saved")
    parser.add_argument("of", nargs="?", choices=BENCHES, help="with table: whose")
    parser.add_argument("--shapes",
                        help="BxS, comma-separated, S in tokens (default: several)")
    parser.add_argument("--no_save", action="store_true",
                        help="print the rows, but leave the results file as it is")
    parser.add_argument("--device", help="cuda or cpu (default: cuda; on a CPU one small shape is "
                                         "checked, and nothing saved)")
    attention = parser.add_argument_group("attention")
    attention.add_argument("--heads", default="32/32",
                           help="query/KV heads for --shapes (default %(default)s)")
    attention.add_argument("--head_dim", type=Number(int, 8, 256), default=128,
                           help="channels per head (default %(default)s)")
    attention.add_argument("--sparsity", type=Number(float, 1, 1e6), default=DSConfig.sparsity,
                           help="1/R of tokens and label bytes (default %(default)g)")
    attention.add_argument("--label_bits", type=label_bits,
                           help="dims x bits as 8x4,48x2, or bits of as many dims as fit")
    attention.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16",
                           help="of q, K and V (default %(default)s)")
    steps = parser.add_argument_group("generate and offload")
    steps.add_argument("--model", choices=PRESETS,
                       help="whose shape, without a sliding window (default: several)")
    steps.add_argument("--modes", nargs="+", choices=(*MODES, *OFFLOAD_MODES),
                       help="of generate: prefill; decode steps as gpt-fast's, dense, or Double "
                            "Sparsity as generate.py has it; _int8 with the weights rounded "
                            "(gpt_fast compiles for some minutes per shape, and runs as one "
                            "process); of offload: all K and V streamed as FlexGen does, likewise "
                            "but packed, Double Sparsity with K and V on the GPU, with them in "
                            "host memory, and then attending to what was predicted of each layer "
                            "(default: all)")
    steps.add_argument("--steps", type=Number(int, 1), default=50,
                       help="steps timed, the median counts; of flexgen at most 3 (default "
                            "%(default)s)")
    steps.add_argument("--dense_layers", type=Number(int, 0), nargs="+",
                       default=[DSConfig.dense_layers, 0],
                       help="of ds, gpu and offload, a row for each (default %(default)s)")
    steps.add_argument("--dense_below", type=Number(int, 0), default=DSConfig.dense_below,
                       help="of generate: tokens below which ds attends to everything (default "
                            "%(default)s)")
    steps.add_argument("--budgets", type=Number(float, 1, 1e6), nargs="+", default=[1, 2],
                       metavar="X",
                       help="of offload: tokens resident on the GPU, in multiples of those "
                            "attended, a row for each (default %(default)s)")
    steps.add_argument("--prefetch_heads", type=Number(int, 0), nargs="+", metavar="HEADS",
                       help="of offload: KV heads whose tokens are fetched ahead, a row for each "
                            "(default: generate.py's)")
    steps.add_argument("--no_pack", action="store_true",
                       help="of offload: K and V are not packed in host memory")
    steps.add_argument("--checkpoint",
                       help="of offload: its weights continue B prompts of S tokens")
    steps.add_argument("--data", type=InputFile(),
                       help="with --checkpoint: text to cut prompts from (default: generated "
                            "key-value retrieval)")
    steps.add_argument("--compile", action="store_true",
                       help="blocks go through torch.compile, which prefill shows")
    args = parser.parse_args()
    if args.what not in BENCHES:
        for action in parser._actions:
            given = getattr(args, action.dest, action.default)
            if action.dest not in ("what", "of", "device", "no_save") and given != action.default:
                raise ValueError(f"{action.dest}={given}: of which benchmark? Name it alone: "
                                 f"{', '.join(BENCHES)}")
    if (args.what == "table") != bool(args.of):
        raise ValueError(f"table, and nothing else, takes one of {', '.join(BENCHES)}")
    if args.steps < 2 and args.checkpoint:
        raise ValueError(f"steps={args.steps}: must be at least 2 with --checkpoint, where the "
                         "first includes the prefill")
    if args.data and not args.checkpoint:
        raise ValueError(f"data={args.data}: random weights have no use for text; give a "
                         "--checkpoint")
    for name, options in OPTIONS.items():
        for option in options if args.what in BENCHES and args.what not in name.split() else ():
            if getattr(args, option) != parser.get_default(option):
                raise ValueError(f"{option}={getattr(args, option)}: is an option of {name}")
    known = {"generate": MODES, "offload": OFFLOAD_MODES}.get(args.what, ())
    for mode in args.modes or ():
        if mode not in known:
            raise ValueError(f"modes={mode}: is not a mode of {args.what}")
    return args


def measure(args):
    """The rows of one benchmark, saved shape by shape if they are of a GPU."""
    if args.device is None and not torch.cuda.is_available():
        raise ValueError("bench.py needs a CUDA GPU for its times; with --device cpu one small "
                         "shape is checked")
    device, path, rows = pick_device(args.device), RESULTS / f"{args.what}.jsonl", []
    saved = device != "cpu" and not args.no_save
    if saved and path.exists():
        check_output(path)
        newest_rows(args.what)  # it is ours
    for of_shape in BENCHES[args.what](args, device):
        rows += of_shape
        if device != "cpu":
            torch.cuda.empty_cache()
        if saved:
            append_json_lines(path, of_shape)
    return rows


# Shapes and modes of the tour on a GPU
TOUR = {"attention": dict(shapes="1x16384,4x65536"),
        "generate": dict(shapes="1x16384,4x16384", modes=["dense", "ds"], dense_layers=[2]),
        "offload": dict(shapes="1x32768", modes=["flexgen", "offload"], dense_layers=[0],
                        budgets=[1])}


def tour(args):
    """Prints a table of each benchmark, at few shapes."""
    device = pick_device(args.device)
    if device == "cpu":
        print("Without a GPU: small shapes, to see that all is right. Their times say nothing.",
              file=sys.stderr)
    for name, run in BENCHES.items():
        options = TOUR[name]
        if device == "cpu":
            options = {"modes": [mode for mode in MODES if mode != "gpt_fast"],
                       "steps": 5} if name == "generate" else {"steps": 5}
        args = SimpleNamespace(**vars(args) | {"shapes": None, "modes": None} | options)
        rows = [row for of_shape in run(args, device) for row in of_shape]
        print(f"{name}\n\n{TABLES[name](rows)}\n", flush=True)


def main():
    """The command line: measures one benchmark, prints its table, or gives a tour of all."""
    args = parse_arguments()
    if parallel.size() > 1 and args.what not in ("generate", "table"):
        raise ValueError("of bench.py generate alone runs as several processes: name it, or leave "
                         "out torchrun")
    if args.what is None:
        return tour(args)
    rows = newest_rows(args.of) if args.what == "table" else measure(args)
    print(TABLES[args.of or args.what](rows))


if __name__ == "__main__":
    run_command(main, several=True)
