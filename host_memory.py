"""Host memory that the GPU reads and writes: how much there is, a layer's K and V in it, as they
are or packed, and how single tokens' rows come to the GPU.

Plain torch functions named _ref are the specification; kernels do the same on a GPU and, with
TRITON_INTERPRET=1, on a CPU. Shapes follow the key at the top of ds_attention.py.
"""
import math
import mmap
import sys
import time
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from tqdm import tqdm

# ---------------------------------------------------------------- memory


def free_host_bytes():
    """Memory that this process may still take: the machine's, or what its control group allows. A
    group that allows more than the machine has is believed: virtual machines are given memory as
    they use it, and host_layers looks again."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(meminfo[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        group = Path("/sys/fs/cgroup" + own)
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(files["inactive_file"])
        limit = int((group / "memory.max").read_text())
        free = limit - used if limit > total else min(free, limit - used)
    return free


def wait_for_memory(nbytes, seconds=10):
    """Waits until the machine has so much available, as one may that is given memory as it uses it.
    Raises ValueError after some seconds in which nothing came."""
    def available():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)

    largest, until = available(), time.monotonic() + seconds
    while largest < nbytes:
        time.sleep(0.1)
        if (free := available()) > largest:
            largest, until = free, time.monotonic() + seconds
        if time.monotonic() > until:
            raise ValueError(f"{nbytes / 2**30:.1f} GiB of host memory are wanted next, and "
                             f"{largest / 2**30:.1f} available; take a shorter --max_seq_length or "
                             "a smaller batch")


def host_need(config, batch, length, dtype, ds=None):
    """Bytes of host memory for K and V of `batch` sequences of `length` tokens."""
    token = config.n_kv_heads * 2 * config.head_dim * dtype.itemsize
    return offloaded_layers(config, ds) * batch * length * token


def check_host_memory(free, config, batch, max_seq_length, dtype, ds=None):
    """Raises ValueError, naming what would fit, if `free` bytes of host memory are too few for K
    and V."""
    layers, token = offloaded_layers(config, ds), host_need(config, 1, 1, dtype, ds)
    need = batch * max_seq_length * token
    if need <= free:
        return
    options = []
    if batch * token <= free:
        options.append(f"--max_seq_length {free // (batch * token)}")
    if batch > 1 and max_seq_length * token <= free:
        options.append(f"a batch of {free // (max_seq_length * token)}")
    raise ValueError(
        f"max_seq_length={max_seq_length} for a batch of {batch} needs {need / 2**30:.1f} GiB of "
        f"host memory for K and V of {layers} layers, {free / 2**30:.1f} are available; "
        f"{' or '.join(options) or 'nothing'} would fit")


def offloaded_layers(config, ds):
    """How many of the model's layers have their K and V in host memory: the last ones."""
    layers = config.n_layers - (ds.dense_layers if ds else 0)
    if layers < 1:
        raise ValueError(f"dense_layers={ds.dense_layers}: of {config.n_layers} layers none is "
                         "left to offload")
    return layers


class HostMap(mmap.mmap):
    """Memory of the host. What pins it is undone before it is given back, by `unpin`."""

    unpin = None

    def __del__(self):
        if self.unpin and not sys.is_finalizing():
            self.unpin()


def host_tensor(shape, dtype, device):
    """Zeros in memory of the host that kernels on `device`, too, read and write.

    torch's own pinned allocations are rounded up to powers of two: up to twice the memory.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = HostMap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # no huge pages here: pinning is slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    if device.type == "cuda":
        tensor.zero_()  # by all cores: to pin memory that is there takes a third of the time
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(tensor.data_ptr(), nbytes, 0)
        if int(error):
            raise OSError(f"{nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error "
                          f"{int(error)}); take a shorter --max_seq_length or a smaller batch")
        memory.unpin = partial(cudart.cudaHostUnregister, tensor.data_ptr())
    return tensor


def host_layers(count, shape, dtype, device):
    """K and V of that many layers, a host_tensor each. Pinning takes about 0.1 s per GiB."""
    layers, nbytes = [], math.prod(shape) * dtype.itemsize
    for _ in tqdm(range(count), desc="pinning host memory", unit="layer", leave=False, delay=2):
        if device.type == "cuda":
            wait_for_memory(nbytes)
        layers.append(host_tensor(shape, dtype, device))
    return layers


class PinnedPool:
    """Pinned memory as large as any cache wanted so far, lent to one after the other: pinning takes
    longer than most measurements."""

    def __init__(self):
        self.held = []

    def layers(self, config, B, size, dtype, device):
        """K and V of a model's layers for B sequences of `size` tokens, a tensor each. Raises
        ValueError if the host's memory is too small."""
        shape = (B, config.n_kv_heads, size, 2, config.head_dim)
        numel = math.prod(shape)
        if len(self.held) < config.n_layers or self.held[0].numel() < numel:
            self.held = []  # before there is more
            check_host_memory(free_host_bytes(), config, B, size, dtype)
            self.held = host_layers(config.n_layers, (numel,), dtype, torch.device(device))
        return [whole[:numel].view(shape) for whole in self.held[: config.n_layers]]


# ---------------------------------------------------------------- rows

PACKED = 12 / 16  # the share of a row's bytes that it takes packed


def packs(D, dtype):
    """Whether rows of head dim D can be packed."""
    return dtype == torch.bfloat16 and D % 8 == 0


class HostRows:
    """K and V of one layer in host memory, kv [B, HKV, S, 2, D], or, of bfloat16, packed, so that
    fewer bytes go over PCIe.

    Packing loses nothing. A value takes 8 bits for sign and mantissa, and 4 for how far its
    exponent is below the largest of its token's K, or V. Of each eight values, the 4-bit codes are
    one word of 32 bits, the bytes of the first four a second, those of the others a third: D / 4 of
    each in `words` [B, HKV, S, 3D / 4]. 1 to 3 tokens in 100 do not pack: an exponent is too small,
    or K's largest out of range. They stay as they are, their last D / 4 words in `rest` [B, HKV, S,
    D / 4], behind `words` in kv's memory. `tops` [B, HKV, S] int16, on the GPU: the largest
    exponents of K, less 64, in the upper 7 bits, and of V in the lower 8; -1: not packed. """

    def __init__(self, kv, device, packed):
        (B, HKV, S, _, D), self.kv, self.tops = kv.shape, kv, None
        if packed and packs(D, kv.dtype):
            self.tops = torch.full((B, HKV, S), -1, dtype=torch.int16, device=device)
            all_words, tokens = kv.view(-1).view(torch.int32), B * HKV * S
            parts = all_words.split([tokens * 3 * D // 4, tokens * D // 4])
            self.words, self.rest = (part.view(B, HKV, S, -1) for part in parts)

    def sequence(self, b):
        """What there is of one sequence, packed, as a view."""
        view = copy(self)
        parts = self.tops, self.words, self.rest
        view.tops, view.words, view.rest = (x[b : b + 1] for x in parts)
        return view

    def read(self, b, rows, kernels):
        """Copies sequence b's first tokens to rows [1, HKV, T, 2, D]. kernels: if packed, by
        them."""
        heads, T = rows.shape[1:3]
        if self.tops is None:
            for h in range(heads):
                rows[0, h].copy_(self.kv[b, h, :T], non_blocking=True)
        elif kernels:
            unpack(self.sequence(b), rows)
        else:
            every = torch.meshgrid(torch.arange(heads), torch.arange(T), indexing="ij")
            h, t = (x.flatten() for x in every)
            rows[0, h, t] = unpack_ref(self, torch.full_like(h, b), h, t)

    def write(self, b, start, rows, kernels):
        """Copies rows [1, HKV, T, 2, D] to sequence b's tokens from `start` on; kernels: as in
        read."""
        end = start + rows.shape[2]
        if self.tops is None:
            for h in range(rows.shape[1]):
                self.kv[b, h, start:end].copy_(rows[0, h], non_blocking=True)
        else:
            ends = torch.full((1,), end, dtype=torch.int32, device=rows.device)
            (pack if kernels else pack_ref)(self.sequence(b), rows, ends)

    def append(self, newest, seq_lens, kernels):
        """Takes the newest tokens' K and V, newest [B, HKV, 2, D]; kernels: as in read."""
        (pack if kernels else pack_ref)(self, newest[:, :, None], seq_lens)

    def map_bytes(self):
        return 0 if self.tops is None else self.tops.nbytes

    def streamed(self):
        """What a step that reads all K and V copies to the GPU: kv, or the packed words."""
        return self.kv if self.tops is None else self.words

    def streamed_to(self, words, kv):
        """Unpacks `words`, a copy of streamed(), to kv [B, HKV, S, 2, D], and returns kv. Rows that
        are not packed take their last quarter, `rest`, from the host."""
        there = copy(self)
        there.words = words
        for b in range(len(kv)):
            there.read(b, kv[b : b + 1], kv.is_cuda)
        return kv

    def as_is(self, seq_lens):
        """The share of live tokens' rows that are not packed."""
        if self.tops is None:
            return 1.0
        live = torch.arange(self.tops.shape[2], device=seq_lens.device) < seq_lens[:, None, None]
        return (((self.tops < 0) & live).sum() / (live.sum() * self.tops.shape[1])).item()

    def row_bytes(self, seq_lens):
        """What a token of one KV head is over PCIe, on average over the live ones."""
        return self.kv[0, 0, 0].nbytes * (PACKED + (1 - PACKED) * self.as_is(seq_lens))


def pack_ref(host, rows, ends):
    """Stores rows [B, HKV, T, 2, D] of the T positions before ends [B] int32 in host, HostRows; if
    it has tops, packed."""
    B, HKV, T, _, D = rows.shape
    if host.tops is None:
        for b in range(B):
            host.kv[b, :, int(ends[b]) - T : int(ends[b])] = rows[b]
        return
    rows = rows.contiguous()
    v = rows.view(torch.int16).int() & 0xFFFF
    exponents = v >> 7 & 255
    tops = exponents.amax(4)  # [B, HKV, T, 2]
    codes = tops[..., None] - exponents
    fit = (codes < 16).all(4).all(3) & (tops[..., 0] >= 64) & (tops[..., 0] < 192)
    eights, bytes_ = (x.view(B, HKV, T, D // 4, 8) for x in (codes & 15, v >> 8 & 128 | v & 127))
    shifts = torch.arange(8, device=v.device)
    halves = bytes_.unflatten(4, (2, 4)) << 8 * shifts[:4]
    parts = eights << 4 * shifts, halves[..., 0, :], halves[..., 1, :]
    # sums of bits: they wrap as int32
    words = torch.cat([part.sum(4) for part in parts], 3).to(torch.int32)
    whole = rows.view(torch.int32).view(B, HKV, T, D)
    words = torch.where(fit[..., None], torch.cat([words, whole[..., 3 * D // 4 :]], 3), whole)
    for b in range(B):
        at = slice(int(ends[b]) - T, int(ends[b]))
        both = (tops[b, ..., 0] - 64 << 8) + tops[b, ..., 1]
        host.tops[b, :, at] = torch.where(fit[b], both, -1).to(torch.int16)
        of_row = words[b].to(host.kv.device)
        host.words[b, :, at], host.rest[b, :, at] = of_row.split([3 * D // 4, D // 4], 2)


def unpack_ref(host, b, h, tokens):
    """Rows [n, 2, D] of tokens [n] int64, of sequences b and KV heads h [n]."""
    D, at = host.kv.shape[4], (b, h, tokens)
    top, words = host.tops[at].int(), host.words[at]
    whole = torch.cat([words, host.rest[at]], 1).view(torch.bfloat16).view(-1, 2, D)
    words, shifts = words.view(-1, 3, D // 4), torch.arange(8, device=words.device)
    codes = (words[:, 0, :, None] >> 4 * shifts & 15).view(-1, 2, D)
    bytes_ = (words[:, 1:, :, None] >> 8 * shifts[:4] & 255).permute(0, 2, 1, 3).reshape(-1, 2, D)
    exponents = torch.stack([64 + (top >> 8), top & 255], 1)[..., None] - codes
    v = (bytes_ & 128) << 8 | exponents << 7 | bytes_ & 127
    return torch.where((top < 0)[:, None, None], whole, v.to(torch.int16).view(torch.bfloat16))


@triton.jit
def _pack_kernel(rows, ends, words, rest, tops, T, S, r_sb, r_sh, r_st, HKV, D: tl.constexpr,
                 BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """pack_ref. Rows are of int16; without tops `words` are all of the host's rows."""
    row = tl.program_id(1)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    offs, g = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 8)
    at = row.to(tl.int64) * S + tl.load(ends + row // HKV) - T + t
    rows += (row // HKV).to(tl.int64) * r_sb + (row % HKV).to(tl.int64) * r_sh
    mask = (t < T)[:, None] & (offs < 2 * D)[None, :]
    v = tl.load(rows + t.to(tl.int64)[:, None] * r_st + offs[None, :], mask=mask, other=0)
    if tops is None:
        tl.store(words + at[:, None] * (2 * D) + offs[None, :], v, mask=mask)
    else:
        bits = v.to(tl.int32) & 0xFFFF
        exponents = (bits >> 7) & 255
        of_k = (offs < D)[None, :]
        top_k = tl.max(tl.where(of_k, exponents, 0), 1)
        top_v = tl.max(tl.where(of_k, 0, exponents), 1)
        codes = tl.where(mask, tl.where(of_k, top_k[:, None], top_v[:, None]) - exponents, 0)
        fit = (tl.max(codes, 1) < 16) & (top_k >= 64) & (top_k < 192)
        tl.store(tops + at, tl.where(fit, ((top_k - 64) << 8) + top_v, -1).to(tl.int16), mask=t < T)
        halves = tl.pointer_type(tl.int16)
        early = words.to(halves, bitcast=True) + (at * (D // 2 * 3))[:, None] + offs[None, :]
        late = rest.to(halves, bitcast=True) + (at * (D // 2))[:, None] + offs[None, :] - D // 2 * 3
        whole = tl.where((offs < D // 2 * 3)[None, :], early, late)
        tl.store(whole, v, mask=mask & (fit == 0)[:, None])
        byte = (((bits >> 8) & 128) | (bits & 127)) << (8 * (offs % 4))[None, :]
        codes = (codes & 15) << (4 * (offs % 8))[None, :]
        first = ((offs % 8) < 4)[None, :]
        to = words + (at * (D // 4 * 3))[:, None] + g[None, :]
        inside = ((t < T) & fit)[:, None] & (g < D // 4)[None, :]
        EIGHTS: tl.constexpr = (TOKENS, BLOCK // 8, 8)
        tl.store(to, tl.sum(tl.reshape(codes, EIGHTS), 2), mask=inside)
        tl.store(to + D // 4, tl.sum(tl.reshape(tl.where(first, byte, 0), EIGHTS), 2), mask=inside)
        tl.store(to + D // 2, tl.sum(tl.reshape(tl.where(first, 0, byte), EIGHTS), 2), mask=inside)


def pack(host, rows, ends):
    """As pack_ref; rows with K and V of a token side by side."""
    assert rows.stride(3) == rows.shape[4] and rows.stride(4) == 1
    rows, words, rest = rows.view(torch.int16), host.kv.view(torch.int16), None
    if host.tops is not None:
        words, rest = host.words, host.rest
    B, HKV, T, _, D = rows.shape
    tokens = min(16, triton.next_power_of_2(T))
    _pack_kernel[(triton.cdiv(T, tokens), B * HKV)](
        rows=rows, ends=ends, words=words, rest=rest, tops=host.tops, T=T, S=host.kv.shape[2],
        r_sb=rows.stride(0), r_sh=rows.stride(1), r_st=rows.stride(2), HKV=HKV, D=D,
        BLOCK=triton.next_power_of_2(2 * D), TOKENS=tokens)


@triton.jit
def _pair(codes, bytes, exponents, N: tl.constexpr):
    """Values N and N + 1 of eight, as one word."""
    byte = bytes >> (8 * (N % 4))
    low = ((byte & 128) << 8) | ((exponents - ((codes >> (4 * N)) & 15)) << 7) | (byte & 127)
    byte = byte >> 8
    high = ((byte & 128) << 8) | ((exponents - ((codes >> (4 * N + 4)) & 15)) << 7) | (byte & 127)
    return low | (high << 16)


@triton.jit
def unpacked(words, rest, tops, at, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """The rows at `at`, int64 [any], as words of two values, int32 [any, BLOCK]."""
    g, offs = tl.arange(0, BLOCK // 4), tl.arange(0, BLOCK)
    top = tl.load(tops + at, mask=mask, other=0).to(tl.int32)
    packed = (mask & (top >= 0))[:, None] & (g < D // 4)[None, :]
    of_row = words + (at * (D // 4 * 3))[:, None]
    codes = tl.load(of_row + g[None, :], mask=packed, other=0)
    first = tl.load(of_row + D // 4 + g[None, :], mask=packed, other=0)
    second = tl.load(of_row + D // 2 + g[None, :], mask=packed, other=0)
    late = rest + (at * (D // 4))[:, None] + offs[None, :] - D // 4 * 3
    whole = tl.load(tl.where((offs < D // 4 * 3)[None, :], of_row + offs[None, :], late),
                    mask=(mask & (top < 0))[:, None] & (offs < D)[None, :], other=0)
    exponents = tl.where((g < D // 8)[None, :], 64 + (top >> 8)[:, None], (top & 255)[:, None])
    evens = tl.join(_pair(codes, first, exponents, 0), _pair(codes, second, exponents, 4))
    odds = tl.join(_pair(codes, first, exponents, 2), _pair(codes, second, exponents, 6))
    values = tl.reshape(tl.join(evens, odds), (at.shape[0], BLOCK))
    return tl.where((top < 0)[:, None], whole, values)


@triton.jit
def _unpack_kernel(words, rest, tops, rows, T, S, r_sh, D: tl.constexpr, BLOCK: tl.constexpr,
                   TOKENS: tl.constexpr):
    """See unpack: rows are of words."""
    offs, h = tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    found = unpacked(words, rest, tops, h * S + t, t < T, D, BLOCK)
    to = rows + h * r_sh + t[:, None] * D + offs[None, :]
    tl.store(to, found, mask=(t < T)[:, None] & (offs < D)[None, :])


def unpack(host, rows):
    """The first T rows of the one sequence in host, into rows [1, HKV, T, 2, D] with tokens side by
    side."""
    _, HKV, T, _, D = rows.shape
    assert rows.stride(2) == 2 * D and len(host.words) == 1
    rows = rows.view(torch.int32)
    _unpack_kernel[(triton.cdiv(T, 32), HKV)](
        words=host.words, rest=host.rest, tops=host.tops, rows=rows, T=T, S=host.kv.shape[2],
        r_sh=rows.stride(1), D=D, BLOCK=triton.next_power_of_2(D), TOKENS=32)


# ---------------------------------------------------------------- fetching


def fetch_ref(kv, placed, host, newest, indices, seq_lens):
    """Copies tokens' rows from host, HostRows, to kv [B, HKV, any, 2, D].

    indices [B, heads, capacity] int32: tokens of the first KV heads, or of all; placed, a Placement
    of offload.py, says which of them are missing, and to which rows of kv they go. The newest
    tokens' K and V, newest [B, HKV, 2, D], go to theirs. newest None: they are not known yet.
    indices None: nothing is missing any more."""
    last = (seq_lens - 1).long()
    if indices is not None:
        nth = torch.arange(indices.shape[2], device=indices.device)
        b, h, j = (nth < placed.n_missing[..., None]).nonzero(as_tuple=True)
        i = placed.missing[b, h, j].long()
        known = indices[b, h, i] != last[b]
        b, h, i = b[known], h[known], i[known]
        tokens = indices[b, h, i].long()
        found = host.kv[b, h, tokens] if host.tops is None else unpack_ref(host, b, h, tokens)
        kv[b, h, placed.rows[b, h, i].long()] = found
    if newest is None:
        return
    b, h = (placed.newest >= 0).nonzero(as_tuple=True)
    kv[b, h, placed.newest[b, h].long()] = newest[b, h]


@triton.jit
def _fetch_kernel(host, rest, tops, newest, kv, seq_lens, indices, rows, missing, n_missing,
                  newest_row, capacity, S, kv_rows, all_heads, HEADS: tl.constexpr,
                  HKV: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, GIVEN: tl.constexpr,
                  TOKENS: tl.constexpr):
    """fetch_ref. The programs share out what is missing, TOKENS rows at a time, head after head.

    A token's row is its K and V, ROW elements; with `tops` ROW words of two values, and host and
    rest are the words and rest of HostRows. """
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs, each = tl.arange(0, BLOCK), tl.arange(0, GIVEN)
    if indices is not None:
        count = tl.load(n_missing + each, mask=each < all_heads // HKV * HEADS, other=0)
        parts = tl.cdiv(count, TOKENS)
        end = tl.cumsum(parts, 0)
        for part in range(program, tl.sum(parts), programs):
            given = tl.sum((end <= part).to(tl.int32))  # of the rows and heads with tokens
            of_row = part - tl.sum(tl.where(each == given, end - parts, 0))
            nth = of_row * TOKENS + tl.arange(0, TOKENS)
            mask = nth < tl.sum(tl.where(each == given, count, 0))
            row = given // HEADS * HKV + given % HEADS  # of all
            last = tl.load(seq_lens + row // HKV) - 1
            base, first = row.to(tl.int64), given.to(tl.int64) * capacity
            i = tl.load(missing + first + nth, mask=mask, other=0)
            token = tl.load(indices + first + i, mask=mask, other=0)
            to = tl.load(rows + first + i, mask=mask, other=0)
            mask = mask & (token != last)
            inside = mask[:, None] & (offs < ROW)[None, :]
            if tops is None:
                source = host + (base * S + token)[:, None] * ROW + offs[None, :]
                fetched = tl.load(source, mask=inside, other=0.0)
            else:
                fetched = unpacked(host, rest, tops, base * S + token, mask, ROW, BLOCK)
            target = kv + (base * kv_rows + to)[:, None] * ROW + offs[None, :]
            tl.store(target, fetched, mask=inside)
    if newest is not None:
        for begin in range(program * 16, all_heads, programs * 16):
            row = begin + tl.arange(0, 16)
            base = row.to(tl.int64)
            to = tl.load(newest_row + base, mask=row < all_heads, other=-1)
            mask = (row < all_heads)[:, None] & (offs < ROW)[None, :]
            fresh = tl.load(newest + base[:, None] * ROW + offs[None, :], mask=mask, other=0)
            tl.store(kv + (base * kv_rows + to)[:, None] * ROW + offs[None, :], fresh,
                     mask=mask & (to >= 0)[:, None])


def fetch(kv, placed, host, newest, indices, seq_lens, programs=None, tokens=128, num_warps=32):
    """As fetch_ref, in one launch of few programs. Each fills a multiprocessor, since whatever else
    ran there would wait as long as loads from the host do, and has many rows on their way. With 32
    warps each, 8 programs keep PCIe busy; beside attention, where what they read on the GPU before
    a row comes later, 12 do. More heads get more programs: each head may miss few tokens."""
    B, heads, capacity = placed.rows.shape
    programs = programs or min(64, max(12, B * heads // 4))
    assert host.kv.is_contiguous() and (newest is None or newest.is_contiguous())
    assert indices is None or indices.is_contiguous() and indices.shape == placed.rows.shape
    whole, rest, fresh = host.kv, None, newest
    _, HKV, S, _, D = whole.shape
    if host.tops is not None:
        whole, rest, D = host.words, host.rest, D // 2
        fresh, kv = (x if x is None else x.view(torch.int32) for x in (fresh, kv))
    _fetch_kernel[(programs,)](
        host=whole, rest=rest, tops=host.tops, newest=fresh, kv=kv, seq_lens=seq_lens,
        indices=indices, rows=placed.rows, missing=placed.missing, n_missing=placed.n_missing,
        newest_row=placed.newest, capacity=capacity, S=S, kv_rows=kv.shape[2], all_heads=B * HKV,
        HEADS=heads, HKV=HKV, ROW=2 * D, BLOCK=triton.next_power_of_2(2 * D),
        GIVEN=triton.next_power_of_2(B * heads), TOKENS=tokens, num_warps=num_warps)
