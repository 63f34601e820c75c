"""All tests. A CPU suffices (the kernels run in Triton's interpreter); on a GPU the same tests run the compiled kernels.

Layers of truth: our model equals Hugging Face's; dense decode equals prefill; the reference equals dense when N >= S;
kernels equal the reference. Oracles (pytest, transformers) are installed for tests only:
    pip install -r requirements.txt pytest transformers protobuf gguf && python -m pytest -q test_ds.py
Tests of published models need their GGUF files in the folder that the variable DS_MODELS names, and
the package accelerate, with which transformers reads them.
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
import random
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
import torch

try:
    import gguf
except ImportError:
    gguf = None

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
DEVICE = "cuda" if GPU else "cpu"

import transformers
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig,
    MistralForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
    Qwen3Config, Qwen3ForCausalLM
)
from triton.runtime import JITFunction

import bench
import calibrate
import cli
import convert_hf
import ds_attention as ds
import eval as evaluation
import generate
import host_memory
import items as asked
import offload
from ds_attention import DSConfig, LabelMap
from model import (
    PRESETS, Attention, KVCache, LayerCache, Linear, ModelConfig, MoEFeedForward, Residual, Transformer, apply_rope, check_memory,
    fingerprint, load_label_maps, load_model, memory_need, parameter_shapes
)
from offload import OffloadCache
from tiny import tasks, train
from tokenizer import Tokenizer, from_sentencepiece, read_text

if not GPU:
    ds.WARPS = 4  # the interpreter's time goes by operations, not their size

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"
SHARED = ROOT.parent / "shared" / "data"  # the project's test data, absent in a clone of the repository alone
needs_gguf = pytest.mark.skipif(gguf is None, reason="needs the package gguf")


# ---------------------------------------------------------------- ds_attention: stages


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
    "bf16": shapes(D=128, dtype=torch.bfloat16, C=8),
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
        self.config = DSConfig(**config, label_bits=self.bits,
                               label_channels=None if isinstance(self.bits, str) else self.C)
        self.widths, self.C = self.config.widths(self.D), self.config.channels(self.D)
        self.q = normal(self.B, self.HQ, self.D).to(self.dtype)
        self.kv = normal(self.B, self.HKV, self.S, 2, self.D).to(self.dtype)
        self.k, self.v = self.kv.unbind(3)
        channels = torch.stack([torch.randperm(self.D, generator=generator)[: self.C]
                                for _ in range(self.HKV)])
        mean, std = 0.1 * torch.ones(2, self.HKV, self.C) * torch.tensor([1, 9])[:, None, None]
        self.map = LabelMap.from_statistics(channels, mean, std, self.widths).to(DEVICE)
        allocated = self.B, self.HKV, self.config.words(self.D), -(-self.S // self.pad) * self.pad
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
        return ds.select_tokens(self.q, newest, self.labels, self.map, self.seq_lens,
                                replace(self.config, impl=impl), self.window, **more)

    def decode(self, impl="triton", **more):
        return ds.ds_decode(self.q, self.k, self.v, self.labels, self.map, self.seq_lens,
                            replace(self.config, impl=impl), self.window, **more)


def first_channels(HKV, C, widths):
    """A LabelMap of the first C channels, for keys of unit variance."""
    channels, zeros = torch.arange(C).expand(HKV, -1), torch.zeros(HKV, C)
    return LabelMap.from_statistics(channels, zeros, zeros + 1, widths).to(DEVICE)


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


def mask_of(indices, n_tokens, S):
    """select_tokens' lists as select_ref's mask."""
    listed = torch.arange(indices.shape[2], device=DEVICE) < n_tokens[..., None]
    times = torch.zeros(*n_tokens.shape, S, dtype=torch.int32, device=DEVICE)
    times.scatter_add_(2, indices.masked_fill(~listed, 0).long(), listed.int())
    assert times.max() == 1, "a token is listed twice"
    return times.bool()


@pytest.mark.parametrize("widths", ["64x1", "48x2", "8x8", "2x8,4x4,8x2,16x1"])
def test_pack_and_unpack_are_inverse(widths):
    widths = ds.parse_widths(widths)
    largest = ds.per_dim(widths, lambda bits: 2**bits - 1, "cpu")
    codes = (torch.rand(3, 5, len(largest)) * (largest + 1)).long()
    words = ds.pack(codes, widths)
    assert words.dtype == torch.int32 and words.shape == (3, 5, ds.words_of(widths))
    assert torch.equal(ds.unpack(words, widths), codes.int())


def test_label_words_by_hand():
    """Dims one behind the other, lowest bits first: 8 + 4 + 4, then 2 bits eight times."""
    codes = torch.tensor([0x12, 0x3, 0x4, 1, 2, 3, 0, 0, 0, 0, 3])
    words = ds.pack(codes, ((1, 8), (2, 4), (8, 2)))
    assert words.tolist() == [0x4312 + ((1 + 2 * 4 + 3 * 16) << 16) + (3 << 30) - 2**32]


@cases
def test_label_kernel_equals_reference(case):
    p = Problem(case)
    begin, labels = max(0, p.S - 70), torch.full_like(p.labels, -1)
    ds.label(p.k[:, :, begin:], p.positions[:, begin:], labels, p.map)
    assert (labels[..., :begin] == -1).all(), "wrote outside of the given positions"
    assert torch.equal(labels[..., begin:], p.labels[..., begin:])


def test_labels_really_have_their_bits():
    """32 dims of 4 bits take 16 bytes per token and KV head: 1/16 of a bf16 K of 128 channels."""
    config = ModelConfig(64, 3, 4, 2, 128, 64, 50, 64)
    maps = [first_channels(2, 32, ((32, 4),))] * 3
    cache = KVCache(config, 1, 40, "cpu", torch.bfloat16, DSConfig(dense_layers=1), maps)
    assert cache.label_bytes() == 2 * (40 * 2 * 16)  # two sparse layers
    of_keys = sum(layer.kv[..., 0, :].numel() * 2 for layer in cache.layers[1:])
    assert cache.label_bytes() * 16 == of_keys


def test_label_scores_approximate_q_dot_k():
    """With all channels at 8 bits they are q . k / sqrt(D) itself, but for a constant, the unit and
    the query's 8 bits."""
    p = Problem(shapes(HQ=2, bits=8, C=64))
    exact = torch.einsum("bhd,bhsd->bhs", p.q, p.k) / 8
    scores = p.scores() * p.map.query_codes(p.q)[1][..., None]
    for b, length in enumerate(p.seq_lens.tolist()):
        got, want = scores[b, :, :length], exact[b, :, :length]
        error = (got - got.mean(-1, keepdim=True)) - (want - want.mean(-1, keepdim=True))
        assert error.std() < 0.02 * want.std()


@pytest.mark.parametrize("S, window", [(900, None), (900, 500), (6000, None)],
                         ids=["whole", "window", "sampled"])
def test_a_group_is_pooled_by_softmax_weight(S, window):
    """With labels that tell nearly all of q . k, scores are pool_ref's; a head of large logits does
    not choose for others."""
    p = Problem(shapes(B=1, HQ=6, HKV=2, S=S, bits=8, C=64, window=window))
    p.q[:, ::3] *= 4
    unit = p.q[:, ::3] / p.q[:, ::3].norm(dim=-1, keepdim=True)
    p.k[:, :, 1] = 20 * unit  # a sink, which stands for no other token
    p.map.step *= 3  # so that it fits the range
    ds.label_ref(p.k, p.positions, p.labels, p.map)
    exact = torch.einsum("bhgd,bhsd->bhgs", p.q.unflatten(1, (2, 3)), p.k) / 8
    live = ds.eligible_tokens(p.seq_lens, S, window)
    exact = exact.masked_fill(~live[:, None, None], float("-inf"))
    scores, want = p.scores() * p.map.query_codes(p.q)[1][..., None], ds.pool_ref(exact)
    assert torch.equal(scores.isfinite(), live[:, None].expand_as(scores))
    error = (scores - want)[..., live[0]]
    error -= error.mean(-1, keepdim=True)  # the logarithm of a mean, and of a sum
    assert error.abs().mean() < (0.4 if S > ds.SAMPLE else 0.2)
    assert (exact.amax(2) - want)[..., live[0]].std() > 1, "the case pools alike by raw scores"


@pytest.mark.parametrize("bits", [4, "4x4,24x2"])
def test_query_codes_round_as_the_reference_s(bits):
    """bf16 queries put many codes on the edge between two, where the kernel must round alike."""
    p = Problem(shapes(B=60 if GPU else 2, HQ=6, S=1, bits=bits, dtype=torch.bfloat16))
    workspace = p.workspace()
    ds.bracket(p.q, p.labels, p.map, p.seq_lens, p.config, None, workspace)
    W, T = p.config.words(64), 2 if bits == 4 else 4  # byte-wise slices of a label word
    sliced = workspace.query.view(p.B, 2, 3, W * T + 1)[..., :-1].contiguous()
    sliced = sliced.view(torch.int8).view(p.B, 2, 3, W, T, 4)
    word, shift = ds.places(p.widths, DEVICE)
    want, _ = p.map.query_codes(p.q)
    assert torch.equal(sliced[..., word, shift % 8 // (8 // T), shift // 8].int(), want.int())


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


@pytest.mark.parametrize("dense_below, lens", [(300, [299, 300]), (0, [20, 21])],
                         ids=["dense_below", "n"])
def test_rows_without_a_choice(dense_below, lens):
    """One has all its tokens, by dense_below or as they are N; the next those alone that it has in
    any case, as they are N."""
    config = DSConfig(n_tokens=20, dense_below=dense_below)
    scores, seq_lens = torch.randn(2, 1, 400), torch.tensor(lens, dtype=torch.int32)
    scores = scores.masked_fill(~ds.eligible_tokens(seq_lens, 400, None)[:, None], float("-inf"))
    assert config.sparse_at(seq_lens).tolist() == [False, True]
    assert ds.threshold_ref(scores, seq_lens, config).tolist() == [[-math.inf], [math.inf]]
    assert ds.select_ref(scores, seq_lens, config).sum(2).tolist() == [[lens[0]], [20]]


def check_selection(p):
    """That the kernels choose the tokens that the reference does, by scratch that holds nothing."""
    indices, n_tokens, counts = poisoned(p.select)
    assert torch.equal(counts.sum(2), n_tokens)
    assert torch.equal(mask_of(indices, n_tokens, p.S), p.chosen())


@cases
def test_kernels_choose_the_reference_s_tokens(case):
    check_selection(Problem(case))


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
    p.labels[:] = ds.pack(codes, p.widths).T.to(DEVICE)
    p.map.step = torch.ones_like(p.map.step)
    p.q = torch.zeros_like(p.q)
    p.q[:, 0, p.map.channels[0, :2]] = torch.tensor([127.0, 8.0], device=DEVICE)
    p.q[:, 1] = p.q[:, 0] / 2
    check_selection(p)


@pytest.mark.parametrize("more", [dict(dense_below=400), dict(n_tokens=200), dict(n_tokens=6)],
                         ids=["dense_below", "n", "always-alone"])
def test_each_row_decides_whether_it_is_sparse(more):
    p = Problem(shapes(B=4, HQ=1, HKV=1, S=700, C=8), seq_lens=[700, 399, 130, 5], **more)
    check_selection(p)
    all_tokens = p.chosen().sum(2)[:, 0] == p.seq_lens
    assert torch.equal(all_tokens, ~p.config.sparse_at(p.seq_lens))
    torch.testing.assert_close(p.decode(), p.decode("torch"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("splits", [1, 4])
def test_how_many_programs_share_a_row_changes_no_choice(splits):
    p = Problem(CASES["mha-1000"])
    indices, n_tokens, _ = p.select(workspace=p.workspace(splits))
    assert torch.equal(mask_of(indices, n_tokens, p.S), p.chosen())


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
    p = Problem(CASES[case])
    got = poisoned(p.decode)
    allowance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[p.dtype]
    assert relative_error(got, p.decode("torch")) < allowance
    if GPU:  # the interpreter's order is fixed
        assert torch.equal(got, p.decode()), "the same inputs gave other bits"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_newest_keys_labels_are_written(impl):
    """And nothing else is; nothing at all without label_newest or newest."""
    p = Problem(shapes(HQ=1, HKV=1, S=333, window=100, C=8))
    newest = (p.seq_lens - 1).long()[:, None, None, None]
    want, without = p.labels.clone(), p.labels.scatter(3, newest, 0)
    dense = partial(ds.dense_decode, p.q, p.k, p.v, p.seq_lens, p.window, impl, label_map=p.map)
    for step, written in [
            (lambda: p.decode(impl), True), (lambda: p.decode(impl, label_newest=False), False),
            (lambda: p.select(impl, newest=p.k), True), (lambda: p.select(impl), False),
            (lambda: dense(labels=p.labels), True)]:
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


@pytest.mark.parametrize("case", ["gqa4-window", "bf16"])
def test_attention_over_select_tokens_lists_has_ds_decode_s_bits(case):
    p = Problem(CASES[case])
    workspace = p.workspace()
    indices, _, counts = p.select(workspace=workspace)
    got = ds.attend(p.q, p.k, p.v, p.seq_lens, indices, counts, p.window, workspace)
    assert torch.equal(got, p.decode())


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_capacity_cuts_lists(impl):
    """Those longer than it, behind; what is cut off is neither attended to nor counted."""
    p = Problem(shapes(HQ=2, HKV=1, S=700, C=8), seq_lens=[700, 60])
    workspace = p.workspace(splits=2 if impl == "triton" else 1)
    whole, n_whole, _ = p.select(impl, workspace=workspace)
    workspace.attended.zero_()
    indices, n_tokens, counts = p.select(impl, workspace=workspace, capacity=40)
    assert n_whole[0].min() > 40 > n_whole[1].max() and indices.shape == (2, 1, 40)
    assert torch.equal(n_tokens, n_whole.clamp(max=40))
    cut = mask_of(indices, n_tokens, 700)
    assert torch.equal(cut, mask_of(whole[..., :40], n_tokens, 700))
    got = ds.attend(p.q, p.k, p.v, p.seq_lens, indices, counts, workspace=workspace)
    want = ds.attend_ref(p.q, p.k, p.v, p.seq_lens, cut)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert impl == "torch" or torch.equal(workspace.attended, n_tokens.long())


def test_attended_counts_the_tokens_of_sparse_steps():
    p = Problem(shapes(HQ=2, HKV=1, S=700, C=8), seq_lens=[700, 60], dense_below=100)
    workspace = p.workspace()
    for step in (p.decode, p.select, p.decode):
        step(workspace=workspace)
    ds.dense_decode(p.q, p.k, p.v, p.seq_lens, impl="triton", workspace=workspace)
    assert torch.equal(workspace.attended, 3 * p.chosen().sum(2))


def test_scratch_may_hold_anything():
    p = Problem(shapes(B=1, HQ=2, HKV=1, S=700, bits="1x8,2x4,4x2,8x1"))
    workspace = p.workspace()
    want = p.decode(workspace=workspace)
    for name, scratch in vars(workspace).items():
        if torch.is_tensor(scratch) and name not in ("arrived", "attended"):
            scratch.fill_(float("nan") if scratch.is_floating_point() else 0x5BADBEEF)
    assert torch.equal(p.decode(workspace=workspace), want)


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


def test_scratch_of_another_shape_and_labels_of_other_widths_are_refused():
    p, longer = Problem(shapes(S=300)), Problem(shapes(S=400))
    narrow = LabelMap(p.map.channels, p.map.lo, p.map.step, ((32, 2),))
    with pytest.raises(AssertionError, match="a workspace of another shape"):
        p.decode(workspace=longer.workspace())
    with pytest.raises(AssertionError, match="labels of other widths"):
        p.decode(workspace=Problem(shapes(S=300, bits=8, C=16)).workspace())
    with pytest.raises(AssertionError, match="labels are not of 32 x 2"):
        ds.label(p.k, p.positions, p.labels, narrow)


def test_a_workspace_serves_any_sequence_of_lengths():
    """State that survived a call would show: long, short, long again."""
    p = Problem(shapes(B=1, HQ=2, HKV=1, S=2500, C=8))
    workspace = p.workspace(splits=2)
    for length in (2500, 3, 2100, 1, 2500):
        p.seq_lens.fill_(length)
        fresh = p.workspace(splits=2)
        assert torch.equal(p.decode(workspace=workspace), p.decode(workspace=fresh))


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
        got = ds.dense_decode(p.q, p.k, p.v, p.seq_lens, impl=impl)
        torch.testing.assert_close(got, want[:, :, 0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_over_one_shared_cache_equal_rows_with_their_own(impl):
    p = Problem(shapes(B=1, HQ=2, HKV=1, S=600, C=8))
    p.seq_lens = torch.tensor([600, 300, 7], dtype=torch.int32, device=DEVICE)
    p.q = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    p.k, p.v, p.labels = (x.expand(3, *x.shape[1:]) for x in (p.k, p.v, p.labels))
    shared = p.decode(impl, label_newest=False)
    with pytest.raises(AssertionError, match="would overwrite others' labels"):
        p.decode(impl)
    p.k, p.v, p.labels = (x.clone() for x in (p.k, p.v, p.labels))
    torch.testing.assert_close(shared, p.decode(impl), atol=1e-6, rtol=0)


def test_budget_of_ints_and_tensors_agree():
    live = list(range(1, 4000, 7)) + [3071, 3072, 2**20 - 1, 2**20]
    for more in ({}, dict(sparsity=3.7, min_tokens=20, dense_below=0), dict(n_tokens=50)):
        config = DSConfig(**more)
        n = config.budget(torch.tensor(live, dtype=torch.int32))
        assert n.dtype == torch.int32 and n.tolist() == [config.budget(tokens) for tokens in live]
    assert [DSConfig().budget(n) for n in (1, 3071, 3072, 4800, 4801)] == [1, 3071, 192, 300, 301]


@pytest.mark.parametrize("more, message", [
    (dict(sparsity=1), "sparsity=1: must be above 1; use --sparsity 1 for dense"),
    (dict(n_tokens=0), "n_tokens=0: must be at least 1"),
    (dict(sink=-1), "sink=-1: must be at least 0"),
    (dict(recent=0), "recent=0: must be at least 1"),
    (dict(impl="cuda"), "impl=cuda: must be one of auto, torch, triton")])
def test_settings_that_cannot_be_are_refused(more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DSConfig(**more)


def test_label_dims_follow_from_sparsity():
    """Label bytes are 1/sparsity of a 16-bit K: 32 of 128 channels at 4 bits for 1/16."""
    settings = [(16, 4), (16, 2), (8, 4), (32, 4), (16, 8)]
    assert [DSConfig(sparsity=s, label_bits=bits).channels(128) for s, bits in settings
            ] == [32, 64, 64, 16, 16]
    with pytest.raises(ValueError, match="label_channels=12: must be a multiple of 8"):
        DSConfig(label_channels=12).channels(128)


def test_default_label_widths():
    """Those of notes-quality.md at 16, 8 and 4 bytes of 128 dims; whole words of any head's, and no
    more dims than it has."""
    assert [ds.widths_name(DSConfig(sparsity=s).widths(128)) for s in (4, 8, 16, 32, 64)] == [
        "128 x 4", "16 x 4, 96 x 2", "8 x 4, 48 x 2", "20 x 2, 24 x 1", "32 x 1"]
    for sparsity, D in itertools.product((2, 3, 7, 16, 21.3, 50, 128), (32, 64, 80, 96, 100, 128)):
        config = DSConfig(sparsity=sparsity)
        assert config.channels(D) <= D and config.words(D) * 32 <= max(32, 16 * D / sparsity)
        assert ds.parse_widths(ds.widths_name(config.widths(D))) == config.widths(D)
    with pytest.raises(ValueError, match="label_channels=512: more label dims than the head's 128"):
        DSConfig(label_channels=512).widths(128)
    with pytest.raises(ValueError, match="head_dim=6: .* needs 8 dims"):
        DSConfig().widths(6)


@pytest.mark.parametrize("bits, message", [
    ("8x4,48", "must be dims x bits, the most bits first"),
    ("48x2,8x4", "must be dims x bits, the most bits first"),
    ("0x4", "must be dims x bits"), ("8x3", "dims have 1, 2, 4 or 8 bits"),
    ("8x16", "dims have 1, 2, 4 or 8 bits"),
    ("3x4,10x2", "3 dims of 4 bits are no whole number of bytes"),
    ("8x4,4x2", "40 bits in all are no whole number of 32-bit"),
    (16, "must be 1, 2, 4, 8, or dims x bits"), ("8x4,96x2", "more label dims than the head's 64")])
def test_label_formats_that_cannot_be_are_refused(bits, message):
    with pytest.raises(ValueError, match=f"label_bits={bits}: .*{message}"):
        DSConfig(label_bits=bits).widths(64)
    with pytest.raises(ValueError, match="label_channels=32: label_bits=8x4,48x2 says how many"):
        DSConfig(label_bits="8x4,48x2", label_channels=32)


# ---------------------------------------------------------------- convert_hf and model, against Hugging Face

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=64, max_position_embeddings=128)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 16}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


def randomize(model):
    """Biases and norms that do something: transformers starts them at 0 and 1."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(0 if name.endswith("bias") else 1, 0.3)
    return model.eval()


def make_hf(path, kind="llama", dtype=torch.float32, config=None, **save):
    """Saves a random Hugging Face model of this kind in `path`; returns the model. config: changes to its shape."""
    torch.manual_seed(0)
    model_class, config_class, more = MODELS[kind]
    model = randomize(model_class(config_class(**{**SHAPE, **more, **(config or {})})).to(dtype))
    model.save_pretrained(path, **save)
    return model


def to_bin(path, n_shards):
    """Rewrites a directory's model.safetensors as `n_shards` .bin files with their index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{1 + i % n_shards:05d}-of-{n_shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()


def edit_weights(path, change):
    """Applies `change` to the dict of tensors in a directory's model.safetensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def logits(checkpoint, tokens):
    model = Transformer(ModelConfig.from_file(checkpoint / "config.json"))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model.eval()(tokens)


def refused(hf, out, match, **more):
    """Asserts that converting raises one line that matches, and that nothing stays beside `out`."""
    before = sorted(out.parent.iterdir())
    with pytest.raises((ValueError, OSError), match=match) as caught:
        convert_hf.convert(hf, out, **more)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


@pytest.fixture
def hf(tmp_path):
    make_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


@pytest.mark.parametrize("kind, save", [
    ("llama", {}), ("llama-tied", {}), ("mistral", {}), ("llama", {"max_shard_size": "20KB"}),
    ("mixtral", {}), ("mixtral", {"max_shard_size": "30KB"}), ("mixtral", {"save_original_format": False}),
], ids=["llama", "tied", "mistral", "sharded", "mixtral", "mixtral-sharded", "mixtral-fused"])
@torch.inference_mode()
def test_converted_model_equals_hf(kind, save, tmp_path, out):
    model = make_hf(tmp_path / "hf", kind, **save)
    assert ("max_shard_size" in save) == (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert convert_hf.convert(tmp_path / "hf", out) == out.resolve()
    tokens = torch.randint(SHAPE["vocab_size"], (2, 17))
    torch.testing.assert_close(logits(out, tokens), model(tokens).logits, atol=2e-5, rtol=1e-4)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "double-sparsity", "source": "hf"}
        assert set(file.keys()) == set(parameter_shapes(ModelConfig.from_file(out / "config.json")))
        assert ("head.weight" in file.keys()) == (kind != "llama-tied")
    assert (out / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["original", "fused"])
def test_mixtral_experts_lie_in_order(layout, tmp_path, out):
    model = make_hf(tmp_path / "hf", "mixtral", save_original_format=layout == "original")
    ours = load_file(convert_hf.convert(tmp_path / "hf", out) / "model.safetensors")
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(ours["layers.1.ffn.w13"], experts.gate_up_proj)
    assert torch.equal(ours["layers.1.ffn.w2"], experts.down_proj)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_bin_shards_give_the_same_bytes(n_shards, hf, out):
    expected = (convert_hf.convert(hf, out.parent / "from_safetensors") / "model.safetensors").read_bytes()
    to_bin(hf, n_shards)
    assert (convert_hf.convert(hf, out) / "model.safetensors").read_bytes() == expected


def test_safetensors_before_bin(hf, out):
    (hf / "pytorch_model.bin").write_bytes(b"not read")
    convert_hf.convert(hf, out)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtype(source, dtype, tmp_path, out, monkeypatch):
    monkeypatch.setattr(convert_hf, "CHUNK", 100)  # several chunks a tensor, the last one short
    model = make_hf(tmp_path / "hf", dtype=source)
    expected = source if dtype == "auto" else getattr(torch, dtype)
    ours = load_file(convert_hf.convert(tmp_path / "hf", out, dtype) / "model.safetensors")
    assert {tensor.dtype for tensor in ours.values()} == {expected}
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(ours["layers.1.attn.wqkv.weight"], torch.cat(parts).to(expected))


def test_dtype_unknown_to_the_config_is_the_first_weights(tmp_path, out):
    make_hf(tmp_path / "hf", dtype=torch.float16)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    ours = load_file(convert_hf.convert(tmp_path / "hf", out) / "model.safetensors")
    assert ours["norm.weight"].dtype == torch.float16


def test_overflowing_cast_is_refused(hf, out):
    edit_weights(hf, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    refused(hf, out, "model.norm.weight: not finite as torch.float16", dtype="float16")


def test_harmless_extras_are_left_out(tmp_path, out):
    make_hf(tmp_path / "hf", "llama-tied")
    edit_weights(tmp_path / "hf", lambda tensors: tensors.update({
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert not [name for name in load_file(convert_hf.convert(tmp_path / "hf", out) / "model.safetensors")
                if "head" in name or "inv_freq" in name]


@pytest.mark.parametrize("change, match", [
    (lambda t: t.pop("model.norm.weight"), r"1 tensors missing \(model.norm.weight\)"),
    (lambda t: t.update({f"odd.{i}": torch.zeros(1) for i in range(5)}), r"5 tensors unexpected .*odd.2, \.\.\."),
    (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight \[31\], not \[32\]"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm.weight torch.int8"),
], ids=["missing", "unexpected", "mis-shaped", "int8"])
def test_wrong_tensors_are_named(change, match, hf, out):
    edit_weights(hf, change)
    refused(hf, out, match)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"<html>" * 99, lambda data: b""],
                         ids=["truncated", "foreign", "empty"])
def test_damaged_shard_is_named(kind, damage, hf, out):
    if kind == "bin":
        to_bin(hf, 2)
    shard = sorted(hf.glob(f"*.{kind}"))[-1]
    shard.write_bytes(damage(shard.read_bytes()))
    refused(hf, out, shard.name)


def test_bin_that_runs_code_is_refused(hf, out):
    (hf / "model.safetensors").unlink()
    torch.save({"a": subprocess.Popen}, hf / "pytorch_model.bin")
    refused(hf, out, "pytorch_model.bin")


def test_absent_files_are_named(hf, out):
    to_bin(hf, 3)
    (hf / "pytorch_model-00002-of-00003.bin").unlink()
    refused(hf, out, "pytorch_model-00002-of-00003.bin")
    for content in ("{}", "[]", '{"weight_map": []}', "<html>"):
        (hf / "pytorch_model.bin.index.json").write_text(content)
        refused(hf, out, "index.json: not a weight index")
    (hf / "pytorch_model.bin.index.json").unlink()
    refused(hf, out, "no model.safetensors")
    (hf / "config.json").unlink()
    refused(hf, out, "no config.json")


def test_output_in_use_is_refused_and_an_empty_one_is_taken(hf, out):
    out.mkdir()
    convert_hf.convert(hf, out)
    refused(hf, out, "remove it, or choose another")
    refused(hf, out / "config.json", "remove it, or choose another")


def test_full_disk_is_foreseen(hf, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    refused(hf, out, "needs .* GB")


def test_failing_write_leaves_nothing(hf, out):
    """A limit on file size stands for a disk that fills up while the weights are written."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv = sys.argv[1:]; "
    command = limit + "import convert_hf; convert_hf.run_command(convert_hf.main)"
    run = subprocess.run([sys.executable, "-c", command, "convert_hf.py", hf, out], cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "File too large" in run.stderr, run.stderr
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("error, match", [
    (errors.GatedRepoError, "accept its terms .*hf auth login"), (errors.RepositoryNotFoundError, "hf auth login"),
    (errors.LocalEntryNotFoundError, "give a local directory"), (errors.OfflineModeIsEnabled, "give a local directory"),
    (errors.HFValidationError, "not a hub id"),
])
def test_hub_errors_say_what_to_do(error, match, out, monkeypatch):
    def fail(*args, **more):
        raise error.__new__(error)  # without the HTTP response that some constructors ask for
    monkeypatch.setattr(convert_hf, "snapshot_download", fail)
    refused("owner/name", out, match)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hub_download_asks_for_config_then_one_kind_of_weights(kind, hf, out, tmp_path, monkeypatch):
    """Stands in for the hub: copies what the patterns match. Weights of both kinds are never both downloaded."""
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "consolidated.safetensors").write_bytes(b"Mistral's own layout")
    if kind == "bin":
        (hf / "model.safetensors").unlink()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(hub_id, allow_patterns):
        assert hub_id == "owner/name"
        for path in hf.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(convert_hf, "snapshot_download", download)
    convert_hf.convert("owner/name", out)
    weights = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "generation_config.json", weights}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["source"] == "owner/name"


def conversion_peak(small, source, out):
    """Bytes by which converting `source` raises a process's peak over converting `small`."""
    command = """if True:
        import re, sys, convert_hf
        def peak_bytes():
            return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        convert_hf.convert(sys.argv[1], sys.argv[2], "bfloat16")
        before = peak_bytes()
        convert_hf.convert(sys.argv[3], sys.argv[4], "bfloat16")
        print(peak_bytes() - before)"""
    paths = [small, small.with_name("small_out"), source, out]
    run = subprocess.run([sys.executable, "-c", command, *paths], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    return int(run.stdout)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_stays_near_one_shard(kind, tmp_path, out):
    """300 MB in three shards, cast on the way: the peak over a small conversion's is under 1.3 of the largest shard."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=8000))
    model = LlamaForCausalLM(config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    hf = tmp_path / "hf"
    model.save_pretrained(hf, max_shard_size=f"{size // 3 // 10**6 + 10}MB")
    if kind == "bin":
        for path in hf.glob("*.safetensors"):
            torch.save(load_file(path), hf / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
            path.unlink()
        index = hf / "model.safetensors.index.json"
        names = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
        (hf / "pytorch_model.bin.index.json").write_text(names)
        index.unlink()
    del model
    shard_bytes = [path.stat().st_size for path in hf.glob(f"*.{kind}")]
    assert sum(shard_bytes) > 250e6 and len(shard_bytes) == 3
    make_hf(tmp_path / "small")
    peak = conversion_peak(tmp_path / "small", hf, out)
    print(f"peak +{peak / 1e6:.0f} MB, largest shard {max(shard_bytes) / 1e6:.0f} MB")
    assert peak < 1.3 * max(shard_bytes)


def test_bin_from_before_torch_1_6(hf, out):
    """Such a file is not a zip archive, and torch.load(mmap=True) refused it."""
    expected = (convert_hf.convert(hf, out.parent / "first") / "model.safetensors").read_bytes()
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    (hf / "model.safetensors").unlink()
    assert (convert_hf.convert(hf, out) / "model.safetensors").read_bytes() == expected
    torch.save({"a": subprocess.Popen}, hf / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    refused(hf, out.parent / "second", "pytorch_model.bin")


def test_adapter_is_named(hf, out):
    """A LoRA adapter beside the model was left out without a word."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (hf / "adapter_config.json").write_text(json.dumps(adapter))
    refused(hf, out, r"adapter \(LORA\) of owner/base lies beside the model: .*move it away")
    (hf / "config.json").unlink()
    refused(hf, out, r"adapter \(LORA\) of owner/base, not a model: .*peft's merge_and_unload")


@pytest.mark.parametrize("head", ["other", "equal", "alone"])
@torch.inference_mode()
def test_head_of_a_tied_config(head, tmp_path, out):
    """Where a config says tied and the weights hold another head, that counts. It was ignored."""
    hf = tmp_path / "hf"
    make_hf(hf, "llama-tied")

    def change(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = torch.randn(64, 32) if head == "other" else embedding.clone()
        if head == "alone":
            del tensors["model.embed_tokens.weight"]

    edit_weights(hf, change)
    save_file(load_file(hf / "model.safetensors"), hf / "model.safetensors", {"format": "pt"})
    convert_hf.convert(hf, out)
    tokens = torch.randint(SHAPE["vocab_size"], (2, 17))
    want = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(logits(out, tokens), want, atol=2e-5, rtol=1e-4)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == (head != "other")
    assert ("head.weight" in load_file(out / "model.safetensors")) == (head == "other")


def test_tokenizer_files_are_copied(hf, out):
    for name in ("chat_template.jinja", "added_tokens.json", "tokenizer.json"):
        (hf / name).write_text(name)
    convert_hf.convert(hf, out)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert (out / "added_tokens.json").exists() and (out / "tokenizer.json").exists()


# ---------------------------------------------------------------- GGUF

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "ab", "<|end|>"]
LETTERS = dict(model="gpt2", pre="gpt-2", tokens=LETTERS, token_type=[1] * 63 + [3],
               merges=["a b"], eos_token_id=63)  # a tokenizer of 64 tokens
GGUF_ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def gguf_views(model, single_experts):
    """(name in GGUF, view of a parameter, heads whose rows are interleaved there) of a model."""
    c = model.config
    interleaved = {}
    if GGUF_ARCHITECTURES[c.model_type] == "llama":
        interleaved = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[GGUF_ARCHITECTURES[c.model_type].upper()],
                                     c.num_hidden_layers)
    for name, parameter in model.named_parameters():
        hf_name, suffix = name.rsplit(".", 1)
        if not hf_name.endswith("experts"):
            heads = interleaved.get(hf_name.split(".")[-1])
            yield f"{names.get_name(hf_name)}.{suffix}", parameter.data, heads
            continue
        halves = parameter.data.chunk(2, 1) if suffix == "gate_up_proj" else [parameter.data]
        for part, view in zip(suffix.removesuffix("_proj").split("_"), halves):
            prefix = f"blk.{hf_name.split('.')[2]}.ffn_{part}"
            if single_experts:
                yield from ((f"{prefix}.{e}.weight", expert, None) for e, expert in enumerate(view))
            else:
                yield f"{prefix}_exps.weight", view, None


def write_gguf(path, model, quantisation="F32", tokenizer=LETTERS, keys=None, tensors=None,
               single_experts=False):
    """Writes a Hugging Face model as llama.cpp does; the model takes the values that are written.

    keys, tensors: more of them, {name: value}; None leaves one out that the model has.
    """
    c, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    architecture = GGUF_ARCHITECTURES[c.model_type]
    fields = {
        "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "context_length": c.max_position_embeddings,
        "attention.head_count": c.num_attention_heads,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": getattr(c, "head_dim", None)}
    if c.model_type == "mixtral":
        fields |= {"expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok}
    fields = {f"{architecture}.{key}": value for key, value in fields.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    fields |= {"general.architecture": architecture, **(keys or {})}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array, type(None): lambda key, value: None}
    for key, value in fields.items():
        add[type(value)](key, value)

    arrays = {}
    for name, view, heads in gguf_views(model, single_experts):
        rows = view if heads is None else (
            view.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2))
        stored = kind if view.ndim > 1 else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(rows.float().contiguous().numpy(), stored)
        arrays[name] = (array, stored if array.dtype == "uint8" else None)
        back = torch.tensor(gguf.quants.dequantize(array, stored))
        if heads is not None:
            back = back.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        view.copy_(back)
    arrays |= {name: (array, None) for name, array in (tensors or {}).items()}
    for name, (array, stored) in arrays.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gguf_model(path, kind="llama", config=None, **more):
    """A random model of this kind, written as a GGUF file."""
    torch.manual_seed(0)
    model_class, config_class, shape = MODELS[kind]
    shape = {**SHAPE, "intermediate_size": 64, **shape, **(config or {})}
    return write_gguf(path, randomize(model_class(config_class(**shape))), **more)


@needs_gguf
@pytest.mark.parametrize("kind, quantisation, more", [
    ("llama", "F32", {}), ("llama", "Q8_0", {}), ("llama-tied", "F16", {}), ("llama", "Q5_1", {}),
    ("mixtral", "Q4_0", {}), ("mixtral", "Q4_1", {"single_experts": True}), ("qwen2", "Q8_0", {}),
    ("qwen3", "BF16", {}),
], ids=str)
@torch.inference_mode()
def test_gguf_equals_its_model(kind, quantisation, more, tmp_path, out, monkeypatch):
    monkeypatch.setattr(convert_hf, "CHUNK", 100)  # several chunks a tensor
    model = gguf_model(tmp_path / "m.gguf", kind, quantisation=quantisation, **more)
    convert_hf.convert(tmp_path / "m.gguf", out)
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    sixteen_bit = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert dtypes == {sixteen_bit.get(quantisation, torch.float32)}
    tokens = torch.randint(SHAPE["vocab_size"], (2, 17))
    convert_hf.convert(tmp_path / "m.gguf", out.with_name("float32"), dtype="float32")
    ours = logits(out.with_name("float32"), tokens)
    torch.testing.assert_close(ours, model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ModelConfig.from_file(out / "config.json").tie_embeddings == (kind == "llama-tied")


@needs_gguf
@pytest.mark.parametrize("scaling", ["linear", "scale_linear", "llama3"])
@torch.inference_mode()
def test_gguf_rope_scaling(scaling, tmp_path, out):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    keys, tensors = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {}
    if scaling == "scale_linear":  # files of 2023
        keys = {"llama.rope.scale_linear": 4.0}
    if scaling == "llama3":
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 10000.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope))
        plain = LlamaForCausalLM(LlamaConfig(**SHAPE)).model.rotary_emb.inv_freq
        keys = {}
        tensors = {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
    model = gguf_model(tmp_path / "m.gguf", config={"rope_parameters": rope}, keys=keys,
                       tensors=tensors)
    convert_hf.convert(tmp_path / "m.gguf", out)
    tokens = torch.randint(SHAPE["vocab_size"], (1, 100))
    torch.testing.assert_close(logits(out, tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)


TEXTS = [
    "The sea was calm.", " two  spaces   and\ttabs\n\n\n lines \n", "", " ", "a\r\nb\r\n\r\n  c",
    "def f(x):\n    return x[1:]  # 12345", "    2024-11-28 3.14159 1,000,000",
    "naïve café, Привет, 日本語, ١٢٣, 😀👍🏽", "\u00a0nbsp\u3000wide", "it's I'LL don't WE'VE",
    "<s>a</s> <|end|>b<think>"]


@needs_gguf
@pytest.mark.parametrize("space_prefix", [True, False])
def test_gguf_sentencepiece_tokenizer(space_prefix, tmp_path, out):
    """tiny's tokenizer, through a GGUF file: the same ids, and the same text back."""
    tiny = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    size = tiny.get_piece_size()
    types = [2 if tiny.is_unknown(i) else 3 if tiny.is_control(i) else 6 if tiny.is_byte(i) else 1
             for i in range(size)]
    tokenizer = dict(model="llama", tokens=[tiny.id_to_piece(i) for i in range(size)],
                     token_type=types, scores=[tiny.get_score(i) for i in range(size)],
                     add_space_prefix=space_prefix)
    gguf_model(tmp_path / "m.gguf", config={"vocab_size": size}, tokenizer=tokenizer)
    convert_hf.convert(tmp_path / "m.gguf", out)
    ours = Tokenizer(out)
    assert ours.prefix == [tiny.bos_id()] and tiny.eos_id() in ours.encode("a</s>b", special=False)
    for text in (text for text in TEXTS if text and "s>" not in text):  # which SentencePiece would cut
        ids = ours.encode(text if space_prefix else f" {text}", special=False)
        assert ids == tiny.encode(text)
        assert ours.decode(ids) == (text if space_prefix else f" {text}")
    assert ModelConfig.from_file(out / "config.json").eos_ids == (tiny.eos_id(),)


def byte_level_gguf(path, pre, **more):
    """A GGUF file with a byte-level tokenizer trained here on code and prose; its tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=pre != "llama-bpe")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                             initial_alphabet=byte_level.alphabet())
    text = (ROOT / "model.py").read_text()
    trained.train_from_iterator([*text.split("\n\n"), *TEXTS], trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokens += ["<s>", "</s>", "<|end|>", "<think>", "[PAD]"]
    n = len(tokens)
    tokenizer = dict(
        model="gpt2", pre=pre, tokens=tokens, token_type=[1] * (n - 5) + [3, 3, 3, 4, 5],
        merges=[" ".join(pair) for pair in learnt["merges"]], bos_token_id=n - 5,
        eos_token_id=n - 4, eot_token_id=n - 3, **more)
    gguf_model(path, config={"vocab_size": n}, tokenizer=tokenizer,
               keys={"tokenizer.chat_template": "{{ 'ü' }}"})
    return tokens


@needs_gguf
@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_gguf_byte_level_tokenizer(pre, add_bos, tmp_path, out):
    """Ids as transformers reads them from the file, and where that lacks a rule, with that rule.

    It takes smollm as GPT-2, though digits stand alone there; it does not bring Qwen2's text to
    NFC, nor take a Llama 3 word whole that is a token but no merges lead to.
    """
    pytest.importorskip("transformers", minversion="5.24")  # earlier ones read less of the file
    more = {} if add_bos is None else {"add_bos_token": add_bos}
    tokens = byte_level_gguf(tmp_path / "m.gguf", pre, **more)
    convert_hf.convert(tmp_path / "m.gguf", out)
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
    if pre == "smollm":
        oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre == "qwen2":
        oracle.normalizer = tokenizers.normalizers.NFC()
    oracle.model.ignore_merges = pre == "llama-bpe"
    begins = [tokens.index("<s>")] if add_bos or (add_bos is None and pre == "llama-bpe") else []
    for text in [*TEXTS, "e\u0301"]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).ids == begins + ids
        assert pre == "qwen2" or ours.decode(ids, skip_special_tokens=False) == text
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'ü' }}"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings == {"bos_token": "<s>", "eos_token": "</s>"}
    config = ModelConfig.from_file(out / "config.json")
    assert config.eos_ids == (tokens.index("</s>"), tokens.index("<|end|>"))


@needs_gguf
@pytest.mark.parametrize("more, match", [
    ({"keys": {"general.architecture": "gemma3"}}, "a model of architecture gemma3: must be"),
    ({"keys": {"general.type": "adapter"}}, "an? adapter of architecture llama: must be a model"),
    ({"keys": {"split.count": 3, "split.no": 1, "llama.block_count": None}}, "part 2 of 3: join"),
    ({"keys": {"llama.block_count": None}}, "block_count is missing"),
    ({"keys": {"llama.block_count": 3}}, r"9 tensors missing \(model.layers.2"),
    ({"keys": {"tokenizer.ggml.tokens": None}}, "tokens is missing"),
    ({"keys": {"tokenizer.ggml.token_type": [1]}}, "shorter"),
    ({"keys": {"tokenizer.ggml.merges": ["a q"]}}, "its tokens and merges are not a tokenizer's"),
    ({"keys": {"tokenizer.ggml.pre": "deepseek-llm"}}, "tokenizer.ggml.pre=deepseek-llm: must be"),
    ({"keys": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model=bert: must be gpt2"),
    ({"keys": {"split.count": 2}}, "metadata of the wrong kind"),
    ({"keys": {"tokenizer.ggml.bos_token_id": "x"}}, "metadata of the wrong kind"),
    ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope scaling yarn: must be linear"),
    ({"keys": {"llama.rope.dimension_count": 4}}, "RoPE over 4 of 8 channels"),
    ({"keys": {"llama.attention.head_count": [4, 4]}}, "must be"),
    ({"tensors": {"odd.weight": torch.zeros(2, 32).numpy()}}, r"1 tensors unexpected \(odd.weight"),
    ({"tensors": {"odd.weight": torch.zeros(2, 32).int().numpy()}}, "odd.weight: quantisation I32"),
    ({"tensors": {"output_norm.weight": None}}, r"1 tensors missing \(model.norm.weight\)"),
], ids=lambda value: next(iter(next(iter(value.values())))) if isinstance(value, dict) else None)
def test_gguf_that_does_not_fit_is_refused(more, match, tmp_path, out):
    gguf_model(tmp_path / "m.gguf", **more)
    refused(tmp_path / "m.gguf", out, f"m.gguf: .*{match}")


@needs_gguf
def test_damaged_gguf_is_refused(tmp_path, out):
    path = tmp_path / "m.gguf"
    gguf_model(path)
    whole = path.read_bytes()
    for cut in [*range(0, len(whole) - 32, 997), 3, 4, 23, 24, 25]:
        path.write_bytes(whole[:cut])
        refused(path, out, "m.gguf: cannot be read: truncated, or not a GGUF file")
    path.write_bytes(b"<html>" * 99)
    refused(path, out, "m.gguf: cannot be read: truncated, or not a GGUF file")
    name = b"blk.0.attn_q.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # after the dimensions' number and themselves
    path.write_bytes(whole[:kind] + (999).to_bytes(4, "little") + whole[kind + 4 :])
    refused(path, out, "m.gguf: .*blk.0.attn_q.weight: quantisation 999, unknown to this gguf")
    refused(tmp_path / "absent.gguf", out, "absent.gguf: no such file")


def test_gguf_without_its_package(tmp_path, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", out, "m.gguf: .*pip install gguf")


@needs_gguf
def test_gguf_at_the_command_line(tmp_path, monkeypatch):
    """generate.py converts it once, beside nothing else; a broken file is one line and status 2."""
    gguf_model(tmp_path / "m.gguf")
    (tmp_path / "broken.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-1000])
    monkeypatch.setattr(generate, "HERE", tmp_path)
    first = generate.resolve_checkpoint(str(tmp_path / "m.gguf"))
    assert first.parent == tmp_path / "checkpoints" and first.name.startswith("m-")
    monkeypatch.setattr(generate, "convert", None)  # not again
    assert generate.resolve_checkpoint(str(tmp_path / "m.gguf")) == first
    for script, *arguments in [("generate.py", "--checkpoint", tmp_path / "broken.gguf"),
                               ("convert_hf.py", tmp_path / "broken.gguf", tmp_path / "out")]:
        run = command(script, *arguments)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and not run.stdout, run.stderr
        assert "broken.gguf: cannot be read: truncated" in run.stderr
    assert not (tmp_path / "out").exists()


@needs_gguf
def test_gguf_takes_little_memory(tmp_path, out):
    """50 MB of Q8_0 become 200 MB: beside the file, which is mapped, some chunks are held."""
    gguf_model(tmp_path / "small.gguf")
    gguf_model(tmp_path / "m.gguf", quantisation="Q8_0", config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16))
    size = (tmp_path / "m.gguf").stat().st_size
    assert size > 45e6
    peak = conversion_peak(tmp_path / "small.gguf", tmp_path / "m.gguf", out)
    print(f"peak +{peak / 1e6:.0f} MB, file {size / 1e6:.0f} MB")
    assert peak < size + 40e6


PUBLISHED = {  # file: (tokens to decode, what follows "The capital of France is")
    "SmolLM2-135M-Instruct.Q4_1.gguf": (64, " Paris."),
    "Qwen2.5-Coder-0.5B-Instruct.gguf": (32, " Paris"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """(file name, our checkpoint, transformers' own reading of the file)."""
    folder = Path(os.environ.get("DS_MODELS", "absent"))
    if not (folder / request.param).exists():
        pytest.skip(f"needs {request.param} in the folder that DS_MODELS names")
    pytest.importorskip("accelerate")  # transformers needs it for GGUF
    out = tmp_path_factory.mktemp("published") / "out"
    checkpoint = convert_hf.convert(folder / request.param, out)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=request.param,
                                                 dtype=torch.float32)
    return request.param, checkpoint, model.eval().to(DEVICE)


@needs_gguf
@torch.inference_mode()
def test_published_gguf_equals_transformers(published):
    """Logits over 512 tokens within 1e-3 in fp32; greedy tokens of three prompts."""
    name, checkpoint, hf = published
    model, tokenizer, _ = generate.load(str(checkpoint), DEVICE, torch.float32)
    text = (ROOT / "model.py").read_text()
    tokens = torch.tensor([tokenizer.encode(text)[:512]], device=DEVICE)
    torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-3, rtol=0)
    n, _ = PUBLISHED[name]
    for prompt in ("The capital of France is", "def fibonacci(n):\n", text[:3000]):
        prompt = tokenizer.encode(prompt)
        cache = KVCache(model.config, 1, len(prompt) + n, DEVICE, torch.float32)
        ours = generate.generate(generate.DecodeStep(model, cache), [prompt], n).token_ids[0]
        ids = torch.tensor([prompt], device=DEVICE)
        theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                             do_sample=False, eos_token_id=list(model.config.eos_ids))
        theirs = theirs[0, len(prompt) :].tolist()
        assert ours == [token for token in theirs if token not in model.config.eos_ids]


@needs_gguf
def test_published_gguf_s_tokenizer_equals_transformers(published):
    """Ids of prose, code and odd texts, but those to which transformers' reading lacks a rule."""
    pytest.importorskip("transformers", minversion="5.24")
    name, checkpoint, _ = published
    theirs = AutoTokenizer.from_pretrained(os.environ["DS_MODELS"], gguf_file=name)
    ours = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    specials = "<|im_start|>user\n1 + 1?<|im_end|>\n<tool_call>x</tool_call><|endoftext|>"
    files = [(ROOT / file).read_text() for file in ("README.md", "model.py")]
    texts = [*files[0].splitlines(), *files[1].split("\n\n"), specials, *TEXTS]
    if "SmolLM2" in name:
        texts = [text for text in texts if not re.search(r"\s\s+\d|[^\x00-\x7f]", text)]
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text), text
    assert len(texts) > 300
    assert (checkpoint / "chat_template.jinja").read_text() == theirs.chat_template


def test_published_gguf_at_the_command_line(published, tmp_path, monkeypatch):
    name, _, _ = published
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "generate.py", "--checkpoint", str(Path(os.environ["DS_MODELS"]) / name), "--sparsity", "1",
        "--prompt", "The capital of France is", "--max_new_tokens", "4",
        "--json", str(tmp_path / "out.json")])
    generate.main()
    text = json.loads((tmp_path / "out.json").read_text())["text"][0]
    assert text.startswith(PUBLISHED[name][1])


# ---------------------------------------------------------------- model

VARIANTS = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa": ("llama", {}),
    "tied": ("llama-tied", {"head_dim": 16}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "llama3-rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
        "original_max_position_embeddings": 32}}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 16,
                                "layer_types": ["sliding_attention", "full_attention"]}),
}


@pytest.mark.parametrize("kind, more", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_logits_and_greedy_decoding_equal_hf(kind, more, tmp_path):
    """Converted by our converter: logits of a forward, of chunked prefill + decode, dense and with a
    budget of all tokens, and 32 greedy tokens."""
    hf = make_hf(tmp_path / "hf", kind, config=more)
    model = load_model(convert_hf.convert(tmp_path / "hf", tmp_path / "out"), "cpu", torch.float32)
    prompt = torch.randint(3, SHAPE["vocab_size"], (1, 41), generator=torch.Generator().manual_seed(1))
    want = hf(prompt).logits
    torch.testing.assert_close(model(prompt), want, atol=1e-4, rtol=0)
    cache = KVCache(model.config, 1, 41, "cpu", torch.float32)
    model.prefill([prompt[0, :20].tolist()], cache, chunk=8)
    one = model.decode(prompt[0, 20:21], cache)
    rest = model.decode_rows(prompt[0, 21:], cache)
    torch.testing.assert_close(torch.cat([one, rest]), want[0, 20:], atol=1e-4, rtol=0)
    full = DSConfig(n_tokens=100, label_channels=8, dense_layers=0, impl="torch")
    zeros = torch.zeros(model.config.n_kv_heads, 8)
    label_map = LabelMap.from_statistics(torch.arange(8).expand_as(zeros), zeros, zeros + 1, ((8, 4),))
    cache = KVCache(model.config, 1, 41, "cpu", torch.float32, full, [label_map] * model.config.n_layers)
    model.prefill([prompt[0, :20].tolist()], cache)
    torch.testing.assert_close(model.decode_rows(prompt[0, 20:], cache), want[0, 20:], atol=1e-4, rtol=0)
    theirs = hf.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 41:].tolist()
    object.__setattr__(model.config, "eos_ids", ())
    cache = KVCache(model.config, 1, 41 + 32, "cpu", torch.float32)
    assert generate.generate(generate.DecodeStep(model, cache), [prompt[0].tolist()], 32).token_ids == [theirs]


# Keys as published models have them, sizes aside; what is not there takes transformers' default.
LLAMA1 = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", initializer_range=0.02,
              rms_norm_eps=1e-6, torch_dtype="float16", transformers_version="4.28.0", use_cache=True, pad_token_id=0)
MISTRAL = LLAMA1 | dict(architectures=["MistralForCausalLM"], model_type="mistral", num_key_value_heads=2)
MIXTRAL = MISTRAL | dict(architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=4,
                         output_router_logits=False, router_aux_loss_coef=0.02)
QWEN2 = LLAMA1 | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_key_value_heads=2)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
CONFIGS = {  # (keys, trained positions)
    "llama1-no-positions": (LLAMA1 | dict(max_sequence_length=2048, pad_token_id=-1), 2048),
    "llama2": (LLAMA1 | dict(max_position_embeddings=4096, pretraining_tp=2, rope_scaling=None, rms_norm_eps=1e-5), 4096),
    "llama3.2": (LLAMA1 | dict(max_position_embeddings=1024, attention_bias=False, mlp_bias=False, rope_theta=5e5, head_dim=16,
                               rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True, eos_token_id=[5, 6]), 1024),
    "llama3-rope-parameters": (LLAMA1 | dict(max_position_embeddings=1024, rope_parameters=LLAMA3_ROPE | dict(rope_theta=5e5)),
                               1024),
    "smollm2": (LLAMA1 | {"is_llama_config": True, "rope_interleaved": False, "num_key_value_heads": 1, "rope_theta": 100000,
                          "max_position_embeddings": 8192, "transformers.js_config": {"kv_cache_dtype": {"q4": "float16"}},
                          "tie_word_embeddings": True}, 8192),
    "eagle": (LLAMA1 | dict(max_position_embeddings=2048, bias=False), 2048),
    "llama-with-a-window": (LLAMA1 | dict(sliding_window=5, max_position_embeddings=99), 99),
    "vicuna-16k": (LLAMA1 | dict(max_position_embeddings=4096, max_sequence_length=16384, st_hidden_size=64,
                                 rope_scaling=dict(type="linear", factor=4.0)), 16384),
    "deepseek-coder": (LLAMA1 | dict(max_position_embeddings=16384, rope_scaling=dict(type="linear", factor=4.0)), 16384),
    "dynamic-ntk": (LLAMA1 | dict(max_position_embeddings=4096, rope_scaling=dict(type="dynamic", factor=8.0)), 4096),
    "without-architectures": ({k: v for k, v in LLAMA1.items() if k != "architectures"}, 2048),
    "mistral-default-window": (MISTRAL, 131072),
    "mistral-v0.1": (MISTRAL | dict(sliding_window=7, max_position_embeddings=32768), 32768),
    "mistral-v0.3": (MISTRAL | dict(sliding_window=None, rope_theta=1e6, max_position_embeddings=32768), 32768),
    "mixtral-default-theta": (MIXTRAL, 131072),
    "mixtral-with-a-window": (MIXTRAL | dict(sliding_window=7), 131072),
    "qwen2-unused-window": (QWEN2 | dict(use_sliding_window=False, sliding_window=7, max_window_layers=1), 32768),
    "qwen2-no-end": (QWEN2 | dict(bos_token_id=5, eos_token_id=None, rope_theta=1e6), 32768),
}


def make_published(path, config):
    """A random model of transformers' for a config.json, in `path` with the config as it is given; returns the model."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    path.mkdir()
    text = json.dumps(sizes | config)
    (path / "config.json").write_text(text)
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(path, pad_token_id=None)  # -1, as some have it, can't be saved again
    hf = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    for parameter in randomize(hf).parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    hf.save_pretrained(path)
    (path / "config.json").write_text(text)
    (path / "generation_config.json").unlink(missing_ok=True)
    return hf


@pytest.mark.parametrize("config, positions", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_published_configs_are_read_as_transformers_reads_them(config, positions, tmp_path):
    """Logits, end tokens and trained length. Regressions: unknown keys and absent ones were refused, Mistral's and Mixtral's
    defaults were Llama's, a window was taken where transformers takes none, linear scaling multiplied the trained length."""
    hf = make_published(tmp_path / "hf", config)
    model = load_model(convert_hf.convert(tmp_path / "hf", tmp_path / "out", "float32"), "cpu", torch.float32)
    prompt = torch.arange(24)[None]
    torch.testing.assert_close(model(prompt), hf(prompt).logits, atol=1e-4, rtol=1e-4)
    eos = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id
    assert model.config.eos_ids == tuple([] if eos is None else eos if isinstance(eos, list) else [eos])
    assert model.config.max_positions == positions


@torch.inference_mode()
def test_mistral_s_default_window_is_applied(tmp_path):
    """Regression: absent, it was taken for none, and texts past 4,096 tokens went their own way."""
    hf = make_published(tmp_path / "hf", MISTRAL | dict(num_hidden_layers=1))
    model = load_model(convert_hf.convert(tmp_path / "hf", tmp_path / "out", "float32"), "cpu", torch.float32)
    assert model.config.window(0) == 4096
    prompt = torch.randint(64, (1, 4200), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(prompt)[:, -9:], hf(prompt).logits[:, -9:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text, eos_ids", [('{"eos_token_id": [2, 9]}', (2, 9)), ('{"eos_token_id": 4}', (4,)), ("{}", ())])
def test_end_tokens_are_those_of_generation_config(text, eos_ids, tmp_path):
    """Regression: config.json's were taken, and chat models did not stop. As transformers has it, an empty file means none."""
    make_published(tmp_path / "hf", LLAMA1 | dict(eos_token_id=7))
    (tmp_path / "hf" / "generation_config.json").write_text(text)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id
    assert theirs == (list(eos_ids) if len(eos_ids) > 1 else eos_ids[0] if eos_ids else None)
    out = convert_hf.convert(tmp_path / "hf", tmp_path / "out")
    assert ModelConfig.from_file(out / "config.json").eos_ids == eos_ids


@pytest.mark.parametrize("change, match", [
    (dict(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "architecture GPT2LMHeadModel"),
    (dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3"), "model_type gemma3"),
    (dict(quantization_config=dict(quant_method="awq", bits=4)), "quantised by awq"),
    (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "quantised by bitsandbytes"),
    (dict(auto_map=dict(AutoModelForCausalLM="modeling_x.X")), "auto_map"),
    (dict(attention_bias=True), "attention_bias=True"), (dict(hidden_act="gelu"), "hidden_act=gelu"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type=yarn"),
    (dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "rope_type=longrope"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(rope_scaling=dict(type="linear")), "missing key 'factor'"),
    (dict(hidden_size="64"), "wrong type"), (dict(num_hidden_layers=0), "n_layers=0"),
    (dict(eos_token_id="x"), "eos_token_id='x'"), (dict(eos_token_id=[2, None]), "eos_token_id="),
    (dict(rms_norm_eps="x"), "norm_eps='x'"), (dict(rope_theta=-1.0), "rope_theta=-1.0"),
    (dict(model_type=["a"]), "must be one of"), (dict(model_type=None, architectures=5), "architecture 5"),
])
def test_configs_that_would_change_the_result_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_dict(LLAMA1 | change)


def test_unread_keys_are_named_in_one_line(tmp_path, capsys):
    make_published(tmp_path / "hf", LLAMA1 | dict(st_hidden_size=64, is_llama_config=True))
    capsys.readouterr()
    convert_hf.convert(tmp_path / "hf", tmp_path / "out")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is_llama_config, st_hidden_size" in told


def test_presets_have_the_published_sizes():
    """Billions of parameters of the published checkpoints, embeddings included."""
    sizes = {name: sum(math.prod(s) for s in parameter_shapes(config).values()) / 1e9 for name, config in PRESETS.items()}
    published = {"Llama-7B": 6.738, "Llama-2-7B": 6.738, "Llama-2-70B": 68.977, "Vicuna-7B-v1.5-16K": 6.738,
                 "Mistral-7B-v0.1": 7.242, "Mixtral-8x7B-v0.1": 46.703, "Llama-3.1-8B": 8.030, "Qwen2.5-7B": 7.616,
                 "Qwen3-8B": 8.191}
    assert sizes == pytest.approx(published, abs=1e-3)


def random_model(seed=0, **more):
    """A small random model with label maps of random channels: (model, label_maps, ds)."""
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=64, max_positions=256)
    model = Transformer(ModelConfig(**(shape | more))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3)
        elif ".attn." in name:  # biases, and norms of q and k
            parameter.normal_(1, 0.3)
    config = DSConfig(sparsity=4, min_tokens=4, label_channels=8, dense_layers=1, dense_below=0, sink=1, recent=2)
    channels = torch.randperm(16)[:8].expand(2, -1)
    label_map = LabelMap.from_statistics(channels, torch.zeros(2, 8), torch.ones(2, 8), ((8, 4),))
    return model, [label_map] * 3, config


@pytest.mark.parametrize("more", [{}, {"sliding_window": 24}, {"n_experts": 4, "experts_per_token": 2},
                                  {"qkv_bias": True, "sliding_window": 24, "full_layers": (0, 2)}, {"qk_norm": True}],
                         ids=["llama", "window", "mixtral", "qwen2-windows", "qwen3"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_ragged_batch_gives_what_each_prompt_gives_alone(sparse, more):
    model, maps, config = random_model(4, **more)
    prompts = [[1] + torch.randint(3, 64, (n,)).tolist() for n in (70, 5, 33)]

    def run(batch):
        cache = KVCache(model.config, len(batch), 110, "cpu", torch.float32, config if sparse else None, maps)
        return generate.generate(generate.DecodeStep(model, cache), batch, 30).token_ids

    together = run(prompts)
    assert together == [run([prompt])[0] for prompt in prompts]
    assert max(map(len, together)) == 30


def test_a_row_of_a_mixed_batch_decides_for_itself():
    """A short prompt attends to all its tokens, and a long one to few, alone and together."""
    model, maps, config = random_model(4, eos_ids=())
    prompts = [[1] + torch.randint(3, 64, (n,)).tolist() for n in (70, 20)]

    def run(batch, below):
        cache = KVCache(model.config, len(batch), 110, "cpu", torch.float32,
                        replace(config, dense_below=below), maps)
        return generate.generate(generate.DecodeStep(model, cache), batch, 30).token_ids

    sparse, dense, mixed = (run(prompts, below) for below in (0, 1000, 64))
    assert mixed == [sparse[0], dense[1]] and sparse[0] != dense[0] and sparse[1] != dense[1]
    assert mixed == [run([prompt], 64)[0] for prompt in prompts]


def test_tokens_attended_to_in_sparse_steps_are_counted():
    """By the kernels; a short row of a mixed batch attends to all its tokens."""
    step = decode_step(60, 2, more=dict(impl="triton", dense_below=20))
    cache = step.cache
    scratch = cache.layers[0].workspace or ds.Workspace(2, 4, 2, 16, 60, DEVICE, cache.ds, splits=1)
    for layer in cache.layers:
        layer.workspace = scratch
    for n in (2, 1):  # begin() counts anew
        generate.generate(step, [[1] + list(range(3, 32)), [1, 5, 9, 20, 7]], n)
        wanted = [cache.ds.budget(length + i) for length in (30, 5) for i in range(n)]
        assert wanted[n:] == list(range(5, 5 + n)) and wanted[0] == 8
        found = cache.statistics()["tokens_attended"]
        assert found == pytest.approx(sum(wanted) / len(wanted), abs=0.3), "ties may add some"


@pytest.mark.parametrize("window", [None, 24], ids=["full", "window"])
def test_chunked_prefill_equals_whole_prefill(window):
    model, maps, config = random_model(sliding_window=window)
    prompt = [1] + torch.randint(3, 64, (76,)).tolist()
    caches = []
    for chunk in (1000, 16, 7):
        cache = KVCache(model.config, 1, 80, "cpu", torch.float32, config, maps)
        model.prefill([prompt], cache, chunk=chunk)
        caches.append(cache)
    for cache in caches[1:]:
        for got, want in zip(cache.layers, caches[0].layers):
            torch.testing.assert_close(got.kv, want.kv, atol=1e-4, rtol=0)
            if want.labels is not None:
                assert (got.labels != want.labels).float().mean() < 0.01  # a value between two codes may fall either way


def test_decode_rows_equal_decoding_one_by_one():
    model, maps, config = random_model()
    tokens = torch.randint(3, 64, (60,))
    cache = KVCache(model.config, 1, 60, "cpu", torch.float32, config, maps)
    one_by_one = torch.cat([model.decode(token[None], cache) for token in tokens])
    cache = KVCache(model.config, 1, 60, "cpu", torch.float32, config, maps)
    rows = torch.cat([model.decode_rows(part, cache) for part in tokens.split(25)])
    torch.testing.assert_close(rows, one_by_one, atol=1e-4, rtol=0)


DECODES = {  # with dim 40, ffn_dim 36 and a vocabulary of 65: no multiples of any block
    "mha": dict(B=1, n_heads=2, n_kv_heads=2),
    "gqa": dict(B=3, n_heads=4, n_kv_heads=2),
    "gqa-128": dict(B=16, n_heads=3, n_kv_heads=1, head_dim=128),
    "window": dict(B=3, n_heads=1, n_kv_heads=1, head_dim=128, sliding_window=9),
    "tied": dict(B=5, n_heads=3, n_kv_heads=3, tie_embeddings=True),
    "experts": dict(B=3, n_heads=2, n_kv_heads=1, n_experts=4, experts_per_token=2),
    "bias": dict(B=3, n_heads=7, n_kv_heads=1, qkv_bias=True),
    "head-norms": dict(B=3, n_heads=2, n_kv_heads=1, head_dim=128, qk_norm=True),
    "head-norms-two-heads-a-program": dict(B=17, n_heads=3, n_kv_heads=1, head_dim=16, qk_norm=True, dim=280),
    "several-steps": dict(B=17, n_heads=2, n_kv_heads=1, dim=280, ffn_dim=528),  # of BLOCK_K, the last not full
    "int8": dict(B=3, n_heads=7, n_kv_heads=1, qkv_bias=True, quantize=True),
    "int8-in-parts": dict(B=3, n_heads=4, n_kv_heads=2, dim=512, ffn_dim=1280, quantize=True),
    "int8-many": dict(B=17, n_heads=2, n_kv_heads=1, dim=528, ffn_dim=1040, quantize=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16 if GPU else torch.float32], ids=str)
@pytest.mark.parametrize("case", DECODES.values(), ids=DECODES)
@torch.inference_mode()
def test_decode_kernels_equal_the_blocks(case, dtype):
    """Logits and cache of a ragged step, against the blocks' own forward in fp32; the cache is written where it should be."""
    shape = dict(dim=40, n_layers=2, head_dim=64, ffn_dim=36, vocab_size=65) | case
    B, quantize = shape.pop("B"), shape.pop("quantize", False)
    model, _, _ = random_model(**shape)
    model = model.to(DEVICE, dtype)
    for name, parameter in model.named_parameters():
        parameter.mul_(0.3) if parameter.ndim > 1 else parameter.normal_(1, 0.3)
    if quantize:
        model.quantize()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (B,), generator=generator).to(DEVICE)
    lens = torch.tensor([(7 * b) % 40 for b in range(1, B)] + [0], dtype=torch.int32, device=DEVICE)
    past = torch.randn(B, shape["n_kv_heads"], 40, 2, shape["head_dim"], generator=generator).to(dtype)
    logits, caches = {}, {}
    for name, run in (("exact", torch.float32), ("torch", dtype), ("triton", dtype)) + (("again", dtype),) * GPU:
        cache = KVCache(model.config, B, 40, DEVICE, run)
        cache.seq_lens.copy_(lens)
        for layer in cache.layers:
            layer.kv.copy_(past)
        impl = "torch" if name in ("exact", "torch") else "triton"
        logits[name] = poisoned(lambda: copy.deepcopy(model).to(run).decode(tokens, cache, impl=impl))
        caches[name] = torch.stack([layer.kv for layer in cache.layers])  # [layers, B, HKV, S, 2, D]
        assert torch.equal(cache.seq_lens, lens + 1)
    new = (torch.arange(40, device=DEVICE) == lens[:, None])[None, :, None, :, None, None].expand_as(caches["exact"])
    assert all(torch.equal(got["triton"], got["again"]) for got in (logits, caches) if GPU), "the same inputs gave other bits"
    assert torch.equal(caches["triton"].masked_fill(new, 0), caches["torch"].masked_fill(new, 0)), "wrote elsewhere"
    allowance = 2 if GPU else 4  # the interpreter rounds to bfloat16 towards zero
    for got in (logits, {name: kv[new] for name, kv in caches.items()}):
        assert relative_error(got["triton"], got["exact"]) <= allowance * relative_error(got["torch"], got["exact"]) + 1e-5


@pytest.mark.parametrize("tiles", [dict(BLOCK_N=16, BLOCK_K=32), dict(BLOCK_N=64, BLOCK_K=64, STAGES=2), dict(AHEAD=99)],
                         ids=["small", "large", "early"])
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
    gate, up = (torch.nn.functional.rms_norm(table.float(), (96,), gain.float(), 1e-5) @ w13.float().T).chunk(2, -1)
    assert relative_error(outs[0], table + (torch.nn.functional.silu(gate) * up) @ w2.float().T) < 2e-3


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
    whole, model = load_model(TINY, "cpu", torch.float32), load_model(TINY, "cpu", torch.float32, "int8")
    whole.quantize()
    same = zip(whole.state_dict().items(), model.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in same)
    assert model.dtype == torch.float32 and model.embed.weight.dtype == torch.float32
    need = memory_need(model.config, 1, 10, torch.float32, quantize="int8")
    assert need["weights"] == sum(p.nbytes for p in model.parameters())
    config = replace(PRESETS["Mixtral-8x7B-v0.1"], n_layers=1, dim=8, ffn_dim=8, vocab_size=8, head_dim=2)
    with pytest.raises(ValueError, match="not for a model with experts"):
        Transformer(config).quantize()


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@torch.inference_mode()
def test_decode_steps_of_a_cuda_graph_equal_those_launched_alone():
    """Kernels that overlap, in one graph over all layers, sparse and dense, while lengths grow."""
    model, maps, config = random_model(dim=512, head_dim=64, ffn_dim=1024)
    maps = [first_channels(2, 8, ((8, 4),))] * 3
    model = model.to(DEVICE, torch.bfloat16)
    for parameter in model.parameters():
        parameter.mul_(0.2) if parameter.ndim > 1 else None
    caches = [KVCache(model.config, 3, 3000, DEVICE, torch.bfloat16, config, maps) for _ in range(2)]
    for cache in caches:
        model.prefill([torch.arange(n).remainder(64).tolist() for n in (2500, 7, 1100)], cache)
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


def test_end_of_text_stops_one_sequence_and_the_rest_go_on():
    model, _, _ = random_model()
    prompts = [[1, 5, 9], [1, 7]]
    cache = KVCache(model.config, 2, 40, "cpu", torch.float32)
    free = generate.generate(generate.DecodeStep(model, cache), prompts, 20).token_ids
    stop = next(token for token in free[0] if token not in free[1])
    object.__setattr__(model.config, "eos_ids", (stop,))
    cache.seq_lens.zero_()
    stopped = generate.generate(generate.DecodeStep(model, cache), prompts, 20).token_ids
    assert stopped == [free[0][: free[0].index(stop)], free[1]]


def test_sampling_is_seeded_and_respects_top_k():
    logits = torch.randn(4, 50)
    draws = [generate.sample(logits, 0.8, 3, torch.Generator().manual_seed(s)) for s in (0, 0, *range(1, 40))]
    assert torch.equal(draws[0], draws[1]) and any(not torch.equal(draws[0], d) for d in draws)
    top = logits.topk(3).indices
    assert all((top == d[:, None]).any(-1).all() for d in draws)
    assert torch.equal(generate.sample(logits), logits.argmax(-1))


def test_samples_have_the_softmax_s_frequencies():
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0], device=DEVICE), 100_000
    drawn = generate.sample(logits.expand(n, -1), 0.7, None, torch.Generator(DEVICE).manual_seed(0)).cpu()
    p = (logits.cpu() / 0.7).softmax(0)
    deviation = (p * (1 - p) / n).sqrt()
    assert ((drawn.bincount(minlength=5) / n - p).abs() <= 5 * deviation + 1e-9).all()


def decode_step(size=110, batch=1, sparse=True, seed=0, more={}, **sampling):
    """A DecodeStep of random_model, whose texts do not end and whose cache has room for `size` tokens."""
    model, maps, config = random_model(seed, eos_ids=())
    config = replace(config, **more) if sparse else None
    return generate.DecodeStep(model.to(DEVICE), KVCache(model.config, batch, size, DEVICE, torch.float32, config, maps), **sampling)


def test_generation_repeats_itself_with_a_seed_and_only_then():
    prompts = [[1, 5, 9, 20], [1, 7]]
    step = decode_step(60, 2, temperature=1.0)
    first, again = (generate.generate(step, prompts, 20).token_ids for _ in range(2))
    step.seed = 1
    assert first == again != generate.generate(step, prompts, 20).token_ids
    assert first == generate.generate(decode_step(60, 2, temperature=1.0), prompts, 20).token_ids


def test_frozen_rows_repeat_their_step_to_no_effect():
    """What a graph's warm-up and a batch with ended sequences rely on: the cache stays as it is, bit by bit, labels included."""
    step = decode_step(60, 3)
    step.model.prefill([[1, 5, 9, 20], [1], [1, 7]], step.cache)
    step.start([3, 4, 5])
    step.run(True)
    lengths = step.cache.seq_lens.tolist()
    before = [x.clone() for layer in step.cache.layers for x in (layer.kv, layer.labels) if x is not None]
    step.tokens.copy_(torch.tensor([3, 4, 5]))  # the inputs of that step
    step.running.copy_(torch.tensor([False, True, False]))
    sampled = step.sampled.clone()
    step.run(True)
    assert step.cache.seq_lens.tolist() == [lengths[0], lengths[1] + 1, lengths[2]]
    assert step.sampled[0] == sampled[0] and step.sampled[2] == sampled[2] and step.tokens.tolist()[::2] == [3, 5]
    after = [x for layer in step.cache.layers for x in (layer.kv, layer.labels) if x is not None]
    for x, y in zip(before, after):
        assert torch.equal(x[::2], y[::2]) and not torch.equal(x[1], y[1])


@pytest.mark.parametrize("reader", ["streaming", "stopping", "neither"])
def test_tokens_are_read_one_step_behind_or_at_the_end(reader, monkeypatch):
    """Step i + 1 has begun before the host asks for the tokens of step i."""
    step = decode_step(40, 2)
    object.__setattr__(step.model.config, "eos_ids", (99,) if reader == "stopping" else ())
    order, run, now = [], step.run, generate.now
    monkeypatch.setattr(step, "run", lambda sparse: (order.append("run"), run(sparse)))

    def recorded(device):
        event = now(device)
        wait, number = event.synchronize, order.count("run") - 1
        event = SimpleNamespace(elapsed_time=event.elapsed_time, synchronize=lambda: (order.append(number), wait()), **vars(event))
        return event

    monkeypatch.setattr(generate, "now", recorded if not GPU else now)
    streamed = [[], []]
    result = generate.generate(step, [[1, 5, 9], [1, 7]], 5,
                               on_token=(lambda b, token: streamed[b].append(token)) if reader == "streaming" else None)
    assert [len(ids) for ids in result.token_ids] == [5, 5]
    assert streamed == (result.token_ids if reader == "streaming" else [[], []])
    if not GPU:
        assert order == (["run"] * 5 + [0, 1, 2, 3, 4] if reader == "neither" else
                         ["run", "run", 0, "run", 1, "run", 2, "run", 3, 4])


def test_short_sequences_are_decoded_dense_and_leave_labels():
    """Below dense_below a sparse configuration gives what dense gives; the labels written meanwhile serve the sparse steps after."""
    prompt, size = [1] + torch.randint(3, 64, (19,), generator=torch.Generator().manual_seed(0)).tolist(), 100
    dense = generate.generate(decode_step(size, sparse=False), [prompt], 60)
    steps = {below: decode_step(size, more=dict(dense_below=below)) for below in (0, 50, 1000)}
    found = {below: generate.generate(step, [prompt], 60) for below, step in steps.items()}
    assert found[1000].token_ids == dense.token_ids and found[0].token_ids != dense.token_ids
    assert found[50].token_ids[0][:30] == dense.token_ids[0][:30] and found[50].token_ids != dense.token_ids
    assert found[1000].kv_bytes_per_step == dense.kv_bytes_per_step == dense.dense_kv_bytes_per_step
    assert found[0].kv_bytes_per_step < found[50].kv_bytes_per_step < found[1000].kv_bytes_per_step
    step = steps[50]
    layer, positions = step.cache.layers[1], torch.arange(size, device=DEVICE, dtype=torch.int32)[None]
    written = torch.zeros_like(layer.labels)
    ds.label_ref(layer.kv[..., 0, :], positions, written, layer.label_map)
    live = int(step.cache.seq_lens)
    assert live == 20 + 59
    labels, wanted = (ds.unpack(x.transpose(2, 3), layer.label_map.widths)[:, :, :live] for x in (layer.labels, written))
    differs = labels != wanted
    assert differs.float().mean() < 0.01, "labels of steps that attended densely are missing"


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_cache_read_whole_equals_dense_and_writes_its_newest_label(impl):
    p = Problem(shapes(B=2, S=70))
    layer = LayerCache(p.kv, None, replace(p.config, impl=impl), p.map, torch.zeros_like(p.labels), all_tokens=True)
    out = layer.decode(p.q, p.seq_lens)
    torch.testing.assert_close(out, ds.attend_ref(p.q, p.k, p.v, p.seq_lens), atol=1e-5, rtol=1e-4)
    newest = (p.seq_lens - 1).long()[:, None, None, None].expand(-1, *p.labels.shape[1:3], 1)
    assert torch.equal(layer.labels, torch.zeros_like(p.labels).scatter(3, newest, p.labels.gather(3, newest)))


@pytest.mark.parametrize("sparse, more", [(False, {}), (True, {}), (True, {"dense_below": 30})], ids=["dense", "sparse", "both"])
def test_generation_equals_a_plain_loop_of_decode(sparse, more):
    """On a GPU: graphs, captured in the middle of it all, against eager steps."""
    prompts, n = [[1, 5, 9, 20], [1] + list(range(3, 20))], 25
    step = decode_step(60, 2, sparse, more=more)
    got = generate.generate(step, prompts, n).token_ids
    lengths = step.cache.seq_lens.tolist()
    assert lengths == [len(prompt) + n - 1 for prompt in prompts]
    plain = decode_step(60, 2, sparse, more=more)
    plain.model.prefill([prompt[:-1] for prompt in prompts], plain.cache)
    tokens, want = torch.tensor([prompt[-1] for prompt in prompts], device=DEVICE), []
    for length in range(len(prompts[1]), len(prompts[1]) + n):
        view = plain.cache if plain.cache.sparse_at(length) else plain.cache.all_tokens()
        want.append(tokens := plain.model.decode(tokens, view).argmax(-1))
    assert got == torch.stack(want, 1).tolist()
    for mine, theirs in zip(step.cache.layers, plain.cache.layers):
        torch.testing.assert_close(mine.kv, theirs.kv, atol=1e-4, rtol=1e-4)
    assert generate.generate(step, [[7]] * 2, 3, start=10).token_ids != got  # another turn on the same graphs
    assert step.cache.seq_lens.tolist() == [13, 13]


def test_compiled_blocks_equal_eager_ones_and_are_compiled_once_for_all_layers():
    from torch._dynamo.utils import counters

    eager, step = decode_step(90), decode_step(90)
    prompts = [[1] + list(range(3, 3 + n)) for n in (50, 20, 33)]
    want = [generate.generate(eager, [prompt], 10).token_ids for prompt in prompts]
    step.model.compile_blocks()
    counters.clear()
    assert [generate.generate(step, [prompt], 10).token_ids for prompt in prompts] == want
    assert counters["stats"]["unique_graphs"] == 4, "before and after attention, in prefill and in decode"


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


def test_compiling_only_ends_with_its_block():
    run = JITFunction.run
    with pytest.raises(ZeroDivisionError), generate.compiling_only():
        assert JITFunction.run is not run
        1 / 0
    assert JITFunction.run is run
    with generate.compiling_only():
        assert JITFunction.run is not run


def test_programs_start_without_the_compiler():
    """Its modules take seconds to import."""
    code = "import bench, calibrate, eval, generate, sys; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_experts_of_few_tokens_equal_the_loop_over_experts():
    model, *_ = random_model(n_experts=4, experts_per_token=2, dim=40, ffn_dim=72)
    ffn = model.to(DEVICE).layers[0].ffn
    x = torch.randn(5, 40, device=DEVICE)
    logits, experts = ffn.router(x).topk(2, -1)
    want = ffn(x[None])[0]
    torch.testing.assert_close(ffn.by_token(x, experts, logits.softmax(-1)), want, atol=1e-5, rtol=1e-4)


def test_memory_need_counts_what_is_allocated():
    model, maps, config = random_model()
    need = memory_need(model.config, 3, 70, torch.float32, config)
    cache = KVCache(model.config, 3, 70, DEVICE, torch.float32, config, maps)
    assert need["weights"] == sum(p.nbytes for p in model.parameters())
    assert need["KV cache"] == cache.kv_bytes() and need["labels"] == cache.label_bytes() > 0
    workspace = ds.Workspace(3, 4, 2, 16, 70, torch.device(DEVICE), config)
    assert need["workspace"] == sum(x.nbytes for x in vars(workspace).values() if isinstance(x, torch.Tensor))
    assert memory_need(model.config, 3, 70, torch.float32)["labels"] == 0


def test_too_little_memory_is_refused_with_what_would_fit():
    def check(gib, batch, length):
        check_memory(int(gib * 2**30), PRESETS["Llama-2-7B"], batch, length, torch.bfloat16, DSConfig())

    check(140, 14, 16500)
    with pytest.raises(ValueError, match="^max_seq_length=16500 for a batch of 14 needs 13.* GiB .* 80.0 are free; ") as error:
        check(80, 14, 16500)
    shorter, smaller = map(int, re.search(r"--max_seq_length (\d+) or a batch of (\d+) would fit", str(error.value)).groups())
    check(80, 14, shorter)
    check(80, smaller, 16500)
    for too_much in ((14, shorter + 1), (smaller + 1, 16500)):
        with pytest.raises(ValueError):
            check(80, *too_much)
    with pytest.raises(ValueError, match="no batch of this model fits"):
        check(8, 1, 100)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert generate.divergence([p, p], [q, q], [[7], [7, 7]]) == pytest.approx(want / 3)  # row 0 of the first step, alone


def test_forced_logits_are_those_of_generation():
    step, prompts = decode_step(60, 2), [[1, 5, 9, 20], [1, 7]]
    texts = generate.generate(step, prompts, 20).token_ids
    forced = torch.stack(list(generate.forced_logits(step, prompts, texts)))  # [steps, B, vocab]
    assert forced.argmax(-1).T.tolist() == texts


# ---------------------------------------------------------------- offload

RESIDENTS = {"torch": (offload.resolve_ref, offload.fetch_ref),
             "triton": (partial(offload.resolve, tile=16), partial(offload.fetch, programs=12, tokens=2))}


def replaced(held, last_used, tokens, now, overflow):
    """One head's step by definition: held (tokens or None by slot) and last_used are changed. Returns
    (slots, or what from `overflow` on a token without one has, misses)."""
    slots = [held.index(token) if token in held else None for token in tokens]
    for slot in slots:
        if slot is not None:
            last_used[slot] = now
    misses = [i for i, slot in enumerate(slots) if slot is None]
    age = [min(now - used, offload.AGES - 1) for used in last_used]
    oldest = sorted(range(len(held)), key=lambda slot: (-age[slot], slot))
    free = len(held) - len(tokens) + len(misses)
    for i, slot in zip(misses, sorted(oldest[: min(len(misses), free)])):
        slots[i], held[slot], last_used[slot] = slot, tokens[i], now
    for nth, i in enumerate(misses[free:]):
        slots[i] = overflow + nth
    return slots, misses


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


@pytest.mark.parametrize("R, packed", [(20, False), (48, False), (20, True)],
                         ids=["overflow", "twice", "packed"])
@pytest.mark.parametrize("impl", RESIDENTS)
def test_residency_is_as_stated(impl, R, packed):
    """Rows, replacement, misses, contents and counts, of ragged rows whose selections overlap, in two
    steps of three with tokens fetched ahead, right ones and wrong ones, of one head or of both. Some
    selections have more tokens than there are slots, and some were cut."""
    resolve, fetch = RESIDENTS[impl]
    device = torch.device("cpu" if impl == "torch" else DEVICE)  # the reference reads it as torch does
    B, HKV, S, D, sink, recent = 2, 2, 110, 24 if packed else 12, 2, 3
    steps, capacity, first = 50 if GPU or impl == "torch" else 8 if packed else 12, 24, 7
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if packed else torch.float32
    truth = torch.randn(B, HKV, S, 2, D, generator=generator).to(dtype)
    if packed:
        truth[:, :, ::9, 1, 5] *= 2**-20  # rows that do not pack
    host = host_memory.HostRows(host_memory.host_tensor(truth.shape, dtype, device), device, packed)
    if packed:
        PACKS[impl](host, truth.to(device), torch.tensor([S] * B, dtype=torch.int32, device=device))
    else:
        host.kv.copy_(truth)
    overflow = first + R + 2
    kv = torch.full((B, HKV, overflow + capacity, 2, D), math.nan, dtype=dtype, device=device)
    r = offload.Resident(kv, S, R, first, overflow)
    rows = [(b, h) for b in range(B) for h in range(HKV)]
    held = {row: [None] * R for row in rows}
    last_used = {row: [-offload.AGES] * R for row in rows}
    counts = dict.fromkeys(offload.COUNTS, 0)
    evicted, spilled, clock = 0, 0, dict.fromkeys(rows, 0)

    def call(tokens, newest, **kind):
        """Has these tokens, lists by row, resident, and checks all that is stated of it."""
        nonlocal evicted, spilled
        heads = len(tokens) // B
        indices = torch.full((B, heads, capacity), -7, dtype=torch.int32)
        for b, h in tokens:
            clock[b, h] += 1
            indices[b, h, : len(tokens[b, h])] = torch.tensor(tokens[b, h])
        n = torch.tensor([[len(tokens[b, h]) for h in range(heads)] for b in range(B)])
        n, cut = n.int().to(device), int(kind.get("ahead", False) or clock[0, 0] % 5)
        parts = torch.stack([n // 2, n - n // 2 + cut], 2)
        on_device = indices.to(device)
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        placed = offload.Placement(B, heads, capacity, device)
        resolve(r, placed, (on_device, n, parts), seq_lens, sink=sink, recent=recent, **kind)
        fetch(kv, placed, host, newest, on_device, seq_lens)
        if GPU:
            torch.cuda.synchronize()
        for b, h in tokens:
            row, wanted, before, last = (b, h), tokens[b, h], held[b, h].copy(), lens[b] - 1
            slots, misses = replaced(held[row], last_used[row], wanted, clock[row], overflow - first)
            if newest is not None:
                truth[b, h, last] = newest[b, h].cpu()
            found = placed.rows[b, h, : len(wanted)].tolist()
            assert found == [first + slot for slot in slots] and len(set(slots)) == len(slots)
            assert placed.missing[b, h, : placed.n_missing[b, h]].tolist() == misses
            assert r.slot_token[b, h].tolist() == [-1 if token is None else token for token in held[row]]
            at = first + held[row].index(last) if last in held[row] else -1
            assert placed.newest[b, h] == (found[wanted.index(last)] if last in wanted else at)
            filled = [pair for pair in zip(found, wanted) if newest is not None or pair[1] != last]
            assert all(torch.equal(kv[b, h, slot].cpu(), truth[b, h, token]) for slot, token in filled)
            fetched = sum(wanted[i] != last for i in misses)
            if kind.get("ahead"):
                counts["predicted"] += sum(sink <= token <= last - recent for token in wanted)
                counts["prefetched"] += fetched
            else:
                counts["selected"] += len(wanted) - 1
                counts["fetched"] += fetched
                counts["steps"] += 1
                counts["cut"] += cut
                evicted += sum(x is not None and x != y for x, y in zip(before, held[row]))
                spilled += sum(slot >= R for slot in slots)
        assert torch.equal(all_rows(host, impl), truth), "the newest tokens did not reach the host"

    for step in range(1, steps + 1):
        # the second row repeats every other step, its newest token held already
        lens = [60 + step, 30 + step // 2]
        true, predicted = {}, {}
        for b, h in rows:
            n = rng.randint(8, 24)
            others = [t for t in held[b, h] if t is not None and t < lens[b] - 1]
            old = rng.sample(others, min(len(others), n // 2))
            new = rng.sample([t for t in range(lens[b] - 1) if t not in old], n - 1 - len(old))
            true[b, h] = [*old, *new, lens[b] - 1]
            rng.shuffle(true[b, h])  # kernels list tokens in no order
            if step % 5 == 0:  # cut off, but predicted
                true[b, h].remove(lens[b] - 1)
            kept = [t for t in true[b, h] if t != lens[b] - 1]
            wrong = [t for t in range(lens[b] - 1) if t not in kept]
            predicted[b, h] = [*rng.sample(kept, 4), *rng.sample(wrong, 3), lens[b] - 1]
        foreseen = step % 3  # heads
        if foreseen:
            call({row: predicted[row] for row in rows if row[1] < foreseen}, None, ahead=True)
            counts["confirmed"] += sum(sink <= token <= lens[b] - 1 - recent
                                       for b, h in rows if h < foreseen
                                       for token in set(predicted[b, h]) & set(true[b, h]))
        newest = torch.randn(B, HKV, 2, D, generator=generator).to(dtype)
        newest[:, step % 2, 0, 0] *= 2**-20
        call(true, newest.to(device), foreseen=foreseen)
    assert dict(zip(offload.COUNTS, r.counts.sum((0, 1)).tolist())) == counts
    assert evicted > 20 and min(counts.values()) > 20 and counts["steps"] == steps * B * HKV
    assert (spilled > 10) == (R < capacity)
    r.forget()
    assert (r.slot_token == -1).all() and r.counts.sum() == 0


def offload_step(cache_type=KVCache, size=250, batch=3, below=0, impl="auto", seed=0, dtype=torch.float32, **more):
    """A DecodeStep of random_model with this type of cache, whose texts do not end."""
    model, maps, config = random_model(seed, **(dict(eos_ids=(), n_kv_heads=2, max_positions=4096) | more))
    HKV = model.config.n_kv_heads
    maps = [LabelMap(*(t[:1].repeat(HKV, 1) for t in (m.channels, m.lo, m.step)), m.widths) for m in maps]
    config = replace(config, dense_below=below, impl=impl)
    cache = cache_type(model.config, batch, size, DEVICE, dtype, config, maps)
    return generate.DecodeStep(model.to(DEVICE, dtype), cache)


PREFETCHING = partial(OffloadCache, prefetch_heads=1)
RAGGED = [[1] + list(range(3, 3 + n)) for n in (50, 5, 33)]


OFFLOADS = {"mha": (dict(n_kv_heads=4), None), "gqa": ({}, 33), "window": (dict(sliding_window=40), None),
            "roomy": ({}, 95), "dense-at-first": (dict(below=80), None),
            "qwen2-windows": (dict(qkv_bias=True, sliding_window=60, full_layers=(2,)), None),
            "qwen3": (dict(qk_norm=True), None)}


@pytest.mark.parametrize("more, resident", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_generation_equals_that_of_the_gpu_s_cache(more, resident):
    """The same tokens, while tokens are evicted and fetched again, some of them ahead."""
    size, n = 130, 78
    want = generate.generate(offload_step(size=size, **more), RAGGED, n)
    step = offload_step(partial(PREFETCHING, resident_tokens=resident), size, **more)
    found = generate.generate(step, RAGGED, n)
    assert found.token_ids == want.token_ids
    # rows that attend to everything read labels all the same
    assert (found.kv_bytes_per_step > want.kv_bytes_per_step) == ("below" in more)
    layers, token = step.model.config.n_layers - 1, 2 * 16 * 4
    offloaded = step.cache.offloaded()
    counts = sum(layer.resident.counts.sum((0, 1)) for layer in offloaded).tolist()
    counts = dict(zip(offload.COUNTS, counts))
    told = step.cache.statistics()
    assert told["pcie_bytes_per_step"] == pytest.approx((counts["fetched"] + counts["prefetched"]) * token / n)
    assert told["prefetched_bytes_per_step"] == pytest.approx(counts["prefetched"] * token / n)
    assert counts["fetched"] > 300 and 0.1 < told["hit_rate"] < 1
    assert counts["prefetched"] > 30 and 0 < told["agreement"] < 1
    assert step.cache.kv.shape[2] == layers * step.cache.resident_tokens
    assert step.cache.kv.nbytes < layers * offloaded[0].host.kv.nbytes and told["cut"] == 0


def test_a_prompt_s_tokens_are_the_same_anywhere():
    """Alone or in a batch, on the GPU or offloaded; of fewer tokens than dense_below, which is 60, of
    more, and from one to the other."""
    prompts = [[1] + list(range(3, 3 + n)) for n in (8, 58, 61, 50)]
    found = []
    for kind in (KVCache, PREFETCHING):
        found.append(generate.generate(offload_step(kind, 90, 4, below=60), prompts, 16).token_ids)
        found.append([generate.generate(offload_step(kind, 90, 1, below=60), [prompt], 16).token_ids[0]
                      for prompt in prompts])
    assert found[0] == found[1] == found[2] == found[3]


def test_rows_below_dense_below_attend_to_everything_whatever_is_predicted(monkeypatch):
    monkeypatch.setattr(Attention, "queries", turned)
    kinds = KVCache, partial(OffloadCache, mode="predicted")
    want, found = (generate.generate(offload_step(kind, 70, below=70), RAGGED, 16) for kind in kinds)
    assert found.token_ids == want.token_ids


@pytest.mark.parametrize("impl", PACKS)
def test_rows_pack_without_loss(impl):
    """Rows of each kind of exponents, written at first, again, and over others."""
    device = torch.device("cpu" if impl == "torch" else DEVICE)
    for B, HKV, S, D, T in ((2, 2, 70, 16, 9), (1, 2, 64, 24, 40), (1, 1, 50, 128, 20)):
        kv = host_memory.host_tensor((B, HKV, S, 2, D), torch.bfloat16, device)
        host = host_memory.HostRows(kv, device, True)
        generator = torch.Generator().manual_seed(0)
        truth, ends = torch.zeros(B, HKV, S, 2, D, dtype=torch.bfloat16), [T + 3 * b for b in range(B)]
        for _ in range(3):
            rows = torch.randn(B, HKV, T, 2, D, generator=generator).bfloat16()
            rows[:, :, ::4, 0, 3] *= 2**-20
            rows[0, 0, 2], rows[0, 0, 3, 1, 1], rows[0, 0, 4] = 0, math.inf, rows[0, 0, 4] * 1e-30
            rows[0, 0, 5:9], rows[0, 0, 5, 0, 1], rows[0, 0, 6, 1, 2] = 1, 2**-15, 2**-16  # by 15 they may differ, not by 16
            rows[0, 0, 7:9, 0] = torch.tensor([2.0**64, 2.0**65])[:, None]  # the largest that a row of K may have, and more
            PACKS[impl](host, rows.to(device), torch.tensor(ends, dtype=torch.int32, device=device))
            for b, end in enumerate(ends):
                truth[b, :, end - T : end] = rows[b]
            ends = [end + 7 for end in ends]
        found = all_rows(host, impl)
        assert (host.tops[0, 0, ends[0] - 7 - T :][5:9] < 0).tolist() == [False, True, False, True]
        kept = torch.tensor([[b, end - 7] for b, end in enumerate(ends)])
        as_is = sum((host.tops[b, :, :end] < 0).sum().item() for b, end in kept.tolist())
        assert host.row_bytes(kept[:, 1].to(device)) == pytest.approx(3 * D + D * as_is / (kept[:, 1].sum().item() * HKV))
        for b, end in enumerate(ends):
            written = slice(3 * b, end - 7)
            assert torch.equal(found[b, :, written].view(torch.int16), truth[b, :, written].view(torch.int16))
            assert 0 < (host.tops[b, :, written] < 0).sum() < host.tops[b, :, written].numel()


@pytest.mark.parametrize("more, resident", OFFLOADS.values(), ids=OFFLOADS)
def test_packed_generation_equals_that_of_the_gpu_s_cache(more, resident):
    """And fetches fewer bytes. On a GPU the dense steps at first sum in another order than the GPU's cache does, which bfloat16
    shows: there the offloaded cache that is not packed says what is right."""
    size, n = 130, 40
    whole, packed = (offload_step(partial(PREFETCHING, resident_tokens=resident, packed=packed), size, dtype=torch.bfloat16, **more)
                     for packed in (False, True))
    want = generate.generate(whole, RAGGED, n).token_ids
    assert generate.generate(packed, RAGGED, n).token_ids == want
    if not GPU:
        assert generate.generate(offload_step(size=size, dtype=torch.bfloat16, **more), RAGGED, n).token_ids == want
    assert packed.cache.host[0].tops is not None and whole.cache.host[0].tops is None
    packed, whole = packed.cache.statistics(), whole.cache.statistics()
    assert packed["hit_rate"] == whole["hit_rate"] and 0.74 < packed["pcie_bytes_per_step"] / whole["pcie_bytes_per_step"] < 0.9


def turned(*arguments, queries=Attention.queries):
    """The worst prediction there is: queries that point the other way."""
    return -queries(*arguments)


@torch.no_grad()
def compared(sides, steps):
    """Has DecodeSteps decode the same random tokens after RAGGED, on a GPU in CUDA graphs: yields their logits, step by step."""
    tokens, generator, runs = torch.zeros(3, dtype=torch.long, device=DEVICE), torch.Generator().manual_seed(0), []
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
    for _ in range(steps):
        tokens.copy_(torch.randint(64, (3,), generator=generator))
        yield [run() for run in runs]


@pytest.mark.parametrize("ahead, useless", [(0, False), (1, False), (2, True)], ids=["nothing-ahead", "ahead", "useless"])
def test_each_step_equals_that_of_the_gpu_s_cache(ahead, useless, monkeypatch):
    """With as few tokens resident as there may be, whatever is predicted; 2000 steps on a GPU."""
    if useless:
        monkeypatch.setattr(Attention, "queries", turned)
    size = 2060 if GPU else 120
    plain = offload_step(size=size)
    least = plain.cache.ds.budget(size)
    ours = offload_step(partial(OffloadCache, prefetch_heads=ahead, resident_tokens=least), size)
    for want, found in compared((plain, ours), size - 52):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    told = ours.cache.statistics()
    assert 0 < told["hit_rate"] < 0.95
    assert (told["prefetched_bytes_per_step"] > 0) == (ahead > 0)
    if ahead:
        assert told["agreement"] < 0.25 if useless else told["agreement"] > 0.35  # of chance: 0.25


def test_predicted_layers_attend_to_what_is_predicted(monkeypatch):
    """Behind a layer that changes nothing the prediction is the query itself; a wrong one is not found out."""
    def step(cache_type):
        step = offload_step(cache_type, size=90)
        for linear in (step.model.layers[0].attn.wo, step.model.layers[0].ffn.w2):
            linear.weight.zero_()
        return step

    errors, agreements = [], []
    for queries in (Attention.queries, turned):
        monkeypatch.setattr(Attention, "queries", queries)
        sides = [step(kind) for kind in (KVCache, PREFETCHING, partial(OffloadCache, mode="predicted", predictable=[1]))]
        pairs = [(found, want) for want, _, found in compared(sides, 30)]
        errors.append(max(relative_error(*pair) for pair in pairs))
        exact, told = (side.cache.statistics() for side in sides[1:])
        assert told["predicted_layers"] == 1 and told["agreement"] is None
        assert told["prefetched_bytes_per_step"] > exact["prefetched_bytes_per_step"]
        agreements.append(exact["agreement"])  # of two layers, one predicted by the query itself
    assert errors[0] < 1e-3 < 0.1 < errors[1]
    assert agreements[1] < 0.2 and agreements[0] > 0.6


@pytest.mark.parametrize("preset, batch, size, heads", [
    ("Llama-2-7B", 1, 131072, 5), ("Llama-2-7B", 4, 32768, 5), ("Llama-3.1-8B", 1, 262144, 3), ("Llama-3.1-8B", 1, 524288, 2),
    ("Llama-2-7B", 1, 4096, 12)])
def test_default_of_prefetched_heads(preset, batch, size, heads):
    """About the fastest of those measured, and three of eight at most; none on a CPU."""
    config, budget = PRESETS[preset], DSConfig().budget(size)
    assert offload.idle_heads(config, batch, budget, torch.bfloat16, "cuda") == heads
    assert offload.idle_heads(config, batch, budget, torch.bfloat16, "cpu") == 0
    assert offload_step(OffloadCache, n_kv_heads=4).cache.statistics()["prefetch_heads"] == (1 if GPU else 0)


class Late:
    """A SideStream that does nothing before it is waited for: the latest that a GPU may."""

    def __init__(self):
        self.given, self.overdue = [], 0

    def run(self, work, after=None):
        self.given.append(work)
        return len(self.given)

    def wait(self, done):
        while self.overdue < (done or 0):
            self.given[self.overdue]()
            self.overdue += 1

    def join(self):
        self.wait(len(self.given))


class Watched(offload.SideStream):
    """A SideStream that numbers what it is given, and remembers what the current stream waited for, and what it did itself."""

    number, waited, followed = itertools.count(1), set(), set()

    def run(self, work, after=None):
        self.followed.add(after)
        super().run(work)
        return next(self.number)

    def wait(self, done):
        self.waited.add(done)


@pytest.mark.skipif(GPU, reason="a GPU has streams")
@pytest.mark.parametrize("mode", offload.MODES)
def test_slots_and_rows_are_waited_for(mode, monkeypatch):
    """Before a layer's own slots are found, or it attends to what was predicted of it: that one's
    slots; before its rows are fetched: those fetched ahead; before these: their slots."""
    step = offload_step(partial(PREFETCHING, mode=mode), size=90)
    foresight, seen = step.cache.foresight, []
    assert (foresight.choosing is foresight.fetching) == (mode == "exact")
    foresight.choosing, foresight.fetching = Watched(torch.device("cpu")), Watched(torch.device("cpu"))
    resolve, fetch = offload.OffloadedLayer.resolve, offload.OffloadedLayer.fetch

    def watched(kind, needed, waited=Watched.waited):
        assert needed is None or needed in waited, kind
        seen.append((kind, needed is not None))

    def resolve_watched(layer, placed, *tokens, **kind):
        if not kind.get("ahead") and not layer.predicted:
            watched("slots", layer.slots_known)
        resolve(layer, placed, *tokens, **kind)

    def fetch_watched(layer, placed, newest, *tokens):
        if newest is None:
            watched("rows ahead", layer.slots_known, Watched.followed)
        else:
            watched("rows", layer.rows_there)
            if layer.predicted:
                watched("slots", layer.slots_known)
        fetch(layer, placed, newest, *tokens)

    monkeypatch.setattr(offload.OffloadedLayer, "resolve", resolve_watched)
    monkeypatch.setattr(offload.OffloadedLayer, "fetch", fetch_watched)
    for _ in compared((step,), 5):
        pass
    assert all(seen.count((kind, True)) >= 5 for kind in ("slots", "rows", "rows ahead"))


def test_a_step_that_did_not_end_leaves_nothing(monkeypatch):
    """Neither predictions nor slots: what is generated next is as if it had not been."""
    want, step = (offload_step(PREFETCHING, size=90) for _ in range(2))
    step.model.prefill(RAGGED, step.cache)
    with monkeypatch.context() as patch:
        patch.setattr(offload.OffloadedLayer, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step.model.decode(torch.zeros(3, dtype=torch.long, device=DEVICE), step.cache)
    layers = step.cache.offloaded()
    assert any(layer.foreseen for layer in layers)
    for side in (step, want):
        side.model.prefill(RAGGED, side.cache)
    assert not any(layer.foreseen or layer.chosen for layer in layers)
    tokens = torch.zeros(3, dtype=torch.long, device=DEVICE)
    torch.testing.assert_close(*(side.model.decode(tokens, side.cache) for side in (step, want)))


@pytest.mark.skipif(GPU, reason="a GPU has streams")
@pytest.mark.parametrize("mode", offload.MODES)
def test_what_is_fetched_aside_is_waited_for(mode):
    early, late = (offload_step(partial(PREFETCHING, mode=mode), size=90) for _ in range(2))
    late.cache.side, late.cache.foresight.fetching = Late(), Late()
    for want, found in compared((early, late), 30):
        assert torch.equal(want, found)
    assert late.cache.side.overdue == 3 * 2 and late.cache.foresight.fetching.overdue == 30 * 2
    assert early.cache.statistics() == late.cache.statistics()


@pytest.mark.skipif(GPU, reason="the reference runs on a CPU; compiled kernels are set against those of the GPU's cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["whole", "packed"])
def test_offload_by_kernels_equals_the_reference(dtype, monkeypatch):
    """The whole step, kernels for selection, residency and attention, in as many steps as the interpreter bears; what is chosen
    ahead lies in memory that lasts, and is not overwritten before it was fetched."""
    monkeypatch.setattr(ds, "WARPS", 1)
    monkeypatch.setattr(offload, "fetch", partial(offload.fetch, programs=4))
    kind = PREFETCHING
    steps = {impl: offload_step(kind, 40, batch=2, impl=impl, n_kv_heads=1, dtype=dtype) for impl in ("torch", "triton")}
    steps["triton"].cache.foresight.fetching = Late()  # while the next layer's tokens are chosen
    found = {impl: generate.generate(step, RAGGED[1:], 2).token_ids for impl, step in steps.items()}
    assert found["torch"] == found["triton"]
    for a, b in zip(steps["torch"].cache.layers[1:], steps["triton"].cache.layers[1:]):
        assert torch.equal(a.resident.counts, b.resident.counts)
        assert torch.equal(a.labels, b.labels)
        kept = [all_rows(x.host, "torch") for x in (a, b)]
        within = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(*kept, atol=within, rtol=within)
    counts = dict(zip(offload.COUNTS, a.resident.counts.sum((0, 1)).tolist()))
    assert counts.pop("cut") == 0 < min(counts.values())


@pytest.mark.parametrize("sparse", [True, False], ids=["offloaded", "streamed"])
@torch.inference_mode()
def test_fused_layers_hand_their_k_and_v_to_the_host(sparse, monkeypatch):
    """Of a 16-bit model, whose K and V the linear layers' kernels write, not torch."""
    monkeypatch.setattr(ds, "WARPS", 1)  # the interpreter runs one after the other
    model, maps, config = random_model()
    model = model.to(DEVICE, torch.float16)
    logits, caches = [], []
    for cache_type in (KVCache, OffloadCache):
        cache = cache_type(model.config, 3, 64, DEVICE, torch.float16, config if sparse else None, maps)
        model.prefill(RAGGED, cache)
        tokens = (torch.tensor([5 + i, 6, 7], device=DEVICE) for i in range(2))
        logits.append(torch.stack([model.decode(token, cache, impl="triton") for token in tokens]))
        caches.append(cache)
    assert logits[0].isfinite().all() and torch.equal(*logits)
    for want, got in zip(caches[0].layers, caches[1].layers):
        for b, prompt in enumerate(RAGGED if hasattr(got, "host") else ()):
            new = slice(len(prompt), len(prompt) + 2)
            assert torch.equal(got.host.kv[b, :, new], want.kv[b, :, new].cpu()) and got.host.kv[b, :, new].any()


def test_offload_survives_other_texts_in_the_same_cache():
    """A step back, another turn and another prompt: what slots hold of the texts before is not taken for theirs."""
    step, plain = offload_step(OffloadCache), offload_step()
    found = []
    for which in (step, plain):
        texts = generate.generate(which, RAGGED, 20).token_ids
        forced = torch.stack(list(generate.forced_logits(which, RAGGED, [text[::-1] for text in texts])))
        turn = generate.generate(which, [[7, 9], [8, 4], [9]], 20, start=30).token_ids
        found.append((texts, turn, generate.generate(which, RAGGED[::-1], 10).token_ids, forced))
    assert found[0][:3] == found[1][:3]
    torch.testing.assert_close(found[0][3], found[1][3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl, dtype", [(None, torch.float32), ("torch", torch.float32), ("torch", torch.bfloat16),
                                         ("triton", torch.bfloat16)], ids=["streamed", "whole", "packed", "packed by kernels"])
def test_prefill_brings_each_layer_to_the_host(impl, dtype):
    """In two turns, of which the second reads what the first brought there."""
    model, maps, config = random_model()
    device, config = DEVICE if impl == "triton" else "cpu", replace(config, impl=impl) if impl else None
    model = model.to(device, dtype)
    caches = [kind(model.config, 3, 64, device, dtype, config, maps) for kind in (KVCache, OffloadCache)]
    for cache in caches:
        told = []
        model.prefill(RAGGED, cache, chunk=16, progress=told.append)
        assert sum(told) == sum(map(len, RAGGED)) and min(told) >= 0
        model.prefill([[5, 6, 7]] * 3, cache, start=20, chunk=2)
    for want, got in zip(caches[0].layers, caches[1].layers):
        kv = all_rows(got.host, impl) if hasattr(got, "host") else got.kv.cpu()
        for b, prompt in enumerate(RAGGED):
            live = max(len(prompt), 23)
            assert torch.equal(kv[b, :, :live], want.kv[b, :, :live].cpu())
        assert want.labels is None or torch.equal(want.labels, got.labels)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_streaming_equals_dense_decoding(packed):
    dtype = torch.bfloat16 if packed else torch.float32
    model, _, _ = random_model(eos_ids=())
    model, found = model.to(DEVICE, dtype), []
    # on a GPU the first cache says what is right: a layer of K and V lies there as in a buffer
    for cache_type in (KVCache, partial(OffloadCache, packed=False), partial(OffloadCache, packed=True)):
        cache = cache_type(model.config, 3, 90, DEVICE, dtype)
        found.append(generate.generate(generate.DecodeStep(model, cache), RAGGED, 38).token_ids)
    assert found[0] == found[1] == found[2]
    told, whole = cache.statistics(), 3 * 3 * 2 * 90 * 2 * 16 * dtype.itemsize
    assert told["host_bytes"] == whole and (cache.host[0].tops is not None) == packed
    assert told["pcie_bytes_per_step"] == pytest.approx(whole * (0.75 + 0.25 * told["as_is"]))
    assert 0 < told["as_is"] < 0.2 if packed else told["as_is"] == 1


def test_a_selection_past_the_cap_is_cut(monkeypatch):
    """Queries of zeros make all scores equal, and every token reaches the threshold: more than there
    are rows for. Those that are listed first are attended to, and the others counted."""
    steps = [offload_step(kind, 120) for kind in (KVCache, partial(OffloadCache, prefetch_heads=1))]
    for step in steps:
        for layer in step.model.layers:
            layer.attn.wqkv.weight.data[: 4 * 16] = 0
    cache = steps[1].cache
    cap = cache.slots + cache.spare
    select_ref, cut = ds.select_ref, 0

    def decode_capped(*arguments):  # of the cache on the GPU, by the reference
        with monkeypatch.context() as patch:
            patch.setattr(ds, "select_ref", lambda *of: (x := select_ref(*of)) & (x.cumsum(2) <= cap))
            return ds.ds_decode(*arguments)

    monkeypatch.setattr(sys.modules["model"], "ds_decode", decode_capped)
    for i, (want, found) in enumerate(compared(steps, 40)):
        assert found.isfinite().all()
        cut += sum(2 * 2 * max(0, len(prompt) + i + 1 - cap) for prompt in RAGGED)
        if not GPU:
            torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert cache.statistics()["cut"] == cut > 0


def test_layers_are_predicted_where_calibration_says_so():
    """The embedded model's are: all but the first ones, of which one has no layer before it, and the other a mere embedding."""
    for mode in offload.MODES:
        assert offload.predictable_layers(TINY / "channels.safetensors", offload.MIN_AGREEMENT, mode) == [2, 3, 4, 5, 6]
        assert offload.predictable_layers(TINY / "channels.safetensors", 0, mode) == [1, 2, 3, 4, 5, 6]


def test_offload_holds_a_sixteenth_on_the_gpu():
    """Llama-2-7B at 128k, sparse from the first layer on: K and V on the GPU, all that stands for them, by memory_need."""
    config, S = PRESETS["Llama-2-7B"], 131072
    full = memory_need(config, 1, S, torch.bfloat16)["KV cache"]
    need = memory_need(config, 1, S, torch.bfloat16, DSConfig(dense_layers=0, dense_below=0), OffloadCache)
    assert need["KV cache"] == pytest.approx(full / 16, rel=1e-3) and need["staging"] == 2 * full / 32
    assert need["labels"] == full / 32 and need["slot maps"] < full / 75
    default = memory_need(config, 1, S, torch.bfloat16, DSConfig(), OffloadCache)
    assert default["KV cache"] == pytest.approx(full * (2 + 30 / 16) / 32, rel=1e-3)
    check_memory(40 * 2**30, config, 1, S, torch.bfloat16, DSConfig(), OffloadCache)
    with pytest.raises(ValueError, match="or keep K and V in host memory: --offload"):
        check_memory(40 * 2**30, config, 1, S, torch.bfloat16, DSConfig())


def test_too_little_host_memory_is_refused_with_what_would_fit():
    def check(gib, batch, length):
        host_memory.check_host_memory(gib * 2**30, PRESETS["Llama-2-7B"], batch, length, torch.bfloat16, DSConfig())

    check(60, 1, 131072)
    with pytest.raises(ValueError, match="a batch of 4 needs 60.0 GiB of host memory for K and V of 30 layers, 50.0") as error:
        check(50, 4, 32768)
    shorter, smaller = map(int, re.search(r"--max_seq_length (\d+) or a batch of (\d+) would fit", str(error.value)).groups())
    check(50, 4, shorter)
    check(50, smaller, 32768)
    for too_much in ((4, shorter + 1), (smaller + 1, 32768)):
        with pytest.raises(ValueError):
            check(50, *too_much)
    assert 0 < host_memory.free_host_bytes() < 2**50
    host_memory.wait_for_memory(1)
    with pytest.raises(ValueError, match="GiB of host memory are wanted next"):
        host_memory.wait_for_memory(2**50, seconds=0.2)
    with pytest.raises(ValueError, match="dense_layers=3: of 3 layers none is left to offload"):
        host_memory.check_host_memory(1, random_model()[0].config, 1, 8, torch.float32, DSConfig(dense_layers=3))


# ---------------------------------------------------------------- calibrate


@pytest.fixture
def tiny_copy(tmp_path):
    """A writable copy of the embedded checkpoint without its channels."""
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def moments(seed, tokens=300, into=None):
    """Moments of random queries and keys, added to those in `into`."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(1, 4, 1, 16, generator=generator) * 3
    m = into or calibrate.Moments()
    m.add(scale * torch.randn(1, 4, tokens, 16, generator=generator),
          torch.randn(1, 2, tokens, 16, generator=generator) * scale[:, ::2] + 1,
          *(torch.full((1, 1, tokens, 8), value) for value in (1.0, 0.0)))  # at position 0
    return m


def test_every_calibration_sample_counts():
    """The paper's release overwrote its sums, so that only the last block of text counted."""
    first, last, both = moments(0), moments(1), moments(1, into=moments(0))
    assert both.tokens == 600
    for name in ("abs_qk", "abs_q", "abs_k", "kk", "unturned"):
        torch.testing.assert_close(getattr(both, name), getattr(first, name) + getattr(last, name))
    ranked = [calibrate.rank_channels(m, "qk", None) for m in (first, last, both)]
    assert not torch.equal(ranked[2], ranked[1]) and not torch.equal(ranked[2], ranked[0])


def test_calibration_sees_all_of_its_text(tiny_copy):
    """Two texts give other statistics than the last one alone, through the whole of calibrate()."""
    words = random.Random(0)
    texts = [tasks.random_text(words, 3000), calibrate.builtin_text()[:9000]]
    stds = []
    for text in ("".join(texts), texts[1], texts[0]):
        calibrate.calibrate(tiny_copy, text, "qk", samples=4, context=256)
        stds.append(load_file(tiny_copy / "channels.safetensors")["std"])
    assert not torch.allclose(stds[0], stds[1], rtol=0.02) and not torch.allclose(stds[0], stds[2], rtol=0.02)


def test_rankings_follow_their_statistics():
    m = moments(4)
    for method, values in {"q": m.abs_q, "k": m.abs_k, "qk": m.abs_qk}.items():
        ranked = values.gather(1, calibrate.rank_channels(m, method, None))
        assert (ranked.diff() <= 0).all()
    draws = [calibrate.rank_channels(m, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_planes_are_pairs_that_rope_turns_together():
    """Pairs c, c + D / 2 side by side, by what both add to q . k; the constant part of a key counts."""
    m = moments(5)
    channels = calibrate.rank_channels(m, "planes", None)
    pairs = channels.unflatten(1, (-1, 2))
    assert torch.equal(pairs[..., 1], pairs[..., 0] + 8) and (channels.sort().values == torch.arange(16)).all()
    assert (m.abs_qk.gather(1, channels).unflatten(1, (-1, 2)).sum(2).diff() <= 0).all()
    q, k = torch.ones(1, 4, 50, 16), torch.randn(1, 2, 50, 16)
    k[..., 3] = 100.0
    constant = calibrate.Moments()
    constant.add(q, k, *(torch.full((1, 1, 50, 8), value) for value in (1.0, 0.0)))
    assert (calibrate.rank_channels(constant, "planes", None)[:, :2] == torch.tensor([3, 11])).all()


def test_ranges_hold_at_all_positions():
    """From keys at the first 512 positions: mean and spread of both channels of each plane over 8192, whose constant parts
    turn. (Of the first 512 alone they are others.)"""
    model = random_model(max_positions=8192)[0]
    keys = torch.randn(1, 2, 8192, 16, generator=torch.Generator().manual_seed(0)) + 3 * torch.randn(1, 2, 1, 16)
    rope = model.rope(torch.arange(8192)[None])
    turned = apply_rope(keys, *rope)
    m = calibrate.Moments()
    m.add(turned[:, :, :512].repeat(1, 2, 1, 1), turned[:, :, :512], *(x[:, :, :512] for x in rope))
    mean, std = calibrate.key_ranges(m, *rope)
    spread = turned[0].var(1).unflatten(1, (2, -1)).mean(1).sqrt().repeat(1, 2)
    torch.testing.assert_close(mean.float(), turned[0].mean(1), atol=0.2, rtol=0)
    torch.testing.assert_close(std.float(), spread, atol=0.2, rtol=0.05)
    assert (turned[0, :, :512].mean(1) - turned[0].mean(1)).abs().max() > 1


def test_calibration_of_the_tiny_model(tiny_copy):
    """On other text than it was fitted to: labels keep nearly the mass of exact scores, and more than random channels."""
    model = load_model(TINY, "cpu", torch.float32)
    text = calibrate.builtin_text()
    tokens = torch.tensor(asked.text_windows(Tokenizer(TINY), [text], 1024, 1))
    kept = {}
    for method in ("planes", "qk", "random"):
        out = tiny_copy / "channels.safetensors"
        calibrate.calibrate(tiny_copy, method=method, samples=3, context=1024, out=out)
        maps = load_label_maps(tiny_copy, model.config, DSConfig())
        x = model.embed(tokens)
        rope = model.rope(torch.arange(tokens.shape[1])[None])
        for layer in model.layers[:4]:
            q, k, _ = layer.attn.project(layer.attn_norm(x), *rope)
            x = layer(x, *rope)
        rows = calibrate.spread_queries(512, 1024, 4, "cpu")
        kept[method], exact = calibrate.kept_mass(q, k, maps[3], DSConfig(dense_below=0), rows)
    assert exact >= kept["planes"] > 0.93 * exact and kept["planes"] > kept["random"] < kept["qk"] < exact
    with safe_open(out, "pt") as file:
        provenance = file.metadata()
        assert file.get_tensor("agreement")[0] == 0 and (file.get_tensor("agreement")[1:] > 0.05).all()
    assert provenance["method"] == "random" and {"checkpoint", "text_sha256", "samples", "tokens", "date"} <= set(provenance)


@pytest.mark.parametrize("prefix", [[1], []], ids=["bos", "no-bos"])
def test_text_windows_are_full_and_apart(prefix):
    """Of perplexity. They were refused to models without a BOS."""
    tokenizer = SimpleNamespace(prefix=prefix, encode=lambda text, special: list(range(2, 1000)))
    windows = asked.text_windows(tokenizer, ["", ""], 100)
    assert len(windows) == 18 and windows[1] == prefix + list(range(102, 202))
    assert windows[9] == windows[0] == prefix + list(range(2, 102))


@pytest.mark.parametrize("prefix", [[1], []], ids=["bos", "no-bos"])
@pytest.mark.parametrize("samples, longest", [(5, 100), (4, 180), (100, 200)])
def test_calibration_windows_are_full_and_apart(prefix, samples, longest):
    tokenizer = SimpleNamespace(prefix=prefix, encode=lambda text, special: list(range(2, 1000)))
    windows, held_out = calibrate.calibration_windows(tokenizer, "", samples, 100, longest)
    assert len(windows) == min(samples, 8 if prefix else 7) and held_out.shape == (1, longest)
    assert all(window.shape == (1, 100) for window in windows)
    tokens = torch.cat([*windows, held_out], 1)
    assert len(tokens[tokens > 1].unique()) == (tokens > 1).sum() == tokens.numel() - (len(windows) + 1) * len(prefix)
    with pytest.raises(ValueError, match="the text has 998 tokens: at least 1200 are needed"):
        calibrate.calibration_windows(tokenizer, "", 4, 400, 400)


def test_label_maps_that_do_not_belong_are_refused(tiny_copy):
    """Of an older form (before labels were choices of channels), and of other weights."""
    path, config = tiny_copy / "channels.safetensors", ModelConfig.from_file(TINY / "config.json")
    ours = evaluation.fingerprint(TINY / "model.safetensors")
    for tensors, weights, match in (({"basis_k": torch.zeros(1)}, ours, "older form; run calibrate.py"),
                                    (load_file(TINY / "channels.safetensors"), "0" * 16, "calibrated for checkpoint 0")):
        save_file(tensors, path, {"checkpoint": weights})
        with pytest.raises(ValueError, match=match):
            load_label_maps(tiny_copy, config, DSConfig())


def test_calibration_looks_past_its_context(tiny_copy, capsys):
    """Where the model has more positions: a window of twice as many tokens."""
    calibrate.calibrate(tiny_copy, samples=2, context=300)
    lines = capsys.readouterr().out.splitlines()
    assert "past 300" in lines[1] and "held out" in lines[-1] and "600 tokens" in lines[-1]
    mean = [float(value) for value in lines[-1].split()[1:6]]
    assert all(0.2 < value < 1 for value in mean) and mean[0] <= mean[1] and mean[2] <= mean[3]


def test_agreement_of_a_prediction():
    generator = torch.Generator().manual_seed(0)
    q, k, other = (torch.randn(1, heads, 200, 16, generator=generator) for heads in (4, 2, 4))
    label_map = first_channels(2, 16, ((16, 4),)).to("cpu")
    config = DSConfig(n_tokens=40, dense_below=0, sink=2, recent=5, label_channels=16)
    rows = calibrate.spread_queries(100, 200, 4, "cpu")
    shares = [calibrate.prediction_agreement(q, p, k, label_map, config, rows) for p in (q, q + other, other, -q)]
    for window, least in ((200, 1), (50, 0)):  # all past, or so much of it that the mass of the rest is not to be kept
        (labels, exact), (within, _) = (calibrate.kept_mass(q, k, label_map, config, rows, w) for w in (None, window))
        assert (within == labels) if least else within > exact
    assert shares[0] == 1 > shares[1] > shares[2] > shares[3] and shares[1] > 0.4
    assert shares[2] == pytest.approx(33 / 150, abs=0.05)  # of chance: as many of the tokens that are not attended anyway


def test_rankings_in_the_authors_format(tmp_path):
    """A list per KV head is taken as it is, lists per query head by mean rank; what is no ranking is refused."""
    config = random_model()[0].config
    draw = torch.Generator().manual_seed(0)
    per_kv = [[torch.randperm(16, generator=draw).tolist() for _ in range(2)] for _ in range(3)]
    per_q = [[torch.randperm(16, generator=draw).tolist() for _ in range(4)] for _ in range(3)]

    def load(lists, projection):
        names = {f"model.layers.{i}.self_attn.{projection}_proj": heads for i, heads in enumerate(lists)}
        (tmp_path / "ranking.json").write_text(json.dumps(names))
        return calibrate.load_rankings(tmp_path / "ranking.json", config, projection)

    assert load(per_kv, "k").tolist() == per_kv
    merged = load(per_q, "qk")
    for layer, heads in enumerate(per_q):
        for h in range(2):
            mean_rank = [sum(head.index(c) for head in heads[2 * h : 2 * h + 2]) for c in range(16)]
            assert [mean_rank[c] for c in merged[layer, h].tolist()] == sorted(mean_rank)
    for bad, match in [([[[7] * 16] * 2] * 3, "rank each"), ([[["a"] * 16] * 2] * 3, "not a list"), (per_kv[:2], "no model.layers.2")]:
        with pytest.raises(ValueError, match=match):
            load(bad, "qk")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the project's shared test data")
@pytest.mark.parametrize("name, preset", [("Llama-2-7b-hf", "Llama-2-7B"), ("Mixtral-8x7B-v0.1", "Mixtral-8x7B-v0.1")])
def test_the_authors_rankings_load(name, preset):
    config = PRESETS[preset]
    path = SHARED / "channel_configs" / f"{name}.json.xz"
    rankings = calibrate.load_rankings(path, config, "qk")
    assert rankings.shape == (config.n_layers, config.n_kv_heads, 128)
    assert (rankings.sort(-1).values == torch.arange(128)).all()
    import lzma

    lists = json.loads(lzma.open(path, "rt").read())["model.layers.3.self_attn.qk_proj"]
    if config.n_heads == config.n_kv_heads:
        assert rankings[3].tolist() == lists

# ---------------------------------------------------------------- the embedded checkpoint


@pytest.fixture(scope="module")
def tiny():
    dtype = torch.bfloat16 if GPU else torch.float32
    model = load_model(TINY, DEVICE, dtype)
    return model, Tokenizer(TINY)


def decoder(tiny, size, config, method="ds", **more):
    maps = load_label_maps(TINY, tiny[0].config, config) if config else None
    return evaluation.Decoder(*tiny, size, config, maps, evaluation.METHODS[method], **more)


def measured(tiny, items, *settings):
    """What a row says of these items: of dense, then of each (DSConfig, method). Caches have no room
    for the last token: tiny's windows of 8,192 tokens behind a BOS fill its positions."""
    size = max(map(asked.size, items)) - 1
    dense = decoder(tiny, size, None)
    decoders = [dense, *(decoder(tiny, size, *setting) for setting in settings)]
    text = "answer" not in items[0] and "outputs" not in items[0]
    score, summary = ((evaluation.score_text, evaluation.of_text) if text else
                      (evaluation.score_answer, evaluation.of_answers))
    return [summary(found) for found in zip(*(score(item, dense, decoders) for item in items))]


def window_of_text(tiny, size=700, prefilled=0):
    windows = asked.text_windows(tiny[1], [(ROOT / "README.md").read_text(encoding="utf-8")], size, limit=1)
    return [{"prompt": windows[0], "prefilled": prefilled}]


@pytest.mark.skipif(not SHARED.exists(), reason="needs the project's shared test data")
def test_tiny_perplexity(tiny):
    """Held-out books, one of their 223 windows of 4096; the card has the figures of all: dense 1.207, ratio 1.007."""
    window = asked.text_windows(tiny[1], asked.read_texts(SHARED / "books-valid.jsonl.xz"), 4096)[60]
    dense, sparse = measured(tiny, [{"prompt": window, "prefilled": 0}], (DSConfig(n_tokens=256), "ds"))
    assert dense["bits_per_byte"] < 1.21
    assert 1.0 < sparse["score"] / dense["score"] < 1.015


def test_tiny_retrieval_is_kept_at_a_sixteenth_and_breaks_with_too_little(tiny):
    items = asked.generated_items(tiny[1], asked.kv_document, [3000], 2)
    few = DSConfig(n_tokens=16, label_channels=8, recent=4)
    found = measured(tiny, items, (DSConfig(), "ds"), (few, "ds"))
    assert [row["score"] for row in found[:2]] == [100, 100] and found[2]["score"] <= 50


@pytest.mark.parametrize("config", [DSConfig(n_tokens=40, dense_below=0),
                                    DSConfig(sparsity=4, min_tokens=20, dense_below=0)],
                         ids=["n=40", "1/4"])
def test_ds_rows_are_what_the_decode_step_gives(tiny, config):
    """The layer that is evaluated against the one that generates, over rows and one by one."""
    window = window_of_text(tiny, 200)[0]["prompt"]
    told = decoder(tiny, 256, config, rows=150)
    told.start()
    ours = list(told.logits(window[:150]))
    told.rows = 1
    ours = torch.cat(ours + list(told.logits(window[150:200])))
    maps = load_label_maps(TINY, tiny[0].config, config)
    cache = KVCache(tiny[0].config, 1, 256, tiny[0].device, tiny[0].dtype, config, maps)
    rows = tiny[0].decode_rows(torch.tensor(window[:150], device=DEVICE), cache)
    ones = torch.cat([tiny[0].decode(torch.tensor([token], device=DEVICE), cache) for token in window[150:200]])
    assert relative_error(ours, torch.cat([rows, ones])) < (0.02 if GPU else 1e-5)


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
    told = decoder(tiny, 130, None)
    told.start(window[:100])
    list(told.logits(window[100:130]))
    assert told.attended() == sum(range(101, 131)) and told.decoded == 30


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
    config = DSConfig(sparsity=3, min_tokens=18, dense_layers=0, dense_below=0, sink=2, recent=16)
    cache = KVCache(ModelConfig(64, 1, 2, 2, 32, 64, 50, 128), 1, 100, DEVICE, torch.float32, config, [Problem(shapes()).map])
    layer = evaluation.METHODS[method](cache.layers[0])
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((1, 2, 100, 32), (1, 2, 100, 32), (3, 2, 32)))
    layer.write(k, v, torch.arange(100, device=DEVICE)[None])
    lens = torch.tensor([100, 77, 5], dtype=torch.int32, device=DEVICE)
    out = layer.decode(q, lens)
    for b, length in enumerate(lens.tolist()):
        n = config.budget(length)
        for h in range(2):
            chosen = chosen_one_by_one(method, q[b, h], k[0, h], length, n, config)
            assert n <= len(set(chosen)) <= n + 15 * (method == "quest")
            weights = (k[0, h, chosen] @ q[b, h] / 32**0.5).softmax(0)
            torch.testing.assert_close(out[b, h], weights @ v[0, h, chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["ds", "paper"])
def test_methods_by_kernels_equal_the_reference(method, monkeypatch):
    """Groups of two query heads, rows over one cache in runs of several lengths."""
    monkeypatch.setattr(ds, "WARPS", 8)
    p, found = Problem(shapes(B=1, HQ=4, HKV=2, S=150)), {}
    q = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lens = torch.tensor([150, 149, 60, 31, 1], dtype=torch.int32, device=DEVICE)
    for impl in ("torch", "triton"):
        config = replace(p.config, impl=impl, sparsity=3, min_tokens=18, dense_layers=0,
                         dense_below=0, recent=16)
        model_config = ModelConfig(256, 1, 4, 2, 64, 64, 50, 150)
        cache = KVCache(model_config, 1, 150, DEVICE, torch.float32, config, [p.map])
        layer = evaluation.METHODS[method](cache.layers[0])
        layer.write(p.k, p.v, p.positions)
        layer.start(probed=True)
        layer.EVERY = 2
        outs = [layer.decode(q[:3], lens[:3]), layer.decode(q[3:], lens[3:])]
        found[impl] = [torch.cat(outs), layer.mass, layer.attended]
        assert layer.probes == 3
    for got, want in zip(found["triton"], found["torch"]):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    least = sum(config.budget(length) for length in lens.tolist())
    assert least <= float(layer.attended) <= least + 3, "ties may add some"
    if method == "ds":
        k, v, labels = (x.expand(3, *x.shape[1:]) for x in (p.k, p.v, layer.labels))
        decoded = ds.ds_decode(q[:3], k, v, labels, p.map, lens[:3], config, label_newest=False)
        assert torch.equal(outs[0], decoded), "what generates gives other bits"


def test_h2o_keeps_the_newest_and_the_most_attended():
    """Against the method told one token at a time, in dictionaries."""
    config = DSConfig(n_tokens=9, dense_layers=0, sink=0, recent=1)
    cache = KVCache(ModelConfig(64, 1, 2, 2, 32, 64, 50, 128), 1, 40, DEVICE, torch.float32, config, [Problem(shapes()).map])
    layer = evaluation.METHODS["h2o"](cache.layers[0])
    k, v, q = (torch.randn(*shape, generator=torch.Generator().manual_seed(s)).to(DEVICE) * 2
               for s, shape in enumerate(((1, 2, 40, 32), (1, 2, 40, 32), (40, 2, 32))))
    layer.write(k, v, torch.arange(40, device=DEVICE)[None])
    lens = torch.arange(1, 41, dtype=torch.int32, device=DEVICE)
    out = torch.cat([layer.decode(q[:25], lens[:25]), layer.decode(q[25:], lens[25:])])  # rows come in runs
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


def test_exact_scores_choose_for_every_head_of_a_group():
    """One head wants token 3 alone, but its score of token 7 is still far above what the other head wants most, token 9."""
    config = DSConfig(n_tokens=3, dense_layers=0, sink=0, recent=1)
    shape = ModelConfig(64, 1, 2, 1, 32, 64, 50, 128)
    cache = KVCache(shape, 1, 50, DEVICE, torch.float32, config, [Problem(shapes(HKV=1, D=32)).map])
    exact = evaluation.ExactTopK(cache.layers[0])
    k, q = torch.zeros(1, 1, 50, 32, device=DEVICE), torch.zeros(1, 2, 32, device=DEVICE)
    k[..., 0], k[0, 0, 3, 0], k[0, 0, 7, 0], k[0, 0, 9, 1] = 5, 8, 6, 1
    q[0, 0, 0], q[0, 1, 1] = 10 * 32**0.5, 6 * 32**0.5
    exact.write(k, k, torch.arange(50, device=DEVICE)[None])
    lens = torch.tensor([50], dtype=torch.int32, device=DEVICE)
    raw = exact.logits(q, lens, 50)[0, 0].mean(0)
    assert raw[:49].topk(2).indices.tolist() == [3, 7], "by raw scores"
    chosen = ds.select_ref(exact.scores(q, lens), lens, exact.ds)
    assert chosen[0, 0].nonzero().flatten().tolist() == [3, 9, 49]


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_methods_run_behind_a_prefilled_context(tiny, method):
    """Their K, V and labels are taken from dense's prefill."""
    items = asked.generated_items(tiny[1], asked.lines_document, [300], 1)
    dense, found = measured(tiny, items, (DSConfig(n_tokens=290), method))
    assert found == dense and found["score"] == 100, "N covers all: it is dense"
    text = measured(tiny, window_of_text(tiny, 200, 150), (DSConfig(n_tokens=250), method))
    assert text[1]["score"] == pytest.approx(text[0]["score"], rel=1e-2 if GPU else 1e-4)
    assert text[1]["kl"] == pytest.approx(0, abs=1e-2 if GPU else 1e-5)


def test_a_taken_prefill_is_as_a_prefill(tiny):
    config, ids = DSConfig(n_tokens=40), window_of_text(tiny, 300)[0]["prompt"][:300]
    dense, own, taken = (decoder(tiny, 300, c) for c in (None, config, config))
    dense.start(ids[:250])
    own.start(ids[:250])
    taken.start(ids[:250], like=dense)
    for a, b in zip(own.sparse, taken.sparse):
        assert torch.equal(a.labels, b.labels) and a.labels.any()
    assert torch.equal(torch.cat(list(own.logits(ids[250:]))), torch.cat(list(taken.logits(ids[250:]))))


def test_agreement_is_full_with_all_tokens_and_falls_with_the_budget(tiny):
    few = DSConfig(n_tokens=24)
    configs = (DSConfig(n_tokens=500), DSConfig(n_tokens=200), few)
    found = measured(tiny, window_of_text(tiny, 400), *((config, "ds") for config in configs), (few, "exact_topk"))
    assert abs(found[1]["kl"]) < 1e-5 and found[0]["top1"] == 100.0 and found[0]["mass"] is None
    assert found[1]["kl"] < found[2]["kl"] < found[3]["kl"] and found[2]["top1"] > found[3]["top1"]
    masses = [row["mass"] for row in found[1:]]
    assert masses[0] == pytest.approx(1) and masses[0] > masses[1] > masses[2]
    assert masses[3] > masses[2] - 0.01, "no choice of as many tokens keeps more than the best ones"


def test_methods_order_as_expected_on_text(tiny):
    """At a small budget exact scores keep most; the newest tokens alone keep least."""
    methods = ("exact_topk", "ds", "h2o", "streaming")
    rows = measured(tiny, window_of_text(tiny), *((DSConfig(n_tokens=40), method) for method in methods))
    scores = dict(zip(methods, (row["score"] for row in rows[1:])))
    assert max(scores["exact_topk"], scores["ds"]) < min(scores["streaming"], scores["h2o"])


def test_only_the_last_tokens_are_scored_behind_a_prefill(tiny):
    whole, last = window_of_text(tiny, 300)[0], window_of_text(tiny, 300, 200)[0]
    dense = decoder(tiny, 300, None)
    (all_of,), (found,) = (evaluation.score_text(item, dense, [dense]) for item in (whole, last))
    assert (all_of["tokens"], found["tokens"], dense.decoded) == (len(whole["prompt"]) - 1, len(last["prompt"]) - 201,
                                                                    len(last["prompt"]) - 201)
    dense.start()
    logits = torch.cat(list(dense.logits(whole["prompt"][:-1]))).float()[200:]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(whole["prompt"][201:], device=DEVICE), reduction="sum")
    assert found["nats"] == pytest.approx(nats.item(), rel=1e-2 if GPU else 1e-4)


@pytest.mark.parametrize("document, fact, question", [
    (asked.kv_document, '"{}": "{}"', 'under "(.*)"'), (asked.lines_document, "Line {} holds {}.", "line (.*) hold\\?"),
    (asked.passkey_document, "The safe of {} opens with {}.", "opens the safe of (.*)\\?")], ids=["kv", "lines", "passkey"])
def test_generated_items_fill_their_length_and_hide_the_answer_at_their_depth(tiny, document, fact, question):
    text = calibrate.builtin_text()
    items = asked.generated_items(tiny[1], document, [900, 1800], 5, text)
    assert items == asked.generated_items(tiny[1], document, [900, 1800], 5, text), "a function of the arguments"
    assert [item["length"] for item in items] == [900] * 5 + [1800] * 5
    assert [int(5 * item["depth"]) for item in items] == [0, 1, 2, 3, 4] * 2
    for item in items:
        assert item["length"] - 100 < asked.size(item) <= item["length"], "another fact, of up to 75 tokens, would not fit"
        cut = item["prefilled"]
        context, ask, answer = map(tiny[1].decode, (item["prompt"][:cut], item["prompt"][cut:], item["answer"]))
        answer = answer.strip(' "')
        at = context.index(fact.format(re.search(question, ask).group(1), answer)) / len(context)
        assert abs(at - item["depth"]) < 0.2, "a pair takes a tenth of 900 tokens"
        assert answer not in ask
    with pytest.raises(ValueError, match="lengths=20: too short"):
        asked.generated_items(tiny[1], document, [20], 1, text)


def test_answers_are_reported_by_task_length_and_depth():
    results = [{"score": score, "length": length, "depth": depth, "task": "a" if depth < 0.5 else "b"} for score, length, depth
               in ((100, 512, 0.99), (0, 512, 0.19), (100, 1024, 0.1), (100, 1024, 0.5))]
    found = evaluation.of_answers(results)
    assert found == {"score": 75, "by_length": {"512": 50, "1024": 100}, "by_task": {"b": 100, "a": 50},
                     "by_depth": {"1/5": 50, "3/5": 100, "5/5": 100}}


def asks(data=None, **more):
    """The arguments that items are made from."""
    return SimpleNamespace(**{"data": data and str(data), "limit": None, "lengths": None, "context": 400, "prompts": None,
                              "chat": False, "last": None} | more)


def test_ruler_has_ten_tasks_of_any_length_whose_answers_are_in_the_text(tiny):
    name, items = asked.ruler_items(tiny[1], asks(lengths=[1500], limit=2))
    assert name == "generated, " + asked.BUILTIN and [item["task"] for item in items] == [t for t in asked.RULER for _ in "ab"]
    assert items == asked.ruler_items(tiny[1], asks(lengths=[1500], limit=2))[1], "a function of the arguments"
    assert all(1300 < asked.size(item) <= 1500 for item in items)
    for item in items:
        text, outputs, task = tiny[1].decode(item["prompt"]), item["outputs"], item["task"]
        assert len(set(outputs)) == len(outputs) == {"vt": 5, "cwe": 10, "fwe": 3, "niah_multivalue": 4,
                                                      "niah_multiquery": 4}.get(task, 1)
        body, question = text.rsplit("\n\n", 1)
        if task == "vt":
            value, = re.findall("value ([0-9]+)\\?", question)
            given = dict(re.findall("VAR ([A-Z]+) = (?:VAR )?([0-9A-Z]+)\\.", body))
            for _ in range(5):
                given = {name: given.get(of, of) for name, of in given.items()}
            assert len(given) == 10 and sorted(outputs) == sorted(name for name, of in given.items() if of == value)
        elif task in ("cwe", "fwe"):
            counts = Counter(re.findall("[a-z]+", body.split("\n\n", 1)[1]))
            assert {word for word, _ in counts.most_common(len(outputs))} == set(outputs)
        else:
            keys = re.search("safes? of (.*)\\?", question).group(1).split(", ")
            told = re.findall(r"The safe of (\S+) opens with (\S+)\.", body)
            assert sorted(outputs) == sorted(value for key, value in told if key in keys)
            assert len(told) == {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(task, len(told))


def test_ruler_items_of_a_file(tiny, tmp_path):
    """In the published format; the chat template, where asked for, goes around the input, and the answer's beginning behind."""
    lines = [{"task": task, "max_seq_length": length, "index": 0, "input": f"{task} {length}?", "outputs": ["One", "two"],
              "answer_prefix": " They are: ", "source": "x"} for task in ("vt", "niah_single_1") for length in (400, 800, 800)]
    (tmp_path / "ruler.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, items = asked.ruler_items(tiny[1], asks(tmp_path / "ruler.jsonl", lengths=[800], limit=1))
    assert [(item["task"], item["length"], item["max_new_tokens"]) for item in items] == [
        ("vt", 800, 30), ("niah_single_1", 800, 128)]
    assert tiny[1].decode(items[0]["prompt"]).endswith("vt 800? They are:")
    assert asked.METRICS["found"]("ONE and Two", ["one", "two"]) == 100 and asked.METRICS["found"]("one", ["one", "two"]) == 50
    chat = SimpleNamespace(chat=lambda messages: [1, 2, len(messages)], encode=tiny[1].encode)
    _, items = asked.ruler_items(chat, asks(tmp_path / "ruler.jsonl", chat=True))
    assert len(items) == 6 and items[0]["prompt"] == [1, 2, 1] + tiny[1].encode("They are:", special=False)
    (tmp_path / "ruler.jsonl").write_text(json.dumps(lines[0] | {"task": "qa_1"}) + "\n")
    with pytest.raises(ValueError, match="task qa_1 is none of niah_single_1"):
        asked.ruler_items(tiny[1], asks(tmp_path / "ruler.jsonl"))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the project's shared test data")
def test_published_benchmark_files_are_read(tiny):
    for name, count in (("ruler", 130), ("longbench_gov_report", 1), ("longbench_triviaqa", 1), ("longbench_multifieldqa_en", 1)):
        made = asked.TASKS["ruler" if count > 1 else "longbench"]
        path = SHARED / "benchmarks" / f"{name}.jsonl.xz"
        _, items = made(tiny[1], asks(path, limit=1 if count == 1 else None, context=1000))
        assert len(items) == count and all(item["outputs"] for item in items)


def test_longbench_metrics_by_hand():
    assert asked.f1("The cat sat.", "A cat sat down") == pytest.approx(200 * 2 / (2 + 3))
    assert asked.f1("the U.S.", "US") == 100
    assert asked.f1("no no", "no") == pytest.approx(200 / 3) and asked.f1("", "x") == asked.f1("the", "the") == 0
    assert asked.rouge_l("a1 b1 c1 d1", "a1 c1 d1 e1") == pytest.approx(75)
    assert asked.rouge_l("b1 a1", "a1 b1") == pytest.approx(50) and asked.rouge_l("x", "y") == 0


def test_longbench_runs_on_items_of_its_format(tiny, tmp_path):
    context = "The harbour master's name was Ezra Finch. " * 3
    items = [{"context": context, "input": "Who was the harbour master?", "answers": ["nobody", "Ezra Finch"], "dataset": "x"}] * 2
    path = tmp_path / "multifieldqa_en.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"multifieldqa_en": "{context} Q: {input} A:"}))
    for prompts in (None, tmp_path / "dataset2prompt.json"):
        _, found = asked.longbench_items(tiny[1], asks(path, prompts=prompts))
        assert len(found) == 2 and found[0]["outputs"] == ["nobody", "Ezra Finch"]
        assert tiny[1].decode(found[0]["prompt"][1:]).endswith("A:" if prompts else "Answer:")
    cut, whole = (asked.longbench_items(tiny[1], asks(path, context=size))[1][0]["prompt"] for size in (100, 400))
    assert len(cut) == 36 and cut == whole[:18] + whole[-18:]
    told = decoder(tiny, 400, None)
    told.greedy = lambda *_: "Finch, Ezra\nand more"
    for one_line, score in ((True, 100), (False, 200 * 2 / 6)):
        scored, = evaluation.score_answer(found[0] | {"one_line": one_line}, told, [told])
        assert scored["score"] == pytest.approx(score), "the first line alone"
    run = command("eval.py", "longbench", "--data", path, "--context", 400, "--device", "cpu", "--results", tmp_path / "rows")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "ds"] and rows[0]["prompts"] == "own", run.stderr
    assert all(0 <= row["score"] <= 100 for row in rows)


def test_greedy_continues_as_generate_does(tiny):
    prompt = tiny[1].encode("The sea was calm and the")
    step = generate.DecodeStep(tiny[0], KVCache(tiny[0].config, 1, 64, DEVICE, tiny[0].dtype))
    want = generate.generate(step, [prompt], 12).token_ids[0]
    told = decoder(tiny, 64, None)

    def greedy(done=lambda text: False):
        told.start(prompt[:-1])
        return told.greedy(prompt[-1:], 12, done)

    assert greedy() == tiny[1].decode(want)
    word = tiny[1].decode(want[:3]).split()[-1]
    stopped = greedy(lambda text: word in text)
    assert stopped.endswith(word) and len(stopped) < len(tiny[1].decode(want)), "where it is done"
    told.model = SimpleNamespace(config=SimpleNamespace(eos_ids=[want[7]], longest_window=None), prefill=told.model.prefill,
                                 device=told.model.device, decode_rows=told.model.decode_rows)
    assert greedy() == tiny[1].decode(want[: want.index(want[7]) + 1]), "the end of text ends it"


def test_mmlu_runs_on_files_of_its_format(tiny, tmp_path):
    for part, n in (("dev", 6), ("test", 3)):
        (tmp_path / part).mkdir()
        for subject in ("high_school_physics", "anatomy"):
            lines = [f'"{part} {i}, of {subject}?",one,two,three,four,{"ABCD"[i % 4]}\n' for i in range(n)]
            (tmp_path / part / f"{subject}_{part}.csv").write_text("".join(lines))
    _, items = asked.mmlu_items(tiny[1], asks(tmp_path))
    letters = items[0]["among"]
    assert len(items) == 6 and [item["answer"] for item in items] == [[letter] for letter in letters[:3]] * 2
    assert len(set(letters)) == 4
    text = tiny[1].decode(items[3]["prompt"][1:])
    assert text.count("Answer:") == 6 and "high school physics" in text and "dev 4" in text and "dev 5" not in text
    assert text.endswith("A. one\nB. two\nC. three\nD. four\nAnswer:")
    assert len(asked.mmlu_items(tiny[1], asks(tmp_path, limit=2))[1]) == 2
    told = decoder(tiny, 400, None)
    always_b = torch.eye(4096)[letters[1]][None]
    always_b[0, 5] = 2.0  # another token is likelier, but no letter
    told.logits = lambda tokens: iter([always_b])
    assert [evaluation.score_answer(item, told, [told])[0]["score"] for item in items] == [0, 100, 0] * 2
    run = command("eval.py", "mmlu", "--data", tmp_path / "dev", "--device", "cpu")
    assert run.returncode == 2 and "published archive" in run.stderr


@pytest.mark.parametrize("text, wanted", [
    ("1/32", dict(sparsity=32)), ("n=64", dict(n_tokens=64)), ("n=64,1/8", dict(sparsity=8, n_tokens=64))])
def test_budgets_are_read_and_named_alike(text, wanted):
    base = DSConfig(sink=2)
    config = evaluation.parse_budget(text, base)
    assert config == replace(base, **wanted)
    assert evaluation.parse_budget(evaluation.budget_name(config), base) == config
    assert evaluation.parse_budget("1/16", config).n_tokens is None, "a share is no longer a number of tokens"


@pytest.mark.parametrize("text", ["16", "1/", "n=", "n=1.5", "n=0", "1/1", "sink=3", "1/16,"])
def test_budgets_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(text) if text not in ("n=0", "1/1") else "must be"):
        evaluation.parse_budget(text, DSConfig())


def test_methods_are_read():
    assert evaluation.parse_method("quest") == (evaluation.Quest, None, None)
    assert evaluation.parse_method("paper") == (evaluation.Paper, "qk", 4)
    assert evaluation.parse_method("ds:qk/2") == (evaluation.DoubleSparsity, "qk", 2)
    assert evaluation.parse_method("ds/8x4,48x2") == (evaluation.DoubleSparsity, None, "8x4,48x2")
    for text in ("quest:qk", "quest/2", "dense", "ds:best", "ds/x", "ds/4,2"):
        with pytest.raises(ValueError, match=f"methods={text}"):
            evaluation.parse_method(text)


@pytest.mark.parametrize("page", ["README.md", "tiny/README.md"])
def test_quality_tables_are_those_of_the_results(page):
    rows = evaluation.read_rows(evaluation.RESULTS, evaluation.SETTING).values()
    rows = [row for row in rows if page == "README.md" or row["checkpoint"] == "tiny"]
    assert evaluation.table(rows) in (ROOT / page).read_text(encoding="utf-8")


ROW = {"task": "lines", "checkpoint": "tiny", "model": "abc", "data": "generated", "context": 900, "method": "ds",
       "budget": "1/16", "n_items": 4, "gpu": "none (CPU)", "torch": "2.11", "triton": "3.6", "commit": "1234567",
       "date": "2026-11-28", "config": {"dense_layers": 2}, "mean_tokens": 128.2, "score": 75.0, "dense_score": 100.0,
       "labels": "32 x 4 bit", "by_length": {"512": 50.0, "1024": 100.0}, "by_depth": {"1/5": 100.0, "3/5": 50.0}}


def test_table_keeps_model_and_text_together_and_shows_the_newest(tmp_path):
    text = ROW | {"task": "perplexity", "score": 11.0, "dense_score": 10.0, "data": "books", "kl": 0.25, "top1": 90.0}
    for name in ("by_length", "by_depth"):
        del text[name]
    rows = [ROW | {"score": 1.0}, text, text | {"data": "wiki"}, ROW | {"config": {"dense_layers": 2, "sink": DSConfig.sink}},
            text | {"budget": "n=9"}, ROW | {"checkpoint": "Large", "model": "def"}]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = evaluation.table(evaluation.read_rows(tmp_path / "rows", evaluation.SETTING).values()).split("\n\n")
    assert len(parts) == 5 and parts[0].startswith("**Large**, def: none (CPU), torch 2.11") and parts[2].startswith("**tiny**, abc:")
    (_, large), (headings, *cells), (_, *items) = ([[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()
                                                    if "---" not in line] for part in (parts[1], parts[3], parts[4]))
    assert large == items[0] == ["lines", "generated", "900", "ds", "1/16", "128", "75.0%", "100.0%", "4", "512: 50, 1024: 100",
                                 "1/5: 100, 3/5: 50", "32 x 4 bit", "2"] and len(items) == 1
    assert headings == ["text", "context", "method", "budget", "tokens", "perplexity", "over dense", "KL", "same likeliest",
                        "windows", "labels", "dense layers"], "no column of nothing"
    assert [row[0] for row in cells] == ["books", "books", "wiki"] and cells[0][5:9] == ["11.000", "1.1000", "0.2500", "90.0%"]


def test_plot_where_matplotlib_is(tmp_path):
    if not find_spec("matplotlib"):
        run = command("bench.py", "table", "attention", "--plot", tmp_path / "x.png")
        assert run.returncode == 2 and run.stderr == "error: --plot needs matplotlib: pip install matplotlib\n"
        pytest.skip("no matplotlib")
    for name, of in bench.BENCHES.items():
        bench.plot(bench.newest_rows(name), of.draw, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").exists()


def test_interrupted_items_are_not_scored_again(tmp_path):
    """Two settings, of which one had been measured further; a line that was being written counts for nothing."""
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
    assert found[0] == found[1] == [{"score": i, "attended": 6.0, "decoded": 2} for i in (1, 2, 3, 4)]
    assert [json.loads(line)["score"] for line in partials[0].read_text().splitlines()] == [1, 2, 3, 4]


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Runs eval.py in this process, its files below tmp_path -> (rows in the file, stdout, stderr)."""
    monkeypatch.setattr(evaluation, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked.texts_of.cache_clear()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments), "--device", "cpu"])
        evaluation.main()
        captured = capsys.readouterr()
        path = tmp_path / "runs" / "quality.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()], captured.out, captured.err
    return run


def test_saved_rows_are_taken_and_only_new_settings_measured(evaluate, tmp_path):
    common = ("lines", "--lengths", 300, "--limit", 2, "--methods", "ds", "streaming")
    rows, _, _ = evaluate(*common, "--budgets", "n=40")
    assert [(row["method"], row["budget"]) for row in rows] == [("dense", "all"), ("ds", "n=40"), ("streaming", "n=40")]
    assert 40 <= rows[1]["mean_tokens"] < 40.2
    assert "labels" in rows[1] and rows[1]["calibration"]["method"] == "planes"
    assert rows[1]["dense_score"] == rows[0]["score"] == 100 and "labels" not in rows[2] and rows[2]["calibration"] is None
    keys = {"task", "checkpoint", "model", "method", "budget", "mean_tokens", "score", "dense_score", "n_items", "context",
            "torch", "triton", "gpu", "commit", "date", "data", "config", "calibration"}
    assert all(keys <= set(row) and math.isfinite(row["score"]) for row in rows)
    again, out, err = evaluate(*common, "--budgets", "n=40", "n=30")
    assert again[:3] == rows and [row["budget"] for row in again[3:]] == ["n=30", "n=30"]
    assert err.count("--force measures it again") == 3 and out.count("\n| lines") == 5, "the table has old and new"
    other, _, err = evaluate(*[1 if x == 2 else x for x in common], "--budgets", "n=40")
    assert len(other) == 8 and "--force" not in err, "other items are another measurement"
    forced, _, _ = evaluate(*common, "--budgets", "n=40", "--force")
    assert len(forced) == 11 and [row["score"] for row in forced[8:]] == [row["score"] for row in rows]
    assert not list((tmp_path / "runs" / "partial").iterdir())


def test_labels_of_other_calibrations_are_made_once(evaluate, tmp_path, monkeypatch):
    calls = []
    real = calibrate.calibrate

    def quick(*args, **more):
        calls.append(args[2])
        return real(*args, **more, samples=3, context=256)

    monkeypatch.setattr(calibrate, "calibrate", quick)
    (tmp_path / "text.txt").write_text(calibrate.builtin_text()[:60_000])
    common = ("perplexity", "--context", 300, "--limit", 1, "--n_tokens", 40, "--methods", "ds:qk", "ds:random/2")
    rows, _, err = evaluate(*common)
    assert calls == ["qk", "random"] and "the text is the Python language reference" in err
    assert [row.get("labels") for row in rows] == [None, "8 x 4, 48 x 2 bit", "64 x 2 bit"], "as many bytes"
    assert [row["calibration"]["method"] for row in rows[1:]] == ["qk", "random"]
    assert all(row["calibration"]["text"] == row["data"] == asked.BUILTIN for row in rows[1:])
    assert max(row["score"] for row in rows[:2]) < rows[2]["score"], "random dims lose most"
    evaluate(*common, "--force")
    assert len(calls) == 2
    rows, _, _ = evaluate(*common, "--calibration_data", tmp_path / "text.txt")
    assert len(calls) == 4 and "text" not in rows[-1]["calibration"] and rows[-1]["score"] != rows[2]["score"]


def test_tasks_run_together_with_all_methods(evaluate):
    rows, out, err = evaluate("perplexity", "passkey", "--limit", 1, "--context", 100, "--last", 60, "--lengths", 200, "--n_tokens",
                              30, "--methods", *(method for method in evaluation.METHODS if method != "paper"))
    assert {(row["task"], row["method"]) for row in rows} == {
        (task, method) for task in ("perplexity", "passkey") for method in {"dense", *evaluation.METHODS} - {"paper"}}
    assert all(row["decoded"] if "decoded" in row else row.get("last", 60) == 60 for row in rows)
    assert "the text is the Python language reference" in err and out.startswith("**tiny**")


def test_wikitext_comes_from_the_hub(tmp_path, monkeypatch):
    """From a stand-in for the hub; another text than the published one is refused."""
    text = " = Robert <unk> = \n caf\u00e9"
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", text)
    monkeypatch.setattr(asked, "hf_hub_download", lambda *where, **more: str(tmp_path / "archive.zip"))
    with pytest.raises(ValueError, match="another text"):
        asked.wikitext2()
    monkeypatch.setattr(asked, "WIKITEXT2_SHA256", hashlib.sha256(text.encode()).hexdigest())
    asked.texts_of.cache_clear()
    assert asked.texts_of("wikitext2") == ("wikitext2-test.raw", [text])
    asked.texts_of.cache_clear()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the project's shared test data")
def test_the_published_wikitext_is_the_one_expected():
    data = (SHARED / "wikitext2-test.raw").read_bytes()
    assert hashlib.sha256(data).hexdigest() == asked.WIKITEXT2_SHA256


@pytest.mark.parametrize("arguments, message", [
    (["longbench"], "longbench needs"), (["lines", "--data", "x"], "leave out --data"), (["--lengths", "0"], "lengths=0"),
    (["--sparsity", "1", "--budgets", "n=9"], "sparsity=1: dense has no budgets"), (["perplexity", "table"], "or table alone"),
    (["ruler", "--lengths", "100"], "lengths=100: too short"), (["--last", "0"], "last=0"), (["--budgets", "n=x"], "budgets=n=x"),
    (["--methods", "topk"], "methods=topk: must be one of"),
    (["lines", "--limit", "1", "--lengths", "300", "--sparsity", "1", "--label_bits", "4"], "label_bits=4: --sparsity 1 is dense"),
    (["--budgets", "n=64,top_p=0.9"], "budgets=n=64,top_p=0.9: must look like"),
    (["kv_retrieval", "--data", "{}/empty.jsonl"], "empty.jsonl: no items in it"),
    (["kv_retrieval", "--data", "{}/odd.jsonl"], "do not hold its key and value"),
    (["perplexity", "--context", "9000"], "8192 positions")])
def test_bad_settings_of_eval_are_named(evaluate, arguments, message, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"ordered_kv_records": [["a", "b"]], "key": "c", "value": "b"}) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(*(argument.format(tmp_path) for argument in arguments))


def test_methods_that_cannot_run_are_told_before_any_is_measured():
    for method, settings, message in (("h2o", dict(window=100), "window=100: h2o is not made"),
                                      ("quest", dict(ds=DSConfig(recent=9)), "recent=9: must be 15 at least for quest")):
        layer = SimpleNamespace(**{"kv": None, "window": None, "ds": DSConfig(), "label_map": None, "labels": None} | settings)
        with pytest.raises(ValueError, match=message):
            evaluation.METHODS[method](layer)


@pytest.mark.parametrize("name", bench.BENCHES)
def test_bench_tables_are_those_of_the_results(name):
    if not (bench.RESULTS / f"{name}.jsonl").exists():
        pytest.skip("not measured yet")
    assert bench.BENCHES[name].table(bench.newest_rows(name)) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_bench_times_labels_that_fit_the_head(monkeypatch):
    timed = []
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: None)
    monkeypatch.setattr(bench, "attention_row", lambda B, S, HQ, HKV, D, dtype, config, *_: timed.append(config.channels(D)))
    args = SimpleNamespace(sparsity=16, label_channels=None, label_bits=None, shapes=None, head_dim=32, dtype="bfloat16")
    assert len(list(bench.run_attention(args, "cuda"))) == len(timed) == 2 * len(bench.SHAPES) + 3


def test_bench_checks_its_rows_on_a_cpu():
    config = DSConfig(impl="torch", dense_below=0)
    row = bench.attention_row(2, 600, 4, 2, 64, torch.float32, config, "cpu", None)
    assert row["max_rel_err"] < 1e-4 and row["ds_us"] > 0 and "speedup" not in row
    x = bench.Inputs(1, 600, 4, 2, 64, torch.float32, config, "cpu", 0)
    wrong = ds.dense_decode(x.q, x.k, x.v, x.seq_lens)  # attention to other tokens is found out
    assert bench.check(x, config, wrong) > 0.1


def test_gpt_fast_s_way_gives_what_dense_decoding_gives():
    model = bench.random_model(replace(bench.CPU_MODEL, n_kv_heads=2), DEVICE, torch.float32)
    S, size = 20, 30
    theirs, cache = bench.GptFast(model, 2, size), bench.random_cache(model, 2, size, None, DEVICE)
    for cached, layer in zip(theirs.caches, cache.layers):
        for kept, mine in zip(cached, layer.past(size)):
            kept.copy_(mine)
    cache.seq_lens.fill_(S)
    tokens = torch.tensor([5, 9], device=DEVICE)
    for position in range(S, size):
        found = theirs.step(tokens[:, None], torch.tensor([position], device=DEVICE))[:, 0]
        tokens = model.decode(tokens, cache).argmax(-1)
        assert torch.equal(found, tokens)


def generate_rows(**more):
    """The rows of `bench.py generate` on a CPU, but for gpt_fast, which compiles for long."""
    args = dict(modes=["prefill", "dense", "ds"], dense_layers=[2, 0], dense_below=0, steps=3, shapes=None, model=None,
                compile=False)
    return [row for rows in bench.run_generate(SimpleNamespace(**(args | more)), "cpu") for row in rows]


@pytest.fixture
def generate_run():
    return generate_rows()


def test_bench_generate_rows(generate_run):
    prefill, dense, default, bare = generate_run
    assert [row["mode"] for row in generate_run] == ["prefill", "dense", "ds", "ds"]
    assert {row["gpu"] for row in generate_run} == {"none (CPU)"}
    assert prefill["prefill_s"] > 0 and prefill["cold_start_s"] > 0 and prefill["ms_per_step"] is None
    assert bare["bytes_per_step"] < default["bytes_per_step"] < dense["bytes_per_step"]
    c = bench.CPU_MODEL
    weights = sum(math.prod(shape) for name, shape in parameter_shapes(c).items() if not name.startswith("embed")) * 4
    assert dense["bytes_per_step"] == weights + c.n_layers * 2 * 300 * c.n_kv_heads * 2 * c.head_dim * 4
    for row in (dense, default, bare):
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms_per_step"])
        assert row["speedup_vs_dense"] == dense["ms_per_step"] / row["ms_per_step"] and row["speedup_vs_gpt_fast"] is None


def test_bench_generate_times_int8_beside_the_weights_as_they_are():
    dense, int8, sparse = generate_rows(modes=["dense", "dense_int8", "ds_int8"], dense_layers=[2])
    assert [row["mode"] for row in (int8, sparse)] == ["dense_int8", "ds_int8"]
    c = bench.CPU_MODEL
    shapes = [shape for name, shape in parameter_shapes(c).items() if len(shape) == 2 and name != "embed.weight"]
    saved = sum(3 * math.prod(shape) - 4 * shape[0] for shape in shapes)  # of fp32, and a scale per output
    assert dense["bytes_per_step"] - int8["bytes_per_step"] == saved
    assert sparse["bytes_per_step"] < int8["bytes_per_step"]
    assert int8["speedup_vs_dense"] == dense["ms_per_step"] / int8["ms_per_step"]


def test_bench_generate_table_shows_its_newest_rows(generate_run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="run bench.py generate first"):
        bench.newest_rows("generate")
    _, dense, *_ = generate_run
    cli.append_json_lines(bench.RESULTS / "generate.jsonl", [{**dense, "ms_per_step": 123.0}])
    cli.append_json_lines(bench.RESULTS / "generate.jsonl", generate_run)
    cli.append_json_lines(bench.RESULTS / "generate.jsonl", [{**dense, "B": 64, "ms_per_step": None, "error": "out of memory"}])
    table = bench.generate_table(bench.newest_rows("generate"))
    line, full = (next(x for x in table.splitlines() if f"| {B}, 300 |" in x) for B in (2, 64))
    assert "CPU reference" in line and f"| {dense['ms_per_step']:.2f} ms |" in line and "123.00" not in table
    for row in generate_run[2:]:
        assert f"| {row['ms_per_step']:.2f} ms, {row['speedup_vs_dense']:.2f}x over dense |" in line
    assert "| out of memory |" in full
    drawn = SimpleNamespace(bars=[], bar=lambda at, heights, width, label: drawn.bars.append((label, heights)),
                            set_xticks=lambda *_, **__: None, set=lambda **_: None, legend=lambda **_: None)
    bench.draw_generate(generate_run, drawn)
    assert drawn.bars[0] == ("dense", [dense["tokens_per_s"]]) and len(drawn.bars) == 3


def test_bench_marks_rows_that_run_out_of_memory(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(bench, "time_decode", out_of_memory)
    model = bench.random_model(bench.CPU_MODEL, "cpu", torch.float32)
    dense, sparse = bench.generate_rows("tiny", model, 1, 50, ["dense", "ds"], [DSConfig()], 3, "cpu", False)
    assert dense["error"] == sparse["error"] == "CUDA out of memory. Tried to allocate 1 GiB"
    assert sparse["ms_per_step"] is sparse["speedup_vs_dense"] is None
    monkeypatch.setattr(bench, "time_prefill", out_of_memory)
    for compiled in (False, True):
        row, = bench.generate_rows("tiny", model, 1, 50, ["prefill"], [DSConfig()], 3, "cpu", False, compiled)
        assert f"| tiny{', compiled' * compiled} | 1, 50 | out of memory |" in bench.generate_table([row])


def offload_run(**more):
    """The rows of `bench.py offload` on a CPU."""
    args = dict(modes=None, dense_layers=[0], budgets=[1, 2], prefetch_heads=[1], no_pack=False, steps=3, shapes=None, model=None,
                compile=False, checkpoint=None, data=None)
    return [row for rows in bench.run_offload(SimpleNamespace(**(args | more)), "cpu") for row in rows]


def test_bench_offload_rows(monkeypatch):
    rows = offload_run()
    flexgen, gpu, tight, tight_predicted, roomy, _ = rows
    assert [row["mode"] for row in rows] == ["flexgen", "gpu"] + 2 * ["offload", "offload_predicted"]
    c, size = bench.CPU_MODEL, 300 + 3 + bench.WARM_UP
    whole = c.n_layers * 2 * c.n_kv_heads * size * 2 * c.head_dim * 4
    assert flexgen["pcie_bytes_per_step"] == flexgen["host_bytes"] == gpu["gpu_kv_bytes"] == whole
    budget = DSConfig(min_tokens=64, dense_below=0).budget(size)
    newest = c.n_layers * 2 * c.n_kv_heads * 2 * c.head_dim * 4
    for row, resident in ((tight, budget), (roomy, 2 * budget)):
        assert row["resident_tokens"] == resident and row["gpu_kv_bytes"] == whole * resident / size + newest
        assert row["same_tokens"] and row["logit_error"] < 1e-5 and row["pcie_copy_gbps"] is None
        assert 0 < row["prefetched_bytes_per_step"] < row["pcie_bytes_per_step"] < whole * budget / size
        assert row["speedup_vs_flexgen"] == flexgen["ms_per_step"] / row["ms_per_step"]
        assert 0.2 < row["agreement"] <= 1 and row["prefetch_heads"] == 1
    assert tight["hit_rate"] < roomy["hit_rate"] < 1
    assert tight_predicted["agreement"] is None and tight_predicted["predicted_layers"] == c.n_layers - 1
    assert tight_predicted["logit_error"] > 1e-3 and tight_predicted["speedup_vs_flexgen"] > 0  # of other tokens, and says so
    table = bench.offload_table(rows)
    ours = f"| offload, 0 dense layers, {budget} resident, 1 head ahead"
    assert f"{ours}, not packed | {tight['ms_per_step']:.2f} |" in table, "float32 is not"
    assert f"{ours} | {tight['ms_per_step']:.2f} |" in bench.offload_table([tight | {"packed": True}])
    assert f"| yes, {tight['logit_error']:.0e} |" in table and f", {tight_predicted['logit_error']:.0e} |" in table
    monkeypatch.setattr(offload, "fetch_ref", lambda *_: None)  # what is attended is not there: found out, and no speedup told
    *_, wrong = offload_run(budgets=[1], modes=["flexgen", "gpu", "offload"])
    assert wrong["logit_error"] > 0.01 and wrong["speedup_vs_flexgen"] is None
    monkeypatch.setattr(bench, "free_host_bytes", lambda: 1000)
    flexgen, gpu, full = offload_run(budgets=[1], modes=["flexgen", "gpu", "offload"])
    assert "of host memory" in flexgen["error"] and "of host memory" in full["error"] and gpu["tokens_per_s"] > 0
    assert "| out of memory |" in bench.offload_table([full])


def test_bench_offload_streams_packed_rows_too():
    """Of 16-bit K and V: fewer bytes, the same logits, and a speedup over each."""
    model = bench.random_model(bench.CPU_MODEL, "cpu", torch.bfloat16)
    source = bench.RandomText(name="tiny", model=model, B=1, S=60, device="cpu")
    pool = bench.PinnedPool()
    whole, packed, ours = bench.offload_rows(
        source, ["flexgen", "flexgen_packed", "offload"], [DSConfig(dense_layers=0, min_tokens=16, dense_below=0)],
        [1], [0], 3, pool=pool)
    assert whole["mode"] == packed["mode"] == "flexgen" and (whole["packed"], packed["packed"]) == (False, True)
    share = packed["pcie_bytes_per_step"] / whole["pcie_bytes_per_step"]
    assert share == pytest.approx(0.75 + 0.25 * packed["as_is"]) and packed["as_is"] < 0.2
    assert ours["speedup_vs_flexgen_packed"] == packed["ms_per_step"] / ours["ms_per_step"]
    table = bench.offload_table([whole, packed, ours])
    assert "| flexgen |" in table and "| flexgen, packed |" in table and f"| {ours['as_is']:.1%} |" in table

    first = pool.held[0].data_ptr()
    lent = pool.layers(model.config, 1, 20, torch.bfloat16, "cpu")
    assert lent[0].data_ptr() == first and lent[0].shape[2] == 20, "what is held serves what is smaller"
    assert pool.layers(model.config, 2, 60, torch.bfloat16, "cpu")[0].shape[0] == 2


@pytest.mark.parametrize("data", [ROOT / "README.md", None], ids=["text", "key-value"])
def test_bench_offload_continues_prompts(data):
    """Of a trained model, whose selections are not random."""
    gpu, ours, predicted, *shorter = offload_run(
        checkpoint=str(TINY), shapes="2x400,1x300", data=data and str(data), budgets=[1],
        dense_layers=[2], steps=4, prefetch_heads=[1], modes=["gpu", "offload", "offload_predicted"])
    assert [(row["B"], row["S"]) for row in shorter] == 3 * [(1, 300)] and shorter[1]["same_tokens"]
    assert ours["weights"] == "trained" and ours["model"] == "tiny" and (ours["B"], ours["S"]) == (2, 400)
    assert ours["data"] == predicted["data"] == ("README.md" if data else "key-value retrieval")
    assert ours["same_tokens"] and ours["hit_rate"] > 0.5 and ours["agreement"] > 0.6 and predicted["predicted_layers"] == 5
    assert f"| tiny, {ours['data']} (CPU reference) | 2, 400 |" in bench.offload_table([ours])


def test_published_items_have_our_wording(tmp_path):
    """The published format: a line of JSON per item, gzipped or not."""
    line = json.dumps({"ordered_kv_records": [["a", "b"], ["c", "d"]], "key": "c", "value": "d"}) + "\n"
    (tmp_path / "items.jsonl").write_text(line * 3)
    with gzip.open(tmp_path / "items.jsonl.gz", "wt") as file:
        file.write(line * 3)
    for name in ("items.jsonl", "items.jsonl.gz"):
        _, items = asked.TASKS["kv_retrieval"](Tokenizer(TINY), asks(tmp_path / name, limit=2))
        assert len(items) == 2 and items[0] == items[1] and items[0]["depth"] == 0.5 and "length" not in items[0]
    prompt, answer = (Tokenizer(TINY).decode(items[0][part]) for part in ("prompt", "answer"))
    assert prompt.endswith('"c": "d"}\n\nWhat is stored under "c"?\nValue:') and answer.strip() == '"d"'


@pytest.mark.parametrize("item", [(tasks.kv_prompt(r := tasks.random_kv(random.Random(1), 9), r[3][0]), tasks.kv_answer(r[3][1])),
                                  (tasks.lines_prompt(r := tasks.random_lines(random.Random(1), 9), r[3][0]), tasks.lines_answer(r[3][1]))],
                         ids=["kv", "lines"])
def test_prompt_and_answer_tokenise_as_they_do_together(item):
    """Training saw them together; generation must meet the same tokens."""
    prompt, answer = item
    encode = Tokenizer(TINY).encode
    assert encode(prompt) + encode(answer[1:], special=False) == encode(prompt + answer)


# ---------------------------------------------------------------- tokenizers

AWKWARD = [
    "The sea was calm", "  two  spaces", "a\n\n  b\tc", "caf\u00e9 \u65e5\u672c \U0001f642", "",
    "x </s><s>[INST] y [/INST]<unk>", "<|user|>one<tool>  two <tool><|end|>\n three"
]
PAD = dict(id=3, content="<pad>", single_word=False, lstrip=False, rstrip=False, normalized=False,
           special=True)
ADDED = {"4096": {"content": "<|user|>", "special": True, "normalized": False},
         "4097": {"content": "<tool>", "special": False, "normalized": True, "rstrip": True},
         "4098": {"content": "<|end|>", "special": True, "normalized": False, "lstrip": True}}
SPM = TINY / "tokenizer.model"
TIKTOKEN = "IQ== 0\nIg== 1\nIw== 2\n"


def with_bos(backend):
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        ["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


def byte_level(bos=False, **change):
    """The content of a small byte-level tokenizer.json. change: of its sections."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["the sea was calm and the dog ran"] * 9, tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
            initial_alphabet=alphabet, show_progress=False))
    return json.loads((with_bos(backend) if bos else backend).to_str()) | change


def spaces_json():
    """The content of a tokenizer.json that encodes as the embedded checkpoint's tokenizer.model."""
    backend, _ = from_sentencepiece(SPM)
    backend.add_special_tokens(["<unk>"])
    return json.loads(with_bos(backend).to_str())


def tokenizer_at(path, model_type="llama", **files):
    """Writes a checkpoint's files, of TOKENIZER_FILES: texts, objects, or other files to copy."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for kind, content in files.items():
        file = path / TOKENIZER_FILES[kind]
        if isinstance(content, Path):
            shutil.copy(content, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


TOKENIZER_FILES = {"whole": "tokenizer.json", "spm": "tokenizer.model",
                   "config": "tokenizer_config.json", "special": "special_tokens_map.json",
                   "added": "added_tokens.json", "template": "chat_template.jinja"}


def same_as_transformers(path):
    """Asserts equal ids, with and without special tokens, and equal text of them -> both."""
    ours, there = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in AWKWARD:
        for special in (True, False):
            ids = there.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids, text
            assert ours.decode(ids) == there.decode(ids, skip_special_tokens=True)
    return ours, there


NAMED = dict(bos_token="<s>", eos_token="</s>")
NEWER = pytest.mark.skipif(tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
                           reason="older versions of transformers 5 have other rules here")
JSON_TOKENIZERS = {
    "truncation-saved": dict(whole=byte_level(truncation=dict(
        direction="Right", max_length=4, strategy="LongestFirst", stride=0))),
    "padding-saved": dict(whole=byte_level(padding=dict(
        strategy={"Fixed": 32}, direction="Left", pad_to_multiple_of=None, pad_id=3, pad_type_id=0,
        pad_token="<pad>"))),
    "no-bos": dict(whole=byte_level(), config=NAMED | dict(add_bos_token=True)),
    "bos": dict(whole=byte_level(bos=True), config=NAMED | dict(add_bos_token=False)),
    "added": dict(whole=byte_level(bos=True), config=dict(added_tokens_decoder=ADDED)),
    "added-file": dict(
        whole=byte_level(), added={"<tool>": 321, "<|end|>": 320},
        special=dict(eos_token="<|end|>", additional_special_tokens=["<|user|>"])),
    "extra": dict(whole=byte_level(), config=dict(extra_special_tokens={"end_token": "<|end|>"})),
    "spaces": dict(whole=spaces_json(), config=dict(added_tokens_decoder=ADDED)),
    "llama-class": dict(
        whole=spaces_json(), config=NAMED | dict(tokenizer_class="LlamaTokenizer")),
    "llama-class-legacy": dict(whole=spaces_json(), config=NAMED | dict(
        tokenizer_class="LlamaTokenizerFast", legacy=True)),
    "llama-class-byte-level": pytest.param(
        dict(whole=byte_level(), config=dict(tokenizer_class="LlamaTokenizer")), marks=NEWER),
    "mistral": dict(model_type="mistral", whole=spaces_json(), config=dict(
        tokenizer_class="LlamaTokenizer", legacy=False)),
    "qwen": dict(model_type="qwen2", whole=byte_level(), config=dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="</s>", pad_token="</s>", unk_token=None)),
}


@pytest.mark.parametrize("files", JSON_TOKENIZERS.values(), ids=JSON_TOKENIZERS)
def test_tokenizer_json_is_read_as_transformers_reads_it(files, tmp_path):
    """A truncation saved in the file left 4 tokens of a prompt, a padding made 33 of it, and BOS
    was put in front of all."""
    ours, _ = same_as_transformers(tokenizer_at(tmp_path, **files))
    assert ours.prefix == ours.encode("") == [1] * (files["whole"]["post_processor"] is not None)


@pytest.fixture(params=["tiny", "llama2", "mistral"])
def spm(request):
    path = SPM if request.param == "tiny" else SHARED / "tokenizers" / f"{request.param}.model"
    if not path.exists():
        pytest.skip("needs the project's shared test data")
    return path


def test_tokenizer_model_encodes_as_sentencepiece(spm, tmp_path):
    there = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    ours = Tokenizer(tokenizer_at(tmp_path, spm=spm))
    assert ours.prefix == [1]
    for text in [*AWKWARD[:5], *(read_text(ROOT / name) for name in ("README.md", "generate.py"))]:
        ids = there.encode(text)
        assert ours.encode(text) == [1] + ids and ours.decode([1] + ids) == text


MODEL_CONFIGS = {
    "own-rule": pytest.param(
        dict(bos_token="<s>", add_bos_token=True, added_tokens_decoder=ADDED), marks=NEWER),
    "not-legacy": pytest.param(
        NAMED | dict(add_bos_token=True, add_eos_token=True, legacy=False), marks=NEWER),
    "llama-class": dict(tokenizer_class="LlamaTokenizer", add_bos_token=False,
                        pad_token=PAD | {"__type": "AddedToken"}),
    "llama-class-legacy": dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", legacy=True,
                               add_bos_token=True, added_tokens_decoder=ADDED),
    "no-prefix": dict(tokenizer_class="LlamaTokenizer", add_bos_token=False,
                      add_prefix_space=False),
}


@pytest.mark.parametrize("config", MODEL_CONFIGS.values(), ids=MODEL_CONFIGS)
def test_added_tokens_beside_a_tokenizer_model(config, tmp_path):
    """They, and special tokens in a text, came out as letters."""
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    same_as_transformers(tokenizer_at(tmp_path, spm=SPM, config=config))
    if "added_tokens_decoder" not in config:
        same_as_transformers(tokenizer_at(
            tmp_path, added={"<tool>": 4097, "<|end|>": 4096},
            special=dict(eos_token={"content": "<|end|>", "lstrip": True})))


def test_bos_beside_a_tokenizer_model_can_be_switched_off(tmp_path):
    ours = Tokenizer(tokenizer_at(tmp_path, spm=SPM, config=dict(add_bos_token=False)))
    assert ours.prefix == [] and [1] + ours.encode("The sea") == Tokenizer(TINY).encode("The sea")


def test_a_tiktoken_file_is_not_opened_beside_a_tokenizer_json(tmp_path):
    """Llama 3's original tokenizer.model lies beside the other: it was opened, and refused."""
    same_as_transformers(tokenizer_at(tmp_path, whole=byte_level(), spm=TIKTOKEN))


def test_other_tokenizer_files_are_refused_in_one_line(tmp_path):
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the sea was calm", "the dog ran"] * 50), model_writer=unigram,
        vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "file").write_bytes(unigram.getvalue())
    for i, (says, files) in enumerate([
            ("only Llama's kind", dict(spm=tmp_path / "file")),
            ("if it is tiktoken's", dict(spm=TIKTOKEN)),
            ("not a file of the package", dict(whole=json.dumps(byte_level())[:999])),
            ("no tokenizer.json or tokenizer.model", {}),
            ("is malformed", dict(whole=byte_level(), config={"bos_token": {"id": 1}})),
            ("not a JSON object", dict(whole=byte_level(), config=[])),
            ("not a JSON file", dict(whole=byte_level(), added="{"))]):
        with pytest.raises(ValueError, match=says) as caught:
            Tokenizer(tokenizer_at(tmp_path / str(i), **files))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [dict(spm=SPM), dict(whole=byte_level())], ids=["spm", "json"])
def test_a_token_past_the_tokenizer_is_no_text(files, tmp_path, capsys):
    """Of a vocabulary padded beyond the tokenizer: an IndexError when such a token was sampled."""
    tokenizer = Tokenizer(tokenizer_at(tmp_path, **files))
    ids = tokenizer.encode("the sea")
    assert tokenizer.decode(ids[:-1] + [4100] + ids[-1:]) == "the sea"
    assert tokenizer.decode([4100]) == ""
    stream = generate.Streamer(tokenizer, ids)
    stream(0, 4100)
    stream.finish()
    assert capsys.readouterr().out == "\n"


def test_a_token_past_the_model_is_an_error_only_where_it_is_used(tmp_path):
    """One unused <pad> more than the model has embeddings was 'they do not belong together'."""
    content = byte_level()
    size = len(content["model"]["vocab"])
    content["added_tokens"].append(PAD | {"id": size, "content": "[PAD]"})
    tokenizer = Tokenizer(tokenizer_at(tmp_path, whole=content), size)
    assert max(tokenizer.encode("the sea")) < size
    with pytest.raises(ValueError, match=rf"'\[PAD\]', token {size}: .* vocabulary has {size}"):
        tokenizer.encode("the [PAD] sea")


@pytest.mark.parametrize("kind", ["spm", "json"])
def test_tokenizers_stream_what_they_decode(kind, spm, tmp_path, capsys):
    """Characters of several tokens come out whole, and the streamed pieces add up to the text."""
    files = dict(spm=spm) if kind == "spm" else dict(whole=byte_level(bos=True))
    tokenizer = Tokenizer(tokenizer_at(tmp_path, **files))
    text = "Two words, caf\u00e9 \u65e5\u672c \U0001f642 and " + "\U0001f642" * 40 + " 123."
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and tokenizer.decode(ids) == text
    # of whole characters up to there
    starts = [n for n in range(1, len(ids)) if not tokenizer.decode(ids[:n]).endswith("\ufffd")]
    for start in (1, starts[2], starts[len(starts) // 2]):
        stream, pieces = generate.Streamer(tokenizer, ids[:start]), []
        for token in ids[start:]:
            stream(0, token)
            stream(0, 2)  # a special token
            pieces.append(capsys.readouterr().out)
        stream.finish()
        assert "\ufffd" not in "".join(pieces) and max(map(len, pieces)) < 8
        whole = generate.new_tokens_text(tokenizer, ids[:start], ids[start:])
        assert "".join(pieces) + capsys.readouterr().out == whole + "\n"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfThe sea")
    assert read_text(tmp_path / "text") == "The sea"


TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and message.role != 'system' %}<s>
Be brief.</s>
{% endif %}{{ '<s>' + message['role'] + '\\n' + message.content + '</s>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}""",
    "inst": """{{ bos_token }}{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('the user begins, then they take turns') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- '[INST] ' + message.content.strip() + ' [/INST]' -}}
    {% else %}
        {% generation %} {{ message.content.strip() ~ eos_token }}
{{- bos_token if not loop.last }}{% endgeneration %}
    {% endif %}
{% endfor %}""",
    "headers": """{%- set ns = namespace(turns=0) %}
{% if tools is none and documents is none %}{{- bos_token }}{% endif %}
{%- for message in messages if message.content is defined %}
{%- set ns.turns = ns.turns + 1 %}
    {{- '<pad>' + message['role'] + '<pad>\\n\\n' + message['content'] | trim + '</s>' }}
    {%- if ns.turns > 4 %}{% break %}{% endif %}
{%- endfor %}
{{- strftime_now('%Y') }} {{ messages[-1] | tojson }}
{%- if add_generation_prompt %}{{- '<pad>assistant<pad>\\n\\n' }}{% endif %}""",
}
SAID = ["Hello, caf\u00e9?", "One </b> \u201ctwo\u201d", "  And then? ", "3\n", "<unk>\U0001f642"]


def conversation(turns):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, SAID[: 2 * turns - 1])]


def their_chat(tokenizer, messages):
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("place", ["file", "config", "list"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("whole", [spaces_json(), byte_level(bos=True)], ids=["spaces", "bytes"])
def test_chat_gives_the_ids_of_apply_chat_template(whole, template, place, tmp_path):
    config = NAMED | dict(eos_token=PAD | {"__type": "AddedToken", "content": "</s>"})
    files = {}
    if place == "file":
        files = dict(template=template)
        config["chat_template"] = "not this one"
    elif place == "config":
        config["chat_template"] = template
    else:
        config["chat_template"] = [{"name": "tool_use", "template": "not this one"},
                                   {"name": "default", "template": template}]
    path = tokenizer_at(tmp_path, whole=whole, config=config, **files)
    ours, there = same_as_transformers(path)
    for turns in (1, 3):
        ids = ours.chat(conversation(turns))
        assert ids == their_chat(there, conversation(turns)) and len(ids) > 10 * turns


def test_a_template_can_refuse_a_conversation(tmp_path):
    ours = Tokenizer(tokenizer_at(tmp_path, spm=SPM, template=TEMPLATES["inst"]))
    with pytest.raises(ValueError, match="the user begins, then they take turns"):
        ours.chat(conversation(2)[1:])


def checkpoint_at(path, **files):
    """The embedded checkpoint with other files for its tokenizer."""
    tokenizer_at(path, **files)
    for name in ("config.json", "model.safetensors", "channels.safetensors"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(TINY / name)
    return path


BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('no\\nroles') }}", "the chat template fails: no roles"),
    "reads-a-file": ("{% include '{}/secret' %}", "no loader"),
    "imports-a-file": ("{% from '{}/secret' import x %}{{ x }}", "no loader"),
    "syntax": ("{% for message in messages %}", "Unexpected end of template"),
    "type": ("{{ messages + 1 }}", "TypeError"),
    "undefined": ("{{ messages[9].content }}", "UndefinedError"),
    "python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "changes-messages": ("{{ messages.append(1) }}", "SecurityError"),
    "endless": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "nothing": ("", "the prompt is empty"),
}


@pytest.mark.parametrize("template, says", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_bad_template_is_one_line_and_status_2(template, says, tmp_path):
    (tmp_path / "secret").write_text("secret")
    path = checkpoint_at(tmp_path / "checkpoint", spm=SPM,
                         template=template.replace("{}", str(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    run = command("generate.py", "--device", "cpu", "--checkpoint", path, "--chat",
                  "--prompt", "hello")
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("error: ") and says in run.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_prompt_with_chat_is_one_turn(tmp_path):
    path = checkpoint_at(tmp_path / "checkpoint", spm=SPM, template=TEMPLATES["inst"])
    out = tmp_path / "out.json"
    for more, text in (([], "hello"), (["--chat"], "[INST] hello [/INST]")):
        run = command("generate.py", "--device", "cpu", "--checkpoint", path, "--prompt", "hello",
                      "--json", out, "--max_new_tokens", 2, *more)
        assert run.returncode == 0, run.stderr
        assert json.loads(out.read_text())["prompt_token_ids"] == [Tokenizer(TINY).encode(text)]


@pytest.mark.parametrize("arguments, says", [
    (["--chat", "--prompt", "x"], "has no chat template; leave out --chat"),
    (["--chat"], "--chat: needs a --prompt"), (["--interactive", "--chat"], "leave out"),
    (["--no_chat_template", "--prompt", "x"], "--no_chat_template: only --interactive"),
], ids=["no-template", "no-prompt", "interactive", "not-interactive"])
def test_chat_options_that_cannot_be_meant(arguments, says):
    run = command("generate.py", "--device", "cpu", *arguments)
    assert run.returncode == 2 and says in run.stderr and run.stderr.count("\n") == 1, run.stderr


def turns(path, monkeypatch, lines, *more):
    """Runs --interactive -> of each line the token ids up to the answer, and the answer's."""
    found, cached, lines = [], [], iter(lines)

    def record(step, prompts, max_new_tokens, start, *rest, real=generate.generate):
        result = real(step, prompts, max_new_tokens, start, *rest)
        result.token_ids[0] += [2]  # as if the model had said </s> where it is no end
        cached[start:] = prompts[0]
        found.append((list(cached), result.token_ids[0]))
        cached.extend(result.token_ids[0])
        return result

    monkeypatch.setattr(generate, "generate", record)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--checkpoint", str(path),
                                      "--interactive", "--max_new_tokens", "5", *more])
    generate.main()
    return found


def test_interactive_takes_the_turns_of_the_template(tmp_path, monkeypatch):
    path = checkpoint_at(tmp_path / "checkpoint", whole=spaces_json(), config=NAMED,
                         template=TEMPLATES["inst"])
    there, messages = AutoTokenizer.from_pretrained(path), []
    lines = ["Once upon a time", "And then?", "And the sea?"]
    found = turns(path, monkeypatch, lines)
    assert len(found) == 3
    for line, (prompt, answer) in zip(lines, found):
        messages.append({"role": "user", "content": line})
        assert prompt == their_chat(there, messages)
        said = there.decode(answer, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": said})


def test_interactive_without_a_template_keeps_the_tokens(tmp_path, monkeypatch):
    """The text so far was tokenised again in each turn, without the special tokens in it."""
    path = checkpoint_at(tmp_path / "checkpoint", spm=SPM, template=TEMPLATES["inst"])
    lines = ["Once upon a time", "And then"]
    (first, answer), (second, _) = turns(path, monkeypatch, lines, "--no_chat_template")
    encode = Tokenizer(TINY).encode
    assert first == encode(lines[0])
    assert second == first + answer + encode("\n".join(lines))[len(first) :]


# ---------------------------------------------------------------- command lines


def test_generate_converts_and_calibrates_a_hugging_face_directory(tmp_path, monkeypatch, capsys):
    make_hf(tmp_path / "hf", config=dict(vocab_size=4096, max_position_embeddings=256, num_hidden_layers=3))
    shutil.copy(TINY / "tokenizer.model", tmp_path / "hf")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(tmp_path / "hf"), "--prompt", "The sea", "--device", "cpu",
                                      "--max_new_tokens", "4"])
    generate.main()
    first = capsys.readouterr().err
    assert "converted to" in first and "calibrating (once)" in first
    generate.main()
    second = capsys.readouterr().err
    assert "converted to" not in second and "calibrating (once)" not in second
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()][0].startswith("hf-")


def command(script, *arguments, input=""):
    """Runs a script as the shell does, but in this process: its imports take longer than most of what is asked of it."""
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


def test_generate_writes_its_json_and_streams_text(tmp_path):
    run = command("generate.py", "--device", "cpu", "--prompt", "The sea was calm", "--prompt", "He said that", "--max_new_tokens", 8,
                  "--json", tmp_path / "out.json")
    assert run.returncode == 0, run.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert {"prompt_token_ids", "token_ids", "text", "prompts", "ttft_ms", "cold_start_s", "median_ms_per_token", "p99_ms_per_token",
            "decode_tokens_per_s", "decode_tokens_per_s_per_sequence", "bytes_per_step", "kv_bytes_per_step",
            "dense_kv_bytes_per_step", "kv_cache_bytes", "label_cache_bytes", "peak_memory_bytes", "config"} == set(out)
    weights = sum(p.nbytes for p in load_model(TINY, "cpu", torch.float32).parameters())
    assert 0.5 * weights < out["bytes_per_step"] - out["kv_bytes_per_step"] <= weights
    assert 0 < out["ttft_ms"] < 1e3 * out["cold_start_s"] and out["median_ms_per_token"] <= out["p99_ms_per_token"]
    assert [len(ids) for ids in out["token_ids"]] == [8, 8] and all(text in run.stdout for text in out["text"])
    alone = command("generate.py", "--device", "cpu", "--prompt", "He said that", "--max_new_tokens", 8)
    assert alone.stdout.strip() == out["text"][1].strip() and "tokens/s" in alone.stderr


def test_compare_shows_texts_and_figures_of_both(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:1500]
    arguments = ["generate.py", "--device", "cpu", "--compare", "--dense_below", 0, "--max_new_tokens", 8, "--json", tmp_path / "out.json"]
    run = command(*arguments, "--n_tokens", 20, "--prompt", text, "--prompt", text[:800])
    assert run.returncode == 0 and run.stderr.count("tokens/s") == 2, run.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    for b in range(2):
        dense, ours = (out["token_ids"][mode][b] for mode in ("dense", "ds"))
        first = out["first_difference"][b]
        assert dense == ours if first is None else dense[:first] == ours[:first] and dense[first : first + 1] != ours[first : first + 1]
        assert all(out["text"][mode][b] in run.stdout for mode in ("dense", "ds"))
    assert out["kl"] > 1e-4 and f"{out['kl']:.6f} nats" in run.stdout
    assert out["ds"]["kv_bytes_per_step"] < out["dense"]["kv_bytes_per_step"] == out["dense"]["dense_kv_bytes_per_step"]
    same = command(*arguments, "--n_tokens", 2000, "--prompt", text[:800])
    assert same.returncode == 0 and abs(json.loads((tmp_path / "out.json").read_text())["kl"]) < 1e-6, same.stderr
    assert "the same 8 tokens" in same.stdout
    refused = command("generate.py", "--device", "cpu", "--compare", "--sparsity", 1, "--prompt", "x")
    assert refused.returncode == 2 and "sets sparse against dense" in refused.stderr


def test_generation_ends_where_the_cache_is_full(tmp_path):
    prompt, out = "The sea was calm", tmp_path / "out.json"
    n = len(Tokenizer(TINY).encode(prompt))
    run = command("generate.py", "--device", "cpu", "--prompt", prompt, "--max_seq_length", n + 3, "--json", out)
    assert run.returncode == 0 and len(json.loads(out.read_text())["token_ids"][0]) == 3, run.stderr
    run = command("generate.py", "--device", "cpu", "--prompt", prompt, "--max_seq_length", n)
    assert run.returncode == 2 and f"max_seq_length={n}: must be more than the {n} tokens" in run.stderr
    run = command("generate.py", "--device", "cpu", "--interactive", "--max_seq_length", n + 3, input=f"{prompt}\nAnd then\n")
    assert run.returncode == 0 and f"used up its {n + 3} tokens" in run.stderr, run.stderr


def test_offload_on_the_command_line_says_the_same(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:900]
    arguments = ["generate.py", "--device", "cpu", "--prompt", text, "--prompt", text[:500], "--n_tokens", 32, "--dense_below", 0,
                 "--max_new_tokens", 5, "--json", tmp_path / "out.json"]
    found = []
    for more in ([], ["--offload", "--prefetch_heads", 1], ["--offload", "--prefetch_heads", 1, "--resident_tokens", 100],
                 ["--offload"], ["--offload", "--offload_mode", "predicted"]):
        run = command(*arguments, *more)
        assert run.returncode == 0, run.stderr
        found.append(json.loads((tmp_path / "out.json").read_text()))
        if more:
            assert f"over PCIe per step   {found[-1]['pcie_bytes_per_step'] / 1e6:.2f} MB" in run.stderr
    plain, tight, roomy, late, predicted = found
    assert plain["text"] == tight["text"] == roomy["text"] == late["text"] and "host_bytes" not in plain
    assert 0 < tight["hit_rate"] < roomy["hit_rate"] and tight["pcie_bytes_per_step"] > roomy["pcie_bytes_per_step"] > 0
    assert late["hit_rate"] < tight["hit_rate"] and late["agreement"] is None
    assert tight["prefetched_bytes_per_step"] > 0 == late["prefetched_bytes_per_step"]
    assert tight["agreement"] > 0.7 and predicted["predicted_layers"] == 5 and "5 attended to what was predicted" in run.stderr
    assert predicted["pcie_bytes_per_step"] == predicted["prefetched_bytes_per_step"] > tight["prefetched_bytes_per_step"]
    layers = load_model(TINY, "cpu", torch.float32).config.n_layers
    assert tight["host_bytes"] == plain["kv_cache_bytes"] * (layers - 2) / layers > 2 * tight["kv_cache_bytes"] / layers
    packed, whole = [], []
    for found, more in ((packed, []), (whole, ["--no_pack"])):
        run = command(*arguments, "--dtype", "bfloat16", "--offload", *more)
        assert run.returncode == 0, run.stderr
        found.append(json.loads((tmp_path / "out.json").read_text()))
    assert packed[0]["text"] == whole[0]["text"] and packed[0]["hit_rate"] == whole[0]["hit_rate"]
    assert 0.751 < packed[0]["pcie_bytes_per_step"] / whole[0]["pcie_bytes_per_step"] < 0.8
    dense = []
    for more in ([], ["--offload"]):  # by default so short prompts attend to everything
        run = command("generate.py", "--device", "cpu", "--prompt", text, "--max_new_tokens", 5, *more)
        assert run.returncode == 0, run.stderr
        dense.append(run.stdout)
    assert dense[0] == dense[1]
    streamed = command(*arguments, "--offload", "--compare")
    assert streamed.returncode == 0 and streamed.stderr.count("over PCIe per step") == 2, streamed.stderr
    for more, message in ((["--prefetch_heads", 9], "prefetch_heads=9: without --offload"),
                          (["--no_pack"], "no_pack=True: without --offload"),
                          (["--offload", "--min_agreement", -1], "min_agreement=-1.0: must be at least 0"),
                          (["--offload", "--sparsity", 1, "--offload_mode", "predicted"], "nothing is selected with --sparsity 1")):
        refused = command("generate.py", "--device", "cpu", "--prompt", "x", *more)
        assert refused.returncode == 2 and message in refused.stderr


def test_demonstration_finds_its_fact(tmp_path):
    arguments = ["generate.py", "--device", "cpu", "--sparsity", "16", "--json", tmp_path / "out.json"]
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "the answer is right" in run.stderr, run.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert 3800 < len(out["prompt_token_ids"][0]) <= 4000 and out["text"][0].strip() == run.stdout.strip()
    layers = load_model(TINY, "cpu", torch.float32).config.n_layers
    live = len(out["prompt_token_ids"][0]) + 20  # in the middle of the answer
    assert out["dense_kv_bytes_per_step"] == pytest.approx(layers * live * 2 * 128 * 4 * 4, rel=0.005)
    sparse_share = (live / 16 * 2 * 128 * 4 + live * 16) / (live * 2 * 128 * 4)  # fp32 K and V of N tokens, and labels
    expected = (2 + (layers - 2) * sparse_share) / layers
    assert out["kv_bytes_per_step"] / out["dense_kv_bytes_per_step"] == pytest.approx(expected, rel=0.01)


def test_interactive_continues_one_conversation():
    run = command("generate.py", "--device", "cpu", "--interactive", "--max_new_tokens", 5, input="Once upon a time\nAnd then\n\n")
    assert run.returncode == 0 and run.stdout.count("> ") == 3 and run.stderr.count("tokens/s") == 2, run.stderr
    _, first, second, _ = re.split("> |\n> ", run.stdout)
    alone = command("generate.py", "--device", "cpu", "--max_new_tokens", 5, "--prompt", f"Once upon a time{first}\nAnd then")
    assert alone.stdout.rstrip("\n") == second.rstrip("\n")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Directories with one thing wrong each."""
    tmp_path = tmp_path_factory.mktemp("damaged")

    def copy(name):
        shutil.copytree(TINY, tmp_path / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        return tmp_path / name

    path = copy("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    config = json.loads((TINY / "config.json").read_text())
    (copy("foreign") / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    (copy("shape") / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8}))
    edit_weights(copy("channels"), lambda tensors: tensors["norm.weight"].add_(1))
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    return tmp_path


BAD_INPUT = {
    "missing": (["--checkpoint", "{}/nothing"], "no such directory"),
    "truncated": (["--checkpoint", "{}/truncated"], "truncated"),
    "foreign": (["--checkpoint", "{}/foreign"], "architecture GPT2LMHeadModel"),
    "shape": (["--checkpoint", "{}/shape"], "missing, unexpected or of another shape"),
    "channels": (["--checkpoint", "{}/channels"], "run calibrate.py"),
    "too-long": (["--prompt", "hello", "--max_new_tokens", "9000"], "8192 positions"),
    "empty": (["--prompt", ""], "prompt is empty"),
    "sparsity-0": (["--sparsity", "0"], "sparsity=0: must be above 1"),
    "sparsity-negative": (["--sparsity", "-2"], "sparsity=-2: must be above 1"),
    "sparsity-word": (["--sparsity", "much"], "invalid float value: 'much'"),
    "n-0": (["--n_tokens", "0"], "n_tokens=0: must be at least 1"),
    "resident-few": (["--offload", "--resident_tokens", "9", "--prompt", "hello", "--dense_below", "0"],
                     "resident_tokens=9: must be at least 128"),
    "resident-alone": (["--resident_tokens", "9"], "without --offload"),
    "offload-none": (["--offload", "--dense_layers", "7", "--prompt", "hello", "--dense_below", "0"],
                     "dense_layers=7: of 7 layers none is left"),
    "not-utf8": (["--prompt_file", "{}/latin1.txt"], "not UTF-8"),
    "dense-below": (["--dense_below", "-1"], "dense_below=-1: must be at least 0"),
    "no-file": (["--prompt_file", "{}/absent.txt"], "No such file"),
    "no-gpu": pytest.param(["--device", "cuda"], "no GPU", marks=pytest.mark.skipif(GPU, reason="there is a GPU")),
}


@pytest.mark.parametrize("arguments, message", [v if isinstance(v, tuple) else v for v in BAD_INPUT.values()], ids=BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(arguments, message, damaged):
    before = sorted(path for path in damaged.rglob("*"))
    run = command("generate.py", *(a.format(damaged) for a in arguments))
    assert run.returncode == 2 and run.stdout == "", run.stdout + run.stderr
    assert run.stderr.startswith("error: ") and message in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert sorted(path for path in damaged.rglob("*")) == before


def test_more_tokens_than_there_are_means_dense_and_says_so():
    run = command("generate.py", "--device", "cpu", "--prompt", "The sea", "--max_new_tokens", 3, "--n_tokens", 500)
    assert run.returncode == 0 and "every token is attended (dense)" in run.stderr


# ---------------------------------------------------------------- cli.py


SCRIPTS = {"generate": generate, "calibrate": calibrate, "convert_hf": convert_hf, "eval": evaluation,
           "bench": bench, "train": train}


def parser_of(script, monkeypatch):
    """A script's ArgumentParser, filled."""
    def caught(self, *_):
        raise StopIteration(self)

    with monkeypatch.context() as patch, pytest.raises(StopIteration) as parser:
        patch.setattr(cli.ArgumentParser, "parse_args", caught)
        script.main()
    return parser.value.args[0]


def bad_values(action, tmp_path):
    """Values that an option of this type cannot have."""
    kind = action.type
    yield "" if kind is not Path else "a\0b"
    if isinstance(kind, cli.Number):
        yield from ("x", "1e999", "-1e999", "nan", str(2**64), str(-(2**64)), str(int(kind.high) + 1))
        if kind.low is not None:
            yield str(kind.low - 1)
    if isinstance(kind, (cli.InputFile, cli.OutputFile)):
        yield from (str(tmp_path), str(tmp_path / "none" / "file"), f"{tmp_path}/{'x' * 5000}", "a\0b")
    if action.choices:
        yield "none of them"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_refuses_what_it_cannot_be_in_one_line(name, tmp_path, monkeypatch, capsys):
    """Before any work: nothing is loaded, calibrated, measured or written."""
    parser = parser_of(SCRIPTS[name], monkeypatch)
    for module in (generate, evaluation, calibrate, convert_hf):
        for function in ("load_model", "open_checkpoint", "convert", "load"):
            monkeypatch.setattr(module, function, None, raising=False)
    required = [text for action in parser._actions if action.required
                for text in (*action.option_strings[:1], str(next(iter(action.choices or ["x"]))))]
    tried = 0
    for action in parser._actions:
        for value in bad_values(action, tmp_path) if action.nargs != 0 else ():
            option = [f"{action.option_strings[0]}={value}"] if action.option_strings else [value]
            rest = [] if action.required or not action.option_strings else required
            monkeypatch.setattr(sys, "argv", [name, *rest, *option])
            with pytest.raises(SystemExit) as end:
                cli.run_command(SCRIPTS[name].main)
            out, said = capsys.readouterr()
            assert end.value.code == 2 and not out, (option, said)
            assert said.startswith("error: ") and said.count("\n") == 1, (option, said)
            tried += 1
    assert tried > 3 and not list(tmp_path.iterdir())


def test_an_option_given_twice_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--seed", "0", "--seed", "1"])
    with pytest.raises(ValueError, match="--seed is given twice"):
        generate.parse_arguments()


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_writing_leaves_all_or_nothing(directory, tmp_path):
    path = tmp_path / "out[1]"
    if not directory:
        path.write_text("old")
    stale = tmp_path / f".out[1].{2**22 + 1}.tmp"  # of a process that was killed: there is no such number
    stale.mkdir() if directory else stale.touch()
    with pytest.raises(KeyboardInterrupt), cli.writing(path, directory) as new:
        (new / "part" if directory else new).write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ([] if directory else ["out[1]"])
    assert directory or path.read_text() == "old"
    with cli.writing(path, directory) as new:
        (new / "part" if directory else new).write_text("new")
    assert (path / "part" if directory else path).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out[1]"]


def test_a_terminated_process_leaves_nothing(tmp_path):
    (tmp_path / "out").write_text("old")
    code = (f"import cli, os, signal\ndef main():\n with cli.writing({str(tmp_path / 'out')!r}) as new:\n"
            "  new.write_text('new'); os.kill(os.getpid(), signal.SIGTERM)\ncli.run_command(main)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 128 + 15 and not run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "old"


def test_a_full_disk_leaves_a_file_of_rows_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    code = ("import cli, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
            f"cli.run_command(lambda: cli.append_json_lines({str(path)!r}, [{{'b': 'x' * 99}}]))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert cli.read_json_lines(path) == [{"a": 1}]
    with pytest.raises(OSError):
        cli.append_json_lines("/dev/full", [{"a": 1}])


@pytest.mark.parametrize("line", ['{"a": 1', "[1]", "7"], ids=["cut", "list", "number"])
def test_lines_that_are_no_rows_are_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        cli.read_json_lines(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("damage", ["absent", "nan", "shape", "channel"])
def test_damaged_label_maps_are_refused(damage, tmp_path):
    config = ModelConfig.from_file(TINY / "config.json")
    shape = config.n_layers, config.n_kv_heads, config.head_dim
    maps = {"channels": torch.zeros(shape, dtype=torch.int32), "mean": torch.zeros(shape), "std": torch.ones(shape)}
    if damage == "absent":
        del maps["std"]
    elif damage == "nan":
        maps["mean"][0, 0, 0] = math.nan
    elif damage == "shape":
        maps["std"] = maps["std"][:, :1].contiguous()
    else:
        maps["channels"][0, 0, 0] = config.head_dim
    save_file(maps, tmp_path / "maps", {"checkpoint": fingerprint(TINY / "model.safetensors")})
    with pytest.raises(ValueError, match="maps: its label maps are damaged; run calibrate.py"):
        load_label_maps(TINY, config, DSConfig(), tmp_path / "maps")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["norm.weight"][3] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: norm.weight has weights that are infinite or not a number"):
        load_model(tmp_path / "model", "cpu", torch.float32)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(monkeypatch, capsys):
    """What came of the answer stays in the conversation; a prompt that was not cached whole does not."""
    lines, seen = iter(["one", "two", "three", ""]), []

    def stopped(step, prompts, most, start, stream):
        seen.append((start, prompts[0]))
        if len(seen) < 3:
            for token in [50, 51][: len(seen) % 2 * 2]:
                stream(0, token)
            raise KeyboardInterrupt
        stream(0, 60)

    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(generate, "generate", stopped)
    tokenizer = Tokenizer(TINY, 8192)
    step = SimpleNamespace(cache=SimpleNamespace(max_seq_length=100))
    args = SimpleNamespace(no_chat_template=True, max_new_tokens=5, device="cpu")
    generate.converse(step, tokenizer, args)
    first = tokenizer.encode("one")
    assert seen[0] == (0, first)
    answered = [*first, 50, 51]  # K and V of the last token were not needed yet
    assert seen[1] == (len(answered) - 1, [51, *tokenizer.encode_line("two")])
    assert seen[2] == (len(answered) - 2, [*answered[-2:-1], *tokenizer.encode_line("three")])
    assert "Ctrl-C" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [
    ("rope_theta", "x"), ("rope_theta", math.inf), ("rms_norm_eps", "1e-5"), ("num_hidden_layers", 10**9), ("hidden_size", True),
    ("num_attention_heads", 2.5), ("vocab_size", 2**40), ("intermediate_size", None), ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"})], ids=str)
def test_a_config_value_of_the_wrong_type_is_named(key, value):
    content = json.loads((TINY / "config.json").read_text()) | {key: value}
    ours = {"rms_norm_eps": "norm_eps", "num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads",
            "intermediate_size": "ffn_dim"}
    with pytest.raises(ValueError, match=ours.get(key, key)):
        ModelConfig.from_dict(content)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_weights_that_are_not_there_are_refused(kind, tmp_path):
    tensor = torch.eye(4).to_sparse() if kind == "sparse" else torch.empty(4, 4, device="meta")
    torch.save({"model.norm.weight": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"norm.weight is a {kind} tensor"):
        convert_hf.open_shard(tmp_path / "pytorch_model.bin")


def test_two_processes_may_convert_the_same_checkpoint(tmp_path, monkeypatch):
    """The one that is late finds what the other made, and says that it is there, too."""
    whole = convert_hf.write_weights

    def late(path, *arguments):
        monkeypatch.setattr(convert_hf, "write_weights", whole)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)  # a process that is running
            convert_hf.convert(hf, tmp_path / "out")
        whole(path, *arguments)

    hf = tmp_path / "hf"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=2)).save_pretrained(hf)
    shutil.copy(TINY / "tokenizer.model", hf)
    monkeypatch.setattr(convert_hf, "write_weights", late)
    assert convert_hf.convert(hf, tmp_path / "out") == tmp_path / "out"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    load_file(tmp_path / "out" / "model.safetensors")
