"""Text generation with Double Sparsity: load a checkpoint, prefill the prompts, decode, stream.

Usage: python generate.py --sparsity 16      the built-in demonstration on tiny/
       python generate.py --checkpoint DIR_HUB_ID_OR_GGUF --prompt "Once upon" --max_new_tokens 100
       python generate.py --compare --prompt_file FILE      dense and sparse side by side
       python generate.py --offload --prompt_file FILE      K and V in host memory
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import random
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from tqdm import tqdm
from triton.runtime import JITFunction

import parallel
from calibrate import calibrate
from cli import (
    ArgumentParser, InputFile, Number, OutputFile, check_output, default_dtype, pick_device,
    run_command, writing
)
from config import ModelConfig
from convert_hf import convert
from ds_attention import DSConfig
from host_memory import check_host_memory, free_host_bytes
from linear import choose_likeliest
from model import KVCache, check_memory, load_label_maps, load_model, open_tensors
from offload import MIN_AGREEMENT, MODES, OffloadCache, predictable_layers
from tiny.tasks import kv_answer, kv_prompt, random_kv
from tokenizer import Tokenizer, read_text

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- loading


def is_converted(directory):
    path = directory / "model.safetensors"
    if not path.exists():
        return False
    with open_tensors(path) as file:
        return "embed.weight" in file.keys()


def resolve_checkpoint(name):
    """A checkpoint directory of ours for a path or hub id.

    A Hugging Face checkpoint or a GGUF file is converted to checkpoints/ first.
    """
    source = Path(name)
    if not name:
        raise ValueError("the checkpoint's name is empty: give a directory, GGUF file or a hub id")
    if source.is_dir() and is_converted(source):
        return source
    if source.exists():
        listed = source.iterdir() if source.is_dir() else [source]
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in listed)
        tag = hashlib.sha256(repr((str(source.resolve()), files)).encode()).hexdigest()[:8]
        converted = HERE / "checkpoints" / f"{source.resolve().name.removesuffix('.gguf')}-{tag}"
    else:
        converted = HERE / "checkpoints" / name.replace("/", "--")
    if not is_converted(converted):
        convert(name, converted)
        print(f"{name} was not converted yet: converted to {converted}", file=sys.stderr)
    return converted


def ensure_calibrated(checkpoint, device):
    """Calibrates a checkpoint that has no label maps yet."""
    with parallel.rank_0_first():
        if not (checkpoint / "channels.safetensors").exists():
            check_output(checkpoint / "channels.safetensors")
            print(f"{checkpoint} is not calibrated yet: calibrating (once)", file=sys.stderr)
            with contextlib.redirect_stdout(sys.stderr):
                calibrate(checkpoint, device=device, dtype=default_dtype(device))


def load_maps(checkpoint, config, ds, device, channels=None):
    """A checkpoint's label maps; one without any is calibrated first. channels: another file's."""
    if channels is None:
        ensure_calibrated(checkpoint, device)
    return load_label_maps(checkpoint, config, ds, channels)


def open_checkpoint(name):
    """A checkpoint by directory or hub id -> (config, tokenizer, our checkpoint directory)."""
    with parallel.rank_0_first():
        checkpoint = resolve_checkpoint(name)
    config = ModelConfig.from_file(checkpoint / "config.json")
    return config, Tokenizer(checkpoint, config.vocab_size), checkpoint


def load(name, device, dtype, quantize=None):
    """A checkpoint by directory or hub id -> (model, tokenizer, our checkpoint directory). Of
    several processes each has its part of the model."""
    _, tokenizer, checkpoint = open_checkpoint(name)
    model = load_model(checkpoint, device, dtype, quantize, parallel.size())
    return model, tokenizer, checkpoint


# ---------------------------------------------------------------- generation


def sample(logits, temperature=0.0, top_k=None, generator=None):
    """logits [B, vocab] -> tokens [B], the likeliest at temperature 0. Asks nothing of the host."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    # of exponential times with rates p_i, the i-th is the first with probability p_i
    times = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
    return (logits - times.log()).argmax(-1)


class HostEvent:
    """torch.cuda.Event on a CPU, where what was called is done."""

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) * 1e3


def now(device):
    """An event recorded now, at this place in the work given to the device."""
    event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()
    event.record()
    return event


@contextlib.contextmanager
def compiling_only():
    """Triton kernels called within, by any thread, are compiled, side by side, and not run.
    A first step's take half the time. What torch does within is done, on memory that no kernel has
    written: nothing may take an index or a decision from there."""
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        return run(self, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = run


class DecodeStep:
    """The decode step of a cache's sequences: tokens in, sampled tokens out, all on the device.

    On a GPU it is a CUDA graph, and another one for steps that attend to everything
    (DSConfig.dense_below); on a CPU the same function, as it is. A sequence that has met its
    end-of-text token is frozen: it repeats its last step, to no effect.
    """

    def __init__(self, model, cache, temperature=0.0, top_k=None, seed=0):
        B, device = len(cache.seq_lens), model.device
        self.model, self.cache, self.sampling, self.seed = model, cache, (temperature, top_k), seed
        self.views = {True: cache, False: cache.all_tokens()}  # by whether the step is sparse
        self.tokens = torch.zeros(B, dtype=torch.long, device=device)  # input of the next step
        self.sampled = torch.zeros(B, dtype=torch.long, device=device)  # output of the last one
        self.running = torch.ones(B, dtype=torch.bool, device=device)
        self.end_tokens = torch.tensor(model.config.eos_ids, dtype=torch.long, device=device)
        self.generator = torch.Generator(device)
        self.graphs, self.pool = {}, None

    # not inference_mode: the generator's state, which all graphs share, would be bound to it
    @torch.no_grad()
    def start(self, tokens, kinds=(True, False)):
        """The first step's tokens, one per sequence. kinds: steps to run, sparse (True) or not."""
        self.tokens.copy_(torch.tensor(tokens))
        for sparse in kinds:
            if self.model.device.type == "cuda" and sparse not in self.graphs:
                self._capture(sparse)
        self.cache.begin()
        self.running.fill_(True)
        self.generator.manual_seed(self.seed)

    def _capture(self, sparse):
        # frozen rows write what the first step will write again: the warm-up leaves no trace
        self.cache.seq_lens += 1
        self.running.fill_(False)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            with compiling_only():
                self._step(sparse)
            for _ in range(2):
                self._step(sparse)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # the graphs never run at once and leave nothing in it
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # thread_local: of several processes each has a thread that looks after those lost
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self._step(sparse)
        self.graphs[sparse] = graph
        self.cache.seq_lens -= 1

    def _step(self, sparse):
        logits = self.model.decode(self.tokens, self.views[sparse], self.running)
        if logits.is_cuda and self.sampling[0] == 0:
            choose_likeliest(logits, self.sampled, self.tokens, self.running, self.end_tokens)
            return
        self.sampled.copy_(sample(logits, *self.sampling, self.generator))
        self.running &= (self.sampled[:, None] != self.end_tokens).all(1)
        self.tokens.copy_(torch.where(self.running, self.sampled, self.tokens))

    @torch.no_grad()
    def run(self, sparse):
        """One step more; returns at once on a GPU."""
        self.cache.sparse_steps += sparse
        if self.graphs:
            self.graphs[sparse].replay()
        else:
            self._step(sparse)


@dataclass
class Generation:
    """What came out, and what it cost. Times in seconds, bytes of the whole batch."""

    token_ids: list  # one list of new tokens per prompt, end-of-text not included
    ttft_s: float  # prefill and first token; in a process's first run compilation and capture, too
    step_s: list  # of each step after the first
    cold_start_s: float  # from the start of the process to the first token
    weight_bytes_per_step: int
    kv_bytes_per_step: float  # cache read by a decode step, labels included, mean over the steps
    dense_kv_bytes_per_step: float

    def statistics(self):
        """Figures for people and --json; tokens/s without the first step and ended sequences."""
        decode_s = sum(self.step_s)
        tokens = sum(max(0, len(ids) - 1) for ids in self.token_ids)
        in_order = sorted(self.step_s) or [0.0]
        return {"ttft_ms": self.ttft_s * 1e3, "cold_start_s": self.cold_start_s,
                "prompts": len(self.token_ids),
                "median_ms_per_token": statistics.median(in_order) * 1e3,
                "p99_ms_per_token": in_order[math.ceil(0.99 * len(in_order)) - 1] * 1e3,
                "decode_tokens_per_s": tokens / decode_s if decode_s else 0.0,
                "decode_tokens_per_s_per_sequence":
                    len(self.step_s) / decode_s if decode_s else 0.0,
                "bytes_per_step": self.weight_bytes_per_step + self.kv_bytes_per_step,
                "kv_bytes_per_step": self.kv_bytes_per_step,
                "dense_kv_bytes_per_step": self.dense_kv_bytes_per_step}


def generate(step, prompts, max_new_tokens, start=0, on_token=None, progress=None):
    """Decodes a ragged batch of prompts (lists of token ids), each until its end-of-text token.

    All of a prompt but its last token is prefilled; that one is the first decode step, so that
    every new token comes out of the same (sparse) step. step: a DecodeStep, one prompt to each row
    of its cache. start: tokens already in the cache, for one more turn of a conversation.
    on_token(b, token): called as tokens come, while the next step runs. progress: as in
    Transformer.prefill. Returns a Generation.
    """
    model, cache, device = step.model, step.cache, step.model.device
    age_s = process_age_s()
    began = now(device)
    model.prefill([prompt[:-1] for prompt in prompts], cache, start, progress=progress)
    lengths = [start + len(prompt) for prompt in prompts]  # live in the first step
    kinds = {cache.sparse_at(length)  # the extremes' hold all
             for length in (min(lengths), max(lengths) + max_new_tokens - 1)}
    step.start([prompt[-1] for prompt in prompts], kinds)
    sampled = torch.empty(max_new_tokens, len(prompts), dtype=torch.long,
                          pin_memory=device.type == "cuda")
    done, sparse = [], []  # of each step: the event of its end, and whether it was sparse
    delivered = 0  # steps whose tokens the host has read
    token_ids = [[] for _ in prompts]
    ended = [max_new_tokens] * len(prompts)  # the step in which each met its end, or their number

    def running(i):
        return [b for b in range(len(prompts)) if ended[b] >= i]

    def deliver():
        nonlocal delivered
        done[delivered].synchronize()
        for b in running(delivered):
            token = sampled[delivered, b].item()
            if token in model.config.eos_ids:
                ended[b] = delivered
            else:
                token_ids[b].append(token)
                if on_token:
                    on_token(b, token)
        delivered += 1

    for i in range(max_new_tokens):
        if not running(i):
            break
        sparse.append(cache.sparse_at(max(lengths[b] for b in running(i)) + i))
        step.run(sparse[i])
        sampled[i].copy_(step.sampled, non_blocking=True)
        done.append(now(device))
        # one step behind, so that the device has work; else once, at the end
        if i and (on_token or model.config.eos_ids):
            deliver()
    while delivered < len(done) and running(delivered):
        deliver()
    # a step after the end of all sequences, begun before the host knew, does not count
    live = torch.tensor(lengths) + torch.minimum(  # [steps, B]
        torch.arange(delivered)[:, None], torch.tensor(ended))
    sparse = torch.tensor(sparse[:delivered])
    read = cache.read_bytes(live[sparse])[0], *cache.all_tokens().read_bytes(live[~sparse])
    return Generation(
        token_ids, ttft_s := began.elapsed_time(done[0]) * 1e-3,
        [a.elapsed_time(b) * 1e-3 for a, b in zip(done, done[1:delivered])], age_s + ttft_s,
        model.weight_bytes(len(prompts)), (read[0] + read[1]) / delivered,
        cache.read_bytes(live)[1] / delivered)


@torch.inference_mode()
def forced_logits(step, prompts, texts):
    """Logits [B, vocab] of each step that decodes given texts (lists of token ids), not samples;
    where a text has ended they mean nothing. The prompts must be in the cache."""
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
    step.cache.seq_lens.copy_(lengths)
    inputs = [prompt[-1:] + text for prompt, text in zip(prompts, texts)]
    for i in range(max(map(len, texts))):
        tokens = torch.tensor([ids[min(i, len(ids) - 1)] for ids in inputs],
                              device=step.model.device)
        yield step.model.decode(
            tokens, step.views[step.cache.sparse_at(lengths.max().item() + 1 + i)])


def divergence(wanted, found, texts):
    """Mean KL (nats) of `wanted` from `found`: logits of these texts, as from forced_logits."""
    total = 0.0
    for i, (p, q) in enumerate(zip(wanted, found)):
        p, q = (x.float().log_softmax(-1).cpu() for x in (p, q))
        live = torch.tensor([i < len(text) for text in texts])
        total += F.kl_div(
            q, p, reduction="none", log_target=True).sum(-1)[live].double().sum().item()
    return total / max(1, sum(map(len, texts)))


def new_tokens_text(tokenizer, prompt, ids):
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


class Streamer:
    """Prints a sequence's text as its tokens come, a character when all its bytes are there."""

    def __init__(self, tokenizer, context=()):
        """context: the tokens before, after which the first new piece keeps its leading space."""
        self.tokenizer = tokenizer
        self.before, self.new = list(context), []  # what was printed last, what was not yet
        self.tokens = []  # all that came

    def __call__(self, b, token):
        self.tokens.append(token)
        self.new.append(token)
        text = new_tokens_text(self.tokenizer, self.before, self.new)
        if text and not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            self.before, self.new = self.new, []

    def finish(self):
        """Prints what is left of a character that was never completed, and the end of the line."""
        print(new_tokens_text(self.tokenizer, self.before, self.new), flush=True)


# ---------------------------------------------------------------- command line


def process_age_s():
    """Seconds since this process began."""
    started = (int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
               / os.sysconf("SC_CLK_TCK"))
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory_bytes(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache  # measured once
def copy_bandwidth(device):
    """Bytes per second of a large copy on the GPU, read and written bytes both counted."""
    a = torch.empty(2**29, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = []
    for _ in range(20):  # not in a graph, where a copy engine, slower than a kernel, may do it
        begin = now(a.device)
        b.copy_(a)
        end = now(a.device)
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * a.nbytes / statistics.median(times)


def run_statistics(result, cache, device):
    """A Generation's statistics and what belongs to the machine: a dict for --json."""
    found = result.statistics() | {
        "kv_cache_bytes": cache.kv_bytes(), "label_cache_bytes": cache.label_bytes(),
        "peak_memory_bytes": peak_memory_bytes(device),
        "processes": parallel.size()} | cache.statistics()
    if device != "cpu" and result.step_s:
        found["bandwidth_share"] = (found["bytes_per_step"] / found["median_ms_per_token"] * 1e3
                                    / copy_bandwidth(device))
    return found


def print_statistics(found, device, name=""):
    """A block of lines on stderr. found: from run_statistics; name: what they are of."""
    def megabytes(key):
        return f"{found[key] / 1e6:.2f} MB"

    def mebibytes(key):
        return f"{found[key] / 2**20:.1f} MiB"

    lines = {"time to first token": f"{found['ttft_ms']:.0f} ms "
                                    f"({found['cold_start_s']:.1f} s after the process began)"}
    if found["decode_tokens_per_s"]:  # the first token comes out of the prefill
        each = (f" ({found['decode_tokens_per_s_per_sequence']:.1f} per sequence)"
                if found["prompts"] > 1 else "")
        lines["decode"] = (f"{found['decode_tokens_per_s']:.1f} tokens/s{each}, "
                           f"{found['median_ms_per_token']:.2f} ms per token, "
                           f"p99 {found['p99_ms_per_token']:.2f}")
        bandwidth = (f" ({found['bandwidth_share']:.0%} of the copy bandwidth)"
                     if "bandwidth_share" in found else "")
        share = found["kv_bytes_per_step"] / max(found["dense_kv_bytes_per_step"], 1)
        lines["read per step"] = megabytes("bytes_per_step") + bandwidth
        lines["of it the cache"] = (f"{megabytes('kv_bytes_per_step')}, {share:.0%} of dense's "
                                    f"{megabytes('dense_kv_bytes_per_step')}")
        if "tokens_attended" in found:
            lines["tokens attended"] = f"{found['tokens_attended']:.0f} per head, on average"
        if "host_bytes" in found:
            lines["over PCIe per step"] = megabytes("pcie_bytes_per_step")
            if found.get("hit_rate") is not None:
                lines["over PCIe per step"] += (
                    f", of it ahead {megabytes('prefetched_bytes_per_step')}")
                lines["selected tokens"] = f"{found['hit_rate']:.0%} were on the GPU"
            if found.get("agreement") is not None:
                lines["predicted tokens"] = f"{found['agreement']:.0%} were selected"
            if found.get("predicted_layers"):
                lines["predicted layers"] = (
                    f"{found['predicted_layers']} attended to what was predicted")
    lines["KV cache"] = f"{mebibytes('kv_cache_bytes')}, labels {mebibytes('label_cache_bytes')}"
    if "host_bytes" in found:
        lines["host memory"] = (f"{mebibytes('host_bytes')}, GPU maps of it "
                                f"{mebibytes('slot_map_bytes')}")
    lines[f"peak {'GPU' if device != 'cpu' else 'process'} memory"] = (
        f"{found['peak_memory_bytes'] / 2**30:.2f} GiB")
    if found["processes"] > 1:
        lines["processes"] = f"{found['processes']}; bytes are of each"
    if name:
        print(name, file=sys.stderr)
    for key, value in lines.items():
        print(f"{key:<19}  {value}", file=sys.stderr)
    if device == "cpu" and found["kv_bytes_per_step"] < found["dense_kv_bytes_per_step"]:
        print("On a CPU a sparse step shows what the method does, not how fast it is.",
              file=sys.stderr)


def demonstration(tokenizer, max_tokens=4000):
    """A generated document of about 4,000 tokens and a question about a fact: (prompt, answer)."""
    rng = random.Random(0)
    records = random_kv(rng, 2000)
    key, value = records[17]
    count = 20
    while len(tokenizer.encode(kv_prompt(records[: count + 1], key))) <= max_tokens:
        count += 1
    return kv_prompt(records[:count], key), kv_answer(value)


def label_bits(text):
    """DSConfig.label_bits of a command line's text."""
    return int(text) if text.isdigit() else text


def add_sparsity_arguments(parser):
    """The DSConfig fields that a command line offers; defaults are read from the dataclass."""
    default = DSConfig()
    parser.add_argument("--sparsity", type=Number(float, 1, 1e6), default=default.sparsity,
                        metavar="R",
                        help=f"attend to 1/R of the tokens, {default.min_tokens} at least, with "
                             "labels of 1/R of K's bytes; 1: dense (default %(default)g)")
    parser.add_argument("--n_tokens", type=Number(int, 1),
                        help="attend to this many tokens instead of a share")
    parser.add_argument("--label_bits", type=label_bits, metavar="BITS",
                        help="a label's dims x bits of each width, the most important first, as "
                             "8x4,48x2; or 1, 2, 4 or 8 bits for as many dims as --sparsity has "
                             "room for (default: many dims of few bits, 8x4,48x2 in 16 bytes)")
    parser.add_argument("--channels", type=InputFile(), metavar="FILE",
                        help="label maps of calibrate.py --out (default: the checkpoint's own)")
    parser.add_argument("--dense_layers", type=Number(int, 0), default=default.dense_layers,
                        help="first layers that attend to everything (default %(default)s)")


def add_quantize_argument(parser):
    parser.add_argument("--quantize", choices=("int8",),
                        help="round the linear layers' weights to 8 bits, with a scale per output: "
                             "half the bytes of a step's weights (default: as they are)")


def sparsity_from(args):
    """DSConfig of the arguments, or None for dense. Raises ValueError for values out of bounds."""
    if args.sparsity == 1 and args.n_tokens is None:
        for name in ("label_bits", "channels"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)}: --sparsity 1 is dense; take a "
                                 "larger one, or leave this out")
        return None
    names = {f.name for f in fields(DSConfig)}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    if args.sparsity == 1:  # --n_tokens alone decides how many, the default how large labels are
        del chosen["sparsity"]
    return DSConfig(**chosen)


def check_layers(ds, config):
    """Raises ValueError for a DSConfig, if it is one, of which no layer of the model is sparse."""
    if ds and ds.dense_layers >= config.n_layers:
        raise ValueError(f"dense_layers={ds.dense_layers}: of {config.n_layers} layers none is "
                         "left to be sparse; take fewer, or --sparsity 1 for dense")


OFFLOAD_OPTIONS = ("resident_tokens", "prefetch_heads", "offload_mode", "min_agreement", "no_pack")


def parse_arguments():
    """The options of the command line; ValueError, in one line, for values that cannot be."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"),
                        help="converted directory, Hugging Face directory, hub id or GGUF file"
                        " (default: the embedded tiny model)")
    parser.add_argument("--prompt", action="append",
                        help="text to continue; repeat it for a batch (default: a demonstration)")
    parser.add_argument("--prompt_file", type=InputFile(),
                        help="UTF-8 file with the text to continue")
    parser.add_argument("--max_new_tokens", type=Number(int, 1), default=200,
                        help="tokens to generate per prompt; the demonstration stops after its "
                             "answer (default %(default)s)")
    parser.add_argument("--temperature", type=Number(float, 0, 1000), default=0.0,
                        help="0: always the most likely token (default %(default)g)")
    parser.add_argument("--top_k", type=Number(int, 1),
                        help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=Number(int, 0, 2**63 - 1), default=0,
                        help="of the sampling (default %(default)s)")
    add_sparsity_arguments(parser)
    parser.add_argument("--dense_below", type=Number(int, 0), metavar="TOKENS",
                        default=DSConfig.dense_below,
                        help="sequences that are shorter attend to everything: sparse steps could "
                             "not be faster; with --offload so many tokens are on the GPU "
                             "(default %(default)s)")
    parser.add_argument("--max_seq_length", type=Number(int, 2), metavar="TOKENS",
                        help="cache of each sequence: generation ends where it is full (default: "
                             "as many as there will be; --interactive: all of the model's)")
    parser.add_argument("--offload", action="store_true",
                        help="keep K and V in host memory, on the GPU only labels, the dense "
                             "layers and tokens that recent steps attended to; with --sparsity 1 "
                             "all of K and V is streamed in each step")
    parser.add_argument("--resident_tokens", type=Number(int, 1), metavar="TOKENS",
                        help="with --offload: tokens per sequence, layer and KV head kept on the "
                             "GPU (default: those that a step attends to, or --dense_below if "
                             "that is more)")
    parser.add_argument("--prefetch_heads", type=Number(int, 0), metavar="HEADS",
                        help="with --offload in the exact mode: KV heads of each layer whose "
                             "tokens are fetched while the layer before computes, as its input "
                             "predicts them (default: as many as PCIe then has time for if none "
                             "is resident, at most three of eight; on a CPU 0)")
    parser.add_argument("--offload_mode", choices=MODES, default=MODES[0],
                        help="with --offload: attend to what each layer's own query selects, "
                             "whatever was predicted, or to the predicted tokens, so that fetches "
                             "hide behind compute (default %(default)s)")
    parser.add_argument("--min_agreement", type=Number(float, 0, 1), default=MIN_AGREEMENT,
                        metavar="SHARE",
                        help="with --offload: of layers where calibration foresaw a smaller share "
                             "of the selection, nothing is predicted (default %(default)g)")
    parser.add_argument("--no_pack", action="store_true",
                        help="with --offload: K and V of bfloat16 are not packed in host memory, "
                             "where they take 12 bits of 16, without loss")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--compile", action="store_true",
                        help="on a GPU, prefill through torch.compile: a seventh faster, but it "
                             "starts some 18 s later")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="of weights and cache (default: bfloat16 on a GPU, float32 on a CPU)")
    add_quantize_argument(parser)
    parser.add_argument("--interactive", action="store_true",
                        help="read lines from the terminal and answer each, by the checkpoint's "
                             "chat template if it has one; an empty line or Ctrl-D ends")
    parser.add_argument("--no_chat_template", action="store_true",
                        help="with --interactive: continue the lines as plain text all the same")
    parser.add_argument("--chat", action="store_true",
                        help="put each prompt into the checkpoint's chat template")
    parser.add_argument("--compare", action="store_true",
                        help="generate dense and sparse: both texts, where they part, how far "
                             "apart their next-token distributions are, both speeds")
    parser.add_argument("--json", type=OutputFile(), metavar="FILE",
                        help="write tokens, texts and statistics to this file")
    args = parser.parse_args()
    for name in OFFLOAD_OPTIONS:
        if getattr(args, name) != parser.get_default(name) and not args.offload:
            raise ValueError(f"{name}={getattr(args, name)}: without --offload all tokens are on "
                             "the GPU; add that option")
    if args.temperature and args.temperature < 1e-3:
        raise ValueError(f"temperature={args.temperature}: must be 0, always the most likely "
                         "token, or at least 0.001")
    if args.top_k and not args.temperature:
        raise ValueError(f"top_k={args.top_k}: with --temperature 0 the most likely token is "
                         "always taken; give one above 0")
    others = args.prompt or args.prompt_file or args.json or args.compare or args.chat
    if args.interactive and others:
        raise ValueError("--interactive reads its prompts from the terminal: leave out --prompt, "
                         "--prompt_file, --json, --compare and --chat")
    if args.no_chat_template and not args.interactive:
        raise ValueError("--no_chat_template: only --interactive takes a template by itself; leave "
                         "the option out")
    if args.chat and not (args.prompt or args.prompt_file):
        raise ValueError("--chat: needs a --prompt or --prompt_file to put into the template")
    return args


def cache_length(prompts, max_new_tokens, max_seq_length, config):
    """Tokens of cache per sequence. Raises ValueError for lengths that do not fit."""
    longest = max(map(len, prompts), default=0)
    wanted = longest + max_new_tokens if prompts else config.max_positions
    if min(wanted, max_seq_length or wanted) > config.max_positions:
        raise ValueError(f"{longest} prompt tokens + max_new_tokens={max_new_tokens} is more than "
                         f"the model's {config.max_positions} positions; shorten one of them")
    if max_seq_length and max_seq_length <= longest:
        raise ValueError(f"max_seq_length={max_seq_length}: must be more than the {longest} tokens "
                         "of the longest prompt")
    return min(wanted, max_seq_length or wanted)


def say_if_dense(ds, size, config):
    """On stderr, if a DSConfig has every token of caches of that many attended to."""
    live = min(size, config.longest_window or size)
    if ds is not None and not ds.sparse_at(live):
        least = f"n_tokens={ds.n_tokens}" if ds.n_tokens else f"min_tokens={ds.min_tokens}"
        of_budget = not replace(ds, dense_below=0).sparse_at(live)
        why = f"{least} is no fewer" if of_budget else f"dense_below={ds.dense_below}"
        print(f"All tokens are attended, as there are at most {live} ({why}).", file=sys.stderr)


def converse(step, tokenizer, args):
    """The --interactive loop; answers stream. Each line is a turn of the checkpoint's chat template
    or, without one, a new line after the tokens so far. The cache keeps what is unchanged."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401: editing, history, and lines of any length
    print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    messages, ids = [], []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except UnicodeDecodeError:
            print("that line is not UTF-8 text: try another", file=sys.stderr)
            continue
        if not line:
            return
        turn = [*messages, {"role": "user", "content": line}]
        try:
            if chat:  # all of it anew: a template may change what it made of earlier turns
                whole = tokenizer.chat(turn)
            else:
                whole = ids + tokenizer.encode_line(line) if ids else tokenizer.encode(line)
        except ValueError as error:
            print(f"{error}: try another line", file=sys.stderr)
            continue
        room = step.cache.max_seq_length - len(whole)
        if room < 1:
            print(f"with that line the conversation has {len(whole)} tokens, and the cache holds "
                  f"{step.cache.max_seq_length}: a shorter one may fit", file=sys.stderr)
            continue
        messages = turn
        cached = max(0, len(ids) - 1)  # K and V of the last new token were not needed yet
        kept = min([i for i, (a, b) in enumerate(zip(ids[:cached], whole)) if a != b]
                   + [cached, len(whole) - 1])
        stream = Streamer(tokenizer, whole)
        try:
            result = generate(step, [whole[kept:]], min(args.max_new_tokens, room), kept, stream)
        except KeyboardInterrupt:
            result = None
        stream.finish()
        answer = result.token_ids[0] if result else stream.tokens
        if result is None and not answer:  # stopped before the prompt was in the cache
            ids, messages = whole[:kept], messages[:-1]
            continue
        ids = whole + answer
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        if result:
            print_statistics(run_statistics(result, step.cache, args.device), args.device)


def compare(model, tokenizer, prompts, size, ds, label_maps, cache_type, args):
    """The --compare run: prints both texts and how they differ; returns the figures, for --json."""
    found, text_ids, logits = {}, {}, {}
    bar = tqdm(total=2 * sum(map(len, prompts)), desc="prefill, dense and ds", unit="token",
               leave=False, delay=2)
    for mode, config in (("dense", None), ("ds", ds)):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        cache = cache_type(model.config, len(prompts), size, args.device, model.dtype, config,
                           label_maps)
        step = DecodeStep(model, cache, args.temperature, args.top_k, args.seed)
        result = generate(step, prompts, min(args.max_new_tokens, size - max(map(len, prompts))),
                          progress=bar.update)
        found[mode], text_ids[mode] = run_statistics(result, cache, args.device), result.token_ids
        # on the host: dense's outlive its cache, for which there may be no room beside the other
        logits[mode] = (x.cpu() for x in forced_logits(step, prompts, text_ids["dense"]))
        if mode == "dense":
            logits[mode] = list(logits[mode])
            del step, cache
    bar.close()
    kl = divergence(logits["dense"], logits["ds"], text_ids["dense"])
    texts = {mode: [new_tokens_text(tokenizer, *pair) for pair in zip(prompts, ids)]
             for mode, ids in text_ids.items()}
    parted = []
    for b, (ours, dense) in enumerate(zip(text_ids["ds"], text_ids["dense"])):
        same = next((i for i, (x, y) in enumerate(zip(ours, dense)) if x != y),
                    min(len(ours), len(dense)))
        parted.append(None if ours == dense else same)
        print(f"=== prompt {b + 1}, dense\n{texts['dense'][b]}\n"
              f"=== prompt {b + 1}, ds\n{texts['ds'][b]}")
        print(f"=== prompt {b + 1}: " + (
            f"the same {len(ours)} tokens" if ours == dense else f"they part after {same} tokens, "
            f"dense with {tokenizer.decode(dense[same : same + 1])!r}, "
            f"ds with {tokenizer.decode(ours[same : same + 1])!r}"))
    print(f"KL of ds from dense over dense's text: {kl:.6f} nats per token")
    for mode in found:
        print_statistics(found[mode], args.device, f"--- {mode}")
    return {"token_ids": text_ids, "text": texts, "first_difference": parted, "kl": kl, **found}


def main():
    """The command line: answers the prompts, compares dense with sparse, or converses."""
    args = parse_arguments()
    ds = sparsity_from(args)
    if args.compare and ds is None:
        raise ValueError("--compare sets sparse against dense: give a --sparsity above 1")
    if args.offload_mode == "predicted" and ds is None:
        raise ValueError("offload_mode=predicted: nothing is selected with --sparsity 1; take a "
                         "larger one, or leave the mode out")
    args.device, ranks = pick_device(args.device), parallel.size()
    if args.compile and args.device == "cpu":
        raise ValueError("--compile: is for a GPU; leave it out on a CPU")
    for name in ("compile", "interactive"):
        if getattr(args, name) and ranks > 1:
            raise ValueError(f"--{name}: is for one process; leave it or torchrun out")
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    texts = list(args.prompt or [])
    if args.prompt_file:
        texts.append(read_text(args.prompt_file))
    texts = [text.removeprefix("\ufeff") for text in texts]
    config, tokenizer, checkpoint = open_checkpoint(args.checkpoint)
    config = parallel.share(config, ranks)
    answer = None
    if not texts and not args.interactive:
        prompt, answer = demonstration(tokenizer)
        texts = [prompt]
        most = len(tokenizer.encode(answer[1:], special=False))
        args.max_new_tokens = min(args.max_new_tokens, most)
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) if args.chat
               else tokenizer.encode(text) for text in texts]
    if [] in prompts or tokenizer.prefix in prompts:
        raise ValueError("the prompt is empty: give at least one character of text")
    check_layers(ds, config)
    size = cache_length(prompts, args.max_new_tokens, args.max_seq_length, config)
    cache_type, needs = KVCache, (config, max(1, len(prompts)), size, dtype)
    if args.offload:
        cache_type = functools.partial(
            OffloadCache, resident_tokens=args.resident_tokens, prefetch_heads=args.prefetch_heads,
            mode=args.offload_mode, packed=not args.no_pack)
    for config_ds in (None, ds) if args.compare else (ds,):
        if args.offload:
            check_host_memory(free_host_bytes() // ranks, *needs, config_ds)
        if args.device != "cpu":
            check_memory(torch.cuda.mem_get_info()[0], *needs, config_ds, cache_type, args.quantize)
        elif not args.offload:
            check_memory(free_host_bytes() // ranks, *needs, config_ds, quantize=args.quantize,
                         of="host")
    if ds and not args.channels:
        ensure_calibrated(checkpoint, args.device)  # before the model is loaded: it loads its own
    say_if_dense(ds, size, config)
    model = load_model(checkpoint, args.device, dtype, args.quantize, ranks)
    label_maps = load_maps(checkpoint, config, ds, args.device, args.channels) if ds else None
    if ds and args.offload:
        channels = args.channels or checkpoint / "channels.safetensors"
        cache_type = functools.partial(cache_type, predictable=predictable_layers(
            channels, args.min_agreement, args.offload_mode))
    if args.compile:
        model.compile_blocks()
    if answer:
        question = texts[0].rpartition("}\n")[2].strip()  # what follows the document
        print(f"no prompt given: a generated document of {len(prompts[0])} tokens, then\n"
              f"{question}", file=sys.stderr)
    if args.compare:
        found = compare(model, tokenizer, prompts, size, ds, label_maps, cache_type, args)
    else:
        cache = cache_type(config, max(1, len(prompts)), size, args.device, dtype, ds, label_maps)
        step = DecodeStep(model, cache, args.temperature, args.top_k, args.seed)
        if args.interactive:
            return converse(step, tokenizer, args)
        bar = tqdm(total=sum(map(len, prompts)), desc="prefill", unit="token", leave=False, delay=2)
        stream = Streamer(tokenizer, prompts[0]) if len(prompts) == 1 else None

        def on_token(b, token):
            bar.close()  # the first one ends the prefill
            stream(b, token)

        result = generate(step, prompts, min(args.max_new_tokens, size - max(map(len, prompts))), 0,
                          stream and on_token, bar.update)
        bar.close()
        outputs = [new_tokens_text(tokenizer, *pair) for pair in zip(prompts, result.token_ids)]
        if stream:
            stream.finish()
        else:
            for b, (text, output) in enumerate(zip(texts, outputs)):
                print(f"=== prompt {b + 1}\n{text}{output}")
        if answer:
            cut = args.max_new_tokens < most
            verdict = ("right" if outputs[0].strip() == answer.strip()
                       else f"cut short by --max_new_tokens, it is {answer.strip()}"
                       if cut and answer.strip().startswith(outputs[0].strip())
                       else f"wrong, it is {answer.strip()}")
            print(f"the answer is {verdict}", file=sys.stderr)
        found = {"token_ids": result.token_ids, "text": outputs,
                 **run_statistics(result, cache, args.device)}
        print_statistics(found, args.device)
    if args.json:
        found |= {"prompt_token_ids": prompts, "config": {
            "checkpoint": args.checkpoint, "device": args.device,
            "dtype": str(dtype).removeprefix("torch."), "max_new_tokens": args.max_new_tokens,
            "max_seq_length": size, "temperature": args.temperature, "top_k": args.top_k,
            "seed": args.seed, "compile": args.compile, "quantize": args.quantize,
            "double_sparsity": asdict(ds) if ds else None,
            "offload": {name: getattr(args, name) for name in OFFLOAD_OPTIONS}
                       if args.offload else None}}
        with writing(args.json) as file:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, several=True)
