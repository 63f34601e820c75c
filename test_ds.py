"""Tests of the engine. A CPU suffices: the kernels run in Triton's interpreter; on a GPU they are
compiled. Other people's files are test_loading.py's concern, the command lines test_cli.py's.

What is held against what: kernels against the reference, the reference against plain attention and
definitions, the decode step against prefill, offload against the GPU's cache.
    pip install -r requirements.txt pytest transformers protobuf gguf && python -m pytest -q
"""
import contextlib
import copy
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data import topics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
DEVICE = "cuda" if GPU else "cpu"

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from triton.runtime import JITFunction

import bench
import calibrate
import cli
import decode
import ds_attention as ds
import eval as evaluation
import generate
import host_memory
import items as asked
import methods
import offload
import pages
import plan
from config import PRESETS, ModelConfig
from ds_attention import DSConfig
from gpt_fast import GptFast
from labels import label_map_of, load_label_maps
from linear import Linear, Residual, choose_likeliest
from model import (
    Attention, KVCache, MoEFeedForward, Transformer, check_memory, load_model,
    memory_need, parameter_shapes
)
from offload import OffloadCache
from tokenizer import Tokenizer, builtin_text

if not GPU:
    ds.WARPS = 4  # the interpreter's time goes by operations, not their size

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"
SHARED = ROOT.parent / "shared" / "data"  # test data that a clone of the repository does not have
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs the project's test data")


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def poisoned(run):
    """run() with torch.empty full of NaN, so that an element nobody wrote shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan_empty(*args, **more):
        t = empty(*args, **more)
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-(2**30))

    torch.empty = nan_empty
    torch.empty_like = lambda t, **more: nan_empty(t.shape, dtype=t.dtype, device=t.device)
    try:
        return run()
    finally:
        torch.empty, torch.empty_like = empty, empty_like

def command(script, *arguments, input=""):
    """Runs a script in this process: imports take longer than most of what is asked of it."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin = [script, *map(str, arguments)], io.StringIO(input)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.stdin = before
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def edit_weights(path, change):
    """Applies `change` to the dict of tensors in a directory's model.safetensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def refused_in_one_line(run, message):
    assert run.returncode == 2 and run.stdout == "", run.stdout + run.stderr
    assert run.stderr.startswith("error: ") and message in run.stderr, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr


# ---------------------------------------------------------------- ds_attention


def shapes(B=2, HQ=4, HKV=2, D=64, S=200, bits=4, window=None, C=32, dtype=torch.float32, pad=16):
    return dict(locals())

CASES = {
    "one-token": shapes(S=1, C=8),
    "odd-63-1bit": shapes(HQ=3, HKV=1, D=128, S=63, bits=1, pad=1),
    "mha-1000": shapes(HQ=2, S=1000, C=8),
    "gqa8-4097-mixed": shapes(B=1, HQ=8, HKV=1, S=4097, bits="4x4,8x2", pad=1),
    "gqa4-window": shapes(HQ=8, S=333, window=100, C=8),
    "2bit-gqa3": shapes(HQ=3, HKV=1, S=2500, bits=2, C=16),
    "8bit-3words": shapes(HQ=2, bits=8, C=12),
    "gqa7-four-widths-window": shapes(1, 7, 1, S=3333, window=2200, bits="2x8,4x4,8x2,16x1"),
    # queries of bf16 put many codes on the edge between two, where the kernel must round alike
    "bf16": shapes(D=128, dtype=torch.bfloat16, C=32),
    "fp16-mha": shapes(HQ=2, D=128, dtype=torch.float16, pad=1),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Problem:
    """Random inputs of one decode call, as the cache has them: K and V are interleaved, all is
    allocated for more tokens than rows have, and a row of label words to a multiple of `pad`."""

    def __init__(self, case, seed=0, seq_lens=None, **config):
        vars(self).update(case)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        config = dict(sparsity=8, min_tokens=8, sink=2, recent=4, dense_below=0) | config
        widths = self.bits if isinstance(self.bits, str) else f"{self.C}x{self.bits}"
        self.config = DSConfig(**config, label_bits=cli.label_bits(widths))
        self.widths = self.config.widths(self.D)
        self.q = normal(self.B, self.HQ, self.D).to(self.dtype)
        self.kv = normal(self.B, self.HKV, self.S, 2, self.D).to(self.dtype)
        self.k, self.v = self.kv.unbind(3)
        channels = torch.stack([torch.randperm(self.D, generator=generator)
                                for _ in range(self.HKV)])
        mean, std = 0.1 * torch.ones(2, self.HKV, self.D) * torch.tensor([1, 9])[:, None, None]
        weights = 1 + torch.rand(self.HKV, self.D // 2, self.D // 2, generator=generator) / 4
        ranges = (x.to(DEVICE) for x in (channels, mean, std))
        self.map = label_map_of(*ranges, self.widths, weights.to(DEVICE))
        allocated = self.B, self.HKV, ds.words_in(self.widths), -(-self.S // self.pad) * self.pad
        self.labels = torch.full(allocated, -1, dtype=torch.int32, device=DEVICE)[..., : self.S]
        self.positions = torch.arange(self.S, dtype=torch.int32, device=DEVICE).repeat(self.B, 1)
        ds.label_ref(self.k, self.positions, self.labels, self.map)
        lens = seq_lens or [max(1, self.S - 37 * b) for b in range(self.B)]
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    def workspace(self, splits=None):
        shape = self.B, self.HQ, self.HKV, self.D, self.S
        return ds.Workspace(*shape, self.q.device, self.config, splits)

    def scores(self):
        return ds.score_ref(self.q, self.labels, self.map, self.seq_lens, self.config, self.window)

    def chosen(self):
        return ds.select_ref(self.scores(), self.seq_lens, self.config, self.window)

    def select(self, impl="triton", newest=None, **more):
        return offload.select_tokens(self.q, newest, self.labels, self.map, self.seq_lens,
                                     replace(self.config, impl=impl), self.window, **more)

    def decode(self, impl="triton", **more):
        return ds.ds_decode(self.q, self.k, self.v, self.labels, self.map, self.seq_lens,
                            replace(self.config, impl=impl), self.window, **more)


def first_channels(HKV, C, widths, device=DEVICE):
    """A LabelMap of the first C channels, for keys of unit variance."""
    channels, zeros = torch.arange(C).expand(HKV, -1).to(device), torch.zeros(HKV, C, device=device)
    return label_map_of(channels, zeros, zeros + 1, widths)


def mask_of(indices, n_tokens, S):
    """select_tokens' lists as select_ref's mask."""
    listed = torch.arange(indices.shape[2], device=DEVICE) < n_tokens[..., None]
    times = torch.zeros(*n_tokens.shape, S, dtype=torch.int32, device=DEVICE)
    times.scatter_add_(2, indices.masked_fill(~listed, 0).long(), listed.int())
    assert times.max() == 1, "a token is listed twice"
    return times.bool()


def test_label_words_by_hand():
    """Dims one behind the other, lowest bits first: 8 + 4 + 4, then 2 bits eight times."""
    codes, widths = torch.tensor([0x12, 0x3, 0x4, 1, 2, 3, 0, 0, 0, 0, 3]), ((1, 8), (2, 4), (8, 2))
    label_map = first_channels(1, 11, widths, "cpu")
    words = ds.pack(codes, label_map)
    assert words.tolist() == [0x4312 + ((1 + 2 * 4 + 3 * 16) << 16) + (3 << 30) - 2**32]
    assert torch.equal(ds.unpack(words, label_map), codes.int())


@cases
def test_label_kernel_equals_reference(case):
    p = Problem(case)
    begin, labels = max(0, p.S - 70), torch.full_like(p.labels, -1)
    new, config = (p.k[:, :, begin:], p.positions[:, begin:]), replace(p.config, impl="triton")
    ds.write_labels(*new, labels, p.map, config)
    assert (labels[..., :begin] == -1).all(), "wrote outside of the given positions"
    assert torch.equal(labels[..., begin:], p.labels[..., begin:])


@pytest.mark.parametrize("S, window", [(900, None), (900, 500), (6000, None)],
                         ids=["whole", "window", "sampled"])
def test_a_group_is_pooled_by_softmax_weight(S, window):
    """With labels that tell nearly all of q . k, scores are methods.pool's; a head of large
    logits does not choose for others."""
    p = Problem(shapes(B=1, HQ=6, HKV=2, S=S, bits=8, C=64, window=window))
    p.q[:, ::3] *= 4
    unit = p.q[:, ::3] / p.q[:, ::3].norm(dim=-1, keepdim=True)
    p.k[:, :, 1] = 20 * unit  # a sink, which stands for no other token
    p.map.step *= 3  # so that it fits the range
    p.map.gain = p.map.step
    ds.label_ref(p.k, p.positions, p.labels, p.map)
    exact = torch.einsum("bhgd,bhsd->bhgs", p.q.unflatten(1, (2, 3)), p.k) / 8
    live = ds.eligible_tokens(p.seq_lens, S, window)
    exact = exact.masked_fill(~live[:, None, None], float("-inf"))
    scores, want = p.scores() * p.map.query_codes(p.q)[1][..., None], methods.pool(exact)
    assert torch.equal(scores.isfinite(), live[:, None].expand_as(scores))
    error = (scores - want)[..., live[0]]
    error -= error.mean(-1, keepdim=True)  # the logarithm of a mean, and of a sum
    assert error.abs().mean() < (0.4 if S > ds.SAMPLE else 0.2)
    assert (exact.amax(2) - want)[..., live[0]].std() > 1, "the case pools alike by raw scores"
@pytest.mark.parametrize("window", [None, 150], ids=["full", "window"])
@pytest.mark.parametrize("shape", [
    lambda s: s, lambda s: s * 0, lambda s: s.cumsum(2), lambda s: (s * 2).round(),
    lambda s: torch.where(s > 0, 0.0, -0.0), lambda s: s * 1e30
], ids=["random", "all-equal", "drifting", "ties", "both-zeros", "huge-range"])
def test_rows_of_no_more_than_the_sample_get_exactly_n_tokens(shape, window):
    """The first and newest, and the best of the rest: more only where the last of them tie."""
    config = DSConfig(sparsity=8, min_tokens=8, sink=2, recent=4, dense_below=0)
    seq_lens = torch.tensor([ds.SAMPLE, 129, 1], dtype=torch.int32)
    scores = shape(torch.randn(3, 1, ds.SAMPLE, generator=torch.Generator().manual_seed(0)))
    live = ds.eligible_tokens(seq_lens, ds.SAMPLE, window)
    scores = scores.masked_fill(~live[:, None], float("-inf"))
    chosen = ds.select_ref(scores, seq_lens, config, window)
    for length, row, tokens, mask in zip(seq_lens.tolist(), scores[:, 0], live, chosen[:, 0]):
        tokens = tokens.nonzero()[:, 0].tolist()
        always = {i for i in tokens if i < 2 or i >= length - 4}
        rest, n = [i for i in tokens if i not in always], config.budget(len(tokens)) - len(always)
        lowest = sorted(row[rest].tolist(), reverse=True)[n - 1] if n else 0
        assert set(mask.nonzero()[:, 0].tolist()) == always | {i for i in rest if row[i] >= lowest}


def test_long_rows_get_n_tokens_on_average():
    """Within 2%, though the tokens always attended have the best scores; not all rows exactly."""
    config, generator = DSConfig(), torch.Generator().manual_seed(0)
    scores = torch.randn(64, 2, 6000, generator=generator)
    scores[..., : config.sink] = scores[..., -config.recent :] = 9
    chosen = ds.select_ref(scores, torch.full((64,), 6000, dtype=torch.int32), config)
    n = chosen.sum(2).float()
    assert chosen[..., : config.sink].all() and chosen[..., -config.recent :].all() and n.std() > 0
    assert n.mean().item() == pytest.approx(config.budget(6000), rel=0.02)
def check_selection(p):
    """That the kernels choose the tokens that the reference does, by scratch that holds nothing."""
    indices, n_tokens, counts = poisoned(p.select)
    assert torch.equal(counts.sum(2), n_tokens)
    assert torch.equal(mask_of(indices, n_tokens, p.S), p.chosen())


@cases
def test_kernels_choose_the_reference_s_tokens(case):
    check_selection(Problem(case))


def test_kernels_choose_the_reference_s_tokens_of_long_rows():
    check_selection(Problem(shapes(2, 1, 1, S=ds.LONG, bits=8, C=4), seq_lens=[2**15, 2**15 - 1]))


CROWDS = {  # codes of the first two dims, which queries weigh 127 to 8; they look at no other
    "all-equal": lambda i: (i * 0, i * 0),
    "ascending": lambda i: (i * 15 // 6000, i * 240 // 6000 % 16),
    "descending": lambda i: (15 - i * 15 // 6000, i * 0),
    "many-ties": lambda i: (i * 7919 % 5, i * 104729 % 3),
    "best-in-one-place": lambda i: (15 * ((i > 3000) & (i < 3700)), i * 31 % 16),
    "sample-sees-the-best": lambda i: (
        15 * torch.isin(i, ds.sample_ref(torch.tensor([6000]))[0]) * (i % 4 == 0), i % 16),
}
@pytest.mark.parametrize("crowd, window", list(zip(CROWDS, 3 * [None, 4500])))
def test_kernels_choose_the_reference_s_tokens_of_adversarial_scores(crowd, window):
    p = Problem(shapes(HQ=2, HKV=1, S=6000, C=8, window=window), seq_lens=[6000, 4801])
    codes = torch.zeros(6000, 8)
    codes[:, 0], codes[:, 1] = CROWDS[crowd](torch.arange(6000))
    p.labels[:] = ds.pack(codes.to(DEVICE), p.map).T
    p.map.gain = torch.ones_like(p.map.gain)
    p.q = torch.zeros_like(p.q)
    p.q[:, 0, p.map.channels[0, :2]] = torch.tensor([127.0, 8.0], device=DEVICE)
    p.q[:, 1] = p.q[:, 0] / 2
    check_selection(p)


@pytest.mark.parametrize("more", [dict(dense_below=400), dict(n_tokens=200), dict(n_tokens=6)],
                         ids=["dense_below", "n", "always-alone"])
def test_each_row_decides_whether_it_is_sparse(more):
    """And the tokens that sparse steps attend to are counted; those of dense ones are not."""
    p = Problem(shapes(B=4, HQ=1, HKV=1, S=700, C=8), seq_lens=[700, 399, 130, 5], **more)
    check_selection(p)
    n = p.chosen().sum(2)
    assert torch.equal(n[:, 0] == p.seq_lens, ~p.config.sparse_at(p.seq_lens))

    workspace = p.workspace()
    torch.testing.assert_close(p.decode(workspace=workspace), p.decode("torch"), atol=1e-5, rtol=0)
    p.decode(workspace=workspace, all_tokens=True)
    assert torch.equal(workspace.attended, n)


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    p = Problem(shapes(HQ=2, HKV=1, S=900, C=8), seq_lens=[900, 120], dense_below=200)
    workspace = p.workspace(splits=4)
    out = p.decode(workspace=workspace)
    for b in range(2):
        row = copy.copy(p)
        for name in ("q", "k", "v", "labels", "seq_lens"):
            setattr(row, name, getattr(p, name)[b : b + 1])
        row.B = 1
        alone = row.workspace(splits=4)
        assert torch.equal(row.decode(workspace=alone)[0], out[b])
        assert torch.equal(alone.counts[0], workspace.counts[b])
        listed = torch.arange(workspace.room, device=DEVICE) < alone.counts[0][..., None]
        assert torch.equal(alone.lists[0][listed], workspace.lists[b][listed])


@pytest.mark.parametrize("case", ["one-token", "gqa4-window", "2bit-gqa3", "bf16", "fp16-mha"])
def test_decode_step_by_kernels_equals_reference(case):
    """And has the bits of attention over select_tokens' lists."""
    p = Problem(CASES[case])
    got = poisoned(p.decode)
    allowance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[p.dtype]
    assert relative_error(got, p.decode("torch")) < allowance
    if GPU:  # the interpreter's order is fixed
        assert torch.equal(got, p.decode()), "the same inputs gave other bits"

    workspace = p.workspace()
    indices, _, counts = p.select(workspace=workspace)
    listed = ds.attend(p.q, p.k, p.v, p.seq_lens, indices, counts, p.window, workspace)
    assert torch.equal(got, listed)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_newest_keys_labels_are_written(impl):
    """And nothing else is; nothing at all where rows share a cache, or without newest."""
    p = Problem(shapes(HQ=1, HKV=1, S=333, window=100, C=8))
    newest = (p.seq_lens - 1).long()[:, None, None, None]
    want, without = p.labels.clone(), p.labels.scatter(3, newest, 0)
    shared = copy.copy(p)
    shared.labels = p.labels[:1].expand(2, -1, -1, -1)
    for step, written in [
            (lambda: p.decode(impl), True), (lambda: p.decode(impl, all_tokens=True), True),
            (lambda: shared.decode(impl), False),
            (lambda: p.select(impl, newest=p.k), True), (lambda: p.select(impl), False)]:
        p.labels.copy_(without)
        step()
        assert torch.equal(p.labels, want if written else without)


def naive_attention(q, k, v, chosen):
    """attend_ref's result with every step in the inputs' dtype: what its rounding costs is the
    kernel's allowance."""
    k, v, chosen = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v, chosen))
    logits = (k @ q[..., None])[..., 0] / q.shape[2] ** 0.5
    weights = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
    return (weights[:, :, None] @ v)[:, :, 0]
@cases
def test_attend_kernel_equals_reference_given_the_same_tokens(case):
    """Listed ones, by one program a row; and all eligible ones, dense decode, by four."""
    p = Problem(case)
    indices, _, counts = p.select("torch")
    eligible = ds.eligible_tokens(p.seq_lens, p.S, p.window)[:, None].expand(-1, p.HKV, -1)
    for splits, chosen, lists in ((1, p.chosen(), (indices, counts)), (4, eligible, (None, None))):
        exact = ds.attend_ref(p.q.double(), p.k.double(), p.v.double(), p.seq_lens, chosen)
        allowance = 2 * relative_error(naive_attention(p.q, p.k, p.v, chosen), exact) + 1e-6
        inputs = p.q, p.k, p.v, p.seq_lens, *lists, p.window, p.workspace(splits)
        assert relative_error(poisoned(lambda: ds.attend(*inputs)), exact) <= allowance


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_capacity_cuts_lists(impl, monkeypatch):
    """Those longer than it, behind; what is cut off is not attended to."""
    monkeypatch.setattr(ds, "WARPS", 1024)  # programs of four warps
    p = Problem(shapes(HQ=2, HKV=1, S=700, C=8), seq_lens=[700, 60])
    workspace = p.workspace(splits=2 if impl == "triton" else 1)
    whole, n_whole, _ = p.select(impl, workspace=workspace)
    indices, n_tokens, counts = p.select(impl, workspace=workspace, capacity=40)
    assert n_whole[0].min() > 40 > n_whole[1].max() and indices.shape == (2, 1, 40)
    assert torch.equal(n_tokens, n_whole.clamp(max=40))
    cut = mask_of(indices, n_tokens, 700)
    assert torch.equal(cut, mask_of(whole[..., :40], n_tokens, 700))
    got = ds.attend(p.q, p.k, p.v, p.seq_lens, indices, counts, workspace=workspace)
    want = ds.attend_ref(p.q, p.k, p.v, p.seq_lens, cut)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
@pytest.mark.skipif(GPU, reason="the interpreter tells what is read")
@pytest.mark.parametrize("pad", [1, 16])
def test_labels_are_not_read_past_their_memory(pad, monkeypatch):
    """Loads of four words at a time read some past a row's length; the last row must not."""
    from triton.runtime.interpreter import interpreter_builder

    p, read = Problem(shapes(HKV=1, S=203, C=8, pad=pad), seq_lens=[203, 202]), []
    memory = torch.full((4, *p.labels.shape[1:3], p.labels.stride(2)), -1, dtype=torch.int32)
    p.labels = memory[1:3, ..., :203].copy_(p.labels)
    load = interpreter_builder.create_masked_load

    def noted_load(pointers, mask, *more):
        read.append(torch.from_numpy(pointers.data[mask.data].astype("int64")).flatten())
        return load(pointers, mask, *more)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", noted_load)
    p.decode()
    place = (torch.cat(read) - memory.data_ptr()).div(memory.stride(0) * 4, rounding_mode="floor")
    assert [(place == i).any().item() for i in range(4)] == [False, True, True, False]


def test_nothing_of_a_call_s_scratch_reaches_the_next():
    """Long, short and long rows again, with scratch that holds anything in between."""
    p = Problem(shapes(B=1, HQ=2, HKV=1, S=2500, bits="1x8,2x4,4x2,8x1"))
    workspace = p.workspace(splits=2)
    for length in (2500, 3, 2500):
        p.seq_lens.fill_(length)
        assert torch.equal(p.decode(workspace=workspace), p.decode(workspace=p.workspace(splits=2)))
        for name, scratch in vars(workspace).items():
            if torch.is_tensor(scratch) and name not in ("arrived", "attended"):
                scratch.fill_(float("nan") if scratch.is_floating_point() else 0x5BADBEEF)


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_lengths_change_inside_a_cuda_graph():
    """And 20 replays of each give the same bits, those of a step outside of it."""
    p = Problem(shapes(B=2, S=5000), seq_lens=[5000, 4000], dense_below=50)
    workspace = p.workspace()
    p.decode(workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = p.decode(workspace=workspace)
    for lens in ([5000, 4000], [37, 4999], [2100, 1]):
        p.seq_lens.copy_(torch.tensor(lens))
        want = p.decode()
        for _ in range(20):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, want)


@cases
def test_reference_equals_dense_when_n_covers_s(case):
    p = Problem(case, n_tokens=case["S"] + 6)
    dense = ds.attend_ref(p.q, p.k, p.v, p.seq_lens, window=p.window)
    atol = 2e-6 if p.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(p.decode("torch"), dense, atol=atol, rtol=0)
def test_dense_decode_equals_sdpa():
    p = Problem(shapes(B=1, HQ=8, HKV=2, D=128, S=300))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(p.q[:, :, None], p.k, p.v, enable_gqa=True)
    for impl in ("torch", "triton"):
        got = p.decode(impl, all_tokens=True)
        torch.testing.assert_close(got, want[:, :, 0], atol=2e-6, rtol=0)


def test_budget_of_ints_and_tensors_agree():
    live = list(range(1, 4000, 7)) + [3071, 3072, 2**20 - 1, 2**20]
    for more in ({}, dict(sparsity=3.7, min_tokens=20, dense_below=0), dict(n_tokens=50)):
        config = DSConfig(**more)
        n = config.budget(torch.tensor(live, dtype=torch.int32))
        assert n.dtype == torch.int32 and n.tolist() == [config.budget(tokens) for tokens in live]
    assert [DSConfig().budget(n) for n in (1, 3071, 3072, 4800, 4801)] == [1, 3071, 192, 300, 301]


def test_label_bytes_follow_from_sparsity():
    """1/sparsity of a 16-bit K's: whole words of any head's, and no more dims than it has."""
    assert [ds.dims_in(DSConfig(sparsity=s, label_bits=bits).widths(128))
            for s, bits in ((16, 4), (16, 2), (8, 4), (32, 4), (16, 8))] == [32, 64, 64, 16, 16]
    assert [cli.widths_name(DSConfig(sparsity=s).widths(128)) for s in (4, 8, 16, 32, 64)] == [
        "128 x 4", "16 x 4, 96 x 2", "8 x 4, 48 x 2", "20 x 2, 24 x 1", "32 x 1"]
    for sparsity, D in itertools.product((2, 3, 7, 16, 21.3, 50, 128), (32, 64, 80, 96, 100, 128)):
        widths = DSConfig(sparsity=sparsity).widths(D)
        assert ds.dims_in(widths) <= D and ds.words_in(widths) * 32 <= max(32, 16 * D / sparsity)
        assert cli.label_bits(cli.widths_name(widths)) == widths


@pytest.mark.parametrize("more, message", [
    (dict(sparsity=math.inf), "sparsity=inf: must be at least 1, and finite"),
    (dict(n_tokens=0), "n_tokens=0: must be at least 1"),
    (dict(sink=-1), "sink=-1: must be at least 0"),
    (dict(recent=0), "recent=0: must be at least 1"),
    (dict(impl="cuda"), "impl=cuda: must be one of auto, torch, triton"),
    *((dict(label_bits=bits), "must be 1 to 64 dims of 1, 2, 4 or 8 bits, the most bits first") for
      bits in (((8, 4), (96, 2)), ((48, 2), (8, 4)), ((8, 4), (1, 2)), 3))], ids=str)
def test_settings_that_cannot_be_are_refused(more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DSConfig(**more).widths(64)
    with pytest.raises(ValueError, match="must be 1 to 6 dims of 1, 2, 4 or 8 bits"):
        DSConfig().widths(6)


# ---------------------------------------------------------------- model


def test_presets_have_the_published_sizes():
    """Billions of parameters of the published checkpoints, embeddings included."""
    sizes = {name: sum(map(math.prod, parameter_shapes(config).values())) / 1e9
             for name, config in PRESETS.items()}
    assert sizes == pytest.approx({
        "Llama-7B": 6.738, "Llama-2-7B": 6.738, "Llama-2-70B": 68.977, "Qwen3-8B": 8.191,
        "Vicuna-7B-v1.5-16K": 6.738, "Mistral-7B-v0.1": 7.242, "Mixtral-8x7B-v0.1": 46.703,
        "Llama-3.1-8B": 8.030, "Qwen2.5-7B": 7.616}, abs=1e-3)


def random_model(seed=0, **more):
    """A small random model with label maps of random channels: (model, label_maps, ds)."""
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48,
                 vocab_size=64, max_positions=256)
    model = Transformer(ModelConfig(**(shape | more))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3)
        elif ".attn." in name:  # biases, and norms of q and k
            parameter.normal_(1, 0.3)
    config = DSConfig(sparsity=4, min_tokens=4, label_bits=((8, 4),), dense_layers=1, dense_below=0,
                      sink=1, recent=2)
    channels = torch.randperm(16)[:8].expand(model.config.n_kv_heads, -1)
    zeros = torch.zeros(channels.shape)
    label_map = label_map_of(channels, zeros, zeros + 1, ((8, 4),))
    return model, [label_map] * 3, config


def decode_step(size=110, batch=1, sparse=True, seed=0, more={}, shape={}, **sampling):
    """A DecodeStep of random_model, whose texts do not end and whose cache has `size` tokens."""
    model, maps, config = random_model(seed, eos_ids=(), **shape)
    config = replace(config, **more) if sparse else None
    cache = KVCache(model.config, batch, size, DEVICE, torch.float32, config, maps)
    return decode.DecodeStep(model.to(DEVICE), cache, **sampling)


@pytest.mark.parametrize("shape", [
    {}, {"sliding_window": 24}, {"n_experts": 4, "experts_per_token": 2},
    {"qkv_bias": True, "sliding_window": 24, "full_layers": (0, 2)}, {"qk_norm": True}
], ids=["llama", "window", "mixtral", "qwen2-windows", "qwen3"])
@pytest.mark.parametrize("sparse, below", [(False, 0), (True, 0), (True, 64)],
                         ids=["dense", "sparse", "mixed"])
def test_ragged_batch_gives_what_each_prompt_gives_alone(sparse, below, shape):
    """Mixed: short prompts attend to all their tokens, and the long one to few."""
    prompts = [[1] + torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist()
               for n in (70, 5, 33)]

    def run(batch):
        more = dict(dense_below=below)
        step = decode_step(110, len(batch), sparse, 4, more=more, shape=shape)
        return decode.generate(step, batch, 30).token_ids

    together = run(prompts)
    assert together == [run([prompt])[0] for prompt in prompts]
    assert max(map(len, together)) == 30


def test_tokens_attended_to_in_sparse_steps_are_counted():
    """By the kernels; a short row of a mixed batch attends to all its tokens."""
    step = decode_step(60, 2, more=dict(impl="triton", dense_below=20))
    cache = step.cache
    scratch = cache.layers[0].workspace or ds.Workspace(2, 4, 2, 16, 60, DEVICE, cache.ds, splits=1)
    for layer in cache.layers:
        layer.workspace = scratch
    for n in (2, 1):  # begin() counts anew
        decode.generate(step, [[1] + list(range(3, 32)), [1, 5, 9, 20, 7]], n)
        wanted = [cache.ds.budget(length + i) for length in (30, 5) for i in range(n)]
        assert wanted[n:] == list(range(5, 5 + n)) and wanted[0] == 8
        found = cache.statistics()["tokens_attended"]
        assert found == pytest.approx(sum(wanted) / len(wanted), abs=0.3), "ties may add some"


DECODES = {  # with dim 40, ffn_dim 36 and a vocabulary of 65: no multiples of any block
    "mha": dict(B=1, n_heads=2, n_kv_heads=2),
    "gqa": dict(B=3, n_heads=4, n_kv_heads=2),
    "gqa-128": dict(B=16, n_heads=3, n_kv_heads=1, head_dim=128),
    "window": dict(B=3, n_heads=1, n_kv_heads=1, head_dim=128, sliding_window=9),
    "tied": dict(B=5, n_heads=3, n_kv_heads=3, tie_embeddings=True),
    "experts": dict(B=3, n_heads=2, n_kv_heads=1, n_experts=4, experts_per_token=2),
    "experts-int8-many": dict(B=17, n_heads=1, n_kv_heads=1, n_experts=5, experts_per_token=3,
                              dim=264, ffn_dim=272, quantize=True),
    "bias": dict(B=3, n_heads=7, n_kv_heads=1, qkv_bias=True),
    "head-norms": dict(B=3, n_heads=2, n_kv_heads=1, head_dim=128, qk_norm=True),
    "head-norms-two-heads-a-program": dict(B=17, n_heads=3, n_kv_heads=1, head_dim=16, qk_norm=True,
                                           dim=280),
    # steps of BLOCK_K, the last not full
    "several-steps": dict(B=17, n_heads=2, n_kv_heads=1, dim=280, ffn_dim=528),
    "int8": dict(B=3, n_heads=7, n_kv_heads=1, qkv_bias=True, quantize=True),
    "int8-in-parts": dict(B=3, n_heads=4, n_kv_heads=2, dim=512, ffn_dim=1280, quantize=True),
    "int8-many": dict(B=17, n_heads=2, n_kv_heads=1, dim=528, ffn_dim=1040, quantize=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16 if GPU else torch.float32],
                         ids=str)
@pytest.mark.parametrize("case", DECODES.values(), ids=DECODES)
@torch.inference_mode()
def test_decode_kernels_equal_the_blocks(case, dtype):
    """Logits and cache of a ragged step, against the blocks' own forward in fp32; the cache is
    written where it should be."""
    shape = dict(dim=40, n_layers=2, head_dim=64, ffn_dim=36, vocab_size=65) | case
    B, quantize = shape.pop("B"), shape.pop("quantize", False)
    model = random_model(**shape)[0].to(DEVICE, dtype)
    for name, parameter in model.named_parameters():
        parameter.mul_(0.3) if parameter.ndim > 1 else parameter.normal_(1, 0.3)
    if quantize:
        model.quantize()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (B,), generator=generator).to(DEVICE)
    lens = torch.tensor([7 * b % 40 for b in range(1, B)] + [0], dtype=torch.int32, device=DEVICE)
    size = B, shape["n_kv_heads"], 40, 2, shape["head_dim"]
    past = torch.randn(*size, generator=generator).to(dtype)

    logits, caches = {}, {}
    runs = {"exact": ("torch", torch.float32), "torch": ("torch", dtype)}
    for name in ("triton", "again") if GPU else ("triton",):  # the interpreter repeats itself
        runs[name] = "triton", dtype
    for name, (impl, run) in runs.items():
        cache = KVCache(model.config, B, 40, DEVICE, run)
        cache.seq_lens.copy_(lens)
        for layer in cache.layers:
            layer.kv.copy_(past)
        here = copy.deepcopy(model).to(run)
        logits[name] = poisoned(lambda: here.decode(tokens, cache, impl=impl))
        caches[name] = torch.stack([layer.kv for layer in cache.layers])  # [layers, *size]
        assert torch.equal(cache.seq_lens, lens + 1)

    new = (torch.arange(40, device=DEVICE) == lens[:, None])[None, :, None, :, None, None]
    new = new.expand_as(caches["exact"])
    for got in (logits, caches):
        assert not GPU or torch.equal(got["triton"], got["again"]), "other bits"
    kept = [caches[name].masked_fill(new, 0) for name in ("triton", "torch")]
    assert torch.equal(*kept), "wrote elsewhere"
    allowance = 2 if GPU else 4  # the interpreter rounds to bfloat16 towards zero
    for got in (logits, {name: kv[new] for name, kv in caches.items()}):
        error = {name: relative_error(got[name], got["exact"]) for name in ("triton", "torch")}
        assert error["triton"] <= allowance * error["torch"] + 1e-5


@torch.inference_mode()
def test_normed_heads_of_any_size_are_decoded(monkeypatch):
    """On a GPU the kernels were called, which take powers of two."""
    model = random_model(qk_norm=True, head_dim=48)[0].half()
    cache = KVCache(model.config, 1, 8, "cpu", torch.float16)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    model.decode(torch.tensor([1]), cache)


@pytest.mark.parametrize("tiles", [dict(BLOCK_N=16, BLOCK_K=32),
                                   dict(BLOCK_N=64, BLOCK_K=64, STAGES=2)], ids=["small", "large"])
def test_fused_linear_layers_do_not_depend_on_their_tiles(tiles):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, torch.float16)

    table, gain, w13, w2 = normal(9, 96), normal(96), normal(2 * 70, 96), normal(96, 70) / 8
    outs = []
    for more in ({}, tiles):
        residual = Residual(table, gain, 1e-5)
        residual.add(residual.swiglu(w13, **more), w2, gain, **more)
        outs += [residual.x, residual.logits(w13, **more)]
    for got, want in zip(outs[2:], outs):
        assert relative_error(got, want) < 1e-3
    normed = F.rms_norm(table.float(), (96,), gain.float(), 1e-5)
    gate, up = (normed @ w13.float().T).chunk(2, -1)
    assert relative_error(outs[0], table + (F.silu(gate) * up) @ w2.float().T) < 2e-3


def test_int8_codes_are_widened_exactly():
    codes = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
    gain = torch.ones(256, dtype=torch.bfloat16, device=DEVICE)
    residual = Residual(0 * gain[None], gain, 1e-5)
    residual.add(torch.eye(1, 32).to(gain), codes[:, None].repeat(1, 32), gain, scale=gain.float())
    assert torch.equal(residual.x[0].float(), codes.float())


@torch.inference_mode()
def test_experts_of_a_sequence_do_not_depend_on_the_batch():
    """To the bit, whoever else is in it, whichever of the experts they choose."""
    model, *_ = random_model(n_experts=6, experts_per_token=2, dim=40, ffn_dim=72)
    ffn = model.to(DEVICE, torch.float16).layers[0].ffn
    x, gain = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    found = []
    for rows in (range(7), [3], [6, 3, 3]):
        residual = Residual(x[list(rows)], gain[0], 1e-5)
        ffn.decode(residual, gain[1])
        found.append(residual.x)
    want = x + ffn(F.rms_norm(x, (40,), gain[0], 1e-5))
    assert relative_error(found[0], want) < 2e-3
    assert torch.equal(found[1][0], found[0][3])
    assert torch.equal(found[2], found[0][[6, 3, 3]])


def test_a_fused_step_begins_where_torch_does():
    """Frozen rows stay where they are; RoPE's tables are those of far positions, too."""
    model = random_model(dim=40, head_dim=64)[0].to(DEVICE)
    lens = torch.tensor([0, 5, 8191, 131071], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([3, 1, 4, 1], device=DEVICE)
    grows = [None, torch.tensor([True, False, True, False], device=DEVICE)]
    for grow in (grows[0], grows[1], grows[1].int()):
        found = lens.clone() + (grow is not None)
        wanted = found + (1 if grow is None else grow)
        residual = Residual(model.embed.weight, model.norm.weight, 1e-5, tokens, seq_lens=found,
                            grow=grow, frequencies=model.frequencies)
        assert torch.equal(found, wanted)
        assert torch.equal(residual.x, model.embed(tokens))
        for table, exact in zip(residual.rope, model.rope(wanted[:, None] - 1)):
            torch.testing.assert_close(table, exact.flatten(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ends", [[], [7], [2, 9000]], ids=str)
def test_the_likeliest_token_as_torch_chooses_it(ends):
    logits = torch.randn(6, 9001).to(DEVICE, torch.bfloat16)
    for b, likeliest in enumerate([[7], [2, 8999], [9000], [0], [5000, 5001], [7]]):
        logits[b, likeliest] = 9.0  # of equal ones the first
    ends = torch.tensor(ends, dtype=torch.long, device=DEVICE)
    tokens = torch.arange(100, 106, device=DEVICE)
    running = torch.tensor([True] * 5 + [False], device=DEVICE)
    sampled = torch.zeros_like(tokens)
    wanted = torch.tensor([7, 2, 9000, 0, 5000, 7], device=DEVICE)
    still = running & (wanted[:, None] != ends).all(1)
    next_tokens = torch.where(still, wanted, tokens)
    choose_likeliest(logits, sampled, tokens, running, ends)
    assert torch.equal(sampled, wanted) and torch.equal(running, still)
    assert torch.equal(tokens, next_tokens)


def test_int8_weights_are_the_nearest_codes():
    linear = Linear(50, 5000)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(5000, 1) * 100)
        linear.weight[7] = 0
    exact = linear.weight.detach().clone()
    linear.requires_grad_(False).quantize()
    assert linear.weight.dtype == torch.int8 and linear.weight.abs().max() == 127
    half = linear.scale[:, None] / 2
    assert ((linear.rows(5000, torch.float32) - exact).abs() <= half * 1.0001).all()
    x = torch.randn(3, 50)
    want = torch.nn.functional.linear(x, linear.rows(5000, torch.float32))
    torch.testing.assert_close(linear(x), want)
    assert linear.rows(3, torch.bfloat16).dtype == torch.bfloat16


def test_a_checkpoint_loaded_in_int8(tmp_path):
    """Its bytes, and that it is the model with its weights rounded; memory_need knows its size."""
    whole = load_model(TINY, "cpu", torch.float32)
    model = load_model(TINY, "cpu", torch.float32, "int8")
    whole.quantize()
    same = zip(whole.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in same)
    assert model.dtype == torch.float32 and model.embed.weight.dtype == torch.float32
    experts, *_ = random_model(n_experts=4, experts_per_token=2)
    experts.quantize()
    assert experts.layers[0].ffn.w13.weight.dtype == torch.int8
    for model in (model, experts):
        need = memory_need(model.config, 1, 10, torch.float32, quantize="int8")
        assert need["weights"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@torch.inference_mode()
def test_decode_steps_of_a_cuda_graph_equal_those_launched_alone():
    """Kernels that overlap, in one graph over all layers, sparse and dense, while lengths grow."""
    model, _, config = random_model(dim=512, head_dim=64, ffn_dim=1024)
    maps = [first_channels(2, 8, ((8, 4),))] * 3
    model = model.to(DEVICE, torch.bfloat16)
    for parameter in model.parameters():
        parameter.mul_(0.2) if parameter.ndim > 1 else None
    prompts = [torch.arange(n).remainder(64).tolist() for n in (2500, 7, 1100)]
    caches = [KVCache(model.config, 3, 3000, DEVICE, torch.bfloat16, config, maps) for _ in "ab"]
    for cache in caches:
        model.prefill(prompts, cache)
    tokens = torch.tensor([5, 6, 7], device=DEVICE)
    model.decode(tokens, caches[0])
    caches[0].seq_lens -= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model.decode(tokens, caches[0])
    for _ in range(20):
        graph.replay()
        torch.testing.assert_close(out, model.decode(tokens, caches[1]), atol=0, rtol=0)
        tokens.copy_(out.argmax(-1))


def test_compiled_blocks_equal_eager_ones_and_are_compiled_once_for_all_layers():
    from torch._dynamo.utils import counters

    eager, step = decode_step(90), decode_step(90)
    prompts = [[1] + list(range(3, 3 + n)) for n in (50, 33)]
    want = [decode.generate(eager, [prompt], 4).token_ids for prompt in prompts]
    step.model.compile_blocks()
    counters.clear()
    assert [decode.generate(step, [prompt], 4).token_ids for prompt in prompts] == want
    assert counters["stats"]["unique_graphs"] == 4, "of prefill and decode, before and behind it"


def test_compiled_blocks_leave_experts_to_torch(monkeypatch):
    seen, forward = [], MoEFeedForward.forward

    def watched(self, x):
        seen.append(torch.compiler.is_compiling())
        return forward(self, x)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(MoEFeedForward, "forward", watched)
    model, *_ = random_model(n_experts=4, experts_per_token=2, dim=40, ffn_dim=72)
    tokens = torch.arange(30)[None]
    want = model(tokens)
    model.compile_blocks()
    torch.testing.assert_close(model(tokens), want)
    assert len(seen) == 6 and not any(seen), "three layers, twice"


def test_memory_need_counts_what_is_allocated():
    model, maps, config = random_model()
    need = memory_need(model.config, 3, 70, torch.float32, config)
    cache = KVCache(model.config, 3, 70, DEVICE, torch.float32, config, maps)
    assert need["weights"] == sum(p.nbytes for p in model.parameters())
    assert need["KV cache"] == cache.kv_bytes() and need["labels"] == cache.label_bytes() > 0
    scratch = vars(ds.Workspace(3, 4, 2, 16, 70, torch.device(DEVICE), config)).values()
    assert need["workspace"] == sum(x.nbytes for x in scratch if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("cache_type", [KVCache, OffloadCache], ids=["gpu", "offload"])
def test_the_plan_has_what_is_refused_with_less(cache_type):
    config = PRESETS["Mixtral-8x7B-v0.1"]
    found = plan.cell(config, 1, "int8", 2, 16384)
    gib = float(re.fullmatch(r"(.+) or (.+) [+] .+", found)[1 + (cache_type is OffloadCache)])

    def check(gib):
        check_memory(gib * 2**30, config, 2, 16384, torch.bfloat16, DSConfig(), cache_type, "int8")

    check(gib + 0.1)
    with pytest.raises(ValueError, match="GiB of GPU memory"):
        check(gib - 0.1)
    assert plan.cell(config, 3, None, 1, 10) == plan.cell(config, 1, None, 1, 32769) == "-"


@pytest.mark.parametrize("check, gib, batch, length, message", [
    (check_memory, 80, 14, 16500, "=16500 for a batch of 14 needs 13.* 80.0 are free"),
    (generate.check_host_memory, 50, 4, 32768, "a batch of 4 needs 60.0 GiB of host memory")
], ids=["gpu", "host"])
def test_too_little_memory_is_refused_with_what_would_fit(check, gib, batch, length, message):
    def fits(gib, batch, length):
        check(int(gib * 2**30), PRESETS["Llama-2-7B"], batch, length, torch.bfloat16, DSConfig())

    fits(2 * gib, batch, length)
    with pytest.raises(ValueError, match=message) as error:
        fits(gib, batch, length)
    found = re.search(r"--max_seq_length (\d+) or a batch of (\d+) would fit", str(error.value))
    shorter, smaller = map(int, found.groups())
    fits(gib, batch, shorter)
    fits(gib, smaller, length)
    for too_much in ((batch, shorter + 1), (smaller + 1, length)):
        with pytest.raises(ValueError):
            fits(gib, *too_much)
    if check is check_memory:
        with pytest.raises(ValueError, match="no batch of this model fits"):
            fits(8, 1, 100)
    else:
        assert 0 < host_memory.free_host_bytes() < 2**50
        host_memory.wait_for_memory(1)
        with pytest.raises(ValueError, match="GiB of host memory are wanted next"):
            host_memory.wait_for_memory(2**50, seconds=0.2)


# ---------------------------------------------------------------- generate


def test_end_of_text_stops_one_sequence_and_the_rest_go_on():
    step, prompts = decode_step(40, 2, sparse=False), [[1, 5, 9], [1, 7]]
    free = decode.generate(step, prompts, 20).token_ids
    stop = next(token for token in free[0] if token not in free[1])
    object.__setattr__(step.model.config, "eos_ids", (stop,))
    stopped = decode.generate(step, prompts, 20).token_ids
    assert stopped == [free[0][: free[0].index(stop)], free[1]]


def test_samples_have_the_softmax_s_frequencies_and_respect_top_k():
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0], device=DEVICE), 100_000
    assert torch.equal(decode.sample(logits[None]), logits.argmax(-1, keepdim=True))
    for top_k in (None, 3):
        generator = torch.Generator(DEVICE).manual_seed(0)
        drawn = decode.sample(logits.expand(n, -1), 0.7, top_k, generator).cpu()
        p = (logits.cpu() / 0.7)[:top_k].softmax(0)
        deviation = (p * (1 - p) / n).sqrt()
        found = drawn.bincount(minlength=len(p)) / n
        assert len(found) == len(p) and ((found - p).abs() <= 5 * deviation + 1e-9).all()


def test_generation_repeats_itself_with_a_seed_and_only_then():
    prompts = [[1, 5, 9, 20], [1, 7]]
    step = decode_step(60, 2, temperature=1.0)
    first, again = (decode.generate(step, prompts, 20).token_ids for _ in range(2))
    step.seed = 1
    assert first == again != decode.generate(step, prompts, 20).token_ids
    assert first == decode.generate(decode_step(60, 2, temperature=1.0), prompts, 20).token_ids


def test_frozen_rows_repeat_their_step_to_no_effect():
    """What a graph's warm-up and a batch with ended sequences rely on: the cache stays as it is,
    bit by bit, labels included."""
    step = decode_step(60, 3)
    cache = step.cache

    def contents():
        tensors = [x for layer in cache.layers for x in (layer.kv, layer.labels) if x is not None]
        return [x.clone() for x in tensors]

    step.model.prefill([[1, 5, 9, 20], [1], [1, 7]], cache)
    step.start([3, 4, 5])
    step.run(True)
    lengths, before, sampled = cache.seq_lens.tolist(), contents(), step.sampled.clone()
    step.tokens.copy_(torch.tensor([3, 4, 5]))  # the inputs of that step
    step.running.copy_(torch.tensor([False, True, False]))
    step.run(True)
    assert cache.seq_lens.tolist() == [lengths[0], lengths[1] + 1, lengths[2]]
    assert torch.equal(step.sampled[::2], sampled[::2]) and step.tokens.tolist()[::2] == [3, 5]
    for x, y in zip(before, contents()):
        assert torch.equal(x[::2], y[::2]) and not torch.equal(x[1], y[1])


@pytest.mark.parametrize("reader", ["streaming", "stopping", "neither"])
def test_tokens_are_read_one_step_behind_or_at_the_end(reader, monkeypatch):
    """Step i + 1 has begun before the host asks for the tokens of step i."""
    step = decode_step(40, 2)
    object.__setattr__(step.model.config, "eos_ids", (99,) if reader == "stopping" else ())
    order, run, timestamp = [], step.run, decode.timestamp
    monkeypatch.setattr(step, "run", lambda sparse: (order.append("run"), run(sparse)))

    def recorded(device):
        event = timestamp(device)
        wait, number = event.synchronize, order.count("run") - 1
        noted = {"synchronize": lambda: (order.append(number), wait())}
        return SimpleNamespace(**{"elapsed_time": event.elapsed_time} | vars(event) | noted)

    monkeypatch.setattr(decode, "timestamp", recorded if not GPU else timestamp)
    streamed = [[], []]
    on_token = (lambda b, token: streamed[b].append(token)) if reader == "streaming" else None
    result = decode.generate(step, [[1, 5, 9], [1, 7]], 5, on_token=on_token)
    assert [len(ids) for ids in result.token_ids] == [5, 5]
    assert streamed == (result.token_ids if reader == "streaming" else [[], []])
    at_the_end = ["run"] * 5 + [0, 1, 2, 3, 4]
    behind = ["run", "run", 0, "run", 1, "run", 2, "run", 3, 4]
    assert GPU or order == (at_the_end if reader == "neither" else behind)


def test_short_sequences_are_decoded_dense_and_leave_labels():
    """Below dense_below a sparse configuration gives what dense gives; the labels written meanwhile
    serve the sparse steps after."""
    prompt = [1] + torch.randint(3, 64, (19,), generator=torch.Generator().manual_seed(0)).tolist()
    dense = decode.generate(decode_step(100, sparse=False), [prompt], 60)
    steps = {below: decode_step(100, more=dict(dense_below=below)) for below in (0, 50, 1000)}
    found = {below: decode.generate(step, [prompt], 60) for below, step in steps.items()}
    assert found[1000].token_ids == dense.token_ids and found[0].token_ids != dense.token_ids
    assert found[50].token_ids[0][:30] == dense.token_ids[0][:30]
    assert found[50].token_ids != dense.token_ids
    read = {below: result.kv_bytes_per_step for below, result in found.items()}
    assert read[0] < read[50] < read[1000] == dense.kv_bytes_per_step
    assert dense.kv_bytes_per_step == dense.dense_kv_bytes_per_step

    cache = steps[50].cache
    layer, live = cache.layers[1], int(cache.seq_lens)
    positions = torch.arange(100, device=DEVICE, dtype=torch.int32)[None]
    written = torch.zeros_like(layer.labels)
    ds.label_ref(layer.kv[..., 0, :], positions, written, layer.label_map)
    labels, wanted = (ds.unpack(x.transpose(2, 3), layer.label_map)[:, :, :live]
                      for x in (layer.labels, written))
    assert live == 20 + 59 and (labels != wanted).float().mean() < 0.01, "labels are missing"


@pytest.mark.parametrize("sparse, more", [(False, {}), (True, {}), (True, {"dense_below": 30})],
                         ids=["dense", "sparse", "both"])
def test_generation_equals_a_plain_loop_of_decode(sparse, more):
    """On a GPU: graphs, captured in the middle of it all, against eager steps."""
    prompts, n = [[1, 5, 9, 20], [1] + list(range(3, 20))], 25
    step, plain = (decode_step(60, 2, sparse, more=more) for _ in "ab")
    got = decode.generate(step, prompts, n).token_ids
    assert step.cache.seq_lens.tolist() == [len(prompt) + n - 1 for prompt in prompts]

    plain.model.prefill([prompt[:-1] for prompt in prompts], plain.cache)
    tokens, want = torch.tensor([prompt[-1] for prompt in prompts], device=DEVICE), []
    for length in range(len(prompts[1]), len(prompts[1]) + n):
        view = plain.cache if plain.cache.sparse_at(length) else plain.cache.all_tokens()
        want.append(tokens := plain.model.decode(tokens, view).argmax(-1))
    assert got == torch.stack(want, 1).tolist()
    for mine, theirs in zip(step.cache.layers, plain.cache.layers):
        torch.testing.assert_close(mine.kv, theirs.kv, atol=1e-4, rtol=1e-4)
    another = decode.generate(step, [[7]] * 2, 3, start=10)  # turn, on the same graphs
    assert another.token_ids != got and step.cache.seq_lens.tolist() == [13, 13]


def test_compiling_only_ends_with_its_block():
    run = JITFunction.run
    with pytest.raises(ZeroDivisionError), decode.compiling_only():
        assert JITFunction.run is not run
        1 / 0
    assert JITFunction.run is run
    with decode.compiling_only():
        assert JITFunction.run is not run


def test_programs_start_without_the_compiler():
    """Its modules take seconds to import."""
    code = "import bench, calibrate, eval, generate, sys; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "False\n"


def test_forced_logits_are_those_of_generation():
    step, prompts = decode_step(60, 2), [[1, 5, 9, 20], [1, 7]]
    texts = decode.generate(step, prompts, 20).token_ids
    forced = torch.stack(list(decode.forced_logits(step, prompts, texts)))  # [steps, B, vocab]
    assert forced.argmax(-1).T.tolist() == texts


# ---------------------------------------------------------------- calibrate


@pytest.fixture
def tiny_copy(tmp_path):
    """A writable copy of the embedded checkpoint without its channels."""
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def channel_sums(seed, tokens=300):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, 4, 1, 16, generator=generator) * 3
    return calibrate.channel_sums(
        scale * torch.randn(1, 4, tokens, 16, generator=generator),
        torch.randn(1, 2, tokens, 16, generator=generator) * scale[:, ::2] + 1,
        *(torch.full((1, 1, tokens, 8), value) for value in (1.0, 0.0)))  # at position 0


def test_every_calibration_sample_counts(tiny_copy, monkeypatch):
    """The paper's release overwrote its sums, so that only the last block of text counted."""
    def check(found, *more):
        first, last = seen[-2:]
        for name in ("qk", "kk", "tokens", "planes"):
            torch.testing.assert_close(found[name], first[name] + last[name])
        return rank(found, *more)

    seen, rank, sums = [], calibrate.rank_channels, calibrate.channel_sums
    monkeypatch.setattr(calibrate, "channel_sums", lambda *x: seen.append(sums(*x)) or seen[-1])
    monkeypatch.setattr(calibrate, "rank_channels", check)
    calibrate.calibrate(tiny_copy, samples=2, context=100)
    assert len(seen) == 14


def test_rankings_follow_their_statistics():
    sums = channel_sums(4)
    for method in ("q", "k", "qk"):
        ranked = calibrate.rank_channels(sums, method, None)
        assert (sums[method].gather(1, ranked).diff() <= 0).all()
    draws = [calibrate.rank_channels(sums, "random", torch.manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_planes_are_pairs_that_rope_turns_together():
    """c and c + D / 2, first of the plane that varies most among tokens not always attended."""
    q, k = torch.ones(1, 4, 90, 16), torch.randn(1, 2, 90, 16)
    k[..., 3] += 100.0
    k[..., 5] *= 3.0
    k[:, :, :4, 6] = k[:, :, -16:, 6] = 100.0
    covariance = calibrate.plane_covariance(q, k, DSConfig(), [90])
    channels = calibrate.rank_channels({"planes": covariance}, "planes", None)
    assert torch.equal(channels[:, 1::2], channels[:, ::2] + 8)
    assert (channels.sort()[0] == torch.arange(16)).all() and channels[:, 0].tolist() == [5, 5]


def test_a_group_s_heads_choose_planes_together():
    """However large one's scores are; not a head whose attention is on tokens attended anyway."""
    q, k = torch.zeros(1, 3, 90, 16), torch.randn(1, 1, 90, 16)
    q[0, 0, -1, 2], q[0, 1, -1, 3], q[0, 2, -1, 4] = 1.0, 0.01, 5.0
    k[0, 0, -1, 4] = 100.0
    covariance = calibrate.plane_covariance(q, k, DSConfig(), [90])[0].diagonal()
    assert covariance[4] < 1e-3 < 0.2 < covariance[3] / covariance[2] < 5


def test_planes_that_cancel_are_left_out_together():
    covariance = torch.block_diag(torch.tensor([[0.9, -1.2], [-1.2, 1.8]]), torch.eye(6))
    assert calibrate.planes_by_covariance(covariance[None])[0, -2:].tolist() == [1, 0]


def test_calibration_of_the_tiny_model(tiny_copy, capsys):
    """On text that it was not fitted to, and past its context, labels hold nearly the attention of
    exact scores, and more than random channels."""
    held = {}
    for method in ("planes", "random"):
        calibrate.calibrate(tiny_copy, method=method, samples=2, context=600)
        told = capsys.readouterr().out.splitlines()
        assert "past 600" in told[1] and "held out" in told[-1] and "1200 tokens" in told[-1]
        held[method] = [float(value) for value in told[-1].split()[1:6]]
        labels, exact, labels_past, exact_past, _ = held[method]
        assert 0.2 < labels <= exact < 1 and 0.2 < labels_past <= exact_past < 1
    (planes, exact, *_), (chance, *_) = held["planes"], held["random"]
    assert planes > 0.93 * exact and planes > chance
    with safe_open(tiny_copy / "channels.safetensors", "pt") as file:
        provenance, agreement = file.metadata(), file.get_tensor("agreement")
    assert agreement[0] == 0 and (agreement[1:] > 0.05).all() and provenance["method"] == "random"
    assert {"checkpoint", "text_sha256", "samples", "tokens", "date"} <= set(provenance)


@pytest.mark.parametrize("prefix", [[1], []], ids=["bos", "no-bos"])
def test_windows_of_text_are_full_and_apart(prefix):
    """Of calibration, with one held out, and of perplexity; models without a BOS were refused."""
    tokenizer = SimpleNamespace(prefix=prefix, encode=lambda text, special: list(range(2, 1000)))
    windows = asked.text_windows(tokenizer, ["", ""], 100)
    assert len(windows) == 18 and windows[1] == prefix + list(range(102, 202))
    assert windows[9] == windows[0] == prefix + list(range(2, 102))
    for samples, longest in ((5, 100), (4, 180), (100, 200)):
        windows, held_out = calibrate.calibration_windows(tokenizer, "", samples, 100, longest)
        assert len(windows) == min(samples, 8 if prefix else 7) and held_out.shape == (1, longest)
        assert all(window.shape == (1, 100) for window in windows)
        tokens = torch.cat([*windows, held_out], 1)
        n_text = tokens.numel() - (len(windows) + 1) * len(prefix)
        assert len(tokens[tokens > 1].unique()) == (tokens > 1).sum() == n_text
    with pytest.raises(ValueError, match="the text has 998 tokens: at least 1200 are needed"):
        calibrate.calibration_windows(tokenizer, "", 4, 400, 400)


# ---------------------------------------------------------------- host_memory and offload

RAGGED = [[1] + list(range(3, 3 + n)) for n in (50, 5, 33)]
PACKS = {"torch": host_memory.pack_ref, "triton": host_memory.pack}


def all_rows(host, impl):
    """K and V of HostRows, unpacked: [B, HKV, S, 2, D]."""
    if host.tops is None:
        return host.kv
    shape = host.kv.shape
    if impl == "torch":
        every = [x.flatten() for x in torch.meshgrid(*map(torch.arange, shape[:3]), indexing="ij")]
        return host_memory.unpack_ref(host, *every).view(shape)
    rows = torch.empty(shape, dtype=torch.bfloat16, device=host.tops.device)
    for b in range(len(rows)):
        host_memory.unpack(host.sequence(b), rows[b : b + 1])
    return rows.cpu()


@pytest.mark.parametrize("impl", PACKS)
def test_rows_pack_without_loss(impl):
    """Rows of each kind of exponents, written at first, again, and over others."""
    device = torch.device("cpu" if impl == "torch" else DEVICE)
    for B, HKV, S, D, T in ((2, 2, 70, 16, 9), (1, 2, 64, 24, 40), (1, 1, 50, 128, 20)):
        kv = host_memory.host_tensor((B, HKV, S, 2, D), torch.bfloat16, device)
        host, generator = host_memory.HostRows(kv, device, True), torch.Generator().manual_seed(0)
        truth = torch.zeros(B, HKV, S, 2, D, dtype=torch.bfloat16)
        ends = torch.tensor([T + 3 * b for b in range(B)], dtype=torch.int32)
        for _ in range(3):
            rows = torch.randn(B, HKV, T, 2, D, generator=generator).bfloat16()
            rows[:, :, ::4, 0, 3] *= 2**-20
            rows[0, 0, 2], rows[0, 0, 3, 1, 1], rows[0, 0, 4] = 0, math.inf, rows[0, 0, 4] * 1e-30
            # exponents may differ by 15, not by 16; 64 is the largest of K, and 65 is more
            rows[0, 0, 5:9], rows[0, 0, 5, 0, 1], rows[0, 0, 6, 1, 2] = 1, 2**-15, 2**-16
            rows[0, 0, 7:9, 0] = torch.tensor([2.0**64, 2.0**65])[:, None]
            PACKS[impl](host, rows.to(device), ends.to(device))
            for b, end in enumerate(ends.tolist()):
                truth[b, :, end - T : end] = rows[b]
            ends += 7
        found, lens = all_rows(host, impl), (ends - 7).tolist()
        assert (host.tops[0, 0, lens[0] - T :][5:9] < 0).tolist() == [False, True, False, True]
        as_is = [host.tops[b, :, :end] < 0 for b, end in enumerate(lens)]
        share = sum(x.sum().item() for x in as_is) / (sum(lens) * HKV)
        assert host.row_bytes((ends - 7).to(device)) == pytest.approx(3 * D + D * share)
        for b, end in enumerate(lens):
            at = b, slice(None), slice(3 * b, end)
            assert torch.equal(found[at].view(torch.int16), truth[at].view(torch.int16))
            assert 0 < as_is[b][:, 3 * b :].float().mean() < 1


def offload_step(cache_type=KVCache, size=250, batch=3, below=0, impl="auto", dtype=torch.float32,
                 **more):
    """A DecodeStep of random_model with this type of cache, whose texts do not end."""
    model, maps, config = random_model(**(dict(eos_ids=(), max_positions=4096) | more))
    config = replace(config, dense_below=below, impl=impl)
    cache = cache_type(model.config, batch, size, DEVICE, dtype, config, maps)
    return decode.DecodeStep(model.to(DEVICE, dtype), cache)


PREFETCHING = partial(OffloadCache, prefetch_heads=1)
OFFLOADS = {"mha": (dict(n_kv_heads=4), None), "gqa": ({}, 33),
            "window": (dict(sliding_window=40), None), "roomy": ({}, 95),
            "dense-at-first": (dict(below=80), None), "qwen3": (dict(qk_norm=True), None),
            "qwen2-windows": (dict(qkv_bias=True, sliding_window=60, full_layers=(2,)), None)}


@pytest.mark.parametrize("more, resident", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_generation_equals_that_of_the_gpu_s_cache(more, resident):
    """While tokens are evicted and fetched again, some of them ahead; packed or not. On a GPU the
    dense steps at first sum in another order than the GPU's cache does, which bfloat16 shows."""
    told = {}
    for name, dtype, packed in (("float32", torch.float32, True), ("whole", torch.bfloat16, False),
                                ("packed", torch.bfloat16, True)):
        want = decode.generate(offload_step(size=130, dtype=dtype, **more), RAGGED, 40)
        kind = partial(PREFETCHING, resident_tokens=resident, packed=packed)
        step = offload_step(kind, 130, dtype=dtype, **more)
        found = decode.generate(step, RAGGED, 40)
        assert found.token_ids == want.token_ids or GPU and dtype == torch.bfloat16
        # rows that attend to everything read labels all the same
        assert (found.kv_bytes_per_step > want.kv_bytes_per_step) == ("below" in more)
        layers = step.cache.offloaded()
        counts = sum(layer.resident.counts.sum((0, 1)) for layer in layers).tolist()
        counts = dict(zip(offload.COUNTS, counts))
        told[name] = step.cache.statistics()
        assert min(counts["fetched"], counts["prefetched"]) > 30 and counts["cut"] == 0
        assert step.cache.kv.shape[2] == len(layers) * step.cache.resident_tokens
    rows = (counts["fetched"] + counts["prefetched"]) / 40
    assert told["whole"]["pcie_bytes_per_step"] == pytest.approx(rows * 2 * 16 * 2)
    assert 0.1 < told["whole"]["hit_rate"] < 1 and 0 < told["whole"]["agreement"] < 1
    assert told["packed"]["hit_rate"] == told["whole"]["hit_rate"]
    share = told["packed"]["pcie_bytes_per_step"] / told["whole"]["pcie_bytes_per_step"]
    assert 0.74 < share < 0.9


def turned(*arguments, queries=Attention.queries):
    """The worst prediction there is: queries that point the other way."""
    return -queries(*arguments)


@torch.no_grad()
def compared(sides, steps):
    """Has DecodeSteps decode the same random tokens after RAGGED, on a GPU in CUDA graphs: yields
    their logits, step by step."""
    tokens, generator = torch.zeros(3, dtype=torch.long, device=DEVICE), torch.Generator()
    runs = []
    for side in sides:
        side.model.prefill(RAGGED, side.cache)
        lens = side.cache.seq_lens.clone()
        run = partial(side.model.decode, tokens, side.cache)
        if GPU:
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run()
            run = partial(lambda graph, out: (graph.replay(), out)[1], graph, out)
        side.cache.seq_lens.copy_(lens)
        side.cache.begin()
        runs.append(run)
    generator.manual_seed(0)
    for _ in range(steps):
        tokens.copy_(torch.randint(64, (3,), generator=generator))
        yield [run() for run in runs]


@pytest.mark.parametrize("ahead, useless", [(0, False), (1, False), (2, True)],
                         ids=["nothing-ahead", "ahead", "useless"])
def test_each_step_equals_that_of_the_gpu_s_cache(ahead, useless, monkeypatch):
    """With as few tokens resident as there may be, whatever is predicted; 2000 steps on a GPU."""
    if useless:
        monkeypatch.setattr(Attention, "queries", turned)
    size = 2060 if GPU else 120
    plain = offload_step(size=size)
    least = plain.cache.ds.budget(size)
    kind = partial(OffloadCache, prefetch_heads=ahead, resident_tokens=least)
    ours = offload_step(kind, size)
    for want, found in compared((plain, ours), size - 52):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    told = ours.cache.statistics()
    assert 0 < told["hit_rate"] < 0.95
    assert (told["prefetched_bytes_per_step"] > 0) == (ahead > 0)
    if ahead:
        assert told["agreement"] < 0.25 if useless else told["agreement"] > 0.35  # of chance: 0.25


def test_predicted_layers_attend_to_what_is_predicted(monkeypatch):
    """Behind a layer that changes nothing the prediction is the query itself; a wrong one is not
    found out, but where a row attends to all its tokens."""
    def step(cache_type, **more):
        step = offload_step(cache_type, size=90, **more)
        for linear in (step.model.layers[0].attn.wo, step.model.layers[0].ffn.w2):
            linear.weight.zero_()
        return step

    errors, agreements = [], []
    kinds = KVCache, PREFETCHING, partial(OffloadCache, mode="predicted", predictable=[1])
    for queries in (Attention.queries, turned):
        monkeypatch.setattr(Attention, "queries", queries)
        sides = [step(kind) for kind in kinds]
        pairs = [(found, want) for want, _, found in compared(sides, 30)]
        errors.append(max(relative_error(*pair) for pair in pairs))
        exact, told = (side.cache.statistics() for side in sides[1:])
        assert told["predicted_layers"] == 1 and told["agreement"] is None
        assert told["prefetched_bytes_per_step"] > exact["prefetched_bytes_per_step"]
        agreements.append(exact["agreement"])  # of two layers, one predicted by the query itself
    assert errors[0] < 1e-3 < 0.1 < errors[1] and agreements[1] < 0.2 < 0.6 < agreements[0]
    want, found = (decode.generate(step(kind, below=70), RAGGED, 16) for kind in kinds[::2])
    assert found.token_ids == want.token_ids


def test_defaults_of_what_is_predicted():
    """About the fastest of those measured, three of eight heads at most, none on a CPU; the layers
    that calibration found predictable: of the embedded model, those behind another's output."""
    for preset, size, heads in (("Llama-2-7B", 131072, 5), ("Llama-3.1-8B", 262144, 3),
                                ("Llama-3.1-8B", 524288, 2), ("Llama-2-7B", 4096, 12)):
        config, budget = PRESETS[preset], DSConfig().budget(size)
        assert offload.idle_heads(config, 1, budget, torch.bfloat16, "cuda") == heads
        assert offload.idle_heads(config, 1, budget, torch.bfloat16, "cpu") == 0
    for mode in offload.MODES:
        found = [offload.predictable_layers(TINY / "channels.safetensors", least, mode)
                 for least in (offload.MIN_AGREEMENT, 0)]
        assert found == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


class Late:
    """A SideStream that does nothing before it is waited for: the latest that a GPU may."""

    def __init__(self):
        self.given, self.done = [], 0

    def run(self, work, after=None):
        self.given.append(lambda: (self.wait(after), work()))
        return self, len(self.given)

    def wait(self, done):
        stream, number = done or (self, 0)
        while stream.done < number:
            stream.given[stream.done]()
            stream.done += 1

    def join(self):
        self.wait((self, len(self.given)))


@pytest.mark.skipif(GPU, reason="a GPU has streams")
@pytest.mark.parametrize("mode", offload.MODES)
def test_what_is_done_aside_is_waited_for(mode):
    early, late = (offload_step(partial(PREFETCHING, mode=mode), size=90) for _ in "ab")
    prefetch = late.cache.prefetch
    assert (prefetch.choosing is prefetch.fetching) == (mode == "exact")
    late.cache.side, prefetch.fetching = Late(), Late()
    for want, found in compared((early, late), 30):
        assert torch.equal(want, found)
    assert late.cache.side.done == 3 * 2 and prefetch.fetching.done == 30 * 2
    assert early.cache.statistics() == late.cache.statistics()


def test_offload_survives_other_texts_in_the_same_cache(monkeypatch):
    """A step that did not end, a step back, another turn and another prompt: what slots and
    predictions hold of the texts before is not taken for theirs."""
    step, plain = offload_step(PREFETCHING), offload_step()
    step.model.prefill(RAGGED, step.cache)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(offload.OffloadedLayer, "decode", lambda *_: 1 / 0)
        step.model.decode(torch.zeros(3, dtype=torch.long, device=DEVICE), step.cache)
    assert any(layer.predicted_from for layer in step.cache.offloaded())
    found = []
    for which in (step, plain):
        texts = decode.generate(which, RAGGED, 20).token_ids
        forced = decode.forced_logits(which, RAGGED, [text[::-1] for text in texts])
        logits = torch.stack(list(forced))
        turn = decode.generate(which, [[7, 9], [8, 4], [9]], 20, start=30).token_ids
        other = decode.generate(which, RAGGED[::-1], 10).token_ids
        found.append(((texts, turn, other), logits))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(GPU, reason="compiled kernels are set against those of the GPU's cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["whole", "packed"])
def test_offload_by_kernels_equals_the_reference(dtype, monkeypatch):
    """Selection, residency and attention, while tokens are evicted; what is chosen ahead is not
    overwritten before it was fetched."""
    monkeypatch.setattr(ds, "WARPS", 1)
    monkeypatch.setattr(offload, "fetch", partial(offload.fetch, programs=4))
    kind = partial(PREFETCHING, resident_tokens=12)
    steps = [offload_step(kind, 40, 2, impl=impl, n_kv_heads=1, dtype=dtype, n_layers=2)
             for impl in ("torch", "triton")]
    steps[1].cache.prefetch.fetching = Late()  # while the next layer's tokens are chosen
    found = [decode.generate(step, RAGGED[1:], 5).token_ids for step in steps]
    assert found[0] == found[1]
    a, b = (step.cache.layers[1] for step in steps)
    for name in ("counts", "slot_token"):
        assert torch.equal(getattr(a.resident, name), getattr(b.resident, name))
    assert torch.equal(a.labels, b.labels) and (a.resident.slot_token >= 0).all()
    within = 1e-4 if dtype == torch.float32 else 0.1
    kept = [all_rows(x.host, "torch") for x in (a, b)]
    torch.testing.assert_close(*kept, atol=within, rtol=within)


def test_pinning_is_undone_before_memory_is_given_back():
    """Its address may be another's by then."""
    memory, seen = host_memory.HostMap(-1, 2**16), []
    memory[0] = 7
    view = torch.frombuffer(memory, dtype=torch.uint8)
    start = f"{view.data_ptr():x}-"
    memory.unpin = lambda: seen.append(start in Path("/proc/self/maps").read_text())
    del memory, view
    assert seen == [True]


@pytest.mark.parametrize("sparse", [True, False], ids=["offloaded", "streamed"])
@torch.inference_mode()
def test_fused_layers_hand_their_k_and_v_to_the_host(sparse, monkeypatch):
    """Of a 16-bit model, whose K and V the linear layers' kernels write, not torch."""
    monkeypatch.setattr(ds, "WARPS", 1)  # the interpreter runs one after the other
    model, maps, config = random_model()
    model, logits, caches = model.to(DEVICE, torch.float16), [], []
    for cache_type in (KVCache, OffloadCache):
        settings = (config, maps) if sparse else ()
        cache = cache_type(model.config, 3, 64, DEVICE, torch.float16, *settings)
        model.prefill(RAGGED, cache)
        token = torch.tensor([5, 6, 7], device=DEVICE)
        logits.append(model.decode(token, cache, impl="triton"))
        caches.append(cache)
    assert logits[0].isfinite().all() and torch.equal(*logits)
    for want, got in zip(*(cache.layers for cache in caches)):
        for b, prompt in enumerate(RAGGED if hasattr(got, "host") else ()):
            new = b, slice(None), len(prompt)
            assert torch.equal(got.host.kv[new], want.kv[new].cpu()) and got.host.kv[new].any()


@pytest.mark.parametrize("impl, dtype", [
    (None, torch.float32), ("torch", torch.float32), ("torch", torch.bfloat16),
    ("triton", torch.bfloat16)], ids=["streamed", "whole", "packed", "packed by kernels"])
def test_prefill_in_chunks_and_turns_fills_any_cache(impl, dtype):
    """K, V and labels are those of a whole prefill; the second turn reads what the first wrote."""
    model, maps, config = random_model()
    device = DEVICE if impl == "triton" else "cpu"
    config = replace(config, impl=impl) if impl else None
    model, caches = model.to(device, dtype), []
    for kind, chunk in ((KVCache, 1000), (KVCache, 16), (OffloadCache, 16)):
        cache, told = kind(model.config, 3, 64, device, dtype, config, maps), []
        model.prefill(RAGGED, cache, chunk=chunk, progress=told.append)
        assert sum(told) == sum(map(len, RAGGED)) and min(told) >= 0
        model.prefill([[5, 6, 7]] * 3, cache, start=20, chunk=2)
        caches.append(cache)
    for whole, want, got in zip(*(cache.layers for cache in caches)):
        kv = all_rows(got.host, impl) if hasattr(got, "host") else got.kv.cpu()
        for b, prompt in enumerate(RAGGED):
            live = b, slice(None), slice(max(len(prompt), 23))
            assert torch.equal(kv[live], want.kv[live].cpu())
            if dtype == torch.float32:
                torch.testing.assert_close(whole.kv[live], want.kv[live], atol=1e-4, rtol=0)
        if want.labels is not None:  # a value between two codes may fall either way
            assert torch.equal(want.labels, got.labels)
            assert (whole.labels != want.labels).float().mean() < 0.03


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_streaming_equals_dense_decoding(packed):
    dtype = torch.bfloat16 if packed else torch.float32
    model, found = random_model(eos_ids=())[0].to(DEVICE, dtype), []
    # on a GPU the first says what is right: a layer of K and V lies there as in a buffer
    kinds = KVCache, partial(OffloadCache, packed=False), partial(OffloadCache, packed=True)
    for cache_type in kinds:
        cache = cache_type(model.config, 3, 90, DEVICE, dtype)
        step = decode.DecodeStep(model, cache)
        found.append(decode.generate(step, RAGGED, 38).token_ids)
    assert found[0] == found[1] == found[2]
    told, whole = cache.statistics(), 3 * 3 * 2 * 90 * 2 * 16 * dtype.itemsize
    assert told["host_bytes"] == whole and (cache.host[0].tops is not None) == packed
    assert told["pcie_bytes_per_step"] == pytest.approx(whole * (0.75 + 0.25 * told["as_is"]))
    assert 0 < told["as_is"] < 0.2 if packed else told["as_is"] == 1


def test_a_selection_past_the_cap_is_cut(monkeypatch):
    """Queries of zeros make all scores equal, and every token reaches the threshold: more than
    there are rows for. Those listed first are attended to, and the others counted."""
    steps = [offload_step(kind, 120) for kind in (KVCache, PREFETCHING)]
    for step in steps:
        for layer in step.model.layers:
            layer.attn.wqkv.weight.data[: 4 * 16] = 0
    cache = steps[1].cache
    cap, cut = cache.slots + cache.spare, 0

    def capped(*arguments, select=ds.select_ref):
        chosen = select(*arguments)
        return chosen & (chosen.cumsum(2) <= cap)

    def decode_capped(*arguments):  # of the cache on the GPU, by the reference
        with monkeypatch.context() as patch:
            patch.setattr(ds, "select_ref", capped)
            return ds.ds_decode(*arguments)

    monkeypatch.setattr(sys.modules["model"], "ds_decode", decode_capped)
    for i, (want, found) in enumerate(compared(steps, 40)):
        assert found.isfinite().all()
        cut += sum(2 * 2 * max(0, len(prompt) + i + 1 - cap) for prompt in RAGGED)
        if not GPU:
            torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert cache.statistics()["cut"] == cut > 0


def test_offload_holds_a_sixteenth_on_the_gpu():
    """Llama-2-7B at 128k, sparse from the first layer on or the third, by memory_need."""
    config, S = PRESETS["Llama-2-7B"], 131072
    full = memory_need(config, 1, S, torch.bfloat16)["KV cache"]
    bare = DSConfig(dense_layers=0, dense_below=0)
    need = memory_need(config, 1, S, torch.bfloat16, bare, OffloadCache)
    assert need["KV cache"] == pytest.approx(full / 16, rel=1e-3)
    assert need["staging"] == 2 * full / 32
    assert need["labels"] == full / 32 and need["slot maps"] < full / 75
    default = memory_need(config, 1, S, torch.bfloat16, DSConfig(), OffloadCache)
    assert default["KV cache"] == pytest.approx(full * (2 + 30 / 16) / 32, rel=1e-3)
    check_memory(40 * 2**30, config, 1, S, torch.bfloat16, DSConfig(), OffloadCache)
    with pytest.raises(ValueError, match="or keep K and V in host memory: --offload"):
        check_memory(40 * 2**30, config, 1, S, torch.bfloat16, DSConfig())


# ---------------------------------------------------------------- eval and items


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY, DEVICE, torch.bfloat16 if GPU else torch.float32), Tokenizer(TINY)


def decoder(tiny, size, config=None, method="ds", **more):
    maps = load_label_maps(TINY, tiny[0].config, config) if config else None
    return evaluation.Decoder(*tiny, size, config, maps, evaluation.METHODS[method], **more)


def measured(tiny, items, *settings):
    """What a row says of these items: of dense, then of each (DSConfig, method). Caches have no
    room for the last token: tiny's windows of 8,192 tokens behind a BOS fill its positions."""
    size = max(map(asked.size, items)) - 1
    dense = decoder(tiny, size)
    decoders = [dense, *(decoder(tiny, size, *setting) for setting in settings)]
    text = "answer" not in items[0] and "outputs" not in items[0]
    score, summary = ((evaluation.score_text, evaluation.of_text) if text else
                      (evaluation.score_answer, evaluation.of_answers))
    return [summary(found) for found in zip(*(score(item, dense, decoders) for item in items))]


def window_of_text(tiny, size=700, prefilled=0):
    windows = asked.text_windows(tiny[1], [builtin_text()[:20000]], size, limit=1)
    return [{"prompt": windows[0], "prefilled": prefilled}]


@needs_shared
def test_tiny_perplexity(tiny):
    """Held-out books, one of 223 windows; the card has the figures of all: dense 1.207, ratio
    1.007."""
    books = asked.read_texts(SHARED / "books-valid.jsonl.xz")
    window = asked.text_windows(tiny[1], books, 4096)[60]
    items = [{"prompt": window, "prefilled": 0}]
    dense, sparse = measured(tiny, items, (DSConfig(n_tokens=256), "ds"))
    assert dense["bits_per_byte"] < 1.21 and 1.0 < sparse["score"] / dense["score"] < 1.015


def test_tiny_retrieval_is_kept_at_a_sixteenth_and_breaks_with_too_little(tiny):
    items = asked.generated_items(tiny[1], asked.kv_document, [3000], 2)
    few = DSConfig(n_tokens=16, label_bits=((8, 4),), recent=4)
    found = measured(tiny, items, (DSConfig(), "ds"), (few, "ds"))
    assert [row["score"] for row in found[:2]] == [100, 100] and found[2]["score"] <= 50


def test_ds_rows_are_what_the_decode_step_gives(tiny):
    """The layer that is evaluated against the one that generates, over rows and one by one, and
    behind a prefill, dense's or its own."""
    config, window = DSConfig(n_tokens=40, dense_below=0), window_of_text(tiny, 200)[0]["prompt"]
    maps = load_label_maps(TINY, tiny[0].config, config)
    cache = KVCache(tiny[0].config, 1, 256, tiny[0].device, tiny[0].dtype, config, maps)
    tokens = torch.tensor(window[:200], device=DEVICE)
    want = [tiny[0].decode_rows(tokens[:150], cache)]
    want += [tiny[0].decode(token[None], cache) for token in tokens[150:]]
    ours, own, taken = (decoder(tiny, 256, config, rows=rows) for rows in (150, 50, 50))
    ours.start()
    found = list(ours.logits(window[:150]))
    ours.rows = 1
    found += list(ours.logits(window[150:200]))
    assert relative_error(torch.cat(found), torch.cat(want)) < (0.02 if GPU else 1e-5)
    dense = decoder(tiny, 256)
    for side, like in ((dense, None), (own, None), (taken, dense)):
        side.start(window[:150], like=like)
    for a, b in zip(own.sparse, taken.sparse):
        assert torch.equal(a.labels, b.labels) and a.labels.any()
    assert torch.equal(*(next(side.logits(window[150:200])) for side in (own, taken)))


def test_attended_tokens_are_counted(tiny):
    """The sum over positions of the budget, for every method, and what ties and whole pages add; of
    dense, of the live tokens."""
    config = DSConfig(sparsity=4, min_tokens=20, dense_below=0)
    window = window_of_text(tiny, 130)[0]["prompt"]
    budgets = sum(config.budget(length) for length in range(101, 131))
    for method in evaluation.METHODS:
        told = decoder(tiny, 130, config, method, rows=50)
        told.start(window[:100])
        list(told.logits(window[100:130]))
        more = {"quest": 15, "ds": 0.2, "paper": 0.2}.get(method, 0) * 30
        assert budgets <= told.attended() * (1 + 1e-9) <= budgets + more + 1e-3, method
    told = decoder(tiny, 130)
    told.start(window[:100])
    list(told.logits(window[100:130]))
    assert told.attended() == sum(range(101, 131)) and told.decoded == 30


def layer_of(method, config, k, v, HQ, label_map=None):
    """A sparse layer of eval.py over one sequence's k and v."""
    _, HKV, S, D = k.shape
    label_map = label_map or first_channels(HKV, 8, ((8, 4),))
    shape = ModelConfig(HQ * D, 1, HQ, HKV, D, 64, 50, S)
    cache = KVCache(shape, 1, S, DEVICE, torch.float32, config, [label_map])
    layer = evaluation.METHODS[method](cache.layers[0])
    layer.write(k, v, torch.arange(S, device=DEVICE)[None])
    return layer


def chosen_one_by_one(method, q, k, seq_len, n, config):
    """The tokens of one query head's row by the method's own definition; the last page is whole.
    q [D], k [S, D]."""
    newest = list(range(seq_len - min(n, config.recent), seq_len))
    forced = newest + [i for i in range(min(config.sink, n - len(newest))) if i not in newest]
    rest = [i for i in range(seq_len) if i not in forced]
    if method == "exact_topk":
        rest.sort(key=lambda i: (-(q @ k[i]).item(), i))
    elif method == "streaming":
        rest.sort(reverse=True)
    else:
        pages = [k[i : i + 16] for i in range(0, len(k), 16)]
        bounds = [torch.maximum(q * page.amax(0), q * page.amin(0)).sum().item() for page in pages]
        rest.sort(key=lambda i: (-round(bounds[i // 16], 4), i))
    best = rest[: n - len(forced)]
    if method == "quest":
        pages = {i // 16 for i in best}
        best = [i for i in rest if i // 16 in pages]
    return sorted(forced + best)


@pytest.mark.parametrize("method", ["exact_topk", "quest", "streaming"])
def test_baselines_choose_by_their_own_definition(method):
    config = DSConfig(sparsity=3, min_tokens=18, dense_layers=0, dense_below=0, recent=16, sink=2)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 100, 32, generator=generator).to(DEVICE)
    q = torch.randn(3, 2, 32, generator=generator).to(DEVICE)
    lens = torch.tensor([100, 77, 5], dtype=torch.int32, device=DEVICE)
    out = layer_of(method, config, k, v, 2).decode(q, lens)
    for (b, length), h in itertools.product(enumerate(lens.tolist()), range(2)):
        n = config.budget(length)
        chosen = chosen_one_by_one(method, q[b, h], k[0, h], length, n, config)
        assert n <= len(set(chosen)) <= n + 15 * (method == "quest")
        weights = (k[0, h, chosen] @ q[b, h] / 32**0.5).softmax(0)
        torch.testing.assert_close(out[b, h], weights @ v[0, h, chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["ds", "paper"])
def test_methods_by_kernels_equal_the_reference(method, monkeypatch):
    """Groups of two query heads, rows over one cache in runs of several lengths; what generates
    gives the same bits."""
    monkeypatch.setattr(ds, "WARPS", 8)
    p, found = Problem(shapes(B=1, HQ=4, HKV=2, S=150)), {}
    q = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lens = torch.tensor([150, 149, 60, 31, 1], dtype=torch.int32, device=DEVICE)
    for impl in ("torch", "triton"):
        config = replace(p.config, impl=impl, sparsity=3, min_tokens=18, dense_layers=0, recent=16)
        layer = layer_of(method, config, p.k, p.v, 4, p.map)
        layer.start(probed=True)
        layer.EVERY = 2
        outs = [layer.decode(q[:3], lens[:3]), layer.decode(q[3:], lens[3:])]
        found[impl] = [torch.cat(outs), layer.mass, layer.attended]
        assert layer.probes == 3
    for got, want in zip(found["triton"], found["torch"]):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    if method == "ds":
        k, v, labels = (x.expand(3, *x.shape[1:]) for x in (p.k, p.v, layer.labels))
        decoded = ds.ds_decode(q[:3], k, v, labels, p.map, lens[:3], config)
        assert torch.equal(outs[0], decoded)


def test_h2o_keeps_the_newest_and_the_most_attended():
    """Against the method told one token at a time, in dictionaries."""
    config = DSConfig(n_tokens=9, dense_layers=0, sink=0, recent=1)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 2, 40, 32, generator=generator).to(DEVICE) * 2
    q = torch.randn(40, 2, 32, generator=generator).to(DEVICE) * 2
    layer = layer_of("h2o", config, k, v, 2)
    lens = torch.arange(1, 41, dtype=torch.int32, device=DEVICE)
    out = torch.cat([layer.decode(q[part], lens[part]) for part in (slice(25), slice(25, None))])
    for h in range(2):
        got = {}
        for i in range(40):
            got[i] = 0.0
            if len(got) > 9:
                del got[min((j for j in got if j < i + 1 - 4), key=got.get)]
            weights = (k[0, h, list(got)] @ q[i, h] / 32**0.5).softmax(0)
            torch.testing.assert_close(out[i, h], weights @ v[0, h, list(got)], atol=1e-5, rtol=0)
            for j, weight in zip(got, weights.tolist()):
                got[j] += weight


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_methods_with_all_tokens_are_dense(tiny, method):
    """Behind a prefilled context, whose K, V and labels are dense's."""
    items = asked.generated_items(tiny[1], asked.lines_document, [300], 1)
    dense, found = measured(tiny, items, (DSConfig(n_tokens=290), method))
    assert found == dense and found["score"] == 100
    text = measured(tiny, window_of_text(tiny, 200, 150), (DSConfig(n_tokens=250), method))
    assert text[1]["score"] == pytest.approx(text[0]["score"], rel=1e-2 if GPU else 1e-4)
    assert text[1]["kl"] == pytest.approx(0, abs=1e-2 if GPU else 1e-5)


def test_what_is_lost_grows_as_the_budget_falls(tiny):
    """And no choice of as many tokens holds more attention than the best ones; the newest tokens
    alone lose more."""
    few = DSConfig(n_tokens=24)
    dense, most, some, little, exact, newest = measured(
        tiny, window_of_text(tiny, 400), (DSConfig(n_tokens=500), "ds"),
        (DSConfig(n_tokens=200), "ds"), (few, "ds"), (few, "exact_topk"), (few, "streaming"))
    assert dense["top1"] == 100.0 and dense["mass"] is None and abs(most["kl"]) < 1e-5
    assert most["kl"] < some["kl"] < little["kl"] < newest["kl"] and some["top1"] > little["top1"]
    assert most["mass"] == pytest.approx(1) and some["mass"] > little["mass"] > newest["mass"]
    assert exact["mass"] > little["mass"] - 0.01


@pytest.mark.parametrize("document, fact, question", [
    (asked.kv_document, '"{}": "{}"', 'under "(.*)"'),
    (asked.lines_document, "Line {} holds {}.", "line (.*) hold\\?"),
    (asked.passkey_document, "The safe of {} opens with {}.", "opens the safe of (.*)\\?")])
def test_generated_items_hide_the_answer_at_their_depth(tiny, document, fact, question):
    """And fill their length: another fact, of up to 75 tokens, would not fit. They are a function
    of the arguments."""
    text = builtin_text()
    items = asked.generated_items(tiny[1], document, [900, 1800], 5, text)
    assert items == asked.generated_items(tiny[1], document, [900, 1800], 5, text)
    assert [item["length"] for item in items] == [900] * 5 + [1800] * 5
    assert [int(5 * item["depth"]) for item in items] == [0, 1, 2, 3, 4] * 2
    for item in items:
        assert item["length"] - 100 < asked.size(item) <= item["length"]
        cut = item["prefilled"]
        parts = item["prompt"][:cut], item["prompt"][cut:], item["answer"]
        context, ask, answer = map(tiny[1].decode, parts)
        answer = answer.strip(' "')
        at = context.index(fact.format(re.search(question, ask).group(1), answer)) / len(context)
        assert abs(at - item["depth"]) < 0.2 and answer not in ask
    with pytest.raises(ValueError, match="lengths=20: too short"):
        asked.generated_items(tiny[1], document, [20], 1, text)


def asks(data=None, **more):
    """The arguments that items are made from."""
    return SimpleNamespace(**dict(data=data, limit=None, lengths=None, context=400,
                                  chat=False, last=None) | more)


def test_generated_ruler_items_fill_their_length_and_hold_their_answers(tiny):
    """Ten tasks; items are a function of the arguments."""
    _, items = asked.ruler_items(tiny[1], asks(lengths=[1500], limit=1))
    assert [item["task"] for item in items] == list(asked.RULER)
    assert items == asked.ruler_items(tiny[1], asks(lengths=[1500], limit=1))[1]
    numbers = {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4, "niah_multiquery": 4}
    for item in items:
        body, question = tiny[1].decode(item["prompt"]).rsplit("\n\n", 1)
        outputs, n = item["outputs"], numbers.get(item["task"], 1)
        assert 1300 < asked.size(item) <= 1500 and len(set(outputs)) == len(outputs) == n
        assert all(output in body and output not in question for output in outputs)
        if item["task"] in ("cwe", "fwe"):
            counts = Counter(re.findall("[a-z]+", body.split("\n\n", 1)[1])).most_common(n)
            assert {word for word, _ in counts} == set(outputs)


def test_published_items_are_read(tiny, tmp_path):
    """RULER's, with the chat template around the input and the answer's beginning behind, and
    key-value retrieval's, gzipped or not."""
    lines = [{"task": task, "max_seq_length": length, "input": f"{task} {length}?",
              "outputs": ["One", "two"], "answer_prefix": " They are: "}
             for task in ("vt", "niah_single_1") for length in (400, 800, 800)]
    path = tmp_path / "ruler.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, items = asked.ruler_items(tiny[1], asks(path, lengths=[800], limit=1))
    told = [(item["task"], item["length"], item["max_new_tokens"]) for item in items]
    assert told == [("vt", 800, 30), ("niah_single_1", 800, 128)]
    assert tiny[1].decode(items[0]["prompt"]).endswith("vt 800? They are:")
    chat = SimpleNamespace(chat=lambda said: [1, 2, len(said)], encode=tiny[1].encode)
    _, items = asked.ruler_items(chat, asks(path, chat=True))
    begun = tiny[1].encode("They are:", special=False)
    assert len(items) == 6 and items[0]["prompt"] == [1, 2, 1] + begun
    path.write_text(json.dumps(lines[0] | {"task": "qa_1"}) + "\n")
    with pytest.raises(ValueError, match="task qa_1 is none of niah_single_1"):
        asked.ruler_items(tiny[1], asks(path))

    records = {"ordered_kv_records": [["a", "b"], ["c", "d"]], "key": "c", "value": "d"}
    with gzip.open(tmp_path / "items.jsonl.gz", "wt") as file:
        file.write(3 * (json.dumps(records) + "\n"))
    _, items = asked.TASKS["kv_retrieval"](tiny[1], asks(tmp_path / "items.jsonl.gz", limit=2))
    assert len(items) == 2 and items[0]["depth"] == 0.5 and "length" not in items[0]
    prompt, answer = (tiny[1].decode(items[0][part]) for part in ("prompt", "answer"))
    assert prompt.endswith('"c": "d"}\n\nWhat is stored under "c"?\nValue:')
    assert answer.strip() == '"d"'


def test_greedy_continues_as_generate_does(tiny):
    prompt = tiny[1].encode("The sea was calm and the")
    step = decode.DecodeStep(tiny[0], KVCache(tiny[0].config, 1, 64, DEVICE, tiny[0].dtype))
    want = decode.generate(step, [prompt], 12).token_ids[0]
    told = decoder(tiny, 64)

    def greedy(done=lambda text: False):
        told.start(prompt[:-1])
        return told.greedy(prompt[-1:], 12, done)

    assert greedy() == tiny[1].decode(want)
    word = tiny[1].decode(want[:3]).split()[-1]
    assert greedy(lambda text: word in text).endswith(word), "where it is done"


def test_methods_and_budgets_are_read_and_named_alike():
    base = DSConfig(sink=2)
    for text, wanted in (("1/32", dict(sparsity=32)), ("n=64", dict(n_tokens=64)),
                         ("n=64,1/8", dict(sparsity=8, n_tokens=64))):
        config = evaluation.parse_budget(text, base)
        assert config == replace(base, **wanted)
        assert evaluation.parse_budget(evaluation.budget_name(config), base) == config
    for text, name, *labels in (("quest", "quest", None, None), ("paper", "paper", "qk", 4),
                                ("ds:qk/2", "ds", "qk", 2)):
        assert evaluation.parse_method(text) == (evaluation.METHODS[name], *labels)
    for text in ("quest:qk", "quest/2", "dense", "ds:best", "ds/x", "ds/4,2"):
        with pytest.raises(ValueError, match=f"methods={text}"):
            evaluation.parse_method(text)
    for text in ("16", "1/", "n=", "n=1.5", "n=0", "1/1", "sink=3", "1/16,"):
        with pytest.raises(ValueError):
            evaluation.parse_budget(text, DSConfig())


def test_interrupted_items_are_not_scored_again(tmp_path):
    """Two settings, of which one had been measured further; a line that was being written counts
    for nothing."""
    def score(fails_at):
        def scores(item, dense, decoders):
            if item == fails_at:
                raise KeyboardInterrupt
            scored.append((item, [decoder.name for decoder in decoders]))
            return [{"score": item} for _ in decoders]
        return scores

    decoders = [SimpleNamespace(name=name, attended=lambda: 6.0, decoded=2) for name in "ab"]
    partials, scored = [tmp_path / "a", tmp_path / "b"], []
    with pytest.raises(KeyboardInterrupt):
        evaluation.score_items(score(3), [1, 2, 3, 4], None, decoders[:1], partials[:1], "told")
    with open(partials[0], "a") as file:
        file.write('{"score": 9')  # killed while it wrote
    scored.clear()
    found = evaluation.score_items(score(None), [1, 2, 3, 4], None, decoders, partials, "told")
    assert scored == [(1, ["b"]), (2, ["b"]), (3, ["a", "b"]), (4, ["a", "b"])]
    want = [{"score": item, "attended": 6.0, "decoded": 2} for item in (1, 2, 3, 4)]
    assert found[0] == found[1] == want


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Runs eval.py in this process, its files below tmp_path -> (rows of the file, out, err)."""
    monkeypatch.setattr(evaluation, "RUNS", tmp_path / "runs")
    asked.texts_of.cache_clear()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments), "--device", "cpu"])
        evaluation.main()
        captured = capsys.readouterr()
        path = tmp_path / "runs" / "quality.jsonl"
        return list(map(json.loads, path.read_text().splitlines())), captured.out, captured.err
    return run


def test_saved_rows_are_taken_and_only_new_settings_measured(evaluate, tmp_path, monkeypatch):
    common = ("lines", "--lengths", 300, "--limit", 2, "--methods", "ds", "streaming", "--budgets")
    rows, out, _ = evaluate(*common, "n=40")
    settings = [(row["method"], row["budget"]) for row in rows]
    assert settings == [("dense", "all"), ("ds", "n=40"), ("streaming", "n=40")]
    assert 40 <= rows[1]["mean_tokens"] < 40.2 and rows[1]["calibration"]["method"] == "planes"
    assert rows[1]["dense_score"] == rows[0]["score"] == 100 and rows[2]["calibration"] is None
    assert out.startswith("**tiny**") and out.count("\n| lines") == 3
    again, out, err = evaluate(*common, "n=40", "n=30")
    assert again[:3] == rows and [row["budget"] for row in again[3:]] == ["n=30", "n=30"]
    assert err.count("--force measures it again") == 3 and out.count("\n| lines") == 5
    files = []  # of dense's items: two commands may run at the same time
    monkeypatch.setattr(evaluation, "score_items", lambda *a, real=evaluation.score_items: (
        files.append(a[4][0]) or real(*a)))
    forced = [evaluate(*common, budget, "--force")[0] for budget in ("n=30", "n=40")][1]
    assert [row["score"] for row in forced[8:]] == [row["score"] for row in rows]
    assert files[0] != files[1]
    assert not list((tmp_path / "runs" / "partial").iterdir())


def test_labels_of_other_calibrations_are_made_once(evaluate, monkeypatch):
    calls, real = [], calibrate.calibrate

    def quick(*args, **more):
        calls.append(args[2])
        return real(*args, **more, samples=2, context=256)

    monkeypatch.setattr(calibrate, "calibrate", quick)
    common = ("perplexity", "--context", 300, "--last", 99, "--limit", 1, "--n_tokens", 40,
              "--methods", "ds:qk", "ds:random/2")
    rows, _, err = evaluate(*common)
    assert calls == ["qk", "random"] and "the text is the Python language reference" in err
    assert [row.get("labels") for row in rows] == [None, "8 x 4, 48 x 2 bit", "64 x 2 bit"]
    assert [row["calibration"]["method"] for row in rows[1:]] == ["qk", "random"]
    assert all(row["calibration"]["text"] == row["data"] == asked.BUILTIN for row in rows[1:])
    evaluate(*common, "--force")
    assert len(calls) == 2


def local_task(folder, name, kind, lines, **more):
    """A task of lm-eval's, as its .yaml and the items beside it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.yaml").write_text(json.dumps({  # JSON is YAML
        "task": name, "dataset_path": "json", "test_split": "train", "output_type": kind,
        "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")}} | more))


def test_tasks_of_lm_eval(evaluate, tmp_path, monkeypatch):
    """Choices, answers and whole texts, dense and with a budget of all tokens, are what the model
    itself says; what does not fit the context is cut in front."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    model, tokenizer = load_model(TINY, "cpu", torch.float32), Tokenizer(TINY)

    def nats(text, wanted):
        n, ids = len(tokenizer.encode(text)), tokenizer.encode(text + wanted)
        found = model(torch.tensor([ids]))[0, n - 1 : -1].log_softmax(-1)
        return found.gather(1, torch.tensor(ids[n:])[:, None]).sum().item()

    asked_for, choices = ["The sea was", "She said that he"], [" calm and", " gone", " not"]
    best = [max(range(3), key=lambda i: nats(text, choices[i])) for text in asked_for]
    local_task(tmp_path, "pick", "multiple_choice", [
        {"text": text, "choices": choices, "label": i} for text, i in zip(asked_for, best)],
        doc_to_text="{{text}}", doc_to_choice="{{choices}}", doc_to_target="{{label}}",
        target_delimiter="", metric_list=[{"metric": "acc"}])
    step = decode.DecodeStep(model, KVCache(model.config, 1, 64, "cpu", torch.float32))
    answers = [tokenizer.decode(decode.generate(step, [tokenizer.encode(text)], 6).token_ids[0])
               for text in asked_for]
    local_task(tmp_path, "say", "generate_until", [
        {"text": text, "answer": answer} for text, answer in zip(asked_for, answers)],
        doc_to_text="{{text}}", doc_to_target="{{answer}}", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 6})
    local_task(tmp_path, "roll", "loglikelihood_rolling", [{"text": text} for text in asked_for],
               doc_to_text="", doc_to_target="{{text}}",
               metric_list=[{"metric": "word_perplexity"}])
    common = "lm_eval", "--include_path", tmp_path, "--n_tokens", 60, "--context", 64, "--tasks"
    local_task(tmp_path, "long", "multiple_choice", [
        {"text": "The sea was. " * 30 + asked_for[0], "choices": choices, "label": 0}],
        doc_to_text="{{text}}", doc_to_choice="{{choices}}", doc_to_target="{{label}}",
        metric_list=[{"metric": "acc"}])
    rows, out, _ = evaluate(*common, "pick,say,roll")
    for dense, ds_row in zip(rows[::2], rows[1::2]):
        assert (dense["method"], ds_row["method"]) == ("dense", "ds") and dense["n_items"] == 2
        assert ds_row["metrics"] == pytest.approx(dense["metrics"], rel=1e-3)
        assert ds_row["dense_metrics"] == dense["metrics"] and ds_row["cut"] == 0
    words = sum(len(text.split()) for text in asked_for)
    want = math.exp(-sum(nats("", text) for text in asked_for) / words)
    assert [row["score"] for row in rows[::2]] == [1, 1, pytest.approx(want, rel=1e-3)]
    assert "| roll | 64 | ds |" in out

    rows, _, _ = evaluate(*common, "long", "--methods", "h2o")
    assert [row["cut"] for row in rows[6:]] == [3, 3] and rows[7]["mean_tokens"] == 60
    with pytest.raises(ValueError, match="tasks=nothing: no task of lm-eval"):
        evaluate(*common, "nothing")


def test_lm_eval_is_optional(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        evaluate("lm_eval", "--tasks", "mmlu")


def test_wikitext_comes_from_the_hub(tmp_path, monkeypatch):
    """From a stand-in for the hub; another text than the published one is refused."""
    text, found = " = Robert <unk> = \n caf\u00e9", str(tmp_path / "archive.zip")
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", text)
    monkeypatch.setattr(asked, "hf_hub_download", lambda *where, **more: found)
    with pytest.raises(ValueError, match="another text"):
        asked.wikitext2()
    monkeypatch.setattr(asked, "WIKITEXT2_SHA256", hashlib.sha256(text.encode()).hexdigest())
    asked.texts_of.cache_clear()
    assert asked.texts_of("wikitext2") == ("wikitext2-test.raw", [text])
    asked.texts_of.cache_clear()


@pytest.mark.parametrize("arguments, message", [
    (["lines", "--data", "x"], "leave out --data"), (["--lengths", "0"], "lengths=0"),
    (["lm_eval"], "lm_eval takes --tasks"), (["--tasks", "mmlu"], "lm_eval takes --tasks"),
    (["--sparsity", "1", "--budgets", "n=9"], "sparsity=1: dense has no budgets"),
    (["perplexity", "table"], "or table alone"), (["--budgets", "n=x"], "budgets=n=x"),
    (["ruler", "--lengths", "100"], "lengths=100: too short"), (["--last", "0"], "last=0"),
    (["--methods", "topk"], "methods=topk: must be one of"),
    (["--budgets", "n=64,top_p=0.9"], "budgets=n=64,top_p=0.9: must look like"),
    (["kv_retrieval", "--data", "{}/empty.jsonl"], "empty.jsonl: no items in it"),
    (["kv_retrieval", "--data", "{}/odd.jsonl"], "do not hold its key and value"),
    (["perplexity", "--context", "9000"], "8192 positions")], ids=str)
def test_bad_settings_of_eval_are_named(evaluate, arguments, message, tmp_path):
    odd = {"ordered_kv_records": [["a", "b"]], "key": "c", "value": "b"}
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(*(argument.format(tmp_path) for argument in arguments))


@pytest.mark.parametrize("method, settings, message", [
    ("h2o", dict(window=100), "window=100: h2o is not made"),
    ("quest", dict(ds=DSConfig(recent=9)), "recent=9: must be 15 at least for quest")])
def test_methods_that_cannot_run_say_so_when_they_are_made(method, settings, message):
    layer = dict(kv=None, window=None, ds=DSConfig(), label_map=None, labels=None) | settings
    with pytest.raises(ValueError, match=message):
        evaluation.METHODS[method](SimpleNamespace(**layer))


# ---------------------------------------------------------------- bench and pages


@pytest.mark.parametrize("name", bench.BENCHES)
def test_tables_are_printed(name):
    """And pages.py's, of the rows in results/."""
    run = command("bench.py", "table", name)
    assert run.returncode == 0 and run.stdout.count("\n|") > 3, run.stderr
    run = command("pages.py", "numbers")
    assert run.returncode == 0 and run.stdout.count("\n- **") == 3, run.stderr
    run = command("pages.py", "steps")
    assert run.returncode == 0 and run.stdout.count("\n") == 7, run.stderr


def test_bench_checks_its_attention_on_a_cpu(monkeypatch):
    """A wrong kernel is found out before it is timed."""
    config, shape = DSConfig(impl="torch", dense_below=0), (2, 600, 4, 2, 64, torch.float32)
    row = bench.attention_row(*shape, config, "cpu")
    assert row["max_rel_err"] < 1e-4 and row["ds_us"] > 0 and "speedup" not in row
    assert row["clustered_us"] > 0 and row["dense_us"] <= row["ours, all tokens_us"]
    monkeypatch.setattr(ds, "ds_decode", lambda q, k, v, labels, label_map, seq_lens, *_, **more:
                        ds.attend_ref(q, k, v, seq_lens))
    with pytest.raises(ValueError, match="the kernels are wrong: error 0.[1-9]"):
        bench.attention_row(*shape, config, "cpu")


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_gpt_fast_s_way_gives_what_dense_decoding_gives(attention):
    model = bench.random_model(replace(bench.CPU_MODEL, n_kv_heads=2), DEVICE, torch.float32)
    S, size, c, dtype = 120, 140, model.config, model.dtype
    theirs, cache = GptFast(model, 2, size), bench.random_cache(c, 2, size, None, DEVICE, dtype)
    theirs.attend_by(attention)
    way = theirs.compiled(attention) if attention == "flex" else contextlib.nullcontext()
    for cached, layer in zip(theirs.caches, cache.layers):
        for kept, mine in zip(cached, layer.past(size)):
            kept.copy_(mine)
    cache.seq_lens.fill_(S)
    tokens = torch.tensor([5, 9], device=DEVICE)
    with way:  # not compiled, FlexAttention does not look at blocks
        for position in torch.arange(S, size, device=DEVICE)[:, None]:
            found = theirs.step(tokens[:, None], position)[:, 0]
            tokens = model.decode(tokens, cache).argmax(-1)
            assert torch.equal(found, tokens)


def bench_rows(run, **more):
    """The rows of a benchmark on a CPU, but for gpt_fast, which compiles for long."""
    args = dict(what="bench", modes=None, dense_layers=[0], dense_below=0, budgets=[1, 2], steps=3,
                prefetch_heads=[1], shapes=None, model=None, compile=False, checkpoint=None,
                data=None)
    return [row for rows in run(SimpleNamespace(**(args | more)), "cpu") for row in rows]


def test_bench_generate_times_int8_beside_the_weights_as_they_are():
    modes = ["dense", "dense_int8", "ds_int8"]
    dense, int8, sparse = bench_rows(bench.run_generate, modes=modes, dense_layers=[2])
    assert [row["mode"] for row in (int8, sparse)] == ["dense_int8", "ds_int8"]
    shapes = [shape for name, shape in parameter_shapes(bench.CPU_MODEL).items()
              if len(shape) == 2 and name != "embed.weight"]
    saved = sum(3 * math.prod(shape) - 4 * shape[0] for shape in shapes)  # of fp32; 4: the scales
    assert dense["bytes_per_step"] - int8["bytes_per_step"] == saved
    assert sparse["bytes_per_step"] < int8["bytes_per_step"]
    assert int8["speedup_vs_dense"] == dense["ms_per_step"] / int8["ms_per_step"]
    ours = f"| {sparse['speedup_vs_dense_int8']:.2f}x |"
    assert ours in pages.generate_table([dense, int8, sparse])


def test_bench_generate_rows(tmp_path, monkeypatch):
    """And the table of the newest of them, where one ran out of memory, too."""
    rows = bench_rows(bench.run_generate, modes=["prefill", "dense", "ds"], dense_layers=[2, 0])
    prefill, dense, default, bare = rows
    assert [row["mode"] for row in rows] == ["prefill", "dense", "ds", "ds"]
    assert prefill["prefill_s"] > 0 and prefill["cold_start_s"] > 0
    assert bare["bytes_per_step"] < default["bytes_per_step"] < dense["bytes_per_step"]
    c = bench.CPU_MODEL
    weights = sum(math.prod(shape) for name, shape in parameter_shapes(c).items()
                  if not name.startswith("embed")) * 4
    kv = c.n_layers * 2 * 300 * c.n_kv_heads * 2 * c.head_dim * 4
    assert dense["bytes_per_step"] == weights + kv
    for row in (dense, default, bare):
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_step"])
        assert row["speedup_vs_dense"] == dense["ms_per_step"] / row["ms_per_step"]

    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="run bench.py generate first"):
        pages.newest_rows("generate")
    failed = {**dense, "B": 64, "ms_per_step": None, "error": "CUDA out of memory. Tried 1.00 GiB"}
    saved = [{**dense, "ms_per_step": 123.0}, *rows, failed]
    cli.append_json_lines(tmp_path / "generate.jsonl", saved)
    table = pages.generate_table(pages.newest_rows("generate"))
    assert f"| {dense['ms_per_step']:.2f} ms |" in table and "123.00" not in table
    assert "| does not fit |" in table


def test_bench_marks_rows_that_run_out_of_memory(monkeypatch):
    """Of one process; of several it ends the run."""
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(bench, "time_decode", out_of_memory)
    monkeypatch.setattr(bench, "time_prefill", out_of_memory)
    model = bench.random_model(bench.CPU_MODEL, "cpu", torch.float32)
    modes = ["prefill", "dense", "ds"]
    asked = "tiny", lambda *_: model, 1, 50, modes, [DSConfig()], 3, "cpu"
    rows = bench.generate_rows(*asked)
    assert {row["error"] for row in rows} == {"CUDA out of memory. Tried to allocate 1 GiB"}
    assert rows[2]["ms_per_step"] is rows[2]["speedup_vs_dense"] is None
    monkeypatch.setattr(bench.parallel, "size", lambda: 2)  # the other may wait for this one
    with pytest.raises(torch.OutOfMemoryError):
        bench.generate_rows(*asked)


def test_bench_offload_rows(monkeypatch):
    rows = bench_rows(bench.run_offload)
    flexgen, gpu, tight, tight_predicted, roomy, _ = rows
    c, size = bench.CPU_MODEL, 300 + 3 + bench.WARM_UP
    whole = c.n_layers * 2 * c.n_kv_heads * size * 2 * c.head_dim * 4
    assert flexgen["pcie_bytes_per_step"] == flexgen["host_bytes"] == gpu["gpu_kv_bytes"] == whole
    budget = DSConfig(min_tokens=64, dense_below=0).budget(size)
    for row, resident in ((tight, budget), (roomy, 2 * budget)):
        assert row["resident_tokens"] == resident and row["gpu_kv_bytes"] < whole
        assert row["same_tokens"] and row["logit_error"] < 1e-5
        assert 0 < row["prefetched_bytes_per_step"] < row["pcie_bytes_per_step"] < whole
        assert row["speedup_vs_flexgen"] == flexgen["ms_per_step"] / row["ms_per_step"]
    assert tight["hit_rate"] < roomy["hit_rate"] < 1
    assert tight_predicted["logit_error"] > 1e-3  # of other tokens, and says so
    assert f"| {tight['ms_per_step']:.2f} |" in pages.offload_table(rows)

    monkeypatch.setattr(offload, "fetch_ref", lambda *_: None)  # what is attended is not there
    modes = ["flexgen", "gpu", "offload"]
    *_, wrong = bench_rows(bench.run_offload, budgets=[1], modes=modes)
    assert wrong["logit_error"] > 0.01 and wrong["speedup_vs_flexgen"] is None
    assert "| wrong |" in pages.offload_table([wrong])
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 1000)
    flexgen, gpu, full = bench_rows(bench.run_offload, budgets=[1], modes=modes)
    assert "of host memory" in flexgen["error"] and "of host memory" in full["error"]
    assert "| does not fit |" in pages.offload_table([full])


def test_bench_offload_streams_packed_rows_too():
    """Of 16-bit K and V: fewer bytes, the same logits, and a speedup over each."""
    model = bench.random_model(bench.CPU_MODEL, "cpu", torch.bfloat16)
    source = bench.Source(name="tiny", model=model, B=1, S=60)
    pool, config = host_memory.PinnedPool(), DSConfig(dense_layers=0, min_tokens=16, dense_below=0)
    modes = ["flexgen", "flexgen_packed", "offload"]
    args = SimpleNamespace(budgets=[1], prefetch_heads=[0], steps=3)
    rows = bench.offload_rows(source, modes, [config], args, pool)
    whole, packed, ours = rows
    assert whole["mode"] == packed["mode"] == "flexgen" and packed["packed"] > whole["packed"]
    share = packed["pcie_bytes_per_step"] / whole["pcie_bytes_per_step"]
    assert share == pytest.approx(0.75 + 0.25 * packed["as_is"]) and packed["as_is"] < 0.2
    assert ours["speedup_vs_flexgen_packed"] == packed["ms_per_step"] / ours["ms_per_step"]
    assert "| flexgen, packed |" in pages.offload_table(rows)

    first = pool.held[0].data_ptr()
    lent = pool.layers(model.config, 1, 20, torch.bfloat16, "cpu")
    assert lent[0].data_ptr() == first and lent[0].shape[2] == 20, "it serves what is smaller"
    assert pool.layers(model.config, 2, 60, torch.bfloat16, "cpu")[0].shape[0] == 2


@pytest.mark.parametrize("data", [topics.__file__, None], ids=["text", "built-in"])
def test_bench_offload_continues_prompts(data):
    """Of a trained model, whose selections are not random."""
    gpu, ours, predicted, *shorter = bench_rows(
        bench.run_offload, checkpoint=str(TINY), shapes="2x400,1x300", data=data and str(data),
        budgets=[1], dense_layers=[2], steps=4, modes=["gpu", "offload", "offload_predicted"])
    assert [(row["B"], row["S"]) for row in shorter] == 3 * [(1, 300)]
    assert (ours["weights"], ours["model"], ours["B"], ours["S"]) == ("trained", "tiny", 2, 400)
    assert ours["data"] == predicted["data"] == ("topics.py" if data else asked.BUILTIN)
    assert ours["same_tokens"] and ours["hit_rate"] > 0.45 > 128 / 400 and ours["agreement"] > 0.6
