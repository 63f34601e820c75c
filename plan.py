"""What fits: the memory that models take, by weights, batch and context.

Usage: python plan.py                    the models of config.py, on one GPU and on two
       python plan.py --checkpoint DIR --shapes 4x32768 --gpus 1 4
Counted by what generate.py refuses with, without a GPU or weights: any directory with a config.json
will do. Decoding is sparse, as by default.
"""
from pathlib import Path

import torch

import parallel
from cli import ArgumentParser, Number, parse_sizes, run_command
from config import PRESETS, ModelConfig
from ds_attention import DSConfig
from host_memory import host_need
from model import KVCache, memory_need
from offload import OffloadCache

SHAPES = [(1, 2048), (16, 2048), (1, None), (8, None)]  # sequences, tokens; None: the model's most


def cell(config, ranks, quantize, B, S):
    """GiB that each of so many GPUs needs; and, if it is less, with K and V in host memory, each
    and the host. Text."""
    S = S or config.max_positions
    try:
        own = parallel.share(config, ranks)
    except ValueError:  # so many cannot share it
        return "-"
    if S > config.max_positions:
        return "-"
    of_all = B, S, torch.bfloat16, DSConfig()

    def need(cache_type):
        return sum(memory_need(own, *of_all, cache_type, quantize).values()) / 2**30

    on_gpu, offloaded = need(KVCache), need(OffloadCache)
    host = ranks * host_need(own, *of_all) / 2**30
    return f"{on_gpu:.1f}" + (f" or {offloaded:.1f} + {host:.1f}" if offloaded < on_gpu - 0.1
                              else "")


def table(models, shapes, gpus):
    """{name: config} -> lines of Markdown: of each model, number of GPUs and kind of weights."""
    heads = [f"{B} x {S or 'all'}" for B, S in shapes]
    yield f"| model, its tokens | weights | GPUs | {' | '.join(heads)} |"
    yield "|---" * (3 + len(shapes)) + "|"
    for name, config in models.items():
        for ranks in gpus:
            for weights, quantize in (("bf16", None), ("int8", "int8")):
                cells = [cell(config, ranks, quantize, B, S) for B, S in shapes]
                yield (f"| {name}, {config.max_positions} | {weights} | {ranks} | "
                       f"{' | '.join(cells)} |")


def main():
    """The command line: prints the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="directory with a config.json, Hugging Face's or ours "
                                             "(default: models of config.py)")
    parser.add_argument("--shapes", help="sequences x tokens, comma-separated, as 1x4096,8x32768 "
                                         "(default: few, and as many as the model takes)")
    parser.add_argument("--gpus", type=Number(int, 1, 1024), nargs="+", default=[1, 2],
                        help="that share a model (default: 1 2)")
    args = parser.parse_args()
    models = PRESETS
    if args.checkpoint:
        path = Path(args.checkpoint)
        models = {path.resolve().name: ModelConfig.from_file(path / "config.json")}
    shapes = parse_sizes("shapes", args.shapes, "1x4096,8x32768") if args.shapes else SHAPES
    print("GiB of each GPU, or with --offload of each GPU + of the host\n")
    for line in table(models, shapes, args.gpus):
        print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
