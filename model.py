"""The transformer of the Llama family, with a static cache that decode reads dense or sparse.

Llama 1/2/3, SmolLM, Vicuna, Mistral, Mixtral, Qwen2/2.5 and Qwen3. Shapes follow the key at the top
of ds_attention.py; `dim` is the model's width. Three ways through the same blocks:
  forward        whole sequences without a cache: training
  prefill        a prompt into the cache, layer by layer and in chunks, dense causal attention
  decode         one new token per sequence (`decode`), or several of one sequence, as if in turn
                 (`decode_rows`): each attends to its own past, by Double Sparsity if configured
On a GPU `decode` runs the weights through fused kernels, below; the blocks are their reference.
"""
import hashlib
import json
import math
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from safetensors import SafetensorError, safe_open
from torch import nn

from ds_attention import DSConfig, LabelMap, Workspace, dense_decode, ds_decode, pdl, write_labels

# ---------------------------------------------------------------- configuration

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# What transformers takes where a config.json lacks a key, by model_type. It reads these keys alone,
# and so do we: a sliding_window under llama, for one, changes nothing.
_SHARED_DEFAULTS = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, head_dim=None,
    hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False,
    eos_token_id=None)  # where config.json names none, transformers' generation has none
_MISTRAL_DEFAULTS = _SHARED_DEFAULTS | dict(
    vocab_size=32000, intermediate_size=14336, num_key_value_heads=8,
    max_position_embeddings=131072, sliding_window=4096)
_QWEN_DEFAULTS = _SHARED_DEFAULTS | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
    max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096,
    max_window_layers=28, layer_types=None)
DEFAULTS = {
    "llama": _SHARED_DEFAULTS | dict(
        vocab_size=32000, intermediate_size=11008, num_key_value_heads=None,
        max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
    "mistral": _MISTRAL_DEFAULTS,
    "mixtral": _MISTRAL_DEFAULTS | dict(
        sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
        num_experts_per_tok=2),
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | dict(head_dim=128, attention_bias=False),
}
# Of keys that are read, those that must have a value that is implemented.
REQUIRED_VALUES = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None),
                   "mlp_bias": (False, None)}
MAX_LAYERS = 4096  # of a config that is believed
# Keys that are read elsewhere, or have no effect on inference: not worth a word.
SILENT_KEYS = set(
    "architectures model_type rope_scaling rope_parameters quantization_config auto_map "
    "bos_token_id pad_token_id unk_token_id max_sequence_length _name_or_path torch_dtype dtype "
    "transformers_version use_cache initializer_range pretraining_tp attention_dropout torchscript "
    "output_router_logits router_aux_loss_coef router_jitter_noise".split())


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, as in its checkpoint's config.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": of ROPE_SCALINGS, "factor": ..., ...}
    sliding_window: int | None = None  # tokens, the query's own included
    full_layers: tuple[int, ...] = ()  # layers to which it does not apply
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's q and k, before RoPE
    n_experts: int = 0  # 0: a dense feed-forward
    experts_per_token: int = 0
    eos_ids: tuple[int, ...] = (2,)

    def window(self, layer):
        """The sliding window of a layer, or None."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def longest_window(self):
        """The most tokens that any layer looks back over, or None for all."""
        return None if self.full_layers else self.sliding_window

    @staticmethod
    def from_file(path):
        """Reads config.json, and the end tokens of a generation_config.json beside it, which come
        first, as in transformers. Raises ValueError, naming the file, for what from_dict refuses.
        """
        path = Path(path)
        content = read_json(path)
        generation = path.with_name("generation_config.json")
        if generation.is_file():
            content |= {"eos_token_id": read_json(generation).get("eos_token_id")}
        try:
            return ModelConfig.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def from_dict(content):
        """content: a Hugging Face config, in the hub's older form or in that of transformers 5
        (rope_parameters). Raises ValueError for another architecture, and for what would change
        the result and is not implemented.
        """
        model_type = _model_type(content)
        defaults = DEFAULTS[model_type]
        c = defaults | {key: content[key] for key in content if key in defaults}
        for key, values in REQUIRED_VALUES.items():
            if c.get(key, values[0]) not in values:
                raise ValueError(f"{key}={c[key]}: only {values[0]} is implemented")
        try:
            heads, dim = c["num_attention_heads"], c["hidden_size"]
            theta, scaling, positions = _read_rope(c, content)
            window, full_layers = _read_windows(c)
            eos = c["eos_token_id"]
            config = ModelConfig(
                dim=dim, n_layers=c["num_hidden_layers"], n_heads=heads,
                n_kv_heads=c["num_key_value_heads"] or heads,
                head_dim=c["head_dim"] or dim // heads, ffn_dim=c["intermediate_size"],
                vocab_size=c["vocab_size"], max_positions=positions, norm_eps=c["rms_norm_eps"],
                rope_theta=theta, rope_scaling=scaling, sliding_window=window,
                full_layers=full_layers, tie_embeddings=bool(c["tie_word_embeddings"]),
                qkv_bias=model_type == "qwen2", qk_norm=model_type == "qwen3",
                n_experts=c.get("num_local_experts", 0),
                experts_per_token=c.get("num_experts_per_tok", 0),
                eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
        except KeyError as error:
            raise ValueError(f"missing key {error}") from None
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"a key has a value of the wrong type ({error})") from None
        names = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size",
                 "max_positions"]
        names += ["sliding_window"] if config.sliding_window is not None else []
        names += ["n_experts", "experts_per_token"] if model_type == "mixtral" else []
        for name in names:
            value = getattr(config, name)
            if type(value) is not int or not 1 <= value < 2**31:
                raise ValueError(f"{name}={value!r}: must be a positive integer below 2**31")
        if type(c["tie_word_embeddings"]) is not bool:
            raise ValueError(f"tie_word_embeddings={c['tie_word_embeddings']!r}: must be true or "
                             "false")
        if not all(type(i) is int and i >= 0 for i in config.eos_ids):
            raise ValueError(f"eos_token_id={eos!r}: must be a token id, or a list of them")
        if config.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers={config.n_layers}: must be at most {MAX_LAYERS}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(config, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: must be a positive number")
        try:
            if not (0 < rope_frequencies(config)).logical_and(
                    rope_frequencies(config) < math.inf).all():
                raise ValueError(f"rope_scaling={scaling}: gives angles that are no numbers")
        except KeyError as error:
            raise ValueError(f"rope_scaling: missing key {error}") from None
        except (TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"rope_scaling={scaling}: has a value of the wrong type or size "
                             f"({error})") from None
        if config.n_heads % config.n_kv_heads:
            raise ValueError(f"n_heads={config.n_heads}: must be a multiple of "
                             f"n_kv_heads={config.n_kv_heads}")
        if config.head_dim % 2:
            raise ValueError(f"head_dim={config.head_dim}: must be even, for RoPE")
        if config.experts_per_token > config.n_experts:
            raise ValueError(f"experts_per_token={config.experts_per_token}: must be at most "
                             f"n_experts={config.n_experts}")
        return config


def read_json(path):
    """A JSON file's object. Raises ValueError naming a file that is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def ignored_keys(content):
    """Keys of a Hugging Face config that are not read and might mean something."""
    return sorted(set(content) - set(DEFAULTS[_model_type(content)]) - SILENT_KEYS)


def _model_type(content):
    """A key of DEFAULTS. Raises ValueError for what is not implemented as a whole."""
    names = content.get("architectures")
    names = names if isinstance(names, list) and names else [names]
    model_type = content.get("model_type") or ARCHITECTURES.get(str(names[0]))
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise ValueError(f"architecture {names[0]} (model_type {content.get('model_type')}): "
                         f"must be one of {', '.join(ARCHITECTURES)}")
    quantization = content.get("quantization_config")
    if quantization is not None:
        if isinstance(quantization, dict):
            quantization = quantization.get("quant_method")
        raise ValueError(f"quantization_config: weights quantised by {quantization} are not "
                         "implemented; take the model's 16-bit weights, or a GGUF file")
    if content.get("auto_map"):
        raise ValueError("auto_map: the model brings code of its own, which is never run")
    return model_type


def _read_rope(c, content):
    """(theta, scaling or None, trained positions). c: a config with its defaults; content: as it is
    written."""
    rope = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling={rope!r}: must be an object, or null for none")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or c["rope_theta"]
    theta = float(theta) if type(theta) is int else theta
    kind = rope.pop("type", "default")
    rope.setdefault("rope_type", kind)
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if rope["rope_type"] not in ROPE_SCALINGS or by_layer:
        raise ValueError(f"rope_type={rope['rope_type']}: must be one of "
                         f"{', '.join(ROPE_SCALINGS)}, for all layers")
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor: only 1 is implemented")
    positions = c["max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", positions)
    if rope["rope_type"] == "linear":  # Vicuna's name for what the squeezed positions make room for
        positions = max(positions, content.get("max_sequence_length") or 0)
    return theta, None if rope["rope_type"] == "default" else rope, positions


def _read_windows(c):
    """(sliding window or None, layers without it) of a config with its defaults."""
    if "layer_types" not in c:  # all layers alike
        return c.get("sliding_window"), ()
    if not c["use_sliding_window"] or c["sliding_window"] is None:
        return None, ()
    L, first = c["num_hidden_layers"], c["max_window_layers"]
    full, sliding = "full_attention", "sliding_attention"
    types = c["layer_types"] or [sliding if i >= first else full for i in range(L)]
    if len(types) != L or not {full, sliding}.issuperset(types):
        raise ValueError(f"layer_types={types}: must name {sliding} or {full} "
                         f"for each of {L} layers")
    full_layers = tuple(i for i, name in enumerate(types) if name == full)
    return (None, ()) if len(full_layers) == L else (c["sliding_window"], full_layers)


def _llama(dim, ffn_dim, n_layers, n_heads, n_kv_heads, max_positions, vocab_size=32000, **more):
    return ModelConfig(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim, vocab_size,
                       max_positions, **more)


# Shapes of published models, for benchmarks with random weights.
PRESETS = {
    "Llama-7B": _llama(4096, 11008, 32, 32, 32, 2048, norm_eps=1e-6),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 4096),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8, 4096),
    "Vicuna-7B-v1.5-16K": _llama(4096, 11008, 32, 32, 32, 16384,
                                 rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "Mistral-7B-v0.1": _llama(4096, 14336, 32, 32, 8, 32768, sliding_window=4096),
    "Mixtral-8x7B-v0.1": _llama(4096, 14336, 32, 32, 8, 32768, rope_theta=1e6, n_experts=8,
                                experts_per_token=2),
    "Llama-3.1-8B": _llama(
        4096, 14336, 32, 32, 8, 131072, 128256, rope_theta=500000.0, eos_ids=(128001,),
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "Qwen2.5-7B": _llama(3584, 18944, 28, 28, 4, 131072, 152064, norm_eps=1e-6, rope_theta=1e6,
                         qkv_bias=True),
    "Qwen3-8B": _llama(4096, 12288, 36, 32, 8, 40960, 151936, norm_eps=1e-6, rope_theta=1e6,
                       qk_norm=True),
}

# ---------------------------------------------------------------- rotary embedding


def _llama3_frequencies(frequencies, scaling):
    """Llama 3.1: stretches long wavelengths by `factor`, keeps short ones, interpolates between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # within the trained length
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


ROPE_SCALINGS = {
    "default": lambda frequencies, scaling: frequencies,
    "dynamic": lambda frequencies, scaling: frequencies,  # others past the trained length: refused
    "linear": lambda frequencies, scaling: frequencies / scaling["factor"],
    "factors": lambda frequencies, scaling:  # a GGUF file's rope_freqs
        frequencies / torch.tensor(scaling["factors"], device="cpu"),
    "llama3": _llama3_frequencies,
}


def rope_frequencies(config):
    """Radians per position of each pair of channels, [D / 2] fp32."""
    frequencies = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    return ROPE_SCALINGS[scaling["rope_type"]](frequencies, scaling)


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
        """q [R, HQ, D], one query per row; seq_lens [R]. R = B, and the newest keys' labels are
        written, or R over the one sequence of a B = 1 cache."""
        k, v = self.kv.expand(len(q), -1, -1, -1, -1).unbind(3)
        own = len(q) == len(self.kv)
        workspace = self.workspace if own else None
        if self.ds is None:
            return dense_decode(q, k, v, seq_lens, self.window, workspace=workspace)
        if self.all_tokens:
            newest = dict(labels=self.labels, label_map=self.label_map) if own else {}
            return dense_decode(q, k, v, seq_lens, self.window, self.ds.impl, workspace, **newest)
        labels = self.labels.expand(len(q), -1, -1, -1)
        return ds_decode(q, k, v, labels, self.label_map, seq_lens, self.ds, self.window, workspace,
                         own)


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
                labels = torch.zeros(B, HKV, ds.words(D), padded, dtype=torch.int32,
                                     device=device)[..., :S]
                settings |= dict(ds=ds, label_map=label_maps[i].to(device), labels=labels)
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

    def foresee(self, i, x, blocks, cos, sin):
        """Before layer i of a decode step, whose input is x [B, 1, dim]: for caches that foresee
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
            HKV, S, _, D = layer.kv.shape[1:]
            token = HKV * 2 * D * layer.kv.element_size()
            dense += live.sum().item() * token
            if layer.ds is None or layer.all_tokens:
                sparse += live.sum().item() * token
            else:
                sparse += (layer.ds.budget(live) * token
                           + live * HKV * layer.labels.shape[2] * 4).sum().item()
        return sparse, dense


# ---------------------------------------------------------------- decode kernels

# The kernels of a decode step overlap: one may start once all programs of the one before have
# called gdc_launch_dependents (programmatic dependent launch). What keeps that safe, here and in
# ds_attention.py: each kernel calls gdc_wait before it writes anything or reads what this step has
# written, so that one that has ended implies that all before it have; and a kernel whose successor
# reads more than constants before its own gdc_wait launches that successor after gdc_wait.


@triton.jit
def _product(tile, inputs, acc, W8: tl.constexpr):
    """acc + tile [n, k] times inputs [b, k]: [n, b]; of an int8 tile [b, n], where no two warps
    widen the same weights."""
    if W8:
        acc = tl.dot(inputs, tl.trans(tile).to(inputs.dtype), acc)
    else:
        acc = tl.dot(tile, tl.trans(inputs), acc)
    return acc


@triton.jit
def _linear_kernel(x, w, scale, out, squares, gain, scaled, bias, q_gain, k_gain, cos, sin,
                   seq_lens, kv, B, N, K, half, parts, launch_at, HQ, HKV, kv_sb, kv_sh, kv_ss, eps,
                   EPILOGUE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, NORM_PAIRS: tl.constexpr,
                   STAGES: tl.constexpr, W8: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr):
    """x [B, K] times w [rows, K], then an epilogue: see the methods of Residual.

    A program owns BLOCK_N of N outputs, all of K. w may be int8: then scale [rows] fp32 is what its
    rows are times. "silu" and "rope" take two rows of w for each n: n counts pairs of rows that lie
    `half` apart. NORM_PAIRS: `half`, where q and k are normed by head; a program then has whole
    heads.
    """
    PAIR: tl.constexpr = EPILOGUE == "silu" or EPILOGUE == "rope"
    NORM: tl.constexpr = EPILOGUE != "residual"
    pid = tl.program_id(0)
    n, b, offs_k = (pid * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B),
                    tl.arange(0, BLOCK_K))
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
    else:
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
    SHAPE: tl.constexpr = [BLOCK_B, BLOCK_N] if W8 else [BLOCK_N, BLOCK_B]
    acc, acc_2 = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = k + offs_k < K
        inputs = tl.load(x + b[:, None] * K + (k + offs_k)[None, :],
                         mask=mask_b[:, None] & mask_k[None, :], other=0.0)
        tile = tl.load(rows + (k + offs_k)[None, :], mask=mask_k[None, :], other=0,
                       eviction_policy="evict_first")
        if UPCAST:
            inputs, tile = inputs.to(tl.float32), tile.to(tl.float32)
        acc = _product(tile, inputs, acc, W8)
        if PAIR:
            tile_2 = tl.load(rows + half * K + (k + offs_k)[None, :], mask=mask_k[None, :], other=0,
                             eviction_policy="evict_first")
            acc_2 = _product(tile_2.to(tile.dtype), inputs, acc_2, W8)
        if PDL:
            if k == launch_at:  # not earlier: programs that wait are in the way of those that run
                tl.extra.cuda.gdc_launch_dependents()
    if W8:
        acc, acc_2 = tl.trans(acc), tl.trans(acc_2)
    dtype = out.dtype.element_ty
    if scale is not None:
        acc *= scale_1
        if PAIR:
            acc_2 *= scale_2
    if NORM:
        rstd = tl.rsqrt(tl.sum(part, 0) / K + eps)[None, :]
        acc, acc_2 = acc * rstd, acc_2 * rstd
    if EPILOGUE == "none":
        tl.store(out + at, acc.to(dtype), mask=mask)
    if EPILOGUE == "silu":
        tl.store(out + at, (acc / (1 + tl.exp(-acc)) * acc_2).to(dtype), mask=mask)
    if EPILOGUE == "residual":
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
def _enter_kernel(table, tokens, gain, x, scaled, squares, dim, BLOCK: tl.constexpr):
    pid_b = tl.program_id(0)
    row = pid_b.to(tl.int64)
    if tokens is not None:
        row = tl.load(tokens + pid_b).to(tl.int64)
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


class Residual:
    """The residual stream of a decode step, and the fused linear layers that read it.

    One token for each of B sequences. Beside x [B, dim] stand x times the weight of the norm that
    comes next, and the sums of x**2 over parts of dim: the kernel that changes x writes them, and
    the one that needs the norm scales its result at the end. Weights are read once, at the memory's
    speed, for up to MAX_ROWS sequences. They may be int8, with the `scale` of each output.
    `more` of any method: scale, and block sizes and the like, see _tiles.
    """

    MAX_ROWS = 64

    def __init__(self, table, gain, eps, tokens=None):
        """Starts as rows tokens [B], or all, of table [any, dim]; gain [dim]: the first norm's."""
        B, dim = len(table if tokens is None else tokens), table.shape[1]
        self.eps = eps
        self.x, self.scaled = (torch.empty(B, dim, dtype=table.dtype, device=table.device)
                               for _ in range(2))
        self.partial = torch.empty(triton.cdiv(dim, 16), B, dtype=torch.float32,
                                   device=table.device)
        self.enter(table, gain, tokens)

    def enter(self, table, gain, tokens=None):
        """x becomes rows of table, as in __init__."""
        self.squares = self.partial[:1]
        _enter_kernel[(len(self.x),)](table, tokens, gain, self.x, self.scaled, self.squares,
                                      table.shape[1], BLOCK=1024)

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
                         BLOCK_N=BLOCK_N)
        return self._linear("rope", self.scaled, weight, weight.shape[0] // 2, half=D // 2, out=out,
                            **rope | more)

    def add(self, inputs, weight, gain, **more):
        """x += inputs [B, K] times weight [dim, K]; gain [dim]: the weight of the next norm."""
        self._linear("residual", inputs, weight, weight.shape[0], out=self.x, gain=gain, **more)

    def _linear(self, epilogue, x, weight, N, half=1, scale=None, out=None, gain=None, bias=None,
                q_gain=None, k_gain=None, cos=None, sin=None, seq_lens=None, kv=None, HQ=1, HKV=1,
                strides=(0, 0, 0), NORM_PAIRS=0, **tiles):
        B, K = x.shape
        assert x.is_contiguous() and weight.is_contiguous() and B <= self.MAX_ROWS
        tiles = _tiles(epilogue, N, K, B, weight.element_size()) | tiles
        programs = triton.cdiv(N, tiles["BLOCK_N"])
        out = torch.empty(B, N, dtype=x.dtype, device=x.device) if out is None else out
        if epilogue == "residual":
            self.squares = self.partial[:programs]
        parts = len(self.squares)
        launch_at = max(0, triton.cdiv(K, tiles["BLOCK_K"]) - tiles.pop("AHEAD")) * tiles["BLOCK_K"]
        overlap = pdl(x)
        _linear_kernel[(programs,)](
            x, weight, scale, out, self.squares, gain, None if gain is None else self.scaled, bias,
            q_gain, k_gain, cos, sin, seq_lens, kv, B, N, K, half, parts, launch_at, HQ, HKV,
            *strides, self.eps, EPILOGUE=epilogue, NORM_PAIRS=NORM_PAIRS,
            BLOCK_B=max(8 if scale is None else 16, triton.next_power_of_2(B)),
            BLOCK_P=triton.next_power_of_2(parts), W8=scale is not None,
            UPCAST=not x.is_cuda,  # the interpreter's dot takes bfloat16 for integers
            PDL=overlap, **tiles, **(dict(launch_pdl=True) if overlap else {}))
        return out


def _tiles(epilogue, N, K, B, itemsize):
    """Block sizes of a fused linear layer: all programs resident, 40 KB and more of weights on the
    way to each multiprocessor. AHEAD: steps of BLOCK_K before its end when the next may start."""
    # many: inputs take as much shared memory as weights
    pair, many = epilogue in ("silu", "rope"), B > 16
    short = epilogue == "residual" and K <= 8192
    BLOCK_N = (16 if triton.cdiv(N, 32) < 128
               else 64 if epilogue == "none" or (pair and many) else 32)
    if many:
        sizes = dict(BLOCK_K=64 if pair else 128, STAGES=4, num_warps=8)
    else:
        sizes = dict(BLOCK_K=128 if pair or BLOCK_N == 64 else 256,
                     STAGES=3 if epilogue == "silu" else 4, num_warps=4)
        if itemsize == 1:
            if epilogue == "silu":
                sizes["STAGES"] = 6
            elif epilogue == "rope" or (epilogue == "residual" and not short):
                sizes["BLOCK_K"] *= 2
            if epilogue == "residual":
                BLOCK_N, sizes["AHEAD"] = 64 if short and BLOCK_N == 32 else BLOCK_N, 4
        elif short:  # the more programs there are, the more evenly they end
            BLOCK_N, sizes["num_warps"] = 16, 1
    return dict(BLOCK_N=BLOCK_N, AHEAD=2) | sizes


# ---------------------------------------------------------------- blocks


def causal_attention(q, k, v, window=None):
    """The last T of S tokens attend to their past: q [B, HQ, T, D], k, v [B, HKV, S, D] -> as q.

    Flash attention where it exists; no [S, S] tensor (a window's mask: [T, T + window], T <= 2048).
    """
    T, S = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window is not None and S > window and T > 2048:
        ends = [S - T + min(i + 2048, T) for i in range(0, T, 2048)]
        return torch.cat([causal_attention(part, k[:, :, :end], v[:, :, :end], window)
                          for part, end in zip(q.split(2048, 2), ends)], 2)
    if window is not None and S > window:
        first = max(0, S - T - window)  # nothing before it is visible to any of the queries
        k, v = k[:, :, first:], v[:, :, first:]
        ahead = (torch.arange(S - T, S, device=q.device)[:, None]
                 - torch.arange(first, S, device=q.device))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(ahead >= 0) & (ahead < window),
                                              enable_gqa=gqa)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    # here: it brings torch.compile's modules, seconds that a prefill in one chunk does without
    from torch.nn.attention.bias import causal_lower_right

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S),
                                          enable_gqa=gqa)


def quantized(weight):
    """weight [out, in] -> (codes int8 of its shape, scale [out] fp32): codes times scale is nearest
    to it, by row and symmetric."""
    scale = weight.abs().amax(1).float().clamp(min=1e-30) / 127
    codes = torch.empty_like(weight, dtype=torch.int8)
    for part, rows, of_rows in zip(codes.split(4096), weight.split(4096), scale.split(4096)):
        part.copy_((rows.float() / of_rows[:, None]).round_())  # in parts: an fp32 copy is large
    return codes, scale


class Linear(nn.Linear):
    """nn.Linear. Its weight may be int8, as `quantized` has it, with `scale`: decode kernels read
    it so, and whatever else needs the weight makes 16 bits of it first."""

    def __init__(self, n_in, n_out, bias=False):
        super().__init__(n_in, n_out, bias)
        self.register_parameter("scale", None)

    def quantize(self):
        codes, scale = quantized(self.weight)
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


@triton.jit
def _expert_linear_kernel(x, w, experts, out, N, K, PER_X: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_K: tl.constexpr):
    """out[p, n] = w[experts[p], n] . x[p // PER_X]: w [E, N, K], x [rows, K], out [pairs, N]."""
    pair, offs_n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[:, None]
    w += tl.load(experts + pair).to(tl.int64) * N * K + offs_n.to(tl.int64)[:, None] * K
    x += (pair // PER_X).to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        row = tl.load(x + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        acc += row[None, :] * tl.load(w + offs_k[None, :], mask=mask_n & (offs_k < K)[None, :],
                                      other=0.0).to(tl.float32)
    tl.store(out + pair.to(tl.int64) * N + offs_n, tl.sum(acc, 1).to(out.dtype.element_ty),
             mask=offs_n < N)


def expert_linear(x, w, experts, block_n=8, block_k=512, num_warps=4):
    """Each row through its own experts, without gathering their weights: x [rows, K], w [E, N, K],
    experts [rows * top] int64, a row's top ones side by side -> [rows * top, N]. All contiguous."""
    (E, N, K), pairs = w.shape, len(experts)
    out = torch.empty(pairs, N, dtype=x.dtype, device=x.device)
    # pairs vary fastest: rows with the same expert meet its weights in the L2 cache
    _expert_linear_kernel[(pairs, triton.cdiv(N, block_n))](
        x, w, experts, out, N, K, pairs // len(x), block_n, block_k, num_warps=num_warps)
    return out


class MoEFeedForward(nn.Module):
    """Mixtral's: each token through its top experts, weighted by the softmax of their logits."""

    def __init__(self, config):
        super().__init__()
        E, F_, dim = config.n_experts, config.ffn_dim, config.dim
        self.top = config.experts_per_token
        self.router = nn.Linear(dim, E, bias=False)
        self.w13 = nn.Parameter(torch.empty(E, 2 * F_, dim))
        self.w2 = nn.Parameter(torch.empty(E, dim, F_))

    def forward(self, x):
        """x [..., tokens, dim]. Decode on a GPU asks nothing of the host: a CUDA graph must not."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # [tokens, dim]
        logits, experts = self.router(x).topk(self.top, -1)  # [tokens, top]
        weights = logits.float().softmax(-1).to(x.dtype)
        if x.is_cuda and (shape[-2] == 1 or len(x) <= Residual.MAX_ROWS):
            return self.by_token(x, experts, weights).view(shape)
        out = torch.zeros_like(x)
        for e in range(len(self.w13)):
            token, choice = (experts == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.w13[e]).chunk(2, -1)
            out.index_add_(
                0, token, F.linear(F.silu(gate) * up, self.w2[e]) * weights[token, choice, None])
        return out.view(shape)

    def by_token(self, x, experts, weights):
        """For few tokens: x [tokens, dim]; experts, weights [tokens, top] -> [tokens, dim]."""
        gate, up = expert_linear(x, self.w13, experts.flatten()).chunk(2, -1)  # [tokens * top, F_]
        parts = expert_linear(F.silu(gate) * up, self.w2,
                              experts.flatten()).view(*experts.shape, -1)
        return (parts * weights[..., None]).sum(1)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoEFeedForward(config) if config.n_experts else FeedForward(config)

    def before(self, x, cos, sin):
        """x [B, T, dim] -> q [B, HQ, T, D], k, v [B, HKV, T, D] for attention."""
        return self.attn.project(self.attn_norm(x), cos, sin)

    def after(self, x, y):
        """x [B, T, dim] and attention's result y [B, T, HQ, D] -> [B, T, dim]."""
        x = x + self.attn.wo(y.flatten(2))
        return x + self.ffn(self.ffn_norm(x))

    def forward(self, x, cos, sin, cache=None, step=None):
        q, k, v = self.before(x, cos, sin)
        return self.after(x, self.attn.attend(q, k, v, cache, step))

    def decode(self, residual, cos, sin, cache, seq_lens, next_gain):
        """`forward` of one token per sequence by fused kernels. next_gain: of the norm after it."""
        q = residual.heads(self.attn, cos, sin, cache.kv, seq_lens)
        y = cache.decode(q, seq_lens)  # [B, HQ, D]
        wo = self.attn.wo
        residual.add(y.flatten(1), wo.weight, self.ffn_norm.weight, scale=wo.scale)
        if isinstance(self.ffn, FeedForward):
            w13, w2 = self.ffn.w13, self.ffn.w2
            y = residual.swiglu(w13.weight, scale=w13.scale)
            residual.add(y, w2.weight, next_gain, scale=w2.scale)
        else:
            residual.enter(residual.x + self.ffn(self.ffn_norm(residual.x)), next_gain)


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
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def quantize(self):
        """The weights of all linear layers become int8, the head's too if it is not the embeddings.
        Raises ValueError for a model with experts, whose layers are others."""
        if self.config.n_experts:
            raise ValueError("quantize=int8: not for a model with experts; leave the option out")
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
        table, of which it takes a row each, and of an expert layer the experts of all sequences (as
        if they chose different ones, while there are any)."""
        total = self.embed.weight.nbytes if self.head is None else 0
        for name, parameter in self.named_parameters():
            if not name.startswith("embed."):
                expert = parameter.ndim == 3  # [E, out, in]
                share = (min(1, batch * self.config.experts_per_token / len(parameter))
                         if expert else 1)
                total += int(parameter.nbytes * share)
        return total

    def logits(self, x):
        """x [..., dim] after the last block -> [..., vocab]."""
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

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
            cache.foresee(i, x, self.layers, cos, sin)
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
            # the cache's layers come first: they are asked for one more after the last
            for layer_cache, layer in (zip(cache.prefill_layers(b, start, end), self.layers)
                                       if prompt else ()):
                for i, part in enumerate(hidden):
                    hidden[i] = layer(part, *ropes[i], layer_cache, steps[i])
                    before, done = done, done + part.shape[1]
                    if progress:
                        progress(done // len(self.layers) - before // len(self.layers))

    @torch.inference_mode()
    def decode(self, tokens, cache, grow=1, impl="auto"):
        """Appends one token per sequence: tokens [B] -> logits of the next, [B, vocab].

        grow: 1, or a [B] tensor of bool or int: a sequence with 0 repeats its last step (whose
        token must be given again), which leaves its cache as it is. impl: "triton" for the fused
        kernels, "torch", or "auto": the kernels for up to 64 sequences of a 16-bit model on a GPU.
        """
        assert impl in ("auto", "torch", "triton"), f"impl={impl}"
        cache.seq_lens += grow
        positions = (cache.seq_lens - 1)[:, None]
        fused = (self.dtype.itemsize == 2 and self.device.type == "cuda"
                 and len(tokens) <= Residual.MAX_ROWS)
        if impl == "triton" or (impl == "auto" and fused):
            return self._decode_fused(tokens, positions, cache)
        x = self._run(tokens[:, None], cache, Step(positions, row_lens=cache.seq_lens))
        return self.logits(x[:, 0])

    def _decode_fused(self, tokens, positions, cache):
        """`decode` by fused kernels; positions [B, 1]: of the new tokens, which seq_lens counts."""
        rope = self.rope(positions)
        cos, sin = (table.flatten(1) for table in rope)  # [B, D / 2]
        gains = [layer.attn_norm.weight for layer in self.layers] + [self.norm.weight]
        residual = Residual(self.embed.weight, gains[0], self.config.norm_eps, tokens)
        for i, (layer, layer_cache, next_gain) in enumerate(
                zip(self.layers, cache.layers, gains[1:])):
            cache.foresee(i, residual.x[:, None], self.layers, *rope)
            layer.decode(residual, cos, sin, layer_cache, cache.seq_lens, next_gain)
        if self.head is None:
            return residual.logits(self.embed.weight)
        return residual.logits(self.head.weight, scale=self.head.scale)

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
    meta = partial(torch.empty, device="meta")
    maps = None
    if ds is not None:
        of_channels = meta(HKV, ds.channels(D))
        maps = [LabelMap.from_statistics(*(of_channels,) * 3, ds.widths(D))] * config.n_layers
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
    for name, shape in parameter_shapes(config).items():
        linear = quantize and len(shape) == 2 and not name.startswith("embed.")
        weights += (math.prod(shape) * (1 if linear else dtype.itemsize)
                    + (4 * shape[0] if linear else 0))
        if linear:  # prefill makes fp32 of one at a time, and then 16 bits
            widened = max(widened, math.prod(shape) * (4 + dtype.itemsize))
    in_chunks = min(PREFILL_CHUNK, max_seq_length) * widest * dtype.itemsize
    return {"weights": weights, **cache.gpu_bytes(),
            "activations": in_chunks + between + sampling + widened, "runtime": RUNTIME_BYTES}


def most(fits, low, high):
    """The largest number in [low, high) that fits; low does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_memory(free, config, batch, max_seq_length, dtype, ds=None, cache_type=KVCache,
                 quantize=None, of="GPU"):
    """Raises ValueError, naming what would fit, if `free` bytes of GPU memory, or of what `of`
    says, are too few for memory_need's total."""
    def total(batch, length):
        return sum(memory_need(config, batch, length, dtype, ds, cache_type, quantize).values())

    need = memory_need(config, batch, max_seq_length, dtype, ds, cache_type, quantize)
    if sum(need.values()) <= free:
        return
    parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in need.items())
    if total(1, 1) > free:
        remedy = "no batch of this model fits"
    else:
        options = []
        if total(batch, 1) <= free:
            options.append(
                "--max_seq_length "
                f"{most(lambda length: total(batch, length) <= free, 1, max_seq_length)}")
        if batch > 1 and total(1, max_seq_length) <= free:
            options.append("a batch of "
                           f"{most(lambda rows: total(rows, max_seq_length) <= free, 1, batch)}")
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


def load_model(checkpoint, device, dtype, quantize=None):
    """Checkpoint directory of ours -> Transformer in eval mode. quantize: "int8" for the weights of
    linear layers as Transformer.quantize has them. Raises ValueError naming what is wrong."""
    checkpoint = Path(checkpoint)
    config = ModelConfig.from_file(checkpoint / "config.json")
    with torch.device("meta"):
        model = Transformer(config)
    path = checkpoint / "model.safetensors"
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with open_tensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wrong = ([name for name in expected if found.get(name) != tuple(expected[name])]
                 + sorted(set(found) - set(expected)))
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} tensors missing, unexpected or of another "
                             f"shape than config.json says, first {wrong[0]}; "
                             "convert the model again with convert_hf.py")
        if quantize:
            model.requires_grad_(False).quantize()
        ours, tensors = model.state_dict(), {}
        for name in expected:
            tensors[name] = file.get_tensor(name).to(device, dtype)
            if not tensors[name].isfinite().all():
                raise ValueError(f"{path}: {name} has weights that are infinite or not a number")
            scale = name.removesuffix("weight") + "scale"
            if scale in ours:
                tensors[name], tensors[scale] = quantized(tensors[name])
        model.load_state_dict(tensors, assign=True)
    return model.to(device).eval().requires_grad_(False)


MAP_TENSORS = ("channels", "mean", "std")  # of channels.safetensors


def load_label_maps(checkpoint, config, ds, path=None):
    """A checkpoint's channels.safetensors, or file `path` -> one LabelMap per layer, fit for `ds`.

    Raises ValueError when the file is absent, of an older form, or belongs to another model.
    """
    path = Path(path or Path(checkpoint) / "channels.safetensors")
    with open_tensors(path) as file:
        provenance = file.metadata() or {}
        model_hash = fingerprint(Path(checkpoint) / "model.safetensors")
        if provenance.get("checkpoint") != model_hash:
            raise ValueError(f"{path}: calibrated for checkpoint {provenance.get('checkpoint')}, "
                             f"this one is {model_hash}; "
                             f"run calibrate.py --checkpoint {checkpoint}")
        if "channels" not in file.keys():
            raise ValueError(f"{path}: holds label maps of an older form; "
                             f"run calibrate.py --checkpoint {checkpoint}")
        shape, D = file.get_slice("channels").get_shape(), config.head_dim
        if shape != [config.n_layers, config.n_kv_heads, D]:
            raise ValueError(f"{path}: made for {shape} layers, KV heads, head_dim; the model has "
                             f"{config.n_layers}, {config.n_kv_heads}, {D}; "
                             f"run calibrate.py --checkpoint {checkpoint}")
        tensors = {name: file.get_tensor(name)[..., : ds.channels(D)] for name in MAP_TENSORS
                   if name in file.keys() and file.get_slice(name).get_shape() == shape}
        channels = tensors.get("channels", torch.tensor(-1))
        if len(tensors) < 3 or channels.min() < 0 or channels.max() >= D or not all(
                tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path}: its label maps are damaged; "
                             f"run calibrate.py --checkpoint {checkpoint}")
    return [LabelMap.from_statistics(*of_layer, ds.widths(D))
            for of_layer in zip(*tensors.values())]
