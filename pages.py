"""Rows of results as tables, and the pages' tables and picture, anew from results/*.jsonl.

Usage: python pages.py            all: the picture, and in README.md and results/README.md what
                                  stands between a line <!-- COMMAND --> and a line <!-- end -->,
                                  which is what the command prints
       python pages.py numbers    the README's three numbers, and where it loses
       python pages.py steps      its table of whole steps
       python pages.py gpus       whole steps on several GPUs, beside one's
       python pages.py picture    results/summary.svg alone (needs matplotlib)
"""
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

from cli import HERE, ArgumentParser, bits_of, read_json_lines, run_command, writing
from ds_attention import DSConfig, dims_in

RESULTS = HERE / "results"

# ---------------------------------------------------------------- rows


def attention_setting(r):
    return [r[key] for key in ("gpu", "B", "S", "HQ", "HKV", "D", "dtype", "label_channels",
                               "label_bits", "n_tokens")]


def generate_setting(r):
    mode = mode_name(r) if r["mode"].startswith("ds") else r["mode"]
    return [*(r[key] for key in ("gpu", "model", "B", "S", "dtype")), mode, r.get("compiled"),
            r.get("gpus", 1)]


def offload_setting(r):
    return [*(r[key] for key in ("gpu", "model", "data", "B", "S", "dtype")), mode_name(r)]


# What a row measures: a newer one of the same replaces it.
SETTINGS = {"attention": attention_setting, "generate": generate_setting,
            "offload": offload_setting}


def newest_rows(name):
    """The last row of each setting in a bench's results file, in the order they first came in."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: no results yet; run bench.py {name} first")
    rows = {}
    for row in read_json_lines(path):
        if row.get("bench") != name:
            raise ValueError(f"{path}: has lines that are not rows of bench.py {name}")
        rows[json.dumps(SETTINGS[name](row))] = row
    return list(rows.values())


# ---------------------------------------------------------------- tables of bench.py


def labels_name(r):
    """A row's label dims and their bits, for people."""
    bits = r["label_bits"]
    return f"{bits} bit" if isinstance(bits, str) else f"{r['label_channels']} x {bits} bit"


def attention_table(rows):
    """Rows of results/attention.jsonl -> Markdown. Times in microseconds."""
    lines = ["| B, S | HQ/HKV | labels | sdpa | cudnn | flash | dense best | ours | bracket "
             "alone | speedup | clustered | tokens attended | GB/s | byte limit |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]

    def us(value):
        return "-" if value is None else f"{value:.0f}"

    for r in rows:
        speedup = f"{r['speedup']:.1f}x" if "speedup" in r else "CPU"
        limit = (f"{r['limit_us']:.0f} ({r['limit_us'] / r['ds_us']:.0%})"
                 if "limit_us" in r else "-")
        dense = " | ".join(us(r.get(f"{name}_us")) for name in ("sdpa", "cudnn", "flash", "dense"))
        attended = f"{r['attended']:.0f} of {r['n_tokens']}" if r.get("attended") else r["n_tokens"]
        lines.append(f"| {r['B']}, {r['S']} | {r['HQ']}/{r['HKV']} | {labels_name(r)} | {dense} | "
                     f"{us(r['ds_us'])} | {us(r.get('bracket_us'))} | {speedup} | "
                     f"{us(r.get('clustered_us'))} | {attended} | "
                     f"{r['bytes'] / r['ds_us'] / 1e3:.0f} | {limit} |")
    return "\n".join(lines)


def mode_name(r):
    """A row's mode, and what else tells it from others of its shape."""
    layers = f", {r['config']['dense_layers']} dense layers" if r["config"] else ""
    resident = f", {r['resident_tokens']} resident" if r.get("resident_tokens") else ""
    ahead = (f", {r['prefetch_heads']} head{'s' * (r['prefetch_heads'] > 1)} ahead"
             if r.get("prefetch_heads") else "")
    rows = ""  # of K and V in host memory: packed is what offload does, and what FlexGen does not
    if r["mode"].startswith("offload") and not r.get("packed"):
        rows = ", not packed"
    if r["mode"] == "flexgen" and r.get("packed"):
        rows = ", packed"
    return r["mode"] + layers + resident + ahead + rows


def refusal(r):
    """Why a row has no time, in a word or two; its error says which bytes or values."""
    if r["error"].startswith("wrong"):
        return "wrong"
    return "does not fit" if "memory" in r["error"] else "refused"


def model_name(r):
    """A row's model, and how many GPUs shared it."""
    return r["model"] + (f", {r['gpus']} GPUs" if "gpus" in r else "")


def generate_table(rows):
    """Rows of results/generate.jsonl -> Markdown: a line for each shape and kind of weights, then
    one for each prefill."""
    lines, shapes, prefills, modes = [], {}, [], dict.fromkeys(["gpt_fast", "dense"])
    for r in rows:
        mode, int8, _ = r["mode"].partition("_int8")
        if mode == "prefill":
            prefills.append(r)
            continue
        line = model_name(r), f"{r['B']}, {r['S']}", "int8" if int8 else r["dtype"]
        mode = mode_name(r | {"mode": mode})
        shapes.setdefault(line, {})[mode] = r
        modes.setdefault(mode)

    def cell(row, name, form, unit=""):
        value = (row or {}).get(name)
        return "-" if value is None else f"{value:{form}}{unit}"

    modes = [mode for mode in modes if any(mode in found for found in shapes.values())]
    references = [mode for mode in modes if mode in ("gpt_fast", "dense")]
    if shapes:
        heads = ["model", "B, S", "weights", *modes, *(f"ds over {mode}" for mode in references),
                 "tokens/s", "bandwidth, of a copy's (of the datasheet's): dense", "ds", "peak GiB"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (*line, weights), found in shapes.items():
        ds = next((row for row in found.values() if row["config"]), None)  # the default comes first
        over = {"gpt_fast": "gpt_fast", "dense": "dense_int8" if weights == "int8" else "dense"}
        cells = [*line, weights]
        cells += [refusal(found[mode]) if "error" in found.get(mode, {})
                  else cell(found.get(mode), "ms_per_step", ".2f", " ms") for mode in modes]
        for mode in references:  # of one run where it has both, else by the newest rows
            name, times = f"speedup_vs_{over[mode]}", [ds, found.get(mode)]
            if all(row and row.get("ms_per_step") for row in times) and ds.get(name) is None:
                ds = ds | {name: found[mode]["ms_per_step"] / ds["ms_per_step"]}
            cells.append(cell(ds, name, ".2f", "x"))
        cells.append(cell(ds, "tokens_per_s", ".0f"))
        cells += [f"{cell(row, 'bandwidth_share', '.0%')} ({cell(row, 'datasheet_share', '.0%')})"
                  for row in (found.get("dense"), ds)]
        lines.append(f"| {' | '.join(cells)} | {cell(ds, 'peak_gib', '.1f')} |")
    if prefills:
        lines += ["", "| model | B, S | prefill, s | tokens/s | process start to first token, s | "
                  "peak GiB |", "|---" * 6 + "|"]
    for r in prefills:
        seconds = refusal(r) if "error" in r else f"{r['prefill_s']:.2f}"
        rate = "-" if "error" in r else f"{r['B'] * r['S'] / r['prefill_s']:.0f}"
        kind = ", int8" * r["mode"].endswith("_int8") + ", compiled" * r["compiled"]
        lines.append(f"| {model_name(r)}{kind} | {r['B']}, {r['S']} | {seconds} | {rate} | "
                     f"{cell(r, 'cold_start_s', '.1f')} | {cell(r, 'peak_gib', '.1f')} |")
    return "\n".join(lines).strip()


OFFLOAD_COLUMNS = [
    "model", "B, S", "mode", "ms per step", "tokens/s", "over flexgen", "over flexgen, packed",
    "PCIe: MB per step", "of it ahead", "GB/s, of a gather's or copy's", "tokens on the GPU",
    "agreement", "rows not packed", "same tokens, logits as gpu", "GPU GiB: K and V",
    "labels, maps", "host GiB"]


def offload_table(rows):
    """Rows of results/offload.jsonl -> Markdown."""
    lines = [f"| {' | '.join(OFFLOAD_COLUMNS)} |", "|---" * len(OFFLOAD_COLUMNS) + "|"]
    for r in rows:
        def cell(name, form, unit="", scale=1, r=r):
            return "-" if r.get(name) is None else f"{r[name] / scale:{form}}{unit}"

        alone = r.get("pcie_gather_gbps") or r.get("pcie_copy_gbps")
        share = f" ({r['pcie_gbps'] / alone:.0%} of {alone:.1f})" if alone else ""
        error = f", {r['logit_error']:.0e}" if "logit_error" in r else ""
        maps = r.get("gpu_label_bytes", 0) + r.get("slot_map_bytes", 0)
        cells = [
            r["model"] + (f", {r['data']}" if r.get("data") else "")
            + (" (CPU reference)" if "CPU" in r["gpu"] else ""),
            f"{r['B']}, {r['S']}", mode_name(r),
            refusal(r) if "error" in r else cell("ms_per_step", ".2f"),
            cell("tokens_per_s", ".1f"), cell("speedup_vs_flexgen", ".1f", "x"),
            cell("speedup_vs_flexgen_packed", ".1f", "x"),
            cell("pcie_bytes_per_step", ".1f", scale=1e6),
            cell("prefetched_bytes_per_step", ".1f", scale=1e6), cell("pcie_gbps", ".1f") + share,
            cell("hit_rate", ".0%"), cell("agreement", ".0%"),
            cell("as_is", ".1%") if r.get("packed") else "-",
            {None: "-", True: "yes", False: "no"}[r.get("same_tokens")] + error,
            cell("gpu_kv_bytes", ".2f", scale=2**30), f"{maps / 2**30:.2f}",
            cell("host_bytes", ".1f", scale=2**30)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"attention": attention_table, "generate": generate_table, "offload": offload_table}


# ---------------------------------------------------------------- tables of eval.py


def by(name):
    """A cell of scores by task, length or depth."""
    def found(row):
        scores = row[f"by_{name}"].items()
        return ", ".join(f"{key}: {score:.0f}" for key, score in scores) or "-"
    return found


CHOSEN = {"method": "{method}", "budget": "{budget}", "tokens": "{mean_tokens:.0f}"}
LABELS = {"labels": lambda row: " of ".join(filter(None, (row["labels"], row.get("channels")))),
          "dense layers": "{config[dense_layers]}"}
# {heading: what makes a row's cell}, of text and of answers. Where a row lacks a field it has a
# "-"; a column of nothing else is left out.
TEXT = {"text": "{data}", "context": "{context}", "last": "{last}"} | CHOSEN | {
    "perplexity": "{score:.3f}",
    "over dense": lambda row: f"{row['score'] / row['dense_score']:.4f}",
    "KL": "{kl:.4f}", "same likeliest": "{top1:.1f}%", "attention kept": "{mass:.1%}",
    "windows": "{n_items}"} | LABELS
ANSWERS = {"task": "{task}", "items": "{data}", "tokens of items": "{context}"} | CHOSEN | {
    "right": "{score:.1f}%", "dense": "{dense_score:.1f}%", "number": "{n_items}",
    "% by length": by("length"), "% by task": by("task"), "% by depth": by("depth")} | LABELS


def metrics(name):
    """A cell of lm-eval's metrics, in its own units."""
    return lambda row: ", ".join(f"{key} {value:.4g}" for key, value in row[name].items())


HARNESS = {"task of lm-eval": "{data}", "context": "{context}"} | CHOSEN | {
    "found": metrics("metrics"), "dense": metrics("dense_metrics"),
    "standard error": metrics("stderr"), "items": "{n_items}", "cut to context": "{cut}"} | LABELS
COLUMNS = {"perplexity": TEXT, "lm_eval": HARNESS}  # of other tasks ANSWERS


def cell(row, column):
    """What a row has in a column: a format or a function."""
    try:
        return column(row) if callable(column) else column.format(**row)
    except (KeyError, TypeError):  # the row has no such field, or None there
        return "-"


def quality_table(rows):
    """Rows -> Markdown: by model, tiny last, and of each those of one text and context together."""
    models = {}
    for row in sorted(rows, key=lambda row: row["checkpoint"] == "tiny"):
        models.setdefault(row["checkpoint"], []).append(row)
    parts = []
    for name, found in models.items():
        said = [", ".join(dict.fromkeys(row[field] for row in found))
                for field in ("model", "gpu", "torch", "triton", "commit")]
        days = sorted(row["date"] for row in found)
        parts.append("**{}**, {}: {}, torch {}, triton {}, commits {}, {} to {}".format(
            name, *said, days[0], days[-1]))
        for columns in (TEXT, ANSWERS, HARNESS):
            groups = {}
            for row in found:
                if COLUMNS.get(row["task"], ANSWERS) is columns:
                    key = [row.get(x) for x in ("task", "data", "context", "last", "n_items")]
                    groups.setdefault(str(key), []).append(row)
            cells = [[cell(row, column) for column in columns.values()]
                     for group in groups.values() for row in group]
            shown = [i for i in range(len(columns)) if any(row[i] != "-" for row in cells)]
            lines = [list(columns), ["---"] * len(columns), *cells]
            if cells:
                lines = [f"| {' | '.join(line[i] for i in shown)} |" for line in lines]
                parts.append("\n".join(lines))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the README's tables and picture

PAGES = "README.md", "results/README.md"
PICTURE = RESULTS / "summary.svg"
# model, sequences, tokens: where each of the three steps was measured, and where ds gains little
STEPS = [("Llama-2-7B", 1, 16384), ("Llama-2-7B", 4, 16384), ("Llama-2-7B", 1, 65536),
         ("Llama-2-7B", 14, 16384), ("Llama-2-7B", 1, 4096)]
CHOICES = {"ds": "ds", "exact_topk": "exact scores", "paper": "the paper's labels",
           "quest": "Quest", "streaming": "first and newest tokens"}


def results(name):
    """The rows of a file of results, in the order in which they were measured."""
    return read_json_lines(RESULTS / f"{name}.jsonl")


def default_attention():
    """The attention rows of 128 channels a head and the default's budget and labels."""
    config, D = DSConfig(dense_below=0), 128
    labels = dict(D=D, label_channels=dims_in(config.widths(D)),
                  label_bits=bits_of(config.widths(D)))
    return [row for row in results("attention") if labels.items() <= row.items()
            and row["n_tokens"] == config.budget(row["S"])]


def newest_steps(gpus=1):
    """{(model, B, S): {mode: milliseconds}} of whole steps on so many GPUs, by the defaults."""
    steps, dense_layers = {}, DSConfig.dense_layers
    for row in results("generate"):
        config = row.get("config") or {}
        if (row.get("ms_per_step") and row.get("gpus", 1) == gpus
                and config.get("dense_layers", dense_layers) == dense_layers):
            shape = row["model"], row["B"], row["S"]
            steps.setdefault(shape, {})[row["mode"]] = row["ms_per_step"]
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


def gpus_table():
    """Markdown: steps of models that several GPUs share, and how much faster than one they are."""
    counts = sorted({row.get("gpus", 1) for row in results("generate")})
    found = {n: newest_steps(n) for n in counts}
    lines = ["| model | sequences x tokens | GPUs | dense | over one GPU | ds | over one GPU | "
             "over dense |", "|---|---|---|---|---|---|---|---|"]
    for shape in dict.fromkeys(shape for n in counts if n > 1 for shape in found[n]):
        for n in counts:
            ms, one = found[n].get(shape, {}), found[1].get(shape, {})
            cells = []
            for mode in ("dense", "ds"):
                cells += [f"{ms[mode]:.2f} ms" if mode in ms else "-",
                          f"{one[mode] / ms[mode]:.2f}x" if mode in ms and mode in one else "-"]
            cells.append(f"{ms['dense'] / ms['ds']:.2f}x" if {"dense", "ds"} <= set(ms) else "-")
            model, B, S = shape
            lines.append(f"| {model} | {B} x {S} | {n} | {' | '.join(cells)} |")
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
    attention = [row for row in default_attention() if shape.items() <= row.items()][-1]
    step, short = (newest_steps()["Llama-2-7B", 1, S] for S in (16384, 4096))
    smollm, qwen = (dict(checkpoint=f"{name}-Instruct", data="wikitext2-test.raw")
                    for name in ("SmolLM2-135M", "Qwen2.5-Coder-0.5B"))
    passkey = newest("quality", task="passkey", budget="1/16", method="ds", **smollm)

    def lost(method, model):
        row = newest("quality", task="perplexity", context=4096, budget="n=256", method=method,
                     **model)
        return f"{100 * (row['score'] / row['dense_score'] - 1):.1f}%"

    gain, found = f"{short['dense'] / short['ds']:.2f}x", f"{passkey['score']:.0f}%"
    return "\n".join([
        f"- **{attention['speedup']:.1f}x** faster decode attention than the fastest dense kernel:",
        f"  {attention['ds_us']:.0f} us for {attention['dense_us']:.0f}; 4 sequences of 65,536 "
        "tokens, 32 heads of 128 channels, bf16.",
        f"- **{step['gpt_fast'] / step['ds']:.2f}x** faster decode steps than gpt-fast's way: "
        f"{step['ds']:.2f} ms for {step['gpt_fast']:.2f};",
        "  Llama-2-7B's shape, random weights, one sequence of 16,384 tokens, bf16.",
        f"- **{lost('ds', smollm)}** more perplexity: SmolLM2-135M-Instruct on WikiText-2, each "
        "token decoded",
        f"  from 256 of up to 4,096 tokens, {lost('exact_topk', smollm)} if exact scores choose "
        f"them. Qwen2.5-Coder-0.5B: {lost('ds', qwen)}, {lost('exact_topk', qwen)}.",
        "- **It does not pay** on short contexts, and loses needles in text. At one sequence of",
        f"  4,096 tokens a step is {gain} over dense. Passkeys hidden in WikiText-2 are found in "
        f"{found}",
        f"  of {passkey['n_items']} documents, by dense attention in {passkey['dense_score']:.0f}%."
    ])


def draw(speed, quality):
    """On two axes: speedup over the length of the context, perplexity over tokens attended."""
    curves = {}
    for row in default_attention():
        if row.get("speedup") and row["HQ"] == row["HKV"]:
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
    parser.add_argument("what", nargs="?", choices=("numbers", "steps", "gpus", "picture"))
    what = parser.parse_args().what
    printed = {"numbers": numbers, "steps": steps_table, "gpus": gpus_table}
    if what in printed:
        print(printed[what]())
        return
    draw_picture()
    for page in PAGES if what is None else ():
        print(page, file=sys.stderr)
        refresh(page)


if __name__ == "__main__":
    run_command(main)
