"""How a sparse layer chooses its tokens: Double Sparsity and other methods, with the same budget and the same attention.

For eval.py: a layer is of one sequence, and each decode row is one of its positions, which attends to its own past.
"""
import math

import torch

from ds_attention import Workspace, attend, attend_ref, live_range, per_head, select_ref, select_tokens, top_p_ref
from model import LayerCache


class Sparse(LayerCache):
    """A sparse layer of one sequence, whose decode rows are positions of it. A method is how it chooses the rows' tokens.

    Made of a LayerCache; budget, first and newest tokens are its DSConfig's. Counts the tokens that its rows attend to.
    """

    labelled = False  # whether the choice reads labels
    foresees = False  # whether its scores are logits of the attention, which top_p needs

    def __init__(self, layer, scratch):
        """scratch: {rows: Workspace} of the last number of rows, shared by all layers."""
        if layer.ds.top_p is not None and not self.foresees:
            raise ValueError(f"top_p={layer.ds.top_p:g}: this method does not foresee the attention; take ds or exact_topk")
        super().__init__(layer.kv, layer.window, layer.ds, layer.label_map, layer.labels)
        self.scratch = scratch
        self.start()

    def start(self, probed=False):
        """Counts from nought. probed: also sums up the attention mass which the chosen tokens hold."""
        self.attended, self.mass = 0.0, 0.0 if probed else None

    def row(self, b):
        return self  # there is no other sequence

    def write(self, k, v, positions, labels=True):
        super().write(k, v, positions, labels=self.labelled)

    def choose(self, q, seq_lens):
        """The tokens attended, (indices [R, HKV, N], n_tokens [R, HKV]) as select_tokens gives them."""
        raise NotImplementedError

    def workspace_of(self, q):
        R, HQ, D = q.shape
        if R not in self.scratch:
            self.scratch.clear()
            HKV, S = self.kv.shape[1:3]
            self.scratch[R] = Workspace(R, HQ, HKV, D, S, q.device, self.ds, self.window)
        return self.scratch[R]

    def decode(self, q, seq_lens):
        indices, n = self.choose(q, seq_lens)
        out = self.attend_to(q, seq_lens, indices, n)
        self.attended = self.attended + n.double().mean() * len(q)
        if self.mass is not None:
            self.mass = self.mass + self.kept_mass(q, seq_lens, indices, n)
        return out

    def attend_to(self, q, seq_lens, indices, n):
        (R, HKV, N), D = indices.shape, q.shape[2]
        if self.ds.use_triton(q):
            k, v = self.kv.expand(R, -1, -1, -1, -1).unbind(3)
            return attend(q, k, v, seq_lens, indices, n, workspace=self.workspace_of(q), overlap=self.labelled)
        heads = torch.arange(HKV, device=q.device)[:, None]
        # gathered by whole rows, which is many times faster than attend_ref's own gather; then each head is a row of its own
        k, v = (x[0][heads, indices.clamp(min=0)].view(R * HKV, 1, N, D) for x in self.kv.unbind(3))
        return attend_ref(q.reshape(R * HKV, -1, D), k, v, n.flatten()).view_as(q)

    def best(self, scores, seq_lens):
        """scores [R, HKV, S] -> (indices [R, HKV, N], n_tokens [R, HKV])."""
        (_, HKV, S), ds = scores.shape, self.ds
        n = per_head(ds.budget(live_range(seq_lens, self.window)[1]), HKV)
        if ds.top_p is not None:
            n = top_p_ref(scores, seq_lens, n, ds.top_p, ds.sink, ds.recent, self.window)
        most = ds.budget(S if self.window is None else min(S, self.window))
        return select_ref(scores, seq_lens, n, most, ds.sink, ds.recent, self.window), n

    def kept_mass(self, q, seq_lens, indices, n):
        """Share of the exact softmax that the chosen tokens hold, summed over the rows: [HQ] fp64."""
        S, N = int(seq_lens.max()), indices.shape[2]
        grouped = q.float().unflatten(1, (self.kv.shape[1], -1))  # [R, HKV, G, D]
        logits = torch.einsum("rhgd,hsd->rhgs", grouped, self.past(S)[0][0].float()) / math.sqrt(q.shape[2])
        start, _ = live_range(seq_lens, self.window)
        position = torch.arange(S, device=q.device)
        eligible = (position >= start[:, None]) & (position < seq_lens[:, None])  # [R, S]
        weights = logits.masked_fill(~eligible[:, None, None], float("-inf")).softmax(-1)
        chosen = torch.arange(N, device=q.device) < n[..., None]  # [R, HKV, N]; what lies past n is not written
        index = indices.long().where(chosen, 0)[:, :, None].expand(-1, -1, weights.shape[2], -1)
        return (weights.gather(3, index) * chosen[:, :, None]).sum((0, 3)).flatten().double()


class DoubleSparsity(Sparse):
    """By label scores, as ds_decode chooses."""

    labelled = foresees = True

    def choose(self, q, seq_lens):
        labels, workspace = self.labels.expand(len(q), -1, -1, -1), None
        if self.ds.use_triton(q):
            workspace = self.workspace_of(q)
        else:
            labels = labels[..., : int(seq_lens.max())]
        return select_tokens(q, labels, self.label_map, seq_lens, self.ds, self.window, workspace)


class Baseline(Sparse):
    """By scores of keys and queries as they are, of a group's queries by their mean or maximum."""

    def scores(self, q, k):
        """q [R, HKV, G, D], k [HKV, S, D], fp32 -> [R, HKV, G, S], or [S] for all alike."""
        raise NotImplementedError

    def choose(self, q, seq_lens):
        S, HKV = int(seq_lens.max()), self.kv.shape[1]
        scores = self.scores(q.float().unflatten(1, (HKV, -1)), self.past(S)[0][0].float())
        scores = scores.expand(len(q), HKV, q.shape[1] // HKV, S)
        return self.best(scores.mean(2) if self.ds.pool == "mean" else scores.amax(2), seq_lens)


class ExactTopK(Baseline):
    """The best tokens by q . k / sqrt(D) itself: the ceiling of token sparsity."""

    foresees = True

    def scores(self, q, k):
        return torch.einsum("rhgd,hsd->rhgs", q, k) / math.sqrt(q.shape[3])


class Streaming(Baseline):
    """The first and the newest tokens alone (StreamingLLM, arXiv 2309.17453, without its shifted positions)."""

    def scores(self, q, k):
        return torch.arange(k.shape[1], dtype=torch.float32, device=k.device)


class Quest(Baseline):
    """Pages of 16 tokens by a bound of q . k from the page's extremes (arXiv 2406.10774); the last is cut to the budget."""

    PAGE = 16

    def __init__(self, layer, scratch):
        super().__init__(layer, scratch)
        # a row's last page may hold tokens after it: all of its own are among the newest, which are attended in any case
        if self.ds.recent < self.PAGE - 1:
            raise ValueError(f"recent={self.ds.recent}: quest needs the newest {self.PAGE - 1} tokens at least")

    def scores(self, q, k):
        S = k.shape[1]
        padded = torch.cat([k, k[:, -1:].expand(-1, -S % self.PAGE, -1)], 1)  # repeats a key: no new extreme
        low, high = padded.unflatten(1, (-1, self.PAGE)).aminmax(dim=2)  # [HKV, pages, D]
        bound = torch.einsum("rhgd,hpd->rhgp", q.clamp(min=0), high) + torch.einsum("rhgd,hpd->rhgp", q.clamp(max=0), low)
        return bound.repeat_interleave(self.PAGE, -1)[..., :S]


class H2O(Sparse):
    """Half the budget for the newest tokens, half for those with the most attention so far; the rest is evicted for good
    (arXiv 2306.14048; no tokens are forced). Rows must come in order from the first token on, one by one: it is slow."""

    def __init__(self, layer, scratch):
        super().__init__(layer, scratch)
        if self.window is not None:
            raise ValueError(f"window={self.window}: h2o is not made for sliding windows")

    def decode(self, q, seq_lens):
        _, HKV, S, _, D = self.kv.shape
        out, heads = torch.empty_like(q), torch.arange(HKV, device=q.device)
        for row, length in enumerate(seq_lens.tolist()):
            n = self.ds.budget(length)
            if length == 1:  # slots for the tokens that are kept, in no order
                slots = self.ds.budget(S)
                self.kept = torch.zeros(HKV, slots, dtype=torch.long, device=q.device)  # positions
                self.attention = torch.zeros(HKV, slots, device=q.device)  # the sum of what each has got
                self.kept_kv = torch.zeros(HKV, slots, 2, D, device=q.device)
            slot = torch.full_like(heads, n - 1)
            if n == self.ds.budget(length - 1):  # no more than before: the newest takes the place of another
                newest = self.kept[:, :n] >= length - max(1, n // 2)
                slot = self.attention[:, :n].masked_fill(newest, float("inf")).argmin(1)
            self.kept[heads, slot] = length - 1
            self.attention[heads, slot] = 0.0
            self.kept_kv[heads, slot] = self.kv[0, :, length - 1].float()
            k, v = self.kept_kv[:, :n].unbind(2)  # [HKV, n, D]
            logits = torch.einsum("hgd,hnd->hgn", q[row].float().view(HKV, -1, D), k) / math.sqrt(D)
            weights = logits.softmax(-1)
            self.attention[:, :n] += weights.sum(1)
            out[row] = torch.einsum("hgn,hnd->hgd", weights, v).flatten(0, 1).to(q.dtype)
            self.attended += n
        return out


METHODS = {"ds": DoubleSparsity, "exact_topk": ExactTopK, "quest": Quest, "h2o": H2O, "streaming": Streaming}
