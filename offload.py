"""K and V in host memory (Double Sparsity's offload, arXiv 2408.07092, section 3.3), exact: the
tokens attended are those that the layer's own query selects, as in the on-GPU cache.

On the GPU stay the labels, the first (dense) layers, and rows of K and V for the tokens that recent
steps selected: each other layer has R slots, and all of them share overflow rows, for a step that
selects more tokens than a layer has slots (N are selected on average). A layer resolves the tokens
that a step selects (finds their slots, or gives them some), fetches those that are missing over
PCIe, and attends to their rows. The GPU does all this; the CPU is not asked. Shapes follow the key
at the top of ds_attention.py.

While a layer attends and runs its linear layers, PCIe idles. With `prefetch_heads` the next layer's
queries are predicted from this layer's input, and what those of so many KV heads select is fetched
ahead: a wrong prediction costs time, and changes nothing else. (Whole heads: a few tokens of every
head would lie in as many pages of host memory as all of them do, and finding a page costs the GPU
more than a row.) Two streams, time from left to right, layer l fetched ahead beside layer l - 1:

    current  select, resolve l-1 | fetch l-1 | attend, linear layers | select, resolve l | fetch l
    side                         | choose l  | fetch l ahead ........................... |

  - `choose` waits for the resolve before it: from then on the GPU idles, and PCIe does not.
  - `fetch ahead` waits for the fetch before it, and so for all attention before that. It is
    started before the attention beside it, which would take all multiprocessors: `fetch` needs
    empty ones.
  - Layer l resolves after its choice, which changes the same maps, and fetches after what was
    fetched ahead, whose slots may be others' by then.

In the mode "predicted" layers attend to what the predicted queries select, all of it fetched ahead:
the paper's way, which is not exact. Layer l is chosen as soon as layer l - 1 has its input, on a
third stream, while tokens of layer l - 1 are still on their way. So even and odd layers have their
own overflow rows and results of a choice.

Without a DSConfig all K and V, as they are or packed, are streamed through two buffers, for dense
attention, as FlexGen does: the baseline.
"""
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl

from ds_attention import (
    Workspace, attend, attend_ref, ds_decode, label_ref, score_ref, select_ref, write_labels
)
from host_memory import (
    PACKED, HostRows, fetch, fetch_ref, host_layers, offloaded_layers, packs
)
from model import KVCache, LayerCache, open_tensors

# ---------------------------------------------------------------- streams


class SideStream:
    """Work beside the current stream; on a CPU what is called is done at once."""

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work, after=None):
        """Calls work(), which the device does after all that the current stream was given and after
        `after`, the result of another `run`. Returns what `wait` takes. What `work` reads must stay
        until then, unless `work` itself allocates it."""
        if self.stream is None:
            work()
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.wait(after)
            work()
            return self.stream.record_event()

    def wait(self, done):
        """What the current stream is given from now on comes after that `run`; None: after none."""
        if done is not None:
            torch.cuda.current_stream().wait_event(done)

    def join(self):
        """What the current stream is given from now on comes after every `run`."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


# ---------------------------------------------------------------- which tokens a step attends to


@triton.jit
def _gather_kernel(lists, counts, indices, n_tokens, room, capacity, SPLITS: tl.constexpr,
                   BLOCK: tl.constexpr):
    """Copies a row's lists one behind the other."""
    row, split = tl.program_id(0), tl.program_id(1)
    offs = tl.arange(0, SPLITS)
    count = tl.load(counts + row * SPLITS + offs)
    begin = tl.sum(tl.where(offs < split, count, 0))
    n = tl.sum(tl.where(offs == split, count, 0))
    lists += (row.to(tl.int64) * SPLITS + split) * room
    indices += row.to(tl.int64) * capacity
    for i in range(0, n, BLOCK):
        nth = i + tl.arange(0, BLOCK)
        token = tl.load(lists + nth, mask=nth < n, other=0)
        tl.store(indices + begin + nth, token, mask=(nth < n) & (begin + nth < capacity))
    if split == SPLITS - 1:
        tl.store(n_tokens + row, tl.minimum(begin + n, capacity))


def select_tokens(q, newest, labels, label_map, seq_lens, config, window=None, workspace=None,
                  capacity=None):
    """The tokens that ds_decode attends to, for who attends to them elsewhere; writes the labels of
    the newest keys: newest [B, HKV, S, D], read at seq_lens - 1, or None to write none.

    Returns (indices [B, HKV, capacity] int32, n_tokens [B, HKV] int32, counts [B, HKV, splits]
    int32). The first n_tokens of the indices count, in the order and, by counts, in the parts in
    which ds_decode attends to them. More than `capacity`, by default S, are cut off.
    """
    (B, HQ, D), (HKV, _, S) = q.shape, labels.shape[1:]
    capacity = min(capacity or S, S)
    if config.use_triton(q):
        ws = workspace or Workspace(B, HQ, HKV, D, S, q.device, config)
        attend(q, labels if newest is None else newest, None, seq_lens, window=window, workspace=ws,
               labels=labels, label_map=label_map, config=config, label_newest=newest is not None)
        indices = torch.empty(B, HKV, capacity, dtype=torch.int32, device=q.device)
        n_tokens = torch.empty(B, HKV, dtype=torch.int32, device=q.device)
        _gather_kernel[(B * HKV, ws.splits)](
            lists=ws.lists, counts=ws.counts, indices=indices, n_tokens=n_tokens, room=ws.room,
            capacity=capacity, SPLITS=ws.splits, BLOCK=128)
        return indices, n_tokens, ws.counts
    if newest is not None:
        position = (seq_lens - 1)[:, None]
        keys = newest.take_along_dim(position.long()[:, None, :, None], 2)
        label_ref(keys, position, labels, label_map)
    scores = score_ref(q, labels, label_map, seq_lens, config, window)
    chosen = select_ref(scores, seq_lens, config, window)
    total = chosen.sum(2, dtype=torch.int32)
    indices = chosen.int().argsort(dim=2, descending=True, stable=True)[..., :capacity].int()
    return indices, total.clamp(max=capacity), total[..., None]


# ---------------------------------------------------------------- resident tokens

AGES = 64  # resolves since a slot was last used that replacement tells apart: one or two a step
COUNTS = (  # what a Resident counts of each row and KV head: tokens, without the newest, and steps
    "selected", "fetched",  # fetched: selected, and missing when that was known
    "steps", "cut",  # cut: selected, but beyond the room for rows
    "predicted", "confirmed",  # confirmed: predicted, then selected. Both without sink and recent
    "prefetched")  # predicted, and missing when that was known
SELECTED, FETCHED, STEPS, CUT, PREDICTED, CONFIRMED, PREFETCHED = map(tl.constexpr, range(7))


class Resident:
    """Which tokens of one layer are on the GPU: R slots for each row and KV head.

    kv [B, HKV, any, 2, D]: rows of all layers. Slot s is row `first` + s. Tokens that find no slot
    go to the rows from `overflow` on, which no map remembers: the next layers use them, too. """

    def __init__(self, kv, S, R, first, overflow):
        def table(*shape, dtype=torch.int32):
            return torch.zeros(*kv.shape[:2], *shape, dtype=dtype, device=kv.device)

        self.kv, self.first, self.overflow = kv, first, overflow
        self.slot_token = table(R)  # the token in a slot, -1 for none
        self.token_slot = table(S)  # the slot a token was last put to; if still, slot_token says
        self.last_used = table(R)  # by this clock, of resolves since forget()
        self.clock = table()
        self.counts = table(len(COUNTS), dtype=torch.int64)
        self.forget()

    def forget(self):
        """All slots become free, all counts zero."""
        self.slot_token.fill_(-1)
        self.last_used.fill_(-AGES)  # older than any in use
        self.clock.zero_()
        self.counts.zero_()

    def maps(self):
        return {name: x for name, x in vars(self).items() if torch.is_tensor(x) and name != "kv"}

    def of_heads(self, heads):
        """What there is of the first so many KV heads, as a view."""
        view = copy(self)
        vars(view).update((name, x[:, :heads]) for name, x in self.maps().items())
        return view


class Placement:
    """What `resolve` says of the tokens it was given: their rows, in their order, which of them (as
    indices) were missing, and the newest token's row, -1 if it has none."""

    def __init__(self, B, heads, capacity, device):
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self.rows, self.missing = zeros(2, B, heads, capacity)
        self.n_missing, self.newest = zeros(2, B, heads)


def resolve_ref(r, placed, chosen, seq_lens, ahead=False, predicted_heads=0, sink=0, recent=1):
    """Gives every selected token a row. Tokens that are held keep their slots. The missing ones
    take, in their order, the slots that were not used for longest (of equals the first), in
    ascending order; none that this call uses. Those for which no slot is left get overflow rows.
    Sets `placed`, a Placement, and the maps of r, a Resident.

    chosen: as from select_tokens, of the first KV heads, or of all: indices [B, heads, capacity]
    int32, distinct, of which the first n_tokens [B, heads] count, and counts [B, heads, any], which
    add up to what there was before tokens were cut off. seq_lens [B]. ahead: it is a prediction.
    predicted_heads: of so many heads the call before was the prediction of this one. sink, recent:
    those of the DSConfig, for the COUNTS."""
    indices, n_tokens, counts = chosen
    r = r.of_heads(indices.shape[1])
    valid = torch.arange(indices.shape[2], device=indices.device) < n_tokens[..., None]
    tokens = torch.where(valid, indices, 0).long()
    slots = r.token_slot.gather(2, tokens).long()
    hit = valid & (r.slot_token.gather(2, slots) == tokens)
    missed = valid & ~hit
    newest = (seq_lens - 1)[:, None, None]

    fetched = (missed & (tokens != newest)).sum(2)
    uncertain = valid & (tokens >= sink) & (tokens <= newest - recent)
    if ahead:
        counted = dict(predicted=uncertain.sum(2), prefetched=fetched)
    else:
        counted = dict(selected=n_tokens - 1, fetched=fetched, steps=torch.ones_like(n_tokens),
                       cut=counts.sum(2) - n_tokens)
    if predicted_heads:
        latest = r.last_used.gather(2, slots) == r.clock[..., None]
        counted["confirmed"] = (uncertain & hit & latest).sum(2)
        counted["confirmed"][:, predicted_heads:] = 0
    for name, count in counted.items():
        r.counts[..., COUNTS.index(name)] += count

    r.clock += 1
    now = r.clock[..., None]
    r.last_used.scatter_reduce_(2, slots, torch.where(hit, now, -AGES), "amax")
    free = (r.slot_token.shape[2] - hit.sum(2))[..., None]
    nth = missed.cumsum(2) - 1  # of the missing ones
    kept = missed & (nth < free)
    age = (now - r.last_used).clamp(max=AGES - 1)
    # of each slot among all, the oldest first
    rank = age.sort(dim=2, descending=True, stable=True).indices.argsort(2)
    b, h, slot = (rank < kept.sum(2)[..., None]).nonzero(as_tuple=True)
    i = kept.nonzero(as_tuple=True)[2]  # as many of each row and head, in the same order
    token = tokens[b, h, i]
    slots[b, h, i] = slot
    r.slot_token[b, h, slot], r.token_slot[b, h, token] = token.int(), slot.int()
    r.last_used[b, h, slot] = r.clock[b, h]

    rows = torch.where(missed & ~kept, r.overflow + nth - free, r.first + slots)
    placed.rows.copy_(rows)
    slot = r.token_slot.gather(2, newest.expand(-1, slots.shape[1], 1).long()).long()
    held = r.slot_token.gather(2, slot) == newest
    listed = torch.where(valid & (tokens == newest), rows, -1).amax(2)
    placed.newest.copy_(torch.where(held, r.first + slot, listed[..., None])[..., 0])
    placed.n_missing.copy_(missed.sum(2))
    b, h, i = missed.nonzero(as_tuple=True)
    placed.missing[b, h, nth[b, h, i]] = i.int()


@triton.jit
def _count(counts, i, more):
    """Adds to the i-th of COUNTS."""
    tl.store(counts + i, tl.load(counts + i) + more)


@triton.jit
def _resolve_kernel(indices, n_tokens, split_counts, seq_lens, slot_token, token_slot, last_used,
                    clock, counts, rows, missing, n_missing, newest_row, first_row, overflow,
                    capacity, S, R, sink, recent, HEADS: tl.constexpr, HKV: tl.constexpr,
                    AGES: tl.constexpr, COUNTERS: tl.constexpr, SPLITS: tl.constexpr,
                    AHEAD: tl.constexpr, PREDICTED_HEADS: tl.constexpr, TILE: tl.constexpr):
    """resolve_ref; a program for each row and head."""
    given = tl.program_id(0)  # of the rows and heads with tokens
    row = given // HEADS * HKV + given % HEADS  # of all
    n = tl.load(n_tokens + given)
    newest = tl.load(seq_lens + row // HKV) - 1
    now = tl.load(clock + row) + 1
    base = row.to(tl.int64)
    indices += given.to(tl.int64) * capacity
    token_slot += base * S
    slot_token += base * R
    last_used += base * R
    rows += given.to(tl.int64) * capacity
    missing += given.to(tl.int64) * capacity
    counts += row * COUNTERS

    misses = 0
    fetched = 0
    predicted = 0
    confirmed = 0
    newest_at = -1
    for begin in range(0, n, TILE):
        i = begin + tl.arange(0, TILE)
        token = tl.load(indices + i, mask=i < n, other=-1)
        slot = tl.load(token_slot + token, mask=i < n, other=0)
        hit = (i < n) & (tl.load(slot_token + slot, mask=i < n, other=-1) == token)
        uncertain = (i < n) & (token >= sink) & (token <= newest - recent)
        predicted += tl.sum(uncertain.to(tl.int32), 0)
        newest_at = tl.maximum(newest_at, tl.max(tl.where(token == newest, i, -1), 0))
        if PREDICTED_HEADS > 0:
            latest = tl.load(last_used + slot, mask=hit, other=0) == now - 1
            latest = latest & (row % HKV < PREDICTED_HEADS)
            confirmed += tl.sum((uncertain & hit & latest).to(tl.int32), 0)
        tl.store(rows + i, first_row + slot, mask=hit)
        tl.store(last_used + slot, now, mask=hit)
        missed = ((i < n) & (hit == 0)).to(tl.int32)
        tl.store(missing + misses + tl.cumsum(missed, 0) - missed, i, mask=missed > 0)
        misses += tl.sum(missed, 0)
        fetched += tl.sum(tl.where(token == newest, 0, missed), 0)
    tl.debug_barrier()

    kept = tl.minimum(misses, R - (n - misses))  # tokens for which there are slots
    if kept > 0:
        bins = tl.arange(0, AGES)
        ages = tl.zeros([AGES], tl.int32)  # how many slots have each age
        for begin in range(0, R, TILE):
            slot = begin + tl.arange(0, TILE)
            age = now - tl.load(last_used + slot, mask=slot < R, other=now)
            ages += tl.histogram(tl.minimum(age, AGES - 1), AGES)
        as_old = tl.sum(ages, 0) - tl.cumsum(ages, 0) + ages
        # all older slots are taken, of this age some
        oldest = tl.max(tl.where((as_old >= kept) & (bins > 0), bins, 0), 0)
        room = kept - tl.sum(tl.where(bins > oldest, ages, 0), 0)
        taken = 0
        tied = 0
        for begin in range(0, R, TILE):
            slot = begin + tl.arange(0, TILE)
            age = now - tl.load(last_used + slot, mask=slot < R, other=now)
            age = tl.minimum(age, AGES - 1)
            tie = (age == oldest).to(tl.int32)
            take = (age > oldest) | ((age == oldest) & (tied + tl.cumsum(tie, 0) <= room))
            nth = taken + tl.cumsum(take.to(tl.int32), 0) - 1
            i = tl.load(missing + nth, mask=take, other=0)
            token = tl.load(indices + i, mask=take, other=0)
            tl.store(rows + i, first_row + slot, mask=take)
            tl.store(slot_token + slot, token, mask=take)
            tl.store(token_slot + token, slot, mask=take)
            tl.store(last_used + slot, now, mask=take)
            taken += tl.sum(take.to(tl.int32), 0)
            tied += tl.sum(tie, 0)
    for begin in range(kept, misses, TILE):
        nth = begin + tl.arange(0, TILE)
        i = tl.load(missing + nth, mask=nth < misses, other=0)
        tl.store(rows + i, overflow + nth - kept, mask=nth < misses)
    tl.debug_barrier()

    to = tl.load(rows + newest_at, mask=newest_at >= 0, other=-1)
    slot = tl.load(token_slot + newest)  # of a prediction, where the selection lacks the token
    to = tl.where(tl.load(slot_token + slot) == newest, first_row + slot, to)
    tl.store(newest_row + given, to)
    tl.store(n_missing + given, misses)
    tl.store(clock + row, now)
    if AHEAD:
        _count(counts, PREDICTED, predicted)
        _count(counts, PREFETCHED, fetched)
    else:
        chosen = tl.sum(tl.load(split_counts + given * SPLITS + tl.arange(0, SPLITS)), 0)
        _count(counts, SELECTED, n - 1)
        _count(counts, FETCHED, fetched)
        _count(counts, STEPS, 1)
        _count(counts, CUT, chosen - n)
    if PREDICTED_HEADS > 0:
        _count(counts, CONFIRMED, confirmed)


def resolve(r, placed, chosen, seq_lens, ahead=False, predicted_heads=0, sink=0, recent=1,
            tile=None):
    """As resolve_ref, in one launch; all tensors contiguous. tile: tokens or slots that a row's
    program looks at at once."""
    indices, n_tokens, counts = chosen
    (B, HKV, R), (heads, capacity) = r.slot_token.shape, indices.shape[1:]
    tile = tile or min(4096, triton.next_power_of_2(R))
    assert all(t.is_contiguous() for t in chosen) and placed.rows.shape == indices.shape
    _resolve_kernel[(B * heads,)](
        indices=indices, n_tokens=n_tokens, split_counts=counts, seq_lens=seq_lens,
        slot_token=r.slot_token, token_slot=r.token_slot, last_used=r.last_used, clock=r.clock,
        counts=r.counts, rows=placed.rows, missing=placed.missing, n_missing=placed.n_missing,
        newest_row=placed.newest, first_row=r.first, overflow=r.overflow, capacity=capacity,
        S=r.token_slot.shape[2], R=R, sink=sink, recent=recent, HEADS=heads, HKV=HKV, AGES=AGES,
        COUNTERS=len(COUNTS), SPLITS=counts.shape[2], AHEAD=ahead,
        PREDICTED_HEADS=predicted_heads, TILE=tile,
        num_warps=max(1, tile // 256))  # PCIe waits for the last program: each has what fits a core


# ---------------------------------------------------------------- the cache

MODES = ("exact", "predicted")
MIN_AGREEMENT = 0.7  # all of tiny's reach it but one predicted from embeddings (0.13)


def predictable_layers(channels, min_agreement, mode):
    """Numbers of the layers for which calibrate.py predicted at least min_agreement of the selected
    tokens; channels: its file. Raises ValueError in the mode "predicted" if there are none."""
    with open_tensors(channels) as file:
        shares = file.get_tensor("agreement").tolist()
    found = [i for i, share in enumerate(shares) if i and share >= min_agreement]
    if mode == "predicted" and not found:
        raise ValueError(f"min_agreement={min_agreement:g}: no layer is predicted so well by "
                         f"{channels}; lower it, or take --offload_mode exact")
    return found


# Bytes that a kernel fetches while a layer of a 7B model computes and PCIe idles, and how many more
# for each token attended to, as choosing more tokens takes longer: measured on an H200.
IDLE_BYTES, IDLE_BYTES_PER_TOKEN = 14e6, 330


def idle_heads(config, batch, tokens, dtype, device, packed=True):
    """For how many KV heads `tokens` tokens each, none resident, are fetched in that time; 0 on a
    CPU. At most three of eight: more was not measured."""
    if torch.device(device).type == "cpu":
        return 0
    row_bytes = 2 * config.head_dim * dtype.itemsize
    row_bytes *= PACKED if packed and packs(config.head_dim, dtype) else 1
    idle_bytes = IDLE_BYTES + IDLE_BYTES_PER_TOKEN * tokens
    return min(round(idle_bytes / (batch * tokens * row_bytes)), config.n_kv_heads * 3 // 8)


@dataclass(kw_only=True)
class HostLayer(LayerCache):
    """A layer with K and V in host memory. A step's new K and V come to `newest`, which kv [B, HKV,
    S, 2, D] shows at every position; `decode` takes them on from there."""

    host: HostRows
    newest: torch.Tensor  # [B, HKV, 2, D]

    def kv_bytes(self):
        return self.newest.nbytes

    def write(self, k, v, positions, labels=True):
        assert k.shape[2] == 1, "prefill goes through prefill_layers"
        self.newest.copy_(torch.stack([k, v], 3)[:, :, 0])


@dataclass
class Prefetch:
    """What layers choose and fetch tokens ahead with. In the mode "exact" both streams are one: a
    third branch made some of a step's CUDA graphs slower by 4%."""

    choosing: SideStream
    fetching: SideStream
    workspaces: list  # of select_tokens in even and in odd layers
    placements: list  # likewise


@dataclass(kw_only=True)
class OffloadedLayer(HostLayer):
    resident: Resident
    placed: Placement  # of what is selected: one of all layers
    attending: Workspace | None  # of attention, likewise
    prefetch: Prefetch
    placed_ahead: Placement  # of what is chosen ahead: one of even layers, one of odd ones
    workspace_ahead: Workspace | None  # of choosing it, likewise
    ahead: int  # KV heads, the first ones, whose tokens are chosen and fetched ahead
    predicted: bool  # what was chosen ahead is attended to
    following: "OffloadedLayer | None" = None
    predicted_from: tuple | None = None  # of the latest prediction, see choose_ahead
    chosen: tuple | None = None  # what select_tokens returned
    slots_known: torch.cuda.Event | None = None
    rows_there: torch.cuda.Event | None = None

    def forget_prediction(self):
        self.predicted_from = self.chosen = self.slots_known = self.rows_there = None

    def resolve(self, placed, chosen, seq_lens, **kind):
        run = resolve if self.ds.use_triton(seq_lens) else resolve_ref
        forced = dict(sink=self.ds.sink, recent=self.ds.recent)
        run(self.resident, placed, chosen, seq_lens, **forced, **kind)

    def fetch(self, placed, newest, indices, seq_lens):
        run = fetch if self.ds.use_triton(seq_lens) else fetch_ref
        run(self.resident.kv, placed, self.host, newest, indices, seq_lens)

    def choose_ahead(self, seq_lens):
        """Predicts this layer's queries and gives rows to what they select.

        predicted_from: this layer's block of the model, the input of the layer before after this
        block's norm [B, 1, dim], and cos, sin [B, 1, 1, D / 2] of the newest positions."""
        block, x, cos, sin = self.predicted_from

        def choose():
            q = block.attn.queries(x, cos, sin, self.ahead).squeeze(2)  # [B, HQ of these heads, D]
            labels, m = self.labels[:, : self.ahead], self.label_map
            label_map = replace(m, **{name: getattr(m, name)[: self.ahead]
                                      for name in ("channels", "lo", "step", "gain")})
            self.chosen = select_tokens(q, None, labels, label_map, seq_lens, self.ds, self.window,
                                        self.workspace_ahead, self.placed_ahead.rows.shape[2])
            self.resolve(self.placed_ahead, self.chosen, seq_lens, ahead=not self.predicted)

        self.slots_known = self.prefetch.choosing.run(choose)

    def fetch_ahead(self, seq_lens):
        """Fetches what was chosen, once the current stream has done what it was given."""
        indices = self.chosen[0]
        self.rows_there = self.prefetch.fetching.run(
            lambda: self.fetch(self.placed_ahead, None, indices, seq_lens), after=self.slots_known)

    def decode(self, q, seq_lens):
        """As of any layer, over the tokens' rows; the next layer's may be chosen and fetched."""
        prefetch = self.prefetch
        prefetch.choosing.wait(self.slots_known)
        if self.predicted:
            placed, chosen, indices = self.placed_ahead, self.chosen, None
            newest_k, position = self.newest[:, :, None, 0], (seq_lens - 1)[:, None]
            write_labels(newest_k, position, self.labels, self.label_map, self.ds)
        else:
            placed = self.placed
            chosen = select_tokens(q, self.kv[..., 0, :], self.labels, self.label_map, seq_lens,
                                   self.ds, self.window, self.workspace, placed.rows.shape[2])
            self.resolve(placed, chosen, seq_lens, predicted_heads=self.ahead if self.chosen else 0)
            indices = chosen[0]

        following = self.following if self.following and self.following.predicted_from else None
        if following and not following.chosen:
            following.choose_ahead(seq_lens)
        prefetch.fetching.wait(self.rows_there)
        self.fetch(placed, self.newest, indices, seq_lens)
        self.forget_prediction()
        if following:  # before attention, which leaves no multiprocessor empty for it
            following.fetch_ahead(seq_lens)
        self.host.append(self.newest, seq_lens, self.ds.use_triton(q))

        kv, (_, n_tokens, counts) = self.resident.kv, chosen
        if self.ds.use_triton(q):
            k, v = kv.unbind(3)
            return attend(q, k, v, seq_lens, placed.rows, counts, workspace=self.attending)
        rows = placed.rows.long()[..., None, None].expand(-1, -1, -1, *kv.shape[3:])
        k, v = kv.gather(2, rows).unbind(3)
        nth = torch.arange(k.shape[2], device=q.device)
        return attend_ref(q, k, v, seq_lens, nth < n_tokens[..., None])


class Streaming:
    """The two GPU buffers that all layers of a dense cache pass through in a step, and the copies
    on their way; where rows are packed, one buffer more, for them unpacked."""

    def __init__(self, hosts, device):
        B, HKV = hosts[0].kv.shape[:2]
        self.hosts, self.side = hosts, SideStream(device)
        like = [hosts[0].streamed()] * 2 + [hosts[0].kv] * (hosts[0].tops is not None)
        self.buffers = [torch.empty_like(x, device=device) for x in like]
        self.placed = Placement(B, HKV, 1, device)  # of the newest tokens alone
        self.copied = [None] * len(hosts)

    def begin(self, layer):
        """Copies a layer's K and V, if there is one, to the buffer of the layer two before it."""
        if layer < len(self.hosts):
            to, source = self.buffers[layer % 2], self.hosts[layer].streamed()
            self.copied[layer] = self.side.run(lambda: to.copy_(source, non_blocking=True))

    def arrived(self, layer):
        """A layer's K and V [B, HKV, S, 2, D] on the GPU."""
        self.side.wait(self.copied[layer])
        buffer, host = self.buffers[layer % 2], self.hosts[layer]
        return buffer if host.tops is None else host.streamed_to(buffer, self.buffers[2])


@dataclass(kw_only=True)
class StreamedLayer(HostLayer):
    """A dense layer. What is copied is the allocated length, in one piece, at the full speed of a
    copy engine: allocate what will be live."""

    streaming: Streaming
    number: int  # of this layer

    def decode(self, q, seq_lens):
        """As of any dense layer, while the next layer's K and V are on their way."""
        stream = self.streaming
        if self.number == 0:
            stream.placed.newest.copy_((seq_lens - 1)[:, None].expand_as(stream.placed.newest))
            stream.begin(0)
            stream.begin(1)
        kv = stream.arrived(self.number)
        run = fetch if q.is_cuda else fetch_ref
        run(kv, stream.placed, self.host, self.newest, None, seq_lens)
        self.host.append(self.newest, seq_lens, q.is_cuda)
        out = ds_decode(q, *kv.unbind(3), None, None, seq_lens, None, self.window, self.workspace)
        stream.begin(self.number + 2)
        return out


class OffloadCache(KVCache):
    """As KVCache; in host memory are K and V of layers after ds.dense_layers, without ds all."""

    def __init__(self, config, batch, max_seq_length, device, dtype, ds=None, label_maps=None,
                 resident_tokens=None, prefetch_heads=None, mode="exact", predictable=None,
                 packed=True, host=None):
        """resident_tokens: rows on the GPU per sequence, KV head and layer, the overflow rows that
        the layers share among them; at least, and by default, the tokens that a step attends to:
        the budget at max_seq_length, and all tokens of rows below ds.dense_below. prefetch_heads:
        of so many KV heads of each layer what is predicted is fetched ahead, by default idle_heads.
        mode: of MODES; "predicted" fetches all that is predicted, and attends to it. predictable:
        numbers of the layers of which anything is predicted, by default all that have a layer
        before them. packed: K and V are, where they can be (see HostRows). host: tensors to use, of
        the last layers, [B, HKV, S, 2, D]; what they hold does not count. """
        if mode not in MODES:
            raise ValueError(f"mode={mode}: must be one of {', '.join(MODES)}")
        device, count = torch.device(device), offloaded_layers(config, ds)
        HKV, D = config.n_kv_heads, config.head_dim
        longest = min(max_seq_length, config.longest_window or max_seq_length)
        budget, dense = (ds.budget(longest), min(longest, ds.dense_below)) if ds else (0, 0)
        least = max(budget, dense)
        self.resident_tokens = min(longest, resident_tokens or least)
        if self.resident_tokens < least:
            raise ValueError(f"resident_tokens={resident_tokens}: must be at least {least}, what a "
                             "step may attend to; raise it, or lower --dense_below")
        if prefetch_heads is None:
            prefetch_heads = idle_heads(config, batch, budget, dtype, device, packed) if ds else 0
        if prefetch_heads > HKV:
            raise ValueError(f"prefetch_heads={prefetch_heads}: must be at most {HKV} KV heads")
        self.n_layers, self.mode = config.n_layers, mode
        self.predictable = range(1, config.n_layers) if predictable is None else predictable
        self.ahead = (HKV if mode == "predicted" else prefetch_heads) if ds else 0

        shape = (batch, HKV, max_seq_length, 2, D)
        host = host_layers(count, shape, dtype, device) if host is None else host
        self.host = [HostRows(kv, device, packed) for kv in host[len(host) - count :]]
        self.side = SideStream(device)
        self.streaming = Streaming(self.host, device) if ds is None else None
        if ds is not None:
            self.make_room(count, shape, dtype, device, config, ds)
        super().__init__(config, batch, max_seq_length, device, dtype, ds, label_maps)

    def make_room(self, count, shape, dtype, device, config, ds):
        """The rows that `count` layers have on the GPU, and what they choose and attend with."""
        B, HKV, S, _, D = shape
        # R slots for each layer and, with one area for all of them, about as many overflow rows
        rows, areas = count * self.resident_tokens, min(count, 2 if self.mode == "predicted" else 1)
        self.slots = triton.cdiv(rows, count + 1)
        self.spare = (rows - count * self.slots) // areas
        self.overflow = [count * self.slots + i % areas * self.spare for i in range(2)]
        self.kv = torch.zeros(B, HKV, rows, 2, D, dtype=dtype, device=device)

        capacity = min(self.slots + self.spare, S)
        ahead = capacity if self.mode == "predicted" else self.slots
        self.placed = Placement(B, HKV, capacity, device)
        fetching = SideStream(device)
        choosing = SideStream(device) if self.mode == "predicted" else fetching
        self.prefetch = Prefetch(choosing, fetching, [None, None],
                                   [Placement(B, self.ahead, ahead, device) for _ in range(2)])
        of_rows = partial(Workspace, B, config.n_heads, HKV, D, rows, device)
        self.attending = None if device.type == "cpu" else of_rows()
        if self.ahead and (device.type != "cpu" or ds.impl == "triton"):
            heads = self.ahead * config.n_heads // HKV
            even = Workspace(B, heads, self.ahead, D, S, device, ds)
            odd = copy(even)  # all but what comes out is scratch of one stream
            odd.counts = torch.empty_like(even.counts)
            self.prefetch.workspaces = [even, odd]

    def make_layer(self, shape, dtype, device, settings):
        """As in KVCache; with K and V in host memory, unless it is one of the first, dense ones."""
        if self.ds is not None and "ds" not in settings:
            return super().make_layer(shape, dtype, device, settings)
        B, HKV, S, _, D = shape
        newest = torch.zeros(B, HKV, 2, D, dtype=dtype, device=device)
        number = len(self.layers)
        nth = number - self.n_layers + len(self.host)  # of those in host memory
        settings |= dict(kv=newest[:, :, None].expand(shape), host=self.host[nth], newest=newest)
        if self.ds is None:
            return StreamedLayer(**settings, streaming=self.streaming, number=number)
        ahead = self.ahead if number in self.predictable else 0
        layer = OffloadedLayer(
            **settings, placed=self.placed, attending=self.attending, prefetch=self.prefetch,
            placed_ahead=self.prefetch.placements[number % 2],
            workspace_ahead=self.prefetch.workspaces[number % 2],
            resident=Resident(self.kv, S, self.slots, nth * self.slots, self.overflow[number % 2]),
            ahead=ahead, predicted=ahead > 0 and self.mode == "predicted")
        if number and isinstance(self.layers[-1], OffloadedLayer):
            self.layers[-1].following = layer
        return layer

    def all_tokens(self):
        """The same cache: a row that is to attend to everything does so by its threshold."""
        return self

    def predict_next(self, i, x, blocks, cos, sin):
        """Layer i's `decode` chooses and fetches the next layer's tokens after its own. Done here:
        both, if layer i has none in host memory; choosing, in the mode "predicted"."""
        layer, following = self.layers[i], self.layers[i + 1] if i + 1 < len(self.layers) else None
        if isinstance(following, OffloadedLayer) and following.ahead:
            block = blocks[i + 1]
            # a copy: layer i changes x in place
            following.predicted_from = block, block.attn_norm(x), cos, sin
            if following.predicted or not isinstance(layer, OffloadedLayer):
                following.choose_ahead(self.seq_lens)
            if not isinstance(layer, OffloadedLayer):
                following.fetch_ahead(self.seq_lens)

    def offloaded(self):
        return [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]

    def begin(self):
        if self.ds is None:
            return
        for side in (self.prefetch.choosing, self.prefetch.fetching):
            side.join()  # a step that did not end may have left work, and predictions
        for layer in self.offloaded():
            layer.forget_prediction()
            layer.resident.forget()

    def prefill_layers(self, b, start, end):
        """As in KVCache; a layer's K and V go to the host while the next layer is prefilled in
        another buffer."""
        self.begin()
        _, HKV, _, _, D = self.host[0].kv.shape
        like = dict(dtype=self.host[0].kv.dtype, device=self.seq_lens.device)
        buffers = [torch.empty(1, HKV, end, 2, D, **like) for _ in range(2)]
        copied = [None, None]
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, HostLayer):
                yield layer.row(b)
                continue
            buffer = buffers[i % 2]
            self.side.wait(copied[i % 2])
            kernels = layer.ds.use_triton(buffer) if layer.ds else buffer.is_cuda
            if start:
                layer.host.read(b, buffer[:, :, :start], kernels)
            labels = None if layer.labels is None else layer.labels[b : b + 1]
            yield LayerCache(buffer, layer.window, layer.ds, layer.label_map, labels)
            rows = buffer[:, :, start:end]
            copied[i % 2] = self.side.run(partial(layer.host.write, b, start, rows, kernels))
        for copies in copied:
            self.side.wait(copies)

    def kv_bytes(self):
        return super().kv_bytes() + (self.kv.nbytes if self.ds else 0)

    def workspaces(self):
        more = [self.attending, *self.prefetch.workspaces] if self.ds else []
        return super().workspaces() + [workspace for workspace in more if workspace]

    def slot_map_bytes(self):
        maps = [layer.resident.maps() for layer in self.offloaded()]
        if self.ds:
            maps += [vars(placed) for placed in (self.placed, *self.prefetch.placements)]
        return (sum(host.map_bytes() for host in self.host)
                + sum(x.nbytes for of_one in maps for x in of_one.values()))

    def gpu_bytes(self):
        staging = 2 * self.host[0].kv[0].nbytes  # prefill's
        if self.streaming:
            staging += sum(buffer.nbytes for buffer in self.streaming.buffers)
        return super().gpu_bytes() | {"slot maps": self.slot_map_bytes(), "staging": staging}

    def statistics(self):
        """Of the steps since begin() or the last call: PCIe bytes to the GPU per step, and how many
        of them were fetched ahead, at the mean size of a live token's row; the share of selected
        tokens that were on the GPU, or on their way, when selected; the share of predicted tokens
        that were then selected; how many selected tokens were cut off. And, as of now, the share of
        live rows that are not packed, and bytes of host memory and of slot maps."""
        layers, lens = self.offloaded(), self.seq_lens
        row_bytes = torch.tensor([host.row_bytes(lens) for host in self.host], dtype=torch.float64)
        found = {"host_bytes": sum(host.kv.nbytes for host in self.host),
                 "as_is": sum(host.as_is(lens) for host in self.host) / len(self.host),
                 "slot_map_bytes": self.slot_map_bytes(),
                 "prefetch_heads": self.ahead if self.mode == "exact" else None}
        if self.streaming:
            rows = self.host[0].kv[..., 0, 0].numel()
            return found | {"pcie_bytes_per_step": row_bytes.sum().item() * rows}
        counts = torch.stack([layer.resident.counts for layer in layers]).sum((1, 2)).double().cpu()
        for layer in layers:
            layer.resident.counts.zero_()
        c = dict(zip(COUNTS, counts.T))  # [layers] each
        row_bytes /= (c["steps"][0] / layers[0].resident.clock.numel()).clamp(min=1)
        predicted = torch.tensor([layer.predicted for layer in layers])
        ahead = torch.where(predicted, c["fetched"], c["prefetched"])

        def share(part, whole):
            return (part.sum() / whole.sum()).item() if whole.sum() else None

        fetched = c["fetched"] + c["prefetched"]
        return found | {"pcie_bytes_per_step": (fetched * row_bytes).sum().item(),
                        "prefetched_bytes_per_step": (ahead * row_bytes).sum().item(),
                        "hit_rate": share(c["selected"] - c["fetched"], c["selected"]),
                        "agreement": share(c["confirmed"], c["predicted"]),
                        "tokens_attended": share(c["selected"] + c["steps"], c["steps"]),
                        "cut": int(c["cut"].sum()), "predicted_layers": int(predicted.sum())}
