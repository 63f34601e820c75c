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
import argparse
import contextlib
import gc
import itertools
import math
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

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
from decode import DecodeStep, generate
from ds_attention import DSConfig, Workspace, write_labels
from generate import load, load_maps
from gpt_fast import time_gpt_fast
from host_memory import PinnedPool, fetch, packs
from items import spread, text_windows, texts_of
from labels import label_map_of
from model import KVCache, Transformer, check_memory, random_model
from offload import MIN_AGREEMENT, OffloadCache, Placement, idle_heads, predictable_layers
from pages import RESULTS, TABLES, mode_name, newest_rows
from timing import WARM_UP, copy_bandwidth, host_bandwidth, layer_us, median_s

# ---------------------------------------------------------------- random K and V

CPU_MODEL = ModelConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96,
                        vocab_size=128, max_positions=512)
MODELS = PRESETS | {"tiny": CPU_MODEL}


def label_all(layer):
    """Writes the labels of all of a layer's tokens."""
    B, _, S, _, _ = layer.kv.shape
    positions = torch.arange(S, dtype=torch.int32, device=layer.kv.device).expand(B, -1)
    write_labels(layer.kv[..., 0, :], positions, layer.labels, layer.label_map, layer.ds)


def random_cache(c, B, size, config, device, dtype, cache_type=KVCache):
    """A cache full of random K and V and their labels, the same ones for each type of cache. c: the
    ModelConfig.

    K and V are as large as normed vectors through weights like random_model's. The label maps
    choose the first channels: of random keys all are alike.
    """
    label_map = None
    if config is not None:
        channels = torch.arange(c.head_dim).expand(c.n_kv_heads, -1)
        zeros = torch.zeros(channels.shape)
        label_map = label_map_of(channels, zeros, zeros + 1, config.widths(c.head_dim))
    cache = cache_type(c, B, size, device, dtype, config, [label_map] * c.n_layers)
    generator = torch.Generator(device).manual_seed(parallel.rank())
    for b in range(B):
        for layer in cache.prefill_layers(b, 0, size):
            layer.kv.normal_(generator=generator)
            if layer.ds is not None:
                label_all(layer)
    return cache


# ---------------------------------------------------------------- attention

# B, S, HQ, HKV
SHAPES = [(1, 16384, 32, 32), (1, 131072, 32, 32), (4, 16384, 32, 32), (4, 65536, 32, 32),
          (16, 16384, 32, 32), (32, 16384, 32, 32), (16, 65536, 32, 8), (4, 131072, 32, 8),
          (1, 131072, 32, 8)]
UNIFORM = 4  # the paper's bits per label dim; all shapes are timed with them, too, in as many bytes
MORE_LABELS = [((48, 2),), ((20, 2), (24, 1)), ((32, 2),), ((8, 4),), ((32, 1),)]  # at (16, 16384)
L2_BYTES = 128e6  # twice an H200's: inputs that a step touches are cycled through at least as much
CLUSTERED = 0.08  # share of the positions, in bands, that hold most of what clustered inputs select


def decode_calls(count, B, S, HQ, HKV, D, dtype, config, device, clustered=False):
    """Random inputs of `count` decode calls: [(q [B, HQ, D], LayerCache of S tokens), ...].

    clustered: keys in bands of random length and place, CLUSTERED of each head's, score 3 standard
    deviations above the others, as the passages do that real text attends to.
    """
    layers = replace(CPU_MODEL, n_layers=count, n_heads=HQ, n_kv_heads=HKV, head_dim=D)
    cache = random_cache(layers, B, S, replace(config, dense_layers=0), device, dtype)
    generator = torch.Generator(device).manual_seed(1)
    queries = torch.randn(count, B, HQ, D, generator=generator, device=device, dtype=dtype)
    for q, layer in zip(queries, cache.layers if clustered else ()):
        bands = (B, HKV, math.ceil(CLUSTERED * S / 256))  # of 256 tokens on average
        begin, length = (torch.randint(*limits, bands, generator=generator, device=device)
                         for limits in ((0, S), (16, 497)))
        steps = torch.zeros(B, HKV, S + 1, device=device)
        steps.scatter_add_(2, begin, torch.ones(bands, device=device))
        steps.scatter_add_(2, (begin + length).clamp(max=S), -torch.ones(bands, device=device))
        inside = (steps.cumsum(2)[..., :S] > 0.5).to(dtype)
        q = q.float().view(B, HKV, -1, D)
        toward = (3 * math.sqrt(D) * q / q.square().sum(-1, keepdim=True)).sum(2).to(dtype)
        for k, mask, row in zip(layer.kv[..., 0, :], inside, toward):  # one at a time: less memory
            k += mask[..., None] * row[:, None]
        label_all(layer)
    return list(zip(queries, cache.layers))


def dense_kernels(q, layer, seq_lens, workspace):
    """SDPA's backends and our own, over one cache: {name: call} of [B, HQ, D] -> [B, HQ, 1, D]."""
    k, v = layer.kv.unbind(3)
    gqa = q.shape[1] != k.shape[1]

    def sdpa(backend=None):
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=gqa)

    def ours():
        return ds.ds_decode(q, k, v, None, None, seq_lens, None, workspace=workspace)[:, :, None]

    return {"sdpa": sdpa, "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION), "ours, all tokens": ours}


def relative_error(out, q, layer, seq_lens):
    """Of `out` [B, HQ, D], over fp32 attention to what the reference selects."""
    errors, norms = 0.0, 0.0
    for b in range(len(q)):  # one at a time: less memory
        row, one = slice(b, b + 1), layer.row(b)
        scores = ds.score_ref(q[row], one.labels, one.label_map, seq_lens[row], one.ds)
        chosen = ds.select_ref(scores, seq_lens[row], one.ds)
        exact = ds.attend_ref(q[row].float(), *one.kv.unbind(3), seq_lens[row], chosen).double()
        errors += (out[row].double() - exact).square().sum().item()
        norms += exact.square().sum().item()
    return math.sqrt(errors / norms)


def attention_row(B, S, HQ, HKV, D, dtype, config, device):
    """Checks, then times one shape: the row of results/attention.jsonl. Raises ValueError if the
    kernels are wrong."""
    row = {"bench": "attention", "B": B, "S": S, "HQ": HQ, "HKV": HKV, "D": D,
           "dtype": str(dtype).removeprefix("torch."), "n_tokens": config.budget(S),
           "label_channels": ds.dims_in(config.widths(D)), "label_bits": bits_of(config.widths(D)),
           "max_rel_err": 0.0}
    workspace = Workspace(B, HQ, HKV, D, S, torch.device(device), config)
    seq_lens = torch.full((B,), S, dtype=torch.int32, device=device)

    def step(q, layer):
        return ds.ds_decode(q, *layer.kv.unbind(3), layer.labels, layer.label_map, seq_lens, config,
                            workspace=workspace)

    def bracket(q, layer):
        ds.bracket(q, layer.labels, layer.label_map, seq_lens, config, None, workspace)

    def read_bytes(n):
        return B * HKV * (S * ds.words_in(config.widths(D)) * 4 + n * 2 * D * dtype.itemsize)

    def checked_calls(clustered):
        """So many that no inputs stay in the L2 cache; how many tokens each call attends to."""
        count = math.ceil(L2_BYTES / read_bytes(row["n_tokens"])) if device != "cpu" else 1
        calls = decode_calls(count, B, S, HQ, HKV, D, dtype, config, device, clustered)
        workspace.attended.zero_()
        for q, layer in calls:
            error = relative_error(step(q, layer), q, layer, seq_lens)
            if not error <= 0.01:  # nor is it a number
                raise ValueError(f"the kernels are wrong: error {error:.2g} of {B} x {S} tokens, "
                                 f"{HQ}/{HKV} heads, labels of {row['label_bits']} bit")
            row["max_rel_err"] = max(row["max_rel_err"], error)
        return calls, workspace.attended.double().mean().item() / count

    calls, attended = checked_calls(clustered=False)
    n, kernels = row["n_tokens"], [dense_kernels(*call, seq_lens, workspace) for call in calls]
    if config.use_triton(calls[0][0]):
        n, again = attended, math.ceil(1024 / (len(calls) * B * HKV)) if device != "cpu" else 1
        workspace.attended.zero_()
        for q, layer in calls * again:  # of one KV head their number has a deviation of 9%
            step(torch.randn_like(q), layer)
        row["attended"] = workspace.attended.double().mean().item() / len(calls * again)
        row["bracket_us"] = layer_us([partial(bracket, *call) for call in calls], device)
    row |= {"bytes": read_bytes(n), "ds_us": layer_us([partial(step, *x) for x in calls], device)}
    q, layer = calls[0]
    exact = ds.attend_ref(q[:1].float(), *layer.row(0).kv.unbind(3), seq_lens[:1])
    timed = {}
    for name in kernels[0]:
        try:
            dense = kernels[0][name]()[:1, :, 0]
            if not (dense - exact).norm() <= 0.02 * exact.norm():
                raise RuntimeError("its result is wrong")
            timed[name] = layer_us([kernel[name] for kernel in kernels], device)
        except RuntimeError as error:  # it does not take this shape, or is out of memory
            row[f"{name}_error"] = str(error).split("\n")[0][:80]
        row[f"{name}_us"] = timed.get(name)
    row["dense_kernel"] = min(timed, key=timed.get)
    row["dense_us"] = timed[row["dense_kernel"]]
    del calls, kernels, q, layer
    calls, _ = checked_calls(clustered=True)
    row["clustered_us"] = layer_us([partial(step, *call) for call in calls], device)
    if device != "cpu":
        row |= {"copy_gb_per_s": copy_bandwidth(device) / 1e9,
                "limit_us": row["bytes"] / copy_bandwidth(device) * 1e6,
                "speedup": row["dense_us"] / row["ds_us"]}
    return row | provenance(device)


def run_attention(args, device):
    """Yields the rows of the settings asked for, a list of one at a time."""
    if device != "cpu":
        copy_bandwidth(device)  # while there is room
    config = DSConfig(sparsity=args.sparsity, label_bits=args.label_bits, dense_below=0)
    settings = [(shape, config) for shape in SHAPES]
    if (args.sparsity, args.head_dim, args.label_bits) == (DSConfig.sparsity, 128, None):
        others = [(shape, UNIFORM) for shape in SHAPES]
        others += [((16, 16384, 32, 32), labels) for labels in MORE_LABELS]
        settings += [(shape, replace(config, label_bits=labels)) for shape, labels in others]
    if device == "cpu":
        if ds.INTERPRETED.value:
            config = replace(config, impl="triton")
        else:
            print("the reference stands in for kernels: to check these set TRITON_INTERPRET=1",
                  file=sys.stderr)
        settings = [((1, 1000, 4, 2), config)]
    if args.shapes:
        HQ, HKV = parse_sizes("heads", args.heads, "32/8", "/")[0]
        if HQ % HKV:
            raise ValueError(f"heads={args.heads}: query heads must be a multiple of KV heads")
        settings = [((*shape, HQ, HKV), config)
                    for shape in parse_sizes("shapes", args.shapes, "4x16384,16x16384")]
    for shape, config in tqdm(settings, desc="attention", unit="shape", leave=False):
        yield [attention_row(*shape, args.head_dim, torch.bfloat16, config, device)]


# ---------------------------------------------------------------- generate

# model, B, S: the length at which steps are timed, or of the prompt that is prefilled
STEPS = [("Llama-2-7B", B, S) for B, S in [
    (1, 512), (1, 1024), (1, 4096), (1, 16384), (1, 65536), (4, 16384), (8, 16384), (14, 16384)]]
STEPS += [("Llama-3.1-8B", B, S) for B, S in [(1, 32768), (8, 32768), (16, 32768), (1, 131072)]]
PREFILLS = [("Llama-2-7B", 1, 16384), ("Llama-2-7B", 1, 131072)]
MODES = ("prefill", "gpt_fast", "dense", "ds", "prefill_int8", "dense_int8", "ds_int8")
DATASHEET = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}  # bytes per second of memory


def time_steps(model, cache, S, steps, device, temperature=0.0):
    """(DecodeStep, seconds of one from S live tokens on, tokens that came out of all [any, B])."""
    cache.seq_lens.fill_(S - 1)
    sparse = cache.sparse_at(S)
    step, tokens = DecodeStep(model, cache, temperature), []
    step.start([1] * len(cache.seq_lens), [sparse])

    def run():
        step.run(sparse)
        tokens.append(step.sampled.clone())

    return step, median_s(run, steps, device, warm=cache.statistics), torch.stack(tokens)


def time_decode(model, B, S, steps, device, config):
    """(seconds per step, bytes of weights and cache read), config: DSConfig or None for dense."""
    cache = random_cache(model.config, B, S + steps + WARM_UP, config, device, model.dtype)
    _, seconds, _ = time_steps(model, cache, S, steps, device)
    view = cache if cache.sparse_at(S) else cache.all_tokens()
    return seconds, model.weight_bytes(B) + view.read_bytes(torch.full((B,), S))[0]


def time_prefill(model, B, S, device, config):
    """Seconds of a warm prefill, and from the process's start to its first token: a dict."""
    cache = random_cache(model.config, B, S + 1, config, device, model.dtype)
    prompts = torch.randint(3, model.config.vocab_size, (B, S)).tolist()
    cold_start_s = generate(DecodeStep(model, cache), prompts, 1).cold_start_s
    prefill_s = median_s(partial(model.prefill, prompts, cache), 1, device)
    return {"prefill_s": prefill_s, "cold_start_s": cold_start_s}


def tidy(device):
    """Gives back what nothing holds any more; peak memory counts from here on."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def measured(row, device):
    """Starts from a tidy GPU; row then has the peak memory of what ran, or why it does not fit."""
    tidy(device)
    try:
        yield
        if device != "cpu":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except (ValueError, torch.OutOfMemoryError) as error:
        # what is refused is refused in all processes; for one that fails alone the others would
        # wait without end
        if parallel.size() > 1 and isinstance(error, torch.OutOfMemoryError):
            raise
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
        return time_prefill(model, B, S, device, config)
    seconds, read = (time_gpt_fast(model, B, S, steps) if mode == "gpt_fast"
                     else time_decode(model, B, S, steps, device, config))
    return {"ms_per_step": seconds * 1e3, "tokens_per_s": B / seconds, "bytes_per_step": read}


def add_speedups(rows, baselines):
    """To rows of one shape: over the first one of each mode in `baselines`, {name: mode_name}."""
    for name, mode in baselines.items():
        other = next((row["ms_per_step"] for row in rows if mode_name(row) == mode), None)
        for row in rows:
            ms = row["ms_per_step"]
            row[f"speedup_vs_{name}"] = other / ms if other and ms else None


def generate_rows(name, model_of, B, S, modes, configs, steps, device):
    """One shape's rows of results/generate.jsonl, of one mode each. model_of: called with a model's
    name and quantize; configs: a ds row for each."""
    rows, of_mode = [], {"prefill": configs[:1], "gpt_fast": [None], "dense": [None], "ds": configs}
    settings = [(mode, config) for mode in modes for config in of_mode[mode.removesuffix("_int8")]]
    for mode, config in settings:
        row = {"bench": "generate", "model": name, "B": B, "S": S, "mode": mode,
               "config": config and asdict(config),
               "dtype": str(default_dtype(device)).removeprefix("torch."), "steps": steps,
               "ms_per_step": None}
        with measured(row, device):
            quantize = "int8" if mode.endswith("_int8") else None
            row |= time_mode(mode, model_of(name, quantize), B, S, steps, device, config)
        rows.append(row | provenance(device))
    gc.collect()  # the last step's cache, which may fill the GPU
    for row in rows:
        if row["ms_per_step"] and device != "cpu":
            read = row["bytes_per_step"] / row["ms_per_step"] / 1e6
            row["copy_gb_per_s"] = copy_bandwidth(device) / 1e9
            row["bandwidth_share"] = read / row["copy_gb_per_s"]
            if row["gpu"] in DATASHEET:
                row["datasheet_share"] = read * 1e9 / DATASHEET[row["gpu"]]
    add_speedups(rows, {mode: mode for mode in ("dense", "gpt_fast", "dense_int8")})
    return rows


def kept_model(kept, device, name, quantize=None, compiled=False):
    """One of MODELS with random weights. `kept`, a dict, holds it until another is asked for, when
    it must not be in use. compiled: its blocks are."""
    if (name, quantize) not in kept:
        kept.clear()
        tidy(device)
        config, dtype = parallel.share(MODELS[name], parallel.size()), default_dtype(device)
        kept[name, quantize] = random_model(config, device, dtype, quantize)
        if compiled:
            kept[name, quantize].compile_blocks()
        tidy(device)
    return kept[name, quantize]


def shapes_of(args, device, modes, settings, example):
    """(model, B, S, modes) of what is asked for, else of `settings`; on a CPU of one small shape.
    example: a shape for a --model alone."""
    if device == "cpu":
        settings = [("tiny", 2, 300, modes)]
        if args.model:
            raise ValueError(f"model={args.model}: needs a GPU; on a CPU leave it out")
    if args.model or args.shapes:
        shapes = parse_sizes("shapes", args.shapes or example, "4x16384,16x16384")
        name = args.model or ("tiny" if device == "cpu" else "Llama-2-7B")
        settings = [(name, *shape, modes) for shape in shapes]
    for name, *_ in settings:
        check_layers(DSConfig(dense_layers=max(args.dense_layers)), MODELS[name])
    return tqdm(settings, desc=args.what, unit="shape", leave=False)


def run_generate(args, device):
    """Yields the rows of the shapes asked for, one shape's at a time, all its modes in turn."""
    modes = args.modes or [mode for mode in MODES if mode != "gpt_fast" or parallel.size() == 1]
    if parallel.size() > 1 and (args.compile or "gpt_fast" in modes):
        raise ValueError("gpt_fast and --compile are for one process: take --modes dense ds")
    configs = [DSConfig(dense_layers=n, dense_below=args.dense_below) for n in args.dense_layers]
    if device == "cpu":
        configs = [replace(config, min_tokens=16, dense_below=0) for config in configs]
    timed = [mode for mode in modes if not mode.startswith("prefill")]
    settings = ([(*row, ["prefill"]) for row in PREFILLS if "prefill" in modes]
                + [(*row, timed) for row in STEPS if timed])
    compiled = args.compile and device != "cpu"
    model_of, rows = partial(kept_model, {}, device, compiled=compiled), []
    for name, B, S, of_shape in shapes_of(args, device, modes, settings, "1x16384"):
        is_first = not rows
        rows = generate_rows(name, model_of, B, S, of_shape, configs, args.steps, device)
        for i, row in enumerate(rows):
            if row["mode"].startswith("prefill"):
                row["compiled"] = compiled
            if i or not is_first:  # the process had begun long before
                row.pop("cold_start_s", None)
        yield rows


# ---------------------------------------------------------------- offload

OFFLOAD_MODES = ("flexgen", "flexgen_packed", "gpu", "offload", "offload_predicted")
# Model, B, S and modes. The largest first: what is pinned for it serves the others.
OFFLOADS = [("Llama-3.1-8B", 1, 786432, ("gpu", "offload")),
            ("Llama-3.1-8B", 1, 524288, ("flexgen", "gpu", "offload")),
            ("Llama-3.1-8B", 1, 262144, ("flexgen", "flexgen_packed", "gpu", "offload")),
            ("Llama-2-7B", 1, 131072, OFFLOAD_MODES),
            ("Llama-2-7B", 4, 32768, ("flexgen", "gpu", "offload"))]
FLEXGEN_STEPS = 3  # at most: they take seconds, and all the same time


def gather_bandwidth(cache, device):
    """Bytes per second of `fetch` alone, of one token in 16 of a layer's, in order, as selections
    are: what a step's fetches can reach. What the cache has on the GPU is overwritten."""
    host, lens = cache.offloaded()[-1].host, cache.seq_lens
    B, HKV, S = host.kv.shape[:3]
    nth = torch.arange(S // 16, dtype=torch.int32, device=device).expand(B, HKV, -1)
    placed = Placement(B, HKV, S // 16, device)
    placed.rows[:] = placed.missing[:] = nth
    placed.n_missing.fill_(S // 16)
    tokens = 16 * nth + torch.randint(16, nth.shape, dtype=torch.int32, device=device)
    seconds = median_s(lambda: fetch(cache.kv, placed, host, None, tokens, lens), 5, device)
    return nth.numel() * host.row_bytes(lens) / seconds


@dataclass(kw_only=True)
class Source:
    """What is decoded: prompts, continued greedily by a trained model, or from random K and V, the
    same ones for all modes, what random weights make of them."""

    name: str  # of the model
    model: Transformer
    B: int
    S: int  # tokens of a prompt
    prompts: list | None = None
    data: str | None = None  # where they are from
    maps: list | None = None  # a LabelMap of each layer
    predictable: list | None = None  # layers: random weights are not calibrated, so all

    def decode(self, size, steps, config, cache_type):
        """(cache, seconds per step, tokens, logits of one more step)"""
        model, device = self.model, self.model.device.type
        shape = self.B, size
        if self.prompts is None:
            cache = random_cache(model.config, *shape, config, device, model.dtype, cache_type)
            # sampled: a greedy text of random weights repeats itself, and its selections with it
            step, seconds, tokens = time_steps(model, cache, self.S, steps, device, temperature=1.0)
        else:
            cache = cache_type(model.config, *shape, device, model.dtype, config, self.maps)
            step = DecodeStep(model, cache)
            result = generate(step, self.prompts, steps)
            seconds, tokens = statistics.median(result.step_s), torch.tensor(result.token_ids)
        sparse = cache.sparse_at(self.S + steps)
        cache.sparse_steps += sparse  # one more, outside the graph
        return cache, seconds, tokens, model.decode(step.tokens, step.views[sparse])


def text_sources(args, modes, device):
    """Yields a Source for each of --shapes, of prompts cut from --data."""
    shapes = parse_sizes("shapes", args.shapes or "32x4000", "32x4000,1x4000")
    model, tokenizer, checkpoint = load(args.checkpoint, device, default_dtype(device))
    check_layers(DSConfig(dense_layers=max(args.dense_layers)), model.config)
    shortest, longest = min(S for _, S in shapes), max(S for _, S in shapes) + args.steps + WARM_UP
    if shortest <= len(tokenizer.prefix) or longest > model.config.max_positions:
        raise ValueError(f"shapes={args.shapes}: prompts must hold text, and with the steps fit "
                         f"the model's {model.config.max_positions} positions, not take {longest}")
    model.config = replace(model.config, eos_ids=())  # all rows of a batch go on to the end
    mode = "predicted" if "offload_predicted" in modes else "exact"
    data, texts = texts_of(args.data)
    windows = {S: text_windows(tokenizer, texts, S - len(tokenizer.prefix))
               for S in {S for _, S in shapes}}
    predictable = predictable_layers(checkpoint / "channels.safetensors", MIN_AGREEMENT, mode)
    for B, S in shapes:
        prompts = spread(windows[S], B)
        maps = load_maps(checkpoint, model.config, DSConfig(), device,
                         positions=S + args.steps + WARM_UP)
        yield Source(name=checkpoint.name, model=model, B=len(prompts), S=S, prompts=prompts,
                     data=data, maps=maps, predictable=predictable)


def offload_runs(model, B, size, modes, configs, args):
    """(mode, DSConfig or None, options of an OffloadCache) of each row; see offload_rows."""
    packed = packs(model.config.head_dim, model.dtype)
    runs = [("flexgen", None, {"packed": False})]
    runs += [("flexgen_packed", None, {"packed": True})] if packed else []
    runs += [("gpu", config, {}) for config in configs]
    for config, budget in itertools.product(configs, args.budgets):
        tokens = config.budget(size)
        options = {"resident_tokens": math.ceil(budget * tokens), "packed": packed}
        for heads in args.prefetch_heads or [
                idle_heads(model.config, B, tokens, model.dtype, model.device)]:
            runs.append(("offload", config, options | {"prefetch_heads": heads}))
        runs.append(("offload_predicted", config, options | {"mode": "predicted"}))
    return [run for run in runs if run[0] in modes]


def offload_rows(source, modes, configs, args, pool):
    """The rows of results/offload.jsonl of one source of K and V. configs: a row of gpu and of each
    way to offload for each; pool: a PinnedPool. Of args: budgets, resident tokens in multiples of
    those attended, and prefetch_heads, a row for each; steps."""
    model, B, S, device = source.model, source.B, source.S, source.model.device.type
    c, size, dtype = model.config, S + args.steps + WARM_UP, model.dtype
    rows, outs, copy_speed = [], {}, None
    for mode, config, options in offload_runs(model, B, size, modes, configs, args):
        streams = mode.startswith("flexgen")
        row = {"bench": "offload", "model": source.name, "data": source.data,
               "weights": "trained" if source.prompts else "random", "B": B, "S": S,
               "mode": "flexgen" if streams else mode, "config": config and asdict(config),
               "dtype": str(dtype).removeprefix("torch."),
               "resident_tokens": options.get("resident_tokens"),
               "prefetch_heads": options.get("prefetch_heads"),
               "packed": options.get("packed", False),
               "steps": min(args.steps, FLEXGEN_STEPS) if streams else args.steps,
               "ms_per_step": None}
        with measured(row, device):
            cache_type = KVCache
            if mode != "gpu":
                cache_type = partial(OffloadCache, **options, predictable=source.predictable)
            check_fit(model, B, size, config, device, cache_type)
            if mode != "gpu":
                host = pool.layers(c, B, size, dtype, device)
                cache_type = partial(cache_type, host=host)
            cache, seconds, tokens, logits = source.decode(size, row["steps"], config, cache_type)
            row |= {"gpu_kv_bytes": cache.kv_bytes(), "gpu_label_bytes": cache.label_bytes(),
                    **cache.statistics()}
            if mode == "gpu":
                outs[config.dense_layers] = tokens, logits
            elif config and config.dense_layers in outs:
                wanted_tokens, wanted = outs[config.dense_layers]
                error = ((logits - wanted).float().norm() / wanted.float().norm()).item()
                same = torch.equal(tokens, wanted_tokens)
                row |= {"same_tokens": same, "logit_error": error}
                if mode == "offload" and not (same and error < 1e-3):  # the other is not exact
                    raise ValueError("wrong: not what K and V on the GPU give")
            if mode != "gpu":
                row["pcie_gbps"] = row["pcie_bytes_per_step"] / seconds / 1e9
            if mode != "gpu" and device != "cpu":
                copy_speed = copy_speed or host_bandwidth(host[0], device)
                row["pcie_copy_gbps"] = copy_speed / 1e9
                if config:
                    row["pcie_gather_gbps"] = gather_bandwidth(cache, device) / 1e9
            row |= {"ms_per_step": seconds * 1e3, "tokens_per_s": B / seconds}
        cache = cache_type = host = None
        rows.append(row | provenance(device))
    add_speedups(rows, {"flexgen": "flexgen", "flexgen_packed": "flexgen, packed"})
    return rows


def run_offload(args, device):
    """Yields the rows of the shapes asked for, one shape's at a time."""
    modes, pool = args.modes or OFFLOAD_MODES, PinnedPool()
    configs = [DSConfig(dense_layers=n, dense_below=0) for n in args.dense_layers]
    if args.checkpoint:
        for source in text_sources(args, modes, device):
            yield offload_rows(source, modes, configs, args, pool)
        return
    if device == "cpu":
        configs = [replace(config, min_tokens=64) for config in configs]
    model_of = partial(kept_model, {}, device)
    settings = [(*row[:3], args.modes or row[3]) for row in OFFLOADS]
    for name, B, S, of_shape in shapes_of(args, device, modes, settings, "1x131072"):
        # not kept: the next model takes its place
        yield offload_rows(Source(name=name, model=model_of(name), B=B, S=S), of_shape, configs,
                           args, pool)


# ---------------------------------------------------------------- command line

BENCHES = {"attention": run_attention, "generate": run_generate, "offload": run_offload}


def parse_arguments(words=None):
    """The options of a command line; ValueError, in one line, for values that cannot be."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="of the tour: cuda or cpu (default: cuda if there is one)")
    commands = parser.add_subparsers(
        dest="what", help="COMMAND --help lists its options (default: a short tour of the three "
                          "benchmarks, of which nothing is saved)")
    table = commands.add_parser("table", help="print the newest rows in results/")
    table.add_argument("of", choices=BENCHES, help="which benchmark's")
    attention, steps, offload = (commands.add_parser(name, help=what) for name, what in (
        ("attention", "decode attention alone"), ("generate", "whole decode steps, and prefill"),
        ("offload", "decode steps with K and V in host memory")))
    for add in (attention.add_argument, steps.add_argument, offload.add_argument):
        add("--shapes", help="BxS, comma-separated, S in tokens (default: several)")
        add("--no_save", action="store_true", help="print the rows, and save nothing")
        add("--device", default=argparse.SUPPRESS,
            help="cuda or cpu (default: cuda; on a CPU one small shape is checked, and nothing "
                 "saved)")

    add = attention.add_argument
    add("--heads", default="32/32", help="query/KV heads for --shapes (default %(default)s)")
    add("--head_dim", type=Number(int, 8, 256), default=128,
        help="channels per head (default %(default)s)")
    add("--sparsity", type=Number(float, 1.01, 1e6), default=DSConfig.sparsity,
        help="1/R of tokens and label bytes (default %(default)g)")
    add("--label_bits", type=label_bits, help="dims x bits as 8x4,48x2, or bits of as many as fit")

    for add, modes, what in (
            (steps.add_argument, MODES,
             "prefill; steps as gpt-fast's (one process, compiled for some minutes per shape), "
             "dense, or as generate.py's; _int8 with the weights rounded"),
            (offload.add_argument, OFFLOAD_MODES,
             "all K and V streamed as FlexGen does, likewise but packed; Double Sparsity with K "
             "and V on the GPU, in host memory, and attending to what was predicted")):
        add("--model", choices=PRESETS, help="whose shape, no sliding window (default: several)")
        add("--modes", nargs="+", choices=modes, help=f"{what} (default: all)")
        add("--steps", type=Number(int, 2), default=50,
            help="steps timed, the median counts; of flexgen at most "
                 f"{FLEXGEN_STEPS} (default %(default)s)")
        add("--dense_layers", type=Number(int, 0), nargs="+", default=[DSConfig.dense_layers, 0],
            help="of ds, gpu and offload, a row for each (default %(default)s)")
    steps.add_argument("--dense_below", type=Number(int, 0), default=DSConfig.dense_below,
                       help="tokens below which ds attends to everything (default %(default)s)")
    steps.add_argument("--compile", action="store_true",
                       help="blocks go through torch.compile, which prefill shows")

    add = offload.add_argument
    add("--budgets", type=Number(float, 1, 1e6), nargs="+", default=[1, 2], metavar="X",
        help="resident tokens in multiples of those attended, a row for each (default %(default)s)")
    add("--prefetch_heads", type=Number(int, 0), nargs="+", metavar="HEADS",
        help="KV heads whose tokens are fetched ahead, a row for each (default: generate.py's)")
    add("--checkpoint", help="its weights continue B prompts of S tokens")
    add("--data", type=InputFile(),
        help="with --checkpoint: text to cut prompts from (default: the built-in text)")
    args = parser.parse_args(words)
    if args.what == "offload" and args.data and not args.checkpoint:
        raise ValueError(f"data={args.data}: random weights use no text; give a --checkpoint")
    return args


def measure(args):
    """The rows of one benchmark, saved shape by shape if they are of a GPU."""
    if args.device is None and not torch.cuda.is_available():
        raise ValueError("times need a CUDA GPU; --device cpu checks one small shape")
    device, path, rows = pick_device(args.device), RESULTS / f"{args.what}.jsonl", []
    saved = device != "cpu" and not args.no_save
    if saved and path.exists():
        check_output(path)
        newest_rows(args.what)  # it is ours
    for of_shape in BENCHES[args.what](args, device):
        rows += of_shape
        tidy(device)
        if saved:
            append_json_lines(path, of_shape)
    return rows


TOUR = {"cuda": ["attention --shapes 1x16384,4x65536",
                 "generate --shapes 1x16384,4x16384 --modes dense ds --dense_layers 2",
                 "offload --shapes 1x32768 --modes flexgen offload --dense_layers 0 --budgets 1"],
        "cpu": ["attention", "generate --modes prefill dense ds --dense_layers 2 --steps 5",
                "offload --modes flexgen gpu offload --dense_layers 0 --budgets 1 --steps 5"]}


def tour(device):
    """Prints a table of each benchmark, at few shapes."""
    if device == "cpu":
        print("Without a GPU: small shapes, as a check; times say nothing.", file=sys.stderr)
    for words in TOUR[device]:
        words = f"{words} --device {device} --no_save"
        print(f"bench.py {words}\n", flush=True)
        args = parse_arguments(words.split())
        print(f"{TABLES[args.what](measure(args))}\n", flush=True)


def main():
    """The command line: measures one benchmark, prints its table, or gives a tour of all."""
    args = parse_arguments()
    if parallel.size() > 1 and args.what not in ("generate", "table"):
        raise ValueError("torchrun is for bench.py generate: name it, or leave torchrun out")
    if args.what is None:
        tour(pick_device(args.device))
    elif args.what == "table":
        print(TABLES[args.of](newest_rows(args.of)))
    else:
        print(TABLES[args.what](measure(args)))


if __name__ == "__main__":
    run_command(main, several=True)
