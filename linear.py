"""Linear layers: in 16 bits or int8, and a decode step's, fused with all that stands between them.

Shapes follow the key at the top of ds_attention.py; `dim` is the model's width.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

from ds_attention import PTX, launch


def largest(weight):
    """weight [..., out, in] -> [..., out]: the largest magnitude of each row."""
    low, high = weight.aminmax(dim=-1)
    return torch.maximum(-low, high)


def quantized(weight, magnitudes):
    """weight [..., out, in] -> (codes int8 of its shape, scale [..., out] fp32): codes times scale
    is nearest to it, by row and symmetric. magnitudes: `largest` of the rows, of which `weight` may
    have a part."""
    codes = torch.empty_like(weight, dtype=torch.int8)
    scale = magnitudes.float().clamp(min=1e-30) / 127
    parts = (x.flatten(0, weight.ndim - 2).split(4096) for x in (weight, codes, scale))
    for rows, of_rows, scales in zip(*parts):  # in parts: an fp32 copy is large
        of_rows.copy_((rows.float() / scales[:, None]).round_())
    return codes, scale


class Linear(nn.Linear):
    """nn.Linear. Its weight may be int8, as `quantized` has it, with `scale`: decode kernels read
    it so, and whatever else needs the weight makes 16 bits of it first."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("scale", None)

    def quantize(self):
        codes, scale = quantized(self.weight, largest(self.weight))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def rows(self, n, dtype):
        """The first n outputs' weights [n, in], in dtype if they are int8."""
        weight = self.weight[:n]
        return weight if self.scale is None else (weight * self.scale[:n, None]).to(dtype)

    def forward(self, x):
        whole = self.scale is None  # then no slice: training would pay for it
        weight = self.weight if whole else self.rows(self.out_features, x.dtype)
        return F.linear(x, weight, self.bias)


# ---------------------------------------------------------------- decode kernels

# The kernels of a decode step overlap: one may start once all programs of the one before have
# called gdc_launch_dependents (programmatic dependent launch). To keep that safe, a kernel calls
# gdc_wait before it writes, or reads what this step has written: when it has ended, so have all
# before it. It may do either earlier if the kernel before it launches it after its own gdc_wait.
# So attend reads q and k, and writes the newest label, before it waits for bracket; and the down
# products of experts.py read all but their inputs before they wait for the kernel of gate and up.


@triton.jit
def load_inputs(x, offs_k, B, K, SHAPE: tl.constexpr, ALONE: tl.constexpr, UPCAST: tl.constexpr):
    """Columns offs_k [.., 1, part] of x [B, K], zeros beyond: SHAPE [.., at least B, part] with its
    last two dims swapped. ALONE: the one sequence's are loaded once and stand in all rows."""
    b = tl.arange(0, 1 if ALONE else SHAPE[len(SHAPE) - 2])[:, None]
    inputs = tl.load(x + b * K + offs_k, mask=(b < B) & (offs_k < K), other=0.0)
    if UPCAST:
        inputs = inputs.to(tl.float32)
    return tl.trans(tl.broadcast_to(inputs, SHAPE))


CODE_UNIT = tl.constexpr(64.0)  # what `widened` divides int8 codes by


@triton.jit
def widened(tile, dtype: tl.constexpr):
    """A tile of weights in dtype, exact: 16 bits as they are, int8 codes over CODE_UNIT.

    For bfloat16 in 1.25 instructions a weight, where a conversion takes 2: sixteen bits of which
    the lower eight are u and the others zero are the bfloat16 u / 2**133, as its smallest numbers,
    subnormal and normal, are evenly spaced.
    """
    if tile.dtype != tl.int8:
        return tile.to(dtype)
    elif not PTX or dtype != tl.bfloat16:
        return (tile.to(tl.float32) / CODE_UNIT).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, first, last, factor, offset;
            xor.b32 bytes, $2, 0x80808080;      // u: the code plus 128
            prmt.b32 first, bytes, 0, 0x4140;
            prmt.b32 last, bytes, 0, 0x4342;
            mov.b32 factor, 0x7F007F00;         // 2**127
            mov.b32 offset, 0xC000C000;         // -2
            fma.rn.bf16x2 $0, first, factor, offset;
            fma.rn.bf16x2 $1, last, factor, offset;
            }""", "=r,=r,r", [tile], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def _linear_kernel(x, w, scale, out, squares, gain, scaled, bias, q_gain, k_gain, cos, sin,
                   seq_lens, kv, B, N, K, half, parts, HQ, HKV, kv_sb, kv_sh, kv_ss, eps,
                   EPILOGUE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, NORM_PAIRS: tl.constexpr,
                   STAGES: tl.constexpr, PARTS: tl.constexpr, ALONE: tl.constexpr,
                   UPCAST: tl.constexpr, PDL: tl.constexpr):
    """x [B, K] times w [rows, K], then an epilogue: see the methods of Residual.

    A program owns BLOCK_N of N outputs, all of K. BLOCK_K is in PARTS, one for each warp where
    there are several, so that no two read or widen the same weights; their sums meet at the end.
    w may be int8: then scale [rows] fp32 is what its rows are times. "silu" and "rope" take two
    rows of w for each n: n counts pairs of rows that lie `half` apart. NORM_PAIRS: `half`, where q
    and k are normed by head; a program then has whole heads.
    """
    PAIR: tl.constexpr = EPILOGUE == "silu" or EPILOGUE == "rope"
    NORM: tl.constexpr = EPILOGUE != "residual"
    pid = tl.program_id(0)
    n, b = pid * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    PART: tl.constexpr = BLOCK_K // PARTS
    offs_k = tl.arange(0, PART)[None, :]
    if PARTS > 1:
        offs_k += tl.arange(0, PARTS)[:, None, None] * PART  # [PARTS, 1, PART]
    mask_n, mask_b = n < N, b < B
    mask = mask_n[:, None] & mask_b[None, :]
    row = tl.minimum(n, N - 1)
    if PAIR:
        row += row // half * half
    rows = w + row.to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_wait()
    # what the epilogue needs is loaded here, so that its latency is the loop's
    at = b[None, :] * N + n[:, None]
    if NORM:
        offs_p = tl.arange(0, BLOCK_P)
        part = tl.load(squares + offs_p[:, None] * B + b[None, :],
                       mask=(offs_p < parts)[:, None] & mask_b[None, :], other=0.0)
    elif gain is not None:
        before = tl.load(out + at, mask=mask, other=0.0)
        gains = tl.load(gain + n, mask=mask_n, other=0.0)
    if scale is not None:
        scale_1 = tl.load(scale + row)[:, None]
        if PAIR:
            scale_2 = tl.load(scale + row + half)[:, None]
    if EPILOGUE == "rope":
        head, channel = n // half, n % half
        turned = mask & (head < HQ + HKV)[:, None]  # V is not
        angle = b[None, :] * half + channel[:, None]
        c, s = (tl.load(cos + angle, mask=turned, other=1.0),
                tl.load(sin + angle, mask=turned, other=0.0))
        position = tl.load(seq_lens + b, mask=mask_b, other=1) - 1
        if bias is not None:
            bias_1 = tl.load(bias + row).to(tl.float32)[:, None]
            bias_2 = tl.load(bias + row + half).to(tl.float32)[:, None]
        if NORM_PAIRS:
            to_gain = tl.where(head < HQ, q_gain + channel, k_gain + channel)
            gain_1 = tl.load(to_gain, mask=mask_n & (head < HQ + HKV),
                             other=1.0).to(tl.float32)[:, None]
            gain_2 = tl.load(to_gain + half, mask=mask_n & (head < HQ + HKV),
                             other=1.0).to(tl.float32)[:, None]
    OUT: tl.constexpr = [PARTS, BLOCK_N, BLOCK_B] if PARTS > 1 else [BLOCK_N, BLOCK_B]
    IN: tl.constexpr = [PARTS, BLOCK_B, PART] if PARTS > 1 else [BLOCK_B, PART]
    acc, acc_2 = tl.zeros(OUT, tl.float32), tl.zeros(OUT, tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = k + offs_k < K
        inputs = load_inputs(x, k + offs_k, B, K, IN, ALONE, UPCAST)
        tile = tl.load(rows + (k + offs_k), mask=mask_k, other=0, eviction_policy="evict_first")
        acc = tl.dot(widened(tile, inputs.dtype), inputs, acc)
        if PAIR:
            tile = tl.load(rows + half * K + (k + offs_k), mask=mask_k, other=0,
                           eviction_policy="evict_first")
            acc_2 = tl.dot(widened(tile, inputs.dtype), inputs, acc_2)
        if PDL and BLOCK_B <= 16:  # else they start when all have ended: 3% faster
            if k >= K - BLOCK_K:  # its last step: any earlier they crowd where there is room
                tl.extra.cuda.gdc_launch_dependents()
    if PARTS > 1:
        acc, acc_2 = tl.sum(acc, 0), tl.sum(acc_2, 0)
    dtype = out.dtype.element_ty
    if scale is not None:
        acc = acc * CODE_UNIT * scale_1
        if PAIR:
            acc_2 = acc_2 * CODE_UNIT * scale_2
    if NORM:
        rstd = tl.rsqrt(tl.sum(part, 0) / K + eps)[None, :]
        acc, acc_2 = acc * rstd, acc_2 * rstd
    if EPILOGUE == "none" or (EPILOGUE == "residual" and gain is None):
        tl.store(out + at, acc.to(dtype), mask=mask)
    if EPILOGUE == "silu":
        tl.store(out + at, (acc / (1 + tl.exp(-acc)) * acc_2).to(dtype), mask=mask)
    if EPILOGUE == "residual" and gain is not None:
        total = (before.to(tl.float32) + acc).to(dtype)
        tl.store(out + at, total, mask=mask)
        total = total.to(tl.float32)
        tl.store(scaled + at, (total * gains.to(tl.float32)[:, None]).to(dtype), mask=mask)
        tl.store(squares + pid * B + b, tl.sum(tl.where(mask, total * total, 0.0), 0), mask=mask_b)
    if EPILOGUE == "rope":
        if bias is not None:
            acc, acc_2 = acc + bias_1, acc_2 + bias_2
        if NORM_PAIRS:
            SPLIT: tl.constexpr = [BLOCK_N // NORM_PAIRS, NORM_PAIRS, BLOCK_B]  # heads, their pairs
            square = tl.sum(tl.reshape(acc * acc + acc_2 * acc_2, SPLIT), 1, keep_dims=True)
            head_rstd = tl.reshape(tl.broadcast_to(
                tl.rsqrt(square / (2 * NORM_PAIRS) + eps), SPLIT), [BLOCK_N, BLOCK_B])
            head_rstd = tl.where((head < HQ + HKV)[:, None], head_rstd, 1.0)
            acc, acc_2 = acc * head_rstd * gain_1, acc_2 * head_rstd * gain_2
        first, second = (acc * c - acc_2 * s).to(dtype), (acc_2 * c + acc * s).to(dtype)
        to_q, to_kv = mask & (head < HQ)[:, None], mask & (head >= HQ)[:, None]
        at = (b[None, :] * HQ + head[:, None]) * (2 * half) + channel[:, None]
        tl.store(out + at, first, mask=to_q)
        tl.store(out + at + half, second, mask=to_q)
        slot = b.to(tl.int64) * kv_sb + position.to(tl.int64) * kv_ss
        in_token = (head >= HQ + HKV).to(tl.int32) * 2 * half + channel  # a token's K, then its V
        at = slot[None, :] + (((head - HQ) % HKV).to(tl.int64) * kv_sh + in_token)[:, None]
        tl.store(kv + at, first, mask=to_kv)
        tl.store(kv + at + half, second, mask=to_kv)


@triton.jit
def _enter_kernel(table, tokens, gain, x, scaled, squares, seq_lens, grow, frequencies, rope,
                  B, dim, half, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """See Residual; a program for each sequence."""
    pid_b = tl.program_id(0)
    row = pid_b.to(tl.int64)
    if tokens is not None:
        row = tl.load(tokens + pid_b).to(tl.int64)
    if seq_lens is not None:
        length = tl.load(seq_lens + pid_b)
        if grow is None:
            length += 1
        else:
            length += tl.load(grow + pid_b).to(tl.int32)
        tl.debug_barrier()  # all warps have loaded it
        tl.store(seq_lens + pid_b, length)
        offs_d = tl.arange(0, BLOCK_D)
        frequency = tl.load(frequencies + offs_d, mask=offs_d < half, other=0.0)
        angle = (length - 1) * frequency.to(tl.float32)
        rope += pid_b * half + offs_d
        tl.store(rope, tl.cos(angle), mask=offs_d < half)
        tl.store(rope + B * half, tl.sin(angle), mask=offs_d < half)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, dim, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        value = tl.load(table + row * dim + offs, mask=offs < dim, other=0.0)
        gains = tl.load(gain + offs, mask=offs < dim, other=0.0).to(tl.float32)
        tl.store(x + pid_b * dim + offs, value, mask=offs < dim)
        value = value.to(tl.float32)
        tl.store(scaled + pid_b * dim + offs, (value * gains).to(x.dtype.element_ty),
                 mask=offs < dim)
        total += value * value
    tl.store(squares + pid_b, tl.sum(total, 0))


@triton.jit
def _choose_kernel(logits, sampled, tokens, running, ends, vocab, E, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):
    """See choose_likeliest; a program for each sequence."""
    pid_b, offs = tl.program_id(0), tl.arange(0, BLOCK)
    best, at = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for i in range(0, vocab, BLOCK):
        value = tl.load(logits + pid_b.to(tl.int64) * vocab + i + offs, mask=i + offs < vocab,
                        other=float("-inf")).to(tl.float32)
        at = tl.where(value > best, i + offs, at)
        best = tl.maximum(value, best)
    token = tl.min(tl.where(best == tl.max(best, 0), at, vocab), 0).to(tl.int64)
    alive = tl.load(running + pid_b) != 0
    for i in range(0, E):
        alive = alive & (token != tl.load(ends + i))
    tl.store(sampled + pid_b, token)
    tl.store(running + pid_b, alive)
    tl.store(tokens + pid_b, token, mask=alive)


def choose_likeliest(logits, sampled, tokens, running, ends):
    """A greedy step's end, in one launch: sampled [B] int64 becomes the first of the likeliest
    tokens of logits [B, vocab]; rows of running [B] bool for which it is one of ends [any] int64
    stop, and those that still run have it as the next of tokens [B] int64."""
    launch(_choose_kernel, (len(logits),), logits, logits=logits, sampled=sampled, tokens=tokens,
           running=running, ends=ends, vocab=logits.shape[1], E=len(ends), BLOCK=4096, num_warps=16)


class Residual:
    """The residual stream of a decode step, and the fused linear layers that read it.

    One token for each of B sequences. Beside x [B, dim] stand x times the weight of the norm that
    comes next, and the sums of x**2 over parts of dim: the kernel that changes x writes them, and
    the one that needs the norm scales its result at the end. Weights are read once, at the memory's
    speed, for up to MAX_ROWS sequences. They may be int8, with the `scale` of each output.
    `more` of any method: scale, and block sizes and the like, see _tiles.
    """

    MAX_ROWS = 64

    def __init__(self, table, gain, eps, tokens=None, seq_lens=None, grow=None, frequencies=None,
                 peers=None):
        """Starts as rows tokens [B], or all, of table [any, dim]; gain [dim]: the first norm's.
        peers: a parallel.Peers, if what is added is one rank's part.

        With seq_lens [B] int32 and frequencies [D / 2] a step begins: lengths grow by grow [B], or
        by 1 if it is None, and self.rope is cos and sin [B, D / 2] fp32 of the newest positions.
        """
        B, dim = len(table if tokens is None else tokens), table.shape[1]
        half = 1 if frequencies is None else len(frequencies)
        self.eps, self.peers = eps, peers
        self.x, self.scaled = (torch.empty(B, dim, dtype=table.dtype, device=table.device)
                               for _ in range(2))
        self.partial = torch.empty(triton.cdiv(dim, 16), B, dtype=torch.float32,
                                   device=table.device)
        self.squares = self.partial[:1]
        self.rope = torch.empty(2, B, half, device=table.device)
        _enter_kernel[(B,)](table, tokens, gain, self.x, self.scaled, self.squares, seq_lens, grow,
                            frequencies, self.rope, B, dim, half, BLOCK=1024,
                            BLOCK_D=triton.next_power_of_2(half))

    def logits(self, weight, **more):
        """norm(x) times weight [vocab, dim]: [B, vocab]."""
        return self._linear("none", self.scaled, weight, weight.shape[0], **more)

    def swiglu(self, weight, **more):
        """silu(gate) * up of norm(x), weight [2 * F, dim] holding gate, then up: [B, F]."""
        F_ = weight.shape[0] // 2
        return self._linear("silu", self.scaled, weight, F_, half=F_, **more)

    def heads(self, attn, cos, sin, kv, seq_lens, **more):
        """The query heads [B, HQ, D] of norm(x) after RoPE; K and V go to the cache.

        attn: an Attention. kv [B, HKV, S, 2, D] takes K and V at each row's newest position, one
        less than seq_lens [B] int32; cos, sin [B, D / 2] fp32 are of these.
        """
        (HQ, HKV, _), D, weight = attn.heads, attn.head_dim, attn.wqkv.weight
        assert kv.stride(3) == D and kv.stride(4) == 1
        out = torch.empty(len(self.x), HQ, D, dtype=self.x.dtype, device=self.x.device)
        rope = dict(cos=cos, sin=sin, seq_lens=seq_lens, kv=kv, HQ=HQ, HKV=HKV,
                    strides=kv.stride()[:3], bias=attn.wqkv.bias, scale=attn.wqkv.scale)
        if attn.q_norm is not None:
            BLOCK_N = max(16, D // 2)
            assert BLOCK_N % (D // 2) == 0 and BLOCK_N & (BLOCK_N - 1) == 0, (
                f"head_dim={D}: a program has whole heads")
            rope |= dict(NORM_PAIRS=D // 2, q_gain=attn.q_norm.weight, k_gain=attn.k_norm.weight,
                         BLOCK_N=BLOCK_N, PARTS=1, num_warps=4 if len(self.x) <= 16 else 8)
        return self._linear("rope", self.scaled, weight, weight.shape[0] // 2, half=D // 2, out=out,
                            **rope | more)

    def add(self, inputs, weight, gain, **more):
        """x += inputs [B, K] times weight [dim, K]; gain [dim]: the weight of the next norm."""
        out, own_gain = self.sum_place(gain)
        self._linear("residual", inputs, weight, weight.shape[0], out=out, gain=own_gain, **more)
        self.sum_ranks(out, gain)

    def sum_place(self, gain):
        """Where a kernel writes that adds to x, and the gain it takes: x itself, or a rank's part
        of the sum, which sum_ranks then adds."""
        return ((self.x, gain) if self.peers is None
                else (torch.empty_like(self.x, dtype=torch.float32), None))

    def sum_ranks(self, part, gain):
        """x += part [B, dim] of all ranks, if it is not x."""
        if self.peers is not None:
            self.squares = self.peers.add(part, self.x, self.scaled, self.partial, gain)

    def _linear(self, epilogue, x, weight, N, half=1, scale=None, out=None, gain=None, bias=None,
                q_gain=None, k_gain=None, cos=None, sin=None, seq_lens=None, kv=None, HQ=1, HKV=1,
                strides=(0, 0, 0), NORM_PAIRS=0, **tiles):
        B, K = x.shape
        assert x.is_contiguous() and weight.is_contiguous() and B <= self.MAX_ROWS
        tiles = _tiles(epilogue, B, self.x.shape[1], weight.element_size()) | tiles
        programs = triton.cdiv(N, tiles["BLOCK_N"])
        out = torch.empty(B, N, dtype=x.dtype, device=x.device) if out is None else out
        if epilogue == "residual":
            self.squares = self.partial[:programs]
        parts = len(self.squares)
        launch(_linear_kernel, (programs,), x, x=x, w=weight, scale=scale, out=out,
               squares=self.squares, gain=gain, scaled=None if gain is None else self.scaled,
               bias=bias, q_gain=q_gain, k_gain=k_gain, cos=cos, sin=sin, seq_lens=seq_lens, kv=kv,
               B=B, N=N, K=K, half=half, parts=parts, HQ=HQ, HKV=HKV, kv_sb=strides[0],
               kv_sh=strides[1], kv_ss=strides[2], eps=self.eps,
               EPILOGUE=epilogue, NORM_PAIRS=NORM_PAIRS, ALONE=B == 1,
               BLOCK_B=max(8, triton.next_power_of_2(B)), BLOCK_P=triton.next_power_of_2(parts),
               UPCAST=not x.is_cuda,  # the interpreter's dot takes bfloat16 for integers
               **tiles)
        return out


def _tiles(epilogue, B, dim, itemsize):
    """Block sizes of a fused linear layer: small programs, all of them resident, with 40 KB and
    more of weights on the way to each multiprocessor."""
    int8, pair, many = itemsize == 1, epilogue in ("silu", "rope"), B > 16
    if epilogue == "residual":  # has the fewest rows: more warps for each
        few = dim <= 4096
        sizes = (dict(BLOCK_N=32, BLOCK_K=512, num_warps=4, STAGES=4 if B <= 32 else 3) if many
                 # mostly 256 programs, of which a multiprocessor holds two
                 else dict(BLOCK_N=16 if few or B == 1 else 32, BLOCK_K=1024, num_warps=4,
                           STAGES=6 if B == 1 else 3) if int8
                 else dict(BLOCK_N=16, BLOCK_K=256, num_warps=2, STAGES=5))
    elif int8 and pair and dim >= 8192 and B <= 8:  # 2 to 7% of a layer of Llama-2-70B
        sizes = dict(BLOCK_N=16, BLOCK_K=512, num_warps=4, STAGES=3)
    elif not many:
        sizes = dict(BLOCK_N=32 if int8 and B > 8 else 16, BLOCK_K=256 if int8 else 128,
                     num_warps=2 if int8 else 1, STAGES=4 if epilogue == "rope" else 3)
    elif int8:
        sizes = dict(BLOCK_N=16 if B <= 32 else 32, BLOCK_K=128, num_warps=2, STAGES=4)
    else:  # inputs take as much shared memory as weights: no warp has its own
        sizes = dict(BLOCK_N=64, BLOCK_K=64 if pair else 128, num_warps=8, STAGES=4, PARTS=1)
    return dict(PARTS=sizes["num_warps"]) | sizes
