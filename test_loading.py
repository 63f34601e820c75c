"""Tests of loading: models, checkpoints, GGUF files and tokenizers of others, against what
transformers, gguf and sentencepiece make of the same files.

    pip install -r requirements.txt pytest transformers protobuf gguf
    python -m pytest -q test_loading.py
Tests of published models need their GGUF files in the folder that the variable DS_MODELS names, and
the package accelerate, with which transformers reads them.
"""
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

try:
    import gguf
except ImportError:
    gguf = None

from test_ds import (  # first: it sets Triton's interpreter where there is no GPU
    DEVICE, ROOT, SHARED, TINY, command, edit_weights, first_channels, random_model,
    refused_in_one_line
)

import transformers
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import ModelConfig
import calibrate
import convert_hf
import decode
import generate
from ds_attention import DSConfig
from labels import key_ranges, mean_turn
from model import KVCache, apply_rope, load_model, parameter_shapes
from tokenizer import Tokenizer, from_sentencepiece, read_text

needs_gguf = pytest.mark.skipif(gguf is None, reason="needs the package gguf")


# ---------------------------------------------------------------- model


# Keys as published models have them, sizes aside; what is absent takes transformers' default.
LLAMA1 = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
              initializer_range=0.02, rms_norm_eps=1e-6, use_cache=True, pad_token_id=0)
LLAMA = LLAMA1 | dict(num_key_value_heads=2, max_position_embeddings=128)
TIED = LLAMA | dict(tie_word_embeddings=True)
MISTRAL = LLAMA1 | dict(architectures=["MistralForCausalLM"], model_type="mistral",
                        num_key_value_heads=2)
MIXTRAL = MISTRAL | dict(architectures=["MixtralForCausalLM"], model_type="mixtral",
                         num_local_experts=4, num_experts_per_tok=2, output_router_logits=False)
QWEN2 = LLAMA1 | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_key_value_heads=2)
QWEN3 = QWEN2 | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=16)
WINDOWS = dict(use_sliding_window=True, sliding_window=16)
LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
CONFIGS = {  # (keys, trained positions)
    "llama1-no-positions": (LLAMA1 | dict(max_sequence_length=2048, pad_token_id=-1), 2048),
    "llama2": (LLAMA1 | dict(max_position_embeddings=4096, pretraining_tp=2, rope_scaling=None,
                             torch_dtype="float16", transformers_version="4.28.0"), 4096),
    "llama3.2": (TIED | dict(max_position_embeddings=1024, attention_bias=False, mlp_bias=False,
                             rope_theta=5e5, head_dim=16, rope_scaling=LLAMA3_ROPE,
                             eos_token_id=[5, 6]), 1024),
    "smollm2": (TIED | {"is_llama_config": True, "num_key_value_heads": 1, "rope_theta": 100000,
                        "transformers.js_config": {"kv_cache_dtype": {"q4": "float16"}}}, 128),
    "llama-with-a-window": (LLAMA1 | dict(sliding_window=5, max_position_embeddings=99), 99),
    "vicuna-16k": (LLAMA1 | dict(max_position_embeddings=4096, max_sequence_length=16384,
                                 rope_scaling=dict(type="linear", factor=4.0)), 16384),
    "dynamic-ntk": (LLAMA1 | dict(max_position_embeddings=4096,
                                  rope_scaling=dict(type="dynamic", factor=8.0)), 4096),
    "mistral-default-window": (MISTRAL, 131072),
    "mistral-v0.1": (MISTRAL | dict(sliding_window=7, max_position_embeddings=32768), 32768),
    "mixtral-default-theta": (MIXTRAL, 131072),
    "mixtral-with-a-window": (MIXTRAL | dict(sliding_window=7), 131072),
    "qwen2": (QWEN2 | dict(bos_token_id=5, eos_token_id=None, rope_theta=1e6), 32768),
    "qwen2-unused-window": (QWEN2 | WINDOWS | dict(use_sliding_window=False), 32768),
    "qwen2-windows": (QWEN2 | WINDOWS | dict(max_window_layers=1), 32768),
    "qwen3": (QWEN3, 32768),
    "qwen3-windows": (QWEN3 | WINDOWS | dict(
        layer_types=["sliding_attention", "full_attention"]), 32768),
}


def randomize(model):
    """Weights, biases and norms that do something: transformers starts the latter at 0 and 1."""
    for name, parameter in model.named_parameters():
        mean = 0 if name.endswith("bias") or parameter.ndim > 1 else 1
        parameter.data.normal_(mean, 0.3)
    return model.eval()


def make_hf(path, config=LLAMA, dtype=torch.float32, **save):
    """Saves a random model of transformers' in `path`, beside the config as it is given -> it."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 vocab_size=64)
    path.mkdir(exist_ok=True)
    text = json.dumps(sizes | config)
    (path / "config.json").write_text(text)
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(path, pad_token_id=None)  # -1 cannot be saved again
    model = randomize(AutoModelForCausalLM.from_config(shape, dtype=dtype))
    model.save_pretrained(path, **save)
    (path / "config.json").write_text(text)
    (path / "generation_config.json").unlink(missing_ok=True)
    return model


def converted(path, config=LLAMA, **save):
    """(transformers' model, ours) for a config."""
    hf = make_hf(path / "hf", config, **save)
    out = convert_hf.convert(path / "hf", path / "out", "float32")
    return hf, load_model(out, "cpu", torch.float32)


@pytest.mark.parametrize("config, positions", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_models_equal_hugging_face_s(config, positions, tmp_path):
    """Logits of a forward and of chunked prefill and decode, dense and with a budget of all tokens;
    greedy tokens, end tokens and trained length. Regressions: unknown and absent keys were refused,
    Mistral's and Mixtral's defaults were Llama's, a window was taken where transformers takes none,
    linear scaling multiplied the trained length."""
    hf, model = converted(tmp_path, config)
    ours, layers, heads = model.config, model.config.n_layers, model.config.n_kv_heads
    prompt = torch.randint(3, 64, (1, 41), generator=torch.Generator().manual_seed(1))
    want = hf(prompt).logits
    torch.testing.assert_close(model(prompt), want, atol=1e-4, rtol=1e-4)

    every = DSConfig(n_tokens=100, label_bits=((8, 4),), dense_layers=0, impl="torch")
    maps = [first_channels(heads, 8, ((8, 4),), "cpu")] * layers
    for settings in ((), (every, maps)):
        cache = KVCache(ours, 1, 41, "cpu", torch.float32, *settings)
        model.prefill([prompt[0, :20].tolist()], cache, chunk=8)
        one = model.decode(prompt[0, 20:21], cache)
        rest = model.decode_rows(prompt[0, 21:], cache)
        torch.testing.assert_close(torch.cat([one, rest]), want[0, 20:], atol=1e-4, rtol=1e-4)

    eos_ids = ours.eos_ids
    object.__setattr__(ours, "eos_ids", ())
    step = decode.DecodeStep(model, KVCache(ours, 1, 41 + 32, "cpu", torch.float32))
    found = decode.generate(step, [prompt[0].tolist()], 32).token_ids
    likeliest = hf(torch.cat([prompt, torch.tensor(found)], 1)).logits.argmax(-1)
    assert likeliest[:, 40:-1].tolist() == found

    eos = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id
    assert list(eos_ids) == ([] if eos is None else eos if isinstance(eos, list) else [eos])
    assert ours.max_positions == positions
    assert config is not MISTRAL or ours.window(0) == 4096


@torch.inference_mode()
def test_a_long_prompt_in_mistral_s_default_window(tmp_path):
    """Regression: absent, it was taken for none, and texts past 4,096 tokens went their own way."""
    hf, model = converted(tmp_path, MISTRAL | dict(num_hidden_layers=1))
    prompt = torch.randint(64, (1, 4200), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(prompt)[:, -9:], hf(prompt).logits[:, -9:]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text, eos_ids", [
    ('{"eos_token_id": [2, 9]}', (2, 9)), ('{"eos_token_id": 4}', (4,)), ("{}", ())])
def test_end_tokens_are_those_of_generation_config(text, eos_ids, tmp_path):
    """Regression: config.json's were taken, and chat models did not stop. An empty file means
    none, as transformers has it."""
    make_hf(tmp_path / "hf", LLAMA | dict(eos_token_id=7))
    (tmp_path / "hf" / "generation_config.json").write_text(text)
    out = convert_hf.convert(tmp_path / "hf", tmp_path / "out")
    assert ModelConfig.from_file(out / "config.json").eos_ids == eos_ids


@pytest.mark.parametrize("change, match", [
    (dict(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "architecture GPT2LMHeadModel"),
    (dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3"), "model_type gemma3"),
    (dict(quantization_config=dict(quant_method="awq", bits=4)), "quantised by awq"),
    (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "by bitsand"),
    (dict(auto_map=dict(AutoModelForCausalLM="modeling_x.X")), "auto_map"),
    (dict(attention_bias=True), "attention_bias=True"), (dict(hidden_act="gelu"), "hidden_act="),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type=yarn"),
    (dict(rope_scaling=dict(type="longrope", short_factor=[1.0])), "rope_type=longrope"),
    (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(rope_scaling=dict(type="linear")), "missing key 'factor'"),
    (dict(hidden_size="64"), "wrong type"), (dict(num_hidden_layers=0), "n_layers=0"),
    (dict(eos_token_id="x"), "eos_token_id='x'"), (dict(eos_token_id=[2, None]), "eos_token_id="),
    (dict(rms_norm_eps="x"), "norm_eps='x'"), (dict(rope_theta=-1.0), "rope_theta=-1.0"),
    (dict(model_type=["a"]), "must be one of"),
    (dict(model_type=None, architectures=5), "architecture 5")], ids=str)
def test_configs_that_would_change_the_result_are_refused(change, match):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
                 intermediate_size=64)
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_dict(sizes | LLAMA | change)


@pytest.mark.parametrize("key, value", [
    ("rope_theta", "x"), ("rope_theta", math.inf), ("rms_norm_eps", "1e-5"),
    ("num_hidden_layers", 10**9), ("hidden_size", True), ("num_attention_heads", 2.5),
    ("vocab_size", 2**40), ("intermediate_size", None), ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"})], ids=str)
def test_a_config_value_of_the_wrong_type_is_named(key, value):
    content = json.loads((TINY / "config.json").read_text()) | {key: value}
    ours = {"rms_norm_eps": "norm_eps", "num_hidden_layers": "n_layers", "hidden_size": "dim",
            "num_attention_heads": "n_heads", "intermediate_size": "ffn_dim"}
    with pytest.raises(ValueError, match=ours.get(key, key)):
        ModelConfig.from_dict(content)


# ---------------------------------------------------------------- convert_hf


@pytest.fixture
def hf(tmp_path):
    make_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def out(tmp_path):
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


def to_bin(path, n_shards=1, **more):
    """Rewrites a directory's model.safetensors as `n_shards` .bin files with their index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"pytorch_model-{1 + i % n_shards:05d}-of-{n_shards:05d}.bin"
             for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, path / file,
                   **more)
    index = {"metadata": {}, "weight_map": files}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()


def refused(hf, out, match, **more):
    """Asserts that converting raises one line that matches, and that nothing stays."""
    before = sorted(out.parent.iterdir())
    with pytest.raises((ValueError, OSError), match=match) as caught:
        convert_hf.convert(hf, out, **more)
    assert "\n" not in str(caught.value) and sorted(out.parent.iterdir()) == before


LAYOUTS = {
    "sharded": (LLAMA, dict(max_shard_size="20KB"), lambda hf: None),
    "bin": (LLAMA, {}, to_bin),
    "bin-shards": (LLAMA, {}, partial(to_bin, n_shards=3)),
    # not a zip archive: torch.load(mmap=True) refused it
    "bin-before-torch-1.6": (LLAMA, {}, partial(to_bin, _use_new_zipfile_serialization=False)),
    "bin-beside": (LLAMA, {}, lambda hf: (hf / "pytorch_model.bin").write_bytes(b"not read")),
    "mixtral-sharded": (MIXTRAL, dict(max_shard_size="30KB"), lambda hf: None),
    "mixtral-fused": (MIXTRAL, dict(save_original_format=False), lambda hf: None),
    "tied-with-a-head": (TIED, {}, lambda hf: edit_weights(hf, lambda tensors: tensors.update({
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))),
    "tied-with-a-head-alone": (TIED, {}, lambda hf: edit_weights(
        hf, lambda tensors: tensors.update({
            "lm_head.weight": tensors.pop("model.embed_tokens.weight")}))),
}


@pytest.mark.parametrize("config, save, change", LAYOUTS.values(), ids=LAYOUTS)
def test_all_layouts_of_weights_convert_alike(config, save, change, tmp_path, out):
    """The bytes are those of one safetensors file. Files that generate.py needs come along."""
    hf = tmp_path / "hf"
    make_hf(hf, config)
    want = convert_hf.convert(hf, out.with_name("want"))
    shutil.rmtree(hf)
    make_hf(hf, config, **save)
    assert (hf / "model.safetensors.index.json").exists() == ("max_shard_size" in save)
    change(hf)
    for name in ("chat_template.jinja", "added_tokens.json", "tokenizer.json"):
        (hf / name).write_text(name)

    assert convert_hf.convert(hf, out) == out.resolve()
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (want / name).read_bytes()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "double-sparsity", "source": "hf"}
        shapes = parameter_shapes(ModelConfig.from_file(out / "config.json"))
        assert set(file.keys()) == set(shapes)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert (out / "added_tokens.json").exists() and (out / "tokenizer.json").exists()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "want"]


def test_another_head_in_a_tied_checkpoint_counts(tmp_path):
    """Where a config says tied and the weights hold another head. It was ignored."""
    make_hf(tmp_path / "hf", TIED)
    head = {"lm_head.weight": torch.randn(64, 32)}
    edit_weights(tmp_path / "hf", lambda tensors: tensors.update(head))
    out = convert_hf.convert(tmp_path / "hf", tmp_path / "out")
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(load_file(out / "model.safetensors")["head.weight"], head["lm_head.weight"])


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "first-weight's", "float32", "bfloat16"])
def test_dtype(source, dtype, tmp_path, out, monkeypatch):
    """That of the config, of the first weights where it says none, or as asked."""
    monkeypatch.setattr(convert_hf, "CHUNK", 100)  # several chunks a tensor, the last one short
    config = LLAMA | ({"torch_dtype": str(source)[6:]} if dtype == "auto" else {})
    model = make_hf(tmp_path / "hf", config, dtype=source)
    as_it_is = dtype in ("auto", "first-weight's")
    convert_hf.convert(tmp_path / "hf", out, "auto" if as_it_is else dtype)
    ours, expected = load_file(out / SAFE), source if as_it_is else getattr(torch, dtype)
    assert {tensor.dtype for tensor in ours.values()} == {expected}
    attention = model.model.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(ours["layers.1.attn.wqkv.weight"], torch.cat(parts).to(expected))


NORM, SAFE = "model.norm.weight", "model.safetensors"
BIN, BIN_1 = "pytorch_model.bin", "pytorch_model-00001-of-00001.bin"
INDEX = f"{BIN}.index.json"
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"})


def weights(**change):
    """What changes the tensors of a directory's model.safetensors; None takes one away."""
    def changed(tensors):
        tensors.update(change)
        for name in [name for name, tensor in tensors.items() if tensor is None]:
            del tensors[name]
    return lambda hf: edit_weights(hf, changed)


def files(**change):
    """What cuts a directory's files to so many bytes, or gives them other content."""
    def changed(hf):
        for name, content in change.items():
            path = hf / name
            if isinstance(content, int):
                path.write_bytes(path.read_bytes()[:content])
            elif isinstance(content, str):
                path.write_text(content)
            elif content is None:
                path.unlink()
            else:
                torch.save(content, path)
    return changed


BROKEN = {  # what is done to a checkpoint, and what its refusal says
    "missing": (weights(**{NORM: None}), r"1 tensors missing \(model.norm.weight\)"),
    "unexpected": (weights(**{f"odd.{i}": torch.zeros(1) for i in range(5)}),
                   r"5 tensors unexpected .*odd.2, \.\.\."),
    "shape": (weights(**{NORM: torch.zeros(31)}), r"model.norm.weight \[31\], not \[32\]"),
    "int8": (weights(**{NORM: torch.zeros(32, dtype=torch.int8)}), "norm.weight torch.int8"),
    "truncated": (files(**{SAFE: 5000}), SAFE),
    "empty": (files(**{SAFE: 0}), SAFE),
    "truncated-bin": (lambda hf: (to_bin(hf), files(**{BIN_1: 5000})(hf)), BIN_1),
    "foreign-bin": (lambda hf: (to_bin(hf), files(**{BIN_1: "<html>" * 99})(hf)), BIN_1),
    "no-bin": (lambda hf: (to_bin(hf), files(**{BIN_1: None})(hf)), BIN_1),
    "runs-code": (files(**{BIN: {"a": subprocess.Popen}, SAFE: None}), BIN),
    "bad-index": (files(**{INDEX: '{"weight_map": []}', SAFE: None}), "not a weight index"),
    "html-index": (files(**{INDEX: "<html>", SAFE: None}), "index.json: not a weight index"),
    "no-weights": (files(**{SAFE: None}), "no model.safetensors"),
    "no-config": (files(**{"config.json": None}), "no config.json"),
    # an adapter beside the model was left out without a word
    "adapter": (files(**{"adapter_config.json": ADAPTER}),
                r"adapter \(LORA\) of owner/base, not a model: .*move it away"),
    "adapter-alone": (files(**{"adapter_config.json": ADAPTER, "config.json": None}),
                      r"adapter \(LORA\) of owner/base, not a model: .*peft's merge_and_unload"),
}


@pytest.mark.parametrize("change, match", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_named(change, match, hf, out):
    change(hf)
    refused(hf, out, match)


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_weights_that_are_not_there_are_refused(kind, tmp_path):
    tensor = torch.eye(4).to_sparse() if kind == "sparse" else torch.empty(4, 4, device="meta")
    torch.save({NORM: tensor}, tmp_path / BIN)
    with pytest.raises(ValueError, match=f"norm.weight is a {kind} tensor"):
        convert_hf.open_shard(tmp_path / BIN)


def test_two_processes_may_convert_the_same_checkpoint(hf, out, monkeypatch):
    """The one that is late finds what the other made, and says that it is there, too."""
    whole = convert_hf.write_weights

    def late(path, *arguments):
        monkeypatch.setattr(convert_hf, "write_weights", whole)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)  # a process that is running
            convert_hf.convert(hf, out)
        whole(path, *arguments)

    monkeypatch.setattr(convert_hf, "write_weights", late)
    assert convert_hf.convert(hf, out) == out
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    load_file(out / SAFE)


def test_what_cannot_be_written_is_refused(hf, out, monkeypatch):
    """Into a directory in use, with too little disk, or past the range of a dtype."""
    out.mkdir()
    convert_hf.convert(hf, out)  # into an empty one
    refused(hf, out, "remove it, or choose another")
    refused(hf, out / "config.json", "remove it, or choose another")
    edit_weights(hf, lambda tensors: tensors[NORM].fill_(1e5))
    refused(hf, out.with_name("b"), f"{NORM}: not finite as torch.float16", dtype="float16")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 100))
    refused(hf, out.with_name("c"), "needs .* GB")


@pytest.mark.parametrize("error, match", [
    (errors.GatedRepoError, "accept its terms .*hf auth login"),
    (errors.RepositoryNotFoundError, "hf auth login"),
    (errors.LocalEntryNotFoundError, "give a local directory"),
    (errors.OfflineModeIsEnabled, "give a local directory"),
    (errors.HFValidationError, "not a hub id")])
def test_hub_errors_say_what_to_do(error, match, out, monkeypatch):
    def fail(*args, **more):
        raise error.__new__(error)  # without the HTTP response that some constructors ask for
    monkeypatch.setattr(convert_hf, "snapshot_download", fail)
    refused("owner/name", out, match)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hub_download_asks_for_one_kind_of_weights(kind, hf, out, tmp_path, monkeypatch):
    """Of a stand-in for the hub, which copies what the patterns match."""
    torch.save(load_file(hf / SAFE), hf / BIN)
    (hf / "consolidated.safetensors").write_bytes(b"Mistral's own layout")
    if kind == "bin":
        (hf / SAFE).unlink()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(hub_id, allow_patterns):
        for path in hf.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(convert_hf, "snapshot_download", download)
    convert_hf.convert("owner/name", out)
    taken = {"safetensors": SAFE, "bin": BIN}[kind]
    assert {path.name for path in snapshot.iterdir()} == {"config.json", taken}
    with safe_open(out / SAFE, "pt") as file:
        assert file.metadata()["source"] == "owner/name"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_conversion_holds_one_shard(kind, tmp_path, out):
    """The peak over a small conversion's, of 100 MB in three shards that become 200 MB."""
    small, large = tmp_path / "small", tmp_path / "large"
    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, vocab_size=2000)
    more = {} if kind == "bin" else {"max_shard_size": "45MB"}
    make_hf(small)
    make_hf(large, LLAMA | shape, dtype=torch.bfloat16, **more)
    if kind == "bin":
        to_bin(large, 3)
    command = """if True:
        import re, sys, convert_hf
        def peak_bytes():
            return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
        convert_hf.convert(sys.argv[1], sys.argv[2], "bfloat16")
        before = peak_bytes()
        convert_hf.convert(sys.argv[3], sys.argv[4], "float32")
        print(peak_bytes() - before)"""
    paths = [small, out.with_name("small"), large, out]
    run = subprocess.run([sys.executable, "-c", command, *paths], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    shards = [path.stat().st_size for path in large.glob(f"*.{kind}")]
    assert len(shards) == 3 and int(run.stdout) < max(shards) + 40e6


# ---------------------------------------------------------------- convert_gguf

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", "ab", "<|end|>"]
LETTERS = dict(model="gpt2", pre="gpt-2", tokens=LETTERS, token_type=[1] * 63 + [3],
               merges=["a b"], eos_token_id=63)  # a tokenizer of 64 tokens
GGUF_ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def gguf_views(model, single_experts):
    """(name in GGUF, view of a parameter, heads whose rows are interleaved there) of a model."""
    c = model.config
    interleaved = {}
    if GGUF_ARCHITECTURES[c.model_type] == "llama":
        interleaved = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[GGUF_ARCHITECTURES[c.model_type].upper()],
                                     c.num_hidden_layers)
    for name, parameter in model.named_parameters():
        hf_name, suffix = name.rsplit(".", 1)
        if not hf_name.endswith("experts"):
            heads = interleaved.get(hf_name.split(".")[-1])
            yield f"{names.get_name(hf_name)}.{suffix}", parameter.data, heads
            continue
        halves = parameter.data.chunk(2, 1) if suffix == "gate_up_proj" else [parameter.data]
        for part, view in zip(suffix.removesuffix("_proj").split("_"), halves):
            prefix = f"blk.{hf_name.split('.')[2]}.ffn_{part}"
            if single_experts:
                yield from ((f"{prefix}.{e}.weight", expert, None) for e, expert in enumerate(view))
            else:
                yield f"{prefix}_exps.weight", view, None


def gguf_model(path, config=LLAMA, quantisation="F32", tokenizer=LETTERS, keys={}, tensors={},
               single_experts=False):
    """A random model of transformers', written as llama.cpp does; it takes the values that are
    written. keys, tensors: more of them, {name: value}; None leaves one out that the model has."""
    model = make_hf(path.with_suffix(".hf"), config)
    c, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    rope = c.rope_parameters
    fields = {
        "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size, "context_length": c.max_position_embeddings,
        "attention.head_count": c.num_attention_heads, "rope.freq_base": float(rope["rope_theta"]),
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": getattr(c, "head_dim", None)}
    if c.model_type == "mixtral":
        fields |= {"expert_count": c.num_local_experts, "expert_used_count": c.num_experts_per_tok}
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    fields = {f"{GGUF_ARCHITECTURES[c.model_type]}.{key}": value for key, value in fields.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    fields |= {"general.architecture": GGUF_ARCHITECTURES[c.model_type], **keys}
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array, type(None): lambda key, value: None}
    for key, value in fields.items():
        add[type(value)](key, value)

    arrays = {}
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -torch.arange(0, 1, 2 / c.head_dim)
        arrays["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq).numpy(), None
    for name, view, heads in gguf_views(model, single_experts):
        rows = view if heads is None else (
            view.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2))
        stored = kind if view.ndim > 1 else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(rows.float().contiguous().numpy(), stored)
        arrays[name] = array, stored if array.dtype == "uint8" else None
        back = torch.tensor(gguf.quants.dequantize(array, stored))
        if heads is not None:
            back = back.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        view.copy_(back)
    arrays |= {name: (array, None) for name, array in tensors.items()}
    for name, (array, stored) in arrays.items():
        if array is not None:
            writer.add_tensor(name, array, raw_dtype=stored)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return model


@needs_gguf
@pytest.mark.parametrize("config, quantisation, more", [
    (LLAMA, "F32", {}), (LLAMA, "Q8_0", {}), (TIED, "F16", {}), (LLAMA, "Q5_1", {}),
    (MIXTRAL, "Q4_0", {}), (MIXTRAL, "Q4_1", {"single_experts": True}), (QWEN2, "Q8_0", {}),
    (QWEN3, "BF16", {}),
    (LLAMA | {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 32}}, "F32", {}),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "F32", {}),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, "F32", {"keys": {
        "llama.rope.scaling.type": None, "llama.rope.scaling.factor": None,
        "llama.rope.scale_linear": 4.0}}),  # as files of 2023 have it
], ids=["f32", "q8_0", "tied-f16", "q5_1", "mixtral", "mixtral-single", "qwen2", "qwen3-bf16",
        "llama3-rope", "linear-rope", "linear-rope-2023"])
@torch.inference_mode()
def test_gguf_equals_its_model(config, quantisation, more, tmp_path, out, monkeypatch):
    monkeypatch.setattr(convert_hf, "CHUNK", 100)  # several chunks a tensor
    model = gguf_model(tmp_path / "m.gguf", config, quantisation, **more)
    tokens = torch.randint(64, (1, 100))
    convert_hf.convert(tmp_path / "m.gguf", out)
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    sixteen_bit = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert dtypes == {sixteen_bit.get(quantisation, torch.float32)}
    convert_hf.convert(tmp_path / "m.gguf", out.with_name("float32"), dtype="float32")
    ours = load_model(out.with_name("float32"), "cpu", torch.float32)
    torch.testing.assert_close(ours(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)
    assert ours.config.tie_embeddings == (config is TIED)


TEXTS = [
    "The sea was calm.", " two  spaces   and\ttabs\n\n\n lines \n", "", " ", "a\r\nb\r\n\r\n  c",
    "def f(x):\n    return x[1:]  # 12345", "    2024-11-28 3.14159 1,000,000",
    "naïve café, Привет, 日本語, ١٢٣, 😀👍🏽",
     "\u00a0nbsp\u3000wide", "it's I'LL don't WE'VE",
    "<s>a</s> <|end|>b<think>"]


@needs_gguf
@pytest.mark.parametrize("space_prefix", [True, False])
def test_gguf_sentencepiece_tokenizer(space_prefix, tmp_path, out):
    """tiny's tokenizer, through a GGUF file: the same ids, and the same text back."""
    tiny = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    size = tiny.get_piece_size()
    types = [2 if tiny.is_unknown(i) else 3 if tiny.is_control(i) else 6 if tiny.is_byte(i) else 1
             for i in range(size)]
    tokenizer = dict(model="llama", tokens=[tiny.id_to_piece(i) for i in range(size)],
                     token_type=types, scores=[tiny.get_score(i) for i in range(size)],
                     add_space_prefix=space_prefix)
    gguf_model(tmp_path / "m.gguf", LLAMA | {"vocab_size": size}, tokenizer=tokenizer)
    ours = Tokenizer(convert_hf.convert(tmp_path / "m.gguf", out))
    assert ours.prefix == [tiny.bos_id()]
    assert tiny.eos_id() in ours.encode("a</s>b", special=False)
    for text in (text for text in TEXTS if text and "s>" not in text):  # SentencePiece cuts these
        told = text if space_prefix else f" {text}"
        ids = ours.encode(told, special=False)
        assert ids == tiny.encode(text) and ours.decode(ids) == told
    assert ModelConfig.from_file(out / "config.json").eos_ids == (tiny.eos_id(),)


def byte_level_gguf(path, pre, **more):
    """A GGUF file with a byte-level tokenizer trained here on code and prose; its tokens."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=pre != "llama-bpe")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, show_progress=False,
                                             initial_alphabet=byte_level.alphabet())
    text = (ROOT / "model.py").read_text()
    trained.train_from_iterator([*text.split("\n\n"), *TEXTS], trainer)
    learnt = json.loads(trained.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokens += ["<s>", "</s>", "<|end|>", "<think>", "[PAD]"]
    n = len(tokens)
    tokenizer = dict(
        model="gpt2", pre=pre, tokens=tokens, token_type=[1] * (n - 5) + [3, 3, 3, 4, 5],
        merges=[" ".join(pair) for pair in learnt["merges"]], bos_token_id=n - 5,
        eos_token_id=n - 4, eot_token_id=n - 3, **more)
    gguf_model(path, LLAMA | {"vocab_size": n}, tokenizer=tokenizer,
               keys={"tokenizer.chat_template": "{{ 'ü' }}"})
    return tokens


@needs_gguf
@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_gguf_byte_level_tokenizer(pre, add_bos, tmp_path, out):
    """Ids as transformers reads them from the file, and where that lacks a rule, with that rule.

    It takes smollm as GPT-2, though digits stand alone there; it does not bring Qwen2's text to
    NFC, nor take a Llama 3 word whole that is a token but no merges lead to.
    """
    pytest.importorskip("transformers", minversion="5.24")  # earlier ones read less of the file
    more = {} if add_bos is None else {"add_bos_token": add_bos}
    tokens = byte_level_gguf(tmp_path / "m.gguf", pre, **more)
    convert_hf.convert(tmp_path / "m.gguf", out)
    ours = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf").backend_tokenizer
    if pre == "smollm":
        oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre == "qwen2":
        oracle.normalizer = tokenizers.normalizers.NFC()
    oracle.model.ignore_merges = pre == "llama-bpe"
    begins = [tokens.index("<s>")] if add_bos or (add_bos is None and pre == "llama-bpe") else []
    for text in [*TEXTS, "e\u0301"]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).ids == begins + ids
        assert pre == "qwen2" or ours.decode(ids, skip_special_tokens=False) == text
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'ü' }}"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings == {"bos_token": "<s>", "eos_token": "</s>"}
    config = ModelConfig.from_file(out / "config.json")
    assert config.eos_ids == (tokens.index("</s>"), tokens.index("<|end|>"))


@needs_gguf
@pytest.mark.parametrize("more, match", [
    ({"keys": {"general.architecture": "gemma3"}}, "a model of architecture gemma3: must be"),
    ({"keys": {"general.type": "adapter"}}, "an? adapter of architecture llama: must be a model"),
    ({"keys": {"split.count": 3, "split.no": 1, "llama.block_count": None}}, "part 2 of 3: join"),
    ({"keys": {"llama.block_count": None}}, "block_count is missing"),
    ({"keys": {"llama.block_count": 3}}, r"9 tensors missing \(model.layers.2"),
    ({"keys": {"tokenizer.ggml.tokens": None}}, "tokens is missing"),
    ({"keys": {"tokenizer.ggml.token_type": [1]}}, "shorter"),
    ({"keys": {"tokenizer.ggml.merges": ["a q"]}}, "its tokens and merges are not a tokenizer's"),
    ({"keys": {"tokenizer.ggml.pre": "deepseek-llm"}}, "tokenizer.ggml.pre=deepseek-llm: must be"),
    ({"keys": {"tokenizer.ggml.model": "bert"}}, "tokenizer.ggml.model=bert: must be gpt2"),
    ({"keys": {"split.count": 2}}, "metadata of the wrong kind"),
    ({"keys": {"tokenizer.ggml.bos_token_id": "x"}}, "metadata of the wrong kind"),
    ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rope scaling yarn: must be linear"),
    ({"keys": {"llama.rope.dimension_count": 4}}, "RoPE over 4 of 8 channels"),
    ({"keys": {"llama.attention.head_count": [4, 4]}}, "must be"),
    ({"tensors": {"odd.weight": torch.zeros(2, 32).numpy()}}, r"1 tensors unexpected \(odd.weight"),
    ({"tensors": {"odd.weight": torch.zeros(2, 32).int().numpy()}}, "odd.weight: quantisation I32"),
    ({"tensors": {"output_norm.weight": None}}, r"1 tensors missing \(model.norm.weight\)"),
], ids=lambda value: next(iter(next(iter(value.values())))) if isinstance(value, dict) else None)
def test_gguf_that_does_not_fit_is_refused(more, match, tmp_path, out):
    gguf_model(tmp_path / "m.gguf", **more)
    refused(tmp_path / "m.gguf", out, f"m.gguf: .*{match}")


@needs_gguf
def test_damaged_gguf_is_refused(tmp_path, out):
    path = tmp_path / "m.gguf"
    gguf_model(path)
    whole = path.read_bytes()
    cuts = [whole[:n] for n in (3, 4, 23, 24, 25, 997, 3997, 9997, 19997)]
    for content in [*cuts, b"<html>" * 99]:
        path.write_bytes(content)
        refused(path, out, "m.gguf: cannot be read: truncated, or not a GGUF file")
    name = b"blk.0.attn_q.weight"
    kind = whole.index(name) + len(name) + 4 + 2 * 8  # behind the dimensions and their number
    path.write_bytes(whole[:kind] + (999).to_bytes(4, "little") + whole[kind + 4 :])
    refused(path, out, "m.gguf: .*blk.0.attn_q.weight: quantisation 999, unknown to this gguf")
    refused(tmp_path / "absent.gguf", out, "absent.gguf: no such file")
def test_gguf_without_its_package(tmp_path, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "m.gguf", out, "m.gguf: .*pip install gguf")


@needs_gguf
def test_gguf_at_the_command_line(tmp_path, monkeypatch):
    """generate.py converts it once, beside nothing else."""
    gguf_model(tmp_path / "m.gguf")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    first = generate.resolve_checkpoint(str(tmp_path / "m.gguf"))
    assert first.parent == tmp_path / "checkpoints" and first.name.startswith("m-")
    monkeypatch.setattr(generate, "convert", None)  # not again
    assert generate.resolve_checkpoint(str(tmp_path / "m.gguf")) == first
    run = command("convert_hf.py", tmp_path / "m.gguf", tmp_path / "out")
    assert run.returncode == 0 and (tmp_path / "out" / "model.safetensors").exists(), run.stderr
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-1000])
    for script, *arguments in [("generate.py", "--checkpoint", tmp_path / "m.gguf"),
                               ("convert_hf.py", tmp_path / "m.gguf", tmp_path / "none")]:
        refused_in_one_line(command(script, *arguments), "m.gguf: cannot be read: truncated")
    assert not (tmp_path / "none").exists()


PUBLISHED = {  # file: tokens to decode
    "SmolLM2-135M-Instruct.Q4_1.gguf": 64, "Qwen2.5-Coder-0.5B-Instruct.gguf": 32}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """(file name, our checkpoint, transformers' own reading of the file)."""
    folder = Path(os.environ.get("DS_MODELS", "absent"))
    if not (folder / request.param).exists():
        pytest.skip(f"needs {request.param} in the folder that DS_MODELS names")
    pytest.importorskip("accelerate")  # transformers needs it for GGUF
    out = tmp_path_factory.mktemp("published") / "out"
    checkpoint = convert_hf.convert(folder / request.param, out)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=request.param,
                                                 dtype=torch.float32)
    return request.param, checkpoint, model.eval().to(DEVICE)


@needs_gguf
@torch.inference_mode()
def test_published_gguf_equals_transformers(published):
    """Ids of code; logits over 512 tokens within 1e-3 in fp32, and greedy tokens."""
    name, checkpoint, hf = published
    theirs = AutoTokenizer.from_pretrained(os.environ["DS_MODELS"], gguf_file=name)
    model, tokenizer, _ = generate.load(str(checkpoint), DEVICE, torch.float32)
    text, n = (ROOT / "ds_attention.py").read_text(), PUBLISHED[name]
    tokens = tokenizer.encode(text)
    assert tokens == theirs.encode(text)
    prompt = torch.tensor([tokens[:512]], device=DEVICE)
    torch.testing.assert_close(model(prompt), hf(prompt).logits, atol=1e-3, rtol=0)
    for prompt in (tokenizer.encode("The capital of France is"), tokens[:700]):
        cache = KVCache(model.config, 1, len(prompt) + n, DEVICE, torch.float32)
        ours = decode.generate(decode.DecodeStep(model, cache), [prompt], n).token_ids[0]
        likeliest = hf(torch.tensor([prompt + ours], device=DEVICE)).logits[0].argmax(-1).tolist()
        assert likeliest[len(prompt) - 1 :][: len(ours)] == ours
        assert len(ours) == n or likeliest[-1] in model.config.eos_ids


# ---------------------------------------------------------------- tokenizer

AWKWARD = [
    "The sea was calm", "  two  spaces", "a\n\n  b\tc", "caf\u00e9 \u65e5\u672c \U0001f642", "",
    "x </s><s>[INST] y [/INST]<unk>", "<|user|>one<tool>  two <tool><|end|>\n three"
]
PAD = dict(id=3, content="<pad>", single_word=False, lstrip=False, rstrip=False, normalized=False,
           special=True)
ADDED = {"4096": {"content": "<|user|>", "special": True, "normalized": False},
         "4097": {"content": "<tool>", "special": False, "normalized": True, "rstrip": True},
         "4098": {"content": "<|end|>", "special": True, "normalized": False, "lstrip": True}}
SPM = TINY / "tokenizer.model"
TIKTOKEN = "IQ== 0\nIg== 1\nIw== 2\n"
TOKENIZER_FILES = {"whole": "tokenizer.json", "spm": "tokenizer.model",
                   "config": "tokenizer_config.json", "special": "special_tokens_map.json",
                   "added": "added_tokens.json", "template": "chat_template.jinja"}


def with_bos(backend):
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        ["<s>", "$A"], special_tokens=[("<s>", 1)])
    return backend


def byte_level(bos=False, **change):
    """The content of a small byte-level tokenizer.json. change: of its sections."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["the sea was calm and the dog ran"] * 9, tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
            initial_alphabet=alphabet, show_progress=False))
    return json.loads((with_bos(backend) if bos else backend).to_str()) | change


def spaces_json():
    """The content of a tokenizer.json that encodes as the embedded checkpoint's tokenizer.model."""
    backend, _ = from_sentencepiece(SPM)
    backend.add_special_tokens(["<unk>"])
    return json.loads(with_bos(backend).to_str())


def tokenizer_at(path, model_type="llama", **files):
    """Writes a checkpoint's files, of TOKENIZER_FILES: texts, objects, or other files to copy."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for kind, content in files.items():
        file = path / TOKENIZER_FILES[kind]
        if isinstance(content, Path):
            shutil.copy(content, file)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def same_as_transformers(path):
    """Asserts equal ids, with and without special tokens, and equal text of them -> both."""
    ours, there = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in AWKWARD:
        for special in (True, False):
            ids = there.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids, text
            assert ours.decode(ids) == there.decode(ids, skip_special_tokens=True)
    return ours, there

NAMED = dict(bos_token="<s>", eos_token="</s>")
NEWER = pytest.mark.skipif(tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
                           reason="older versions of transformers 5 have other rules here")
SPACES, BYTES, BYTES_BOS = spaces_json(), byte_level(), byte_level(bos=True)
LLAMA_CLASS = dict(tokenizer_class="LlamaTokenizer")
TOKENIZERS = {
    # regressions: a truncation saved in the file left 4 tokens of a prompt, a padding made 33 of it
    "truncation-saved": dict(whole=BYTES | dict(truncation=dict(
        direction="Right", max_length=4, strategy="LongestFirst", stride=0))),
    "padding-saved": dict(whole=BYTES | dict(padding=dict(
        strategy={"Fixed": 32}, direction="Left", pad_to_multiple_of=None, pad_id=3, pad_type_id=0,
        pad_token="<pad>"))),
    # and BOS was put in front of all
    "no-bos": dict(whole=BYTES, config=NAMED | dict(add_bos_token=True)),
    "bos": dict(whole=BYTES_BOS, config=NAMED | dict(add_bos_token=False)),
    "added": dict(whole=BYTES_BOS, config=dict(added_tokens_decoder=ADDED)),
    "added-file": dict(whole=BYTES, added={"<tool>": 321, "<|end|>": 320},
                       special=dict(eos_token="<|end|>", additional_special_tokens=["<|user|>"])),
    "extra": dict(whole=BYTES, config=dict(extra_special_tokens={"end_token": "<|end|>"})),
    "spaces": dict(whole=SPACES, config=dict(added_tokens_decoder=ADDED)),
    "llama-class": dict(whole=SPACES, config=NAMED | LLAMA_CLASS),
    "llama-class-legacy": dict(whole=SPACES, config=NAMED | dict(
        tokenizer_class="LlamaTokenizerFast", legacy=True)),
    "llama-class-bytes": pytest.param(dict(whole=BYTES, config=LLAMA_CLASS), marks=NEWER),
    "mistral": dict(model_type="mistral", whole=SPACES, config=LLAMA_CLASS | dict(legacy=False)),
    "qwen": dict(model_type="qwen2", whole=BYTES, config=dict(
        tokenizer_class="Qwen2Tokenizer", eos_token="</s>", pad_token="</s>", unk_token=None)),
    # Llama 3's original tokenizer.model lies beside the other: it was opened, and refused
    "tiktoken-beside": dict(whole=BYTES, spm=TIKTOKEN),
    # added tokens, and special ones in a text, came out as letters
    "spm": pytest.param(dict(spm=SPM, config=dict(
        bos_token="<s>", add_bos_token=True, added_tokens_decoder=ADDED)), marks=NEWER),
    "spm-not-legacy": pytest.param(dict(spm=SPM, config=NAMED | dict(
        add_bos_token=True, add_eos_token=True, legacy=False)), marks=NEWER),
    "spm-llama-class": dict(spm=SPM, config=LLAMA_CLASS | dict(
        add_bos_token=False, pad_token=PAD | {"__type": "AddedToken"})),
    "spm-llama-class-legacy": dict(spm=SPM, config=LLAMA_CLASS | dict(
        bos_token="<s>", legacy=True, add_bos_token=True, added_tokens_decoder=ADDED)),
    "spm-no-prefix": dict(spm=SPM, config=LLAMA_CLASS | dict(
        add_bos_token=False, add_prefix_space=False)),
    "spm-added-file": dict(
        spm=SPM, config=LLAMA_CLASS | dict(add_bos_token=False),
        added={"<tool>": 4097, "<|end|>": 4096},
        special=dict(eos_token={"content": "<|end|>", "lstrip": True})),
}


@pytest.mark.parametrize("files", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_are_read_as_transformers_reads_them(files, tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    ours, _ = same_as_transformers(tokenizer_at(tmp_path, **files))
    if "whole" in files:
        assert ours.prefix == ours.encode("")
        assert ours.prefix == [1] * (files["whole"]["post_processor"] is not None)


@pytest.mark.parametrize("name", ["tiny", "llama2", "mistral"])
def test_tokenizer_model_encodes_as_sentencepiece(name, tmp_path):
    path = SPM if name == "tiny" else SHARED / "tokenizers" / f"{name}.model"
    if not path.exists():
        pytest.skip("needs the project's shared test data")
    there = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer(tokenizer_at(tmp_path, spm=path))
    for text in [*AWKWARD[:5], *(read_text(ROOT / file) for file in ("README.md", "generate.py"))]:
        ids = there.encode(text)
        assert ours.encode(text) == [1] + ids and ours.decode([1] + ids) == text
    without = Tokenizer(tokenizer_at(tmp_path, spm=path, config=dict(add_bos_token=False)))
    assert without.prefix == [] and ours.encode("The sea") == [1] + without.encode("The sea")


def test_other_tokenizer_files_are_refused_in_one_line(tmp_path):
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the sea was calm", "the dog ran"] * 50), model_writer=unigram,
        vocab_size=30, hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "file").write_bytes(unigram.getvalue())
    for i, (says, files) in enumerate([
            ("only Llama's kind", dict(spm=tmp_path / "file")),
            ("if it is tiktoken's", dict(spm=TIKTOKEN)),
            ("not a file of the package", dict(whole=json.dumps(byte_level())[:999])),
            ("no tokenizer.json or tokenizer.model", {}),
            ("is malformed", dict(whole=byte_level(), config={"bos_token": {"id": 1}})),
            ("not a JSON object", dict(whole=byte_level(), config=[])),
            ("not a JSON file", dict(whole=byte_level(), added="{"))]):
        with pytest.raises(ValueError, match=says) as caught:
            Tokenizer(tokenizer_at(tmp_path / str(i), **files))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [dict(spm=SPM), dict(whole=byte_level())], ids=["spm", "json"])
def test_a_token_past_the_tokenizer_is_no_text(files, tmp_path, capsys):
    """Of a vocabulary padded beyond the tokenizer: an IndexError when such a token was sampled."""
    tokenizer = Tokenizer(tokenizer_at(tmp_path, **files))
    ids = tokenizer.encode("the sea")
    assert tokenizer.decode(ids[:-1] + [4100] + ids[-1:]) == "the sea"
    assert tokenizer.decode([4100]) == ""
    stream = generate.Streamer(tokenizer, ids)
    stream(0, 4100)
    stream.finish()
    assert capsys.readouterr().out == "\n"
def test_a_token_past_the_model_is_an_error_only_where_it_is_used(tmp_path):
    """One unused <pad> more than the model has embeddings was 'they do not belong together'."""
    content = byte_level()
    size = len(content["model"]["vocab"])
    content["added_tokens"].append(PAD | {"id": size, "content": "[PAD]"})
    tokenizer = Tokenizer(tokenizer_at(tmp_path, whole=content), size)
    assert max(tokenizer.encode("the sea")) < size
    with pytest.raises(ValueError, match=rf"'\[PAD\]', token {size}: .* vocabulary has {size}"):
        tokenizer.encode("the [PAD] sea")


@pytest.mark.parametrize("files", [dict(spm=SPM), dict(whole=BYTES_BOS)], ids=["spm", "json"])
def test_tokenizers_stream_what_they_decode(files, tmp_path, capsys):
    """Characters of several tokens come out whole, and the streamed pieces add up to the text."""
    tokenizer = Tokenizer(tokenizer_at(tmp_path, **files))
    text = "Two words, caf\u00e9 \u65e5\u672c \U0001f642 and " + "\U0001f642" * 40 + " 123."
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and tokenizer.decode(ids) == text
    # of whole characters up to there
    starts = [n for n in range(1, len(ids)) if not tokenizer.decode(ids[:n]).endswith("\ufffd")]
    for start in (1, starts[2], starts[len(starts) // 2]):
        stream, pieces = generate.Streamer(tokenizer, ids[:start]), []
        for token in ids[start:]:
            stream(0, token)
            stream(0, 2)  # a special token
            pieces.append(capsys.readouterr().out)
        stream.finish()
        assert "\ufffd" not in "".join(pieces) and max(map(len, pieces)) < 8
        whole = generate.new_tokens_text(tokenizer, ids[:start], ids[start:])
        assert "".join(pieces) + capsys.readouterr().out == whole + "\n"


TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and message.role != 'system' %}<s>
Be brief.</s>
{% endif %}{{ '<s>' + message['role'] + '\\n' + message.content + '</s>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}""",
    "inst": """{{ bos_token }}{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('the user begins, then they take turns') }}
    {% endif %}
    {% if message.role == 'user' %}
        {{- '[INST] ' + message.content.strip() + ' [/INST]' -}}
    {% else %}
        {% generation %} {{ message.content.strip() ~ eos_token }}
{{- bos_token if not loop.last }}{% endgeneration %}
    {% endif %}
{% endfor %}""",
    "headers": """{%- set ns = namespace(turns=0) %}
{% if tools is none and documents is none %}{{- bos_token }}{% endif %}
{%- for message in messages if message.content is defined %}
{%- set ns.turns = ns.turns + 1 %}
    {{- '<pad>' + message['role'] + '<pad>\\n\\n' + message['content'] | trim + '</s>' }}
    {%- if ns.turns > 4 %}{% break %}{% endif %}
{%- endfor %}
{{- strftime_now('%Y') }} {{ messages[-1] | tojson }}
{%- if add_generation_prompt %}{{- '<pad>assistant<pad>\\n\\n' }}{% endif %}""",
}


SAID = ["Hello, caf\u00e9?", "One </b> \u201ctwo\u201d", "  And then? ", "3\n", "<unk>\U0001f642"]


def conversation(turns):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, SAID[: 2 * turns - 1])]


def their_chat(tokenizer, messages):
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.mark.parametrize("place", ["file", "config", "list"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("whole", [SPACES, BYTES_BOS], ids=["spaces", "bytes"])
def test_chat_gives_the_ids_of_apply_chat_template(whole, template, place, tmp_path):
    config = NAMED | dict(eos_token=PAD | {"__type": "AddedToken", "content": "</s>"})
    files, other = {"template": template} if place == "file" else {}, "not this one"
    config["chat_template"] = {"file": other, "config": template, "list": [
        {"name": "tool_use", "template": other}, {"name": "default", "template": template}]}[place]
    ours, there = same_as_transformers(tokenizer_at(tmp_path, whole=whole, config=config, **files))
    for turns in (1, 3):
        ids = ours.chat(conversation(turns))
        assert ids == their_chat(there, conversation(turns)) and len(ids) > 10 * turns


def checkpoint_at(path, **files):
    """The embedded checkpoint with other files for its tokenizer."""
    tokenizer_at(path, **files)
    for name in ("config.json", "model.safetensors", "channels.safetensors"):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(TINY / name)
    return path

BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('no\\nroles') }}", "the chat template fails: no roles"),
    "reads-a-file": ("{% include '{}/secret' %}", "no loader"),
    "syntax": ("{% for message in messages %}", "Unexpected end of template"),
    "python": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "changes-messages": ("{{ messages.append(1) }}", "SecurityError"),
    "endless": ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    "nothing": ("", "the prompt is empty"),
}


@pytest.mark.parametrize("template, says", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_bad_template_is_one_line_and_status_2(template, says, tmp_path):
    (tmp_path / "secret").write_text("secret")
    path = checkpoint_at(tmp_path / "checkpoint", spm=SPM,
                         template=template.replace("{}", str(tmp_path)))
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--device", "cpu", "--checkpoint", path, "--chat", "--prompt", "hello")
    refused_in_one_line(command("generate.py", *arguments), says)
    assert sorted(tmp_path.rglob("*")) == before


def turns(path, monkeypatch, lines, *more):
    """Runs --interactive -> of each line the token ids up to the answer, and the answer's."""
    found, cached, lines = [], [], iter(lines)

    def record(step, prompts, max_new_tokens, start, *rest, real=decode.generate):
        result = real(step, prompts, max_new_tokens, start, *rest)
        result.token_ids[0] += [2]  # as if the model had said </s> where it is no end
        cached[start:] = prompts[0]
        found.append((list(cached), result.token_ids[0]))
        cached.extend(result.token_ids[0])
        return result

    monkeypatch.setattr(generate, "generate", record)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, ""))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", "cpu", "--checkpoint", str(path),
                                      "--interactive", "--max_new_tokens", "5", *more])
    generate.main()
    return found


def test_interactive_takes_the_turns_of_the_template(tmp_path, monkeypatch):
    path = checkpoint_at(tmp_path / "checkpoint", whole=spaces_json(), config=NAMED,
                         template=TEMPLATES["inst"])
    there, messages = AutoTokenizer.from_pretrained(path), []
    lines = ["Once upon a time", "And then?", "And the sea?"]
    found = turns(path, monkeypatch, lines)
    assert len(found) == 3
    for line, (prompt, answer) in zip(lines, found):
        messages.append({"role": "user", "content": line})
        assert prompt == their_chat(there, messages)
        said = there.decode(answer, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": said})
def test_interactive_without_a_template_keeps_the_tokens(tmp_path, monkeypatch):
    """The text so far was tokenised again in each turn, without the special tokens in it."""
    path = checkpoint_at(tmp_path / "checkpoint", spm=SPM, template=TEMPLATES["inst"])
    lines = ["Once upon a time", "And then"]
    (first, answer), (second, _) = turns(path, monkeypatch, lines, "--no_chat_template")
    encode = Tokenizer(TINY).encode
    assert first == encode(lines[0])
    assert second == first + answer + encode("\n".join(lines))[len(first) :]


def test_generate_converts_and_calibrates_a_hugging_face_directory(tmp_path, monkeypatch, capsys):
    sizes = dict(vocab_size=4096, max_position_embeddings=256, num_hidden_layers=3)
    make_hf(tmp_path / "hf", LLAMA | sizes)
    shutil.copy(TINY / "tokenizer.model", tmp_path / "hf")
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", str(tmp_path / "hf"),
                                      "--prompt", "The sea", "--device", "cpu",
                                      "--max_new_tokens", "4"])
    for first in (True, False):
        generate.main()
        told = capsys.readouterr().err
        assert ("converted to" in told) == ("calibrating (once)" in told) == first


def test_rankings_in_the_authors_format(tmp_path):
    """A list per KV head is taken as it is, lists per query head by mean rank; what is no ranking
    is refused."""
    def load(lists):
        names = {f"model.layers.{i}.self_attn.qk_proj": lists for i in range(3)}
        (tmp_path / "ranking.json").write_text(json.dumps(names))
        config = random_model()[0].config
        return calibrate.load_rankings(tmp_path / "ranking.json", config)

    up, down = list(range(16)), list(range(16))[::-1]
    assert load([up, down]).tolist() == [[up, down]] * 3
    swapped = [1, 0, *up[2:]]
    ties = load([up, swapped, down, down])[0].tolist()
    assert sorted(ties[0][:2]) == [0, 1] and ties[0][2:] == up[2:] and ties[1] == down
    for lists in ([[7] * 16] * 2, [["a"] * 16] * 2, [up] * 3, [up[:-1]] * 2, [], 5, [[up]] * 2):
        with pytest.raises(ValueError, match="not channel rankings of this model"):
            load(lists)


def test_ranges_are_of_the_positions_of_a_cache():
    """From keys at the first 512 positions: mean and spread of both channels of each plane over
    8192, whose constant parts turn; over the first 512 alone they are others."""
    model, draw = random_model(max_positions=8192)[0], torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 8192, 16, generator=draw) + 3 * torch.randn(1, 2, 1, 16)
    rope = model.rope(torch.arange(8192)[None])
    turned = apply_rope(keys, *rope)
    first = turned[:, :, :512]
    sums = calibrate.channel_sums(first.repeat(1, 2, 1, 1), first, *(x[:, :, :512] for x in rope))
    constant, square = ((sums[name] / 512).float() for name in ("before_rope", "kk"))
    for positions, held in ((512, first[0]), (8192, turned[0])):
        turn = mean_turn(model.config, positions)
        mean, std = key_ranges(constant, square, *turn)
        spread = held.var(1).unflatten(1, (2, -1)).mean(1).sqrt().repeat(1, 2)
        torch.testing.assert_close(mean, held.mean(1), atol=0.2, rtol=0)
        torch.testing.assert_close(std, spread, atol=0.2, rtol=0.05)
    assert (first[0].mean(1) - turned[0].mean(1)).abs().max() > 1


def test_weights_of_planes_guess_what_is_left_out():
    """Of planes 0 and 1, which vary together, the one that is kept counts for both; planes that
    vary alone count as they are."""
    parts = torch.randn(5000, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    parts[:, 1] = parts[:, 0] / 2
    covariance = torch.cov(parts.T)[None]
    weights = calibrate.plane_weights(covariance, torch.tensor([[2, 0, 3, 1]]))[0].float()
    torch.testing.assert_close(weights[0, :2], torch.tensor([1.0, 0.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(weights[2], torch.tensor([1, 1.5, 1, 0]), atol=0.1, rtol=0)
    nothing = calibrate.plane_weights(torch.zeros(1, 4, 4), torch.arange(4)[None])[0]
    assert torch.equal(nothing, torch.ones(4, 4, dtype=torch.half).tril())
    for n in range(1, 5):  # as least squares has it
        kept = parts[:, [2, 0, 3, 1][:n]]
        guess = kept @ weights[n - 1, :n].double()
        best = kept @ torch.linalg.lstsq(kept, parts.sum(1)[:, None]).solution[:, 0]
        error, least = ((parts.sum(1) - x).square().mean() for x in (guess, best))
        assert error <= 1.01 * least + 1e-4
