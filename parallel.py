"""Tensor parallelism: processes that torchrun starts, a GPU each, run one model together.

Each of the processes, the ranks, has all layers, and of each its share of the heads, with their K,
V and labels, and of the (or each expert's) feed-forward: an ordinary Transformer of a smaller
config. What attention and feed-forward add to the residual stream is then a part, and summed over
the ranks. The output is shared by vocabulary, where that divides. So all ranks have the same
residual stream, logits and tokens, bit for bit; rank 0 alone prints and writes files.

One process is the case of one rank, where these functions do nothing.
"""
import contextlib
import functools
import os
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from ds_attention import launch

# ---------------------------------------------------------------- processes

LOST = "another process of this run has ended"


def size():
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank():
    """The number of this one, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def connect(device):
    """Connects the ranks, once, and gives each its GPU. device: "cuda" or "cpu"."""
    if size() == 1 or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise ValueError("nnodes: all processes must be on one machine")
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(f"nproc_per_node={size()}: must be at most {torch.cuda.device_count()}, "
                         "the GPUs of this machine")
    # what takes long, a conversion say, is waited for; torchrun ends the others of one that dies
    settings = dict(timeout=timedelta(days=1))
    if device == "cuda":
        torch.cuda.set_device(local)
        settings |= dict(device_id=torch.device(device, local))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", **settings)


def disconnect():
    if dist.is_initialized():
        dist.destroy_process_group()


def mute():
    """Ranks but the first print nothing from now on."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def fails_first():
    """Whether no other rank has failed before: then this one may say why."""
    if size() == 1:
        return True
    store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
    sys.stderr = sys.__stderr__
    return store.add("failed", 1) == 1


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 goes through the block alone, then the others: they find what it has written."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def barrier():
    collective(dist.all_reduce, torch.zeros(1))


def collective(call, *args, **more):
    """call(*args, **more) of torch.distributed, in which all ranks take part."""
    if size() == 1:
        return
    try:
        call(*args, **more)
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise ConnectionError(LOST) from None


def mean(x):
    """A number's mean over the ranks."""
    x = torch.tensor([x / size()], dtype=torch.float64)
    collective(dist.all_reduce, x)
    return x.item()


def least(x):
    """The least of the ranks' integers."""
    x = torch.tensor([x])
    collective(dist.all_reduce, x, dist.ReduceOp.MIN)
    return x.item()


# ---------------------------------------------------------------- shares


def share(config, ranks):
    """A rank's config. Raises ValueError for a model that so many cannot share."""
    for name, what in (("n_kv_heads", "KV heads"), ("ffn_dim", "channels of the feed-forward")):
        if getattr(config, name) % ranks:
            raise ValueError(f"nproc_per_node={ranks}: must divide the model's "
                             f"{getattr(config, name)} {what}")
    return replace(config, n_heads=config.n_heads // ranks, n_kv_heads=config.n_kv_heads // ranks,
                   ffn_dim=config.ffn_dim // ranks, ranks=ranks)


def output_rows(config):
    """How many tokens of the vocabulary a rank computes the logits of."""
    return config.vocab_size // (1 if config.vocab_size % config.ranks else config.ranks)


def own(n):
    """This rank's slice of an axis in which each rank has n."""
    return slice(rank() * n, (rank() + 1) * n)


def split(name, config):
    """How the ranks share tensor `name` of a model, by a rank's config: (axis, sizes of its pieces
    along it); None if all have the whole."""
    D, layer = config.head_dim, name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
    rows = {"wqkv": [config.n_heads * D, *2 * [config.n_kv_heads * D]],
            "w13": 2 * [config.ffn_dim], "head": [output_rows(config)]}
    columns = {"wo": [config.n_heads * D], "w2": [config.ffn_dim]}
    if config.ranks == 1 or rows.get(layer) == [config.vocab_size]:
        return None
    if layer in columns:
        return -1, columns[layer]
    return (-1 if name.endswith("bias") else -2, rows[layer]) if layer in rows else None


def read(file, name, config):
    """A rank's share of tensor `name` of an open safetensors file; nothing else is read."""
    if split(name, config) is None:
        return file.get_tensor(name)
    axis, sizes = split(name, config)
    stored, first, pieces = file.get_slice(name), 0, []
    for n in sizes:
        at = [slice(None)] * len(stored.get_shape())
        at[axis] = slice(first + own(n).start, first + own(n).stop)
        pieces.append(stored[tuple(at)])
        first += n * config.ranks
    return torch.cat(pieces, axis)


def whole_rows(magnitudes, name, config):
    """magnitudes: `largest` of a rank's rows of tensor `name` -> of whole rows, if a rank has parts
    of them: all round to int8 as one process does."""
    if (split(name, config) or [0])[0] == -1:
        collective(dist.all_reduce, magnitudes, dist.ReduceOp.MAX)
    return magnitudes


# ---------------------------------------------------------------- sums


def total(x, ranks):
    """x, which it changes, summed over the ranks."""
    if ranks > 1:
        collective(dist.all_reduce, x)
    return x


def whole_logits(x, config):
    """Logits of a rank's output rows [..., rows] -> of the vocabulary [..., vocab]."""
    if x.shape[-1] == config.vocab_size:
        return x
    found = [torch.empty_like(x) for _ in range(config.ranks)]
    collective(dist.all_gather, found, x)
    return torch.cat(found, -1)


@triton.jit
def _sum_kernel(part, slots, counts, x, scaled, squares, gain, B, dim, RANK: tl.constexpr,
                RANKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """A program's part of a row to all ranks, theirs added to x: see Peers.add."""
    pid_b, pid = tl.program_id(0), tl.program_id(1)
    program = pid_b * tl.num_programs(1) + pid
    offs, mine = pid * BLOCK + tl.arange(0, BLOCK), program * BLOCK + tl.arange(0, BLOCK)
    mask = offs < dim
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.load(counts + program) + 1
    half = number % 2 * RANKS * ROOM
    value = tl.load(part + pid_b * dim + offs, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(x + pid_b * dim + offs, mask=mask, other=0.0).to(tl.float32)
    gains = tl.load(gain + offs, mask=mask, other=0.0).to(tl.float32)
    word = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | number
    for rank in tl.static_range(RANKS):
        slot = slots[rank].to(tl.pointer_type(tl.int64)) + half + RANK * ROOM + mine
        tl.store(slot, word, cache_modifier=".wt")
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        slot = slots[RANK].to(tl.pointer_type(tl.int64)) + half + rank * ROOM + mine
        word = tl.load(slot, volatile=True)
        while tl.max((word.to(tl.int32) != number).to(tl.int32), 0) != 0:
            word = tl.load(slot, volatile=True)
        total += (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    rounded = (before + total).to(x.dtype.element_ty)
    value = rounded.to(tl.float32)
    tl.store(x + pid_b * dim + offs, rounded, mask=mask)
    tl.store(scaled + pid_b * dim + offs, (value * gains).to(x.dtype.element_ty), mask=mask)
    tl.store(squares + pid * B + pid_b, tl.sum(tl.where(mask, value * value, 0.0), 0))
    tl.store(counts + program, number)


class Peers:
    """Where the ranks leave each other parts of a sum in a decode step, in memory that all reach.

    A part goes to all ranks as words of 64 bits, a value and the sum's number. Words arrive whole:
    who finds the number has the value, without a barrier. Sums use the two halves of the slots in
    turn. So nothing is overwritten before it is read: a rank that begins sum n + 2 has received all
    parts of sum n + 1, and each rank sent its part only after it had read all of sum n.
    """

    BLOCK = 256  # values of a program, which no other touches

    def __init__(self, slots, owner=None):
        """slots: each rank's [2, ranks, any] int64, zeros, as this process sees them; owner: what
        must live for them to be there."""
        self.owner, self.addresses = (slots, owner), tuple(slot.data_ptr() for slot in slots)
        _, self.ranks, self.room = slots[0].shape
        self.counts = torch.zeros(self.room // self.BLOCK, dtype=torch.int32,
                                  device=slots[rank()].device)

    def add(self, part, x, scaled, squares, gain):
        """x [B, dim] += part [B, dim], summed over the ranks; scaled and squares are then as a
        Residual has them -> the squares [any, B] that were written."""
        B, dim = x.shape
        parts = triton.cdiv(dim, self.BLOCK)
        assert part.is_contiguous() and B * parts <= len(self.counts)
        launch(_sum_kernel, (B, parts), x, part=part, slots=self.addresses, counts=self.counts, x=x,
               scaled=scaled, squares=squares, gain=gain, B=B, dim=dim, RANK=rank(),
               RANKS=self.ranks, ROOM=self.room, BLOCK=self.BLOCK, num_warps=1)
        return squares[:parts]


@functools.cache
def peers(ranks, rows, dim, device):
    """Peers for decode steps of at most so many rows; None for one rank."""
    if ranks == 1:
        return None
    import torch.distributed._symmetric_memory as symmetric  # here: it takes a while

    room = rows * triton.cdiv(dim, Peers.BLOCK) * Peers.BLOCK
    slots = symmetric.empty(2, ranks, room, dtype=torch.int64, device=device).zero_()
    handle = symmetric.rendezvous(slots, dist.group.WORLD)
    torch.cuda.synchronize()
    barrier()  # all are zero before the first part comes
    return Peers([handle.get_buffer(other, slots.shape, slots.dtype) for other in range(ranks)],
                 (slots, handle))
