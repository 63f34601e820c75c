"""Label maps: a calibration's channels.safetensors, fitted to a cache.

The file: channels [L, HKV, D] int32, most important first; constant, square [L, HKV, D] fp32: keys'
means before RoPE, and of their squares; weights [L, HKV, D / 2, D / 2] fp16: see
calibrate.plane_weights; agreement [L] fp32: see offload.predictable_layers.
"""
from pathlib import Path

import torch

import parallel
from config import rope_frequencies
from ds_attention import LabelMap
from model import apply_rope, fingerprint, open_tensors

# Half-widths, in standard deviations, of the uniform quantiser with least mean squared error on a
# Gaussian.
CLIP = {1: 0.798, 2: 1.494, 4: 2.513, 8: 3.92}


def both_halves(x):
    """x [..., D] -> [..., D / 2]: sums over channels c and c + D / 2 that RoPE turns together."""
    return x.unflatten(-1, (2, -1)).sum(-2)


def mean_turn(config, positions):
    """cos, sin [1, 1, 1, D / 2] fp32: RoPE's means over the first `positions`."""
    angles = torch.arange(positions, device="cpu")[:, None] * rope_frequencies(config)
    return angles.cos().mean(0)[None, None, None], angles.sin().mean(0)[None, None, None]


def key_ranges(constant, square, cos, sin):
    """(mean, std) of each channel's keys over the positions of a cache: [HKV, D] each.

    constant [HKV, D]: keys' mean before RoPE; square [HKV, D]: the mean of their squares; cos, sin:
    of mean_turn. RoPE turns the constant part of a plane's keys: in fast planes its mean is zero,
    slow ones keep some of it, the more the shorter the cache. Both of a plane's channels have one
    deviation, since what turns is now in the one, now in the other.
    """
    mean = apply_rope(constant[None, :, None], cos, sin)[0, :, 0]
    variance = both_halves(square - mean.square()).clamp(min=0) / 2
    return mean, variance.sqrt().repeat(1, 2)


def label_map_of(channels, mean, std, widths, weights=None):
    """The LabelMap of a layer. channels, mean, std [HKV, C or more], the first C of which count: a
    label's channels by number, and each one's mean and standard deviation, which set its range.
    weights [HKV, D / 2, D / 2]: of calibrate.plane_weights; None: 1.
    """
    bits = [bits for dims, bits in widths for _ in range(dims)]
    steps = [2 * CLIP[b] / (2**b - 1) for b in bits]
    clip, step = (torch.tensor(x, device=std.device) for x in ([CLIP[b] for b in bits], steps))
    channels, mean, std = (x[:, : len(bits)] for x in (channels, mean, std))
    lo = (mean - clip * std).float().contiguous()
    step = (step * std).float().clamp(min=1e-12).contiguous()
    gain = step.clone()
    if weights is not None:
        planes = (len(bits) + 1) // 2
        gain *= weights[:, planes - 1, :planes].repeat_interleave(2, 1)[:, : len(bits)]
    bits = torch.tensor(bits, dtype=torch.int32, device=std.device)
    return LabelMap(channels.int().contiguous(), lo, step, gain, bits, widths)


def fitted_map(channels, constant, square, weights, widths, cos, sin):
    """A layer's LabelMap for the positions of mean_turn's cos, sin. channels [HKV, D]: all, ranked;
    constant, square: see key_ranges; weights: see label_map_of."""
    ranges = (x.gather(1, channels.long()) for x in key_ranges(constant, square, cos, sin))
    return label_map_of(channels, *ranges, widths, weights)


def load_label_maps(checkpoint, config, ds, path=None, positions=None):
    """A checkpoint's channels.safetensors, or file `path` -> one LabelMap per layer, fit for `ds`
    and so many positions (None: all of the model's). A longer sequence is labelled, too, but worse.

    Raises ValueError when the file is absent, of an older form, or belongs to another model.
    """
    path = Path(path or Path(checkpoint) / "channels.safetensors")
    shape, D = [config.n_layers, config.n_kv_heads * config.ranks, config.head_dim], config.head_dim
    shapes = dict.fromkeys(("channels", "constant", "square"), shape)
    shapes["weights"] = [*shape[:2], D // 2, D // 2]
    again = f"run calibrate.py --checkpoint {checkpoint}"
    with open_tensors(path) as file:
        calibrated = (file.metadata() or {}).get("checkpoint")
        model_hash = fingerprint(Path(checkpoint) / "model.safetensors")
        if calibrated != model_hash:
            raise ValueError(f"{path}: calibrated for checkpoint {calibrated}, this one is "
                             f"{model_hash}; {again}")
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if not {"channels", "weights"} <= found.keys():
            raise ValueError(f"{path}: holds label maps of an older form; {again}")
        if found["channels"] != shape:
            raise ValueError(f"{path}: made for {found['channels']} layers, KV heads, head_dim; "
                             f"the model has {shape}; {again}")
        damaged = any(found.get(name) != wanted for name, wanted in shapes.items())
        heads = parallel.own(config.n_kv_heads)
        tensors = [] if damaged else [file.get_tensor(name)[:, heads] for name in shapes]
    if damaged or tensors[0].min() < 0 or tensors[0].max() >= D or not all(
            tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{path}: its label maps are damaged; {again}")
    turn = mean_turn(config, min(positions or config.max_positions, config.max_positions))
    return [fitted_map(*of_layer, ds.widths(D), *turn) for of_layer in zip(*tensors)]
