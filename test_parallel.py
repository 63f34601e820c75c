"""Tests of several processes that share a model, started by torchrun: gloo's on a CPU, and where
there are two GPUs, theirs. Each start takes seconds, so that one answers for many cases.

What is held against what: the processes' tokens against one process's.
"""
import functools
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from safetensors.torch import save_file

import parallel
from cli import run_command, writing
from config import ModelConfig
from decode import DecodeStep, forced_logits, generate
from ds_attention import DSConfig
from labels import load_label_maps
from model import KVCache, fingerprint, load_model, parameter_shapes
from offload import OffloadCache
from tokenizer import Tokenizer, builtin_text

ROOT = Path(__file__).resolve().parent
LLAMA = dict(model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=96,
             eos_token_id=None)
MODELS = {
    "llama": LLAMA,
    "tied-odd-vocabulary": LLAMA | dict(tie_word_embeddings=True, vocab_size=99),
    "qwen2": LLAMA | dict(model_type="qwen2"),  # bias on q, k and v
    "mixtral": LLAMA | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "8-kv-heads": LLAMA | dict(num_attention_heads=16, num_key_value_heads=8, head_dim=8),
}
# number of processes: (model, quantize, how: the decode step's kernels, interpreted, or offload)
RUNS = {2: [("llama", None, ""), ("llama", "int8", ""), ("llama", None, "kernels"),
            ("llama", None, "offload"), ("tied-odd-vocabulary", None, ""), ("qwen2", None, ""),
            ("mixtral", None, ""), ("mixtral", "int8", ""), ("mixtral", None, "kernels")],
        8: [("8-kv-heads", None, "")]}
DS = DSConfig(min_tokens=20, dense_layers=1, dense_below=0, recent=8)
LENGTHS, NEW, INTERPRETED = (60, 45), 8, 2  # prompts; new tokens, and of interpreted kernels


def make_checkpoint(directory, content):
    """A random model and random label maps, in our form."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content))
    config = ModelConfig.from_dict(content)
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) * 0.3
               for name, shape in parameter_shapes(config).items()},
              directory / "model.safetensors")
    shape = config.n_layers, config.n_kv_heads, config.head_dim
    maps = {"channels": torch.rand(shape, generator=generator).argsort(-1).int(),
            "constant": torch.zeros(shape), "square": 1 + torch.rand(shape, generator=generator),
            "weights": torch.ones(*shape[:2], *2 * (config.head_dim // 2,))}
    save_file(maps, directory / "channels.safetensors",
              {"checkpoint": fingerprint(directory / "model.safetensors")})


def greedy(directory, quantize, how):
    """Tokens that follow random prompts, [dense's, ds's], by all processes of this run."""
    model = load_model(directory, "cpu", torch.float32, quantize, parallel.size())
    if how == "kernels":
        model.decode = partial(model.decode, impl="triton")
    prompts = [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)).tolist()
               for n in LENGTHS]
    found, new = [], INTERPRETED if how == "kernels" else NEW
    cache_type = OffloadCache if how == "offload" else KVCache
    for ds in (None, DS):
        maps = load_label_maps(directory, model.config, ds) if ds else None
        cache = cache_type(model.config, len(prompts), max(LENGTHS) + new, "cpu", torch.float32,
                           ds, maps)
        found.append(generate(DecodeStep(model, cache), prompts, new).token_ids)
    return found


def forced(device):
    """Logits [512, vocab] of steps through a text, [dense's, ds's], by the tiny model in bf16."""
    tiny, n = ROOT / "tiny", 512
    config = parallel.share(ModelConfig.from_file(tiny / "config.json"), parallel.size())
    model = load_model(tiny, device, torch.bfloat16, None, parallel.size())
    ids = Tokenizer(tiny, config.vocab_size).encode(builtin_text())[:4096]
    prompts, texts, found = [ids[:-n]], [ids[-n:]], []
    for ds in (None, DSConfig(dense_below=0)):
        maps = load_label_maps(tiny, config, ds) if ds else None
        step = DecodeStep(model, KVCache(config, 1, len(ids), device, torch.bfloat16, ds, maps))
        model.prefill([prompts[0][:-1]], step.cache)
        found.append(torch.cat([x.clone() for x in forced_logits(step, prompts, texts)]))
    return found


def shared_peers(path, ranks, rows, dim, device):
    """parallel.peers without GPUs: in memory that processes share as a file."""
    if ranks == 1:
        return None
    blocks = -(-dim // parallel.Peers.BLOCK)
    shape = 2, ranks, rows * blocks * parallel.Peers.BLOCK
    slots = [torch.from_file(f"{path}-{rank}", True, 2 * ranks * shape[2],
                             dtype=torch.int64).view(shape) for rank in range(ranks)]
    parallel.barrier()
    return parallel.Peers(slots)


def worker():
    """What torchrun starts: the runs of so many processes, into a file."""
    what, directory = sys.argv[1], Path(sys.argv[2])
    parallel.connect("cuda" if what == "forced" else "cpu")
    if what == "forced":
        found = [logits.argmax(-1).tolist() for logits in forced("cuda")]
    else:
        found = []
        for i, (model, *how) in enumerate(RUNS[parallel.size()]):
            parallel.peers = functools.cache(partial(shared_peers, directory / f"memory-{i}"))
            found.append(greedy(directory / model, *how))
    with writing(directory / f"{what}-{parallel.size()}.json") as file:
        file.write_text(json.dumps(found))


def started(ranks, *command):
    """A run of so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    interpret = "0" if "forced" in command else "1"  # all others run on a CPU
    return subprocess.Popen(
        [sys.executable, *torchrun * (ranks > 1), *map(str, command)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret})


def finished(ranks, *command, status=0):
    """(stdout, stderr) of a run to its end."""
    process = started(ranks, *command)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, content in MODELS.items():
        make_checkpoint(directory / name, content)
    return directory


@pytest.mark.parametrize("ranks", RUNS)
def test_processes_give_one_process_s_greedy_tokens(ranks, checkpoints):
    """Dense and ds: heads, feed-forward, experts, vocabulary and label maps in parts; int8 with one
    process's scales; the decode step's kernels and K and V in host memory give what one process's
    reference does."""
    finished(ranks, "test_parallel.py", "greedy", checkpoints)
    found = json.loads((checkpoints / f"greedy-{ranks}.json").read_text())
    for run, tokens in zip(RUNS[ranks], found, strict=True):
        model, quantize, how = run
        wanted = greedy(checkpoints / model, quantize, "")
        assert wanted[0] != wanted[1], "ds must leave something out"
        if how == "kernels":
            wanted = [[ids[:INTERPRETED] for ids in of_mode] for of_mode in wanted]
        assert tokens == wanted, run


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_give_one_gpu_s_likeliest_tokens(tmp_path):
    """In 99% of the steps; of logits as near as neighbours in bf16 any is the likeliest."""
    finished(2, "test_parallel.py", "forced", tmp_path)
    for tokens, logits in zip(json.loads((tmp_path / "forced-2.json").read_text()), forced("cuda")):
        best = logits.float().amax(-1)
        theirs = logits.float()[range(len(tokens)), tokens]
        assert (theirs >= best - best.abs() / 128).float().mean() >= 0.99


def lines_of(err):
    """Ours on stderr, not torchrun's."""
    return [line for line in err.splitlines() if line.startswith("error: ")]


def test_the_command_line_speaks_once(tmp_path):
    """Text, statistics and files come from rank 0 alone."""
    found = []
    for ranks in (1, 2):
        out, err = finished(ranks, "generate.py", "--prompt", "Once upon a time", "--device", "cpu",
                            "--max_new_tokens", 5, "--json", tmp_path / f"{ranks}.json")
        found.append((out, json.loads((tmp_path / f"{ranks}.json").read_text())))
    assert err.count("time to first token") == 1 and "processes            2" in err
    (one, of_one), (two, of_two) = found
    assert one == two != "" and of_one["token_ids"] == of_two["token_ids"]
    assert of_two["kv_cache_bytes"] * 2 == of_one["kv_cache_bytes"]


@pytest.mark.parametrize("ranks, command, message", [
    (3, ["generate.py", "--prompt", "a"], "nproc_per_node=3: must divide the model's 4 KV heads"),
    (2, ["calibrate.py"], "calibrate.py runs as one process"),
])
def test_what_cannot_be_shared_is_one_line(ranks, command, message):
    out, err = finished(ranks, *command, "--device", "cpu", status=1)
    assert out == "" and len(lines_of(err)) == 1 and message in lines_of(err)[0], err


def children(pid):
    """{rank: process id} of what torchrun started."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {}
    for child in pids:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(x[5:]): int(child) for x in environment if x.startswith(b"RANK=")}
    return ranks


def test_a_killed_rank_ends_the_run():
    process = started(2, "generate.py", "--prompt", "Once upon a time", "--max_new_tokens", 8000,
                       "--device", "cpu")
    assert process.stdout.read(1)  # it is under way
    ranks = children(process.pid)
    os.kill(ranks[1], 9)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - began < 60
    assert lines_of(err) == ["error: another process of this run has ended"], err
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_quality_and_speed_run_in_parts(tmp_path):
    """eval.py's scores are one process's, in one row; bench.py's rows say how many GPUs."""
    rows = []
    for ranks in (1, 2):
        finished(ranks, "eval.py", "perplexity", "--context", 200, "--limit", 1, "--device", "cpu",
                 "--n_tokens", 64, "--results", tmp_path / f"{ranks}.jsonl", "--force")
        text = (tmp_path / f"{ranks}.jsonl").read_text()
        rows.append([json.loads(line) for line in text.splitlines()])
    assert len(rows[0]) == len(rows[1]) == 2
    for one, two in zip(*rows):
        for name in ("score", "mean_tokens", "kl"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)
        assert two["gpus"] == 2 and "gpus" not in one
    out, _ = finished(2, "bench.py", "generate", "--device", "cpu", "--modes", "dense", "ds",
                      "--steps", 3)
    assert out.count("tiny, 2 GPUs") == 1


if __name__ == "__main__":
    run_command(worker, several=True)
