"""Double Sparsity decode attention (arXiv 2408.07092): label -> score -> select -> attend.

Each cached key is kept a second time as a small *label*: a calibrated choice of its channels (section 3.1; by default
of pairs that RoPE turns together), quantised to a few bits. A decode step scores every cached token with the labels,
selects the best N per KV head, and attends to exactly those (section 3.2).

Exact: attention over the selected tokens, the selection given the scores, the first `sink` and the newest `recent`
tokens. Approximate: the scores, by the channels left out and by the label bits.

Shapes, used everywhere: B batch rows, T new tokens, S cached tokens (allocated; the live length is in seq_lens),
HQ / HKV query / KV heads, G = HQ // HKV, D head dim, C label dims, W 32-bit words of one token's label,
N attended tokens. In a decode call q has no T: its rows are one token each.

Plain torch is the specification: label_ref, score_ref, select_ref, attend_ref. The Triton kernels do the same with fewer
bytes: `label`, `select` (scores and selection in one or three launches: full scores are never written) and `attend`. They run
on a GPU and, with TRITON_INTERPRET=1 set before triton is imported, on a CPU.
Last run on: H200 with torch 2.11 / triton 3.6; CPU with torch 2.13 / triton 3.9.
"""
import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class DSConfig:
    """What a sparse decode step reads. `sparsity` sets both the tokens and the label bytes, as in the paper."""

    sparsity: float = 16.0  # attend to 1/sparsity of the live tokens; labels take 1/sparsity of K's bytes
    n_tokens: int | None = None  # a fixed number of attended tokens instead of a share
    min_tokens: int = 128  # floor of the share: below it a share of a short context is too few
    label_channels: int | None = None  # label dims per KV head; None: as many as 1/sparsity of a 16-bit K's bytes hold
    label_bits: int | str | None = None  # bits per label dim, or dims x bits of each width: "8x4,48x2"; None: default_widths, or
    # 4 with label_channels
    # these two by the caller, in what it asks ds_decode for: see model.py and sparse_at
    dense_layers: int = 2  # the first layers attend to everything: their attention is diffuse
    dense_below: int = 3072  # a step whose longest row has fewer live tokens attends to everything: it could not win
    sink: int = 4  # first tokens always attended, counted inside N
    recent: int = 16  # newest tokens always attended, counted inside N
    impl: str = "auto"  # "triton", "torch" (the reference), or "auto": triton on a GPU, torch on a CPU

    def __post_init__(self):
        if not (math.isfinite(self.sparsity) and self.sparsity > 1):
            raise ValueError(f"sparsity={self.sparsity:g}: must be above 1; use --sparsity 1 for dense")
        for name, low in [("n_tokens", 1), ("min_tokens", 1), ("label_channels", 1), ("dense_layers", 0),
                          ("dense_below", 0), ("sink", 0), ("recent", 1)]:
            value = getattr(self, name)
            if value is not None and value < low:
                hint = "; use --sparsity 1 for dense" if name == "n_tokens" else ""
                raise ValueError(f"{name}={value}: must be at least {low}{hint}")
        if isinstance(self.label_bits, str):
            parse_widths(self.label_bits)
            if self.label_channels is not None:
                raise ValueError(f"label_channels={self.label_channels}: label_bits={self.label_bits} says how many; give one")
        elif self.label_bits not in (None, 1, 2, 4, 8):
            raise ValueError(f"label_bits={self.label_bits}: must be 1, 2, 4, 8, or dims x bits of each width as 8x4,48x2")
        if self.impl not in ("auto", "torch", "triton"):
            raise ValueError(f"impl={self.impl}: must be one of auto, torch, triton")

    def budget(self, live):
        """Tokens attended when `live` tokens are eligible. live: int, or int32 tensor; same type back."""
        num, den = self.share()
        if isinstance(live, int):
            return min(self.n_tokens or max(self.min_tokens, -(-live * den // num)), live)
        if self.n_tokens:
            return live.clamp(max=self.n_tokens)
        share = (live.long() * den + num - 1) // num
        return torch.minimum(share.clamp(min=self.min_tokens).to(live.dtype), live)

    def sparse_at(self, live):
        """Whether sparse steps pay at `live` eligible tokens, of the longest row."""
        return live >= self.dense_below and self.budget(live) < live

    def share(self):
        """sparsity as a fraction (num, den) of small integers, so that every implementation rounds alike."""
        fraction = Fraction(self.sparsity).limit_denominator(1000)
        return fraction.numerator, fraction.denominator

    def widths(self, D):
        """The label of head dim D: ((dims, bits), ...), its first and most important dims first, in whole 32-bit words."""
        if isinstance(self.label_bits, str):
            widths = parse_widths(self.label_bits)
            if sum(dims for dims, _ in widths) > D:
                raise ValueError(f"label_bits={self.label_bits}: more label dims than the head's {D}")
            return widths
        words = max(1, int(D * 16 / self.sparsity) // 32)  # label bytes are 1/sparsity of a 16-bit K
        if self.label_bits is None and self.label_channels is None:
            return default_widths(words, D)
        bits = self.label_bits or 4
        C = self.label_channels or max(1, min(words, D * bits // 32)) * (32 // bits)  # whole words of it
        if C * bits % 32:
            raise ValueError(f"label_channels={C}: must be a multiple of {32 // bits} with {bits}-bit labels")
        if C > D:
            raise ValueError(f"label_channels={C}: more label dims than the head's {D}")
        return ((C, bits),)

    def channels(self, D):
        """Label dims C for head dim D."""
        return sum(dims for dims, _ in self.widths(D))

    def words(self, D):
        """32-bit words W of one token's label."""
        return sum(dims * bits for dims, bits in self.widths(D)) // 32

    def use_triton(self, tensor):
        return self.impl == "triton" or (self.impl == "auto" and tensor.is_cuda)


def parse_widths(text):
    """"8x4,48x2" -> ((8, 4), (48, 2)): label dims and bits of each, widest first."""
    example = f"label_bits={text}: must be dims x bits, the most bits first, as 8x4,48x2"
    try:
        widths = tuple(tuple(map(int, part.split("x"))) for part in text.split(","))
    except ValueError:
        raise ValueError(example) from None
    if any(len(part) != 2 or part[0] < 1 for part in widths) or any(a[1] <= b[1] for a, b in zip(widths, widths[1:])):
        raise ValueError(example)
    for dims, bits in widths:
        if bits not in (1, 2, 4, 8):
            raise ValueError(f"label_bits={text}: dims have 1, 2, 4 or 8 bits")
        if dims * bits % 8:
            raise ValueError(f"label_bits={text}: {dims} dims of {bits} bits are no whole number of bytes")
    total = sum(dims * bits for dims, bits in widths)
    if total % 32:
        raise ValueError(f"label_bits={text}: {total} bits in all are no whole number of 32-bit words")
    return widths


def widths_name(widths):
    """((8, 4), (48, 2)) -> "8 x 4, 48 x 2", which parse_widths reads, too."""
    return ", ".join(f"{dims} x {bits}" for dims, bits in widths)


def bits_of(widths):
    """A label_bits for these widths."""
    return widths[0][1] if len(widths) == 1 else widths_name(widths)


def default_widths(words, D):
    """The label of this many 32-bit words: many dims at few bits (results/notes-quality.md says how they were chosen).

    From a bit per dim of the head on, a quarter of the bits makes dims of 4 and the rest of 2, from half a bit on 5/8 makes dims
    of 2 and the rest of 1; less is all dims of 1. Where that were more than D dims, they are D, and more of them wide.
    """
    bits = min(32 * words, 4 * D // 32 * 32)
    if not bits:
        raise ValueError(f"head_dim={D}: a label is 32-bit words of at most 4 bits per dim, so a head needs 8 dims")
    wide, share = (4, 1 / 4) if bits >= D else (2, 5 / 8) if 2 * bits >= D else (1, 1)
    narrow = max(1, wide // 2)
    wide_bits = round(bits * share / 8) * 8
    if wide_bits // wide + (bits - wide_bits) // narrow > D:
        wide_bits = 2 * (bits - narrow * D)
    return tuple((part // width, width) for part, width in ((wide_bits, wide), (bits - wide_bits, narrow)) if part)


# Half-widths, in standard deviations, of the uniform quantiser with least mean squared error on a Gaussian.
CLIP = {1: 0.798, 2: 1.494, 4: 2.513, 8: 3.92}


@dataclass
class LabelMap:
    """One layer's calibrated choice of channels, with static ranges.

    A label has a code for each chosen channel of the key: floor((k_c - lo_c) / step_c + 1/2), cut to what
    its bits hold. A token's score is sum_c q_c * step_c * code_c, the products q_c * step_c rounded to 8 bits
    (see query_codes); what lo_c adds is the same for all tokens.
    """

    channels: torch.Tensor  # [HKV, C] int32, the most important ones first
    lo: torch.Tensor  # [HKV, C] fp32
    step: torch.Tensor  # [HKV, C] fp32
    widths: tuple  # ((dims, bits), ...), C dims in all: see DSConfig.widths

    def __post_init__(self):
        assert self.channels.dtype == torch.int32
        assert all(t.is_contiguous() for t in (self.channels, self.lo, self.step))

    @staticmethod
    def from_statistics(channels, mean, std, widths):
        """channels, mean, std [HKV, C]: their numbers, and what each one's range is about and follows."""
        clip = per_dim(widths, CLIP.get, std.device)
        lo = (mean - clip * std).float().contiguous()
        step = per_dim(widths, lambda bits: 2 * CLIP[bits] / (2**bits - 1), std.device) * std
        return LabelMap(channels.int().contiguous(), lo, step.float().clamp(min=1e-12).contiguous(), widths)

    def to(self, device):
        return LabelMap(*(t.to(device) for t in (self.channels, self.lo, self.step)), self.widths)

    def first(self, heads):
        """That of the first so many KV heads."""
        return LabelMap(*(t[:heads] for t in (self.channels, self.lo, self.step)), self.widths)

    def query_codes(self, q):
        """q [B, HQ, D] -> (codes [B, HKV, G, C], unit [B, HKV]): a score is unit * (codes . label codes).

        codes: the query's channels, each times its label's step, on one scale per KV head: integers in
        [-127, 127], as fp32.
        """
        B, _, D = q.shape
        grouped = q.float().view(B, len(self.channels), -1, D)
        products = take_channels(grouped, self.channels) * self.step[:, None]  # [B, HKV, G, C]
        largest = products.abs().amax((2, 3))  # [B, HKV]
        # one rounding, as in the kernel: a number over a tensor would be a product with its reciprocal
        scale = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)[..., None, None]
        return torch.floor(products * scale + 0.5), largest * (1 / 127 / math.sqrt(D))


def take_channels(x, channels):
    """x [B, HKV, any, D], channels [HKV, C] -> [B, HKV, any, C] fp32."""
    return x.gather(3, channels.long()[:, None].expand(*x.shape[:3], -1)).float()


# ---------------------------------------------------------------- label


def per_dim(widths, value, device):
    """value(bits) of each label dim: [C]."""
    return torch.cat([torch.full((dims,), value(bits), device=device) for dims, bits in widths])


def places(widths, device):
    """(word, shift) of each label dim: [C] int64 each. Dims lie one behind the other, in each word lowest bits first."""
    bits = per_dim(widths, int, device)
    first = bits.cumsum(0) - bits
    return first // 32, first % 32


def pack(codes, widths):
    """codes [..., C] integers of their dims' bits -> [..., W] int32."""
    word, shift = places(widths, codes.device)
    W = sum(dims * bits for dims, bits in widths) // 32
    words = codes.new_zeros(*codes.shape[:-1], W, dtype=torch.int64).index_add_(-1, word, codes.long() << shift)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words, widths):
    """words [..., W] int32 -> codes [..., C] int32: the inverse of `pack`."""
    word, shift = places(widths, words.device)
    return (words[..., word] >> shift.int()) & per_dim(widths, lambda bits: 2**bits - 1, words.device).int()


def label_ref(k, positions, labels, label_map):
    """Writes the labels of new keys into the label cache, in place.

    k [B, HKV, T, D] post-RoPE; positions [B, T] integer; labels [B, HKV, W, S] int32.
    """
    m = label_map
    codes = torch.floor((take_channels(k, m.channels) - m.lo[:, None]) / m.step[:, None] + 0.5)  # [B, HKV, T, C]
    codes = codes.clamp(min=0).minimum(per_dim(m.widths, lambda bits: 2.0**bits - 1, k.device))
    rows = torch.arange(len(k), device=k.device)[:, None]
    labels.permute(0, 3, 1, 2)[rows, positions] = pack(codes, m.widths).transpose(1, 2)  # [B, T, HKV, W]


@triton.constexpr_function
def _before(WIDTHS, i):
    """(dims, bits) in all of the first i of a label's widths, WIDTHS = ((dims, bits), ...)."""
    return sum(dims for dims, _ in WIDTHS[:i]), sum(dims * bits for dims, bits in WIDTHS[:i])


@triton.constexpr_function
def _dims(WIDTHS):
    """Label dims C."""
    return sum(dims for dims, _ in WIDTHS)


@triton.constexpr_function
def _narrowest(WIDTHS):
    """The fewest bits of a label's dims."""
    return min(bits for _, bits in WIDTHS)


@triton.jit
def _dim_bits(dim, WIDTHS: tl.constexpr):
    """(first bit in the label, largest code) of label dims; those past the last begin past its words."""
    bit = dim * WIDTHS[0][1]
    top = tl.full(dim.shape, 2.0 ** WIDTHS[0][1] - 1, tl.float32)
    for i in tl.static_range(1, len(WIDTHS)):
        nth = dim - _before(WIDTHS, i)[0]
        bit = tl.where(nth >= 0, _before(WIDTHS, i)[1] + nth * WIDTHS[i][1], bit)
        top = tl.where(nth >= 0, 2.0 ** WIDTHS[i][1] - 1, top)
    return bit, top


@triton.jit
def _label(keys, mask, channels, lo, step, labels, l_sw, W: tl.constexpr, WIDTHS: tl.constexpr):
    """Writes labels of one KV head's keys. keys, labels: pointers [T], to first channels and first words."""
    C: tl.constexpr = _dims(WIDTHS)
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    channel = tl.load(channels + offs_c, mask=offs_c < C, other=0)
    lows = tl.load(lo + offs_c, mask=offs_c < C, other=0.0)
    steps = tl.load(step + offs_c, mask=offs_c < C, other=1.0)
    chosen = tl.load(keys[:, None] + channel[None, :], mask=mask[:, None] & (offs_c < C)[None, :], other=0.0)
    bit, top = _dim_bits(offs_c, WIDTHS)
    codes = tl.floor(tl.div_rn(chosen.to(tl.float32) - lows[None, :], steps[None, :]) + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), top[None, :]).to(tl.int32) << (bit % 32)[None, :]
    for w in tl.static_range(W):
        word = tl.sum(tl.where((bit // 32 == w)[None, :], codes, 0), 1)
        tl.store(labels + w * l_sw, word, mask=mask)


@triton.jit
def _label_kernel(k, positions, labels, channels, lo, step, T, k_sb, k_sh, k_st, p_sb, l_sb, l_sh, l_sw, W: tl.constexpr,
                  WIDTHS: tl.constexpr, BLOCK_T: tl.constexpr):
    pid_t, pid_h, pid_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    pos = tl.load(positions + pid_b * p_sb + offs_t, mask=mask_t, other=0).to(tl.int64)
    C: tl.constexpr = _dims(WIDTHS)
    _label(k + pid_b * k_sb + pid_h * k_sh + offs_t.to(tl.int64) * k_st, mask_t, channels + pid_h * C, lo + pid_h * C,
           step + pid_h * C, labels + pid_b * l_sb + pid_h * l_sh + pos, l_sw, W, WIDTHS)


def label(k, positions, labels, label_map):
    """As label_ref, in one launch. The last dims of k, positions and labels must be contiguous."""
    B, HKV, T, _ = k.shape
    W = labels.shape[2]
    m = label_map
    assert W * 32 == sum(dims * bits for dims, bits in m.widths), f"{W} words are not those of {widths_name(m.widths)}"
    assert k.stride(3) == positions.stride(1) == labels.stride(3) == 1
    BLOCK_T = 1 if T == 1 else 64
    _label_kernel[(triton.cdiv(T, BLOCK_T), HKV, B)](
        k, positions, labels, m.channels, m.lo, m.step, T, *k.stride()[:3], positions.stride(0), *labels.stride()[:3], W, m.widths,
        BLOCK_T)


# ---------------------------------------------------------------- score


def live_range(seq_lens, window):
    """First eligible position and number of eligible tokens per row: all live tokens, or the newest `window`."""
    live = seq_lens if window is None else seq_lens.clamp(max=window)
    return seq_lens - live, live


def eligible_tokens(seq_lens, S, window):
    """Which of S positions are eligible: [B, S] bool."""
    start, _ = live_range(seq_lens, window)
    position = torch.arange(S, device=seq_lens.device)
    return (position >= start[:, None]) & (position < seq_lens[:, None])


def pool_ref(scores):
    """Scores of a group's heads [..., G, S], in the units of q . k / sqrt(D), -inf where not eligible
    -> one per token [..., S]: the largest logarithm of its softmax weights. Label scores are pooled
    alike, but by weights among sampled tokens, without the newest (see log_weight_ref)."""
    return (scores - scores.logsumexp(-1, keepdim=True)).amax(-2)


def sample_ref(seq_lens, window=None):
    """The tokens that bracket the n-th score: positions [B, SAMPLE] int64, and which of them are eligible.

    Aligned runs of RUN tokens, spread over the eligible ones: all, where there are no more than SAMPLE
    (but up to RUN - 1 of the newest, where a window begins inside a run).
    """
    start, live = (x[:, None].long() for x in live_range(seq_lens, window))
    i = torch.arange(SAMPLE, device=seq_lens.device)
    run, runs, spread = i // RUN, SAMPLE // RUN, live.clamp(min=SAMPLE)
    position = (start + run * (spread // runs) + run * (spread % runs) // runs) // RUN * RUN + i % RUN
    return position, (position >= start) & (position < start + live)


def log_weight_ref(scores, seq_lens, unit, sink, window=None):
    """The logarithm of the mean weight exp(unit * score) of the sampled tokens but the newest, in units.

    scores [B, HKV, G, S], integers as fp32; unit [B, HKV]. Returns [B, HKV, G], integers as fp32. The first
    `sink` tokens stand for themselves alone, other sampled ones for as many as are not sampled, too. Integers,
    and roundings that the kernel has as well: powers of two and the logarithm are linear between whole ones.
    """
    position, counted = sample_ref(seq_lens, window)
    counted = (counted & (position < seq_lens[:, None] - 1))[:, None, None]
    index = position.clamp(max=scores.shape[3] - 1)[:, None, None]
    sampled = scores.gather(3, index.expand(*scores.shape[:3], -1))
    top = sampled.masked_fill(~counted, -(2.0**30)).amax(-1, keepdim=True)
    powers = (unit * math.log2(math.e))[..., None, None]
    lower = ((top - sampled) * powers).masked_fill(~counted, 0.0)
    live = live_range(seq_lens, window)[1].clamp(min=SAMPLE).float()[:, None]
    share = 2.0**18 * (torch.full_like(live, SAMPLE) / live)
    share = torch.where(position < sink, share, 2.0**18)[:, None, None]
    weight = ((2 - (lower - lower.floor())) * share).long() >> lower.clamp(max=31).long()
    total, even = ((w * counted).sum(-1).float().view(torch.int32) for w in (weight, (2 * share).long()))
    inverse = torch.where(unit > 0, torch.full_like(unit, math.log(2)) / unit, 0.0)[..., None]
    return top[..., 0] + torch.floor((total - even).float() * 2.0**-23 * inverse + 0.5)


def score_ref(q, labels, label_map, seq_lens, sink=0, window=None):
    """Label scores of every cached token, in the units of q . k / sqrt(D) up to a constant per row and head.

    In a group each head's scores are less by its log_weight_ref, and the largest counts, as in pool_ref.
    q [B, HQ, D]; labels [B, HKV, W, S] int32; seq_lens [B] int32. Returns [B, HKV, S] fp32, -inf where not eligible.
    """
    S = labels.shape[-1]
    shared = labels[:1] if labels.stride(0) == 0 else labels  # rows of one shared cache: unpack it once
    codes = unpack(shared.transpose(2, 3), label_map.widths).float()  # [B or 1, HKV, S, C]
    q_codes, unit = label_map.query_codes(q)  # [B, HKV, G, C], [B, HKV]
    operand = codes[0] if len(codes) < len(q) else codes
    scores = torch.einsum(f"bhgc,{'hsc' if operand.ndim == 3 else 'bhsc'}->bhgs", q_codes, operand)
    if scores.shape[2] > 1:
        scores -= log_weight_ref(scores, seq_lens, unit, sink, window)[..., None]
    scores = scores.amax(2) * unit[..., None]  # [B, HKV, S]
    return scores.masked_fill(~eligible_tokens(seq_lens, S, window)[:, None], float("-inf"))


# ---------------------------------------------------------------- select


def forced_ref(seq_lens, n_tokens, S, sink, recent, window):
    """Which of S positions are attended in any case, and which are eligible: [B, HKV, S] bool, [B, 1, S] bool.

    seq_lens [B], n_tokens [B, HKV]: the newest `recent`, then the first `sink` tokens, as far as n_tokens goes.
    """
    eligible = eligible_tokens(seq_lens, S, window)[:, None]
    position = torch.arange(S, device=seq_lens.device)
    n_recent = n_tokens.clamp(max=recent)
    n_sink = (n_tokens - n_recent).clamp(max=sink)
    newest = position >= (seq_lens[:, None] - n_recent)[..., None]
    return (newest | (position < n_sink[..., None])) & eligible, eligible


def per_head(n_tokens, HKV):
    """n_tokens [B] or [B, HKV] -> [B, HKV]."""
    return n_tokens if n_tokens.ndim == 2 else n_tokens[:, None].expand(-1, HKV)


def select_ref(scores, seq_lens, n_tokens, max_tokens, sink=0, recent=1, window=None):
    """Exactly n_tokens positions per row and KV head: newest, first, then best scores; ties go to the earlier token.

    scores [B, HKV, S] fp32; seq_lens [B] int32; n_tokens [B] or [B, HKV] int32 (1 <= n_tokens <= eligible tokens);
    max_tokens: the width. Returns [B, HKV, max_tokens] int32, positions ascending, -1 past n_tokens.
    """
    HKV, S = scores.shape[1:]
    n_tokens = per_head(n_tokens, HKV)
    forced, eligible = forced_ref(seq_lens, n_tokens, S, sink, recent, window)
    ranked = scores.masked_fill(forced, float("inf")).masked_fill(~eligible, float("-inf"))
    best = ranked.topk(min(max_tokens, S), dim=-1).values
    threshold = best.gather(-1, (n_tokens - 1).long()[..., None])  # [B, HKV, 1]
    above = ranked > threshold
    tied = (ranked == threshold) & eligible
    room = n_tokens[..., None] - above.sum(-1, keepdim=True)
    chosen = above | (tied & (tied.cumsum(-1) <= room))  # [B, HKV, S]
    # ascending positions: a chosen token's slot is the number of chosen tokens before it
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, max_tokens)
    indices = torch.full((*scores.shape[:2], max_tokens + 1), -1, dtype=torch.int32, device=scores.device)
    indices.scatter_(-1, slot, torch.arange(S, dtype=torch.int32, device=scores.device).expand_as(slot))
    return torch.where(torch.arange(max_tokens, device=scores.device) < n_tokens[..., None], indices[..., :-1], -1)


@triton.jit
def _budget(seq_len, window, n_fixed, min_tokens, share_num, share_den):
    """DSConfig.budget of one row."""
    live = tl.minimum(seq_len, window)
    share = ((live.to(tl.int64) * share_den + share_num - 1) // share_num).to(tl.int32)
    wanted = tl.where(n_fixed > 0, n_fixed, tl.maximum(share, min_tokens))
    return tl.minimum(wanted, live)


@triton.jit
def _dot4(a, b, acc, PTX: tl.constexpr):
    """acc + the dot product of four unsigned bytes in a with four signed bytes in b; all int32."""
    if PTX:
        acc = tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], tl.int32, is_pure=True, pack=1)
    else:
        for i in tl.static_range(4):
            acc += ((a >> (8 * i)) & 255) * ((b << (24 - 8 * i)) >> 24)
    return acc


@triton.jit
def _readable(end, row_tokens):
    """The first position not to read for tokens up to `end`, rounded up to 16 if a row goes on: loads then take four words."""
    return tl.minimum(tl.cdiv(end, 16) * 16, row_tokens)


@triton.jit
def _load_words(labels, offs_s, mask, l_sw, W: tl.constexpr):
    """Label words of the tokens offs_s of one row and KV head: W tensors of [tokens]."""
    words = ()
    for w in tl.static_range(W):
        words += (tl.load(labels + w * l_sw + offs_s, mask=mask, other=0),)
    return words


@triton.constexpr_function
def _slices(WIDTHS):
    """SLICES: byte-wise slices of a label word, in each of which a byte has one dim at most."""
    return 8 // _narrowest(WIDTHS)


@triton.constexpr_function
def _slice(WIDTHS, w, t):
    """The bits of a label word, as an int32, that are its t-th slice: of each byte the dim that begins there. 0: none does."""
    of_bytes = [bits for dims, bits in WIDTHS for _ in range(dims * bits // 8)][4 * w : 4 * w + 4]
    begin = t * _narrowest(WIDTHS)
    mask = sum((2**bits - 1 << begin) << 8 * i for i, bits in enumerate(of_bytes) if begin % bits == 0)
    return (mask + 2**31) % 2**32 - 2**31


@triton.jit
def _head_scores(words, query, W: tl.constexpr, WIDTHS: tl.constexpr, PTX: tl.constexpr):
    """Integer scores of tokens with W label words to one query head: codes . 8-bit query codes.

    query: SLICES int32 words for each label word.
    """
    SLICES: tl.constexpr = _slices(WIDTHS)
    score = tl.zeros_like(words[0])
    for t in tl.static_range(SLICES):
        part = tl.zeros_like(score)
        for w in tl.static_range(W):
            if _slice(WIDTHS, w, t) != 0:
                q = tl.load(query + w * SLICES + t) + tl.zeros_like(score)
                part = _dot4(words[w] & _slice(WIDTHS, w, t), q, part, PTX)
        # a slice stays where it is in its bytes, and its sum is shifted instead
        score += part >> (_narrowest(WIDTHS) * t)
    return score


@triton.jit
def _token_scores(words, query, G: tl.constexpr, W: tl.constexpr, WIDTHS: tl.constexpr, PTX: tl.constexpr):
    """The largest score of each token in a group. query: of each head the words of _head_scores, then what
    its scores are less by."""
    WORDS: tl.constexpr = W * _slices(WIDTHS) + 1
    best = _head_scores(words, query, W, WIDTHS, PTX)
    if G > 1:
        best -= tl.load(query + WORDS - 1)
    for g in tl.static_range(1, G):
        score = _head_scores(words, query + g * WORDS, W, WIDTHS, PTX)
        best = tl.maximum(best, score - tl.load(query + (g + 1) * WORDS - 1))
    return best


FORCED = tl.constexpr(2**30)  # key of a token that is attended in any case: above all scores
DEAD = tl.constexpr(-(2**31) + 1)  # key of a token that is not eligible: below all scores


@triton.jit
def _fours(s, TILE: tl.constexpr):
    """TILE consecutive numbers from s on as [4, TILE / 4]: every column is four in a row, which one thread holds."""
    return s + 4 * tl.arange(0, TILE // 4)[None, :] + tl.arange(0, 4)[:, None]


@triton.jit
def _listed(entries, s, total, TILE: tl.constexpr):
    """(keys, positions) of a list in memory from the s-th on, [4, TILE / 4] each."""
    inside = _fours(s, TILE) < total
    entry = tl.load(entries + _fours(s, TILE), mask=inside, other=0)
    return tl.where(inside, (entry >> 32).to(tl.int32), DEAD), entry.to(tl.int32)


BINS = tl.constexpr(256)  # parts of a range of keys that are counted at a time, the last for those above it


@triton.jit
def _nth_best(entries, total, low, high, n, TILE: tl.constexpr):
    """(the n-th best key of a list in memory, how many are better). low: one that n keys reach; high: the largest below FORCED."""
    above = 0
    shift = 31
    bins = tl.arange(0, BINS)
    while shift > 0:
        shift = 0
        while (high - low) >> shift >= BINS - 1:
            shift += 1
        count = tl.zeros([BINS], tl.int32)
        for s in range(0, total, TILE):
            key, _ = _listed(entries, s, total, TILE)
            part = tl.where(key > high, BINS - 1, (tl.minimum(tl.maximum(key, low), high) - low) >> shift)
            count += tl.histogram(tl.ravel(part), BINS)
        reached = tl.sum(count) - tl.cumsum(count, 0) + count
        best = tl.minimum(tl.max(tl.where(reached >= n, bins, 0)), (high - low) >> shift)
        above = tl.sum(tl.where(bins > best, count, 0))
        low += best << shift
        high = tl.minimum(low + (1 << shift) - 1, high)
    return low, above


@triton.jit
def _search(keys, low, high, wanted, slack):
    """The largest value in [low, high] that `wanted` keys reach, as they do low, or one that `wanted` to `wanted` + slack reach.

    Keys: at most 32,767, so that one sum counts for two thresholds; each pass leaves a third of the range.
    """
    while low < high:
        third = (high - low + 2) // 3
        lower = low + third
        upper = tl.minimum(lower + third, high)
        both = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16))
        at_upper = (both >> 16) >= wanted
        reached = tl.where(at_upper, both >> 16, both & 0xFFFF)
        low = tl.where(at_upper, upper, tl.where(reached >= wanted, lower, low))
        high = tl.where(at_upper, high, tl.where(reached >= wanted, upper - 1, lower - 1))
        high = tl.where((reached >= wanted) & (reached <= wanted + slack), low, high)
    return low


@triton.jit
def _log_weight(scores, counted, share, unit):
    """log_weight_ref of one head. scores [M] int32; share [M]: what a token stands for, 2**18 for one."""
    top = tl.max(tl.where(counted, scores, -FORCED))
    lower = tl.maximum((top - scores).to(tl.float32) * (unit * 1.4426950408889634), 0.0)
    whole = tl.floor(lower)
    weight = ((2 - (lower - whole)) * share).to(tl.int32) >> tl.minimum(whole, 31.0).to(tl.int32)
    total = tl.sum(tl.where(counted, weight, 0)).to(tl.float32)
    even = tl.sum(tl.where(counted, (2 * share).to(tl.int32), 0)).to(tl.float32)
    log2 = total.to(tl.int32, bitcast=True) - even.to(tl.int32, bitcast=True)  # linear between powers of two
    inverse = tl.where(unit > 0, tl.div_rn(0.6931471805599453, unit), 0.0)
    return top + tl.floor(log2.to(tl.float32) * (2.0**-23) * inverse + 0.5).to(tl.int32)


@triton.jit
def _bracket(q, channel, steps, offs_c, labels, query, seq_len, start, n, row_tokens, sink, unit, q_sh, l_sw,
             G: tl.constexpr, W: tl.constexpr, WIDTHS: tl.constexpr, M: tl.constexpr, RUN: tl.constexpr,
             MARGIN: tl.constexpr, PTX: tl.constexpr):
    """Writes a row's query codes, and from a sample of M tokens what each head's scores are less by; returns a
    lower bracket of the n-th best score. unit: of the scores, over the largest of the query's products."""
    SLICES: tl.constexpr = _slices(WIDTHS)
    C: tl.constexpr = _dims(WIDTHS)
    live = seq_len - start
    # the sample: aligned runs of RUN tokens, spread over the live ones
    RUNS: tl.constexpr = M // RUN
    run = tl.arange(0, M) // RUN
    spread = tl.maximum(live, M)
    sampled = (start + run * (spread // RUNS) + run * (spread % RUNS) // RUNS) // RUN * RUN + tl.arange(0, M) % RUN
    inside = (sampled < seq_len) & (sampled >= start)
    words = _load_words(labels, sampled, sampled < _readable(seq_len, row_tokens), l_sw, W)
    # the query's label codes, laid out as the label words are sliced: byte b of word (w, t) is of the dim that begins there in
    # slice t of label word w; where none does the byte is not written, and meets a zero of the slice
    WORDS: tl.constexpr = W * SLICES + 1
    offs_g = tl.arange(0, triton.next_power_of_2(G))
    mask = (offs_g < G)[:, None] & (offs_c < C)[None, :]
    products = tl.load(q + offs_g[:, None] * q_sh + channel[None, :], mask=mask, other=0.0)
    products = products.to(tl.float32) * steps[None, :]
    largest = tl.max(tl.abs(products))
    scale = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
    bit, _ = _dim_bits(offs_c, WIDTHS)
    place = (bit // 32 * SLICES + bit % 8 // _narrowest(WIDTHS)) * 4 + bit // 8 % 4
    codes = tl.floor(products * scale + 0.5).to(tl.int8)  # in [-127, 127]
    of_heads = query.to(tl.pointer_type(tl.int8), bitcast=True) + offs_g[:, None] * (4 * WORDS)
    tl.store(of_heads + place[None, :], codes, mask=mask)
    tl.debug_barrier()  # the query words are read back in another order
    if G > 1:
        counted = inside & (sampled < seq_len - 1)
        share = tl.where(sampled < sink, 2.0**18 * tl.div_rn(M * 1.0, spread.to(tl.float32)), 2.0**18)
        best = tl.full([M], DEAD, tl.int32)
        for g in range(G):  # not unrolled: it would take long to compile
            score = _head_scores(words, query + g * WORDS, W, WIDTHS, PTX)
            weight = _log_weight(score, counted, share, largest * unit)
            tl.store(query + (g + 1) * WORDS - 1, weight)
            best = tl.maximum(best, score - weight)
        tl.debug_barrier()
    bracket = DEAD + 1
    portion = M * (n.to(tl.float32) / live)
    wanted = (portion + MARGIN * tl.sqrt(portion)).to(tl.int32) + 1
    if (wanted < M // 2) & (live >= M):
        if G == 1:
            best = _head_scores(words, query, W, WIDTHS, PTX)
        keys = tl.where(inside, best, DEAD)
        low, high = tl.min(tl.where(inside, keys, FORCED)), tl.max(keys)
        bracket = _search(keys, low, high, wanted, wanted // 32)
    return bracket


@triton.jit
def _forced(n, sink, recent):
    """How many of the newest and of the first tokens are among n in any case."""
    n_recent = tl.minimum(recent, n)
    return n_recent, tl.minimum(sink, n - n_recent)


@triton.jit
def _token_keys(scores, s, seq_len, start, n, sink, recent, BLOCK_S: tl.constexpr):
    """Scores of the block from token s on, with the tokens that are attended in any case on top and those not eligible at the
    bottom."""
    keys = scores
    n_recent, n_sink = _forced(n, sink, recent)
    if (s < tl.maximum(n_sink, start)) | (s + BLOCK_S > seq_len - n_recent):
        offs_s = s + tl.arange(0, BLOCK_S)
        keys = tl.where((offs_s >= seq_len - n_recent) | (offs_s < n_sink), FORCED, keys)
        keys = tl.where((offs_s < seq_len) & (offs_s >= start), keys, DEAD)
    return keys


@triton.jit
def _entry(key, position):
    """Key and position of a candidate in one int64."""
    return (key.to(tl.int64) << 32) | position.to(tl.int64)


@triton.jit
def _append(entries, slot, key, position, bracket):
    """Lists the candidates of one position in every group of tokens; returns the groups' next slots."""
    keep = key >= bracket
    tl.store(entries + slot, _entry(key, position), mask=keep)
    return slot + keep.to(tl.int32)


@triton.jit
def _candidates(entries, counts, before, s, groups, BLOCK_S: tl.constexpr, LOG_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """The candidates of a row from the s-th on, as [4, TILE / 4]: (keys, positions, where these lie, which lie there at all).

    A block's list fills whole groups of four slots; counts, before [2**LOG_BLOCKS]: its candidates, and the groups before it.
    """
    group = s // 4 + tl.arange(0, TILE // 4)
    block = tl.zeros_like(group)
    for i in range(LOG_BLOCKS):  # the last block that begins at or before the group; not unrolled: that took seconds to compile
        probe = block + (2**LOG_BLOCKS >> (i + 1))
        block = tl.where(tl.load(before + probe) <= group, probe, block)
    nth = group - tl.load(before + block)
    offset = (block * (BLOCK_S // 4) + nth) * 4
    inside = (group < groups)[None, :]
    listed = (tl.arange(0, 4)[:, None] < (tl.load(counts + block) - 4 * nth)[None, :]) & inside
    offset = offset[None, :] + tl.arange(0, 4)[:, None]
    entry = tl.load(entries + offset, mask=inside, other=0)
    return tl.where(listed, (entry >> 32).to(tl.int32), DEAD), entry.to(tl.int32), offset, inside


@triton.jit
def _both(key, threshold):
    """1 << 16 for a key above the threshold, 1 for one tied with it: their sum counts both, of up to 32,767 keys."""
    return ((key > threshold).to(tl.int32) << 16) + (key == threshold).to(tl.int32)


@triton.jit
def _place(key, position, threshold, room, above, ties, indices):
    """Writes the chosen ones of candidates [4, any] behind `above` better and `ties` tied ones; returns both for the next."""
    both = _both(key, threshold)
    column = tl.sum(both, 0)
    upto = (tl.cumsum(column, 0) - column)[None, :] + tl.cumsum(both, 0)
    tied = ties + (upto & 0xFFFF)
    chosen = (key > threshold) | ((key == threshold) & (tied <= room))
    tl.store(indices + above + (upto >> 16) + tl.minimum(tied, room) - 1, position, mask=chosen)
    count = tl.sum(column, 0)
    return above + (count >> 16), ties + (count & 0xFFFF)


@triton.jit
def _take_best(entries, total, low, high, n, indices, TILE: tl.constexpr):
    """The positions of the n best of a list in memory, in its order, which is that of positions."""
    threshold, better = _nth_best(entries, total, low, high, n, TILE)
    above = 0
    ties = 0
    for s in range(0, total, TILE):
        key, position = _listed(entries, s, total, TILE)
        above, ties = _place(key, position, threshold, n - better, above, ties, indices)


@triton.jit
def _emit(words, labels, query, entries, counts, begin, end, seq_len, start, n, bracket, row_tokens, sink, recent, l_sw,
          W: tl.constexpr, WIDTHS: tl.constexpr, G: tl.constexpr, BLOCK_S: tl.constexpr, PTX: tl.constexpr):
    """Scores a row's tokens from begin to end, the first block of which is in `words`, and lists, block by block, the
    candidates: those at or above the bracket."""
    readable = _readable(end, row_tokens)
    offs_s = tl.arange(0, BLOCK_S)
    group = tl.arange(0, BLOCK_S // 4)
    for s in range(begin, end, BLOCK_S):
        following = _load_words(labels, s + BLOCK_S + offs_s, s + BLOCK_S + offs_s < readable, l_sw, W)
        scores = _token_scores(words, query, G, W, WIDTHS, PTX)
        block = _token_keys(scores, s, seq_len, start, n, sink, recent, BLOCK_S)
        # a thread holds four tokens in a row: count them, place the groups, list their tokens one by one
        even, odd = tl.split(tl.reshape(block, [BLOCK_S // 4, 2, 2]))
        key_0, key_2 = tl.split(even)
        key_1, key_3 = tl.split(odd)
        count = ((key_0 >= bracket).to(tl.int32) + (key_1 >= bracket).to(tl.int32) + (key_2 >= bracket).to(tl.int32)
                 + (key_3 >= bracket).to(tl.int32))
        upto = tl.cumsum(count, 0)
        slot = s + upto - count
        position = s + 4 * group
        slot = _append(entries, slot, key_0, position, bracket)
        slot = _append(entries, slot, key_1, position + 1, bracket)
        slot = _append(entries, slot, key_2, position + 2, bracket)
        _append(entries, slot, key_3, position + 3, bracket)
        tl.store(counts + s // BLOCK_S + tl.zeros_like(upto), upto, mask=group == BLOCK_S // 4 - 1)
        words = following


@triton.jit
def _take_listed(entries, counts, before, groups, n, bracket, indices, BLOCK_S: tl.constexpr, LOG_BLOCKS: tl.constexpr,
                 TILE: tl.constexpr):
    """The positions of the n best candidates, all of which reach the bracket, ascending."""
    key, _, offset, inside = _candidates(entries, counts, before, 0, groups, BLOCK_S, LOG_BLOCKS, TILE)
    low = tl.maximum(bracket, -FORCED)
    high = tl.maximum(tl.max(tl.where(key < FORCED, key, DEAD)), low)
    threshold = _search(key, low, high, n, 0)
    room = n - tl.sum((key > threshold).to(tl.int32))
    position = tl.load(entries + offset, mask=inside, other=0).to(tl.int32)  # again: registers are scarcer than loads
    _place(key, position, threshold, room, 0, 0, indices)


SEEN = tl.constexpr(2**62)  # a word of no program, of later than any turn
SHARED_BINS = tl.constexpr(32)  # parts of a range of keys that programs which share a row count at a time; more would take longer


@triton.jit
def _exchange(board, part, turn, values, PLACERS: tl.constexpr, LANES: tl.constexpr):
    """What each of a row's programs gives in its turn-th exchange, int32: as [LANES, SHARED_BINS], zeros from PLACERS on. Waits
    for all of them. values: [SHARED_BINS], or one for all of these.

    board [2, PLACERS, SHARED_BINS] int64, zeroed before: turn << 32 and value, of the last two turns. None is overwritten unread:
    who writes has seen the turn between, which others wrote when they had read. All of a row's programs run at a time: no more
    than multiprocessors, they start in the order of their numbers, as on NVIDIA's GPUs. LANES: so many that no two threads read
    one word, which they might see at different times.
    """
    bins = tl.arange(0, SHARED_BINS)
    lanes = tl.arange(0, LANES)[:, None]
    board += turn % 2 * PLACERS * SHARED_BINS
    given = tl.zeros([SHARED_BINS], tl.int64) + (values.to(tl.int64) & 0xFFFFFFFF) + (turn.to(tl.int64) << 32)
    tl.atomic_xchg(board + part * SHARED_BINS + bins, given, sem="relaxed")
    words = tl.zeros([LANES, SHARED_BINS], tl.int64)
    while tl.min((words >> 32).to(tl.int32)) < turn:
        words = tl.load(board + lanes * SHARED_BINS + bins[None, :], mask=lanes < PLACERS, other=SEEN, volatile=True)
    return words.to(tl.int32)


@triton.jit
def _cut_shared(key, board, part, low, n, LOG_STEP: tl.constexpr, PLACERS: tl.constexpr, LANES: tl.constexpr):
    """The n-th best of the candidates of all of a row's programs, each of which has a part of them in `key`; all reach low.

    The n-th best is looked for in 31 steps of 2**LOG_STEP from low up, then within one of them or, if it is beyond, in longer ones.
    Returns (threshold, how many of those tied with it are taken, better and tied candidates in the parts before).
    """
    bins = tl.arange(0, SHARED_BINS)
    before = tl.arange(0, LANES)[:, None] < part
    turn = 0
    log_step = LOG_STEP + 0
    high = low + ((SHARED_BINS - 1) << LOG_STEP) - 1
    room, above, ties = n, n, n  # what the loop sets
    more = low <= high  # at first always
    while more:
        turn += 1
        # those above high in the last bin, those below low in none
        bin = tl.where(key > high, SHARED_BINS - 1, tl.where(key < low, SHARED_BINS, (key - low) >> log_step))
        bin = tl.ravel(tl.trans(bin))  # as they lie in the threads
        of_parts = _exchange(board, part, turn, tl.histogram(bin, SHARED_BINS, mask=bin < SHARED_BINS), PLACERS, LANES)
        count, earlier = tl.sum(of_parts, 0), tl.sum(tl.where(before, of_parts, 0), 0)
        best = tl.sum((tl.cumsum(count, 0, reverse=True) >= n).to(tl.int32)) - 1
        better, above = tl.sum(tl.where(bins > best, count, 0)), tl.sum(tl.where(bins > best, earlier, 0))
        ties = tl.sum(tl.where(bins == best, earlier, 0))
        room = n - better
        beyond = best == SHARED_BINS - 1
        more = beyond | (log_step > 0)
        low = tl.where(beyond, high + 1, low + (best << log_step))
        within = low + (1 << log_step) - 1
        # 31 steps beyond stay below 2**31; one step within falls into 16, as 32 would leave no bin for those above
        log_step = tl.where(beyond, tl.minimum(log_step + 5, 25), tl.maximum(log_step - 4, 0))
        high = tl.where(beyond, tl.minimum(low + ((SHARED_BINS - 1) << log_step) - 1, FORCED), within)
    return low, room, above, ties


@triton.jit
def _take_shared(entries, board, counts, before, groups, n, bracket, indices, part, LOG_STEP: tl.constexpr, BLOCK_S: tl.constexpr,
                 LOG_BLOCKS: tl.constexpr, PLACERS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr):
    """_take_listed by PLACERS programs, of which each has a part of the candidates in registers, and places it."""
    first = part * tl.cdiv(groups, PLACERS)
    last = tl.minimum(first + tl.cdiv(groups, PLACERS), groups)
    key, position, _, _ = _candidates(entries, counts, before, 4 * first, last, BLOCK_S, LOG_BLOCKS, TILE)
    threshold, room, above, ties = _cut_shared(key, board, part, tl.maximum(bracket, -FORCED), n, LOG_STEP, PLACERS, LANES)
    _place(key, position, threshold, room, above, ties, indices)


@triton.jit
def _choose(labels, query, entries, board, counts, before, long_entries, indices, row, S, longest, max_tokens, seq_len, start, n,
            bracket, sink, recent, l_sw, part, W: tl.constexpr, WIDTHS: tl.constexpr, G: tl.constexpr, BLOCK_S: tl.constexpr,
            LOG_BLOCKS: tl.constexpr, PLACERS: tl.constexpr, SHARE: tl.constexpr, LOG_STEP: tl.constexpr, TILE: tl.constexpr,
            TIERS: tl.constexpr, TILE_LONG: tl.constexpr, PTX: tl.constexpr):
    """Exactly n of a row's candidates, ascending. Lists of up to TILE * 2**(TIERS - 1) are searched in registers, by the first
    of PLACERS programs of a row, those of up to SHARE for each of these by all of them, longer ones in memory, by the first.
    labels, query, entries, board, counts: the row's."""
    before += row.to(tl.int64) * 2**LOG_BLOCKS
    long_entries += row.to(tl.int64) * longest
    indices += row.to(tl.int64) * max_tokens
    first = start // BLOCK_S * BLOCK_S
    block = tl.arange(0, 2**LOG_BLOCKS)
    live = (block >= first // BLOCK_S) & (block * BLOCK_S < seq_len)
    count = tl.load(counts + block, mask=live, other=0)
    total = tl.sum(count, 0)
    column = (count + 3) // 4
    groups = tl.sum(column, 0)
    tl.store(before + block, tl.cumsum(column, 0) - column)
    tl.debug_barrier()
    missed = total < n
    for i in tl.static_range(TIERS):  # in registers, as many as it takes: the cost follows the live length
        if (groups * 4 <= TILE << i) & ((i == 0) | (groups * 4 > TILE << i >> 1)) & (not missed) & (part == 0):
            _take_listed(entries, counts, before, groups, n, bracket, indices, BLOCK_S, LOG_BLOCKS, TILE << i)
    too_long = groups * 4 > TILE << (TIERS - 1)
    if SHARE:
        THREADS: tl.constexpr = TILE_LONG // 8  # TILE_LONG: 8 candidates to a thread
        LANES: tl.constexpr = THREADS // SHARED_BINS if THREADS > PLACERS * SHARED_BINS else PLACERS
        if too_long & (groups * 4 <= SHARE * PLACERS) & (not missed):
            _take_shared(entries, board, counts, before, groups, n, bracket, indices, part, LOG_STEP, BLOCK_S, LOG_BLOCKS, PLACERS,
                         LANES, SHARE)
        too_long &= groups * 4 > SHARE * PLACERS
    if (missed | too_long) & (part == 0):
        low = tl.maximum(bracket, -FORCED)
        high = low
        if (groups * 4 <= longest) & (not missed):
            # in memory, the blocks' lists one behind the other
            total = groups * 4
            for s in range(0, total, TILE_LONG):
                key, position, _, inside = _candidates(entries, counts, before, s, groups, BLOCK_S, LOG_BLOCKS, TILE_LONG)
                entry = _entry(key, tl.where(key > DEAD, position, 0))  # what lies where nothing is listed may be anything
                tl.store(long_entries + _fours(s, TILE_LONG), entry, mask=inside)
                high = tl.maximum(high, tl.max(tl.where(key < FORCED, key, DEAD)))
        else:  # rare: all tokens are candidates
            low = -FORCED + 0
            high = -FORCED + 0
            total = seq_len - first
            long_entries = entries + first
            for s in range(first, seq_len, BLOCK_S):
                offs_s = s + tl.arange(0, BLOCK_S)
                words = _load_words(labels, offs_s, offs_s < seq_len, l_sw, W)
                scores = _token_scores(words, query, G, W, WIDTHS, PTX)
                key = _token_keys(scores, s, seq_len, start, n, sink, recent, BLOCK_S)
                tl.store(entries + offs_s, _entry(key, offs_s), mask=offs_s < seq_len)
                high = tl.maximum(high, tl.max(tl.where(key < FORCED, key, DEAD)))
        tl.debug_barrier()
        _take_best(long_entries, total, low, high, n, indices, TILE_LONG)


@triton.jit
def _select_kernel(q, channels, step, labels, seq_lens, n_tokens, query, lower, entries, board, counts, before, long_entries, indices,
                   chosen, q_sb, q_sh, l_sb, l_sh, l_sw, S, row_tokens, longest, max_tokens, window, n_fixed, min_tokens, share_num,
                   share_den, sink, recent, unit, HKV: tl.constexpr, G: tl.constexpr, W: tl.constexpr, WIDTHS: tl.constexpr,
                   M: tl.constexpr, RUN: tl.constexpr, MARGIN: tl.constexpr, BLOCK_S: tl.constexpr, LOG_BLOCKS: tl.constexpr,
                   BRACKET: tl.constexpr, EMIT: tl.constexpr, SEGMENTS: tl.constexpr, CHOOSE: tl.constexpr, PLACERS: tl.constexpr,
                   SHARE: tl.constexpr, LOG_STEP: tl.constexpr, TILE: tl.constexpr, TIERS: tl.constexpr, TILE_LONG: tl.constexpr,
                   PTX: tl.constexpr, PDL: tl.constexpr, ANNOUNCE: tl.constexpr):
    """One, or all, of the three stages of a selection; SEGMENTS programs share a row and KV head: its tokens in EMIT, in CHOOSE
    its list."""
    row, segment = tl.program_id(0) // SEGMENTS, tl.program_id(0) % SEGMENTS
    pid_b, pid_h = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
    SLICES: tl.constexpr = _slices(WIDTHS)
    BLOCKS: tl.constexpr = 2**LOG_BLOCKS
    if BRACKET:
        C: tl.constexpr = _dims(WIDTHS)
        offs_c = tl.arange(0, triton.next_power_of_2(C))
        steps = tl.load(step + pid_h * C + offs_c, mask=offs_c < C, other=1.0)
        channel = tl.load(channels + pid_h * C + offs_c, mask=offs_c < C, other=0)
        if PDL:  # all before this is constant; all after it may have been written by the kernel before
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    labels += pid_b * l_sb + pid_h * l_sh
    query += row.to(tl.int64) * G * (W * SLICES + 1)
    entries += row.to(tl.int64) * tl.cdiv(S, BLOCK_S) * BLOCK_S
    counts += row.to(tl.int64) * BLOCKS
    board += row * 2 * PLACERS * SHARED_BINS
    seq_len = tl.load(seq_lens + pid_b)
    start = tl.maximum(seq_len - window, 0)
    first = start // BLOCK_S * BLOCK_S
    n = _budget(seq_len, window, n_fixed, min_tokens, share_num, share_den)
    if BRACKET:
        bracket = _bracket(q + pid_b * q_sb + pid_h * G * q_sh, channel, steps, offs_c, labels, query, seq_len, start, n, row_tokens,
                           sink, unit, q_sh, l_sw, G, W, WIDTHS, M, RUN, MARGIN, PTX)
        tl.store(n_tokens + row, n)
        tl.store(lower + row, bracket)
        if SHARE:
            tl.store(board + tl.arange(0, 2 * PLACERS * SHARED_BINS), 0)
    if EMIT:
        span = tl.cdiv(seq_len - first, SEGMENTS * BLOCK_S) * BLOCK_S
        begin = first + segment * span
        end = tl.minimum(begin + span, seq_len)
        offs_s = begin + tl.arange(0, BLOCK_S)
        words = _load_words(labels, offs_s, offs_s < _readable(end, row_tokens), l_sw, W)
    if not BRACKET:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        bracket = tl.load(lower + row)
    if EMIT:
        _emit(words, labels, query, entries, counts, begin, end, seq_len, start, n, bracket, row_tokens, sink, recent, l_sw, W,
              WIDTHS, G, BLOCK_S, PTX)
    if CHOOSE:
        if EMIT:
            tl.debug_barrier()
        _choose(labels, query, entries, board, counts, before, long_entries, indices, row, S, longest, max_tokens, seq_len, start,
                n, bracket, sink, recent, l_sw, segment, W, WIDTHS, G, BLOCK_S, LOG_BLOCKS, PLACERS, SHARE, LOG_STEP, TILE, TIERS,
                TILE_LONG, PTX)
        if ANNOUNCE:
            tl.debug_barrier()  # after all that the program wrote
            tl.atomic_xchg(chosen + row, 1, sem="release")


NO_WINDOW = 2**30  # "window" of a kernel call without one: longer than any cache
SAMPLE = 2048  # tokens that bracket the n-th score; rows of less than that are searched whole
RUN = 16  # of them side by side: the 64 bytes that memory gives at a time
MARGIN = 6.0  # standard deviations of a sampled rank between the bracket and the n-th score: neighbours are alike
BLOCK = 1024  # tokens that emit scores at a time; twice as many of one word each, where all stages are one launch
TILE = 2048  # candidates that choose searches in registers; doubled for long contexts, up to MAX_TILE
MAX_TILE = 16384
FEW_ROWS = 128  # up to so many leave multiprocessors idle; up to half of it several programs share a row's list
MANY_ROWS = 256  # with more, programs are small, and search lists of up to 2 * TILE in registers
SHARING = 256  # programs of choose, where several share a list, of TILE / 2 to 2 * TILE candidates each
MAX_PLACERS = 32  # of these to a row
PROGRAMS = 1024  # that fill the GPU: fewer rows are shared by so many
FUSED_ROWS = 512  # from here on one program a row fills the GPU: one launch selects


def nvidia(tensor):
    return tensor.is_cuda and torch.version.cuda is not None


def pdl(tensor):
    """Whether kernels may start while the one before them ends (programmatic dependent launch)."""
    return nvidia(tensor) and torch.cuda.get_device_capability(tensor.device)[0] >= 9


class Workspace:
    """Scratch memory of the decode kernels for one shape of batch and cache; layers that run in turn share one.

    Nothing in it carries over from call to call: a new prompt, another length or batch row start clean.
    """

    def __init__(self, B, HQ, HKV, D, S, device, config=None, window=None, splits=None, segments=None):
        """config: DSConfig, or None for dense decode alone. splits, segments: programs that share a row's tokens in attend (at
        most) and in emit; powers of two."""
        def scratch(*shape, dtype=torch.int32):
            return torch.empty(*shape, dtype=dtype, device=device)

        R = B * HKV
        self.shape = (B, HQ, HKV, D, S)
        shared = min(64, triton.next_power_of_2(triton.cdiv(PROGRAMS, R)))
        self.splits = splits or shared
        self.partial = scratch(B * HQ, self.splits, D, dtype=torch.float32)
        self.partial_lse = scratch(B * HQ, self.splits, dtype=torch.float32)
        self.arrived, self.chosen = torch.zeros(2, R, dtype=torch.int32, device=device)  # attend's last program resets both
        if config is not None:
            self.segments = segments or (1 if R >= FUSED_ROWS else shared)
            self.n_tokens, self.lower = scratch(B, HKV), scratch(R)
            self.widths = config.widths(D)
            self.query = scratch(R, HQ // HKV * (config.words(D) * _slices(self.widths) + 1))
            self.block = 2 * BLOCK if self.segments == 1 and config.words(D) == 1 else BLOCK
            self.blocks = triton.next_power_of_2(triton.cdiv(S, self.block))
            self.entries = scratch(R, triton.cdiv(S, self.block) * self.block, dtype=torch.int64)
            self.counts, self.before = scratch(R, self.blocks), scratch(R, self.blocks)
            max_tokens = config.budget(S if window is None else min(S, window))
            self.plan_choose(R, triton.next_power_of_2(max_tokens * 7 // 4))
            # 31 steps of 2**log_step from the bracket up reach the n-th score, of random and of real rows (notes-attention.md)
            largest = sum(127 * dims * (2**bits - 1) for dims, bits in self.widths)
            self.log_step = max(0, largest.bit_length() - 12)
            self.board = scratch(R, 2, self.placers, SHARED_BINS.value, dtype=torch.int64)
            # whether attend may begin with a row while others are still being chosen, as the one program that chooses it says: with
            # few rows, or not many and long lists, it gave nothing
            self.announced = R >= FEW_ROWS and (self.tile == TILE or R > MANY_ROWS) and not self.share and pdl(self.lower)
            self.longest = 4 * max_tokens  # candidates searched in memory
            self.long_entries = scratch(R, self.longest, dtype=torch.int64)
            self.indices = scratch(B, HKV, max_tokens)

    def plan_choose(self, R, candidates):
        """Sets how many candidates of a row one program of choose has in registers (tile), and how many programs share a longer
        list and have how many of it each (placers, share; 0: none do). What is longer than that is searched in memory."""
        most = MAX_TILE if R <= MANY_ROWS else 2 * TILE
        self.tile, self.placers, self.share = min(max(TILE, candidates), most), 1, 0
        # programs that share wait for each other: the interpreter runs one after the other
        if self.segments > 1 and candidates > (2 * TILE if R <= FEW_ROWS // 2 else most) and nvidia(self.lower):
            multiprocessors = torch.cuda.get_device_properties(self.lower.device).multi_processor_count
            at_a_time = min(MAX_PLACERS, 1 << multiprocessors.bit_length() - 1)
            least, enough = candidates // (2 * TILE), 2 * candidates // TILE
            self.placers = min(max(SHARING // triton.next_power_of_2(R), least), enough, at_a_time)
            self.tile, self.share = TILE, min(candidates // self.placers, MAX_TILE)


@dataclass
class Selection:
    """One call's arguments of the selection's three stages, which run in the order bracket, emit, choose."""

    q: torch.Tensor  # [B, HQ, D]
    labels: torch.Tensor  # [B, HKV, W, S] int32
    label_map: LabelMap
    seq_lens: torch.Tensor  # [B] int32
    config: DSConfig
    workspace: Workspace
    window: int | None = None
    portable: bool = False  # without PTX instructions, as on other vendors' GPUs
    announced: bool = False  # what is chosen is announced to attend, called right after, row by row

    def __post_init__(self):
        widths = self.label_map.widths
        assert widths == self.config.widths(self.q.shape[2]), "a label map of other widths"
        assert self.q.stride(2) == self.labels.stride(3) == 1
        assert not (self.announced and self.workspace.share), "several programs choose a row: none knows when it is chosen"
        B, HKV, W, S = self.labels.shape
        assert (B, self.q.shape[1], HKV, self.q.shape[2], S) == self.workspace.shape, "a workspace of another shape"
        assert widths == self.workspace.widths, "a workspace for labels of other widths"
        assert self.config.budget(S if self.window is None else min(S, self.window)) <= self.workspace.indices.shape[2], (
            "a workspace for fewer tokens")
        self.rows = B * HKV
        self.nvidia = not self.portable and nvidia(self.q)
        self.overlapped = not self.portable and pdl(self.q)

    def stages(self):
        """What runs, in order: the three stages, or where one program a row fills the GPU, all in one launch."""
        return [self.at_once] if self.workspace.segments == 1 else [self.bracket, self.emit, self.choose]

    def at_once(self, num_warps=None):
        num_warps = num_warps or (4 if self.labels.shape[2] <= 2 else 8)
        # so many registers that a multiprocessor holds four rows
        self.launch(bracket=True, emit=True, choose=True, num_warps=num_warps, registers=512 // num_warps)

    def bracket(self, num_warps=8):
        """The query's codes, the budget, and a lower bracket of the n-th score from SAMPLE tokens."""
        self.launch(bracket=True, num_warps=num_warps, registers=128)

    def emit(self, num_warps=8):
        """The candidates: tokens at or above the bracket, block by block."""
        self.launch(self.workspace.segments, emit=True, num_warps=num_warps)

    def choose(self, num_warps=None):
        """Exactly n of them, into workspace.indices; once after each bracket."""
        ws = self.workspace
        per_warp = 256 if self.rows <= MANY_ROWS else 512  # few rows leave multiprocessors idle: more warps to each
        self.launch(ws.placers, choose=True, num_warps=num_warps or (8 if ws.share else max(1, min(16, ws.tile // per_warp))))

    def readable_tokens(self):
        """Tokens that may be read of a row of label words: up to the next multiple of 16, if the memory goes on so far."""
        S, offset = self.labels.shape[3], self.labels.storage_offset()
        last = offset + sum((n - 1) * stride for n, stride in zip(self.labels.shape, self.labels.stride()))
        beyond = self.labels.untyped_storage().nbytes() // 4 - 1 - last
        return S + (-S % 16 if -S % 16 <= beyond else 0)

    def launch(self, segments=1, bracket=False, emit=False, choose=False, num_warps=4, registers=None):
        """Some stages in one launch, of `segments` programs a row. registers: at most so many per thread."""
        m, ws, c, (HKV, W, S), D = self.label_map, self.workspace, self.config, self.labels.shape[1:], self.q.shape[2]
        G, (share_num, share_den) = self.q.shape[1] // HKV, c.share()
        limits = dict(maxnreg=registers) if registers and self.nvidia else {}
        _select_kernel[(self.rows * segments,)](
            self.q, m.channels, m.step, self.labels, self.seq_lens, ws.n_tokens, ws.query, ws.lower, ws.entries, ws.board,
            ws.counts, ws.before, ws.long_entries, ws.indices, ws.chosen, *self.q.stride()[:2], *self.labels.stride()[:3], S,
            self.readable_tokens(), ws.longest, ws.indices.shape[2], NO_WINDOW if self.window is None else self.window,
            c.n_tokens or 0, c.min_tokens, share_num, share_den, c.sink, c.recent, 1 / 127 / math.sqrt(D), HKV, G,
            W, m.widths, SAMPLE, RUN, MARGIN, ws.block, ws.blocks.bit_length() - 1, BRACKET=bracket,
            EMIT=emit, SEGMENTS=segments, CHOOSE=choose, PLACERS=ws.placers, SHARE=ws.share, LOG_STEP=ws.log_step, TILE=TILE,
            TIERS=max(1, (ws.tile // TILE).bit_length()), TILE_LONG=256 * num_warps, PTX=self.nvidia,
            PDL=self.overlapped, ANNOUNCE=choose and self.announced, num_warps=num_warps,
            enable_fp_fusion=False,  # codes round as the reference's do: ties between two are common
            **limits, **(dict(launch_pdl=True) if self.overlapped else {}))


def select(q, labels, label_map, seq_lens, config, window=None, workspace=None, portable=False, announced=False):
    """select_tokens by kernels, in at most three launches, without writing the scores: what comes back is in the workspace, and
    indices past n_tokens are not written."""
    B, HQ, D = q.shape
    HKV, _, S = labels.shape[1:]
    workspace = workspace or Workspace(B, HQ, HKV, D, S, q.device, config, window)
    for stage in Selection(q, labels, label_map, seq_lens, config, workspace, window, portable, announced).stages():
        stage()
    return workspace.indices, workspace.n_tokens


def select_tokens(q, labels, label_map, seq_lens, config, window=None, workspace=None):
    """The tokens that a decode step attends to, with the configured implementation; inputs as in score_ref.

    Returns (indices [B, HKV, N] int32, ascending, of which the first n_tokens count; n_tokens [B, HKV] int32).
    """
    if config.use_triton(q):
        return select(q, labels, label_map, seq_lens, config, window, workspace)
    n_tokens = config.budget(live_range(seq_lens, window)[1])
    scores = score_ref(q, labels, label_map, seq_lens, config.sink, window)
    n_tokens = per_head(n_tokens, labels.shape[1])
    return select_ref(scores, seq_lens, n_tokens, int(n_tokens.max()), config.sink, config.recent, window), n_tokens


# ---------------------------------------------------------------- attend


def attend_ref(q, k, v, seq_lens, indices=None, n_tokens=None, window=None):
    """Exact attention of one query per row over the selected tokens, or over all eligible ones (dense decode).

    q [B, HQ, D]; k, v [B, HKV, S, D]; seq_lens [B] int32; indices [B, HKV, N] int32 with n_tokens ([B] or [B, HKV]) valid entries
    in front, or None for all eligible tokens. Returns [B, HQ, D] in q's dtype; fp32 inside.
    """
    B, HQ, D = q.shape
    HKV, S = k.shape[1:3]
    if indices is None:
        valid = eligible_tokens(seq_lens, S, window)[:, None]  # [B, 1, S]
    else:
        valid = torch.arange(indices.shape[-1], device=q.device) < per_head(n_tokens, HKV)[..., None]  # [B, HKV, N]
        rows = indices.clamp(min=0).long()[..., None].expand(-1, -1, -1, D)
        k, v = k.gather(2, rows), v.gather(2, rows)  # [B, HKV, N, D]
    if k.stride(0) == 0:  # rows of one shared cache: no copies of it
        k, v, operand = k[0], v[0], "hnd"
    else:
        operand = "bhnd"
    grouped = q.float().view(B, HKV, HQ // HKV, D)
    logits = torch.einsum(f"bhgd,{operand}->bhgn", grouped, k.float()) / math.sqrt(D)  # [B, HKV, G, N]
    logits = logits.masked_fill(~valid[:, :, None], float("-inf"))
    return torch.einsum(f"bhgn,{operand}->bhgd", logits.softmax(-1), v.float()).reshape(B, HQ, D).to(q.dtype)


@triton.jit
def _attend_kernel(q, k, v, seq_lens, indices, n_tokens, partial, partial_lse, arrived, chosen, out, channels, lo, step, labels, newest,
                   max_tokens, window, scale_log2, q_sb, q_sh, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, l_sb, l_sh, l_sw, n_sb,
                   n_sh, n_ss, SPARSE: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, W: tl.constexpr,
                   WIDTHS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr, OVERLAP: tl.constexpr,
                   ANNOUNCED: tl.constexpr):
    if PDL and not OVERLAP:
        tl.extra.cuda.gdc_wait()
    row, pid_split = tl.program_id(0), tl.program_id(1)
    pid_b, pid_h = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
    offs_d, offs_g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
    mask_d, mask_g = offs_d < D, offs_g < G
    if W > 0:  # a program of its own: it takes as long as a short row's attention
        if pid_split == SPLITS:
            C: tl.constexpr = _dims(WIDTHS)
            last = tl.load(seq_lens + pid_b) - 1  # whoever reads this label in this step overrides its key with FORCED
            key = newest + pid_b * n_sb + pid_h * n_sh + last.to(tl.int64) * n_ss + tl.arange(0, 1)
            _label(key, tl.arange(0, 1) == 0, channels + pid_h * C, lo + pid_h * C, step + pid_h * C,
                   labels + pid_b * l_sb + pid_h * l_sh + last + tl.arange(0, 1), l_sw, W, WIDTHS)
            return
    query = tl.load(q + pid_b * q_sb + (pid_h * G + offs_g[:, None]) * q_sh + offs_d[None, :],
                    mask=mask_g[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_G, BLOCK_D]
    if UPCAST:
        query = query.to(tl.float32)
    seq_len = tl.load(seq_lens + pid_b)
    k += pid_b * k_sb + pid_h * k_sh
    v += pid_b * v_sb + pid_h * v_sh
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if ANNOUNCED:  # what ran before the selection has ended: all its programs waited for that before this one could begin
        while tl.atomic_add(chosen + row, 0, sem="acquire") == 0:  # its result is used, else Triton 3.6 leaves it out
            done = 0
            while done == 0:  # relaxed: to acquire is to drop the multiprocessor's L1 cache, which the selection uses
                done = tl.atomic_add(chosen + row, 0, sem="relaxed")
    elif PDL and OVERLAP:
        tl.extra.cuda.gdc_wait()
    begin = 0 if SPARSE else tl.maximum(seq_len - window, 0)
    end = tl.load(n_tokens + row) if SPARSE else seq_len
    per_split = tl.cdiv(end - begin, SPLITS * BLOCK_N) * BLOCK_N
    begin += pid_split * per_split
    end = tl.minimum(begin + per_split, end)
    offs_n = begin + tl.arange(0, BLOCK_N)
    token = offs_n
    if SPARSE:
        indices += row.to(tl.int64) * max_tokens
        token = tl.load(indices + offs_n, mask=offs_n < end, other=0)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        mask_n = n + tl.arange(0, BLOCK_N) < end
        mask = mask_n[:, None] & mask_d[None, :]
        rows = token.to(tl.int64)[:, None]
        keys = tl.load(k + rows * k_ss + offs_d[None, :], mask=mask, other=0.0)
        values = tl.load(v + rows * v_ss + offs_d[None, :], mask=mask, other=0.0)
        token = n + BLOCK_N + tl.arange(0, BLOCK_N)
        if SPARSE:  # a block ahead: its latency does not add to that of the rows
            token = tl.load(indices + token, mask=token < end, other=0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2  # [BLOCK_G, BLOCK_N]
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # an empty split keeps top = -inf: the combine gives it no weight
    head = row.to(tl.int64) * G + offs_g
    total = tl.where(total > 0, total, 1.0)
    mask = mask_g[:, None] & mask_d[None, :]
    tl.store(partial + (head * SPLITS + pid_split)[:, None] * D + offs_d[None, :], acc / total[:, None], mask=mask)
    tl.store(partial_lse + head * SPLITS + pid_split, top + tl.log2(total), mask=mask_g)
    # the last split to arrive combines all of them, in their order: whichever it is, the result has the same bits
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == SPLITS - 1:
        offs_s = tl.arange(0, SPLITS)
        for g in range(G):  # not unrolled: a head's parts take most registers
            part = (row.to(tl.int64) * G + g) * SPLITS + offs_s
            lse = tl.load(partial_lse + part, cache_modifier=".cg")
            weight = tl.exp2(lse - tl.max(lse, 0))  # [SPLITS]
            parts = tl.load(partial + part[:, None] * D + offs_d[None, :], mask=mask_d[None, :], other=0.0,
                            cache_modifier=".cg")  # [SPLITS, BLOCK_D]
            result = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
            tl.store(out + (row.to(tl.int64) * G + g) * D + offs_d, result.to(out.dtype.element_ty), mask=mask_d)
        tl.store(arrived + row, 0)
        if ANNOUNCED:
            tl.store(chosen + row, 0)


def attend(q, k, v, seq_lens, indices=None, n_tokens=None, window=None, workspace=None, labels=None, label_map=None,
           newest=None, overlap=False, announced=False, block_n=None, num_warps=None, stages=2):
    """As attend_ref; K and V are read once per KV head, by several programs, the last of which combines their parts.

    labels [B, HKV, W, S] int32 and label_map: if given, the label of each row's newest key is written, too; the key is read at
    seq_lens - 1 in `newest` [B, HKV, S, D], by default k. overlap: read q, k, v and seq_lens while `select`, called right before,
    ends; they must be older than that. announced: that call announced each row, and they are attended to as they are chosen.
    """
    B, HQ, D = q.shape
    HKV, S = k.shape[1:3]
    G = HQ // HKV
    newest = k if newest is None else newest
    assert q.stride(2) == k.stride(3) == v.stride(3) == newest.stride(3) == 1
    ws = workspace or Workspace(B, HQ, HKV, D, S, q.device)
    assert ws.shape[:4] == (B, HQ, HKV, D), "a workspace of another shape"
    out = torch.empty(B, HQ, D, dtype=q.dtype, device=q.device)
    m, W = label_map, 0 if labels is None else labels.shape[2]
    assert indices is None or indices.is_contiguous()
    if n_tokens is not None:
        n_tokens = per_head(n_tokens, HKV).contiguous()
    overlapped = pdl(q)
    wide = indices is not None and G > 1 and B * HKV <= FEW_ROWS  # many parts to combine: fewer of more warps each
    splits = max(1, ws.splits // 2) if wide else ws.splits
    num_warps = num_warps or ((2 if wide else 1) if q.element_size() == 2 else 4)
    _attend_kernel[(B * HKV, splits + (W > 0))](
        q, k, v, seq_lens, indices, n_tokens, ws.partial, ws.partial_lse, ws.arrived, ws.chosen, out,
        *((m.channels, m.lo, m.step, labels, newest) if W else (None,) * 5), S if indices is None else indices.shape[-1],
        NO_WINDOW if window is None else window, math.log2(math.e) / math.sqrt(D), *q.stride()[:2], *k.stride()[:3],
        *v.stride()[:3], *(labels.stride()[:3] if W else (0, 0, 0)), *newest.stride()[:3], indices is not None, HKV, G,
        max(16, triton.next_power_of_2(G)), D, triton.next_power_of_2(D), splits, block_n or (64 if wide else 32), stages, W,
        m.widths if W else (),
        UPCAST=not q.is_cuda,  # the interpreter's dot takes bfloat16 for integers
        PDL=overlapped, OVERLAP=overlap, ANNOUNCED=announced, num_warps=num_warps,
        # as many as fit: left alone, the compiler takes 168 with some labels, and has fewer loads on the way
        **(dict(maxnreg=216) if wide and nvidia(q) else {}),
        **(dict(launch_pdl=True) if overlapped else {}))
    return out


# ---------------------------------------------------------------- the decode step


def write_labels(k, positions, labels, label_map, config):
    """The label stage with the configured implementation; shapes as in label_ref."""
    (label if config.use_triton(k) else label_ref)(k, positions, labels, label_map)


def label_newest_ref(k, seq_lens, labels, label_map):
    """Writes the label of each row's newest key; k [B, HKV, S, D], seq_lens [B], labels [B, HKV, W, S]."""
    newest = (seq_lens - 1)[:, None]
    rows = newest.long()[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    label_ref(k.gather(2, rows), newest, labels, label_map)


def dense_decode(q, k, v, seq_lens, window=None, impl="auto", workspace=None, labels=None, label_map=None):
    """One query per row over all its eligible tokens; cost follows seq_lens, not S. Shapes as in attend_ref.

    labels and label_map: if given, the label of each row's newest key is written, for sparse steps to come.
    """
    if impl == "triton" or (impl == "auto" and q.is_cuda):
        return attend(q, k, v, seq_lens, window=window, workspace=workspace, labels=labels, label_map=label_map)
    if labels is not None:
        label_newest_ref(k, seq_lens, labels, label_map)
    live = int(seq_lens.max())
    return attend_ref(q, k[:, :, :live], v[:, :, :live], seq_lens, window=window)


def ds_decode(q, k, v, labels, label_map, seq_lens, config, window=None, workspace=None, label_newest=True):
    """One query per row over the tokens that its label scores select.

    q [B, HQ, D] post-RoPE; k, v [B, HKV, S, D]; labels [B, HKV, W, S] int32; label_map: LabelMap of this layer;
    seq_lens [B] int32, at least 1, newest token included; window: sliding window in tokens or None; workspace: scratch of this
    shape, so that nothing but the output is allocated; label_newest: write the label of each row's newest key. Returns [B, HQ, D].
    Rows may share one cache, k, v and labels expanded along B, if its labels are there: without label_newest.
    """
    assert not label_newest or labels.stride(0) or len(q) == 1, "rows that share a cache would overwrite labels others read"
    if config.use_triton(q):
        B, HQ, D = q.shape
        HKV, S = k.shape[1:3]
        workspace = workspace or Workspace(B, HQ, HKV, D, S, q.device, config, window)
        announced = dict(workspace=workspace, announced=workspace.announced)
        newest = dict(labels=labels, label_map=label_map) if label_newest else {}
        try:
            chosen = select(q, labels, label_map, seq_lens, config, window, **announced)
            return attend(q, k, v, seq_lens, *chosen, window, overlap=True, **newest, **announced)
        except BaseException:  # rows announced to nobody
            workspace.chosen.zero_()
            raise
    if label_newest:
        label_newest_ref(k, seq_lens, labels, label_map)
    S = int(seq_lens.max())  # the reference's cost, too, follows the live length
    k, v, labels = k[:, :, :S], v[:, :, :S], labels[..., :S]
    return attend_ref(q, k, v, seq_lens, *select_tokens(q, labels, label_map, seq_lens, config, window))
