"""K and V in host memory (Double Sparsity's offload, arXiv 2408.07092, section 3.3), exact: the tokens attended are
those that the layer's own query selects, as in the on-GPU cache.

On the GPU stay the labels, the first (dense) layers, and of each other layer `resident_tokens` rows: the tokens that
recent steps selected. A step gives the tokens it selects slots among these rows, fetches those that are missing over
PCIe and attends to the slots; the host is not asked. Shapes follow the key at the top of ds_attention.py; R resident
tokens.

Without a DSConfig every layer's K and V are streamed whole through two buffers, for dense attention (as FlexGen does): the
baseline. Not run on a GPU yet.
"""
import math
import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from tqdm import tqdm

from ds_attention import attend, attend_ref, dense_decode, label_newest_ref, live_range, per_head, select_tokens
from model import KVCache, LayerCache, most

# ---------------------------------------------------------------- host memory


def host_tensor(shape, dtype, device):
    """Zeros in memory of the host that kernels on `device`, too, read and write.

    torch's own pinned allocations are rounded up to powers of two: up to twice the memory.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        error = cudart.cudaHostRegister(tensor.data_ptr(), nbytes, 0)
        if int(error):
            raise OSError(f"{nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {int(error)}); take a shorter "
                          "--max_seq_length or a smaller batch")
        weakref.finalize(memory, cudart.cudaHostUnregister, tensor.data_ptr()).atexit = False
    return tensor


def host_layers(count, shape, dtype, device):
    """K and V of that many layers, a host_tensor each. Pinning takes about 0.6 s per GiB."""
    bar = tqdm(range(count), desc="pinning host memory", unit="layer", leave=False, delay=2)
    return [host_tensor(shape, dtype, device) for _ in bar]


def free_host_bytes():
    """Memory that this process may still take: the machine's, or what its control group allows."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError):  # no control group, or one without a limit
        group = Path("/sys/fs/cgroup")
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(files["inactive_file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def check_host_memory(free, config, batch, max_seq_length, dtype, ds=None):
    """Raises ValueError, naming what would fit, if `free` bytes of host memory are too few for K and V."""
    layers = offloaded_layers(config, ds)
    token = layers * config.n_kv_heads * 2 * config.head_dim * dtype.itemsize
    if batch * max_seq_length * token <= free:
        return
    options = []
    if batch * token <= free:
        options.append(f"--max_seq_length {free // (batch * token)}")
    if batch > 1 and max_seq_length * token <= free:
        options.append(f"a batch of {free // (max_seq_length * token)}")
    need = batch * max_seq_length * token
    raise ValueError(f"max_seq_length={max_seq_length} for a batch of {batch} needs {need / 2**30:.1f} GiB of host memory "
                     f"for K and V of {layers} layers, {free / 2**30:.1f} are available; "
                     f"{' or '.join(options) or 'nothing'} would fit")


def offloaded_layers(config, ds):
    """How many of the model's layers have their K and V in host memory: the last ones."""
    layers = config.n_layers - (ds.dense_layers if ds else 0)
    if layers < 1:
        raise ValueError(f"dense_layers={ds.dense_layers}: of {config.n_layers} layers none is left to offload")
    return layers


class SideStream:
    """Copies beside the current stream; on a CPU what is called is done, and nothing runs beside anything."""

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs):
        """Copies (to, from) pairs once all that the current stream was given is done. Returns what `wait` takes."""
        if self.stream is None:
            return [to.copy_(source) for to, source in pairs]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied):
        """What the current stream is given from now on comes after these copies; None: after no copies."""
        if self.stream is not None and copied is not None:
            torch.cuda.current_stream().wait_event(copied)


# ---------------------------------------------------------------- resident tokens

AGES = 32  # steps since a slot was last used that replacement tells apart


class Resident:
    """Which tokens of one layer are on the GPU, and their K and V: R slots for each row and KV head."""

    def __init__(self, B, HKV, S, R, D, dtype, device):
        def table(*shape, dtype=torch.int32):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.kv = table(B, HKV, R, 2, D, dtype=dtype)
        self.slot_token = table(B, HKV, R)  # the token in a slot, -1 for none
        self.token_slot = table(B, HKV, S)  # the slot that a token was last put to; whether it is still there, slot_token says
        self.last_used = table(B, HKV, R)  # by this clock, of steps since forget()
        self.clock = table(B, HKV)
        # tokens selected, and of them fetched, without the newest ones; steps
        self.counts = table(3, B, HKV, dtype=torch.int64)
        # of the latest step: slots of the selected tokens in their order, and which of them (as indices into it) were missing
        self.slots, self.missing, self.n_missing = table(B, HKV, R), table(B, HKV, R), table(B, HKV)
        self.forget()

    def forget(self):
        """All slots become free, all counts zero."""
        self.slot_token.fill_(-1)
        self.last_used.fill_(-AGES)  # older than any in use
        self.clock.zero_()
        self.counts.zero_()

    def map_bytes(self):
        return sum(x.nbytes for x in vars(self).values()) - self.kv.nbytes


def resolve_ref(r, indices, n_tokens, seq_lens):
    """Gives every selected token a slot: those held keep theirs, the others take the slots that were not used for longest (of
    equals the first), none of this step's; both in ascending order. Sets r.slots, r.missing, r.n_missing and the maps.

    indices [B, HKV, any] int32, distinct tokens, of which the first n_tokens [B, HKV] count, at most R; seq_lens [B].
    """
    valid = torch.arange(indices.shape[2], device=indices.device) < n_tokens[..., None]
    tokens = torch.where(valid, indices, 0).long()
    slots = r.token_slot.gather(2, tokens).long()
    hit = valid & (r.slot_token.gather(2, slots) == tokens)
    missed = valid & ~hit
    r.clock += 1
    now = r.clock[..., None].expand_as(slots)
    r.last_used.scatter_reduce_(2, slots, torch.where(hit, now, -AGES), "amax")
    r.n_missing.copy_(missed.sum(2))
    age = (r.clock[..., None] - r.last_used).clamp(max=AGES - 1)
    rank = age.sort(dim=2, descending=True, stable=True).indices.argsort(2)  # of each slot among all, the oldest first
    b, h, slot = (rank < r.n_missing[..., None]).nonzero(as_tuple=True)  # [misses of all rows]
    i = missed.nonzero(as_tuple=True)[2]  # as many of each row and head, in the same order
    token = tokens[b, h, i]
    slots[b, h, i] = slot
    r.slots[..., : slots.shape[2]] = slots
    r.missing[b, h, (missed.cumsum(2) - 1)[b, h, i]] = i.int()
    r.slot_token[b, h, slot], r.token_slot[b, h, token], r.last_used[b, h, slot] = token.int(), slot.int(), r.clock[b, h]
    fetched = missed & (tokens != (seq_lens - 1)[:, None, None])
    r.counts += torch.stack([n_tokens - 1, fetched.sum(2), torch.ones_like(n_tokens)])


@triton.jit
def _resolve_kernel(indices, n_tokens, seq_lens, slot_token, token_slot, last_used, clock, counts, slots, missing, n_missing,
                    max_tokens, S, R, rows, HKV: tl.constexpr, AGES: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    n = tl.load(n_tokens + row)
    newest = tl.load(seq_lens + row // HKV) - 1
    now = tl.load(clock + row) + 1
    base = row.to(tl.int64)
    indices += base * max_tokens
    token_slot += base * S
    slot_token += base * R
    last_used += base * R
    slots += base * R
    missing += base * R
    misses = 0
    fetched = 0
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        token = tl.load(indices + i, mask=i < n, other=0)
        slot = tl.load(token_slot + token, mask=i < n, other=0)
        hit = (i < n) & (tl.load(slot_token + slot, mask=i < n, other=-1) == token)
        tl.store(slots + i, slot, mask=hit)
        tl.store(last_used + slot, now, mask=hit)
        missed = ((i < n) & (hit == 0)).to(tl.int32)
        tl.store(missing + misses + tl.cumsum(missed, 0) - missed, i, mask=missed > 0)
        misses += tl.sum(missed, 0)
        fetched += tl.sum(tl.where(token == newest, 0, missed), 0)
    tl.debug_barrier()
    if misses > 0:
        bins = tl.arange(0, AGES)
        ages = tl.zeros([AGES], tl.int32)  # how many slots have each age
        for first in range(0, R, TILE):
            slot = first + tl.arange(0, TILE)
            age = tl.minimum(now - tl.load(last_used + slot, mask=slot < R, other=now), AGES - 1)
            ages += tl.histogram(age, AGES)
        as_old = tl.sum(ages, 0) - tl.cumsum(ages, 0) + ages
        oldest = tl.max(tl.where((as_old >= misses) & (bins > 0), bins, 0), 0)  # all older slots are taken, of this age some
        room = misses - tl.sum(tl.where(bins > oldest, ages, 0), 0)
        taken = 0
        tied = 0
        for first in range(0, R, TILE):
            slot = first + tl.arange(0, TILE)
            age = tl.minimum(now - tl.load(last_used + slot, mask=slot < R, other=now), AGES - 1)
            tie = (age == oldest).to(tl.int32)
            take = ((age > oldest) | ((age == oldest) & (tied + tl.cumsum(tie, 0) <= room))).to(tl.int32)
            i = tl.load(missing + taken + tl.cumsum(take, 0) - take, mask=take > 0, other=0)
            token = tl.load(indices + i, mask=take > 0, other=0)
            tl.store(slots + i, slot, mask=take > 0)
            tl.store(slot_token + slot, token, mask=take > 0)
            tl.store(token_slot + token, slot, mask=take > 0)
            tl.store(last_used + slot, now, mask=take > 0)
            taken += tl.sum(take, 0)
            tied += tl.sum(tie, 0)
    tl.store(n_missing + row, misses)
    tl.store(clock + row, now)
    tl.store(counts + row, tl.load(counts + row) + n - 1)
    tl.store(counts + rows + row, tl.load(counts + rows + row) + fetched)
    tl.store(counts + 2 * rows + row, tl.load(counts + 2 * rows + row) + 1)


def resolve(r, indices, n_tokens, seq_lens, tile=2048, num_warps=8):
    """As resolve_ref, in one launch. All tensors contiguous."""
    B, HKV, R = r.slots.shape
    assert indices.is_contiguous() and n_tokens.is_contiguous()
    _resolve_kernel[(B * HKV,)](
        indices, n_tokens, seq_lens, r.slot_token, r.token_slot, r.last_used, r.clock, r.counts, r.slots, r.missing,
        r.n_missing, indices.shape[2], r.token_slot.shape[2], R, B * HKV, HKV, AGES, tile, num_warps=num_warps)


def fetch_ref(r, host, newest, indices, seq_lens):
    """Copies what `resolve` found missing from host [B, HKV, S, 2, D] to its slots, and the newest tokens' K and V, newest
    [B, HKV, 2, D], to theirs and to the host."""
    b, h, j = (torch.arange(r.missing.shape[2], device=indices.device) < r.n_missing[..., None]).nonzero(as_tuple=True)
    i = r.missing[b, h, j].long()
    r.kv[b, h, r.slots[b, h, i].long()] = host[b, h, indices[b, h, i].long()]
    last = (seq_lens - 1).long()[:, None, None].expand(-1, newest.shape[1], 1)  # [B, HKV, 1]
    for rows, at in ((r.kv, r.token_slot.gather(2, last).long()), (host, last)):
        rows.scatter_(2, at[..., None, None].expand(newest[:, :, None].shape), newest[:, :, None])


@triton.jit
def _fetch_kernel(host, newest, kv, seq_lens, indices, slots, missing, n_missing, token_slot, max_tokens, S, R,
                  HKV: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """A token's row is its K and V, ROW elements. Without `missing`: kv is all of a layer's, as host is."""
    row, part = tl.program_id(0), tl.program_id(1)
    base = row.to(tl.int64)
    host += base * S * ROW
    kv += base * R * ROW
    offs = tl.arange(0, BLOCK)
    last = tl.load(seq_lens + row // HKV) - 1
    slot = last
    if missing is not None:
        indices += base * max_tokens
        slots += base * R
        missing += base * R
        count = tl.load(n_missing + row)
        for first in range(part * TOKENS, count, tl.num_programs(1) * TOKENS):
            mask = first + tl.arange(0, TOKENS) < count
            i = tl.load(missing + first + tl.arange(0, TOKENS), mask=mask, other=0)
            token = tl.load(indices + i, mask=mask, other=0)
            to = tl.load(slots + i, mask=mask, other=0)
            mask = (mask & (token != last))[:, None] & (offs < ROW)[None, :]
            rows = tl.load(host + token.to(tl.int64)[:, None] * ROW + offs[None, :], mask=mask, other=0.0)
            tl.store(kv + to.to(tl.int64)[:, None] * ROW + offs[None, :], rows, mask=mask)
        slot = tl.load(token_slot + base * S + last)
    if part == 0:
        fresh = tl.load(newest + base * ROW + offs, mask=offs < ROW, other=0.0)
        tl.store(kv + slot.to(tl.int64) * ROW + offs, fresh, mask=offs < ROW)
        tl.store(host + last.to(tl.int64) * ROW + offs, fresh, mask=offs < ROW)


def fetch(r, host, newest, indices, seq_lens, programs=528, tokens=16, num_warps=4):
    """As fetch_ref: one launch of about `programs` programs, which read `tokens` rows at a time."""
    B, HKV, R = r.slots.shape
    S, ROW = host.shape[2], 2 * host.shape[4]
    assert host.is_contiguous() and newest.is_contiguous() and indices.is_contiguous()
    _fetch_kernel[(B * HKV, triton.cdiv(programs, B * HKV))](
        host, newest, r.kv, seq_lens, indices, r.slots, r.missing, r.n_missing, r.token_slot, indices.shape[2], S, R, HKV,
        ROW, triton.next_power_of_2(ROW), tokens, num_warps=num_warps)


# ---------------------------------------------------------------- the cache


@dataclass(kw_only=True)
class HostLayer(LayerCache):
    """A layer with K and V in host memory. A step's new K and V come to `newest`, which kv [B, HKV, S, 2, D] shows at every
    position; `decode` takes them on from there."""

    host: torch.Tensor  # [B, HKV, S, 2, D]
    newest: torch.Tensor  # [B, HKV, 2, D]

    def write(self, k, v, positions, labels=True):
        assert k.shape[2] == 1, "a cache in host memory is prefilled through prefill_layers and decodes one token per sequence"
        self.newest.copy_(torch.stack([k, v], 3)[:, :, 0])


@dataclass(kw_only=True)
class OffloadedLayer(HostLayer):
    resident: Resident

    def kv_bytes(self):
        return self.resident.kv.nbytes + self.newest.nbytes

    def selected(self, q, seq_lens):
        """(indices, n_tokens) as from select_tokens; the newest of all tokens, as many as there are slots, for all_tokens."""
        if not self.all_tokens:
            return select_tokens(q, self.labels, self.label_map, seq_lens, self.ds, self.window, self.workspace)
        B, HKV, R = self.resident.slots.shape
        n = live_range(seq_lens, self.window)[1].clamp(max=R)
        positions = (seq_lens - n)[:, None] + torch.arange(R, device=q.device, dtype=torch.int32)
        return positions[:, None].expand(B, HKV, R).contiguous(), per_head(n, HKV).contiguous()

    def decode(self, q, seq_lens):
        r, k, v = self.resident, *self.resident.kv.unbind(3)
        newest_k = self.kv[..., 0, :]
        indices, n_tokens = self.selected(q, seq_lens)
        if self.ds.use_triton(q):
            resolve(r, indices, n_tokens, seq_lens)
            fetch(r, self.host, self.newest, indices, seq_lens)
            return attend(q, k, v, seq_lens, r.slots, n_tokens, workspace=self.workspace, labels=self.labels,
                          label_map=self.label_map, newest=newest_k)
        label_newest_ref(newest_k, seq_lens, self.labels, self.label_map)
        resolve_ref(r, indices, n_tokens, seq_lens)
        fetch_ref(r, self.host, self.newest, indices, seq_lens)
        return attend_ref(q, k, v, seq_lens, r.slots, n_tokens)


class Streaming:
    """The two GPU buffers that all layers of a dense cache pass through in a step, and the copies on their way."""

    def __init__(self, hosts, device, side):
        self.hosts, self.side = hosts, side
        self.buffers = [torch.empty(hosts[0].shape, dtype=hosts[0].dtype, device=device) for _ in range(2)]
        self.copied = [None] * len(hosts)

    def begin(self, layer):
        """Copies a layer's K and V, if there is one, to the buffer that the layer two before it has left."""
        if layer < len(self.hosts):
            self.copied[layer] = self.side.copy([(self.buffers[layer % 2], self.hosts[layer])])


@dataclass(kw_only=True)
class StreamedLayer(HostLayer):
    """A dense layer. What is copied is the allocated length, in one piece, at the full speed of a copy engine: allocate what
    will be live."""

    streaming: Streaming
    number: int  # of this layer

    def kv_bytes(self):
        return self.newest.nbytes

    def decode(self, q, seq_lens):
        """As of any dense layer, over the buffer that its K and V were streamed to, while the next layer's are on their way."""
        stream, (B, HKV, S, _, D) = self.streaming, self.host.shape
        if self.number == 0:
            stream.begin(0)
            stream.begin(1)
        stream.side.wait(stream.copied[self.number])
        buffer = stream.buffers[self.number % 2]
        if q.is_cuda:
            _fetch_kernel[(B * HKV, 1)](self.host, self.newest, buffer, seq_lens, None, None, None, None, None, 0, S, S,
                                        HKV, 2 * D, triton.next_power_of_2(2 * D), 1)
        else:
            for rows in (self.host, buffer):
                rows[torch.arange(B), :, (seq_lens - 1).long()] = self.newest
        out = dense_decode(q, *buffer.unbind(3), seq_lens, self.window, workspace=self.workspace)
        stream.begin(self.number + 2)
        return out


class OffloadCache(KVCache):
    """As KVCache, with K and V in host memory: of the layers after ds.dense_layers, or without ds of all."""

    def __init__(self, config, batch, max_seq_length, device, dtype, ds=None, label_maps=None, resident_tokens=None, host=None):
        """resident_tokens: GPU rows per sequence and KV head, by default what a step may attend to: the budget at
        max_seq_length, and ds.dense_below for the dense steps before. host: tensors to use, of the last layers,
        [B, HKV, S, 2, D] each.
        """
        device, count = torch.device(device), offloaded_layers(config, ds)
        longest = min(max_seq_length, config.sliding_window or max_seq_length)
        least = max(ds.budget(longest), min(longest, ds.dense_below)) if ds else 0
        self.resident_tokens = min(longest, resident_tokens or least)
        if self.resident_tokens < least:
            raise ValueError(f"resident_tokens={resident_tokens}: must be at least {least}, the tokens that a step may attend "
                             f"to (budget {ds.budget(longest)}, dense_below {ds.dense_below}); raise it, or lower "
                             "--dense_below")
        shape = (batch, config.n_kv_heads, max_seq_length, 2, config.head_dim)
        host = host_layers(count, shape, dtype, device) if host is None else host
        self.host = host[len(host) - count :]
        self.side = SideStream(device)
        self.streaming = Streaming(self.host, device, self.side) if ds is None else None
        self.unused = iter(self.host)
        super().__init__(config, batch, max_seq_length, device, dtype, ds, label_maps)

    def make_layer(self, shape, dtype, device, settings):
        if self.ds is not None and "ds" not in settings:  # of the first, dense layers
            return super().make_layer(shape, dtype, device, settings)
        B, HKV, S, _, D = shape
        newest = torch.zeros(B, HKV, 2, D, dtype=dtype, device=device)
        settings |= dict(kv=newest[:, :, None].expand(shape), host=next(self.unused), newest=newest)
        if self.ds is None:
            return StreamedLayer(**settings, streaming=self.streaming, number=len(self.layers))
        return OffloadedLayer(**settings, resident=Resident(B, HKV, S, self.resident_tokens, D, dtype, device))

    def residents(self):
        return [layer.resident for layer in self.layers if isinstance(layer, OffloadedLayer)]

    def begin(self):
        for resident in self.residents():
            resident.forget()

    def prefill_layers(self, b, start, end):
        """As in KVCache; a layer's K and V go to the host while the next layer is prefilled in another buffer."""
        self.begin()
        _, HKV, _, _, D = self.host[0].shape
        buffers = [torch.empty(1, HKV, end, 2, D, dtype=self.host[0].dtype, device=self.seq_lens.device) for _ in range(2)]
        copied = [None, None]
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, HostLayer):
                yield layer.row(b)
                continue
            buffer, host = buffers[i % 2], layer.host[b]
            self.side.wait(copied[i % 2])
            for h in range(HKV if start else 0):
                buffer[0, h, :start].copy_(host[h, :start], non_blocking=True)
            labels = None if layer.labels is None else layer.labels[b : b + 1]
            yield LayerCache(buffer, layer.window, layer.ds, layer.label_map, labels)
            copied[i % 2] = self.side.copy([(host[h, start:end], buffer[0, h, start:end]) for h in range(HKV)])
        for copies in copied:
            self.side.wait(copies)

    def gpu_bytes(self):
        staging = 2 * self.host[0][0].nbytes  # prefill's
        if self.streaming:
            staging += sum(buffer.nbytes for buffer in self.streaming.buffers)
        return super().gpu_bytes() | {"slot maps": sum(r.map_bytes() for r in self.residents()), "staging": staging}

    def statistics(self):
        """Of the steps since begin() or the last call: PCIe bytes to the GPU per step, the share of selected tokens that was
        resident, in all and by layer; and where K and V lie."""
        host_bytes = sum(host.nbytes for host in self.host)
        found = {"host_bytes": host_bytes, "slot_map_bytes": self.gpu_bytes()["slot maps"]}
        if self.streaming:
            return found | {"pcie_bytes_per_step": host_bytes}
        counts = torch.stack([r.counts for r in self.residents()]).double().cpu()  # [layers, 3, B, HKV]
        for r in self.residents():
            r.counts.zero_()
        steps = counts[0, 2, 0, 0].clamp(min=1)
        selected, fetched = counts[:, :2].sum((2, 3)).T  # [layers] each
        token = self.host[0][0, 0, 0].nbytes
        return found | {"pcie_bytes_per_step": (fetched.sum() / steps).item() * token,
                        "hit_rate": 1 - (fetched.sum() / selected.sum().clamp(min=1)).item(),
                        "hit_rate_by_layer": (1 - fetched / selected.clamp(min=1)).tolist()}
