"""The baseline of bench.py: a decode step as gpt-fast has it (github.com/meta-pytorch/gpt-fast)."""
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import apply_rope
from timing import WARM_UP, captured, median_s


class GptFast:
    """A decode step as gpt-fast has it, of a Transformer's weights: K and V of the allocated
    length, all attended under a boolean causal mask, repeated for grouped queries, RoPE from a
    table, gate and up apart. Greedy, as our steps are.
    """

    def __init__(self, model, batch, max_seq_length):
        c, device, dtype = model.config, model.device, model.dtype
        self.model, self.layer, self.head = model, self._layer, self._head
        shape = (batch, c.n_kv_heads, max_seq_length, c.head_dim)
        self.caches = [[torch.empty(shape, device=device, dtype=dtype).normal_() for _ in range(2)]
                       for _ in range(c.n_layers)]  # K and V
        positions = torch.arange(max_seq_length, device=device)
        self.rope = [table[0, 0].to(dtype) for table in model.rope(positions[None])]  # [S, D / 2]
        everything = (max_seq_length, max_seq_length)
        self.mask = torch.ones(everything, dtype=torch.bool, device=device).tril_()

    @contextlib.contextmanager
    def compiled(self, backend):
        """Within, a step is what gpt-fast compiles as a whole, in a sixth of the time: layers are
        alike, so one of them is compiled. It begins with the sum that ends the layer before, so
        that the kernels are those of the whole.

        backend: of SDPA. MATH leaves attention to Inductor, as gpt-fast's own loop does; with None
        SDPA chooses a kernel, which for several sequences is faster.
        """
        import torch._functorch.config as functorch_config  # here: they take seconds
        import torch._inductor.config as inductor_config

        tuned = inductor_config.patch(coordinate_descent_tuning=True)  # as gpt-fast has it
        # a cache that takes the two kinds of attention for one
        uncached = functorch_config.patch(enable_autograd_cache=False)
        attention = sdpa_kernel(backend) if backend else contextlib.nullcontext()
        try:
            with torch.no_grad(), tuned, uncached, attention:
                self.layer, self.head = (torch.compile(f, fullgraph=True)
                                         for f in (self._layer, self._head))
                yield
        finally:
            torch._dynamo.reset()

    @staticmethod
    def _norm(x, norm):
        x32 = x.float()
        return (x32 * torch.rsqrt(
            (x32 * x32).mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight

    @staticmethod
    def _layer(layer, x, more, k, v, cos, sin, mask, position):
        """x + more [B, 1, dim] is the layer's input, and what it returns, too."""
        attn, ffn, norm = layer.attn, layer.ffn, GptFast._norm
        x = x + more
        heads = attn.wqkv(norm(x, layer.attn_norm)).unflatten(-1, (-1, attn.head_dim))
        q, new_k, new_v = heads.transpose(1, 2).split(attn.heads, 1)
        if attn.q_norm is not None:
            q, new_k = norm(q, attn.q_norm), norm(new_k, attn.k_norm)
        q, new_k = (apply_rope(a, cos[position], sin[position]) for a in (q, new_k))
        k[:, :, position] = new_k
        v[:, :, position] = new_v
        k, v = (a.repeat_interleave(attn.heads[0] // attn.heads[1], 1) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, position])
        x = x + attn.wo(y.transpose(1, 2).flatten(2))
        gate, up = (F.linear(norm(x, layer.ffn_norm), w) for w in ffn.w13.weight.chunk(2))
        return x, ffn.w2(F.silu(gate) * up)

    @staticmethod
    def _head(x, more, norm, weight):
        return F.linear(GptFast._norm(x + more, norm), weight).argmax(-1)

    def step(self, tokens, position):
        """tokens [B, 1], position [1] int64, the same for all -> the next tokens [B, 1]."""
        x = self.model.embed(tokens)
        more = torch.zeros_like(x)
        for layer, cache in zip(self.model.layers, self.caches):
            x, more = self.layer(layer, x, more, *cache, *self.rope, self.mask, position)
        head = self.model.head or self.model.embed
        return self.head(x, more, self.model.norm, head.weight)


def time_gpt_fast(model, B, S, steps):
    """(seconds per step, bytes of weights and of the allocated cache, which it reads whole).

    The cache has S tokens, a multiple of 8 as in gpt-fast. The better of two kinds of attention
    counts. Raises ValueError for a model with expert layers.
    """
    if model.config.n_experts:
        raise ValueError("gpt_fast: does not know expert layers")
    device, all_steps = model.device, steps + 3 * WARM_UP
    size = -(-max(S, all_steps) // 8) * 8
    gpt_fast = GptFast(model, B, size)
    tokens = torch.ones(B, 1, dtype=torch.long, device=device)
    position = torch.empty(1, dtype=torch.long, device=device)

    def step():
        tokens.copy_(gpt_fast.step(tokens, position))
        position.add_(1)

    times = []
    for backend in (SDPBackend.MATH, None):
        position.fill_(size - all_steps)
        with gpt_fast.compiled(backend):
            times.append(median_s(captured(step, device.type), steps, device))
    kv_bytes = sum(kept.nbytes for cache in gpt_fast.caches for kept in cache)
    return min(times), model.weight_bytes(B) + kv_bytes
