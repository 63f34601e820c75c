"""Text generation with Double Sparsity: load a checkpoint, prefill the prompts, decode, stream.

Usage: python generate.py --sparsity 16                                the built-in demonstration on tiny/
       python generate.py --checkpoint DIR_OR_HUB_ID --prompt "Once upon a time" --max_new_tokens 100
"""
import argparse
import contextlib
import hashlib
import json
import random
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import sentencepiece
import torch
from tqdm import tqdm

from convert_hf import convert
from ds_attention import DSConfig
from model import ArgumentParser, KVCache, load_label_maps, load_model, open_tensors, run_command
from tiny.tasks import kv_answer, kv_prompt, random_kv

HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------- loading


class Tokenizer:
    """A checkpoint's tokenizer.model (SentencePiece), or its tokenizer.json through the optional package tokenizers."""

    def __init__(self, checkpoint, bos_id):
        """bos_id: the model's beginning-of-text token, put in front by encode; None for none."""
        self.bos_id = bos_id
        model_file, json_file = Path(checkpoint) / "tokenizer.model", Path(checkpoint) / "tokenizer.json"
        if model_file.exists():
            try:
                processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
            except (RuntimeError, OSError):
                raise ValueError(f"{model_file}: not a SentencePiece model") from None
            self._encode, self.decode, self.size = processor.encode, processor.decode, processor.get_piece_size
        elif json_file.exists():
            try:
                import tokenizers
            except ImportError:
                raise ValueError(f"{json_file}: this tokenizer needs one more package: pip install tokenizers") from None
            processor = tokenizers.Tokenizer.from_file(str(json_file))
            self._encode = lambda text: processor.encode(text, add_special_tokens=False).ids
            self.decode, self.size = processor.decode, processor.get_vocab_size
        else:
            raise ValueError(f"{checkpoint}: no tokenizer.model or tokenizer.json")

    def encode(self, text, bos=True):
        """text -> token ids, bos_id in front unless bos is False or the model has none."""
        text.encode()  # raises for a command line argument that was not UTF-8
        return ([self.bos_id] if bos and self.bos_id is not None else []) + self._encode(text)


def pick_device(name):
    """The --device argument -> "cuda" or "cpu". Raises ValueError for a GPU that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device={name}: must be cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: no GPU that torch can use; run with --device cpu")
    return name


def default_dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def is_converted(directory):
    path = directory / "model.safetensors"
    if not path.exists():
        return False
    with open_tensors(path) as file:
        return "embed.weight" in file.keys()


def resolve_checkpoint(name):
    """A checkpoint directory of ours for a path or hub id; a Hugging Face one is converted to checkpoints/ first."""
    source = Path(name)
    if not name:
        raise ValueError("the checkpoint's name is empty: give a directory or a hub id")
    if source.is_dir():
        if is_converted(source):
            return source
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.iterdir())
        tag = hashlib.sha256(repr((str(source.resolve()), files)).encode()).hexdigest()[:8]
        converted = HERE / "checkpoints" / f"{source.resolve().name}-{tag}"
    else:
        converted = HERE / "checkpoints" / name.replace("/", "--")
    if not is_converted(converted):
        convert(name, converted)
        print(f"{name} was not converted yet: converted to {converted}", file=sys.stderr)
    return converted


def load_maps(checkpoint, config, ds, device, channels=None):
    """The label maps of a checkpoint, which is calibrated first if it has none. channels: another file with them."""
    if channels is None and not (checkpoint / "channels.safetensors").exists():
        from calibrate import calibrate  # calibrate is built on this file: imported only where it is called

        print(f"{checkpoint} is not calibrated yet: calibrating (once)", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            calibrate(checkpoint, device=device, dtype=default_dtype(device), ds=ds)
    return load_label_maps(checkpoint, config, ds, channels)


def load(name, device, dtype):
    """A checkpoint by directory or hub id -> (model, tokenizer, our checkpoint directory)."""
    checkpoint = resolve_checkpoint(name)
    model = load_model(checkpoint, device, dtype)
    tokenizer = Tokenizer(checkpoint, model.config.bos_id)
    if tokenizer.size() > model.config.vocab_size:
        raise ValueError(f"{checkpoint}: the tokenizer has {tokenizer.size()} pieces, the model a vocabulary of "
                         f"{model.config.vocab_size}: they do not belong together")
    return model, tokenizer, checkpoint


# ---------------------------------------------------------------- generation


def sample(logits, temperature=0.0, top_k=None, generator=None):
    """logits [B, vocab] -> tokens [B]; temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@dataclass
class Generation:
    """What came out, and what it cost. Times in seconds, bytes of the whole batch."""

    token_ids: list = field(default_factory=list)  # one list of new tokens per prompt, end-of-text not included
    ttft_s: float = 0.0  # prefill and the first token
    decode_s: float = 0.0  # all tokens after the first
    kv_bytes_per_step: float = 0.0  # cache read by a decode step, labels included, mean over the steps
    dense_kv_bytes_per_step: float = 0.0

    def decode_tokens_per_s(self):
        """Tokens after the first, of all sequences together, per second."""
        later = sum(max(0, len(ids) - 1) for ids in self.token_ids)
        return later / self.decode_s if self.decode_s else 0.0


def generate(model, cache, prompts, max_new_tokens, start=0, temperature=0.0, top_k=None, seed=0, on_token=None,
             progress=None):
    """Decodes a ragged batch of prompts (lists of token ids) together; a sequence stops at its end-of-text token.

    All of a prompt but its last token is prefilled; that one is the first decode step, so that every new token comes
    out of the same (sparse) step. start: tokens already in the cache, for one more turn of a conversation.
    on_token(b, token): called as tokens come. Returns a Generation.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    result = Generation([[] for _ in prompts])
    began = time.perf_counter()
    model.prefill([prompt[:-1] for prompt in prompts], cache, start, progress=progress)
    tokens = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    lengths = [start + len(prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    steps = 0
    for steps in range(1, max_new_tokens + 1):
        tokens = sample(model.decode(tokens, cache), temperature, top_k, generator)
        for b, token in enumerate(tokens.tolist()):
            if b in running and token in model.config.eos_ids:
                running.discard(b)
            elif b in running:
                result.token_ids[b].append(token)
                if on_token:
                    on_token(b, token)
        sparse_bytes, dense_bytes = cache.read_bytes([length + steps - 1 for length in lengths])
        result.kv_bytes_per_step += sparse_bytes
        result.dense_kv_bytes_per_step += dense_bytes
        if steps == 1:
            result.ttft_s = time.perf_counter() - began
        if not running:
            break
    result.decode_s = time.perf_counter() - began - result.ttft_s
    result.kv_bytes_per_step /= max(steps, 1)
    result.dense_kv_bytes_per_step /= max(steps, 1)
    return result


class Streamer:
    """Prints one sequence's text as its tokens come; a character is held back until all its bytes are there."""

    def __init__(self, tokenizer, context=()):
        """context: the tokens before; the last few suffice for the first new piece to keep its leading space."""
        self.tokenizer = tokenizer
        self.ids = list(context)[-16:]
        self.printed = len(tokenizer.decode(self.ids))

    def __call__(self, b, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self._print(text)

    def _print(self, text):
        print(text[self.printed :], end="", flush=True)
        self.printed = len(text)

    def finish(self):
        """Prints what is left of a character that was never completed, and the end of the line."""
        self._print(self.tokenizer.decode(self.ids) + "\n")


# ---------------------------------------------------------------- command line


def peak_memory_bytes(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_statistics(result, cache, device):
    share = result.kv_bytes_per_step / max(result.dense_kv_bytes_per_step, 1)
    memory = "GPU" if device != "cpu" else "process"
    print(f"time to first token {result.ttft_s * 1e3:.0f} ms | decode {result.decode_tokens_per_s():.1f} tokens/s | cache read "
          f"per step {result.kv_bytes_per_step / 1e6:.2f} MB, dense {result.dense_kv_bytes_per_step / 1e6:.2f} MB "
          f"({share:.0%}) | KV cache {cache.kv_bytes() / 2**20:.1f} MiB + labels {cache.label_bytes() / 2**20:.1f} MiB | "
          f"peak {memory} memory {peak_memory_bytes(device) / 2**30:.2f} GiB", file=sys.stderr)


def demonstration(tokenizer, max_tokens=4000):
    """A generated document of about 4,000 tokens with facts in it and a question about one: (prompt, answer)."""
    rng = random.Random(0)
    records = random_kv(rng, 2000)
    key, value = records[17]
    count = 20
    while len(tokenizer.encode(kv_prompt(records[: count + 1], key))) <= max_tokens:
        count += 1
    return kv_prompt(records[:count], key), kv_answer(value)


def add_sparsity_arguments(parser):
    """The DSConfig fields that a command line offers; defaults are read from the dataclass."""
    default = DSConfig()
    parser.add_argument("--sparsity", type=float, default=default.sparsity, metavar="R",
                        help="attend to 1/R of the tokens, with labels of 1/R of K's bytes; 1: dense (default %(default)g)")
    parser.add_argument("--n_tokens", type=int, help="attend to this many tokens instead of a share")
    parser.add_argument("--label_channels", type=int, metavar="C", help="label dims per KV head (default: from --sparsity)")
    parser.add_argument("--label_bits", type=int, default=default.label_bits, help="bits per label dim: 2, 4, 8 or 16 "
                                                                                   "(default %(default)s)")
    parser.add_argument("--channels", metavar="FILE", help="label maps of calibrate.py --out (default: the checkpoint's own)")
    parser.add_argument("--dense_layers", type=int, default=default.dense_layers,
                        help="first layers that attend to everything (default %(default)s)")


def sparsity_from(args):
    """DSConfig of the arguments, or None for dense. Raises ValueError for values out of bounds."""
    if args.sparsity == 1 and args.n_tokens is None:
        return None
    names = {f.name for f in fields(DSConfig)}
    chosen = {name: value for name, value in vars(args).items() if name in names}
    if args.sparsity == 1:  # --n_tokens alone decides how many tokens, the default how large the labels are
        del chosen["sparsity"]
    return DSConfig(**chosen)


def parse_arguments():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(HERE / "tiny"),
                        help="converted directory, Hugging Face directory or hub id (default: the embedded tiny model)")
    parser.add_argument("--prompt", action="append", help="text to continue; repeat it for a batch (default: a demonstration)")
    parser.add_argument("--prompt_file", help="UTF-8 file with the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate per prompt; the demonstration stops after its answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token (default %(default)g)")
    parser.add_argument("--top_k", type=int, help="sample among the k most likely tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    add_sparsity_arguments(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="of weights and cache (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--interactive", action="store_true", help="read lines from the terminal and continue after each; "
                                                                   "an empty line or Ctrl-D ends")
    parser.add_argument("--json", metavar="FILE", help="write tokens, texts and statistics to this file")
    args = parser.parse_args()
    for name, low in [("max_new_tokens", 1), ("temperature", 0), ("top_k", 1)]:
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name}={value}: must be at least {low}")
    if args.interactive and (args.prompt or args.prompt_file or args.json):
        raise ValueError("--interactive reads its prompts from the terminal: leave out --prompt, --prompt_file and --json")
    return args


def check_lengths(prompts, max_new_tokens, config, ds):
    """Raises ValueError for an empty prompt and for lengths that the model has no positions for."""
    for prompt in prompts:
        if not prompt or prompt == [config.bos_id]:
            raise ValueError("the prompt is empty: give at least one character of text")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > config.max_positions:
        raise ValueError(f"{longest} prompt tokens + max_new_tokens={max_new_tokens} is more than the model's "
                         f"{config.max_positions} positions; shorten one of them")
    total = longest + max_new_tokens
    if ds is not None and ds.budget(total) >= total:
        least = f"n_tokens={ds.n_tokens}" if ds.n_tokens else f"the least budget, {ds.min_tokens} tokens,"
        print(f"{least} is no less than the {total} tokens there will be: every token is attended (dense)", file=sys.stderr)


def converse(model, tokenizer, cache, args):
    """The --interactive loop: each line continues the text so far, the answer streams. The cache keeps what is unchanged."""
    text, ids = "", []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line:
            return
        whole = tokenizer.encode(f"{text}\n{line}" if text else line)
        room = cache.max_seq_length - len(whole)
        if room < 1:
            print("the conversation has used up the model's positions", file=sys.stderr)
            return
        cached = max(0, len(ids) - 1)  # K and V of the last new token were not needed yet
        kept = min([i for i, (a, b) in enumerate(zip(ids[:cached], whole)) if a != b] + [cached, len(whole) - 1])
        stream = Streamer(tokenizer, whole)
        result = generate(model, cache, [whole[kept:]], min(args.max_new_tokens, room), kept, args.temperature, args.top_k,
                          args.seed, stream)
        ids = whole + result.token_ids[0]
        text = tokenizer.decode(ids)
        stream.finish()
        print_statistics(result, cache, args.device)


def main():
    args = parse_arguments()
    ds = sparsity_from(args)
    args.device = pick_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    texts = list(args.prompt or [])
    if args.prompt_file:
        texts.append(read_text(args.prompt_file))
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"{args.json}: no such directory to write to")
    model, tokenizer, checkpoint = load(args.checkpoint, args.device, dtype)
    answer = None
    if not texts and not args.interactive:
        prompt, answer = demonstration(tokenizer)
        texts = [prompt]
        args.max_new_tokens = min(args.max_new_tokens, len(tokenizer.encode(answer[1:], bos=False)))
    prompts = [tokenizer.encode(text) for text in texts]
    if prompts:
        check_lengths(prompts, args.max_new_tokens, model.config, ds)
    label_maps = load_maps(checkpoint, model.config, ds, args.device, args.channels) if ds else None
    size = model.config.max_positions if args.interactive else max(map(len, prompts)) + args.max_new_tokens
    cache = KVCache(model.config, max(1, len(prompts)), size, args.device, dtype, ds, label_maps)
    if args.interactive:
        return converse(model, tokenizer, cache, args)

    if answer:
        question = texts[0].rpartition("}\n")[2].strip()  # what follows the document
        print(f"no prompt given: a generated document of {len(prompts[0])} tokens, then\n{question}", file=sys.stderr)
    bar = tqdm(total=sum(map(len, prompts)), desc="prefill", unit="token", leave=False, delay=2)
    stream = Streamer(tokenizer, prompts[0]) if len(prompts) == 1 else None
    result = generate(model, cache, prompts, args.max_new_tokens, 0, args.temperature, args.top_k, args.seed, stream,
                      bar.update)
    bar.close()
    outputs = [tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :] for prompt, ids in zip(prompts, result.token_ids)]
    if stream:
        stream.finish()
    else:
        for b, (text, output) in enumerate(zip(texts, outputs)):
            print(f"=== prompt {b + 1}\n{text}{output}")
    if answer:
        verdict = "right" if outputs[0].strip() == answer.strip() else f"wrong, it is {answer.strip()}"
        print(f"the answer is {verdict}", file=sys.stderr)
    print_statistics(result, cache, args.device)
    if args.json:
        Path(args.json).write_text(json.dumps({
            "prompt_token_ids": prompts, "token_ids": result.token_ids, "text": outputs, "ttft_ms": result.ttft_s * 1e3,
            "decode_tokens_per_s": result.decode_tokens_per_s(), "kv_bytes_per_step": result.kv_bytes_per_step,
            "dense_kv_bytes_per_step": result.dense_kv_bytes_per_step, "kv_cache_bytes": cache.kv_bytes(),
            "label_cache_bytes": cache.label_bytes(), "peak_memory_bytes": peak_memory_bytes(args.device),
            "config": {"checkpoint": args.checkpoint, "device": args.device, "dtype": str(dtype).removeprefix("torch."),
                       "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
                       "seed": args.seed, "double_sparsity": asdict(ds) if ds else None},
        }, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
