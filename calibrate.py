"""Offline calibration: checkpoint + text -> channels.safetensors (Double Sparsity, arXiv 2408.07092, section 3.1).

For each layer and KV head, ranks the channels of keys and queries (after RoPE) by what they add to q . k, and
measures the statistic that sets each one's static quantisation range. For each layer also how much of its selection
could be foreseen, one layer ahead (see offload.py).
Usage: python calibrate.py --checkpoint tiny [--data FILE] [--method planes]
"""
import argparse
import dataclasses
import datetime
import hashlib
import json
import lzma
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from ds_attention import (
    DSConfig, LabelMap, eligible_tokens, label_ref, pool_ref, score_ref, select_ref, widths_name
)
from model import (
    ArgumentParser, ModelConfig, apply_rope, default_dtype, fingerprint, load_model, pick_device,
    run_command
)
from tokenizer import Tokenizer, read_text

METHODS = ("lift", "planes", "qk", "q", "k", "random")
CONTEXT = 8192  # tokens of a window, if the model has as many


@dataclasses.dataclass
class Moments:
    """Sums over the tokens of one layer, [HKV, D] fp64, those of queries the means over their groups."""

    tokens: int = 0
    abs_qk: torch.Tensor | float = 0.0  # |q_c k_c| at one position
    abs_q: torch.Tensor | float = 0.0  # |q_c|
    abs_k: torch.Tensor | float = 0.0  # |k_c|
    kk: torch.Tensor | float = 0.0  # k_c^2
    unturned: torch.Tensor | float = 0.0  # k_c before RoPE
    lift: torch.Tensor | float = 0.0  # of planes, [HKV, D / 2]: see plane_lift

    def add(self, q, k, cos, sin):
        """q [1, HQ, T, D], k [1, HKV, T, D], both after RoPE with cos, sin [1, 1, T, D / 2]."""
        self.unturned = self.unturned + apply_rope(k.float(), cos, -sin)[0].sum(1, dtype=torch.float64)
        k = k[0].float()  # [HKV, T, D]
        q = q[0].float().unflatten(0, (len(k), -1))  # [HKV, G, T, D]
        G, double = q.shape[1], torch.float64
        self.tokens += k.shape[1]
        self.abs_qk = self.abs_qk + (q * k[:, None]).abs().sum((1, 2), dtype=double) / G
        self.abs_q = self.abs_q + q.abs().sum((1, 2), dtype=double) / G
        self.abs_k = self.abs_k + k.abs().sum(1, dtype=double)
        self.kk = self.kk + k.square().sum(1, dtype=double)


def both_halves(x):
    """x [HKV, D] -> [HKV, D / 2]: sums over the channels c and c + D / 2 that RoPE turns together."""
    return x.unflatten(1, (2, -1)).sum(1)


def plane_lift(q, k, ds, seq_lens, window=None):
    """What each plane does to tell the attended tokens from the rest: [HKV, D / 2] fp64, the mean over a group's queries.

    Of a query it is (its q . k at the mean key by attention weight, less that at the plain mean key) squared, times the
    attention mass in question; all of the tokens that are not attended in any case. q [1, HQ, T, D], k [1, HKV, T, D] after
    RoPE; seq_lens [rows], of the queries to take.
    """
    k = k[0].float()
    HKV, T, D = k.shape
    rows = q[0].transpose(0, 1)[seq_lens - 1].float().unflatten(1, (HKV, -1))  # [rows, HKV, G, D]
    eligible, position = eligible_tokens(seq_lens, T, window), torch.arange(T, device=k.device)
    free = eligible & (position >= ds.sink) & (position < seq_lens[:, None] - ds.recent)
    scores = torch.einsum("rhgd,hsd->rhgs", rows, k) / D**0.5
    mass = scores.masked_fill_(~eligible[:, None, None], float("-inf")).softmax(-1).mul_(free[:, None, None])
    share = mass.sum(-1, keepdim=True)  # [rows, HKV, G, 1]
    attended = torch.einsum("rhgs,hsd->rhgd", mass, k) / share.clamp(min=1e-12)
    average = torch.einsum("rs,hsd->rhd", free / free.sum(-1, keepdim=True).clamp(min=1), k)
    planes = both_halves((rows * (attended - average[:, :, None])).flatten(0, 2)).view(*share.shape[:3], -1)
    return (planes.square() * share).double().mean((0, 2))


def rank_channels(moments, method, generator):
    """Channels of each KV head, most important first: [HKV, D] int64; by "lift" and "planes" pairs c, c + D / 2."""
    size = both_halves(moments.abs_qk)  # mean |q_c k_c| of both of a plane's channels
    largest = size.argsort(dim=-1, descending=True, stable=True)[:, : int(os.environ.get("NL", 2))]
    lift = torch.as_tensor(moments.lift).to(size).expand_as(size)
    importance = {
        # the largest planes, as many as default_widths gives 4 bits, and then by lift
        "lift": lift.scatter(1, largest, lift.amax() + 1 + size.gather(1, largest)),
        "planes": size,
        "qk": moments.abs_qk,  # the paper's: mean |q_c k_c|
        "q": moments.abs_q,
        "k": moments.abs_k,
        "random": torch.rand(moments.kk.shape, generator=generator, dtype=torch.float64).to(moments.kk.device),
    }[method]
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices
    return torch.stack([ranked, ranked + ranked.shape[1]], 2).flatten(1) if method in ("lift", "planes") else ranked


def key_ranges(moments, cos, sin):
    """(mean, std) of each channel's keys at all positions, of which cos, sin [1, 1, positions, D / 2] are: [HKV, D] each.

    RoPE turns the constant part of a plane's keys: in fast planes its mean is zero, slow ones keep some of it. Both of a plane's
    channels have one std, since what turns is now in the one, now in the other.
    """
    constant = (moments.unturned / moments.tokens)[None, :, None]
    mean = apply_rope(constant, cos.mean(2, keepdim=True), sin.mean(2, keepdim=True))[0, :, 0]
    variance = both_halves(moments.kk / moments.tokens - mean.square()).clamp(min=0) / 2
    return mean, variance.sqrt().repeat(1, 2)


def load_rankings(path, config, projection):
    """The authors' JSON ({"model.layers.0.self_attn.qk_proj": [[channel, ...] per head], ...}; .xz too) -> [L, HKV, D].

    Lists per query head are merged per KV head by the channels' mean rank.
    """
    opener = lzma.open if str(path).endswith(".xz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a JSON ranking file ({error})") from None
    rankings = []
    for i in range(config.n_layers):
        name = f"model.layers.{i}.self_attn.{projection}_proj"
        if not isinstance(content, dict) or name not in content:
            raise ValueError(f"{path}: no {name}; this model has {config.n_layers} layers (see --json_projection)")
        try:
            heads = torch.tensor(content[name], dtype=torch.long)  # [heads, D] channels in rank order
        except (TypeError, ValueError):
            raise ValueError(f"{path}: {name} is not a list of channel numbers per head") from None
        if heads.shape not in ((config.n_heads, config.head_dim), (config.n_kv_heads, config.head_dim)):
            raise ValueError(f"{path}: {name} has shape {list(heads.shape)}, the model {config.n_heads} query and "
                             f"{config.n_kv_heads} KV heads of {config.head_dim} channels")
        if not torch.equal(heads.sort(-1).values, torch.arange(config.head_dim).expand_as(heads)):
            raise ValueError(f"{path}: {name} does not rank each of {config.head_dim} channels once")
        ranks = heads.argsort(-1).view(config.n_kv_heads, -1, config.head_dim)  # rank of each channel
        rankings.append(ranks.float().mean(1).sort(dim=-1, stable=True).indices)
    return torch.stack(rankings)


def spread_queries(first, end, heads, device):
    """seq_lens of up to 256 queries between two positions, each of which selects from its own past; fewer where
    the scores of all heads would take more than half a GB."""
    count = max(1, min(256, end - first, 2**27 // (heads * end)))
    return torch.linspace(first, end - 1, count, device=device).int() + 1


def label_scores(q, k, label_map, ds, seq_lens, window):
    """Label scores of the queries at seq_lens - 1 over their own past: q [1, HQ, T, D],
    k [1, HKV, T, D] -> [rows, HKV, T]."""
    _, HKV, T, D = k.shape
    labels = torch.zeros(1, HKV, ds.words(D), T, dtype=torch.int32, device=k.device)
    label_ref(k, torch.arange(T, device=k.device)[None], labels, label_map)
    rows = q[0].transpose(0, 1)[seq_lens - 1].float()  # [rows, HQ, D]
    labels = labels.expand(len(rows), -1, -1, -1)
    return score_ref(rows, labels, label_map, seq_lens, ds, window)


def kept_mass(q, k, label_map, ds, seq_lens, window=None):
    """Attention mass that a selection keeps, mean over queries and heads: (by labels, by exact scores).

    q [1, HQ, T, D], k [1, HKV, T, D]; seq_lens [rows]: of the queries that select, at most T.
    """
    end = int(seq_lens.max())
    q, k = q[:, :, :end], k[:, :, :end]
    _, HKV, T, D = k.shape
    grouped = q[0].transpose(0, 1)[seq_lens - 1].float().unflatten(1, (HKV, -1))  # [rows, HKV, G, D]
    exact = torch.einsum("rhgd,hsd->rhgs", grouped, k[0].float()) / D**0.5  # [rows, HKV, G, T]
    exact.masked_fill_(~eligible_tokens(seq_lens, T, window)[:, None, None], float("-inf"))
    both = label_scores(q, k, label_map, ds, seq_lens, window), pool_ref(exact)
    mass = exact.softmax(-1)
    chosen = (select_ref(scores, seq_lens, ds, window)[:, :, None] for scores in both)
    return [(mass * tokens).sum(-1).mean().item() for tokens in chosen]


def prediction_agreement(q, predicted_q, k, label_map, ds, seq_lens, window=None):
    """Share of the tokens that queries q select which predicted_q selects as well, without those attended in any case.

    q, predicted_q [1, HQ, T, D], k [1, HKV, T, D]; seq_lens [rows], at most T.
    """
    both = (label_scores(query, k, label_map, ds, seq_lens, window) for query in (q, predicted_q))
    chosen, predicted = (select_ref(scores, seq_lens, ds, window) for scores in both)
    position = torch.arange(k.shape[2], device=k.device)
    chosen &= ((position >= ds.sink) & (position < seq_lens[:, None] - ds.recent))[:, None]
    return ((chosen & predicted).sum() / chosen.sum().clamp(min=1)).item()


def builtin_text():
    """The Python language reference that comes with every Python: real English text that needs no download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_windows(tokenizer, text, samples, context, longest):
    """Windows of a text that do not overlap: (up to `samples` of `context` tokens, spread over it, and from its middle one of
    `longest` tokens, held out), [1, tokens] each."""
    tokens = tokenizer.encode(text, special=False)
    new, held_out = (size - len(tokenizer.prefix) for size in (context, longest))  # of text
    count = min(samples, (len(tokens) - held_out) // new)
    if count < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: at least {2 * context + longest} are needed (two windows of "
                         f"--context {context} to calibrate on, one of {longest} held out); give a longer --data or a smaller "
                         "--context")
    sizes = [new] * (count // 2) + [held_out] + [new] * (count - count // 2)
    gap, start, windows = (len(tokens) - sum(sizes)) // count, 0, []
    for size in sizes:
        windows.append(torch.tensor([tokenizer.prefix + tokens[start : start + size]]))
        start += size + gap
    return windows[: count // 2] + windows[count // 2 + 1 :], windows[count // 2]


@torch.inference_mode()
def calibrate(checkpoint, text=None, method="lift", samples=4, context=None, seed=0, ranking=None, device="cpu",
              dtype=torch.float32, out=None, ds=DSConfig()):
    """Writes channels.safetensors for a checkpoint directory and prints each layer's figures. Returns its path.

    text: None for the built-in one. samples: windows to calibrate on, at most. context: tokens of each, None for the model's
    length up to CONTEXT; the figures are of a window held out, of twice as many if the model has them. ranking: [L, HKV, D]
    channels given instead of the method's, then `method` only says whose. ds: the configuration that the figures, printed and
    stored, are for.
    """
    checkpoint, ds = Path(checkpoint), dataclasses.replace(ds, dense_below=0)
    model = load_model(checkpoint, device, dtype)
    config = model.config
    text = builtin_text() if text is None else text
    context = min(context or CONTEXT, config.max_positions)
    longest = min(2 * context, config.max_positions)
    windows, held_out = calibration_windows(Tokenizer(checkpoint, config.vocab_size), text, samples, context, longest)
    hidden = [model.embed(w.to(device)) for w in (*windows, held_out)]
    ropes = [model.rope(torch.arange(x.shape[1], device=device)[None]) for x in hidden]
    within, past = (spread_queries(first, end, config.n_heads, device) if first < end else None
                    for first, end in ((context // 2, context), (context, longest)))
    spaced = spread_queries(min(256, context // 2), context, config.n_heads, device)
    generator = torch.Generator().manual_seed(seed)
    widths, C = ds.widths(config.head_dim), ds.channels(config.head_dim)
    everywhere = model.rope(torch.arange(config.max_positions, device=device)[None])
    tensors = {"channels": [], "mean": [], "std": [], "agreement": []}
    columns = ["labels keep", "exact scores", f"past {context}: labels", "exact scores", "agreement"]
    if past is None:  # the model ends there
        del columns[2:4]
    print(f"Attention mass kept at 1/{ds.sparsity:g} of the tokens, labels of {widths_name(widths)} bit\nlayer"
          + "".join(f"{column:>20}" for column in columns))
    figures = []
    before = None  # what the layer before got of the text held out
    for i, layer in enumerate(tqdm(model.layers, desc="calibrating", unit="layer", leave=False)):
        moments, foreseen = Moments(), before
        before = hidden[-1]
        for j, (x, rope) in enumerate(zip(hidden, ropes)):
            q, k, v = layer.before(x, *rope)
            if j < len(windows):
                moments.add(q, k, *rope)
                moments.lift = moments.lift + plane_lift(q, k, ds, spaced, layer.attn.window)
            hidden[j] = layer.after(x, layer.attn.attend(q, k, v))
        channels = rank_channels(moments, method, generator) if ranking is None else ranking[i].to(device)
        of_file = [channels, *(x.gather(1, channels).float() for x in key_ranges(moments, *everywhere))]
        label_map = LabelMap.from_statistics(*(x[:, :C] for x in of_file), widths)
        kept = [share for rows in (within, past) if rows is not None
                for share in kept_mass(q, k, label_map, ds, rows, layer.attn.window)]
        agreement = 0.0  # the first layer's is not foreseen
        if foreseen is not None:
            predicted = layer.attn.queries(layer.attn_norm(foreseen), *ropes[-1])
            parts = (x[:, :, :context] for x in (q, predicted, k))
            agreement = prediction_agreement(*parts, label_map, ds, within, layer.attn.window)
        figures.append([*kept, agreement])
        tqdm.write(f"{i:5d}" + "".join(f"{value:20.3f}" for value in figures[-1]))
        for name, tensor in zip(tensors, (channels.int(), *of_file[1:], torch.tensor(agreement))):
            tensors[name].append(tensor.cpu())
    mean = torch.tensor(figures).mean(0).tolist()
    print(" mean" + "".join(f"{value:20.3f}" for value in mean) + f"   (a window of {longest} tokens, held out)")
    provenance = {"checkpoint": fingerprint(checkpoint / "model.safetensors"), "method": method,
                  "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": str(len(windows)),
                  "tokens": str(len(windows) * context), "context": str(context), "seed": str(seed),
                  "date": datetime.date.today().isoformat()}
    out = Path(out or checkpoint / "channels.safetensors")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: torch.stack(parts) for name, parts in tensors.items()}, temporary, provenance)
        temporary.chmod(mode)  # safetensors writes a file for its owner alone
        os.replace(temporary, out)
    except SafetensorError as error:
        raise OSError(f"{out}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return out


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory; channels.safetensors is written there")
    parser.add_argument("--data", help="UTF-8 text file to calibrate on (default: the Python language reference)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--method", choices=METHODS, default="lift",
                     help="lift: pairs of channels that RoPE turns together, some of the largest, then those that tell attended tokens "
                          "from the rest; planes: such pairs by mean |q_c k_c|; the others choose single channels: qk "
                          "by mean |q_c k_c| (the paper's), q and k by their mean size, random (default %(default)s)")
    how.add_argument("--from_json", help="channel rankings in the authors' JSON format (.json or .json.xz) instead of "
                                         "--method; the text then only sets the label ranges")
    parser.add_argument("--json_projection", choices=("qk", "q", "k"), help="which of its rankings to take (default qk)")
    parser.add_argument("--samples", type=int, default=4, help="windows of text to calibrate on (default %(default)s); one more "
                                                                "is held out for the figures")
    parser.add_argument("--context", type=int, help=f"tokens per window (default: the model's length, at most {CONTEXT})")
    parser.add_argument("--seed", type=int, default=0, help="of --method random")
    parser.add_argument("--out", help="output file (default: channels.safetensors in the checkpoint)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    for name, low in [("samples", 2), ("context", 64)]:
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least {low}")
    if args.json_projection and not args.from_json:
        raise ValueError(f"json_projection={args.json_projection}: says which rankings of --from_json to take; give that")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"{args.out}: no such directory to write to")
    device = pick_device(args.device)
    ranking, method = None, args.method
    if args.from_json:
        projection = args.json_projection or "qk"
        config = ModelConfig.from_file(Path(args.checkpoint) / "config.json")
        ranking = load_rankings(args.from_json, config, projection)
        method = f"json:{Path(args.from_json).name}:{projection}"
    text = read_text(args.data) if args.data else None
    out = calibrate(args.checkpoint, text, method, args.samples, args.context, args.seed, ranking,
                    device, default_dtype(device), args.out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
