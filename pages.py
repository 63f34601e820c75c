"""The pages' tables and picture, anew from results/*.jsonl.

Usage: python pages.py            all: the picture, and in README.md and results/README.md what
                                  stands between a line <!-- COMMAND --> and a line <!-- end -->,
                                  which is what the command prints
       python pages.py numbers    the README's three numbers, and where it loses
       python pages.py steps      its table of whole steps
       python pages.py picture    results/summary.svg alone (needs matplotlib)
"""
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

from cli import ArgumentParser, run_command, writing
from ds_attention import DSConfig
from generate import HERE

PAGES = "README.md", "results/README.md"
PICTURE = HERE / "results" / "summary.svg"
# model, sequences, tokens: where each of the three steps was measured, and where ds gains little
STEPS = [("Llama-2-7B", 1, 16384), ("Llama-2-7B", 4, 16384), ("Llama-2-7B", 1, 65536),
         ("Llama-2-7B", 14, 16384), ("Llama-2-7B", 1, 4096)]
# milliseconds of a step by gpt-fast's own files, measured once on the same kind of machine
GPT_FAST_S_OWN = {("Llama-2-7B", 1, 4096): 5.62, ("Llama-2-7B", 1, 16384): 7.34,
                  ("Llama-2-7B", 4, 16384): 12.63}
UNIFORM = 4  # bits of the attention rows with the paper's labels, beside those of the default
CHOICES = {"ds": "ds", "exact_topk": "exact scores", "paper": "the paper's labels",
           "quest": "Quest", "streaming": "first and newest tokens"}


def results(name):
    """The rows of a file of results, in the order in which they were measured."""
    lines = (HERE / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def newest_steps():
    """{(model, B, S): {mode: milliseconds}} of whole steps with the default configuration; of
    gpt-fast the faster of its own files and what bench.py has of it."""
    steps, dense_layers = {}, DSConfig.dense_layers
    for row in results("generate"):
        config = row.get("config") or {}
        if row.get("ms_per_step") and config.get("dense_layers", dense_layers) == dense_layers:
            shape = row["model"], row["B"], row["S"]
            steps.setdefault(shape, {})[row["mode"]] = row["ms_per_step"]
    for shape, own in GPT_FAST_S_OWN.items():
        ms = steps.get(shape, {})
        ms["gpt_fast"] = min(own, ms.get("gpt_fast", own))
    return steps


def steps_table():
    """Markdown: gpt-fast's step, ours with dense attention, ours with Double Sparsity."""
    lines = ["| model | sequences x tokens | gpt-fast | dense | ds | over gpt-fast | over dense |",
             "|---|---|---|---|---|---|---|"]
    found = newest_steps()
    for model, B, S in STEPS:
        ms = found.get((model, B, S), {})
        cells = [f"{ms[mode]:.2f} ms" if mode in ms else "-"
                 for mode in ("gpt_fast", "dense", "ds")]
        cells += [f"{ms[mode] / ms['ds']:.2f}x" if {mode, "ds"} <= set(ms) else "-"
                  for mode in ("gpt_fast", "dense")]
        lines.append(f"| {model} | {B} x {S} | {' | '.join(cells)} |")
    return "\n".join(lines)


def newest(name, **fields):
    """The newest row of a file of results with these values."""
    rows = [row for row in results(name)
            if all(row.get(field) == value for field, value in fields.items())]
    if not rows:
        raise ValueError(f"results/{name}.jsonl: no row with {fields}")
    return rows[-1]


def numbers():
    """Markdown: three results with their conditions, and where Double Sparsity loses."""
    shape = dict(B=4, S=65536, HQ=32, HKV=32)
    attention = [row for row in results("attention") if shape.items() <= row.items()
                 and row["label_bits"] != UNIFORM][-1]
    step, short = (newest_steps()["Llama-2-7B", 1, S] for S in (16384, 4096))
    smollm = dict(checkpoint="SmolLM2-135M-Instruct", data="wikitext2-test.raw")
    ds, exact = (newest("quality", task="perplexity", context=4096, budget="n=256", method=method,
                        **smollm) for method in ("ds", "exact_topk"))
    passkey = newest("quality", task="passkey", budget="1/16", method="ds", **smollm)

    def lost(row):
        return f"{100 * (row['score'] / row['dense_score'] - 1):.1f}%"

    gain, found = f"{short['dense'] / short['ds']:.2f}x", f"{passkey['score']:.0f}%"
    return "\n".join([
        f"- **{attention['speedup']:.1f}x** faster decode attention than the fastest dense kernel:",
        f"  {attention['ds_us']:.0f} us for {attention['dense_us']:.0f}; 4 sequences of 65,536 "
        "tokens, 32 heads of 128 channels, bf16.",
        f"- **{step['gpt_fast'] / step['ds']:.2f}x** faster decode steps than gpt-fast: "
        f"{step['ds']:.2f} ms for {step['gpt_fast']:.2f};",
        "  Llama-2-7B's shape, random weights, one sequence of 16,384 tokens, bf16.",
        f"- **{lost(ds)}** more perplexity: SmolLM2-135M-Instruct on WikiText-2, each token "
        "decoded",
        f"  from 256 of up to 4,096 tokens. Choosing them by exact scores costs {lost(exact)}.",
        "- **It does not pay** on short contexts, and loses needles in text. At one sequence of",
        f"  4,096 tokens a step is {gain} over dense. Passkeys hidden in WikiText-2 are found in "
        f"{found}",
        f"  of {passkey['n_items']} documents, by dense attention in {passkey['dense_score']:.0f}%."
    ])


def draw(speed, quality):
    """On two axes: speedup over the length of the context, perplexity over tokens attended."""
    curves = {}
    for row in results("attention"):
        if row.get("speedup") and row["label_bits"] != UNIFORM and row["HQ"] == row["HKV"]:
            name = f"attention, {row['B']} x {row['HQ']} heads"
            curves.setdefault(name, {})[row["S"]] = row["speedup"]
    for (model, B, S), ms in newest_steps().items():
        if {"dense", "ds"} <= set(ms) and model.startswith("Llama"):
            name = f"whole step of {model}, {B} sequence{'s' * (B > 1)}"
            curves.setdefault(name, {})[S] = ms["dense"] / ms["ds"]
    for name, points in curves.items():
        if len(points) > 1:
            style = "o--" if name.startswith("whole") else "o-"
            speed.plot(*zip(*sorted(points.items())), style, label=name)
    speed.axhline(1, color="gray", linewidth=0.8)
    speed.set(xscale="log", xlabel="tokens in the cache", ylim=(0, None),
              title="Times faster than the fastest dense step, one H200")
    lengths = sorted({S for points in curves.values() if len(points) > 1 for S in points})
    names = [f"{S // 1024}k" if S >= 1024 else str(S) for S in lengths]
    speed.set_xticks(lengths, names, minor=False)
    speed.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    speed.legend()

    for method, label in CHOICES.items():
        points = {}
        for row in results("quality"):
            if (row["task"], row["checkpoint"], row["data"], row["context"]) == (
                    "perplexity", "SmolLM2-135M-Instruct", "wikitext2-test.raw", 4096):
                if row["method"] == method:
                    points[row["mean_tokens"]] = row["score"] / row["dense_score"]
        if points:
            x, y = zip(*sorted(points.items()))
            quality.plot(x, y, "o-", label=label)
    quality.axhline(1, color="gray", linewidth=0.8)
    quality.set(xlabel="tokens attended, of 2,048 on average", xlim=(0, 300),
                     title="SmolLM2-135M, WikiText-2: perplexity over dense's")
    quality.legend()


def draw_picture():
    if not find_spec("matplotlib"):
        raise ValueError("the picture needs matplotlib: pip install matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "summary", "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(11, 4), layout="constrained")
    draw(*figure.subplots(1, 2))
    with writing(PICTURE) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def refresh(page):
    """Puts into a page what the commands named in it print."""
    def printed(block):
        arguments = shlex.split(block[1])
        if arguments[0] != "python":
            raise ValueError(f"{page}: {block[1]}: must begin with python")
        run = subprocess.run([sys.executable, *arguments[1:]], cwd=HERE, text=True,
                             capture_output=True)
        if run.returncode:
            raise ValueError(f"{page}: {block[1]}: {run.stderr.strip()}")
        return f"<!-- {block[1]} -->\n\n{run.stdout.strip()}\n\n<!-- end -->"

    path = HERE / page
    text = path.read_text(encoding="utf-8")
    blocks = re.compile(r"<!-- (python .*?) -->\n.*?<!-- end -->", re.DOTALL)
    with writing(path) as file:
        file.write_text(blocks.sub(printed, text), encoding="utf-8")


def main():
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("numbers", "steps", "picture"))
    what = parser.parse_args().what
    if what in ("numbers", "steps"):
        print(numbers() if what == "numbers" else steps_table())
        return
    draw_picture()
    for page in PAGES if what is None else ():
        print(f"{page}", file=sys.stderr)
        refresh(page)


if __name__ == "__main__":
    run_command(main)
