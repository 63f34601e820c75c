"""The decode loop: a step as a CUDA graph, sampling, and the generation of a batch of prompts."""
import contextlib
import math
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from triton.runtime import JITFunction

from linear import choose_likeliest


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


def timestamp(device):
    """An event recorded now, at this place in the work given to the device."""
    event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()
    event.record()
    return event


@contextlib.contextmanager
def compiling_only():
    """Triton kernels called within, by any thread, are compiled side by side, and not run. Those of
    a first step so compile in half the time. torch's own operations do run, on memory that no
    kernel has written: none may take an index or a decision from it."""
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
        # thread_local: NCCL's watchdog, a thread of each of several processes, may call CUDA, too
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


def process_age_s():
    """Seconds since this process began."""
    started = (int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
               / os.sysconf("SC_CLK_TCK"))
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


@dataclass
class Generation:
    """What came out, and what it cost. Times in seconds, bytes of the whole batch."""

    token_ids: list  # one list of new tokens per prompt, end-of-text not included
    ttft_s: float  # prefill and first token; with what this run had to compile and capture
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
    began = timestamp(device)
    model.prefill([prompt[:-1] for prompt in prompts], cache, start, progress=progress)
    lengths = [start + len(prompt) for prompt in prompts]  # live in the first step
    kinds = {cache.sparse_at(length)  # the shortest and the longest step's: no others occur
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
        done.append(timestamp(device))
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
