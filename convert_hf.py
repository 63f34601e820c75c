"""Converts a checkpoint (Llama, Mistral, Mixtral, Qwen2, Qwen3) to ours: a model.safetensors with
fused tensors.

Usage:
    python convert_hf.py /models/Llama-2-7b-hf checkpoints/llama-2-7b
    python convert_hf.py mistralai/Mistral-7B-v0.1 checkpoints/mistral-7b --dtype bfloat16
    python convert_hf.py SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2

q, k, v (and gate, up) become consecutive row ranges of one tensor, so nothing is concatenated: the
output's header is written first, then each source tensor goes to its own place in the file. Host
memory stays near one source shard. RoPE stays in Hugging Face's half-split order: weights are
copied, never permuted. A GGUF file is taken as what Hugging Face would have for it, and dequantised
some rows at a time.
"""

import errno
import json
import math
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
# HTTPError is a download that broke off, in whichever HTTP client this huggingface_hub uses.
from huggingface_hub.errors import (
    GatedRepoError, HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    RepositoryNotFoundError
)
from tqdm import tqdm

from cli import ArgumentParser, run_command, writing
from config import ModelConfig, ignored_keys, read_json
from convert_gguf import GGUFTensor, unpack_gguf
from model import open_tensors, parameter_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
COPIED_FILES = ["config.json", "generation_config.json", "tokenizer.model", "tokenizer.json",
                "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                "chat_template.jinja"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CHUNK = 2**20  # elements cast and written at a time


def hf_dir_of(source, patterns):
    """The directory `source`, or the hub's snapshot of it with the files that match `patterns`."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{source}: no such directory, and not a hub id (owner/name)") from None
    except GatedRepoError:
        raise ValueError(f"{source}: gated: accept its terms at https://huggingface.co/{source}, "
                         "then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{source}: neither a local directory nor a hub repository that you can "
                         "see: check the name, or run `hf auth login` if it is private") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise ValueError(f"{source}: no such directory, and the Hugging Face hub cannot be "
                         "reached: give a local directory, or try again online "
                         f"({type(error).__name__})") from None


def weight_files(hf_dir):
    """The weights' files, safetensors before .bin. Raises ValueError unless all are there."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (hf_dir / single).is_file():
            return [hf_dir / single]
        index = hf_dir / f"{single}.index.json"
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a weight index ({error!r}): "
                             "download it again") from None
        if absent := [shard for shard in shards if not (hf_dir / shard).is_file()]:
            raise ValueError(f"{hf_dir}: {listed('missing weight files', absent)}: "
                             "download them again")
        return [hf_dir / shard for shard in shards]
    raise ValueError(f"{hf_dir}: no model.safetensors or pytorch_model.bin, whole or sharded "
                     "with an index")


def open_shard(path):
    """A weight file's tensors, memory-mapped: what is unused is not read; let go with the dict."""
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and are read whole
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError,  # a truncated or foreign file
            AttributeError, LookupError, TypeError, ValueError) as error:  # flipped bits, in torch
        cause = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path}: cannot be read: truncated, or not a weight file? "
                         f"({cause})") from None
    if not isinstance(shard, dict) or not all(isinstance(value, torch.Tensor)
                                              for value in shard.values()):
        raise ValueError(f"{path}: not a dict of tensors")
    for name, tensor in shard.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name} is a {'meta' if tensor.is_meta else 'sparse'} "
                             "tensor: save the model again with dense ones")
    return shard


def hf_pieces(config, found):
    """{our name: {Hugging Face name: shape}}: the pieces whose bytes, in turn, are our tensor's.
    found: names of the source's tensors."""
    dim, ffn, E, D = config.dim, config.ffn_dim, config.n_experts, config.head_dim
    qkv_rows = {"q": config.n_heads * D, "k": config.n_kv_heads * D, "v": config.n_kv_heads * D}
    layer = {
        "attn_norm.weight": {"input_layernorm.weight": (dim,)},
        "attn.wqkv.weight": {f"self_attn.{x}_proj.weight": (rows, dim)
                             for x, rows in qkv_rows.items()},
        "attn.wo.weight": {"self_attn.o_proj.weight": (dim, config.n_heads * D)},
        "ffn_norm.weight": {"post_attention_layernorm.weight": (dim,)}}
    if config.qkv_bias:
        layer["attn.wqkv.bias"] = {f"self_attn.{x}_proj.bias": (rows,)
                                   for x, rows in qkv_rows.items()}
    if config.qk_norm:
        for norm in ("q_norm", "k_norm"):
            layer[f"attn.{norm}.weight"] = {f"self_attn.{norm}.weight": (D,)}
    if E == 0:
        layer["ffn.w13.weight"] = {f"mlp.{x}_proj.weight": (ffn, dim) for x in ("gate", "up")}
        layer["ffn.w2.weight"] = {"mlp.down_proj.weight": (dim, ffn)}
    elif any(name.endswith("mlp.experts.gate_up_proj") for name in found):
        # as in transformers 5's memory, all experts in one tensor, not as on the hub
        layer["ffn.router.weight"] = {"mlp.gate.weight": (E, dim)}
        layer["ffn.w13.weight"] = {"mlp.experts.gate_up_proj": (E, 2 * ffn, dim)}
        layer["ffn.w2.weight"] = {"mlp.experts.down_proj": (E, dim, ffn)}
    else:
        expert = "block_sparse_moe.experts.{}.{}.weight".format
        layer["ffn.router.weight"] = {"block_sparse_moe.gate.weight": (E, dim)}
        layer["ffn.w13.weight"] = {expert(e, w): (ffn, dim)
                                   for e in range(E) for w in ("w1", "w3")}
        layer["ffn.w2.weight"] = {expert(e, "w2"): (dim, ffn) for e in range(E)}

    pieces = {"embed.weight": {EMBEDDING: (config.vocab_size, dim)}}
    for i in range(config.n_layers):
        for ours, theirs in layer.items():
            pieces[f"layers.{i}.{ours}"] = {f"model.layers.{i}.{name}": shape
                                            for name, shape in theirs.items()}
    pieces["norm.weight"] = {"model.norm.weight": (dim,)}
    if not config.tie_embeddings:
        pieces["head.weight"] = {HEAD: (config.vocab_size, dim)}
    return pieces


def check_tensors(found, wanted, config, source):
    """Raises ValueError unless `found`, {name: (shape, dtype)}, is as `wanted`, {name: shape}."""
    unused = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    unused |= {HEAD} if config.tie_embeddings else set()
    both = [(name, *found[name]) for name in wanted if name in found]
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys() - unused,
        "of another shape": [f"{name} {list(shape)}, not {list(wanted[name])}"
                             for name, shape, _ in both if shape != wanted[name]],
        "not in float32, bfloat16 or float16": [
            f"{name} {dtype}" for name, _, dtype in both if dtype not in DTYPES.values()]}
    parts = [listed(f"tensors {problem}", names) for problem, names in problems.items() if names]
    if parts:
        raise ValueError(f"{source}: the weights are not what config.json says: {'; '.join(parts)}")


def listed(what, names):
    return (f"{len(names)} {what} ({', '.join(sorted(names)[:3])}"
            f"{', ...' if len(names) > 3 else ''})")


def file_layout(shapes, pieces, dtype, source):
    """The output's header (its first bytes), {Hugging Face name: byte offset}, and its size."""
    assert shapes.keys() == pieces.keys(), (
        f"model and converter disagree on {shapes.keys() ^ pieces.keys()}")
    header = {"__metadata__": {"format": "double-sparsity", "source": source}}
    offsets, end = {}, 0  # relative to the data's start
    for name, shape in shapes.items():
        begin = end
        for hf_name, piece in pieces[name].items():
            offsets[hf_name] = end
            end += math.prod(piece) * dtype.itemsize
        assert end - begin == math.prod(shape) * dtype.itemsize, (
            f"{name}: pieces do not add up to {list(shape)}")
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    start = 8 + len(text)
    return (struct.pack("<Q", len(text)) + text,
            {name: start + offset for name, offset in offsets.items()}, start + end)


def chunks_of(tensor):
    """A tensor's elements in order, some CHUNK at a time."""
    return (tensor.chunks(CHUNK) if isinstance(tensor, GGUFTensor)
            else tensor.reshape(-1).split(CHUNK))


def write_weights(path, layout, shards, dtype):
    """Writes model.safetensors. layout: of file_layout; shards: calling each gives {Hugging Face
    name: tensor}. Raises ValueError if a cast to dtype overflows."""
    header, offsets, n_bytes = layout
    with open(path, "wb") as file, tqdm(total=n_bytes, unit="B", unit_scale=True,
                                        disable=None) as bar:
        bar.update(file.write(header))
        for shard in shards:
            write_shard(file, offsets, shard(), dtype, bar)


def write_shard(file, offsets, shard, dtype, bar):
    for name in sorted(shard.keys() & offsets.keys(), key=offsets.get):
        file.seek(offsets[name])
        for chunk in chunks_of(shard[name]):
            cast = chunk.to(dtype)
            if not cast.isfinite().all():
                if chunk.isfinite().all():
                    raise ValueError(f"{name}: not finite as {dtype}: "
                                     "use --dtype bfloat16 or float32")
                raise ValueError(f"{name}: has weights that are infinite or not a number")
            bar.update(file.write(cast.view(torch.uint8).numpy()))


def refuse_adapter(hf_dir):
    """Raises ValueError for a directory with an adapter (LoRA): it would be left out silently."""
    path = hf_dir / "adapter_config.json"
    if path.is_file():
        content = read_json(path)
        raise ValueError(f"{path}: an adapter ({content.get('peft_type')}) of "
                         f"{content.get('base_model_name_or_path')}, not a model: merge it with "
                         "peft's merge_and_unload and convert what that saves, or move it away")


def convert(source, out_dir, dtype="auto"):
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
        raise ValueError(f"{out_dir}: exists and is not an empty directory: "
                         "remove it, or choose another")

    if not Path(source).is_dir() and (Path(source).suffix == ".gguf" or Path(source).is_file()):
        with tempfile.TemporaryDirectory() as made:
            tensors = unpack_gguf(Path(source), Path(made))
            return convert_shards(source, Path(made), [lambda: tensors], out_dir, dtype)

    hf_dir = hf_dir_of(source, [*COPIED_FILES, "adapter_config.json"])
    refuse_adapter(hf_dir)
    if not (hf_dir / "config.json").is_file():
        raise ValueError(f"{source}: no config.json: not a Hugging Face checkpoint")
    ModelConfig.from_file(hf_dir / "config.json")  # before the weights are downloaded
    if ignored := ignored_keys(read_json(hf_dir / "config.json")):
        print(f"{source}: config.json has keys that change nothing here: {', '.join(ignored)}",
              file=sys.stderr)
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        hf_dir = hf_dir_of(source, [*COPIED_FILES, weights, f"{weights}.index.json"])
        if any(hf_dir.glob(weights)):
            break
    shards = [partial(open_shard, path) for path in weight_files(hf_dir)]
    return convert_shards(source, hf_dir, shards, out_dir, dtype)


def convert_shards(source, hf_dir, shards, out_dir, dtype):
    """As convert, of what a source was made to be. hf_dir: all but the weights; shards: as for
    write_weights."""
    content = read_json(hf_dir / "config.json")
    config = ModelConfig.from_file(hf_dir / "config.json")
    found, tied = {}, {}
    for shard in shards:
        for name, tensor in shard().items():
            found[name] = (tuple(tensor.shape), tensor.dtype)
            if config.tie_embeddings and name in (EMBEDDING, HEAD):
                tied[name] = tensor
    if len(tied) == 2 and not equal(*tied.values()):  # then the head counts, as in transformers 5
        content["tie_word_embeddings"] = False
        config = replace(config, tie_embeddings=False)
    if config.n_layers > len(found):  # said before layers without end are listed
        raise ValueError(f"{source}: the weights are not what config.json says: {len(found)} "
                         f"tensors for {config.n_layers} layers")
    pieces = hf_pieces(config, found)
    if list(tied) == [HEAD]:  # one of the two is enough
        pieces["embed.weight"] = {HEAD: pieces["embed.weight"][EMBEDDING]}
    wanted = {hf_name: shape for parts in pieces.values() for hf_name, shape in parts.items()}
    check_tensors(found, wanted, config, source)

    named = content.get("dtype") or content.get("torch_dtype")  # transformers 5, and before
    first_weight = found[next(iter(wanted))][1]
    out_dtype = DTYPES.get(named, first_weight) if dtype == "auto" else DTYPES[dtype]
    label = Path(source).resolve().name if Path(source).exists() else str(source)
    layout = file_layout(parameter_shapes(config), pieces, out_dtype, label)
    copied = [hf_dir / name for name in COPIED_FILES if (hf_dir / name).is_file()]
    n_bytes = layout[-1] + sum(path.stat().st_size for path in copied)

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(out_dir.parent).free
    if n_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"needs {n_bytes / 1e9:.2f} GB, "
                      f"{free_bytes / 1e9:.2f} GB are free", str(out_dir))
    try:
        with writing(out_dir, directory=True) as built:
            for path in copied:
                shutil.copyfile(path, built / path.name)
            if content != read_json(built / "config.json"):
                (built / "config.json").write_text(json.dumps(content, indent=2))
            write_weights(built / "model.safetensors", layout, shards, out_dtype)
    except OSError as error:
        made = (out_dir / "model.safetensors").is_file()  # by another process, in the meantime
        if not made or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    return out_dir


def equal(a, b):
    pairs = zip(chunks_of(a), chunks_of(b))
    return a.shape == b.shape and all(torch.equal(x, y.to(x.dtype)) for x, y in pairs)


def main():
    """The command line: converts one checkpoint."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="HF_DIR_OR_HUB_ID_OR_GGUF",
                        help="a local directory, a hub id such as owner/name, or a .gguf file")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path,
                        help="the directory to make; must be absent or empty")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="of the output; auto: as the source's config says; of a GGUF file "
                             "with quantised tensors float32, which alone holds their values "
                             "(default: %(default)s)")
    args = parser.parse_args()
    print(f"wrote {convert(args.source, args.out_dir, args.dtype)}")


if __name__ == "__main__":
    run_command(main)
