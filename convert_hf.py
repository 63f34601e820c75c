"""Converts a checkpoint (Llama, Mistral, Mixtral, Qwen2, Qwen3) to ours: a model.safetensors with
fused tensors.

Usage:
    python convert_hf.py /models/Llama-2-7b-hf checkpoints/llama-2-7b
    python convert_hf.py mistralai/Mistral-7B-v0.1 checkpoints/mistral-7b --dtype bfloat16
    python convert_hf.py SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2

q, k, v (and gate, up) become consecutive row ranges of one tensor, so nothing is concatenated: the output's header is
written first, then each source tensor goes to its own place in the file. Host memory stays near one source shard.
RoPE stays in Hugging Face's half-split order: weights are copied, never permuted. A GGUF file is
taken as what Hugging Face would have for it, and dequantised some rows at a time.
"""

import errno
import json
import math
import pickle
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from huggingface_hub import snapshot_download
# HTTPError is the base of whichever HTTP client this version of huggingface_hub uses: a download that broke off.
from huggingface_hub.errors import (
    GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tqdm import tqdm

from model import (
    ArgumentParser, ModelConfig, ignored_keys, open_tensors, parameter_shapes, read_json, run_command
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
COPIED_FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 2**20  # elements cast and written at a time

GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
GGUF_NAMES = {
    "token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD}
GGUF_LAYER_NAMES = {  # blk.N. and these: model.layers.N. and those; {} is the expert
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3"}
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of tokens, numbered as in SentencePiece
# How a byte-level tokenizer cuts text into words before it merges, by tokenizer.ggml.pre.
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2, _LLAMA3 = (
    [Split(Regex(_SPLIT.replace("DIGITS", digits)), "isolated"), ByteLevel(False, use_regex=False)]
    for digits in ("", "{1,3}"))
GGUF_SPLITS = {
    "gpt-2": [ByteLevel(False)], "smollm": [Digits(individual_digits=True), ByteLevel(False)],
    "qwen2": _QWEN2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}


def hf_dir_of(source: str | Path, patterns: list[str]) -> Path:
    """The directory that `source` names, or the hub's snapshot of it with the files that match `patterns`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{source}: no such directory, and not a hub id (owner/name)") from None
    except GatedRepoError:
        raise ValueError(f"{source}: gated: accept its terms at https://huggingface.co/{source}, then run"
                         " `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{source}: neither a local directory nor a hub repository that you can see: check the name,"
                         " or run `hf auth login` if it is private") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise ValueError(f"{source}: no such directory, and the Hugging Face hub cannot be reached: give a local"
                         f" directory, or try again online ({type(error).__name__})") from None


def weight_files(hf_dir: Path) -> list[Path]:
    """The files that hold the weights, safetensors before .bin. Raises ValueError when none or not all are there."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (hf_dir / single).is_file():
            return [hf_dir / single]
        index = hf_dir / f"{single}.index.json"
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a weight index ({error!r}): download it again") from None
        if absent := [shard for shard in shards if not (hf_dir / shard).is_file()]:
            raise ValueError(f"{hf_dir}: {_listed('missing weight files', absent)}: download them again")
        return [hf_dir / shard for shard in shards]
    raise ValueError(f"{hf_dir}: no model.safetensors or pytorch_model.bin, whole or sharded with an index")


def open_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file, memory-mapped: what is not used is not read, and it is let go with the dict."""
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and are read whole
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError,  # a truncated or foreign file
            AttributeError, LookupError, TypeError, ValueError) as error:  # flipped bits, in torch's own unpickler
        cause = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path}: cannot be read: truncated, or not a weight file? ({cause})") from None
    if not isinstance(shard, dict) or not all(isinstance(value, torch.Tensor) for value in shard.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    return shard


@dataclass
class GGUFTensor:
    """A memory-mapped tensor of a GGUF file, in place of a torch.Tensor."""

    data: np.ndarray  # [rows, what a row takes]
    kind: int  # the quantisation's number
    dequantize: Callable  # of some rows and `kind`
    shape: tuple[int, ...]
    order: np.ndarray  # which of its rows is Hugging Face's first, second, ...
    dtype = torch.float32

    def chunks(self) -> Iterable[torch.Tensor]:
        """The elements in order, dequantised some CHUNK at a time."""
        n_rows = max(1, CHUNK // self.shape[-1])
        for start in range(0, len(self.order), n_rows):
            rows = self.data[self.order[start : start + n_rows]]
            yield torch.from_numpy(np.array(self.dequantize(rows, self.kind))).reshape(-1)


class _Metadata(dict):
    """A GGUF file's metadata, without the prefixes ARCHITECTURE, tokenizer.ggml and tokenizer."""

    def __missing__(self, key):
        raise ValueError(f"{key} is missing from its metadata")

    def token_id(self, name: str) -> int | None:
        """Of a special token; files of the SentencePiece kind may leave out the usual ones."""
        usual = {"unknown": 0, "bos": 1, "eos": 2} if self["model"] == "llama" else {}
        found = self.get(f"{name}_token_id", usual.get(name))
        return found if found is not None and found < len(self["tokens"]) else None


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
    """Writes the small files of a Hugging Face directory to `made`; returns its tensors by name."""
    metadata, tensors = open_gguf(path)
    config = gguf_config(metadata, tensors)
    head_dim = ModelConfig.from_dict(config).head_dim
    (made / "config.json").write_text(json.dumps(config, indent=2))
    write_gguf_tokenizer(metadata, made)
    tensors.pop("rope_freqs.weight", None)  # config.json has it
    interleaved = head_dim if metadata["general.architecture"] == "llama" else None
    return {name: found for tensor in tensors.values()
            for name, found in _gguf_tensors(tensor, interleaved)}


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
    """Writes tokenizer.json, or tokenizer.model for SentencePiece, and what goes with it."""
    model, tokens, types = metadata["model"], metadata["tokens"], metadata["token_type"]
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[i] for key, name in ids.items()
               if (i := metadata.token_id(name)) is not None}
    split = GGUF_SPLITS.get(metadata["pre"]) if model == "gpt2" else None
    add_bos = metadata.get("add_bos_token", model == "llama" or split is _LLAMA3)
    add_bos = add_bos and "bos_token" in special
    settings = special | {"add_bos_token": add_bos}
    if model == "llama":
        pieces = list(zip(tokens, metadata["scores"], types, strict=True))
        (made / "tokenizer.model").write_bytes(_sentencepiece_model(pieces))
        settings["added_tokens_decoder"] = {
            i: {"content": token, "normalized": False, "special": kind == CONTROL}
            for i, (token, _, kind) in enumerate(pieces) if kind in (CONTROL, USER_DEFINED)}
        if not metadata.get("add_space_prefix", True):
            settings |= {"add_prefix_space": False, "legacy": False}
    elif model == "gpt2":
        if split is None:
            raise ValueError(f"tokenizer.ggml.pre={metadata['pre']}: must be one of "
                             f"{', '.join(GGUF_SPLITS)}")
        tokenizer = _byte_level_tokenizer(tokens, types, metadata["merges"], split)
        if add_bos:
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                [bos, "$A"], special_tokens=[(bos, metadata.token_id("bos"))])
        tokenizer.save(str(made / "tokenizer.json"))
    else:
        raise ValueError(f"tokenizer.ggml.model={model}: must be gpt2 (byte-level BPE) or llama "
                         "(SentencePiece)")
    (made / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    if "chat_template" in metadata:
        (made / "chat_template.jinja").write_text(metadata["chat_template"], encoding="utf-8")


def _byte_level_tokenizer(tokens: list, types: list, merges: list, split: list) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges],
                                         ignore_merges=split is _LLAMA3))
    except Exception as error:  # of no narrower class
        raise ValueError(f"its tokens and merges are not a tokenizer's ({error})") from None
    if split is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)
                          for token, kind in zip(tokens, types, strict=True)
                          if kind in (CONTROL, USER_DEFINED)])
    return tokenizer


def _sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """A SentencePiece ModelProto of BPE in protobuf's wire format. pieces: token, score, type."""
    def varint(value):
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    def number(field, value):
        return varint(field << 3) + varint(value)

    def message(field, content):
        return varint(field << 3 | 2) + varint(len(content)) + content

    def piece(token, score, kind):
        return message(1, token.encode()) + struct.pack("<Bf", 2 << 3 | 5, score) + number(3, kind)

    byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    trainer = number(3, 2) + number(4, len(pieces)) + number(35, byte_fallback)  # 2: BPE
    # its name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = message(1, b"identity") + number(3, 1) + number(4, 0) + number(5, 1)
    proto = b"".join(message(1, piece(*each)) for each in pieces)
    proto += message(2, trainer) + message(3, normalizer)
    try:
        sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise ValueError(f"its tokens are not a SentencePiece tokenizer's ({error})") from None
    return proto


def hf_pieces(config: ModelConfig, fused_experts: bool) -> dict[str, dict[str, tuple[int, ...]]]:
    """{our name: {Hugging Face name: shape}}: the pieces that, one after the other, are the bytes of our tensor.

    `fused_experts`: Mixtral as transformers 5 holds it, all experts in one tensor, instead of as it is on the hub.
    """
    dim, ffn, E = config.dim, config.ffn_dim, config.n_experts
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    pieces = {"embed.weight": {EMBEDDING: (config.vocab_size, dim)}}
    for i in range(config.n_layers):
        ours, hf = f"layers.{i}", f"model.layers.{i}"
        pieces[f"{ours}.attn_norm.weight"] = {f"{hf}.input_layernorm.weight": (dim,)}
        pieces[f"{ours}.attn.wqkv.weight"] = {f"{hf}.self_attn.q_proj.weight": (q_rows, dim),
                                              f"{hf}.self_attn.k_proj.weight": (kv_rows, dim),
                                              f"{hf}.self_attn.v_proj.weight": (kv_rows, dim)}
        if config.qkv_bias:
            pieces[f"{ours}.attn.wqkv.bias"] = {f"{hf}.self_attn.q_proj.bias": (q_rows,),
                                                f"{hf}.self_attn.k_proj.bias": (kv_rows,),
                                                f"{hf}.self_attn.v_proj.bias": (kv_rows,)}
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                pieces[f"{ours}.attn.{norm}.weight"] = {f"{hf}.self_attn.{norm}.weight": (config.head_dim,)}
        pieces[f"{ours}.attn.wo.weight"] = {f"{hf}.self_attn.o_proj.weight": (dim, q_rows)}
        pieces[f"{ours}.ffn_norm.weight"] = {f"{hf}.post_attention_layernorm.weight": (dim,)}
        if E == 0:
            pieces[f"{ours}.ffn.w13.weight"] = {f"{hf}.mlp.gate_proj.weight": (ffn, dim),
                                                f"{hf}.mlp.up_proj.weight": (ffn, dim)}
            pieces[f"{ours}.ffn.w2.weight"] = {f"{hf}.mlp.down_proj.weight": (dim, ffn)}
        elif fused_experts:
            pieces[f"{ours}.ffn.router.weight"] = {f"{hf}.mlp.gate.weight": (E, dim)}
            pieces[f"{ours}.ffn.w13"] = {f"{hf}.mlp.experts.gate_up_proj": (E, 2 * ffn, dim)}
            pieces[f"{ours}.ffn.w2"] = {f"{hf}.mlp.experts.down_proj": (E, dim, ffn)}
        else:
            moe = f"{hf}.block_sparse_moe"
            pieces[f"{ours}.ffn.router.weight"] = {f"{moe}.gate.weight": (E, dim)}
            pieces[f"{ours}.ffn.w13"] = {f"{moe}.experts.{e}.{w}.weight": (ffn, dim)
                                         for e in range(E) for w in ("w1", "w3")}
            pieces[f"{ours}.ffn.w2"] = {f"{moe}.experts.{e}.w2.weight": (dim, ffn) for e in range(E)}
    pieces["norm.weight"] = {"model.norm.weight": (dim,)}
    if not config.tie_embeddings:
        pieces["head.weight"] = {HEAD: (config.vocab_size, dim)}
    return pieces


def check_tensors(found: dict, wanted: dict, config: ModelConfig, source: str | Path) -> None:
    """Raises ValueError unless what is `found`, {name: (shape, dtype)}, is what is `wanted`, {name: shape}."""
    harmless = {HEAD} if config.tie_embeddings else set()
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and name not in harmless
             and not name.endswith("rotary_emb.inv_freq")]
    wrong_shape, wrong_dtype = [], []
    for name in wanted.keys() & found.keys():
        shape, dtype = found[name]
        if shape != wanted[name]:
            wrong_shape.append(f"{name} {list(shape)}, not {list(wanted[name])}")
        if dtype not in DTYPES.values():
            wrong_dtype.append(f"{name} {dtype}")
    problems = {"missing": missing, "unexpected": extra, "of another shape": wrong_shape,
                "not in float32, bfloat16 or float16": wrong_dtype}
    if any(problems.values()):
        parts = [_listed(f"tensors {problem}", names) for problem, names in problems.items() if names]
        raise ValueError(f"{source}: the weights are not what config.json says: {'; '.join(parts)}")


def _listed(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"


def output_dtype(dtype: str, hf_config: dict, first_weight: torch.dtype) -> torch.dtype:
    """`dtype` by name; "auto" is the one that the Hugging Face config names, or else the first weight's."""
    named = hf_config.get("dtype") or hf_config.get("torch_dtype")  # transformers 5, and before
    return DTYPES.get(named, first_weight) if dtype == "auto" else DTYPES[dtype]


def file_layout(shapes: dict, pieces: dict, dtype: torch.dtype, source: str) -> tuple[bytes, dict[str, int], int]:
    """The output's leading bytes (safetensors header), {Hugging Face name: byte offset in the file}, and its size."""
    assert shapes.keys() == pieces.keys(), f"model and converter disagree on {shapes.keys() ^ pieces.keys()}"
    header = {"__metadata__": {"format": "double-sparsity", "source": source}}
    offsets, end = {}, 0  # relative to the data's start
    for name, shape in shapes.items():
        begin = end
        for hf_name, piece in pieces[name].items():
            offsets[hf_name] = end
            end += math.prod(piece) * dtype.itemsize
        assert end - begin == math.prod(shape) * dtype.itemsize, f"{name}: pieces do not add up to {list(shape)}"
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + offset for name, offset in offsets.items()}, start + end


def _chunks(tensor: torch.Tensor | GGUFTensor) -> Iterable[torch.Tensor]:
    """A tensor's elements in order, some CHUNK at a time."""
    return tensor.chunks() if isinstance(tensor, GGUFTensor) else tensor.reshape(-1).split(CHUNK)


def write_weights(path: Path, layout: tuple, shards: list[Callable], dtype: torch.dtype) -> None:
    """Writes model.safetensors. `layout` as from file_layout; raises ValueError if a cast to `dtype` overflows."""
    header, offsets, n_bytes = layout
    with open(path, "wb") as file, tqdm(total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        bar.update(file.write(header))
        for shard in shards:
            _write_shard(file, offsets, shard(), dtype, bar)


def _write_shard(file, offsets: dict[str, int], shard: dict, dtype: torch.dtype, bar: tqdm) -> None:
    for name in sorted(shard.keys() & offsets.keys(), key=offsets.get):
        file.seek(offsets[name])
        for chunk in _chunks(shard[name]):
            cast = chunk.to(dtype)
            if cast.dtype != chunk.dtype and not cast.isfinite().all():
                raise ValueError(f"{name}: not finite as {dtype}: use --dtype bfloat16 or float32")
            bar.update(file.write(cast.view(torch.uint8).numpy()))


def refuse_adapter(source: str | Path, hf_dir: Path) -> None:
    """Raises ValueError for a directory with an adapter (LoRA): it would be left out silently."""
    path = hf_dir / "adapter_config.json"
    if not path.is_file():
        return
    content = read_json(path)
    base = content.get("base_model_name_or_path")
    what = f"an adapter ({content.get('peft_type')}) of {base}"
    merge = "merge it with peft's merge_and_unload and convert what that saves"
    if (hf_dir / "config.json").is_file():
        raise ValueError(f"{path}: {what} lies beside the model: {merge}, or move it away")
    raise ValueError(f"{source}: {what}, not a model: {merge}")


def convert(source: str | Path, out_dir: str | Path, dtype: str = "auto") -> Path:
    """Converts a Hugging Face directory, a hub id or a GGUF file to our checkpoint directory.

    dtype: "auto" (the source's; float32 for a GGUF file with quantised tensors), "float32",
    "bfloat16" or "float16". Everything is checked before a byte is written; the output appears
    whole or not at all. Returns the directory. Raises ValueError for a source that is not what its
    config says and for an `out_dir` in use, OSError for a full disk.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be auto, {', '.join(DTYPES)}")
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: exists and is not an empty directory: remove it, or choose another")

    if Path(source).suffix == ".gguf" or Path(source).is_file():
        with tempfile.TemporaryDirectory() as made:
            try:
                tensors = unpack_gguf(Path(source), Path(made))
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            return _convert(source, Path(made), [lambda: tensors], out_dir, dtype)

    hf_dir = hf_dir_of(source, [*COPIED_FILES, "adapter_config.json"])
    refuse_adapter(source, hf_dir)
    if not (hf_dir / "config.json").is_file():
        raise ValueError(f"{source}: no config.json: not a Hugging Face checkpoint")
    ModelConfig.from_file(hf_dir / "config.json")  # before the weights are downloaded
    if ignored := ignored_keys(read_json(hf_dir / "config.json")):
        print(f"{source}: config.json has keys that change nothing here: {', '.join(ignored)}", file=sys.stderr)
    hf_dir = hf_dir_of(source, COPIED_FILES + ["model*.safetensors", "model.safetensors.index.json"])
    if not any(hf_dir.glob("model*.safetensors")):
        hf_dir = hf_dir_of(source, COPIED_FILES + ["pytorch_model*.bin", "pytorch_model.bin.index.json"])
    shards = [partial(open_shard, path) for path in weight_files(hf_dir)]
    return _convert(source, hf_dir, shards, out_dir, dtype)


def _convert(
    source: str | Path, hf_dir: Path, shards: list[Callable], out_dir: Path, dtype: str
) -> Path:
    """hf_dir: all but the weights; shards: calling each gives {Hugging Face name: tensor}."""
    content = read_json(hf_dir / "config.json")
    config = ModelConfig.from_file(hf_dir / "config.json")
    found, tied = {}, {}
    for shard in shards:
        for name, tensor in shard().items():
            found[name] = (tuple(tensor.shape), tensor.dtype)
            if config.tie_embeddings and name in (EMBEDDING, HEAD):
                tied[name] = tensor
    if len(tied) == 2 and not _equal(*tied.values()):  # then the head counts, as in transformers 5
        content["tie_word_embeddings"] = False
        config = replace(config, tie_embeddings=False)
    fused_experts = any(name.endswith("mlp.experts.gate_up_proj") for name in found)
    pieces = hf_pieces(config, fused_experts)
    if list(tied) == [HEAD]:  # one of the two is enough
        pieces["embed.weight"] = {HEAD: pieces["embed.weight"][EMBEDDING]}
    wanted = {hf_name: shape for parts in pieces.values() for hf_name, shape in parts.items()}
    check_tensors(found, wanted, config, source)

    out_dtype = output_dtype(dtype, content, found[next(iter(wanted))][1])
    label = Path(source).resolve().name if Path(source).exists() else str(source)
    layout = file_layout(parameter_shapes(config), pieces, out_dtype, label)
    copied = [hf_dir / name for name in COPIED_FILES if (hf_dir / name).is_file()]
    n_bytes = layout[-1] + sum(path.stat().st_size for path in copied)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out_dir.parent).free
    if n_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"needs {n_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are free", str(out_dir))
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
        built = Path(scratch) / out_dir.name  # one deeper: the scratch directory itself is closed to other users
        built.mkdir()
        for path in copied:
            shutil.copyfile(path, built / path.name)
        if content != read_json(built / "config.json"):
            (built / "config.json").write_text(json.dumps(content, indent=2))
        write_weights(built / "model.safetensors", layout, shards, out_dtype)
        built.rename(out_dir)
    return out_dir


def _equal(a: torch.Tensor | GGUFTensor, b: torch.Tensor | GGUFTensor) -> bool:
    pairs = zip(_chunks(a), _chunks(b))
    return a.shape == b.shape and all(torch.equal(x, y.to(x.dtype)) for x, y in pairs)


def main() -> None:
    parser = ArgumentParser(
        description="Converts a Hugging Face checkpoint or a GGUF file to ours.")
    parser.add_argument("source", metavar="HF_DIR_OR_HUB_ID_OR_GGUF",
                        help="a local directory, a hub id such as owner/name, or a .gguf file")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="the directory to make; must be absent or empty")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="of the output; auto: as the source's config says, or float32 for a"
                        " GGUF file with quantised tensors, since it alone holds their values:"
                        " bfloat16 takes half (default: %(default)s)")
    args = parser.parse_args()
    print(f"wrote {convert(args.source, args.out_dir, args.dtype)}")


if __name__ == "__main__":
    run_command(main)
