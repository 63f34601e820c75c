"""Ways to choose the tokens that a decode row attends to: ours, and others' to set beside it.

Each is a layer of the cache that eval.py decodes with; all have the budget, and but for h2o the
first and the newest tokens, of one DSConfig.
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ds_attention import Workspace, attend, attend_ref, eligible_tokens, score_ref, select_ref
from model import LayerCache
from offload import select_tokens


def exact_logits(q, k, seq_lens, window):
    """q . k / sqrt(D) of rows of one sequence, -inf where a row may not look: q [R, HQ, D],
    k [HKV, S, D], seq_lens [R] -> [R, HKV, G, S] fp32."""
    grouped = q.float().unflatten(1, (len(k), -1))
    logits = torch.einsum("rhgd,hsd->rhgs", grouped, k.float() / math.sqrt(q.shape[2]))
    hidden = ~eligible_tokens(seq_lens, k.shape[1], window)
    return logits.masked_fill_(hidden[:, None, None], float("-inf"))


def pool(logits):
    """exact_logits of a group's heads [..., G, S] -> one score per token [..., S]: the largest
    logarithm of its softmax weights, as label scores are pooled."""
    return (logits - logits.logsumexp(-1, keepdim=True)).amax(-2)


def attention_on(chosen, logits):
    """Share of each row's attention that tokens hold, mean over heads, [R] fp32: chosen [R, HKV, S]
    bool, logits of exact_logits."""
    return torch.einsum("rhgs,rhs->rhg", logits.softmax(-1), chosen.float()).mean((1, 2))


class Sparse(LayerCache):
    """A sparse layer of one sequence, whose decode rows are positions of it.

    Made of a LayerCache. A method is how it chooses the rows' tokens; budget, first and newest
    tokens are its DSConfig's, at every length. Counts the tokens that its rows attend to.
    """

    labelled = False  # whether the choice reads labels
    calibration, bits = None, None  # of the labels, where the method has its own
    in_order = False  # whether rows must come from the first token on: they depend on those before
    EVERY = 8  # one row of so many is asked how much of the exact attention its tokens hold

    def __init__(self, layer):
        """Raises ValueError for a configuration that the method is not made for."""
        ds = replace(layer.ds, dense_below=0)
        super().__init__(layer.kv, layer.window, ds, layer.label_map, layer.labels)
        self.start()

    def start(self, probed=False):
        """Counts from nought. probed: also sums up the attention that the chosen tokens hold."""
        self.probed = probed
        self.attended = self.mass = 0.0
        self.probes = 0

    def row(self, b):
        return self  # there is no other sequence

    def write(self, k, v, positions, labels=True):
        super().write(k, v, positions, labels=self.labelled)

    def scores(self, q, seq_lens):
        """By which select_ref chooses: [R, HKV, S] fp32, S the longest row's length."""
        raise NotImplementedError

    def decode(self, q, seq_lens):
        scores = self.scores(q, seq_lens)
        chosen = select_ref(scores, seq_lens, self.ds, self.window)
        self.count(q, seq_lens, chosen.sum(2), chosen[:: self.EVERY])
        k, v = (x.expand(len(q), -1, -1, -1) for x in self.past(chosen.shape[2]))
        return attend_ref(q, k, v, seq_lens, chosen)

    def count(self, q, seq_lens, n_tokens, chosen):
        """n_tokens [R, HKV]; chosen: the tokens of every EVERY-th row, [R / EVERY, HKV, S] bool."""
        self.attended = self.attended + n_tokens.double().mean() * len(q)
        if self.probed:
            logits = self.logits(q[:: self.EVERY], seq_lens[:: self.EVERY], chosen.shape[2])
            self.mass = self.mass + attention_on(chosen, logits).double().sum()
            self.probes += len(chosen)

    def logits(self, q, seq_lens, S):
        return exact_logits(q, self.past(S)[0][0], seq_lens, self.window)


class DoubleSparsity(Sparse):
    """By label scores; on a GPU by the kernels."""

    labelled = True

    def asking(self, q):
        """The queries [R, any, D] that tokens are scored for."""
        return q

    def scores(self, q, seq_lens):
        labels = self.labels[..., : int(seq_lens.max())].expand(len(q), -1, -1, -1)
        return score_ref(self.asking(q), labels, self.label_map, seq_lens, self.ds, self.window)

    def decode(self, q, seq_lens):
        """As Sparse.decode, by the kernels where there are any."""
        if not self.ds.use_triton(q):
            return super().decode(q, seq_lens)
        labels = self.labels.expand(len(q), -1, -1, -1)
        indices, n_tokens, counts = select_tokens(
            self.asking(q), None, labels, self.label_map, seq_lens, self.ds, self.window)
        probed, n = indices[:: self.EVERY].long(), n_tokens[:: self.EVERY, :, None]
        S = indices.shape[2]
        probed = probed.where(torch.arange(S, device=q.device) < n, S)  # the rest was not written
        chosen = torch.zeros(*probed.shape[:2], S + 1, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter_(2, probed, True)[..., : int(seq_lens.max())]
        self.count(q, seq_lens, n_tokens, chosen)
        k, v = self.kv.expand(len(q), -1, -1, -1, -1).unbind(3)
        # the parts of the lists: those of the queries that chose, which may be fewer than q
        workspace = Workspace(*q.shape[:2], *k.shape[1::2], k.shape[2], q.device,
                              splits=counts.shape[2])
        return attend(q, k, v, seq_lens, indices, counts, self.window, workspace)


class Paper(DoubleSparsity):
    """The paper's choice: single channels of 4 bits, by mean |q_c k_c|, and the mean of a group's
    scores, which is the score of its mean query."""

    calibration, bits = "qk", 4

    def asking(self, q):
        return q.float().unflatten(1, (self.kv.shape[1], -1)).mean(2)


class ExactTopK(Sparse):
    """By q . k / sqrt(D) itself, pooled as label scores are: what labels can reach."""

    def scores(self, q, seq_lens):
        return pool(self.logits(q, seq_lens, int(seq_lens.max())))


class Streaming(Sparse):
    """The first and the newest tokens (StreamingLLM, arXiv 2309.17453, positions not shifted)."""

    def scores(self, q, seq_lens):
        position = torch.arange(int(seq_lens.max()), dtype=torch.float32, device=q.device)
        return position.expand(len(q), self.kv.shape[1], -1)


class Quest(Sparse):
    """Pages of 16 tokens by a bound of q . k from the page's extremes (arXiv 2406.10774), pooled as
    scores are. A page is attended to whole, so that tokens are somewhat more than the budget."""

    PAGE = 16

    def __init__(self, layer):
        super().__init__(layer)
        # a row's last page may hold tokens after it: all of its own are among the newest
        if self.ds.recent < self.PAGE - 1:
            raise ValueError(f"recent={self.ds.recent}: must be {self.PAGE - 1} at least for quest")

    def scores(self, q, seq_lens):
        S, D = int(seq_lens.max()), q.shape[2]
        q = q.float().unflatten(1, (self.kv.shape[1], -1)) / math.sqrt(D)  # [R, HKV, G, D]
        short = -S % self.PAGE  # tokens that the last page lacks
        k = self.past(S)[0][0].float()  # [HKV, S, D]
        k = torch.cat([k, k[:, -1:].expand(-1, short, -1)], 1)  # repeats a key: no new extreme
        low, high = k.unflatten(1, (-1, self.PAGE)).aminmax(dim=2)  # [HKV, pages, D]
        bound = (torch.einsum("rhgd,hpd->rhgp", q.clamp(min=0), high)
                 + torch.einsum("rhgd,hpd->rhgp", q.clamp(max=0), low))
        eligible = F.pad(eligible_tokens(seq_lens, S, self.window), (0, short))
        eligible = eligible.unflatten(1, (-1, self.PAGE)).any(2)[:, None, None]
        scores = pool(bound.masked_fill(~eligible, float("-inf")))
        return scores.repeat_interleave(self.PAGE, -1)[..., :S]


class H2O(Sparse):
    """Half the budget for the newest tokens, half for those with the most attention so far; others
    are evicted for good (arXiv 2306.14048; no tokens are forced). Row by row: it is slow."""

    in_order = True

    def __init__(self, layer):
        super().__init__(layer)
        if self.window is not None:
            raise ValueError(f"window={self.window}: h2o is not made for sliding windows")

    def decode(self, q, seq_lens):
        """As of any layer, row by row: what one keeps depends on the attention of those before."""
        _, HKV, S, _, D = self.kv.shape
        out, heads = torch.empty_like(q), torch.arange(HKV, device=q.device)
        for row, length in enumerate(seq_lens.tolist()):
            n = self.ds.budget(length)
            if length == 1:  # slots for the tokens that are kept, in no order
                slots = self.ds.budget(S)
                self.kept = torch.zeros(HKV, slots, dtype=torch.long, device=q.device)  # positions
                self.received = torch.zeros(HKV, slots, device=q.device)  # attention, summed
                self.kept_kv = torch.zeros(HKV, slots, 2, D, device=q.device)
            slot = torch.full_like(heads, n - 1)
            if n == self.ds.budget(length - 1):  # no more than before: another makes place
                newest = self.kept[:, :n] >= length - max(1, n // 2)
                slot = self.received[:, :n].masked_fill(newest, float("inf")).argmin(1)
            self.kept[heads, slot] = length - 1
            self.received[heads, slot] = 0.0
            self.kept_kv[heads, slot] = self.kv[0, :, length - 1].float()
            k, v = self.kept_kv[:, :n].unbind(2)  # [HKV, n, D]
            grouped = q[row].float().view(HKV, -1, D)
            weights = (torch.einsum("hgd,hnd->hgn", grouped, k) / math.sqrt(D)).softmax(-1)
            self.received[:, :n] += weights.sum(1)
            out[row] = torch.einsum("hgn,hnd->hgd", weights, v).flatten(0, 1).to(q.dtype)
            self.attended += n
        return out


METHODS = {"ds": DoubleSparsity, "exact_topk": ExactTopK, "paper": Paper, "quest": Quest,
           "streaming": Streaming, "h2o": H2O}
