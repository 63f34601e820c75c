"""GGUF files, ggml's format, as convert_hf.py takes them: what Hugging Face would have instead.

unpack_gguf writes the small files of a Hugging Face directory (config, tokenizer, chat template)
and returns the tensors by Hugging Face's names; they stay in the file and are dequantised some rows
at a time, as they are written. Parsing and dequantising are the package gguf's.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from config import ModelConfig
from tokenizer import CONTROL, USER_DEFINED, sentencepiece_bpe

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight"}
GGUF_LAYER_NAMES = {  # blk.N. and these: model.layers.N. and those; {} is the expert
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3"}
# How a byte-level tokenizer cuts text into words before it merges, by tokenizer.ggml.pre.
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2, _LLAMA3 = (
    [Split(Regex(_SPLIT.replace("DIGITS", digits)), "isolated"), ByteLevel(False, use_regex=False)]
    for digits in ("", "{1,3}"))
GGUF_SPLITS = {
    "gpt-2": [ByteLevel(False)], "smollm": [Digits(individual_digits=True), ByteLevel(False)],
    "qwen2": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}


@dataclass
class GGUFTensor:
    """A memory-mapped tensor of a GGUF file, in place of a torch.Tensor."""

    data: np.ndarray  # [rows, what a row takes]
    kind: int  # the quantisation's number
    dequantize: Callable  # of some rows and `kind`
    shape: tuple[int, ...]
    order: np.ndarray  # which of its rows is Hugging Face's first, second, ...
    dtype = torch.float32

    def chunks(self, size: int) -> Iterable[torch.Tensor]:
        """The elements in order, dequantised about `size` at a time."""
        n_rows = max(1, size // self.shape[-1])
        for start in range(0, len(self.order), n_rows):
            rows = self.data[self.order[start : start + n_rows]]
            yield torch.from_numpy(np.array(self.dequantize(rows, self.kind))).reshape(-1)


class _Metadata(dict):
    """A GGUF file's metadata, without the prefixes ARCHITECTURE, tokenizer.ggml and tokenizer."""

    def __missing__(self, key):
        raise ValueError(f"*.{key} is missing from its metadata")

    def token_id(self, name: str) -> int | None:
        """Of a special token; files of the SentencePiece kind may leave out the usual ones."""
        usual = {"unknown": 0, "bos": 1, "eos": 2} if self["model"] == "llama" else {}
        found = self.get(f"{name}_token_id", usual.get(name))
        return found if found is not None and 0 <= found < len(self["tokens"]) else None


def open_gguf(path: Path) -> tuple[_Metadata, dict]:
    """A GGUF file's metadata, and {name: tensor of the package gguf}."""
    try:
        import gguf
    except ImportError:
        raise ValueError("GGUF files need one more package: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs, fields):
            for field in fields:  # the package's own message does not name the tensor
                kind = field.parts[4][0]
                if kind not in list(gguf.GGMLQuantizationType):
                    raise ValueError(f"{field.name}: quantisation {kind}, unknown to this gguf")
            super()._build_tensors(start_offs, fields)

    if not path.is_file():
        raise ValueError("no such file")
    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError) as error:
        raise ValueError(f"cannot be read: truncated, or not a GGUF file? ({error})") from None
    if fields.get("split.count", 1) > 1:
        part, parts = fields["split.no"] + 1, fields["split.count"]
        raise ValueError(f"part {part} of {parts}: join them first, with llama.cpp's"
                         " llama-gguf-split --merge FIRST_PART OUT.gguf")
    kind, architecture = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind != "model" or architecture not in GGUF_ARCHITECTURES:
        raise ValueError(f"a {kind} of architecture {architecture}: must be a model, of one of "
                         f"{', '.join(GGUF_ARCHITECTURES)}")
    if reader.byte_order != "I":
        raise ValueError("written in the other byte order")
    prefixes = re.compile(rf"^({architecture}|tokenizer\.ggml|tokenizer)\.")
    metadata = _Metadata((prefixes.sub("", name), value) for name, value in fields.items())
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def unpack_gguf(path: Path, made: Path) -> dict[str, GGUFTensor]:
    """Writes the small files of a Hugging Face directory to `made`; returns its tensors by name.
    Raises ValueError, naming the file, for one that is not a model that we know."""
    try:
        metadata, tensors = open_gguf(path)
        config = gguf_config(metadata, tensors)
        head_dim = ModelConfig.from_dict(config).head_dim
        (made / "config.json").write_text(json.dumps(config, indent=2))
        write_gguf_tokenizer(metadata, made)
        tensors.pop("rope_freqs.weight", None)  # config.json has it
        interleaved = head_dim if metadata["general.architecture"] == "llama" else None
        return {name: found for tensor in tensors.values()
                for name, found in _gguf_tensors(tensor, interleaved)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path}: metadata of the wrong kind ({error!r})") from None


def gguf_config(metadata: _Metadata, tensors: dict) -> dict:
    """The config.json that Hugging Face would have for a GGUF file."""
    experts, heads = metadata.get("expert_count", 0), metadata["attention.head_count"]
    name = GGUF_ARCHITECTURES[metadata["general.architecture"]]
    rotary = metadata.get("rope.dimension_count")
    head_dim = metadata.get("attention.key_length", rotary)
    if rotary not in (None, head_dim):
        raise ValueError(f"RoPE over {rotary} of {head_dim} channels: must be over all of them")
    if experts:
        name = "MixtralForCausalLM"
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    ends = [metadata.token_id(end) for end in ("eos", "eot", "eom")]
    config = {
        "architectures": [name], "model_type": name.removesuffix("ForCausalLM").lower(),
        "hidden_size": metadata["embedding_length"], "head_dim": head_dim,
        "intermediate_size": metadata["feed_forward_length"],
        "num_hidden_layers": metadata["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "max_position_embeddings": metadata["context_length"],
        "rms_norm_eps": metadata["attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "vocab_size": metadata.get("vocab_size", len(metadata["tokens"])),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": [end for end in ends if end is not None],
        "dtype": {("F16",): "float16", ("BF16",): "bfloat16"}.get(tuple(kinds), "float32")}
    if experts:
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = metadata["expert_used_count"]
    scaling = metadata.get("rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise ValueError(f"rope scaling {scaling}: must be linear, or factors in rope_freqs")
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0
    factor = factor if scaling == "linear" else 1.0
    if "rope_freqs.weight" in tensors:
        factors = (tensors["rope_freqs.weight"].data * factor).tolist()
        config["rope_scaling"] = {"rope_type": "factors", "factors": factors}
    elif factor != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config


def _gguf_tensors(tensor, interleaved: int | None) -> Iterable[tuple[str, GGUFTensor]]:
    """What Hugging Face has for a GGUF tensor: it, or one for each expert.

    interleaved: the head_dim, where the rows of a head's q and k lie in pairs as RoPE turns them.
    """
    from gguf import dequantize

    name, data = GGUF_NAMES.get(tensor.name, tensor.name), tensor.data
    shape, kind = tuple(reversed(tensor.shape.tolist())), tensor.tensor_type
    try:
        dequantize(data.reshape(-1, data.shape[-1])[:1], kind)
    except NotImplementedError:
        raise ValueError(f"{tensor.name}: quantisation {kind.name}, unknown to this gguf") from None
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.(weight|bias)", tensor.name):
        layer, part, expert, suffix = match.groups()
        if part := GGUF_LAYER_NAMES.get(part if expert is None else f"{part}_exps"):
            name = f"model.layers.{layer}.{part}.{suffix}".replace("{}", expert or "{}")

    pieces = {name: data}
    if "{}" in name:
        pieces = {name.replace("{}", str(e)): piece for e, piece in enumerate(data)}
        shape = shape[1:]
    order = np.arange(math.prod(shape[:-1]))
    if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
        order = order.reshape(-1, interleaved // 2, 2).swapaxes(1, 2).reshape(-1)
    for name, piece in pieces.items():
        yield name, GGUFTensor(piece.reshape(len(order), -1), kind, dequantize, shape, order)


def write_gguf_tokenizer(metadata: _Metadata, made: Path) -> None:
    """Writes tokenizer.json and what goes with it."""
    model, tokens, types = metadata["model"], metadata["tokens"], metadata["token_type"]
    split = GGUF_SPLITS.get(metadata["pre"]) if model == "gpt2" else None
    if model == "llama":
        pieces = zip(tokens, metadata["scores"], types, strict=True)
        tokenizer = sentencepiece_bpe(pieces, metadata.get("add_space_prefix", True))
    elif model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model={model}: must be gpt2 (byte-level BPE) or llama "
                         "(SentencePiece)")
    elif split is None:
        raise ValueError(f"tokenizer.ggml.pre={metadata['pre']}: must be one of "
                         f"{', '.join(GGUF_SPLITS)}")
    else:
        tokenizer = _byte_level_bpe(tokens, metadata["merges"], split)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)
                          for token, kind in zip(tokens, types, strict=True)
                          if kind in (CONTROL, USER_DEFINED)])

    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[i] for key, name in ids.items()
               if (i := metadata.token_id(name)) is not None}
    bos = special.get("bos_token")
    if bos is not None and metadata.get("add_bos_token", model == "llama" or split is _LLAMA3):
        tokenizer.post_processor = processors.TemplateProcessing(
            [bos, "$A"], special_tokens=[(bos, metadata.token_id("bos"))])
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps(special, indent=2))
    if "chat_template" in metadata:
        (made / "chat_template.jinja").write_text(metadata["chat_template"], encoding="utf-8")


def _byte_level_bpe(tokens: list, merges: list, split: list) -> Tokenizer:
    """The tokenizer of these tokens and merges ("a b" each), for text cut into words by `split`."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise ValueError("its tokens and merges are not a tokenizer's (they have no "
                             f"{' + '.join(pair)})")
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split is _LLAMA3))
    if split is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
