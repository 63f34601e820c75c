"""Offline calibration: checkpoint + text -> channels.safetensors (Double Sparsity, arXiv 2408.07092, section 3.1).

For each layer and KV head, finds the map from keys and queries (after RoPE) to a few label dims whose products
stand for q . k, most important dims first, and the statistics that set each dim's static quantisation range. For each
layer also how much of its selection could be foreseen, one layer ahead (see offload.py).
Usage: python calibrate.py --checkpoint tiny [--data FILE] [--method joint]
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

from ds_attention import DSConfig, LabelMap, eligible_tokens, label_ref, live_range, score_ref, select_ref, widths_name
from model import (
    ArgumentParser, ModelConfig, default_dtype, fingerprint, load_model, pick_device, run_command
)
from tokenizer import Tokenizer, read_text

METHODS = ("joint", "variance", "qk", "q", "k", "random")


@dataclasses.dataclass
class Moments:
    """Sums over the tokens of one layer, all fp64: HKV first, the query sums pooled over each group's heads."""

    tokens: int = 0
    qq: torch.Tensor | float = 0.0  # [HKV, D, D] sum of q q^T, mean over the group
    kk: torch.Tensor | float = 0.0  # [HKV, D, D] sum of k k^T
    k: torch.Tensor | float = 0.0  # [HKV, D] sum of k
    abs_q: torch.Tensor | float = 0.0  # [HKV, D] sum of |q|, mean over the group
    abs_k: torch.Tensor | float = 0.0  # [HKV, D] sum of |k|
    abs_qk: torch.Tensor | float = 0.0  # [HKV, D] sum of |q_c k_c| at one position, mean over the group

    def add(self, q, k):
        """q [1, HQ, T, D], k [1, HKV, T, D], both after RoPE."""
        k = k[0].float()  # [HKV, T, D]
        q = q[0].float().unflatten(0, (len(k), -1))  # [HKV, G, T, D]
        G = q.shape[1]
        self.tokens += k.shape[1]
        self.qq = self.qq + torch.einsum("hgtd,hgte->hde", q, q).double() / G
        self.kk = self.kk + (k.transpose(1, 2) @ k).double()
        self.k = self.k + k.double().sum(1)
        self.abs_q = self.abs_q + q.abs().double().sum((1, 2)) / G
        self.abs_k = self.abs_k + k.abs().double().sum(1)
        self.abs_qk = self.abs_qk + (q * k[:, None]).abs().double().sum((1, 2)) / G

    def __add__(self, other):
        return Moments(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def key_covariance(self):
        mean = self.k / self.tokens
        return self.kk / self.tokens - mean[:, :, None] * mean[:, None, :]  # [HKV, D, D]


def rank_channels(moments, method, generator):
    """Channels of each KV head, most important first: [HKV, D] int64."""
    variance = moments.key_covariance().diagonal(dim1=1, dim2=2)
    importance = {
        "qk": moments.abs_qk,  # the paper's: mean |q_c k_c|
        "q": moments.abs_q,
        "k": moments.abs_k,
        "variance": moments.qq.diagonal(dim1=1, dim2=2) * variance,  # a constant in k_c ranks nothing, so var(k_c)
        "random": torch.rand(variance.shape, generator=generator, dtype=torch.float64).to(variance.device),
    }[method]
    return importance.sort(dim=-1, descending=True, stable=True).indices


def matrix_sqrt(m):
    """Square root of symmetric positive semi-definite matrices [..., D, D]."""
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)


def joint_bases(moments, dims):
    """The best rank-`dims` approximation of q . k on the calibration text, as two [HKV, D, dims] bases.

    With A = sqrt(E[q q^T]) sqrt(cov(k)) = U s V^T, the key labels are k . cov(k)^-1/2 V (unit variance) and the query
    labels q . E[q q^T]^-1/2 U s; both are computed without the inverses.
    """
    root_q = matrix_sqrt(moments.qq / moments.tokens)
    root_k = matrix_sqrt(moments.key_covariance())
    U, s, Vh = torch.linalg.svd(root_q @ root_k)
    U, s, V = U[..., :dims], s[..., :dims], Vh.transpose(1, 2)[..., :dims]
    return root_q @ U / s[:, None].clamp(min=1e-6 * s.max()), root_k @ V


def label_bases(moments, method, dims, generator, ranking=None):
    """(basis_k, basis_q, mean, std, ranking): [HKV, D, dims] twice, label statistics [HKV, dims] twice, [HKV, D].

    ranking: a given one instead of the method's (the authors' files).
    """
    if ranking is None:
        ranking = rank_channels(moments, "variance" if method == "joint" else method, generator)
    if method == "joint":
        basis_k, basis_q = joint_bases(moments, dims)
    else:
        D = ranking.shape[1]
        identity = torch.eye(D, dtype=torch.float64, device=ranking.device)
        basis_k = basis_q = identity[ranking[:, :dims]].transpose(1, 2)  # one-hot columns
    mean = torch.einsum("hdc,hd->hc", basis_k, moments.k / moments.tokens)
    variance = torch.einsum("hdc,hde,hec->hc", basis_k, moments.key_covariance(), basis_k)
    return basis_k, basis_q, mean, variance.clamp(min=0).sqrt(), ranking


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


def subspace_overlap(a, b):
    """Share of one label space found in the other, mean over heads: for channels, the share they have in common."""
    a, b = torch.linalg.qr(a).Q, torch.linalg.qr(b).Q  # [HKV, D, C]
    return ((a.transpose(1, 2) @ b) ** 2).sum((1, 2)).mean().item() / a.shape[-1]


def late_queries(T, queries, device):
    """seq_lens [rows] of queries spread over the second half of T tokens, each of which selects from its own past."""
    return torch.linspace(T // 2, T - 1, min(queries, T // 2), device=device).int() + 1


def label_scores(q, k, label_map, ds, seq_lens, window):
    """Label scores of the queries at seq_lens - 1 over their own past: q [1, HQ, T, D], k [1, HKV, T, D] -> [rows, HKV, T]."""
    _, HKV, T, D = k.shape
    labels = torch.zeros(1, HKV, ds.words(D), T, dtype=torch.int32, device=k.device)
    label_ref(k, torch.arange(T, device=k.device)[None], labels, label_map)
    rows = q[0].transpose(0, 1)[seq_lens - 1].float()  # [rows, HQ, D]
    return score_ref(rows, labels.expand(len(rows), -1, -1, -1), label_map, seq_lens, window, ds.pool)


def select_budget(scores, seq_lens, ds, window):
    """select_ref of the configured number of tokens, without top_p."""
    n_tokens = ds.budget(live_range(seq_lens, window)[1])
    return select_ref(scores, seq_lens, n_tokens, int(n_tokens.max()), ds.sink, ds.recent, window).long()


def kept_mass(q, k, label_map, ds, window=None, queries=256):
    """Attention mass that a selection keeps, mean over late queries and heads: (by labels, by exact scores).

    q [1, HQ, T, D], k [1, HKV, T, D].
    """
    _, HKV, T, D = k.shape
    seq_lens = late_queries(T, queries, k.device)
    grouped = q[0].transpose(0, 1)[seq_lens - 1].float().unflatten(1, (HKV, -1))  # [rows, HKV, G, D]
    exact = torch.einsum("rhgd,hsd->rhgs", grouped, k[0].float()) / D**0.5  # [rows, HKV, G, T]
    exact = exact.masked_fill(~eligible_tokens(seq_lens, T, window)[:, None, None], float("-inf"))
    pooled = exact.mean(2) if ds.pool == "mean" else exact.amax(2)
    mass = exact.softmax(-1)
    kept = []
    for scores in (label_scores(q, k, label_map, ds, seq_lens, window), pooled):
        chosen = select_budget(scores, seq_lens, ds, window)  # [rows, HKV, N]
        picked = mass.gather(-1, chosen.clamp(min=0)[:, :, None].expand(-1, -1, mass.shape[2], -1))
        kept.append(picked.masked_fill(chosen[:, :, None] < 0, 0.0).sum(-1).mean().item())
    return kept


def prediction_agreement(q, predicted_q, k, label_map, ds, window=None, queries=256):
    """Share of the tokens that late queries q select which predicted_q selects as well, without those attended in any case.

    q, predicted_q [1, HQ, T, D], k [1, HKV, T, D].
    """
    T = k.shape[2]
    seq_lens = late_queries(T, queries, k.device)
    chosen = torch.zeros(2, len(seq_lens), k.shape[1], T + 1, dtype=torch.bool, device=k.device)
    for of, query in zip(chosen, (q, predicted_q)):
        indices = select_budget(label_scores(query, k, label_map, ds, seq_lens, window), seq_lens, ds, window)
        of.scatter_(2, indices.where(indices >= 0, T), True)
    position = torch.arange(T + 1, device=k.device)
    chosen &= ((position >= ds.sink) & (position < seq_lens[:, None] - ds.recent))[:, None]
    return (chosen.all(0).sum() / chosen[0].sum().clamp(min=1)).item()


def builtin_text():
    """The Python language reference that comes with every Python: real English text that needs no download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_windows(tokenizer, text, samples, context):
    """Non-overlapping windows spread over the text -> (calibration windows, held-out windows), lists of [1, T]."""
    tokens = tokenizer.encode(text, special=False)
    new = context - len(tokenizer.prefix)  # tokens of text in a window
    count = min(samples + max(1, samples // 4), len(tokens) // new)
    if count < 3:
        raise ValueError(f"the text has {len(tokens)} tokens: at least {3 * context} are needed (two windows of --context "
                         f"{context} to calibrate on, one held out); give a longer --data or a smaller --context")
    starts = torch.linspace(0, len(tokens) - new, count).long().tolist()
    windows = [torch.tensor([tokenizer.prefix + tokens[i : i + new]]) for i in starts]
    return [w for i, w in enumerate(windows) if i % 5 != 2], windows[2::5]


@torch.inference_mode()
def calibrate(checkpoint, text=None, method="joint", samples=10, context=4096, dims=None, seed=0, ranking=None, device="cpu",
              dtype=torch.float32, out=None, ds=DSConfig(), method_name=None):
    """Writes channels.safetensors for a checkpoint directory and prints each layer's figures. Returns its path.

    text: None for the built-in one. samples: windows to calibrate on, a quarter as many more are held out. dims: label
    dims to keep, most important first (None: all). context: tokens per window. ranking: [L, HKV, D] channels given
    instead of the method's, then method_name says whose. ds: the configuration that the figures, printed and
    stored, are for.
    """
    checkpoint = Path(checkpoint)
    model = load_model(checkpoint, device, dtype)
    config = model.config
    text = builtin_text() if text is None else text
    context = min(context, config.max_positions)
    dims = min(dims or config.head_dim, config.head_dim)
    tokenizer = Tokenizer(checkpoint, config.vocab_size)
    windows, held_out = calibration_windows(tokenizer, text, samples, context)
    hidden = {"fit": [model.embed(w.to(device)) for w in windows], "check": [model.embed(w.to(device)) for w in held_out]}
    cos, sin = model.rope(torch.arange(context, device=device)[None])
    generator = torch.Generator().manual_seed(seed)
    if dims < ds.channels(config.head_dim):
        uniform = dataclasses.replace(ds, label_bits=4)  # whole words of it, and no more than the default's
        ds = dataclasses.replace(uniform, label_channels=min(dims // 8 * 8, uniform.channels(config.head_dim)))
    widths, C = ds.widths(config.head_dim), ds.channels(config.head_dim)
    columns = {name: [] for name in ("basis_k", "basis_q", "mean", "std", "ranking", "agreement")}
    print(f"layer  mass kept by labels  by exact scores  agreement  overlap of two halves   ({widths_name(widths)} bit, "
          f"1/{ds.sparsity:g} of the tokens)")
    kept_sums = torch.zeros(2)
    before = None  # the layer before's inputs
    for i, layer in enumerate(tqdm(model.layers, desc="calibrating", unit="layer", leave=False)):
        halves = (Moments(), Moments())
        for j, x in enumerate(hidden["fit"]):
            q, k, _ = layer.attn.project(layer.attn_norm(x), cos, sin)
            halves[j % 2].add(q, k)
        given = None if ranking is None else ranking[i].to(device)
        found = label_bases(halves[0] + halves[1], method, dims, generator, given)
        for name, tensor in zip(columns, found):  # of all but the last
            columns[name].append(tensor.cpu())
        a, b = (label_bases(half, method, C, generator, given)[0] for half in halves)
        basis_k, basis_q, mean, std = (t[..., :C].float() for t in found[:4])
        label_map = LabelMap.from_statistics(basis_k, basis_q, mean, std, widths)
        checks = [layer.attn.project(layer.attn_norm(x), cos, sin)[:2] for x in hidden["check"]]
        kept = torch.tensor([kept_mass(q, k, label_map, ds, layer.attn.window) for q, k in checks]).mean(0)
        kept_sums += kept
        predictions = [layer.attn.queries(layer.attn_norm(x), cos, sin) for x in before or ()]  # of layer 0 there are none
        shares = [prediction_agreement(q, predicted, k, label_map, ds, layer.attn.window)
                  for (q, k), predicted in zip(checks, predictions)]
        agreement = sum(shares) / len(checks)
        columns["agreement"].append(torch.tensor(agreement))
        tqdm.write(f"{i:5d}  {kept[0]:19.3f}  {kept[1]:15.3f}  {agreement:9.3f}  {subspace_overlap(a, b):21.3f}")
        before = list(hidden["check"])
        for xs in hidden.values():
            for j, x in enumerate(xs):
                xs[j] = layer(x, cos, sin)
    print(f" mean  {kept_sums[0] / config.n_layers:19.3f}  {kept_sums[1] / config.n_layers:15.3f}   "
          f"({len(held_out)} held-out windows of {context} tokens)")
    tensors = {name: torch.stack(parts).to(torch.int32 if name == "ranking" else torch.float32).contiguous()
               for name, parts in columns.items()}
    provenance = {"checkpoint": fingerprint(checkpoint / "model.safetensors"), "method": method_name or method,
                  "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "samples": str(len(windows)),
                  "tokens": str(len(windows) * context), "context": str(context), "seed": str(seed),
                  "date": datetime.date.today().isoformat()}
    out = Path(out or checkpoint / "channels.safetensors")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, provenance)
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
    how.add_argument("--method", choices=METHODS, default="joint",
                     help="joint: the linear map that keeps most of q.k; the others choose channels: qk by mean |q_c k_c| (the "
                          "paper's), q and k by their mean size, variance by E[q_c^2] var(k_c), random (default %(default)s)")
    how.add_argument("--from_json", help="channel rankings in the authors' JSON format (.json or .json.xz) instead of "
                                         "--method; the text then only sets the label ranges")
    parser.add_argument("--json_projection", choices=("qk", "q", "k"), help="which of its rankings to take (default qk)")
    parser.add_argument("--samples", type=int, default=10, help="windows of text to calibrate on; about a quarter as many "
                                                                 "more are held out (default %(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens per window (default %(default)s)")
    parser.add_argument("--dims", type=int, help="label dims kept in the file, most important first (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --method random")
    parser.add_argument("--out", help="output file (default: channels.safetensors in the checkpoint)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args()
    for name, low in [("samples", 3), ("context", 64), ("dims", 8)]:
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least {low}")
    if args.json_projection and not args.from_json:
        raise ValueError(f"json_projection={args.json_projection}: says which rankings of --from_json to take; give that")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"{args.out}: no such directory to write to")
    device = pick_device(args.device)
    ranking = None
    if args.from_json:
        ranking = load_rankings(args.from_json, ModelConfig.from_file(Path(args.checkpoint) / "config.json"),
                                args.json_projection or "qk")
    out = calibrate(args.checkpoint, read_text(args.data) if args.data else None,
                    "qk" if args.from_json else args.method, args.samples, args.context, args.dims, args.seed, ranking,
                    device, default_dtype(device), args.out,
                    method_name=f"json:{Path(args.from_json).name}" if args.from_json else None)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
