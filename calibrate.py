"""Offline calibration: checkpoint + text -> channels.safetensors (arXiv 2408.07092, section 3.1).

For each layer and KV head, ranks the channels of keys and queries (after RoPE) by what they tell of
q . k, weighs them, and measures what sets quantisation ranges (see labels.py). For each layer
also how much of its selection could be predicted, one layer ahead (see offload.py).
Usage: python calibrate.py --checkpoint tiny [--data FILE] [--method planes]
"""
import datetime
import hashlib
import json
import lzma
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from cli import (
    ArgumentParser, InputFile, Number, OutputFile, check_output, default_dtype, pick_device,
    run_command, widths_name, writing
)
from config import ModelConfig
from ds_attention import DSConfig, label_ref, score_ref, select_ref, words_in
from labels import both_halves, fitted_map, mean_turn
from methods import attention_on, exact_logits, pool
from model import apply_rope, fingerprint, load_model
from tokenizer import Tokenizer, builtin_text, read_text

METHODS = ("planes", "qk", "q", "k", "random")
CONTEXT = 8192  # tokens of a window, if the model has as many


def channel_sums(q, k, cos, sin):
    """Sums over a window's tokens, of queries the means over their groups: {name: [HKV, D] fp64}.
    q [1, HQ, T, D], k [1, HKV, T, D], both after RoPE with cos, sin [1, 1, T, D / 2]."""
    before_rope = apply_rope(k.float(), cos, -sin)[0]
    k = k[0].float()  # [HKV, T, D]
    q = q[0].float().unflatten(0, (len(k), -1))  # [HKV, G, T, D]
    values = {"qk": (q * k[:, None]).abs().mean(1), "q": q.abs().mean(1), "k": k.abs(),
              "kk": k.square(), "before_rope": before_rope, "tokens": torch.ones_like(k)}
    return {name: x.sum(1, dtype=torch.float64) for name, x in values.items()}


def plane_covariance(q, k, ds, seq_lens, window=None):
    """How what planes add to q . k varies together from token to token, [HKV, D / 2, D / 2] fp32:
    sums over queries and heads of covariances over the tokens that are not always attended.

    Each covariance is scaled to a trace of the squared share of attention that these tokens hold:
    a group's heads choose together, however large their scores are, and where the tokens that are
    always attended hold nearly all there is nothing to choose.

    q [1, HQ, T, D], k [1, HKV, T, D] after RoPE; seq_lens: a list, of the queries."""
    total, k = 0.0, k[0].float()
    for seq_len in seq_lens:  # one at a time: less memory
        row, past = q[:, :, seq_len - 1].float(), k[:, :seq_len]
        logits = exact_logits(row, past, torch.tensor([seq_len], device=k.device), window)[0]
        free = slice(max(ds.sink, seq_len - (window or seq_len)), seq_len - ds.recent)
        mass = logits.softmax(-1)[..., free].sum(-1)  # [HKV, G], of logits [HKV, G, seq_len]
        added = both_halves(row[0].unflatten(0, (len(k), -1))[:, :, None] * past[:, None, free])
        added = added - added.mean(2, keepdim=True)  # [HKV, G, tokens, D / 2]
        covariance = added.mT @ added
        scale = mass.square() / covariance.diagonal(dim1=2, dim2=3).sum(-1).clamp(min=1e-12)
        total = total + (covariance * scale[..., None, None]).sum(1)
    return total


def planes_by_covariance(covariance):
    """covariance [HKV, planes, planes] -> planes, most important first: [HKV, planes] int64.

    They are left out one by one, each time the one by which the sum of all those left out varies
    least: planes that cancel go together, and of those that are alike the last one stays."""
    added, left_out = covariance.diagonal(dim1=1, dim2=2).clone(), []
    heads = torch.arange(len(covariance), device=covariance.device)
    for _ in range(covariance.shape[1]):
        left_out.append(added.argmin(1))
        added += 2 * covariance[heads, left_out[-1]]
        added[heads, left_out[-1]] = float("inf")
    return torch.stack(left_out[::-1], 1)


def plane_weights(covariance, ranked):
    """Weights of the first n ranked planes' parts of q . k, by which their sum is the best guess of
    the sum over all planes (least squares): row n - 1 of [HKV, planes, planes] fp16, 0 from n on.
    covariance [HKV, planes, planes] of plane_covariance, ranked [HKV, planes]."""
    ordered = covariance.double().take_along_dim(ranked[:, :, None], 1)
    ordered = ordered.take_along_dim(ranked[:, None], 2)
    weights, whole = torch.zeros_like(ordered), ordered.sum(2) + 1e-12
    ordered.diagonal(dim1=1, dim2=2).mul_(1.001).add_(1e-12)  # a ridge; 1 where nothing varies
    for n in range(1, len(weights[0]) + 1):
        weights[:, n - 1, :n] = torch.linalg.solve(ordered[:, :n, :n], whole[:, :n])
    return weights.half()


def rank_channels(sums, method, generator):
    """Channels of each KV head, most important first: [HKV, D] int64; of planes the pairs c,
    c + D / 2 side by side. sums: of channel_sums, and as "planes" of plane_covariance."""
    if method == "planes":
        ranked = planes_by_covariance(sums["planes"])
        return torch.stack([ranked, ranked + ranked.shape[1]], 2).flatten(1)
    values = (torch.rand(sums["k"].shape, generator=generator).to(sums["k"].device)
              if method == "random" else sums[method])  # qk is the paper's
    return values.sort(dim=-1, descending=True, stable=True).indices


def load_rankings(path, config):
    """Channel rankings in the authors' JSON (.xz too) -> [L, HKV, D].

    The file: {"model.layers.0.self_attn.qk_proj": [[channel, ...] per head], ...}.
    Lists per query head are merged per KV head by the channels' mean rank.
    """
    D, n_heads = config.head_dim, (config.n_heads, config.n_kv_heads)
    opener = lzma.open if str(path).endswith(".xz") else open
    rankings = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
        for i in range(config.n_layers):
            heads = torch.tensor(content[f"model.layers.{i}.self_attn.qk_proj"])
            if len(heads) not in n_heads or not torch.equal(
                    heads.sort(-1).values, torch.arange(D).expand(len(heads), D)):
                raise ValueError(f"layer {i} does not rank each of {D} channels once for "
                                 f"{' or '.join(map(str, n_heads))} heads")
            ranks = heads.argsort(-1).view(config.n_kv_heads, -1, D)  # of each channel
            rankings.append(ranks.float().mean(1).sort(dim=-1, stable=True).indices)
    except (ValueError, TypeError, KeyError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not channel rankings of this model ({error!r})") from None
    return torch.stack(rankings)


def spread_queries(first, end, heads, device):
    """seq_lens of up to 256 queries between two positions, each of which selects from its own past;
    fewer where the scores of all heads would take more than half a GB."""
    count = max(1, min(256, end - first, 2**27 // (heads * end)))
    return torch.linspace(first, end - 1, count, device=device).int() + 1


def selection_figures(q, predicted_q, k, label_map, ds, seq_lens, window=None):
    """What queries select, each from its own past: [attention mass that is kept by labels, and by
    exact scores, means over queries and heads; share of the selection by labels that predicted
    queries select as well, without what is always attended, 0 for None].

    q, predicted_q [1, HQ, T, D], k [1, HKV, T, D] after RoPE; seq_lens [rows]: of the queries."""
    k = k[:, :, : int(seq_lens.max())]
    _, HKV, S, D = k.shape
    labels = torch.zeros(1, HKV, words_in(label_map.widths), S, dtype=torch.int32, device=k.device)
    label_ref(k, torch.arange(S, device=k.device)[None], labels, label_map)
    labels = labels.expand(len(seq_lens), -1, -1, -1)

    def by_labels(q):
        rows = q[0].transpose(0, 1)[seq_lens - 1]  # [rows, HQ, D]
        scores = score_ref(rows, labels, label_map, seq_lens, ds, window)
        return select_ref(scores, seq_lens, ds, window)  # [rows, HKV, S] bool

    exact = exact_logits(q[0].transpose(0, 1)[seq_lens - 1], k[0], seq_lens, window)
    chosen = by_labels(q)
    kept = [attention_on(tokens, exact).mean().item()
            for tokens in (chosen, select_ref(pool(exact), seq_lens, ds, window))]
    if predicted_q is None:
        return [*kept, 0.0]
    position = torch.arange(S, device=k.device)
    always = (position < ds.sink) | (position >= seq_lens[:, None] - ds.recent)
    free = chosen & ~always[:, None]
    return [*kept, ((by_labels(predicted_q) & free).sum() / free.sum().clamp(min=1)).item()]


def calibration_windows(tokenizer, text, samples, context, longest):
    """Windows of a text that do not overlap, [1, tokens] each: (up to `samples` of `context`
    tokens, spread over it, and from its middle one of `longest`, held out)."""
    tokens = tokenizer.encode(text, special=False)
    new, held_out = (size - len(tokenizer.prefix) for size in (context, longest))  # of text
    count = min(samples, (len(tokens) - held_out) // new)
    if count < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: at least {2 * context + longest} are "
                         f"needed (two windows of --context {context} to calibrate on, one of "
                         f"{longest} held out); give a longer --data or a smaller --context")
    sizes = [new] * (count // 2) + [held_out] + [new] * (count - count // 2)
    gap, start, windows = (len(tokens) - sum(sizes)) // count, 0, []
    for size in sizes:
        windows.append(torch.tensor([tokenizer.prefix + tokens[start : start + size]]))
        start += size + gap
    return windows[: count // 2] + windows[count // 2 + 1 :], windows[count // 2]


@torch.inference_mode()
def calibrate(checkpoint, text=None, method="planes", samples=4, context=None, ranking=None,
              device="cpu", dtype=torch.float32, out=None):
    """Writes channels.safetensors for a checkpoint directory, prints layers' figures; its path.

    text: None for the built-in one. samples: windows to calibrate on, at most. context: tokens of
    each, None for the model's length up to CONTEXT; the figures, of the default DSConfig at every
    length, are of a window held out, of twice as many if the model has them. ranking: channels [L,
    HKV, D] on that device, then `method` only says whose.
    """
    checkpoint, text = Path(checkpoint), builtin_text() if text is None else text
    out = Path(out or checkpoint / "channels.safetensors")
    check_output(out)
    model = load_model(checkpoint, device, dtype)
    config, ds = model.config, DSConfig(dense_below=0)
    by_planes = method == "planes" and ranking is None
    context = min(context or CONTEXT, config.max_positions)
    longest = min(2 * context, config.max_positions)
    tokenizer = Tokenizer(checkpoint, config.vocab_size)
    windows, held_out = calibration_windows(tokenizer, text, samples, context, longest)
    hidden = [model.embed(w.to(device)) for w in (*windows, held_out)]
    ropes = [model.rope(torch.arange(x.shape[1], device=device)[None]) for x in hidden]
    rows = [spread_queries(first, end, config.n_heads, device)  # within the context, and past it
            for first, end in ((context // 2, context), (context, longest)) if first < end]
    queries = torch.linspace(min(context, max(64, context // 8)), context, 32).int().tolist()
    if not ds.sparse_at(longest):
        print(f"of {longest} tokens all are attended: the figures say nothing", file=sys.stderr)
    generator, half = torch.Generator().manual_seed(0), config.head_dim // 2
    ones = torch.ones(config.n_kv_heads, half, half, dtype=torch.half, device=device)
    widths = ds.widths(config.head_dim)
    turn = [x.to(device) for x in mean_turn(config, longest)]
    columns = "labels keep", "exact scores", f"past {context}: labels", "exact scores"
    print(f"Attention mass kept at 1/{ds.sparsity:g} of the tokens, labels of {widths_name(widths)}"
          " bit\nlayer" + "".join(f"{x:>20}" for x in (*columns[: 2 * len(rows)], "agreement")))

    figures, of_file = [], []
    previous = None  # what the layer before got of the text held out
    for i, layer in enumerate(tqdm(model.layers, desc="calibrating", unit="layer", leave=False)):
        sums, own, window = {}, hidden[-1], layer.attn.window
        for j, (x, rope) in enumerate(zip(hidden, ropes)):
            q, k, v = layer.before(x, *rope)
            if j < len(windows):
                of_window = channel_sums(q, k, *rope)
                if by_planes:
                    of_window["planes"] = plane_covariance(q, k, ds, queries, window)
                sums = {name: x + sums.get(name, 0) for name, x in of_window.items()}
            hidden[j] = layer.after(x, layer.attn.attend(q, k, v))
        channels = rank_channels(sums, method, generator) if ranking is None else ranking[i]
        means = [(sums[name] / sums["tokens"]).float() for name in ("before_rope", "kk")]
        weights = plane_weights(sums["planes"], channels[:, ::2]) if by_planes else ones
        label_map = fitted_map(channels, *means, weights, widths, *turn)

        predicted = None  # the first layer's queries are not
        if previous is not None:
            predicted = layer.attn.queries(layer.attn_norm(previous), *ropes[-1])
        previous = own
        *kept, agreement = selection_figures(q, predicted, k, label_map, ds, rows[0], window)
        for past in rows[1:]:
            kept += selection_figures(q, None, k, label_map, ds, past, window)[:2]
        figures.append([*kept, agreement])
        tqdm.write(f"{i:5d}" + "".join(f"{value:20.3f}" for value in figures[-1]))
        of_layer = channels.int(), *means, weights, torch.tensor(agreement)
        of_file.append([x.cpu() for x in of_layer])
    mean = torch.tensor(figures).mean(0).tolist()
    print(" mean" + "".join(f"{x:20.3f}" for x in mean) + f"   (of {longest} tokens, held out)")

    provenance = {"checkpoint": fingerprint(checkpoint / "model.safetensors"), "method": method,
                  "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
                  "samples": str(len(windows)), "tokens": str(len(windows) * context),
                  "context": str(context), "date": datetime.date.today().isoformat()}
    names = "channels", "constant", "square", "weights", "agreement"
    tensors = map(torch.stack, zip(*of_file))
    try:
        with writing(out) as temporary:
            save_file(dict(zip(names, tensors)), temporary, provenance)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written ({error})") from None
    return out


def main():
    """The command line: calibrates a checkpoint."""
    parser = ArgumentParser(description=__doc__)
    add, how = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--checkpoint", required=True, help="directory; channels.safetensors is written there")
    add("--data", type=InputFile(),
        help="UTF-8 text to calibrate on (default: the Python language reference)")
    how.add_argument("--method", choices=METHODS, default="planes",
                     help="planes (pairs that RoPE turns) by how scores vary; qk: single "
                          "channels by mean |q_c k_c|, the paper's; q, k: by their mean size; "
                          "random (default %(default)s)")
    how.add_argument("--from_json", type=InputFile(),
                     help="rankings in the authors' JSON format; text sets ranges")
    add("--samples", type=Number(int, 2), default=4,
        help="windows of text to calibrate on, one more is for the figures (default %(default)s)")
    add("--context", type=Number(int, 64),
        help=f"tokens each (default: the model's length, at most {CONTEXT})")
    add("--out", type=OutputFile(),
        help="output file (default: channels.safetensors in the checkpoint)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    ranking, method = None, args.method
    if args.from_json:
        config = ModelConfig.from_file(Path(args.checkpoint) / "config.json")
        ranking = load_rankings(args.from_json, config).to(device)
        method = f"json:{Path(args.from_json).name}"
    text = read_text(args.data) if args.data else None
    out = calibrate(args.checkpoint, text, method, args.samples, args.context, ranking, device,
                    default_dtype(device), args.out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
