"""Mixtral's feed-forward: a router chooses a few of many experts for each token.

Shapes follow the key at the top of ds_attention.py; `dim` is the model's width, E the number of
experts, F an expert's own width. A decode step takes three launches, as part of the chain of
linear.py: the router, all products up to silu(gate) * up, all products down. Only experts that some
sequence chose are read, once each for the whole batch, and the host is asked nothing.
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from ds_attention import launch
from linear import CODE_UNIT, Linear, load_inputs, widened


class Experts(Linear):
    """E linear layers of one shape: weight [E, out, in]; if it is int8, with scale [E, out]."""

    def __init__(self, n, n_in, n_out):
        super().__init__(n_in, n_out)
        self.weight = nn.Parameter(torch.empty(n, n_out, n_in))

    def forward(self, x, e):
        """x [rows, in] through expert e."""
        weight = self.weight[e]
        if self.scale is not None:
            weight = (weight * self.scale[e, :, None]).to(x.dtype)
        return F.linear(x, weight)


class MoEFeedForward(nn.Module):
    """Each token through its top experts, weighted by the softmax of their logits."""

    def __init__(self, config):
        super().__init__()
        self.top = config.experts_per_token
        self.router = nn.Linear(config.dim, config.n_experts, bias=False)
        self.w13 = Experts(config.n_experts, config.dim, 2 * config.ffn_dim)
        self.w2 = Experts(config.n_experts, config.ffn_dim, config.dim)

    def forward(self, x):
        """x [..., tokens, dim], normed."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # [tokens, dim]
        logits = self.router(x)
        best, experts = logits.topk(self.top, -1)
        shares = torch.zeros_like(logits).scatter_(
            1, experts, best.float().softmax(-1).to(x.dtype))  # [tokens, E]
        out = torch.zeros_like(x)
        for e, share in enumerate(shares.T):
            # in a CUDA graph of decode steps the host may not ask which tokens are the expert's
            tokens = slice(None) if x.is_cuda and shape[-2] == 1 else share.nonzero()[:, 0]
            gate, up = self.w13(x[tokens], e).chunk(2, -1)
            out[tokens] += self.w2(F.silu(gate) * up, e) * share[tokens, None]
        return out.view(shape)

    def decode(self, residual, next_gain):
        """`forward` of one token per sequence: see Residual. next_gain: of the norm after it."""
        routes = Routes.of(residual, self.router.weight, self.top)
        y = expert_products(residual, residual.scaled, self.w13, routes)
        expert_products(residual, y, self.w2, routes, next_gain)


@triton.jit
def _route_kernel(x, router, squares, shares, order, rstds, B, K, E, parts, eps,
                  TOP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
                  BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
                  WARPS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr):
    """See Routes. One program, so that it knows all that were chosen."""
    b, e, p = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_P)
    PART: tl.constexpr = BLOCK_K // WARPS
    offs_k = tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)  # [WARPS, 1, PART]
    mask_b, mask_e = b < B, e < E
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.load(squares + p[:, None] * B + b[None, :],
                   mask=(p < parts)[:, None] & mask_b[None, :], other=0.0)
    acc = tl.zeros([WARPS, BLOCK_E, BLOCK_B], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = k + offs_k < K
        rows = tl.load(router + e[:, None] * K + (k + offs_k), mask=mask_e[:, None] & mask_k,
                       other=0.0)
        inputs = tl.load(x + b[:, None] * K + (k + offs_k), mask=mask_b[:, None] & mask_k,
                         other=0.0)
        if UPCAST:
            rows, inputs = rows.to(tl.float32), inputs.to(tl.float32)
        acc = tl.dot(rows, tl.permute(inputs, (0, 2, 1)), acc)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rstd = tl.rsqrt(tl.sum(part, 0) / K + eps)
    tl.store(rstds + b, rstd, mask=mask_b)
    logits = tl.sum(acc, 0) * rstd[None, :]
    logits = tl.where(mask_e[:, None], logits, float("-inf"))
    left = logits
    for _ in tl.static_range(TOP):
        left = tl.where(e[:, None] == tl.argmax(left, 0)[None, :], float("-inf"), left)
    share = tl.where(left < logits, tl.exp(logits - tl.max(logits, 0)[None, :]), 0.0)
    share /= tl.sum(share, 0)[None, :]
    tl.store(shares + b[None, :] * E + e[:, None], share, mask=mask_e[:, None] & mask_b[None, :])
    chosen = tl.max(tl.where(mask_b[None, :], share, 0.0), 1) > 0
    tl.store(order + tl.cumsum(chosen.to(tl.int32), 0), e, mask=chosen)
    tl.store(order, tl.sum(chosen.to(tl.int32), 0))


class Routes(NamedTuple):
    """Which experts the sequences of a Residual choose."""

    shares: torch.Tensor  # [B, E] fp32: the softmax over a sequence's largest logits, elsewhere 0
    order: torch.Tensor  # [E + 1] int32: how many experts are chosen by any, and which, rising
    rstd: torch.Tensor  # [B] fp32: what its norm multiplies by
    most: int  # how many experts can be chosen

    @staticmethod
    def of(residual, router, top):
        """router [E, dim]; top: experts that each sequence chooses."""
        (E, dim), x = router.shape, residual.scaled
        B, parts, empty = len(x), len(residual.squares), partial(torch.empty, device=x.device)
        routes = Routes(empty(B, E), empty(E + 1, dtype=torch.int32), empty(B), min(E, B * top))
        launch(_route_kernel, (1,), x, x=x, router=router, squares=residual.squares,
               shares=routes.shares, order=routes.order, rstds=routes.rstd, B=B, K=dim, E=E,
               parts=parts, eps=residual.eps, TOP=top, BLOCK_B=max(8, triton.next_power_of_2(B)),
               BLOCK_E=max(16, triton.next_power_of_2(E)), BLOCK_K=1024 if B <= 16 else 256,
               BLOCK_P=triton.next_power_of_2(parts), STAGES=4, WARPS=8, num_warps=8,
               UPCAST=not x.is_cuda)
        return routes


@triton.jit
def _experts_kernel(x, w, scale, shares, order, rstds, out, squares, gain, scaled, B, N, K, E,
                    UP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
                    ALONE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr):
    """See `expert_products`. A program owns BLOCK_N of N outputs, all of K, each of its WARPS a
    part of BLOCK_K. With UP they are of the program_id(1)-th chosen expert, whose up is N rows
    behind its gate; else of all chosen ones, one after the other in one pipeline: `flatten`."""
    pid, b = tl.program_id(0), tl.arange(0, BLOCK_B)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    PART: tl.constexpr = BLOCK_K // WARPS
    offs_k = tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)  # [WARPS, 1, PART]
    mask_n, mask_b = n < N, b < B
    mask, at = mask_n[:, None] & mask_b[None, :], b[None, :] * N + n[:, None]
    dtype = out.dtype.element_ty
    SHAPE: tl.constexpr = [WARPS, BLOCK_N, BLOCK_B]
    IN: tl.constexpr = [WARPS, BLOCK_B, PART]
    if UP:
        if PDL:
            tl.extra.cuda.gdc_wait()
        first = tl.program_id(1)
        last = tl.minimum(first + 1, tl.load(order))
        out += first * B * N
        rstd = tl.load(rstds + b, mask=mask_b, other=0.0)[None, :]
    else:  # all but x is older than what the kernel before this one writes
        first, last = 0, tl.load(order)
        if gain is not None:
            before = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
            gains = tl.load(gain + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if PDL:
            tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_B] if UP else SHAPE, tl.float32)
    for i in tl.range(first, last, flatten=not UP):
        expert = tl.load(order + 1 + i).to(tl.int64)
        row = expert * N * (2 if UP else 1) + tl.minimum(n, N - 1)
        rows, of_inputs = w + row[:, None] * K, x
        if not UP:
            of_inputs += i * B * K
        acc, acc_2 = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            mask_k = k + offs_k < K
            inputs = load_inputs(of_inputs, k + offs_k, B, K, IN, ALONE, UPCAST)
            tile = tl.load(rows + (k + offs_k), mask=mask_k, other=0, eviction_policy="evict_first")
            acc = tl.dot(widened(tile, inputs.dtype), inputs, acc)
            if UP:
                tile = tl.load(rows + N * K + (k + offs_k), mask=mask_k, other=0,
                               eviction_policy="evict_first")
                acc_2 = tl.dot(widened(tile, inputs.dtype), inputs, acc_2)
            if PDL:
                if k >= K - BLOCK_K and i == last - 1:
                    tl.extra.cuda.gdc_launch_dependents()
        if scale is not None:
            acc = acc * CODE_UNIT * tl.load(scale + row)[:, None]
        if UP:
            acc, acc_2 = tl.sum(acc, 0) * rstd, tl.sum(acc_2, 0) * rstd
            if scale is not None:
                acc_2 = acc_2 * CODE_UNIT * tl.load(scale + row + N)[:, None]
            share = tl.load(shares + b * E + expert, mask=mask_b, other=0.0)[None, :]
            total = tl.where(share > 0, share * acc / (1 + tl.exp(-acc)) * acc_2, 0.0)
        else:
            total += acc
    if not UP:
        total = tl.sum(total, 0)
    if gain is None:  # up, or one rank's part of down
        tl.store(out + at, total.to(dtype), mask=mask)
    else:
        total = (before + total).to(dtype)
        tl.store(out + at, total, mask=mask)
        total = total.to(tl.float32)
        tl.store(scaled + at, (total * gains).to(dtype), mask=mask)
        tl.store(squares + pid * B + b, tl.sum(tl.where(mask, total * total, 0.0), 0), mask=mask_b)


def expert_products(residual, x, experts, routes, next_gain=None, **tiles):
    """A product with the experts that the sequences of a Residual chose.

    Without next_gain up: x is residual.scaled, experts.weight [E, 2 * F, dim] -> [most, B, F]: by
    chosen expert, in order, silu(gate) * up times its share, zeros for sequences that did not
    choose it. With next_gain, the next norm's weight, down: x is such a result, and residual.x +=
    its products with weight [E, dim, F]. tiles: see _tiles.
    """
    weight, scale, up = experts.weight, experts.scale, next_gain is None
    B, K, (E, N, _) = len(residual.x), x.shape[-1], weight.shape
    N = N // 2 if up else N
    assert x.is_contiguous() and weight.is_contiguous() and B <= residual.MAX_ROWS
    tiles = _tiles(up, B, weight.element_size()) | tiles
    programs = triton.cdiv(N, tiles["BLOCK_N"])
    if up:
        grid, gain = (programs, routes.most), None
        out = torch.empty(routes.most, B, N, dtype=x.dtype, device=x.device)
    else:
        grid, (out, gain) = (programs,), residual.sum_place(next_gain)
        residual.squares = residual.partial[:programs]
    launch(_experts_kernel, grid, x, x=x, w=weight, scale=scale, shares=routes.shares,
           order=routes.order, rstds=routes.rstd, out=out, squares=residual.squares, gain=gain,
           scaled=residual.scaled, B=B, N=N, K=K, E=E, UP=up,
           BLOCK_B=max(8, triton.next_power_of_2(B)), WARPS=tiles["num_warps"], ALONE=B == 1,
           UPCAST=not x.is_cuda,  # the interpreter's dot takes bfloat16 for integers
           **tiles)
    if not up:
        residual.sum_ranks(out, next_gain)
    return out


def _tiles(up, B, itemsize):
    """Block sizes of `expert_products`, see those of linear.py; at most 16 KB of inputs."""
    int8 = itemsize == 1
    return dict(BLOCK_N=16 if B <= 16 else 32, STAGES=4, num_warps=2 if int8 and up else 4,
                BLOCK_K=min(1024 if int8 and not up else 256,
                            8192 // max(8, triton.next_power_of_2(B))))
