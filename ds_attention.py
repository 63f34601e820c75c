"""Double Sparsity decode attention (arXiv 2408.07092): label -> score -> select -> attend.

Each cached key is kept a second time as a small *label*: a calibrated choice of its channels
(section 3.1; by default of pairs that RoPE turns together), quantised to a few bits. A decode step
scores every cached token with the labels and attends to those whose score reaches a threshold,
about N per KV head (section 3.2).

Exact: attention over the chosen tokens; the first `sink` and the newest `recent` tokens are always
among them. Approximate: the scores, by the channels left out and by the label bits; and N, since
the threshold is that which N tokens are expected to reach, by a sample of them.

Shapes, used everywhere: B batch rows, T new tokens, S cached tokens (allocated; the live length is
in seq_lens), HQ / HKV query / KV heads, G = HQ // HKV, D head dim, C label dims, W 32-bit words of
one token's label. In a decode call q has no T: its rows are one token each.

The plain torch functions named _ref are the specification. The Triton kernels choose the same
tokens with fewer bytes, in two launches: `bracket` (the query's codes, and the threshold) and
`attend` (scores, and attention to what reaches it). They run on a GPU and, with TRITON_INTERPRET=1
set before triton is imported, on a CPU.
"""
import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class DSConfig:
    """What a sparse decode step reads. `sparsity` sets tokens and label bytes, as in the paper."""

    sparsity: float = 16.0  # attend to 1/sparsity of the live tokens; labels take that of K
    n_tokens: int | None = None  # a fixed number of attended tokens instead of a share
    min_tokens: int = 128  # floor of the share: below it a share of a short context is too few
    # ((dims, bits), ...), the most bits first; or bits of as many dims as fit; None: default_widths
    label_bits: int | tuple | None = None
    dense_layers: int = 2  # the first layers attend to everything; the caller sees to that
    dense_below: int = 3072  # so do rows of fewer live tokens: sparse is no faster there
    # always attended, counted inside N, which is no less
    sink: int = 4  # first tokens
    recent: int = 16  # newest tokens
    impl: str = "auto"  # "triton", "torch" (the reference), or "auto": triton on a GPU

    def __post_init__(self):
        for name, low in [("sparsity", 1), ("n_tokens", 1), ("sink", 0), ("recent", 1)]:
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise ValueError(f"{name}={value}: must be at least {low}, and finite")
        if self.impl not in ("auto", "torch", "triton"):
            raise ValueError(f"impl={self.impl}: must be one of auto, torch, triton")

    def budget(self, live):
        """N of rows with `live` eligible tokens: int, or int32 tensor; same type back."""
        if isinstance(live, int):
            return self.budget(torch.tensor(live)).item()
        n = (live.long() * self.share() + 2**30 - 1) >> 30
        n = torch.full_like(n, self.n_tokens) if self.n_tokens else n.clamp(min=self.min_tokens)
        return torch.where(live < self.dense_below, live, n.to(live.dtype)).minimum(live)

    def sparse_at(self, live):
        """Whether a row of `live` eligible tokens attends to fewer of them."""
        return self.budget(live) < live

    def share(self):
        """1/sparsity in units of 2**-30: by integers all implementations round alike."""
        return int(2**30 / self.sparsity)

    def widths(self, D):
        """The label of head dim D: ((dims, bits), ...), its most important dims first."""
        words = max(1, int(D * 16 / self.sparsity) // 32)  # 1/sparsity of a 16-bit K's bytes
        widths = self.label_bits or default_widths(32 * words, D)
        if isinstance(widths, int):
            widths = ((min(words, D * widths // 32) * (32 // widths), widths),)
        bits, counts = [b for _, b in widths], [dims * b for dims, b in widths]
        if (not 0 < dims_in(widths) <= D or bits != sorted({1, 2, 4, 8}.intersection(bits))[::-1]
                or any(n % 8 or not n for n in counts) or words_in(widths) * 32 != sum(counts)):
            raise ValueError(f"label_bits={self.label_bits}: must be 1 to {D} dims of 1, 2, 4 or 8 "
                             "bits, the most bits first, whole bytes of each, whole words in all")
        return widths

    def use_triton(self, tensor):
        return self.impl == "triton" or (self.impl == "auto" and tensor.is_cuda)


@triton.constexpr_function
def dims_in(widths):
    """Dims C of a label of these widths."""
    return sum(dims for dims, _ in widths)


@triton.constexpr_function
def words_in(widths):
    """32-bit words W of a label of these widths."""
    return sum(dims * bits for dims, bits in widths) // 32


def default_widths(bits, D):
    """The label of so many bits: many dims of few (see results/notes-quality.md). From a bit per
    dim of the head on a quarter of the bits makes dims of 4 and the rest of 2; from half a bit on
    5/8 make dims of 2 and the rest of 1; else all are of 1. Of D dims at most, then more are wide.
    """
    bits = min(bits, 4 * D // 32 * 32)
    wide, share = (4, 1 / 4) if bits >= D else (2, 5 / 8) if 2 * bits >= D else (1, 1)
    narrow = max(1, wide // 2)
    wide_bits = round(bits * share / 8) * 8
    if wide_bits // wide + (bits - wide_bits) // narrow > D:
        wide_bits = 2 * (bits - narrow * D)
    parts = (wide_bits, wide), (bits - wide_bits, narrow)
    return tuple((part // width, width) for part, width in parts if part)


@dataclass
class LabelMap:
    """One layer's calibrated choice of channels, with static ranges.

    A label has a code for each chosen channel of the key: floor((k_c - lo_c) / step_c + 1/2), cut
    to what its bits hold. A token's score is sum_c q_c * gain_c * code_c, the products q_c * gain_c
    rounded to 8 bits (see query_codes); what lo_c adds is the same for all tokens.
    """

    channels: torch.Tensor  # [HKV, C] int32, the most important ones first
    lo: torch.Tensor  # [HKV, C] fp32
    step: torch.Tensor  # [HKV, C] fp32
    gain: torch.Tensor  # [HKV, C] fp32: step, times the weight of the channel's plane
    bits: torch.Tensor  # [C] int32, of each code
    widths: tuple  # ((dims, bits), ...), C dims in all: see DSConfig.widths

    def tensors(self):
        return self.channels, self.lo, self.step, self.gain, self.bits

    def query_codes(self, q):
        """q [B, HQ, D] -> (codes [B, HKV, G, C], unit [B, HKV]): a score is codes . label codes,
        and in the units of q . k / sqrt(D) as many `unit`s.

        codes: channels of q times their gains, on a scale per KV head: fp32 integers, -127 to 127.
        """
        B, _, D = q.shape
        grouped = q.float().view(B, len(self.channels), -1, D)
        chosen = grouped.take_along_dim(self.channels[None, :, None].long(), 3)  # [B, HKV, G, C]
        products = chosen * self.gain[:, None]
        largest = products.abs().amax((2, 3))  # [B, HKV]
        # one rounding, as in the kernel: a number over a tensor would be two
        scale = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
        codes = torch.floor(products * scale[..., None, None] + 0.5)
        return codes, largest * (1 / 127 / math.sqrt(D))


# ---------------------------------------------------------------- the specification: label


def pack(codes, label_map):
    """codes [..., C] integers of their dims' bits -> [..., W] int32. Dims lie one behind the other,
    in each word lowest bits first."""
    first = label_map.bits.cumsum(0) - label_map.bits
    words = codes.new_zeros(*codes.shape[:-1], words_in(label_map.widths), dtype=torch.int64)
    words.index_add_(-1, first // 32, codes.long() << first % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words, label_map):
    """words [..., W] int32 -> codes [..., C] int32: the inverse of `pack`."""
    first = label_map.bits.cumsum(0) - label_map.bits
    return (words[..., first // 32] >> (first % 32).int()) & ((1 << label_map.bits) - 1)


def label_ref(k, positions, labels, label_map):
    """Writes the labels of new keys into the label cache, in place.

    k [B, HKV, T, D] post-RoPE; positions [B, T] integer; labels [B, HKV, W, S] int32.
    """
    m = label_map
    chosen = k.take_along_dim(m.channels[None, :, None].long(), 3).float()  # [B, HKV, T, C]
    codes = torch.floor((chosen - m.lo[:, None]) / m.step[:, None] + 0.5)
    codes = codes.clamp(min=0).minimum(((1 << m.bits) - 1).float())
    rows = torch.arange(len(k), device=k.device)[:, None]
    labels.permute(0, 3, 1, 2)[rows, positions] = pack(codes, m).transpose(1, 2)


# ---------------------------------------------------------------- the specification: score

SAMPLE = 2048  # tokens that the threshold comes from; of rows with no more than that it is exact
# RUN of them side by side, so that gaps are short; in rows below LONG twice as many, the 64 bytes
# that memory gives at a time
RUN, LONG = 8, 2**15


def live_range(seq_lens, window):
    """First eligible position and number of eligible tokens per row: all live tokens, or the newest
    `window`."""
    live = seq_lens if window is None else seq_lens.clamp(max=window)
    return seq_lens - live, live


def eligible_tokens(seq_lens, S, window):
    """Which of S positions are eligible: [B, S] bool."""
    start, _ = live_range(seq_lens, window)
    position = torch.arange(S, device=seq_lens.device)
    return (position >= start[:, None]) & (position < seq_lens[:, None])


def sample_ref(seq_lens, window=None):
    """The tokens that scores are sampled at: positions [B, SAMPLE] int64, and which are eligible.

    Aligned runs of tokens, spread over the eligible ones: all, where there are no more than SAMPLE
    (but up to 15 of the newest, where a window begins inside a run).
    """
    start, live = (x[:, None].long() for x in live_range(seq_lens, window))
    i = torch.arange(SAMPLE, device=seq_lens.device)
    run = torch.where(live < LONG, 2 * RUN, RUN)
    first = (start + i // run * live.clamp(min=SAMPLE) // (SAMPLE // run)) // run * run
    position = first + i % run
    eligible = (position >= start) & (position < start + live)
    return position.minimum(start + live - 1), eligible


def log_weight_ref(scores, seq_lens, unit, sink, window=None):
    """The logarithm of sampled tokens' mean weight exp(unit * score), without the newest, in units.

    scores [B, HKV, G, S], integers as fp32; unit [B, HKV]. Returns [B, HKV, G], integers as fp32.
    The first `sink` tokens stand for themselves alone, other sampled ones for as many as are not
    sampled, too. Integers, and roundings that the kernel has as well: powers of two and the
    logarithm are linear between whole ones.
    """
    position, counted = sample_ref(seq_lens, window)
    counted = (counted & (position < seq_lens[:, None] - 1))[:, None, None]
    sampled = scores.take_along_dim(position[:, None, None], -1)
    top = sampled.masked_fill(~counted, -(2.0**30)).amax(-1, keepdim=True)
    powers = (unit * math.log2(math.e))[..., None, None]
    lower = ((top - sampled) * powers).masked_fill(~counted, 0.0)

    live = live_range(seq_lens, window)[1].clamp(min=SAMPLE).float()[:, None]
    share = 2.0**18 * (torch.full_like(live, SAMPLE) / live)
    share = torch.where(position < sink, share, 2.0**18)[:, None, None]
    weight = ((2 - (lower - lower.floor())) * share).long() >> lower.clamp(max=31).long()

    sums = ((w * counted).sum(-1).float() for w in (weight, (2 * share).long()))
    total, even = (x.view(torch.int32) for x in sums)
    inverse = torch.where(unit > 0, torch.full_like(unit, math.log(2)) / unit, 0.0)[..., None]
    return top[..., 0] + torch.floor((total - even).float() * 2.0**-23 * inverse + 0.5)


def score_ref(q, labels, label_map, seq_lens, config, window=None):
    """Label scores of all cached tokens: [B, HKV, S], integers as fp32, -inf where not eligible.

    In a group each head's scores are less by its log_weight_ref, and the largest counts: about
    the largest logarithm of a token's softmax weights. q [B, HQ, D]; labels [B, HKV, W, S] int32;
    seq_lens [B] int32.
    """
    eligible = eligible_tokens(seq_lens, labels.shape[3], window)[:, None]
    if labels.stride(0) == 0:
        labels = labels[:1]  # rows of one cache: it is unpacked once
    codes = unpack(labels.transpose(2, 3), label_map).float()  # [B or 1, HKV, S, C]
    q_codes, unit = label_map.query_codes(q)  # [B, HKV, G, C], [B, HKV]
    scores = torch.einsum("bhgc,bhsc->bhgs", q_codes, codes)
    if scores.shape[2] > 1:
        scores -= log_weight_ref(scores, seq_lens, unit, config.sink, window)[..., None]
    return scores.amax(2).masked_fill(~eligible, float("-inf"))


# ---------------------------------------------------------------- the specification: select, attend


def select_ref(scores, seq_lens, config, window=None):
    """Which tokens are attended to, [B, HKV, S] bool: the newest `recent`, the first `sink`, and
    those whose score reaches a threshold, by which N of a row's tokens are expected to be chosen.

    Of the eligible tokens that are not always attended, N less the others shall be chosen; so the
    threshold is the score that this share of the sampled ones reaches; -inf where N is all of them.
    scores [B, HKV, S] fp32, -inf where not eligible; seq_lens [B] int32.
    """
    S, end = scores.shape[2], seq_lens[:, None]
    position, eligible = torch.arange(S, device=scores.device), eligible_tokens(seq_lens, S, window)
    forced = eligible & ((position < config.sink) | (position >= end - config.recent))
    live, always = eligible.sum(1), forced.sum(1)  # [B]
    budget = config.budget(live)

    position, counted = sample_ref(seq_lens, window)
    counted &= (position >= config.sink) & (position < end - config.recent)
    rest = (live - always).clamp(min=1)
    wanted = ((budget - always) * counted.sum(1) + rest // 2) // rest
    sampled = scores.take_along_dim(position[:, None], 2)
    best = sampled.masked_fill(~counted[:, None], float("-inf")).sort(descending=True).values
    nth = (wanted - 1).clamp(min=0, max=SAMPLE - 1)[:, None, None]
    threshold = best.take_along_dim(nth, 2)  # [B, HKV, 1]
    threshold = threshold.masked_fill((wanted < 1)[:, None, None], float("inf"))
    threshold = threshold.masked_fill((budget == live)[:, None, None], float("-inf"))
    return (forced[:, None] | (scores >= threshold)) & eligible[:, None]


def attend_ref(q, k, v, seq_lens, chosen=None, window=None):
    """Exact attention of one query per row over the chosen tokens, or all eligible ones (dense).

    q [B, HQ, D]; k, v [B, HKV, S, D]; seq_lens [B] int32; chosen [B, HKV, S] bool. Returns
    [B, HQ, D] in q's dtype; fp32 inside.
    """
    B, HQ, D = q.shape
    HKV, S = k.shape[1:3]
    if chosen is None:
        chosen = eligible_tokens(seq_lens, S, window)[:, None]
    if k.stride(0) == 0:
        k, v = k[:1], v[:1]  # rows of one shared cache: no copies of it
    grouped = q.float().view(B, HKV, HQ // HKV, D)
    logits = torch.einsum("bhgd,bhsd->bhgs", grouped, k.float()) / math.sqrt(D)
    weights = logits.masked_fill(~chosen[:, :, None], float("-inf")).softmax(-1)
    return torch.einsum("bhgs,bhsd->bhgd", weights, v.float()).reshape(B, HQ, D).to(q.dtype)


# ---------------------------------------------------------------- kernels: label

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
PTX = tl.constexpr(not INTERPRETED.value and torch.version.cuda is not None)


@triton.jit
def _label(k, nth, position, mask, b, h, labels, label_map, k_strides, label_strides,
           WIDTHS: tl.constexpr):
    """Writes the labels of a row's and KV head's nth keys in k [T] at positions [T]."""
    channels, lo, step, _, bits = label_map
    k_sb, k_sh, k_ss = k_strides
    l_sb, l_sh, l_sw = label_strides
    C: tl.constexpr = dims_in(WIDTHS)
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    channel = tl.load(channels + h * C + offs_c, mask=offs_c < C, other=0)
    lows = tl.load(lo + h * C + offs_c, mask=offs_c < C, other=0.0)
    steps = tl.load(step + h * C + offs_c, mask=offs_c < C, other=1.0)
    bits = tl.load(bits + offs_c, mask=offs_c < C, other=0)
    keys = k + b * k_sb + h * k_sh + nth * k_ss
    inside = mask[:, None] & (offs_c < C)[None, :]
    chosen = tl.load(keys[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)

    first = tl.cumsum(bits, 0) - bits
    codes = tl.floor(tl.div_rn(chosen - lows[None, :], steps[None, :]) + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), ((1 << bits) - 1).to(tl.float32)[None, :])
    codes = codes.to(tl.int32) << (first % 32)[None, :]
    labels += b * l_sb + h * l_sh + position
    for w in tl.static_range(words_in(WIDTHS)):
        word = tl.sum(tl.where((first // 32 == w)[None, :], codes, 0), 1)
        tl.store(labels + w * l_sw, word, mask=mask)


@triton.jit
def _label_kernel(k, positions, labels, label_map, T, positions_stride, k_strides, label_strides,
                  WIDTHS: tl.constexpr, BLOCK_T: tl.constexpr):
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    nth = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(positions + b * positions_stride + nth, mask=nth < T, other=0).to(tl.int64)
    _label(k, nth, position, nth < T, b, h, labels, label_map, k_strides, label_strides, WIDTHS)


# ---------------------------------------------------------------- kernels: scores

FORCED = tl.constexpr(2**30)  # key of a token that is always attended: above all scores
DEAD = tl.constexpr(-(2**31) + 1)  # key of a token that is not eligible: below all scores
M, M_RUN, M_RUNS, M_LONG = map(tl.constexpr, (SAMPLE, RUN, SAMPLE // RUN, LONG))


@triton.constexpr_function
def query_words(widths):
    """Words of a query head in `query`: its codes, one for each slice of a label, then what its
    scores are less by. A label word has as many slices as a byte has of the narrowest dims."""
    return words_in(widths) * (8 // widths[-1][1]) + 1


@triton.constexpr_function
def slice_mask(widths, i):
    """The i-th slice of a label, the t-th of a word: the bits, as an int32, of the dims that begin
    t times the narrowest dim's bits into their byte, moved down by 4 if that is 4 or more. 0: no
    dim does."""
    w, t = divmod(i, 8 // widths[-1][1])
    of_bytes = [bits for dims, bits in widths for _ in range(dims * bits // 8)][4 * w : 4 * w + 4]
    begin = t * widths[-1][1]
    mask = sum((2**bits - 1 << begin % 4) << 8 * i for i, bits in enumerate(of_bytes)
               if begin % bits == 0)
    return (mask + 2**31) % 2**32 - 2**31


@triton.jit
def _load_each(pointer, step, N: tl.constexpr, mask=None):
    """N values, `step` apart, from the pointer on, or from each of a tensor of pointers on."""
    values = ()
    for i in tl.static_range(N):
        values += (tl.load(pointer + i * step, mask=mask),)
    return values


@triton.jit
def _dot4(a, b, acc):
    """acc + the dot product of four unsigned bytes in a with four signed bytes in b; all int32."""
    if PTX:
        acc = tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc],
                                        tl.int32, is_pure=True, pack=1)
    else:
        for i in tl.static_range(4):
            acc += ((a >> (8 * i)) & 255) * ((b << (24 - 8 * i)) >> 24)
    return acc


@triton.jit
def _scores(words, codes, less, WIDTHS: tl.constexpr):
    """A query head's scores of tokens: label codes . query codes, less `less`; int32.

    words: W tensors [tokens] or [1, tokens]; codes: a word for each slice of a label word, of a
    head or of [heads, 1]; less: likewise.
    """
    SLICES: tl.constexpr = 8 // WIDTHS[-1][1]
    SUMS: tl.constexpr = max(1, SLICES // 2)  # slices 4 bits apart are summed alike
    zeros = tl.zeros_like(words[0] + less)
    score = zeros - less
    for t in tl.static_range(SUMS):
        part = score if t == 0 else zeros
        for i in tl.static_range(words_in(WIDTHS) * SLICES):
            if i % SUMS == t and slice_mask(WIDTHS, i) != 0:
                of_dims = words[i // SLICES] >> (i % SLICES // SUMS * 4) & slice_mask(WIDTHS, i)
                part = _dot4(of_dims + zeros, codes[i] + zeros, part)
        # a slice stays where it is in its nibbles, and its sum is shifted instead
        score = part if t == 0 else score + (part >> (WIDTHS[-1][1] * t))
    return score


# ---------------------------------------------------------------- kernels: bracket


@triton.jit
def _log_weight(scores, counted, share, unit):
    """log_weight_ref of a group: scores [G, M] int32 -> [G]. counted [1, M]; share [1, M]: what a
    token stands for, 2**18 for one."""
    top = tl.max(tl.where(counted, scores, -FORCED), 1)
    lower = (top[:, None] - scores).to(tl.float32) * (unit * 1.4426950408889634)
    lower = tl.maximum(lower, 0.0)
    whole = tl.floor(lower)
    weight = ((2 - (lower - whole)) * share).to(tl.int32) >> tl.minimum(whole, 31.0).to(tl.int32)
    total = tl.sum(tl.where(counted, weight, 0), 1).to(tl.float32)
    even = tl.sum(tl.where(counted, (2 * share).to(tl.int32), 0), 1).to(tl.float32)
    # the bits of a float are its logarithm, linear between powers of two
    log2 = total.to(tl.int32, bitcast=True) - even.to(tl.int32, bitcast=True)
    inverse = tl.where(unit > 0, tl.div_rn(0.6931471805599453, unit), 0.0)
    return top + tl.floor(log2.to(tl.float32) * (2.0**-23) * inverse + 0.5).to(tl.int32)


@triton.jit
def _nth_best(keys, low, high, n):
    """The largest value in [low, high] that n keys reach, as they do low. Keys: at most 32,767, so
    that one sum counts for two thresholds; each pass leaves a third of the range."""
    while low < high:
        third = (high - low + 2) // 3
        lower = low + third
        upper = tl.minimum(lower + third, high)
        both = tl.sum((keys >= lower).to(tl.int32) + ((keys >= upper).to(tl.int32) << 16))
        at_upper, at_lower = (both >> 16) >= n, (both & 0xFFFF) >= n
        low = tl.where(at_upper, upper, tl.where(at_lower, lower, low))
        high = tl.where(at_upper, high, tl.where(at_lower, upper - 1, lower - 1))
    return low


@triton.jit
def _bracket_kernel(q, labels, label_map, seq_lens, query, threshold, label_strides, forced, budget,
                    unit, HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                    WIDTHS: tl.constexpr, PDL: tl.constexpr):
    """A row's and KV head's query codes, what each head's scores are less by, and the
    threshold of select_ref.

    unit: of the scores, over the largest of the query's products. PDL: labels and seq_lens are read
    while the kernel before still runs."""
    channels, _, _, gain, bits = label_map
    l_sb, l_sh, l_sw = label_strides
    sink, recent, window = forced
    n_tokens, min_tokens, share, dense_below = budget
    row = tl.program_id(0)
    b, h = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
    C: tl.constexpr = dims_in(WIDTHS)
    offs_c = tl.arange(0, triton.next_power_of_2(C))
    channel = tl.load(channels + h * C + offs_c, mask=offs_c < C, other=0)
    gains = tl.load(gain + h * C + offs_c, mask=offs_c < C, other=0.0)
    bits = tl.load(bits + offs_c, mask=offs_c < C, other=0)
    bit = tl.cumsum(bits, 0) - bits

    # sample_ref
    seq_len = tl.load(seq_lens + b)
    start = tl.maximum(seq_len - window, 0)
    live = seq_len - start
    offs_m, spread = tl.arange(0, M), tl.maximum(live, M)
    nth, twice = offs_m // M_RUN, (live < M_LONG).to(tl.int32)  # 1: runs of two M_RUN
    first = (start + ((nth >> twice << twice) * spread) // M_RUNS) // M_RUN >> twice << twice
    sampled = (first + (nth & twice)) * M_RUN + offs_m % M_RUN
    inside = (sampled < seq_len) & (sampled >= start)
    mask = sampled < tl.minimum(tl.cdiv(seq_len, 16) * 16, l_sw)  # so that loads take four words
    words = _load_each(labels + b * l_sb + h * l_sh + sampled, l_sw, words_in(WIDTHS), mask)

    # how many sampled tokens select_ref wants; DSConfig.budget first
    wanted = ((live.to(tl.int64) * share + 2**30 - 1) >> 30).to(tl.int32)
    wanted = tl.where(n_tokens > 0, n_tokens, tl.maximum(wanted, min_tokens))
    wanted = tl.minimum(tl.where(live < dense_below, live, wanted), live)
    always = tl.minimum(live, recent) + tl.maximum(tl.minimum(sink, seq_len - recent) - start, 0)
    counted = inside & (sampled >= sink) & (sampled < seq_len - recent)
    rest = tl.maximum(live - always, 1).to(tl.int64)
    n = ((wanted - always) * tl.sum(counted.to(tl.int64)) + rest // 2) // rest
    if PDL:
        tl.extra.cuda.gdc_wait()  # for the query: what comes before does not need it
        tl.extra.cuda.gdc_launch_dependents()

    # LabelMap.query_codes, laid out as label words are sliced: byte b of word (w, t) is of the dim
    # that begins there in slice t of label word w; where none does, the slice is zero
    NARROW: tl.constexpr = WIDTHS[-1][1]
    WORDS: tl.constexpr = query_words(WIDTHS)
    offs_g = tl.arange(0, triton.next_power_of_2(G))
    mask = (offs_g < G)[:, None] & (offs_c < C)[None, :]
    q += row.to(tl.int64) * G * D
    products = tl.load(q + offs_g[:, None] * D + channel[None, :], mask=mask, other=0.0)
    products = products.to(tl.float32) * gains[None, :]
    largest = tl.max(tl.abs(products))
    scale = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
    codes = tl.floor(products * scale + 0.5).to(tl.int8)  # in [-127, 127]
    query += row.to(tl.int64) * G * WORDS
    place = (bit // 32 * (8 // NARROW) + bit % 8 // NARROW) * 4 + bit // 8 % 4
    of_heads = query.to(tl.pointer_type(tl.int8), bitcast=True) + offs_g * (4 * WORDS)
    tl.store(of_heads[:, None] + place[None, :], codes, mask=mask)

    # scores of the sample: the codes were written in one order and are read back in another
    tl.debug_barrier()
    if G > 1:
        weighed = inside & (sampled < seq_len - 1)
        sink_share = 2.0**18 * tl.div_rn(M * 1.0, spread.to(tl.float32))
        share = tl.where(sampled < sink, sink_share, 2.0**18)
        for w in tl.static_range(words_in(WIDTHS)):
            words = words[1:] + (words[0][None, :],)
        heads = query + tl.minimum(offs_g, G - 1) * WORDS  # the last repeats
        less = tl.zeros_like(offs_g)
        scores = _scores(words, _load_each(heads[:, None], 1, WORDS - 1), less[:, None], WIDTHS)
        less = _log_weight(scores, weighed[None, :], share[None, :], largest * unit)
        tl.store(heads + WORDS - 1, less)
        keys = tl.max(scores - less[:, None], 0)
    else:
        tl.store(query + WORDS - 1, 0)
        keys = _scores(words, _load_each(query, 1, WORDS - 1), 0, WIDTHS)

    if wanted == live:
        tl.store(threshold + row, DEAD + 1)
    elif n < 1:
        tl.store(threshold + row, FORCED)
    else:
        low = tl.min(tl.where(counted, keys, FORCED))
        keys = tl.where(counted, keys, DEAD)
        tl.store(threshold + row, _nth_best(keys, low, tl.max(keys), n.to(tl.int32)))


# ---------------------------------------------------------------- kernels: attend


@triton.jit
def _choose(tokens, labels, query, threshold, split, seq_len, l_sw, forced, G: tl.constexpr,
            WIDTHS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, STRIPE: tl.constexpr,
            PDL: tl.constexpr):
    """Scores a program's tokens, every SPLITS-th stripe of STRIPE, and writes those that reach the
    threshold to `tokens`. Returns how many do."""
    sink, recent, window = forced
    STEP: tl.constexpr = SPLITS * BLOCK_S
    WORDS: tl.constexpr = query_words(WIDTHS)
    offs, offs_4 = tl.arange(0, BLOCK_S), 4 * tl.arange(0, BLOCK_S // 4)
    at = offs // STRIPE * (SPLITS * STRIPE) + split * STRIPE + offs % STRIPE
    at_4 = offs_4 // STRIPE * (SPLITS * STRIPE) + split * STRIPE + offs_4 % STRIPE
    start = tl.maximum(seq_len - window, 0)
    first = start // STEP * STEP
    end = tl.minimum(tl.cdiv(seq_len, 16) * 16, l_sw)  # so that loads take four words at a time

    codes, lowest, total = (), 0, 0
    for _ in tl.static_range(G * WORDS):  # what a loop sets is there before it
        codes += (0,)
    for s in tl.range(first, seq_len, STEP, num_stages=3):
        words = _load_each(labels + (s + at), l_sw, words_in(WIDTHS), s + at < end)
        # what the bracket writes, when labels of three blocks are on their way; a row has a token
        if s == first:
            if PDL:
                tl.extra.cuda.gdc_wait()
            codes = _load_each(query, 1, G * WORDS)
            lowest = tl.load(threshold)
        keys = _scores(words, codes, codes[WORDS - 1], WIDTHS)
        for g in tl.static_range(1, G):
            of_head = codes[g * WORDS : (g + 1) * WORDS]
            keys = tl.maximum(keys, _scores(words, of_head, of_head[WORDS - 1], WIDTHS))
        if (s < tl.maximum(sink, start)) | (s + STEP > seq_len - recent):
            token = s + at
            keys = tl.where((token >= seq_len - recent) | (token < sink), FORCED, keys)
            keys = tl.where((token >= start) & (token < seq_len), keys, DEAD)

        # a thread holds four tokens in a row: one scan of fours, 4 to 9% of a step
        even, odd = tl.split(tl.reshape((keys >= lowest).to(tl.int32), [BLOCK_S // 4, 2, 2]))
        keep_0, keep_2 = tl.split(even)
        keep_1, keep_3 = tl.split(odd)
        count = keep_0 + keep_1 + keep_2 + keep_3
        slot = tokens + total + tl.cumsum(count, 0) - count
        token = s + at_4
        tl.store(slot, token, mask=keep_0 > 0)
        tl.store(slot + keep_0, token + 1, mask=keep_1 > 0)
        tl.store(slot + (keep_0 + keep_1), token + 2, mask=keep_2 > 0)
        tl.store(slot + (keep_0 + keep_1 + keep_2), token + 3, mask=keep_3 > 0)
        total += tl.sum(count, 0)
    return total


@triton.jit
def _attend(query, k, v, tokens, begin, end, k_ss, scale_log2, D: tl.constexpr,
            BLOCK_N: tl.constexpr):
    """Attention over tokens[begin:end], or if tokens is None over positions from begin to end.

    query [BLOCK_G, BLOCK_D]. Returns (largest logit and sum of weights [BLOCK_G], sum of weighted
    values [BLOCK_G, BLOCK_D]).
    """
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, query.shape[1])
    top = tl.full([query.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([query.shape[0]], tl.float32)
    acc = tl.zeros(query.shape, tl.float32)
    token = begin + offs_n
    if tokens is not None:
        token = tl.load(tokens + token, mask=token < end, other=0)
    for n in tl.range(begin, end, BLOCK_N, num_stages=2):
        inside = n + offs_n < end
        rows = token.to(tl.int64)[:, None] * k_ss + offs_d[None, :]
        mask = inside[:, None] & (offs_d < D)[None, :]
        keys = tl.load(k + rows, mask=mask, other=0.0)
        values = tl.load(v + rows, mask=mask, other=0.0)
        token = n + BLOCK_N + offs_n
        if tokens is not None:  # a block ahead: its latency does not add to that of the rows
            token = tl.load(tokens + token, mask=token < end, other=0)
        if INTERPRETED:  # its dot takes bfloat16 for integers
            query, keys, values = query.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        decay = tl.exp2(top - new_top)
        mass = mass * decay + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        acc = acc * decay[:, None] + weighted
        top = new_top
    return top, mass, acc


@triton.jit
def _combine(part, n, row, split, parts, attended, out, G: tl.constexpr, D: tl.constexpr,
             SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes a program's part, _attend's, of a row's result. The last of the row's programs to
    arrive combines all parts, in their order: whichever it is, the result has the same bits. It
    adds all programs' n to `attended`."""
    top, mass, acc = part
    partial, partial_lse, arrived = parts
    offs_g, offs_d = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    head = row.to(tl.int64) * G + offs_g
    mass = tl.where(mass > 0, mass, 1.0)  # without tokens top is -inf: the part gets no weight
    mask = (offs_g < G)[:, None] & (offs_d < D)[None, :]
    place = partial + (head * SPLITS + split)[:, None] * D + offs_d[None, :]
    tl.store(place, acc / mass[:, None], mask=mask)
    tl.store(partial_lse + head * SPLITS + split, top + tl.log2(mass), mask=offs_g < G)

    tl.debug_barrier()
    # programs that have arrived, and above the lowest byte, below 2**23, what they attended to
    before = tl.atomic_add(arrived + row, 256 * n + 1, sem="acq_rel")
    if before % 256 == SPLITS - 1:
        if attended is not None:
            tl.atomic_add(attended + row, (before // 256 + n).to(tl.int64), sem="relaxed")
        HEADS: tl.constexpr = triton.next_power_of_2(G)
        AT_ONCE: tl.constexpr = max(1, min(SPLITS, BLOCK_N // HEADS))
        heads = row.to(tl.int64) * G + tl.minimum(tl.arange(0, HEADS), G - 1)  # the last repeats
        first = partial_lse + (heads * SPLITS)[:, None]
        lse = tl.load(first + tl.arange(0, SPLITS)[None, :], cache_modifier=".cg")
        highest = tl.max(lse, 1)
        total = tl.sum(tl.exp2(lse - highest[:, None]), 1)
        result = tl.zeros([HEADS, acc.shape[1]], tl.float32)
        for p in tl.static_range(0, SPLITS, AT_ONCE):
            nth = p + tl.arange(0, AT_ONCE)[None, :]
            weight = tl.exp2(tl.load(first + nth, cache_modifier=".cg") - highest[:, None])
            rows = ((heads * SPLITS)[:, None] + nth)[:, :, None] * D + offs_d[None, None, :]
            values = tl.load(partial + rows, mask=(offs_d < D)[None, None, :], other=0.0,
                             cache_modifier=".cg")
            result += tl.sum(values * weight[:, :, None], 1)
        result = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + heads[:, None] * D + offs_d[None, :], result, mask=(offs_d < D)[None, :])
        tl.store(arrived + row, 0)


@triton.jit
def _attend_kernel(q, k, v, seq_lens, labels, label_map, query, threshold, lists, counts, attended,
                   parts, out, k_strides, label_strides, forced, room, scale_log2,
                   HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTHS: tl.constexpr,
                   SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
                   STRIPE: tl.constexpr, LABEL: tl.constexpr, PDL: tl.constexpr):
    """Attention by SPLITS programs for each row and KV head, over one of:
    - with `threshold`, the tokens that reach it: each program scores its own, in stripes, into its
      part of lists [B, HKV, SPLITS, room], and their number into counts [B, HKV, SPLITS];
    - with `lists` alone, tokens listed in [B, HKV, room]: each program has `counts` of them;
    - all eligible ones, dense decode.

    Without v it ends with the lists. With LABEL one more program writes the newest key's label.
    """
    if PDL and threshold is None:  # the bracket has waited for what came before it
        tl.extra.cuda.gdc_wait()
    k_sb, k_sh, k_ss = k_strides
    l_sb, l_sh, l_sw = label_strides
    row, split = tl.program_id(0), tl.program_id(1)
    b, h = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
    seq_len = tl.load(seq_lens + b)
    if LABEL:
        if split == SPLITS:  # bracket has waited for k; who reads this label now does not use it
            newest = (seq_len - 1).to(tl.int64) + tl.arange(0, 1)
            _label(k, newest, newest, newest >= 0, b, h, labels, label_map, k_strides,
                   label_strides, WIDTHS)
            return

    # a group's queries; the bracket does not write them
    offs_g = tl.arange(0, max(16, triton.next_power_of_2(G)))[:, None]
    offs_d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    q += (row.to(tl.int64) * G + offs_g) * D + offs_d
    group = tl.load(q, mask=(offs_g < G) & (offs_d < D), other=0.0)

    begin, n = 0, 0
    if threshold is not None:
        lists += (row.to(tl.int64) * SPLITS + split) * room
        query += row.to(tl.int64) * G * query_words(WIDTHS)
        n = _choose(lists, labels + b * l_sb + h * l_sh, query, threshold + row, split, seq_len,
                    l_sw, forced, G, WIDTHS, SPLITS, BLOCK_S, STRIPE, PDL)
        tl.store(counts + row * SPLITS + split, n)
        end = n
        tl.debug_barrier()  # the list is read back in another order
    elif lists is not None:
        offs = tl.arange(0, SPLITS)
        count = tl.load(counts + row * SPLITS + offs)
        begin = tl.sum(tl.where(offs < split, count, 0))
        end = tl.minimum(begin + tl.sum(tl.where(offs == split, count, 0)), room)
        lists += row.to(tl.int64) * room
    else:
        begin = tl.maximum(seq_len - forced[2], 0)
        share = tl.cdiv(seq_len - begin, SPLITS * BLOCK_N) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, seq_len)

    if v is not None:
        part = _attend(group, k + b * k_sb + h * k_sh, v + b * k_sb + h * k_sh, lists, begin, end,
                       k_ss, scale_log2, D, BLOCK_N)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        _combine(part, n, row, split, parts, attended, out, G, D, SPLITS, BLOCK_N)


# ---------------------------------------------------------------- launches

NO_WINDOW = 2**30  # "window" of a kernel call without one: longer than any cache
WARPS = 1024  # that fill the GPU: programs of so many in all share fewer rows


def launch(kernel, grid, tensor, early=True, **arguments):
    """Runs a kernel that takes PDL: whether it starts while the one before it ends (programmatic
    dependent launch), `early` and on a GPU that can. tensor: one of the device."""
    PDL = (early and tensor.is_cuda and torch.version.cuda is not None
           and torch.cuda.get_device_capability(tensor.device)[0] >= 9)
    kernel[grid](**arguments, PDL=PDL, **(dict(launch_pdl=True) if PDL else {}))


class Workspace:
    """Scratch memory of the decode kernels for one shape of batch and cache; layers that run in
    turn share one.

    Only `attended` carries over from call to call: tokens attended to in sparse steps, [B, HKV]
    int64; `arrived` is 0 between them. A new prompt, another length or batch row start clean.
    """

    def __init__(self, B, HQ, HKV, D, S, device, config=None, splits=None):
        """config: DSConfig, or None for dense decode alone. splits: programs that share a row
        and KV head's tokens, a power of two."""
        def scratch(*shape, dtype=torch.int32):
            return torch.empty(*shape, dtype=dtype, device=device)

        self.shape = (B, HQ, HKV, D, S)
        # more than 32 take longer to combine than they save
        self.splits = splits or min(32, triton.next_power_of_2(triton.cdiv(WARPS, B * HKV)))
        self.warps = min(4, triton.next_power_of_2(triton.cdiv(WARPS, B * HKV * self.splits)))
        assert self.splits < 256, "a row's arrivals are counted in a byte"
        self.block_s = 512 * self.warps  # tokens that a program scores at a time
        self.stripe = 32 if self.splits > 16 else 64  # of them side by side: selections cluster
        self.partial = scratch(B * HQ, self.splits, D, dtype=torch.float32)
        self.partial_lse = scratch(B * HQ, self.splits, dtype=torch.float32)
        self.arrived = torch.zeros(B * HKV, dtype=torch.int32, device=device)
        if config is not None:
            self.widths = config.widths(D)
            self.query = scratch(B * HQ, query_words(self.widths))
            self.threshold = scratch(B * HKV)
            # any token may be chosen
            self.room = triton.cdiv(S, self.splits * self.block_s) * self.block_s
            self.lists = scratch(B, HKV, self.splits, self.room)
            self.counts = scratch(B, HKV, self.splits)
            self.attended = torch.zeros(B, HKV, dtype=torch.int64, device=device)


def bracket(q, labels, label_map, seq_lens, config, window, workspace, label_newest=True):
    """Query codes, log weights and thresholds, into the workspace.

    label_newest: the newest labels are still to be written; else it starts after the kernel before.
    """
    (B, HQ, D), HKV = q.shape, labels.shape[1]
    assert q.is_contiguous() and labels.stride(3) == 1
    assert label_map.widths == config.widths(D) == workspace.widths, "labels of other widths"
    launch(_bracket_kernel, (B * HKV,), q, early=label_newest, q=q, labels=labels,
           label_map=label_map.tensors(), seq_lens=seq_lens, query=workspace.query,
           threshold=workspace.threshold, label_strides=labels.stride()[:3],
           forced=(config.sink, config.recent, window or NO_WINDOW),
           budget=(config.n_tokens or 0, config.min_tokens, config.share(), config.dense_below),
           unit=1 / 127 / math.sqrt(D), HKV=HKV, G=HQ // HKV, D=D, WIDTHS=label_map.widths,
           num_warps=4 if HQ == HKV else 8,  # a group needs more registers
           enable_fp_fusion=False)  # codes round as the reference's do: ties between two are common


def attend(q, k, v, seq_lens, indices=None, counts=None, window=None, workspace=None, labels=None,
           label_map=None, config=None, label_newest=True):
    """Attention of one query per row over lists of tokens, or with config over those that a
    `bracket` chooses first, or over all eligible ones (dense decode). Shapes as in attend_ref.

    indices [B, HKV, any] int32, counts [B, HKV, splits]: a program's tokens come after those of
    the program before it, as the workspace's lists one behind the other. labels and label_map:
    the label of each row's newest key, k's at seq_lens - 1, is written, unless not label_newest.
    v: None to have the lists and counts of chosen tokens in the workspace, and no attention.
    """
    q = q.contiguous()
    (B, HQ, D), HKV = q.shape, k.shape[1]
    shape = B, HQ, HKV, D, k.shape[2] if labels is None else labels.shape[3]
    ws = workspace or Workspace(*shape, q.device, config)
    assert ws.shape == shape, "a workspace of another shape"
    assert k.stride(3) == 1 and (v is None or v.stride() == k.stride())
    assert counts is None or counts.shape[2] == ws.splits, "lists of a workspace of other splits"

    chosen = dict(query=None, threshold=None, attended=None, lists=indices, counts=counts,
                  room=0 if indices is None else indices.shape[2])
    if config is not None:
        bracket(q, labels, label_map, seq_lens, config, window, ws, label_newest)
        chosen = dict(query=ws.query, threshold=ws.threshold, attended=ws.attended, lists=ws.lists,
                      counts=ws.counts, room=ws.room)

    out, writes = None if v is None else torch.empty_like(q), labels is not None and label_newest
    always = (0, 0) if config is None else (config.sink, config.recent)
    launch(_attend_kernel, (B * HKV, ws.splits + writes), q, q=q, k=k, v=v, seq_lens=seq_lens,
           labels=labels, label_map=label_map and label_map.tensors(), **chosen,
           parts=(ws.partial, ws.partial_lse, ws.arrived), out=out, k_strides=k.stride()[:3],
           label_strides=(0, 0, 0) if labels is None else labels.stride()[:3],
           forced=(*always, window or NO_WINDOW), scale_log2=math.log2(math.e) / math.sqrt(D),
           HKV=HKV, G=HQ // HKV, D=D, WIDTHS=label_map.widths if label_map else (),
           SPLITS=ws.splits, BLOCK_S=ws.block_s, BLOCK_N=32 * ws.warps, STRIPE=ws.stripe,
           LABEL=writes, num_warps=ws.warps if q.element_size() == 2 else 4)
    return out


# ---------------------------------------------------------------- the decode step


def write_labels(k, positions, labels, label_map, config):
    """Writes the labels of new keys into the label cache, in place: label_ref, or one launch. The
    last dims of k, positions and labels must then be contiguous."""
    if not config.use_triton(k):
        return label_ref(k, positions, labels, label_map)
    B, HKV, T, _ = k.shape
    assert labels.shape[2] == words_in(label_map.widths), "labels of other widths"
    assert k.stride(3) == positions.stride(1) == labels.stride(3) == 1
    BLOCK_T = 1 if T == 1 else 64
    _label_kernel[(triton.cdiv(T, BLOCK_T), HKV, B)](
        k=k, positions=positions, labels=labels, label_map=label_map.tensors(), T=T,
        positions_stride=positions.stride(0), k_strides=k.stride()[:3],
        label_strides=labels.stride()[:3], WIDTHS=label_map.widths, BLOCK_T=BLOCK_T)


def ds_decode(q, k, v, labels, label_map, seq_lens, config, window=None, workspace=None,
              all_tokens=False):
    """One query per row over the tokens that its label scores select; without config, or with
    all_tokens, over all eligible ones. Cost follows seq_lens, not S.

    q [B, HQ, D] post-RoPE; k, v [B, HKV, S, D]; labels [B, HKV, W, S] int32 and label_map, this
    layer's LabelMap, None without config; seq_lens [B] int32, at least 1, newest token included;
    window: sliding window in tokens or None; workspace: scratch of this shape, so that nothing but
    the output is allocated. Returns [B, HQ, D].

    Writes the label of each row's newest key: on a GPU seq_lens must then not come from the kernel
    launched just before. Rows may share one cache, k, v and labels expanded along B, if its labels
    are there: none are written.
    """
    label_newest = labels is not None and (labels.stride(0) > 0 or len(q) == 1)
    selection = None if all_tokens else config
    if config.use_triton(q) if config else q.is_cuda:
        return attend(q, k, v, seq_lens, None, None, window, workspace, labels, label_map,
                      selection, label_newest)
    if label_newest:
        newest = (seq_lens - 1)[:, None]
        keys = k.take_along_dim(newest.long()[:, None, :, None], 2)
        label_ref(keys, newest, labels, label_map)
    S = int(seq_lens.max())  # the reference's cost, too, follows the live length
    k, v, chosen = k[:, :, :S], v[:, :, :S], None
    if selection:
        scores = score_ref(q, labels[..., :S], label_map, seq_lens, config, window)
        chosen = select_ref(scores, seq_lens, config, window)
    return attend_ref(q, k, v, seq_lens, chosen, window)
