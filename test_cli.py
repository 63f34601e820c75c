"""Tests of the command lines: what generate.py says and writes, and that whatever cannot be is one
line of error, before any work, with nothing left behind.

    python -m pytest -q test_cli.py
"""
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from test_ds import (  # first: it sets Triton's interpreter where there is no GPU
    GPU, ROOT, TINY, command, edit_weights, refused_in_one_line
)

from safetensors.torch import load_file, save_file

import bench
import calibrate
import cli
from config import ModelConfig
import convert_hf
import eval as evaluation
import generate
import pages
import plan
from ds_attention import DSConfig
from labels import load_label_maps
from model import fingerprint, load_model
from tiny import train
from tokenizer import Tokenizer


# ---------------------------------------------------------------- cli.py


SCRIPTS = {"generate": generate, "calibrate": calibrate, "convert_hf": convert_hf,
           "eval": evaluation, "bench": bench, "pages": pages, "plan": plan, "train": train}


def parser_of(script, monkeypatch):
    """A script's ArgumentParser, filled."""
    def caught(self, *_):
        raise StopIteration(self)

    with monkeypatch.context() as patch, pytest.raises(StopIteration) as parser:
        patch.setattr(cli.ArgumentParser, "parse_args", caught)
        script.main()
    return parser.value.args[0]


def bad_values(action, tmp_path):
    """Values that an option of this type cannot have."""
    kind = action.type
    yield "" if kind is not Path else "a\0b"
    if isinstance(kind, cli.Number):
        yield from ("x", "1e999", "-1e999", "nan", str(2**64), str(-(2**64)))
        yield str(int(kind.high) + 1)
        if kind.low is not None:
            yield str(kind.low - 1)
    if isinstance(kind, (cli.InputFile, cli.OutputFile)):
        yield from (str(tmp_path), f"{tmp_path}/none/file", f"{tmp_path}/{'x' * 5000}", "a\0b")
    if action.choices:
        yield "none of them"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_refuses_what_it_cannot_be_in_one_line(name, tmp_path, monkeypatch, capsys):
    """Before any work: nothing is loaded, calibrated, measured or written."""
    parser = parser_of(SCRIPTS[name], monkeypatch)
    for module in (generate, evaluation, calibrate, convert_hf):
        for function in ("load_model", "open_checkpoint", "convert", "load"):
            monkeypatch.setattr(module, function, None, raising=False)
    required = [text for action in parser._actions if action.required
                for text in (*action.option_strings[:1], str(next(iter(action.choices or ["x"]))))]
    tried = 0
    for action in parser._actions:
        for value in bad_values(action, tmp_path) if action.nargs != 0 else ():
            option = [f"{action.option_strings[0]}={value}"] if action.option_strings else [value]
            rest = [] if action.required or not action.option_strings else required
            monkeypatch.setattr(sys, "argv", [name, *rest, *option])
            with pytest.raises(SystemExit) as end:
                cli.run_command(SCRIPTS[name].main)
            out, said = capsys.readouterr()
            assert end.value.code == 2 and not out, (option, said)
            assert said.startswith("error: ") and said.count("\n") == 1, (option, said)
            tried += 1
    assert tried > 1 and not list(tmp_path.iterdir())


def test_rows_without_git_have_no_commit(monkeypatch):
    """It was an error, at the first row of a benchmark, where git is not installed."""
    monkeypatch.setenv("PATH", "/none")
    assert cli.provenance("cpu")["commit"] == "unknown"


@pytest.mark.parametrize(
    "text", "16 8x4,48 48x2,8x4 0x4 8x3 3x4,10x2 8x4,4x2 4x4,4x4 8x".split())
def test_label_widths_that_cannot_be_are_refused(text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--label_bits", text])
    with pytest.raises(ValueError, match=f"label_bits={text}: must be 1, 2, 4, 8, or dims x bits"):
        generate.main()


def test_an_option_given_twice_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--seed", "0", "--seed", "1"])
    with pytest.raises(ValueError, match="--seed is given twice"):
        generate.parse_arguments()


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_writing_leaves_all_or_nothing(directory, tmp_path):
    path = tmp_path / "out[1]"
    if not directory:
        path.write_text("old")
    # of a process that was killed: there is no such number
    stale = tmp_path / f".out[1].{2**22 + 1}.tmp"
    stale.mkdir() if directory else stale.touch()
    with pytest.raises(KeyboardInterrupt), cli.writing(path, directory) as new:
        (new / "part" if directory else new).write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ([] if directory else ["out[1]"])
    assert directory or path.read_text() == "old"
    with cli.writing(path, directory) as new:
        (new / "part" if directory else new).write_text("new")
    assert (path / "part" if directory else path).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out[1]"]


def test_a_terminated_process_leaves_nothing(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    code = f"""if True:
        import cli, os, signal
        def main():
            with cli.writing({str(path)!r}) as new:
                new.write_text("new")
                os.kill(os.getpid(), signal.SIGTERM)
        cli.run_command(main)"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 128 + 15 and not run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and path.read_text() == "old"


def test_a_full_disk_leaves_a_file_of_rows_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    code = ("import cli, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
            f"cli.run_command(lambda: cli.append_json_lines({str(path)!r}, [{{'b': 'x' * 99}}]))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert cli.read_json_lines(path) == [{"a": 1}]
    with pytest.raises(OSError):
        cli.append_json_lines("/dev/full", [{"a": 1}])


@pytest.mark.parametrize("line", ['{"a": 1', "[1]", "7"], ids=["cut", "list", "number"])
def test_lines_that_are_no_rows_are_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + line)
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        cli.read_json_lines(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("damage", ["absent", "nan", "shape", "weights", "channel"])
def test_damaged_label_maps_are_refused(damage, tmp_path):
    config = ModelConfig.from_file(TINY / "config.json")
    shape = config.n_layers, config.n_kv_heads, config.head_dim
    maps = {"channels": torch.zeros(shape, dtype=torch.int32), "constant": torch.zeros(shape),
            "square": torch.ones(shape),
            "weights": torch.ones(*shape[:2], *2 * (config.head_dim // 2,))}
    if damage == "absent":
        del maps["square"]
    elif damage == "nan":
        maps["constant"][0, 0, 0] = math.nan
    elif damage == "weights":
        maps["weights"] = maps["weights"][..., :3].contiguous()
    elif damage == "shape":
        maps["square"] = maps["square"][:, :1].contiguous()
    else:
        maps["channels"][0, 0, 0] = config.head_dim
    save_file(maps, tmp_path / "maps", {"checkpoint": fingerprint(TINY / "model.safetensors")})
    with pytest.raises(ValueError, match="maps: its label maps are damaged; run calibrate.py"):
        load_label_maps(TINY, config, DSConfig(), tmp_path / "maps")


def test_label_maps_fit_so_many_positions():
    """All of the model's, if it is not said: what else a batch holds does not change them."""
    config = ModelConfig.from_file(TINY / "config.json")
    whole, least, same, beyond = (
        load_label_maps(TINY, config, DSConfig(), positions=n)[-1]
        for n in (None, 256, config.max_positions, 2 * config.max_positions))
    assert torch.equal(whole.lo, same.lo) and torch.equal(whole.lo, beyond.lo)
    assert torch.equal(whole.channels, least.channels)
    assert (whole.lo - least.lo).abs().max() > 0.1 * whole.step.mean()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["norm.weight"][3] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight has weights that are infinite or not a num"):
        load_model(tmp_path / "model", "cpu", torch.float32)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(monkeypatch, capsys):
    """What came of the answer stays in the conversation; a prompt not cached whole does not."""
    lines, seen = iter(["one", "two", "three", ""]), []

    def stopped(step, prompts, most, start, stream):
        seen.append((start, prompts[0]))
        if len(seen) < 3:
            for token in [50, 51][: len(seen) % 2 * 2]:
                stream(0, token)
            raise KeyboardInterrupt
        stream(0, 60)

    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(generate, "generate", stopped)
    tokenizer = Tokenizer(TINY, 8192)
    step = SimpleNamespace(cache=SimpleNamespace(max_seq_length=100))
    args = SimpleNamespace(no_chat_template=True, max_new_tokens=5, device="cpu")
    generate.converse(step, tokenizer, args)
    first = tokenizer.encode("one")
    assert seen[0] == (0, first)
    answered = [*first, 50, 51]  # K and V of the last token were not needed yet
    assert seen[1] == (len(answered) - 1, [51, *tokenizer.encode_line("two")])
    assert seen[2] == (len(answered) - 2, [*answered[-2:-1], *tokenizer.encode_line("three")])
    assert "Ctrl-C" in capsys.readouterr().err


# ---------------------------------------------------------------- command lines


def on_the_command_line(tmp_path, *arguments, script="generate.py", **more):
    """(what a run of generate.py writes as JSON, its stdout, its stderr)."""
    out = tmp_path / "out.json"
    run = command(script, "--device", "cpu", "--json", out, *arguments, **more)
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text()), run.stdout, run.stderr


def test_generate_writes_its_json_and_streams_text(tmp_path):
    prompts = "--prompt", "The sea was calm", "--prompt", "He said that", "--max_new_tokens", 8
    out, text, _ = on_the_command_line(tmp_path, *prompts)
    assert {"prompt_token_ids", "token_ids", "text", "prompts", "decode_tokens_per_s",
            "decode_tokens_per_s_per_sequence", "kv_cache_bytes", "label_cache_bytes",
            "peak_memory_bytes", "config", "dense_kv_bytes_per_step"} <= set(out)
    weights = sum(p.nbytes for p in load_model(TINY, "cpu", torch.float32).parameters())
    assert 0.5 * weights < out["bytes_per_step"] - out["kv_bytes_per_step"] <= weights
    assert 0 < out["ttft_ms"] < 1e3 * out["cold_start_s"]
    assert out["median_ms_per_token"] <= out["p99_ms_per_token"]
    assert [len(ids) for ids in out["token_ids"]] == [8, 8]
    assert all(words in text for words in out["text"])
    _, alone, told = on_the_command_line(tmp_path, *prompts[2:])
    assert alone.strip() == out["text"][1].strip() and "tokens/s" in told


def test_compare_shows_texts_and_figures_of_both(tmp_path):
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:1500]
    common = "--compare", "--dense_below", 0, "--max_new_tokens", 8, "--prompt", text[:800]
    out, shown, told = on_the_command_line(tmp_path, *common, "--n_tokens", 20, "--prompt", text)
    for b in range(2):
        dense, ours = (out["token_ids"][mode][b] for mode in ("dense", "ds"))
        n = out["first_difference"][b]
        assert dense == ours if n is None else dense[:n] == ours[:n] and dense[n] != ours[n]
        assert all(out["text"][mode][b] in shown for mode in ("dense", "ds"))
    assert out["kl"] > 1e-4 and f"{out['kl']:.6f} nats" in shown and told.count("tokens/s") == 2
    read = {mode: out[mode]["kv_bytes_per_step"] for mode in ("dense", "ds")}
    assert read["ds"] < read["dense"] == out["dense"]["dense_kv_bytes_per_step"]
    same, shown, _ = on_the_command_line(tmp_path, *common, "--n_tokens", 2000)
    assert abs(same["kl"]) < 1e-6 and "the same 8 tokens" in shown


def test_generation_ends_where_the_cache_is_full(tmp_path):
    prompt = "The sea was calm"
    n = len(Tokenizer(TINY).encode(prompt))
    asked_for = "--prompt", prompt, "--max_seq_length"
    out, _, _ = on_the_command_line(tmp_path, *asked_for, n + 3)
    assert len(out["token_ids"][0]) == 3
    run = command("generate.py", "--device", "cpu", *asked_for, n)
    refused_in_one_line(run, f"max_seq_length={n}: must be more than the {n} tokens")
    run = command("generate.py", "--device", "cpu", "--interactive", "--max_seq_length", n + 3,
                  input=f"{prompt}\nAnd then\n")
    assert run.returncode == 0 and f"the cache holds {n + 3}: a shorter" in run.stderr, run.stderr


def test_offload_on_the_command_line_says_the_same(tmp_path):
    text = (ROOT / "model.py").read_text(encoding="utf-8")[:900]
    common = ["--prompt", text, "--prompt", text[:500], "--n_tokens", 32, "--dense_below", 0,
              "--max_new_tokens", 5]
    ahead = ["--offload", "--prefetch_heads", 1]
    settings = {"plain": [], "tight": ahead, "roomy": [*ahead, "--resident_tokens", 100],
                "late": ["--offload"], "predicted": ["--offload", "--offload_mode", "predicted"]}
    found, told = {}, {}
    for name, more in settings.items():
        found[name], _, told[name] = on_the_command_line(tmp_path, *common, *more)
    plain, tight, roomy, late, predicted = found.values()
    assert plain["text"] == tight["text"] == roomy["text"] == late["text"]
    assert late["hit_rate"] < tight["hit_rate"] < roomy["hit_rate"] and late["agreement"] is None
    assert tight["pcie_bytes_per_step"] > roomy["pcie_bytes_per_step"] > 0
    assert "over PCIe per step" in told["tight"] and predicted["predicted_layers"] == 5
    assert "5 attended to what was predicted" in told["predicted"]
    assert tight["host_bytes"] == plain["kv_cache_bytes"] * 5 / 7
    sixteen = [*common, "--dtype", "bfloat16", "--offload"]
    packed, whole = (on_the_command_line(tmp_path, *sixteen, *more)[0]
                     for more in ([], ["--no_pack"]))
    assert packed["text"] == whole["text"] and packed["hit_rate"] == whole["hit_rate"]
    assert 0.751 < packed["pcie_bytes_per_step"] / whole["pcie_bytes_per_step"] < 0.8
    _, _, streamed = on_the_command_line(tmp_path, *common, "--offload", "--compare")
    assert streamed.count("over PCIe per step") == 2, "dense is streamed"


def test_demonstration_finds_its_fact(tmp_path):
    """As the README runs it, in a process of its own."""
    arguments = ["generate.py", "--device", "cpu", "--sparsity", "16", "--json", tmp_path / "out"]
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "the answer is right" in run.stderr, run.stderr
    out = json.loads((tmp_path / "out").read_text())
    live = len(out["prompt_token_ids"][0]) + 20  # in the middle of the answer
    assert 3800 < live <= 4020 and out["text"][0].strip() == run.stdout.strip()
    # fp32 K and V of N tokens, and labels, in five of seven layers
    share = (live / 16 * 2 * 128 * 4 + live * 16) / (live * 2 * 128 * 4)
    expected = (2 + 5 * share) / 7
    found = out["kv_bytes_per_step"] / out["dense_kv_bytes_per_step"]
    assert found == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Directories with one thing wrong each."""
    tmp_path = tmp_path_factory.mktemp("damaged")

    def copy(name, **config):
        leave = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(TINY, tmp_path / name, ignore=leave)
        keys = json.loads((TINY / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(keys | config))
        return tmp_path / name

    path = copy("truncated") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    copy("foreign", architectures=["GPT2LMHeadModel"], model_type="gpt2")
    copy("shape", num_hidden_layers=8)
    edit_weights(copy("channels"), lambda tensors: tensors["norm.weight"].add_(1))
    hashed = {"checkpoint": fingerprint(TINY / "model.safetensors")}
    save_file({"basis_k": torch.zeros(1)}, copy("older") / "channels.safetensors", hashed)
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    return tmp_path


HELLO = ["--prompt", "hello", "--dense_below", "0"]
BAD_INPUT = {
    "missing": (["--checkpoint", "{}/nothing"], "no such directory"),
    "truncated": (["--checkpoint", "{}/truncated"], "truncated"),
    "foreign": (["--checkpoint", "{}/foreign"], "architecture GPT2LMHeadModel"),
    "shape": (["--checkpoint", "{}/shape"], "missing, unexpected or of another shape"),
    "channels": (["--checkpoint", "{}/channels"], "run calibrate.py"),
    "older": (["--checkpoint", "{}/older"], "older form; run calibrate.py"),
    "too-long": (["--prompt", "hello", "--max_new_tokens", "9000"], "8192 positions"),
    "empty": (["--prompt", ""], "prompt is empty"),
    "sparsity-0": (["--sparsity", "0"], "sparsity=0.0: must be at least 1"),
    "sparsity-word": (["--sparsity", "much"], "invalid float value: 'much'"),
    "n-0": (["--n_tokens", "0"], "n_tokens=0: must be at least 1"),
    "dense-below": (["--dense_below", "-1"], "dense_below=-1: must be at least 0"),
    "compare-dense": (["--compare", "--sparsity", "1", "--prompt", "x"], "sets sparse against"),
    "resident-few": ([*HELLO, "--offload", "--resident_tokens", "9"],
                     "resident_tokens=9: must be at least 128"),
    "resident-alone": (["--resident_tokens", "9"], "without --offload"),
    "prefetch-alone": (["--prefetch_heads", "9"], "prefetch_heads=9: without --offload"),
    "pack-alone": (["--no_pack"], "no_pack=True: without --offload"),
    "agreement": ([*HELLO, "--offload", "--min_agreement", "-1"], "=-1.0: must be at least 0"),
    "predicted-dense": ([*HELLO, "--offload", "--sparsity", "1", "--offload_mode", "predicted"],
                        "nothing is selected with --sparsity 1"),
    "offload-none": ([*HELLO, "--offload", "--dense_layers", "7"],
                     "dense_layers=7: of 7 layers none is left"),
    "no-template": (["--chat", "--prompt", "x"], "has no chat template; leave out --chat"),
    "chat-alone": (["--chat"], "--chat: needs a --prompt"),
    "interactive-chat": (["--interactive", "--chat"], "leave out"),
    "template-alone": (["--no_chat_template", "--prompt", "x"], "only --interactive"),
    "not-utf8": (["--prompt_file", "{}/latin1.txt"], "not UTF-8"),
    "no-file": (["--prompt_file", "{}/absent.txt"], "No such file"),
    "no-gpu": pytest.param(["--device", "cuda"], "no GPU",
                           marks=pytest.mark.skipif(GPU, reason="there is a GPU")),
}


@pytest.mark.parametrize("arguments, message", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(arguments, message, damaged):
    before = sorted(damaged.rglob("*"))
    run = command("generate.py", *(argument.format(damaged) for argument in arguments))
    refused_in_one_line(run, message)
    assert sorted(damaged.rglob("*")) == before


def test_more_tokens_than_there_are_means_dense_and_says_so(tmp_path):
    arguments = "--prompt", "The sea", "--max_new_tokens", 3, "--n_tokens", 500
    said = on_the_command_line(tmp_path, *arguments)[2]
    assert "All tokens are attended, as there are at most 6" in said


def test_odd_lines_of_books_are_refused(tmp_path):
    for line in ('{"text": 7}', "[1]", '{"title": "x"}', "{"):
        with lzma.open(tmp_path / "books-train-0.jsonl.xz", "wt") as file:
            file.write(line)
        with pytest.raises(ValueError, match="books-train-0.jsonl.xz: damaged"):
            list(train.read_books(tmp_path))


def test_bench_alone_gives_a_tour(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu"])
    bench.main()
    out, said = capsys.readouterr()
    assert all(f"bench.py {name} " in out for name in bench.BENCHES) and out.count("\n\n|") >= 3
    assert "times say nothing" in said
    monkeypatch.setattr(sys, "argv", ["bench.py", "--steps", "3"])
    with pytest.raises(ValueError, match="what: invalid choice: '3'"):
        bench.main()


@pytest.mark.parametrize("arguments", [
    ["generate"], ["offload"], ["offload", "--checkpoint", TINY]
], ids=["generate", "offload", "checkpoint"])
def test_benchmarks_leave_a_layer_sparse(arguments, monkeypatch):
    """The table said of offloading that memory was too small, where no layer was left for it."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments), "--device", "cpu",
                                      "--dense_layers", "2", "7"])
    with pytest.raises(ValueError, match="dense_layers=7: of . layers none is left to be sparse"):
        bench.main()


@pytest.mark.parametrize("arguments, message", [
    ("attention --budgets 3", "unrecognized arguments: --budgets 3"),
    ("table attention --shapes 1x1", "unrecognized arguments: --shapes 1x1"),
    ("attention offload", "unrecognized arguments: offload"), ("table", "required: of"),
    ("generate --modes flexgen", "modes: invalid choice: 'flexgen'"),
    ("offload --steps 1", "steps=1: must be at least 2")])
def test_what_a_benchmark_has_no_use_for_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(ValueError, match=message):
        bench.main()


def test_rows_go_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}')  # an editor left out the last line's end
    cli.append_json_lines(path, [{"b": "\u2028"}])
    assert cli.read_json_lines(path) == [{"a": 1}, {"b": "\u2028"}]


def test_what_a_killed_process_of_the_same_number_left_is_replaced(tmp_path):
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    with cli.writing(tmp_path / "out", directory=True) as new:
        (new / "part").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
