"""Double Sparsity decode attention (arXiv 2408.07092): label -> score -> select -> attend.

Each cached key is kept a second time as a small *label*: a calibrated linear map of the key, quantised to a few
bits (the paper's choice of channels is a map with one-hot columns, section 3.1). A decode step scores every cached
token with the labels, selects the best N per KV head, and attends to exactly those (section 3.2).

Exact: attention over the selected tokens, the selection given the scores, the first `sink` and the newest `recent`
tokens. Approximate: the scores, by the map's rank and by the label bits.

Shapes, used everywhere: B batch rows, T new tokens, S cached tokens (allocated; the live length is in seq_lens),
HQ / HKV query / KV heads, G = HQ // HKV, D head dim, C label dims, W 32-bit words of one token's label,
N attended tokens. In a decode call q has no T: its rows are one token each.

Every stage stands three times: `stage_ref` in plain torch is the specification, `_stage_kernel` is the Triton
kernel, `stage` is its wrapper with the same signature. The kernels run on a GPU and, with TRITON_INTERPRET=1 set
before triton is imported, on a CPU. Last run on: H200 with torch 2.11 / triton 3.6; CPU with torch 2.13 / triton 3.9.
"""
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class DSConfig:
    """What a sparse decode step reads. `sparsity` sets both the tokens and the label bytes, as in the paper."""

    sparsity: float = 16.0  # attend to 1/sparsity of the live tokens; labels take 1/sparsity of K's bytes
    n_tokens: int | None = None  # a fixed number of attended tokens instead of a share
    min_tokens: int = 128  # floor of the share: below it a share of a short context is too few
    label_channels: int | None = None  # label dims per KV head; None: 1/sparsity of K's bytes in 16-bit channels
    label_bits: int = 4  # bits per label dim: 2, 4, 8 or 16
    dense_layers: int = 2  # the first layers attend to everything: their attention is diffuse
    sink: int = 4  # first tokens always attended, counted inside N
    recent: int = 16  # newest tokens always attended, counted inside N
    pool: str = "mean"  # how one selection serves a group's query heads: "mean" or "max" of their scores
    impl: str = "auto"  # "triton", "torch" (the reference), or "auto": triton on a GPU, torch on a CPU

    def __post_init__(self):
        if not (math.isfinite(self.sparsity) and self.sparsity > 1):
            raise ValueError(f"sparsity={self.sparsity:g}: must be above 1; use --sparsity 1 for dense")
        for name, low in [("n_tokens", 1), ("min_tokens", 1), ("label_channels", 1), ("dense_layers", 0), ("sink", 0),
                          ("recent", 1)]:
            value = getattr(self, name)
            if value is not None and value < low:
                hint = "; use --sparsity 1 for dense" if name == "n_tokens" else ""
                raise ValueError(f"{name}={value}: must be at least {low}{hint}")
        for name, choices in [("label_bits", (2, 4, 8, 16)), ("pool", ("mean", "max")),
                              ("impl", ("auto", "torch", "triton"))]:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)}: must be one of {', '.join(map(str, choices))}")

    def budget(self, live):
        """Tokens attended when `live` tokens are eligible. live: int, or int32 tensor of any shape; same type back."""
        if isinstance(live, int):
            wanted = self.n_tokens or max(self.min_tokens, math.ceil(live / self.sparsity))
            return min(wanted, live)
        if self.n_tokens:
            return live.clamp(max=self.n_tokens)
        share = torch.ceil(live.double() / self.sparsity).to(live.dtype)  # double: exact for any length
        return torch.minimum(share.clamp(min=self.min_tokens), live)

    def channels(self, D):
        """Label dims C for head dim D, a whole number of 32-bit words: label bytes are 1/sparsity of a 16-bit K."""
        per_word = 32 // self.label_bits
        wanted = self.label_channels or max(1, round(D * 16 / (self.sparsity * self.label_bits)))
        if self.label_channels is None:
            wanted = max(per_word, wanted // per_word * per_word)
        C = min(wanted, D)
        if C % per_word:
            raise ValueError(f"label_channels={C}: must be a multiple of {per_word} with {self.label_bits}-bit labels")
        return C

    def words(self, D):
        """32-bit words W of one token's label."""
        return self.channels(D) * self.label_bits // 32

    def use_triton(self, tensor):
        return self.impl == "triton" or (self.impl == "auto" and tensor.is_cuda)


# Half-widths, in standard deviations, of the uniform quantiser with least mean squared error on a Gaussian.
CLIP = {2: 1.494, 4: 2.513, 8: 3.92, 16: 6.0}


@dataclass
class LabelMap:
    """One layer's calibrated map from keys and queries to labels, with static ranges.

    k_label = k . basis_k[h, c]; the stored code is round((k_label - lo) / step) in `bits` bits;
    q_label = q . basis_q[h, c]; the score of a token is sum_c q_label_c * (lo_c + step_c * code_c) / sqrt(D).
    """

    basis_k: torch.Tensor  # [HKV, C, D] fp32
    basis_q: torch.Tensor  # [HKV, C, D] fp32
    lo: torch.Tensor  # [HKV, C] fp32
    step: torch.Tensor  # [HKV, C] fp32
    bits: int

    @staticmethod
    def from_statistics(basis_k, basis_q, mean, std, bits):
        """basis_k, basis_q: [HKV, C, D]; mean, std: [HKV, C] of the key labels on the calibration text."""
        step = (2 * CLIP[bits] / (2**bits - 1) * std).clamp(min=1e-12)
        return LabelMap(basis_k.float().contiguous(), basis_q.float().contiguous(), mean - CLIP[bits] * std, step, bits)

    def to(self, device):
        return LabelMap(*(t.to(device) for t in (self.basis_k, self.basis_q, self.lo, self.step)), self.bits)

    def query_labels(self, q, pool):
        """q [B, HQ, D] -> (labels [B, HKV, P, C], bias [B, HKV, P]) fp32, so that score = labels . codes + bias.

        P = 1 for pool "mean" (the mean of linear scores is the score of the mean query), G for "max".
        """
        B, HQ, D = q.shape
        HKV, C, _ = self.basis_q.shape
        grouped = q.float().view(B, HKV, HQ // HKV, D)
        if pool == "mean":
            grouped = grouped.mean(2, keepdim=True)  # [B, HKV, P, D]
        dots = torch.einsum("bhpd,hcd->bhpc", grouped, self.basis_q) / math.sqrt(D)
        return dots * self.step[None, :, None], (dots * self.lo[None, :, None]).sum(-1)


# ---------------------------------------------------------------- label


def pack(codes, bits):
    """codes [..., C] integers of `bits` bits -> [..., W] int32; dim c sits in word c // per_word, lowest bits first."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=codes.device) * bits
    words = (codes.long().unflatten(-1, (-1, per_word)) << shifts).sum(-1)  # [..., W] in [0, 2**32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words, bits):
    """words [..., W] int32 -> codes [..., C] int32: the inverse of `pack`."""
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def label_ref(k, positions, labels, label_map):
    """Writes the labels of new keys into the label cache, in place.

    k [B, HKV, T, D] post-RoPE; positions [B, T] integer; labels [B, HKV, W, S] int32.
    """
    B, HKV, T, D = k.shape
    m = label_map
    dots = torch.einsum("bhtd,hcd->bhtc", k.float(), m.basis_k)
    codes = torch.round((dots - m.lo[:, None]) / m.step[:, None]).clamp(0, 2**m.bits - 1)  # [B, HKV, T, C]
    rows = torch.arange(B, device=k.device)[:, None]
    labels.permute(0, 3, 1, 2)[rows, positions] = pack(codes, m.bits).transpose(1, 2)  # [B, T, HKV, W]


@triton.jit
def _label_kernel(k, positions, labels, basis, lo, step, T, k_sb, k_sh, k_st, p_sb, l_sb, l_sh, l_sw,
                  HKV: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_T: tl.constexpr):
    pid_t, pid_h, pid_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t, mask_d = offs_t < T, offs_d < D
    keys = tl.load(k + pid_b * k_sb + pid_h * k_sh + offs_t.to(tl.int64)[:, None] * k_st + offs_d[None, :],
                   mask=mask_t[:, None] & mask_d[None, :], other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    pos = tl.load(positions + pid_b * p_sb + offs_t, mask=mask_t, other=0).to(tl.int64)
    PER_WORD: tl.constexpr = 32 // BITS
    for w in range(W):
        word = tl.zeros([BLOCK_T], tl.int32)
        for j in tl.static_range(PER_WORD):
            c = pid_h * W * PER_WORD + w * PER_WORD + j
            column = tl.load(basis + c * D + offs_d, mask=mask_d, other=0.0)
            code = (tl.sum(keys * column[None, :], 1) - tl.load(lo + c)) / tl.load(step + c)
            code = tl.floor(tl.minimum(tl.maximum(code, 0.0), 2.0**BITS - 1) + 0.5).to(tl.int32)
            word |= code << (BITS * j)
        tl.store(labels + pid_b * l_sb + pid_h * l_sh + w * l_sw + pos, word, mask=mask_t)


def label(k, positions, labels, label_map):
    """As label_ref, in one launch. The last dims of k, positions and labels must be contiguous."""
    B, HKV, T, D = k.shape
    W = labels.shape[2]
    m = label_map
    assert W * 32 // m.bits == m.basis_k.shape[1], f"{W} words cannot hold {m.basis_k.shape[1]} dims of {m.bits} bits"
    assert k.stride(3) == positions.stride(1) == labels.stride(3) == 1
    BLOCK_T = 1 if T == 1 else 64
    _label_kernel[(triton.cdiv(T, BLOCK_T), HKV, B)](
        k, positions, labels, m.basis_k, m.lo, m.step, T, *k.stride()[:3], positions.stride(0), *labels.stride()[:3],
        HKV, W, m.bits, D, triton.next_power_of_2(D), BLOCK_T)


# ---------------------------------------------------------------- score


def live_range(seq_lens, window):
    """First eligible position and number of eligible tokens per row: all live tokens, or the newest `window`."""
    live = seq_lens if window is None else seq_lens.clamp(max=window)
    return seq_lens - live, live


def score_ref(q, labels, label_map, seq_lens, window=None, pool="mean"):
    """Label scores of every cached token, in the units of q . k / sqrt(D).

    q [B, HQ, D]; labels [B, HKV, W, S] int32; seq_lens [B] int32. Returns [B, HKV, S] fp32, -inf where not eligible.
    """
    S = labels.shape[-1]
    shared = labels[:1] if labels.stride(0) == 0 else labels  # rows of one shared cache: unpack it once
    codes = unpack(shared.transpose(2, 3), label_map.bits).float()  # [B or 1, HKV, S, C]
    q_labels, bias = label_map.query_labels(q, pool)  # [B, HKV, P, C], [B, HKV, P]
    if len(codes) < len(q):
        scores = torch.einsum("bhpc,hsc->bhps", q_labels, codes[0])
    else:
        scores = torch.einsum("bhpc,bhsc->bhps", q_labels, codes)
    scores = (scores + bias[..., None]).amax(2)  # [B, HKV, S]
    start, _ = live_range(seq_lens, window)
    position = torch.arange(S, device=q.device)
    eligible = (position >= start[:, None]) & (position < seq_lens[:, None])  # [B, S]
    return scores.masked_fill(~eligible[:, None], float("-inf"))


@triton.jit
def _score_kernel(q_labels, bias, labels, scores, seq_lens, l_sb, l_sh, l_sw, S, window, HKV: tl.constexpr,
                  P: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, BLOCK_S: tl.constexpr):
    pid_s, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (pid_b * HKV + pid_h).to(tl.int64)
    offs_s = pid_s * BLOCK_S + tl.arange(0, BLOCK_S)
    seq_len = tl.load(seq_lens + pid_b)
    eligible = (offs_s < seq_len) & (offs_s >= seq_len - window)
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    if (pid_s * BLOCK_S < seq_len) & ((pid_s + 1) * BLOCK_S > seq_len - window):
        PER_WORD: tl.constexpr = 32 // BITS
        for p in tl.static_range(P):
            score = tl.zeros([BLOCK_S], tl.float32) + tl.load(bias + row * P + p)
            for w in range(W):
                word = tl.load(labels + pid_b.to(tl.int64) * l_sb + pid_h * l_sh + w * l_sw + offs_s, mask=eligible, other=0)
                for j in tl.static_range(PER_WORD):
                    code = (word >> (BITS * j)) & ((1 << BITS) - 1)
                    score += tl.load(q_labels + (row * P + p) * W * PER_WORD + w * PER_WORD + j) * code.to(tl.float32)
            best = tl.maximum(best, score)
    tl.store(scores + row * S + offs_s, tl.where(eligible, best, float("-inf")), mask=offs_s < S)


NO_WINDOW = 2**30  # "window" of a kernel call without one: longer than any cache


def score(q, labels, label_map, seq_lens, window=None, pool="mean", block_s=1024):
    """As score_ref; each label word is read once per query-label row (one with pool "mean")."""
    B, HKV, W, S = labels.shape
    q_labels, bias = label_map.query_labels(q, pool)
    scores = torch.empty(B, HKV, S, dtype=torch.float32, device=q.device)
    _score_kernel[(triton.cdiv(S, block_s), HKV, B)](
        q_labels.contiguous(), bias.contiguous(), labels, scores, seq_lens, *labels.stride()[:3], S,
        NO_WINDOW if window is None else window, HKV, q_labels.shape[2], W, label_map.bits, block_s)
    return scores


# ---------------------------------------------------------------- select


def select_ref(scores, seq_lens, n_tokens, max_tokens, sink=0, recent=1, window=None):
    """Exactly n_tokens[b] positions per row and KV head: newest, first, then best scores; ties go to the earlier token.

    scores [B, HKV, S] fp32; seq_lens, n_tokens [B] int32 (1 <= n_tokens <= eligible tokens); max_tokens: the width.
    Returns [B, HKV, max_tokens] int32, positions ascending, -1 past n_tokens.
    """
    S = scores.shape[-1]
    start, _ = live_range(seq_lens, window)
    position = torch.arange(S, device=scores.device)
    n_recent = n_tokens.clamp(max=recent)
    n_sink = (n_tokens - n_recent).clamp(max=sink)
    newest = position >= (seq_lens - n_recent)[:, None]
    first = position < n_sink[:, None]
    eligible = (position >= start[:, None]) & (position < seq_lens[:, None])
    forced = (newest | first) & eligible  # [B, S]
    ranked = scores.masked_fill(forced[:, None], float("inf")).masked_fill(~eligible[:, None], float("-inf"))
    best = ranked.topk(min(max_tokens, S), dim=-1).values
    threshold = best.gather(-1, (n_tokens - 1).long()[:, None, None].expand(*best.shape[:2], 1))  # [B, HKV, 1]
    above = ranked > threshold
    tied = (ranked == threshold) & eligible[:, None]
    room = n_tokens[:, None, None] - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))  # [B, HKV, S]
    # ascending positions: a chosen token's slot is the number of chosen tokens before it
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, max_tokens)
    indices = torch.full((*scores.shape[:2], max_tokens + 1), -1, dtype=torch.int32, device=scores.device)
    indices.scatter_(-1, slot, position.to(torch.int32).expand_as(slot))
    return torch.where(torch.arange(max_tokens, device=scores.device) < n_tokens[:, None, None], indices[..., :-1], -1)


@triton.jit
def _order_key(scores, offs_s, seq_len, window, n_sink, n_recent):
    """Unsigned keys in the order of the scores; forced tokens get the largest key, tokens not eligible are masked."""
    eligible = (offs_s < seq_len) & (offs_s >= seq_len - window)
    value = tl.load(scores + offs_s, mask=eligible, other=0.0) + 0.0  # + 0.0: one key for both zeros
    bits = value.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | (-2147483647 - 1))).to(tl.uint32, bitcast=True)
    forced = (offs_s < n_sink) | (offs_s >= seq_len - n_recent)
    return tl.where(forced, 0xFFFFFFFF, key).to(tl.uint32), eligible


@triton.jit
def _select_kernel(scores, seq_lens, n_tokens, indices, S, max_tokens, sink, recent, window, HKV: tl.constexpr,
                   BLOCK_S: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    seq_len = tl.load(seq_lens + row // HKV)
    n = tl.load(n_tokens + row // HKV)
    n_recent = tl.minimum(recent, n)
    n_sink = tl.minimum(sink, n - n_recent)
    begin = tl.maximum(seq_len - window, 0) // BLOCK_S * BLOCK_S
    bins = tl.arange(0, 512)  # 256 digits; bin 256 collects the tokens that do not count
    # the n-th largest key, one 8-bit digit at a time: the threshold, and how many ties at it are taken
    threshold = tl.zeros([], tl.uint32)
    room = n
    for digit in tl.static_range(4):
        SHIFT = 24 - 8 * digit
        histogram = tl.zeros([512], tl.int32)
        for s in range(begin, seq_len, BLOCK_S):
            key, counts = _order_key(scores + row * S, s + tl.arange(0, BLOCK_S), seq_len, window, n_sink, n_recent)
            if digit > 0:
                counts = counts & ((key >> (SHIFT + 8)) == threshold)
            histogram += tl.histogram(tl.where(counts, ((key >> SHIFT) & 255).to(tl.int32), 256), 512)
        histogram = tl.where(bins < 256, histogram, 0)
        at_least = tl.cumsum(histogram, 0, reverse=True)  # tokens with this digit or a larger one
        chosen = tl.sum((at_least >= room).to(tl.int32), 0) - 1
        room -= tl.sum(tl.where(bins > chosen, histogram, 0), 0)
        threshold = ((threshold << 8) | chosen.to(tl.uint32)).to(tl.uint32)
    taken = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for s in range(begin, seq_len, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S)
        key, eligible = _order_key(scores + row * S, offs_s, seq_len, window, n_sink, n_recent)
        tied = ((key == threshold) & eligible).to(tl.int32)
        keep = (((key > threshold) & eligible) | ((tied == 1) & (ties + tl.cumsum(tied, 0) <= room))).to(tl.int32)
        slot = taken + tl.cumsum(keep, 0) - 1
        tl.store(indices + row * max_tokens + slot, offs_s, mask=keep == 1)
        taken += tl.sum(keep, 0)
        ties += tl.sum(tied, 0)


def select(scores, seq_lens, n_tokens, max_tokens, sink=0, recent=1, window=None, block_s=1024):
    """As select_ref: a radix selection, one program per row and KV head."""
    B, HKV, S = scores.shape
    indices = torch.full((B, HKV, max_tokens), -1, dtype=torch.int32, device=scores.device)
    _select_kernel[(B * HKV,)](scores, seq_lens, n_tokens, indices, S, max_tokens, sink, recent,
                               NO_WINDOW if window is None else window, HKV, block_s)
    return indices


# ---------------------------------------------------------------- attend


def attend_ref(q, k, v, seq_lens, indices=None, n_tokens=None, window=None):
    """Exact attention of one query per row over the selected tokens, or over all eligible ones (dense decode).

    q [B, HQ, D]; k, v [B, HKV, S, D]; seq_lens [B] int32; indices [B, HKV, N] int32 with n_tokens [B] valid entries
    in front, or None for all eligible tokens. Returns [B, HQ, D] in q's dtype; fp32 inside.
    """
    B, HQ, D = q.shape
    HKV, S = k.shape[1:3]
    if indices is None:
        start, _ = live_range(seq_lens, window)
        position = torch.arange(S, device=q.device)
        valid = ((position >= start[:, None]) & (position < seq_lens[:, None]))[:, None]  # [B, 1, S]
    else:
        valid = (torch.arange(indices.shape[-1], device=q.device) < n_tokens[:, None])[:, None]  # [B, 1, N]
        rows = indices.clamp(min=0).long()[..., None].expand(-1, -1, -1, D)
        k, v = k.gather(2, rows), v.gather(2, rows)  # [B, HKV, N, D]
    if k.stride(0) == 0:  # rows of one shared cache: no copies of it
        k, v, operand = k[0], v[0], "hnd"
    else:
        operand = "bhnd"
    grouped = q.float().view(B, HKV, HQ // HKV, D)
    logits = torch.einsum(f"bhgd,{operand}->bhgn", grouped, k.float()) / math.sqrt(D)  # [B, HKV, G, N]
    weights = logits.masked_fill(~valid[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum(f"bhgn,{operand}->bhgd", weights, v.float()).reshape(B, HQ, D).to(q.dtype)


@triton.jit
def _attend_kernel(q, k, v, seq_lens, indices, n_tokens, partial, partial_lse, max_tokens, window, scale_log2, q_sb,
                   q_sh, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, SPARSE: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
                   BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
                   BLOCK_N: tl.constexpr, UPCAST: tl.constexpr):
    row, pid_split = tl.program_id(0), tl.program_id(1)
    pid_b, pid_h = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
    offs_d, offs_g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    mask_d, mask_g = offs_d < D, offs_g < G
    query = tl.load(q + pid_b * q_sb + (pid_h * G + offs_g[:, None]) * q_sh + offs_d[None, :],
                    mask=mask_g[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_G, BLOCK_D]
    if UPCAST:
        query = query.to(tl.float32)
    seq_len = tl.load(seq_lens + pid_b)
    begin = 0 if SPARSE else tl.maximum(seq_len - window, 0)
    end = tl.load(n_tokens + pid_b) if SPARSE else seq_len
    per_split = tl.cdiv(end - begin, SPLITS * BLOCK_N) * BLOCK_N
    begin += pid_split * per_split
    end = tl.minimum(begin + per_split, end)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for n in range(begin, end, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        token = offs_n
        if SPARSE:
            token = tl.load(indices + row.to(tl.int64) * max_tokens + offs_n, mask=mask_n, other=0)
        token = token.to(tl.int64)[:, None]
        mask = mask_n[:, None] & mask_d[None, :]
        keys = tl.load(k + pid_b * k_sb + pid_h * k_sh + token * k_ss + offs_d[None, :], mask=mask, other=0.0)
        values = tl.load(v + pid_b * v_sb + pid_h * v_sh + token * v_ss + offs_d[None, :], mask=mask, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        if G == 1:
            logits = tl.sum(keys.to(tl.float32) * query.to(tl.float32), 1)[None, :] * scale_log2
        else:
            logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2  # [BLOCK_G, BLOCK_N]
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        if G == 1:
            acc = acc * decay[:, None] + tl.sum(tl.trans(weights) * values.to(tl.float32), 0)[None, :]
        else:
            acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    # an empty split keeps top = -inf: the combine gives it no weight
    head = (row.to(tl.int64) * G + offs_g) * SPLITS + pid_split
    total = tl.where(total > 0, total, 1.0)
    tl.store(partial + head[:, None] * D + offs_d[None, :], acc / total[:, None],
             mask=mask_g[:, None] & mask_d[None, :])
    tl.store(partial_lse + head, top + tl.log2(total), mask=mask_g)


@triton.jit
def _combine_kernel(partial, partial_lse, out, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse + head * SPLITS + offs_s)
    weights = tl.exp2(lse - tl.max(lse, 0))
    mask = offs_d[None, :] < D
    parts = tl.load(partial + (head * SPLITS + offs_s[:, None]) * D + offs_d[None, :],
                    mask=mask & (weights[:, None] > 0), other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * D + offs_d, result.to(out.dtype.element_ty), mask=offs_d < D)


def attend(q, k, v, seq_lens, indices=None, n_tokens=None, window=None, splits=None, block_n=64):
    """As attend_ref; K and V are read once per KV head, whole splits of the tokens in parallel, then combined."""
    B, HQ, D = q.shape
    HKV, S = k.shape[1:3]
    G = HQ // HKV
    assert q.stride(2) == k.stride(3) == v.stride(3) == 1
    max_tokens = S if indices is None else indices.shape[-1]
    if splits is None:  # about four programs for each of a large GPU's ~132 multiprocessors, at least two blocks each
        splits = min(triton.next_power_of_2(triton.cdiv(512, B * HKV)),
                     triton.next_power_of_2(triton.cdiv(max_tokens, 2 * block_n)), 64)
    partial = torch.empty(B, HQ, splits, D, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(B, HQ, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(B, HQ, D, dtype=q.dtype, device=q.device)
    _attend_kernel[(B * HKV, splits)](
        q, k, v, seq_lens, indices, n_tokens, partial, partial_lse, max_tokens,
        NO_WINDOW if window is None else window, math.log2(math.e) / math.sqrt(D), *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        indices is not None, HKV, G, 1 if G == 1 else max(16, triton.next_power_of_2(G)), D,
        triton.next_power_of_2(D), splits, block_n,
        UPCAST=not q.is_cuda)  # the interpreter's dot takes bfloat16 for integers
    _combine_kernel[(B * HQ,)](partial, partial_lse, out, D, triton.next_power_of_2(D), splits)
    return out


# ---------------------------------------------------------------- the decode step


def write_labels(k, positions, labels, label_map, config):
    """The label stage with the configured implementation; shapes as in label_ref."""
    (label if config.use_triton(k) else label_ref)(k, positions, labels, label_map)


def dense_decode(q, k, v, seq_lens, window=None, impl="auto"):
    """One query per row over all its eligible tokens; cost follows seq_lens, not S. Shapes as in attend_ref."""
    triton_wanted = impl == "triton" or (impl == "auto" and q.is_cuda)
    return (attend if triton_wanted else attend_ref)(q, k, v, seq_lens, window=window)


def ds_decode(q, k, v, labels, label_map, seq_lens, config, window=None):
    """One query per row over the tokens that its label scores select.

    q [B, HQ, D] post-RoPE; k, v [B, HKV, S, D]; labels [B, HKV, W, S] int32; label_map: LabelMap of this layer;
    seq_lens [B] int32, newest token included; window: sliding window in tokens or None. Returns [B, HQ, D].
    Rows may share one cache: expand k, v and labels along B (the strides are used as they are).
    """
    stages = (score, select, attend) if config.use_triton(q) else (score_ref, select_ref, attend_ref)
    score_stage, select_stage, attend_stage = stages
    n_tokens = config.budget(live_range(seq_lens, window)[1])
    S = labels.shape[-1]
    max_tokens = config.budget(S if window is None else min(S, window))
    scores = score_stage(q, labels, label_map, seq_lens, window, config.pool)
    indices = select_stage(scores, seq_lens, n_tokens, max_tokens, config.sink, config.recent, window)
    return attend_stage(q, k, v, seq_lens, indices, n_tokens)
