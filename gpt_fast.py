"""The baseline of bench.py: a decode step as gpt-fast has it (github.com/meta-pytorch/gpt-fast)."""
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import apply_rope
from timing import WARM_UP, captured, median_s


ATTENTION = {  # kinds that gpt-fast has had, of which the fastest counts: the context of each
    "inductor": lambda: sdpa_kernel(SDPBackend.MATH),  # SDPA by Inductor, as in its own loop
    "sdpa": contextlib.nullcontext,  # by the kernel that SDPA chooses
    "flex": contextlib.nullcontext}  # by FlexAttention, as in its later versions


class GptFast:
    """A decode step as gpt-fast has it, of a Transformer's weights: K and V of the allocated
    length, RoPE from a table, gate and up apart. Greedy, as our steps are.

    SDPA attends to all of the cache under a boolean causal mask, K and V repeated for grouped
    queries; FlexAttention to live blocks of it.
    """

    def __init__(self, model, batch, max_seq_length):
        c, device, dtype = model.config, model.device, model.dtype
        self.model, self.layer, self.head = model, self._layer, self._head
        shape = (batch, c.n_kv_heads, max_seq_length, c.head_dim)
        self.caches = [[torch.empty(shape, device=device, dtype=dtype).normal_() for _ in range(2)]
                       for _ in range(c.n_layers)]  # K and V
        positions = torch.arange(max_seq_length, device=device)
        self.rope = [table[0, 0].to(dtype) for table in model.rope(positions[None])]  # [S, D / 2]
        self.position = torch.zeros((), dtype=torch.long, device=device)

    def attend_by(self, attention):
        """Takes one of ATTENTION: its mask."""
        S, device = len(self.rope[0]), self.model.device
        self.attention, self.mask = attention, None  # the mask before makes room
        self.mask = (self._block_mask(S, dict(dtype=torch.int32, device=device))
                     if attention == "flex" else
                     torch.ones(S, S, dtype=torch.bool, device=device).tril_())

    def _block_mask(self, S, place):
        """A BlockMask of one query, at self.position: blocks that it attends to whole, and one."""
        from torch.nn.attention.flex_attention import BlockMask  # here: it takes seconds

        blocks = torch.arange(-(-S // 128), **place).expand(1, 1, 1, -1).contiguous()
        self.whole, self.last = torch.zeros(1, 1, 1, **place), torch.zeros_like(blocks)
        return BlockMask.from_kv_blocks(
            torch.ones_like(self.whole), self.last, self.whole, blocks, BLOCK_SIZE=128,
            mask_mod=lambda b, h, q, kv: kv <= self.position, seq_lengths=(1, S))

    @contextlib.contextmanager
    def compiled(self, attention):
        """Within, a step is what gpt-fast compiles as a whole, in a sixth of the time: layers are
        alike, so one of them is compiled. It begins with the sum that ends the layer before, so
        that the kernels are those of the whole."""
        import torch._functorch.config as functorch_config  # here: they take seconds
        import torch._inductor.config as inductor_config

        tuned = inductor_config.patch(coordinate_descent_tuning=True)  # as gpt-fast has it
        # a cache that takes one kind of attention for another
        uncached = functorch_config.patch(enable_autograd_cache=False)
        self.attend_by(attention)
        try:
            with torch.no_grad(), tuned, uncached, ATTENTION[attention]():
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
        if torch.is_tensor(mask):
            k, v = (a.repeat_interleave(attn.heads[0] // attn.heads[1], 1) for a in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None, position])
        else:
            y = torch.nn.attention.flex_attention.flex_attention(q, k, v, block_mask=mask,
                                                                 enable_gqa=True)
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
        if self.attention == "flex":
            self.position.copy_(position[0])
            self.whole.copy_(self.position // 128)
            self.last[..., 0] = self.position // 128
        for layer, cache in zip(self.model.layers, self.caches):
            x, more = self.layer(layer, x, more, *cache, *self.rope, self.mask, position)
        head = self.model.head or self.model.embed
        return self.head(x, more, self.model.norm, head.weight)


def time_gpt_fast(model, B, S, steps):
    """(seconds per step, bytes of weights and of the allocated cache, which it reads nearly whole).

    The cache has S tokens, a multiple of 8 as in gpt-fast. The best kind of ATTENTION counts.
    Raises ValueError for a model with expert layers.
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
    for attention in ATTENTION:
        position.fill_(size - all_steps)
        with gpt_fast.compiled(attention):
            times.append(median_s(captured(step, device.type), steps, device))
    kv_bytes = sum(kept.nbytes for cache in gpt_fast.caches for kept in cache)
    return min(times), model.weight_bytes(B) + kv_bytes
