"""Text generation with Double Sparsity: load a checkpoint, prefill the prompts, decode, stream.

Usage: python generate.py --sparsity 16      the built-in demonstration on tiny/
       python generate.py --checkpoint DIR_HUB_ID_OR_GGUF --prompt "Once upon" --max_new_tokens 100
       python generate.py --compare --prompt_file FILE      dense and sparse side by side
       python generate.py --offload --prompt_file FILE      K and V in host memory
       torchrun --standalone --nproc_per_node=2 generate.py     two GPUs, with any of these options
"""
import contextlib
import functools
import hashlib
import json
import random
import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from calibrate import calibrate
from cli import (
    HERE, ArgumentParser, InputFile, Number, OutputFile, add_quantize_argument,
    add_sparsity_arguments, check_layers, check_output, default_dtype, pick_device, run_command,
    sparsity_from, writing
)
from config import ModelConfig
from convert_hf import convert
from decode import DecodeStep, divergence, forced_logits, generate
from ds_attention import DSConfig
from host_memory import check_host_memory, free_host_bytes
from labels import load_label_maps
from model import KVCache, check_memory, load_model, open_tensors
from offload import MIN_AGREEMENT, MODES, OffloadCache, predictable_layers
from timing import copy_bandwidth
from tiny.tasks import kv_answer, kv_prompt, random_kv
from tokenizer import Tokenizer, read_text

# ---------------------------------------------------------------- loading


def is_converted(directory):
    path = directory / "model.safetensors"
    if not path.exists():
        return False
    with open_tensors(path) as file:
        return "embed.weight" in file.keys()


def resolve_checkpoint(name):
    """A checkpoint directory of ours for a path or hub id.

    A Hugging Face checkpoint or a GGUF file is converted to checkpoints/ first.
    """
    source = Path(name)
    if not name:
        raise ValueError("the checkpoint's name is empty: give a directory, GGUF file or a hub id")
    if source.is_dir() and is_converted(source):
        return source
    if source.exists():
        listed = source.iterdir() if source.is_dir() else [source]
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in listed)
        tag = hashlib.sha256(repr((str(source.resolve()), files)).encode()).hexdigest()[:8]
        converted = HERE / "checkpoints" / f"{source.resolve().name.removesuffix('.gguf')}-{tag}"
    else:
        converted = HERE / "checkpoints" / name.replace("/", "--")
    if not is_converted(converted):
        convert(name, converted)
        print(f"{name} was not converted yet: converted to {converted}", file=sys.stderr)
    return converted


def ensure_calibrated(checkpoint, device):
    """Calibrates a checkpoint that has no label maps yet."""
    with parallel.rank_0_first():
        if not (checkpoint / "channels.safetensors").exists():
            check_output(checkpoint / "channels.safetensors")
            print(f"{checkpoint} is not calibrated yet: calibrating (once)", file=sys.stderr)
            with contextlib.redirect_stdout(sys.stderr):
                calibrate(checkpoint, device=device, dtype=default_dtype(device))


def load_maps(checkpoint, config, ds, device, channels=None, positions=None):
    """labels.load_label_maps of a checkpoint, which is calibrated first if it was not."""
    if channels is None:
        ensure_calibrated(checkpoint, device)
    return load_label_maps(checkpoint, config, ds, channels, positions)


def open_checkpoint(name):
    """A checkpoint by directory, GGUF file or hub id -> (config, tokenizer, our directory)."""
    with parallel.rank_0_first():
        checkpoint = resolve_checkpoint(name)
    config = ModelConfig.from_file(checkpoint / "config.json")
    return config, Tokenizer(checkpoint, config.vocab_size), checkpoint


def load(name, device, dtype, quantize=None):
    """A checkpoint by directory or hub id -> (model, tokenizer, our checkpoint directory). Of
    several processes each has its part of the model."""
    _, tokenizer, checkpoint = open_checkpoint(name)
    model = load_model(checkpoint, device, dtype, quantize, parallel.size())
    return model, tokenizer, checkpoint


# ---------------------------------------------------------------- text


def new_tokens_text(tokenizer, prompt, ids):
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


class Streamer:
    """Prints a sequence's text as its tokens come, a character when all its bytes are there."""

    def __init__(self, tokenizer, context=()):
        """context: the tokens before, after which the first new piece keeps its leading space."""
        self.tokenizer = tokenizer
        self.before, self.new = list(context), []  # what was printed last, what was not yet
        self.tokens = []  # all that came

    def __call__(self, b, token):
        self.tokens.append(token)
        self.new.append(token)
        text = new_tokens_text(self.tokenizer, self.before, self.new)
        if text and not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            self.before, self.new = self.new, []

    def finish(self):
        """Prints what is left of a character that was never completed, and the end of the line."""
        print(new_tokens_text(self.tokenizer, self.before, self.new), flush=True)


# ---------------------------------------------------------------- command line


def peak_memory_bytes(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_statistics(result, cache, device):
    """A Generation's statistics and what belongs to the machine: a dict for --json."""
    found = result.statistics() | {
        "kv_cache_bytes": cache.kv_bytes(), "label_cache_bytes": cache.label_bytes(),
        "peak_memory_bytes": peak_memory_bytes(device),
        "processes": parallel.size()} | cache.statistics()
    if device != "cpu" and result.step_s:
        found["bandwidth_share"] = (found["bytes_per_step"] / found["median_ms_per_token"] * 1e3
                                    / copy_bandwidth(device))
    return found


def print_statistics(found, device, name=""):
    """A block of lines on stderr. found: from run_statistics; name: what they are of."""
    def megabytes(key):
        return f"{found[key] / 1e6:.2f} MB"

    def mebibytes(key):
        return f"{found[key] / 2**20:.1f} MiB"

    lines = {"time to first token": f"{found['ttft_ms']:.0f} ms "
                                    f"({found['cold_start_s']:.1f} s after the process began)"}
    if found["decode_tokens_per_s"]:  # 0 if no prompt got a second token
        each = (f" ({found['decode_tokens_per_s_per_sequence']:.1f} per sequence)"
                if found["prompts"] > 1 else "")
        lines["decode"] = (f"{found['decode_tokens_per_s']:.1f} tokens/s{each}, "
                           f"{found['median_ms_per_token']:.2f} ms per token, "
                           f"p99 {found['p99_ms_per_token']:.2f}")
        bandwidth = (f" ({found['bandwidth_share']:.0%} of the copy bandwidth)"
                     if "bandwidth_share" in found else "")
        share = found["kv_bytes_per_step"] / max(found["dense_kv_bytes_per_step"], 1)
        lines["read per step"] = megabytes("bytes_per_step") + bandwidth
        lines["of it the cache"] = (f"{megabytes('kv_bytes_per_step')}, {share:.0%} of dense's "
                                    f"{megabytes('dense_kv_bytes_per_step')}")
        if "tokens_attended" in found:
            lines["tokens attended"] = f"{found['tokens_attended']:.0f} per head, on average"
        if "host_bytes" in found:
            lines["over PCIe per step"] = megabytes("pcie_bytes_per_step")
            if found.get("hit_rate") is not None:
                lines["over PCIe per step"] += (
                    f", of it ahead {megabytes('prefetched_bytes_per_step')}")
                lines["selected tokens"] = f"{found['hit_rate']:.0%} were on the GPU"
            if found.get("agreement") is not None:
                lines["predicted tokens"] = f"{found['agreement']:.0%} were selected"
            if found.get("predicted_layers"):
                lines["predicted layers"] = (
                    f"{found['predicted_layers']} attended to what was predicted")
    lines["KV cache"] = f"{mebibytes('kv_cache_bytes')}, labels {mebibytes('label_cache_bytes')}"
    if "host_bytes" in found:
        lines["host memory"] = (f"{mebibytes('host_bytes')}, GPU maps of it "
                                f"{mebibytes('slot_map_bytes')}")
    lines[f"peak {'GPU' if device != 'cpu' else 'process'} memory"] = (
        f"{found['peak_memory_bytes'] / 2**30:.2f} GiB")
    if found["processes"] > 1:
        lines["processes"] = f"{found['processes']}; bytes are of each"
    if name:
        print(name, file=sys.stderr)
    for key, value in lines.items():
        print(f"{key:<19}  {value}", file=sys.stderr)
    if device == "cpu" and found["kv_bytes_per_step"] < found["dense_kv_bytes_per_step"]:
        print("On a CPU a sparse step shows what the method does, not how fast it is.",
              file=sys.stderr)


def demonstration(tokenizer, max_tokens=4000):
    """A generated document of about 4,000 tokens and a question about a fact: (prompt, answer)."""
    rng = random.Random(0)
    records = random_kv(rng, 2000)
    key, value = records[17]
    count = 20
    while len(tokenizer.encode(kv_prompt(records[: count + 1], key))) <= max_tokens:
        count += 1
    return kv_prompt(records[:count], key), kv_answer(value)


OFFLOAD_OPTIONS = ("resident_tokens", "prefetch_heads", "offload_mode", "min_agreement", "no_pack")


def parse_arguments():
    """The options of the command line; ValueError, in one line, for values that cannot be."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"),
                        help="converted directory, Hugging Face directory, hub id or GGUF file"
                        " (default: the embedded tiny model)")
    parser.add_argument("--prompt", action="append",
                        help="text to continue; repeat it for a batch (default: a demonstration)")
    parser.add_argument("--prompt_file", type=InputFile(),
                        help="UTF-8 file with the text to continue")
    parser.add_argument("--max_new_tokens", type=Number(int, 1), default=200,
                        help="tokens to generate per prompt; the demonstration stops after its "
                             "answer (default %(default)s)")
    parser.add_argument("--temperature", type=Number(float, 0, 1000), default=0.0,
                        help="0: always the most likely token (default %(default)g)")
    parser.add_argument("--top_k", type=Number(int, 1),
                        help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=Number(int, 0, 2**63 - 1), default=0,
                        help="of the sampling (default %(default)s)")
    add_sparsity_arguments(parser)
    parser.add_argument("--dense_below", type=Number(int, 0), metavar="TOKENS",
                        default=DSConfig.dense_below,
                        help="sequences that are shorter attend to everything: sparse steps could "
                             "not be faster; with --offload so many tokens are on the GPU "
                             "(default %(default)s)")
    parser.add_argument("--max_seq_length", type=Number(int, 2), metavar="TOKENS",
                        help="tokens of a sequence at most, where generation ends, and positions "
                             "that labels are fitted to (default: all of the model's); the cache "
                             "holds as many of them as can come")
    parser.add_argument("--offload", action="store_true",
                        help="keep K and V in host memory, on the GPU only labels, the dense "
                             "layers and tokens that recent steps attended to; with --sparsity 1 "
                             "all of K and V is streamed in each step")
    parser.add_argument("--resident_tokens", type=Number(int, 1), metavar="TOKENS",
                        help="with --offload: tokens per sequence, layer and KV head kept on the "
                             "GPU (default: those that a step attends to, or --dense_below if "
                             "that is more)")
    parser.add_argument("--prefetch_heads", type=Number(int, 0), metavar="HEADS",
                        help="with --offload in the exact mode: KV heads of each layer whose "
                             "tokens are fetched while the layer before computes, as its input "
                             "predicts them (default: as many as PCIe then has time for if none "
                             "is resident, at most three of eight; on a CPU 0)")
    parser.add_argument("--offload_mode", choices=MODES, default=MODES[0],
                        help="with --offload: attend to what each layer's own query selects, "
                             "whatever was predicted, or to the predicted tokens, so that fetches "
                             "hide behind compute (default %(default)s)")
    parser.add_argument("--min_agreement", type=Number(float, 0, 1), default=MIN_AGREEMENT,
                        metavar="SHARE",
                        help="with --offload: predict only layers for which calibration predicted "
                             "at least this share of the selected tokens (default %(default)g)")
    parser.add_argument("--no_pack", action="store_true",
                        help="with --offload: send bfloat16 K and V over PCIe as they are, not "
                             "packed, without loss, to 12 bits of 16")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--compile", action="store_true",
                        help="on a GPU, prefill through torch.compile: a seventh faster, but it "
                             "starts some 18 s later")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="of weights and cache (default: bfloat16 on a GPU, float32 on a CPU)")
    add_quantize_argument(parser)
    parser.add_argument("--interactive", action="store_true",
                        help="read lines from the terminal and answer each, by the checkpoint's "
                             "chat template if it has one; an empty line or Ctrl-D ends")
    parser.add_argument("--no_chat_template", action="store_true",
                        help="with --interactive: continue the lines as plain text all the same")
    parser.add_argument("--chat", action="store_true",
                        help="put each prompt into the checkpoint's chat template")
    parser.add_argument("--compare", action="store_true",
                        help="generate dense and sparse: both texts, where they part, how far "
                             "apart their next-token distributions are, both speeds")
    parser.add_argument("--json", type=OutputFile(), metavar="FILE",
                        help="write tokens, texts and statistics to this file")
    args = parser.parse_args()
    for name in OFFLOAD_OPTIONS:
        if getattr(args, name) != parser.get_default(name) and not args.offload:
            raise ValueError(f"{name}={getattr(args, name)}: without --offload all tokens are on "
                             "the GPU; add that option")
    if args.temperature and args.temperature < 1e-3:
        raise ValueError(f"temperature={args.temperature}: must be 0, always the most likely "
                         "token, or at least 0.001")
    if args.top_k and not args.temperature:
        raise ValueError(f"top_k={args.top_k}: with --temperature 0 the most likely token is "
                         "always taken; give one above 0")
    others = args.prompt or args.prompt_file or args.json or args.compare or args.chat
    if args.interactive and others:
        raise ValueError("--interactive reads its prompts from the terminal: leave out --prompt, "
                         "--prompt_file, --json, --compare and --chat")
    if args.no_chat_template and not args.interactive:
        raise ValueError("--no_chat_template: only --interactive takes a template by itself; leave "
                         "the option out")
    if args.chat and not (args.prompt or args.prompt_file):
        raise ValueError("--chat: needs a --prompt or --prompt_file to put into the template")
    return args


def cache_length(prompts, max_new_tokens, max_seq_length, config):
    """Tokens of cache per sequence. Raises ValueError for lengths that do not fit."""
    longest = max(map(len, prompts), default=0)
    wanted = longest + max_new_tokens if prompts else config.max_positions
    if min(wanted, max_seq_length or wanted) > config.max_positions:
        raise ValueError(f"{longest} prompt tokens + max_new_tokens={max_new_tokens} is more than "
                         f"the model's {config.max_positions} positions; shorten one of them")
    if max_seq_length and max_seq_length <= longest:
        raise ValueError(f"max_seq_length={max_seq_length}: must be more than the {longest} tokens "
                         "of the longest prompt")
    return min(wanted, max_seq_length or wanted)


def say_if_dense(ds, size, config):
    """Says on stderr if, by a DSConfig, steps attend to every token of caches of `size` tokens."""
    live = min(size, config.longest_window or size)
    if ds is not None and not ds.sparse_at(live):
        least = f"n_tokens={ds.n_tokens}" if ds.n_tokens else f"min_tokens={ds.min_tokens}"
        of_budget = not replace(ds, dense_below=0).sparse_at(live)
        why = f"{least} is no fewer" if of_budget else f"dense_below={ds.dense_below}"
        print(f"All tokens are attended, as there are at most {live} ({why}).", file=sys.stderr)


def converse(step, tokenizer, args):
    """The --interactive loop; answers stream. Each line is a turn of the checkpoint's chat template
    or, without one, a new line after the tokens so far. The cache keeps what is unchanged."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401: editing, history, and lines of any length
    print("An empty line or Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    messages, ids = [], []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except UnicodeDecodeError:
            print("that line is not UTF-8 text: try another", file=sys.stderr)
            continue
        if not line:
            return
        turn = [*messages, {"role": "user", "content": line}]
        try:
            if chat:  # all of it anew: a template may change what it made of earlier turns
                whole = tokenizer.chat(turn)
            else:
                whole = ids + tokenizer.encode_line(line) if ids else tokenizer.encode(line)
        except ValueError as error:
            print(f"{error}: try another line", file=sys.stderr)
            continue
        room = step.cache.max_seq_length - len(whole)
        if room < 1:
            print(f"with that line the conversation has {len(whole)} tokens, and the cache holds "
                  f"{step.cache.max_seq_length}: a shorter one may fit", file=sys.stderr)
            continue
        messages = turn
        cached = max(0, len(ids) - 1)  # K and V of the last new token were not needed yet
        kept = min([i for i, (a, b) in enumerate(zip(ids[:cached], whole)) if a != b]
                   + [cached, len(whole) - 1])
        stream = Streamer(tokenizer, whole)
        try:
            result = generate(step, [whole[kept:]], min(args.max_new_tokens, room), kept, stream)
        except KeyboardInterrupt:
            result = None
        stream.finish()
        answer = result.token_ids[0] if result else stream.tokens
        if result is None and not answer:  # no token came: the prompt may not be in the cache
            ids, messages = whole[:kept], messages[:-1]
            continue
        ids = whole + answer
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        if result:
            print_statistics(run_statistics(result, step.cache, args.device), args.device)


def compare(model, tokenizer, prompts, size, ds, label_maps, cache_type, args):
    """The --compare run: prints both texts and how they differ; returns the figures, for --json."""
    found, text_ids, logits = {}, {}, {}
    bar = tqdm(total=2 * sum(map(len, prompts)), desc="prefill, dense and ds", unit="token",
               leave=False, delay=2)
    for mode, config in (("dense", None), ("ds", ds)):
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        cache = cache_type(model.config, len(prompts), size, args.device, model.dtype, config,
                           label_maps)
        step = DecodeStep(model, cache, args.temperature, args.top_k, args.seed)
        result = generate(step, prompts, min(args.max_new_tokens, size - max(map(len, prompts))),
                          progress=bar.update)
        found[mode], text_ids[mode] = run_statistics(result, cache, args.device), result.token_ids
        # on the host: dense's outlive its cache, for which there may be no room beside the other
        logits[mode] = (x.cpu() for x in forced_logits(step, prompts, text_ids["dense"]))
        if mode == "dense":
            logits[mode] = list(logits[mode])
            del step, cache
    bar.close()
    kl = divergence(logits["dense"], logits["ds"], text_ids["dense"])
    texts = {mode: [new_tokens_text(tokenizer, *pair) for pair in zip(prompts, ids)]
             for mode, ids in text_ids.items()}
    parted = []
    for b, (ours, dense) in enumerate(zip(text_ids["ds"], text_ids["dense"])):
        same = next((i for i, (x, y) in enumerate(zip(ours, dense)) if x != y),
                    min(len(ours), len(dense)))
        parted.append(None if ours == dense else same)
        print(f"=== prompt {b + 1}, dense\n{texts['dense'][b]}\n"
              f"=== prompt {b + 1}, ds\n{texts['ds'][b]}")
        print(f"=== prompt {b + 1}: " + (
            f"the same {len(ours)} tokens" if ours == dense else f"they part after {same} tokens, "
            f"dense with {tokenizer.decode(dense[same : same + 1])!r}, "
            f"ds with {tokenizer.decode(ours[same : same + 1])!r}"))
    print(f"KL of ds from dense over dense's text: {kl:.6f} nats per token")
    for mode in found:
        print_statistics(found[mode], args.device, f"--- {mode}")
    return {"token_ids": text_ids, "text": texts, "first_difference": parted, "kl": kl, **found}


def main():
    """The command line: answers the prompts, compares dense with sparse, or converses."""
    args = parse_arguments()
    ds = sparsity_from(args)
    if args.compare and ds is None:
        raise ValueError("--compare sets sparse against dense: give a --sparsity above 1")
    if args.offload_mode == "predicted" and ds is None:
        raise ValueError("offload_mode=predicted: nothing is selected with --sparsity 1; take a "
                         "larger one, or leave the mode out")
    args.device, ranks = pick_device(args.device), parallel.size()
    if args.compile and args.device == "cpu":
        raise ValueError("--compile: is for a GPU; leave it out on a CPU")
    for name in ("compile", "interactive"):
        if getattr(args, name) and ranks > 1:
            raise ValueError(f"--{name}: is for one process; leave it or torchrun out")
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    texts = list(args.prompt or [])
    if args.prompt_file:
        texts.append(read_text(args.prompt_file))
    texts = [text.removeprefix("\ufeff") for text in texts]
    config, tokenizer, checkpoint = open_checkpoint(args.checkpoint)
    config = parallel.share(config, ranks)
    answer = None
    if not texts and not args.interactive:
        prompt, answer = demonstration(tokenizer)
        texts = [prompt]
        answer_tokens = len(tokenizer.encode(answer[1:], special=False))
        args.max_new_tokens = min(args.max_new_tokens, answer_tokens)
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) if args.chat
               else tokenizer.encode(text) for text in texts]
    if [] in prompts or tokenizer.prefix in prompts:
        raise ValueError("the prompt is empty: give at least one character of text")
    check_layers(ds, config)
    size = cache_length(prompts, args.max_new_tokens, args.max_seq_length, config)
    cache_type, needs = KVCache, (config, max(1, len(prompts)), size, dtype)
    if args.offload:
        cache_type = functools.partial(
            OffloadCache, resident_tokens=args.resident_tokens, prefetch_heads=args.prefetch_heads,
            mode=args.offload_mode, packed=not args.no_pack)
    for config_ds in (None, ds) if args.compare else (ds,):
        if args.offload:
            check_host_memory(free_host_bytes() // ranks, *needs, config_ds)
        if args.device != "cpu":
            check_memory(torch.cuda.mem_get_info()[0], *needs, config_ds, cache_type, args.quantize)
        elif not args.offload:
            check_memory(free_host_bytes() // ranks, *needs, config_ds, quantize=args.quantize,
                         of="host")
    if ds and not args.channels:
        ensure_calibrated(checkpoint, args.device)  # before the model is loaded: it loads its own
    say_if_dense(ds, size, config)
    model = load_model(checkpoint, args.device, dtype, args.quantize, ranks)
    label_maps = ds and load_maps(checkpoint, config, ds, args.device, args.channels,
                                  args.max_seq_length)
    if ds and args.offload:
        channels = args.channels or checkpoint / "channels.safetensors"
        cache_type = functools.partial(cache_type, predictable=predictable_layers(
            channels, args.min_agreement, args.offload_mode))
    if args.compile:
        model.compile_blocks()
    if answer:
        question = texts[0].rpartition("}\n")[2].strip()  # what follows the document
        print(f"no prompt given: a generated document of {len(prompts[0])} tokens, then\n"
              f"{question}", file=sys.stderr)
    if args.compare:
        found = compare(model, tokenizer, prompts, size, ds, label_maps, cache_type, args)
    else:
        cache = cache_type(config, max(1, len(prompts)), size, args.device, dtype, ds, label_maps)
        step = DecodeStep(model, cache, args.temperature, args.top_k, args.seed)
        if args.interactive:
            return converse(step, tokenizer, args)
        bar = tqdm(total=sum(map(len, prompts)), desc="prefill", unit="token", leave=False, delay=2)
        stream = Streamer(tokenizer, prompts[0]) if len(prompts) == 1 else None

        def on_token(b, token):
            bar.close()  # the first one ends the prefill
            stream(b, token)

        result = generate(step, prompts, min(args.max_new_tokens, size - max(map(len, prompts))), 0,
                          stream and on_token, bar.update)
        bar.close()
        outputs = [new_tokens_text(tokenizer, *pair) for pair in zip(prompts, result.token_ids)]
        if stream:
            stream.finish()
        else:
            for b, (text, output) in enumerate(zip(texts, outputs)):
                print(f"=== prompt {b + 1}\n{text}{output}")
        if answer:
            cut = args.max_new_tokens < answer_tokens
            verdict = ("right" if outputs[0].strip() == answer.strip()
                       else f"cut short by --max_new_tokens, it is {answer.strip()}"
                       if cut and answer.strip().startswith(outputs[0].strip())
                       else f"wrong, it is {answer.strip()}")
            print(f"the answer is {verdict}", file=sys.stderr)
        found = {"token_ids": result.token_ids, "text": outputs,
                 **run_statistics(result, cache, args.device)}
        print_statistics(found, args.device)
    if args.json:
        found |= {"prompt_token_ids": prompts, "config": {
            "checkpoint": args.checkpoint, "device": args.device,
            "dtype": str(dtype).removeprefix("torch."), "max_new_tokens": args.max_new_tokens,
            "max_seq_length": size, "temperature": args.temperature, "top_k": args.top_k,
            "seed": args.seed, "compile": args.compile, "quantize": args.quantize,
            "label_positions": args.max_seq_length or config.max_positions,
            "double_sparsity": asdict(ds) if ds else None,
            "offload": {name: getattr(args, name) for name in OFFLOAD_OPTIONS}
                       if args.offload else None}}
        with writing(args.json) as file:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main, several=True)
