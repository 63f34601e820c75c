"""A model's shape, read from the config.json of a published checkpoint.

Llama 1/2/3, SmolLM, Vicuna, Mistral, Mixtral, Qwen2/2.5 and Qwen3: what transformers would make of
the file, or an error that names the key.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

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
    ranks: int = 1  # processes that share a model; heads and ffn_dim are of one (parallel.share)

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
            frequencies = rope_frequencies(config)
            if not ((0 < frequencies) & (frequencies < math.inf)).all():
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
