"""The transformer of the Llama family, with a static cache that decode reads dense or sparse.

Shapes follow the key at the top of ds_attention.py; `dim` is the model's width. Three ways through
the same blocks:
  forward        whole sequences without a cache: training
  prefill        a prompt into the cache, layer by layer and in chunks, dense causal attention
  decode         one new token per sequence (`decode`), or several of one sequence, as if in turn
                 (`decode_rows`): each attends to its own past, by Double Sparsity if configured
On a GPU `decode` runs the weights through the fused layers of linear.py; the blocks are their
reference.
"""
import hashlib
import json
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

import parallel
from config import ModelConfig, rope_frequencies
from ds_attention import DSConfig, LabelMap, Workspace, dims_in, ds_decode, words_in, write_labels
from experts import Experts, MoEFeedForward
from linear import Linear, Residual, largest, quantized


def apply_rope(x, cos, sin):
    """x [B, H, T, D] in Hugging Face's half-split order, turned; cos, sin [B, 1, T, D / 2] fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# ---------------------------------------------------------------- cache


@dataclass
class LayerCache:
    """What one layer keeps of the past, and how a new token reads it. Rows are sequences."""

    kv: torch.Tensor  # [B, HKV, S, 2, D]: a token's K and V side by side, one row to gather
    window: int | None
    ds: DSConfig | None = None  # None: a dense layer
    label_map: LabelMap | None = None
    labels: torch.Tensor | None = None  # [B, HKV, W, S] int32
    workspace: Workspace | None = None  # of a decode step of B rows; other shapes make their own
    all_tokens: bool = False  # decode attends to everything whatever `ds` is, but writes labels

    def kv_bytes(self):
        """Bytes of GPU memory for K and V."""
        return self.kv.nbytes

    def row(self, b):
        """The same layer of sequence b alone: a view with B = 1."""
        labels = None if self.labels is None else self.labels[b : b + 1]
        return LayerCache(self.kv[b : b + 1], self.window, self.ds, self.label_map, labels)

    def write(self, k, v, positions, labels=True):
        """k, v [B, HKV, T, D] to positions [B, T]; labels=False leaves the labels to `decode`."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        # [B, T, HKV, 2, D]
        self.kv.transpose(1, 2)[rows, positions] = torch.stack([k, v], 3).transpose(1, 2)
        if labels and self.ds is not None:
            write_labels(k, positions, self.labels, self.label_map, self.ds)

    def past(self, length):
        """K and V of the first `length` tokens, [B, HKV, length, D] each."""
        return self.kv[:, :, :length].unbind(3)

    def decode(self, q, seq_lens):
        """q [R, HQ, D], one query per row; seq_lens [R]. Either R = B, and the newest keys' labels
        are written; or B = 1, and all R rows read the one sequence, whose labels are there."""
        k, v = self.kv.expand(len(q), -1, -1, -1, -1).unbind(3)
        labels = None if self.labels is None else self.labels.expand(len(q), -1, -1, -1)
        workspace = self.workspace if len(q) == len(self.kv) else None
        return ds_decode(q, k, v, labels, self.label_map, seq_lens, self.ds, self.window, workspace,
                         self.all_tokens)


class KVCache:
    """Static cache of all layers: K, V, in sparse ones labels. seq_lens [B] int32: live lengths."""

    def __init__(self, config, batch, max_seq_length, device, dtype, ds=None, label_maps=None):
        """ds: None for dense; label_maps: a LabelMap per layer, needed from ds.dense_layers on."""
        B, HKV, S, D = batch, config.n_kv_heads, max_seq_length, config.head_dim
        self.max_seq_length, self.window, self.ds = S, config.longest_window, ds
        self.seq_lens = torch.zeros(B, dtype=torch.int32, device=device)
        self.sparse_steps = 0  # since begin(); who runs steps counts them
        self.layers = []
        workspace = None
        if torch.device(device).type != "cpu":
            workspace = Workspace(B, config.n_heads, HKV, D, S, device, ds)
        for i in range(config.n_layers):
            settings = dict(window=config.window(i), workspace=workspace)
            if ds is not None and i >= ds.dense_layers:
                padded = -(-S // 16) * 16  # each row starts aligned: four words are loaded at once
                labels = torch.zeros(B, HKV, words_in(ds.widths(D)), padded,
                                     dtype=torch.int32, device=device)[..., :S]
                ours = [t.to(device) for t in label_maps[i].tensors()]
                settings |= dict(ds=ds, label_map=LabelMap(*ours, label_maps[i].widths),
                                 labels=labels)
            self.layers.append(self.make_layer((B, HKV, S, 2, D), dtype, device, settings))

    def make_layer(self, shape, dtype, device, settings):
        """A layer with K and V of `shape`; settings: the other fields of a LayerCache."""
        return LayerCache(torch.zeros(shape, dtype=dtype, device=device), **settings)

    def all_tokens(self):
        """The same cache, of which a decode step reads everything."""
        view = copy(self)
        view.layers = [replace(layer, all_tokens=True) for layer in self.layers]
        return view

    def sparse_at(self, length):
        """Whether a step whose longest row has `length` live tokens, its own included, is sparse:
        in it each row still decides for itself whether it attends to all (DSConfig.budget)."""
        return self.ds is not None and self.ds.sparse_at(
            length if self.window is None else min(length, self.window))

    def prefill_layers(self, b, start, end):
        """Yields, by layer, the cache of sequence b alone, to prefill its tokens start to end."""
        for layer in self.layers:
            yield layer.row(b)

    def predict_next(self, i, x, blocks, cos, sin):
        """Before layer i of a decode step, whose input is x [B, 1, dim]: for caches that predict
        what the next of `blocks` attends to. cos, sin [B, 1, 1, D / 2] of the new tokens."""

    def begin(self):
        """Before the first step of a generation: counts begin anew."""
        self.sparse_steps = 0
        if self.layers[0].workspace and self.ds:
            self.layers[0].workspace.attended.zero_()

    def statistics(self):
        """Figures of the steps since begin(): of sparse ones by kernels the tokens that a KV head
        attends to, mean over steps, sequences, heads and sparse layers."""
        workspace = self.layers[0].workspace
        steps = self.sparse_steps * sum(layer.ds is not None for layer in self.layers)
        if not (steps and workspace):
            return {}
        return {"tokens_attended": workspace.attended.double().mean().item() / steps}

    def kv_bytes(self):
        return sum(layer.kv_bytes() for layer in self.layers)

    def label_bytes(self):
        return sum(layer.labels.nbytes for layer in self.layers if layer.labels is not None)

    def workspaces(self):
        return [self.layers[0].workspace] if self.layers[0].workspace else []

    def gpu_bytes(self):
        """GPU memory that it takes, by what it is for."""
        scratch = {x for workspace in self.workspaces() for x in vars(workspace).values()
                   if isinstance(x, torch.Tensor)}
        return {"KV cache": self.kv_bytes(), "labels": self.label_bytes(),
                "workspace": sum(x.nbytes for x in scratch)}

    def read_bytes(self, lengths):
        """Cache bytes that steps at these live lengths (int64) read: (as configured, if dense)."""
        dense = sparse = 0
        for layer in self.layers:
            live = lengths if layer.window is None else lengths.clamp(max=layer.window)
            HKV, _, _, D = layer.kv.shape[1:]
            token = HKV * 2 * D * layer.kv.element_size()
            dense += live.sum().item() * token
            if layer.ds is None or layer.all_tokens:
                sparse += live.sum().item() * token
            else:
                sparse += (layer.ds.budget(live) * token
                           + live * HKV * layer.labels.shape[2] * 4).sum().item()
        return sparse, dense


# ---------------------------------------------------------------- blocks


def causal_attention(q, k, v, window=None):
    """The last T of S tokens attend to their past: q [B, HQ, T, D], k, v [B, HKV, S, D] -> as q.

    Flash attention where it exists; no [S, S] tensor: a mask is at most [T, S], with T <= 2048.
    """
    T, S = q.shape[2], k.shape[2]
    gqa, bounded = q.shape[1] != k.shape[1], window is not None and S > window
    if T == S and not bounded:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if not bounded and q.shape[3] % 8 == 0 and can_use_flash_attention(
            SDPAParams(q, k, v, None, 0.0, False, gqa)):
        # torch.nn.attention.bias does the same, but to import it brings torch.compile: 7 s at first
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
    if T > 2048:
        ends = [S - T + min(i + 2048, T) for i in range(0, T, 2048)]
        return torch.cat([causal_attention(part, k[:, :, :end], v[:, :, :end], window)
                          for part, end in zip(q.split(2048, 2), ends)], 2)
    first = max(0, S - T - window) if bounded else 0  # before it none of the queries sees anything
    k, v = k[:, :, first:], v[:, :, first:]
    ahead = (torch.arange(S - T, S, device=q.device)[:, None]
             - torch.arange(first, S, device=q.device))
    mask = (ahead >= 0) & (ahead < (window or S))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.head_dim, self.window = config.head_dim, config.window(layer)
        self.wqkv = Linear(config.dim, sum(self.heads) * config.head_dim, config.qkv_bias)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, config.norm_eps)
                                        for _ in range(2))

    def project(self, x, cos, sin):
        """x [B, T, dim], normed -> q [B, HQ, T, D], k, v [B, HKV, T, D]; q and k after RoPE."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.heads, 1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def queries(self, x, cos, sin, kv_heads=None):
        """As `project`, of the q alone of the first so many KV heads, or of all."""
        n = self.heads[0] // self.heads[1] * (kv_heads or self.heads[1]) * self.head_dim
        bias = None if self.wqkv.bias is None else self.wqkv.bias[:n]
        q = F.linear(x, self.wqkv.rows(n, x.dtype), bias).unflatten(
            -1, (-1, self.head_dim)).transpose(1, 2)
        return apply_rope(q if self.q_norm is None else self.q_norm(q), cos, sin)

    def attend(self, q, k, v, cache=None, step=None):
        """q, k, v as from `project`; a cache, if any, takes k and v first -> [B, T, HQ, D]."""
        B, HQ, T, D = q.shape
        if cache is None:
            return causal_attention(q, k, v, self.window).transpose(1, 2)
        cache.write(k, v, step.positions, labels=step.prefill_length is not None or T > 1)
        if step.prefill_length is not None:
            return causal_attention(q, *cache.past(step.prefill_length),
                                    self.window).transpose(1, 2)
        return cache.decode(q.transpose(1, 2).reshape(B * T, HQ, D),
                            step.row_lens).view(B, T, HQ, D)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)

    def decode(self, residual, next_gain):
        """`forward` of one token per sequence by fused kernels. next_gain: of the norm after it."""
        y = residual.swiglu(self.w13.weight, scale=self.w13.scale)
        residual.add(y, self.w2.weight, next_gain, scale=self.w2.scale)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ranks = config.ranks
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoEFeedForward(config) if config.n_experts else FeedForward(config)

    def before(self, x, cos, sin):
        """x [B, T, dim] -> q [B, HQ, T, D], k, v [B, HKV, T, D] for attention."""
        return self.attn.project(self.attn_norm(x), cos, sin)

    def after(self, x, y):
        """x [B, T, dim] and attention's result y [B, T, HQ, D] -> [B, T, dim]."""
        x = x + parallel.total(self.attn.wo(y.flatten(2)), self.ranks)
        return x + parallel.total(self.ffn(self.ffn_norm(x)), self.ranks)

    def forward(self, x, cos, sin, cache=None, step=None):
        q, k, v = self.before(x, cos, sin)
        return self.after(x, self.attn.attend(q, k, v, cache, step))

    def decode(self, residual, cos, sin, cache, seq_lens, next_gain):
        """`forward` of one token per sequence by fused kernels. next_gain: of the norm after it."""
        q = residual.heads(self.attn, cos, sin, cache.kv, seq_lens)
        y = cache.decode(q, seq_lens)  # [B, HQ, D]
        wo = self.attn.wo
        residual.add(y.flatten(1), wo.weight, self.ffn_norm.weight, scale=wo.scale)
        self.ffn.decode(residual, next_gain)


PREFILL_CHUNK = 8192  # tokens: matrix products at full speed, activations below 2 GB at 7B


@dataclass
class Step:
    """Where the new tokens stand, and whether they come as a dense prefill or as decode rows."""

    positions: torch.Tensor  # [B, T] int32
    prefill_length: int | None = None  # tokens in the cache once these are written; None: decode
    row_lens: torch.Tensor | None = None  # [B * T] int32: a decode row's live length, with itself


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # its random numbers, on the meta device, would bring torch.compile's modules: 7 s at first
        table, on_meta = (config.vocab_size, config.dim), torch.get_default_device().type == "meta"
        self.embed = nn.Embedding(*table, _weight=torch.empty(table) if on_meta else None)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = (None if config.tie_embeddings
                     else Linear(config.dim, parallel.output_rows(config)))
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def quantize(self):
        """The weights of all linear layers become int8, the head's too if it is not the embeddings;
        not the routers', which are small and decide."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize()

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def rope(self, positions):
        """positions [B, T] -> cos, sin [B, 1, T, D / 2] fp32."""
        angles = positions[:, None, :, None].float() * self.frequencies
        return angles.cos(), angles.sin()

    def weight_bytes(self, batch):
        """Bytes of weights that a decode step of `batch` sequences reads: all but the embedding
        table, of which it takes a row each, and of experts those that are chosen, as many as if
        each sequence chose at random."""
        c, total = self.config, self.tied_rows().nbytes if self.head is None else 0
        chosen = 1 - (1 - c.experts_per_token / c.n_experts) ** batch if c.n_experts else 0
        for module in self.modules():
            if module is not self.embed:
                nbytes = sum(p.nbytes for p in module.parameters(recurse=False))
                total += int(nbytes * chosen) if isinstance(module, Experts) else nbytes
        return total

    def tied_rows(self):
        """The embeddings [any, dim] that are output weights, of a rank its own."""
        rows = parallel.output_rows(self.config)
        whole = rows == self.config.vocab_size
        return self.embed.weight if whole else self.embed.weight[parallel.own(rows)]

    def logits(self, x):
        """x [..., dim] after the last block -> [..., vocab]."""
        x = self.norm(x)
        x = F.linear(x, self.tied_rows()) if self.head is None else self.head(x)
        return parallel.whole_logits(x, self.config)

    def forward(self, tokens):
        """Whole sequences, dense, no cache: tokens [B, T] -> logits [B, T, vocab]."""
        x = self.embed(tokens)
        cos, sin = self.rope(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.logits(x)

    def compile_blocks(self):
        """What blocks do before and after attention goes through torch.compile, once for all
        layers, at first use: a seventh less for a prefill, some 18 s more for the first one."""
        for name in ("before", "after"):
            compiled = torch.compile(getattr(Block, name), dynamic=True)  # prompts have any length
            for layer in self.layers:
                setattr(layer, name, partial(compiled, layer))
        for layer in self.layers:
            # how many tokens an expert gets is data: a compiler would stop at each
            if isinstance(layer.ffn, MoEFeedForward):
                layer.ffn.forward = torch.compiler.disable(layer.ffn.forward)

    def _run(self, tokens, cache, step):
        x = self.embed(tokens)
        cos, sin = self.rope(step.positions)
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers)):
            cache.predict_next(i, x, self.layers, cos, sin)
            x = layer(x, cos, sin, layer_cache, step)
        return x

    @torch.inference_mode()
    def prefill(self, prompts, cache, start=0, chunk=PREFILL_CHUNK, progress=None):
        """Writes prompts (a list of token ids per sequence) to the cache from position `start` on.

        Each layer sees all chunks before the next one does: a cache may hold one layer at a time.
        progress: called as work goes to the device, with numbers of tokens that add up to all.
        """
        for b, prompt in enumerate(prompts):
            end = start + len(prompt)
            cache.seq_lens[b] = end
            parts = (torch.tensor(prompt, device=self.device,
                                  dtype=torch.long)[None].split(chunk, 1) if prompt else ())
            positions = torch.arange(start, end, device=self.device,
                                     dtype=torch.int32)[None].split(chunk, 1)
            hidden = [self.embed(part) for part in parts]
            ropes = [self.rope(position) for position in positions]
            steps = [Step(position, min(start + (i + 1) * chunk, end))
                     for i, position in enumerate(positions)]
            done = 0  # tokens, each counted once per layer
            # the cache's layers come first in zip, which so runs their generator to its end
            for layer_cache, layer in (zip(cache.prefill_layers(b, start, end), self.layers)
                                       if prompt else ()):
                for i, part in enumerate(hidden):
                    hidden[i] = layer(part, *ropes[i], layer_cache, steps[i])
                    before, done = done, done + part.shape[1]
                    if progress:
                        progress(done // len(self.layers) - before // len(self.layers))

    @torch.inference_mode()
    def decode(self, tokens, cache, grow=None, impl="auto"):
        """Appends one token per sequence: tokens [B] -> logits of the next, [B, vocab].

        grow: None for 1, or a [B] tensor of bool or int: a sequence with 0 repeats its last step
        (whose token must be given again), which leaves its cache as it is. impl: "triton" for the
        fused kernels, "torch", or "auto": the kernels for up to 64 sequences of a 16-bit model on a
        GPU, unless it norms heads of a size that is no power of two.
        """
        assert impl in ("auto", "torch", "triton"), f"impl={impl}"
        odd_norms = self.config.qk_norm and self.config.head_dim.bit_count() > 1
        fused = (self.dtype.itemsize == 2 and self.device.type == "cuda"
                 and len(tokens) <= Residual.MAX_ROWS and not odd_norms)
        if impl == "triton" or (impl == "auto" and fused):
            return self._decode_fused(tokens, cache, grow)
        cache.seq_lens += 1 if grow is None else grow
        positions = (cache.seq_lens - 1)[:, None]
        x = self._run(tokens[:, None], cache, Step(positions, row_lens=cache.seq_lens))
        return self.logits(x[:, 0])

    def _decode_fused(self, tokens, cache, grow):
        """`decode` by fused kernels."""
        gains = [layer.attn_norm.weight for layer in self.layers] + [self.norm.weight]
        residual = Residual(
            self.embed.weight, gains[0], self.config.norm_eps, tokens, seq_lens=cache.seq_lens,
            grow=grow, frequencies=self.frequencies, peers=parallel.peers(
                self.config.ranks, Residual.MAX_ROWS, self.config.dim, self.device))
        for i, (layer, layer_cache, next_gain) in enumerate(
                zip(self.layers, cache.layers, gains[1:])):
            cache.predict_next(i, residual.x[:, None], self.layers,
                          *(table[:, None, None] for table in residual.rope))
            layer.decode(residual, *residual.rope, layer_cache, cache.seq_lens, next_gain)
        if self.head is None:
            logits = residual.logits(self.tied_rows())
        else:
            logits = residual.logits(self.head.weight, scale=self.head.scale)
        return parallel.whole_logits(logits, self.config)

    @torch.inference_mode()
    def decode_rows(self, tokens, cache):
        """Appends T known tokens to the sequence of a B = 1 cache, each decoded from its own past.

        tokens [T] -> logits [T, vocab]; the same as T calls of `decode`, in one.
        """
        T = len(tokens)
        positions = cache.seq_lens + torch.arange(T, device=self.device, dtype=torch.int32)
        cache.seq_lens += T
        x = self._run(tokens[None], cache, Step(positions[None], row_lens=positions + 1))
        return self.logits(x[0])


# ---------------------------------------------------------------- memory

RUNTIME_BYTES = 2**30  # kernels' code, cuBLAS workspaces, CUDA graphs, the allocator's unused rest


def memory_need(config, batch, max_seq_length, dtype, ds=None, cache_type=KVCache, quantize=None):
    """Bytes of GPU memory that prefill and decode take, by what they are for: a dict. cache_type:
    called as KVCache is; quantize: as for load_model."""
    HKV, D = config.n_kv_heads, config.head_dim
    maps = None
    if ds is not None:
        widths = ds.widths(D)
        each = torch.empty(HKV, dims_in(widths), device="meta")  # channels, and what they have
        maps = [LabelMap(each, each, each, each, each[0], widths)] * config.n_layers
    cache = cache_type(config, batch, max_seq_length, "meta", dtype, ds, maps)
    qkv, attended = (config.n_heads + 2 * HKV) * D, config.n_heads * D
    # of one token in the widest moments of a block: residual, normed, q, k, v before and after RoPE
    # with its fp32 halves, K and V side by side; or the feed-forward's gate, up and product
    widest = 3 * config.dim + max(2 * qkv + attended + 2 * HKV * D + 6 * qkv,
                                  attended + 3 * config.ffn_dim)
    # the residual stream of one prompt between two layers, and its RoPE tables
    between = max_seq_length * (config.dim * dtype.itemsize + D * 4)
    sampling = batch * config.vocab_size * (dtype.itemsize + 4 * 4)  # logits, and fp32 copies
    weights = widened = 0
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weights += parameter.numel() * dtype.itemsize
            if quantize and isinstance(module, Linear) and name == "weight":
                *_, rows, row = parameter.shape
                weights += parameter.numel() // row * (row * (1 - dtype.itemsize) + 4)
                # prefill makes fp32 of one at a time, and then 16 bits; the head's are not needed
                # there, and steps of few sequences read its int8
                if module is not model.head or batch > Residual.MAX_ROWS:
                    widened = max(widened, rows * row * (4 + dtype.itemsize))
    in_chunks = min(PREFILL_CHUNK, max_seq_length) * widest * dtype.itemsize
    return {"weights": weights, **cache.gpu_bytes(),
            "activations": in_chunks + between + sampling + widened, "runtime": RUNTIME_BYTES}


def largest_that(fits, low, high):
    """The largest number in [low, high) that fits; low does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_memory(free, config, batch, max_seq_length, dtype, ds=None, cache_type=KVCache,
                 quantize=None, of="GPU"):
    """Raises ValueError, naming what would fit, if `free` bytes of GPU memory, or of what `of`
    says, are too few for memory_need's total."""
    needed = partial(memory_need, config, dtype=dtype, ds=ds, cache_type=cache_type,
                     quantize=quantize)

    def fits(batch, length):
        return sum(needed(batch, length).values()) <= free

    if fits(batch, max_seq_length):
        return
    need = needed(batch, max_seq_length)
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in need.items())
    if not fits(1, 1):
        remedy = "no batch of this model fits"
    else:
        options = []
        if fits(batch, 1):
            length = largest_that(partial(fits, batch), 1, max_seq_length)
            options.append(f"--max_seq_length {length}")
        if batch > 1 and fits(1, max_seq_length):
            rows = largest_that(partial(fits, length=max_seq_length), 1, batch)
            options.append(f"a batch of {rows}")
        remedy = (f"{' or '.join(options)} would fit" if options
                  else "take a smaller batch and a shorter --max_seq_length")
        if cache_type is KVCache and of == "GPU":
            remedy += ", or keep K and V in host memory: --offload"
    raise ValueError(f"max_seq_length={max_seq_length} for a batch of {batch} needs "
                     f"{sum(need.values()) / 2**30:.1f} GiB of {of} memory ({parts}), "
                     f"{free / 2**30:.1f} are free; {remedy}")


# ---------------------------------------------------------------- checkpoints


def parameter_shapes(config):
    """Our tensor names and shapes, in the order of the checkpoint file."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


def open_tensors(path):
    """safe_open of a safetensors file. Raises ValueError naming a file that is not a whole one."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None


def fingerprint(path):
    """Quick hash of a safetensors file: tensor names, shapes, first 4 KiB; training changes it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.tell()
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            begin, end = entry["data_offsets"]
            file.seek(data + begin)
            digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode()
                          + file.read(min(4096, end - begin)))
    return digest.hexdigest()[:16]


def load_model(checkpoint, device, dtype, quantize=None, ranks=1):
    """Checkpoint directory of ours -> Transformer in eval mode. quantize: "int8" for the weights of
    linear layers as Transformer.quantize has them; ranks: how many processes share the model, of
    which this one has its part. Raises ValueError naming what is wrong."""
    checkpoint = Path(checkpoint)
    whole = ModelConfig.from_file(checkpoint / "config.json")
    config = parallel.share(whole, ranks)
    path = checkpoint / "model.safetensors"
    expected = parameter_shapes(whole)
    with open_tensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wrong = ([name for name in expected if found.get(name) != tuple(expected[name])]
                 + sorted(set(found) - set(expected)))
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} tensors missing, unexpected or of another "
                             f"shape than config.json says, first {wrong[0]}; "
                             "convert the model again with convert_hf.py")

        def read(name):
            tensor = parallel.read(file, name, config).to(device, dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"{path}: {name} has weights that are infinite or not a number")
            return tensor

        return assemble(config, read, device, quantize)


def assemble(config, read, device, quantize=None):
    """A Transformer in eval mode whose weights are read(name) for each of parameter_shapes(config),
    on `device`. quantize: as for load_model, one after the other: both kinds of all weights may not
    fit."""
    with torch.device("meta"):
        model = Transformer(config)
    if quantize:
        model.requires_grad_(False).quantize()
    ours, tensors = model.state_dict(), {}
    for name in parameter_shapes(config):
        tensors[name] = read(name)
        scale = name.removesuffix("weight") + "scale"
        if scale in ours:
            magnitudes = parallel.whole_rows(largest(tensors[name]), name, config)
            tensors[name], tensors[scale] = quantized(tensors[name], magnitudes)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval().requires_grad_(False)


def random_model(config, device, dtype, quantize=None):
    """A Transformer with random weights, made where they stay; no end of text or sliding window.
    quantize: as for load_model."""
    config = replace(config, eos_ids=(), sliding_window=None)
    alike, own = (torch.Generator(device).manual_seed(seed) for seed in (0, 1 + parallel.rank()))
    shapes = parameter_shapes(config)

    def weights(name):
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], device=device, dtype=dtype)
        generator = own if parallel.split(name, config) else alike
        return torch.empty(shapes[name], device=device, dtype=dtype).normal_(
            0, 0.02, generator=generator)

    return assemble(config, weights, device, quantize)
