"""Trains the embedded checkpoint, 17.7M parameters, on books and generated retrieval documents.

It takes about ten minutes on one H200. The schedule is in steps and every batch is a function of
(seed, step), so a run stopped by --seconds continues as if it had not stopped when the same command
is given again. DIR/state.pt holds what that needs; when the last step is done, DIR/checkpoint holds
config.json, model.safetensors (bf16) and tokenizer.model.

Dimensions: `B` windows in a batch, `T` tokens in a window, `V` vocabulary, `E` model dim.

Usage:
    python tiny/train.py --data ../shared/data --train_tokenizer
    python tiny/train.py --data ../shared/data --out runs/tiny
    python tiny/train.py --data ../shared/data --out runs/smoke --preset smoke --workers 2
"""
import contextlib
import dataclasses
import io
import json
import lzma
import math
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# `python tiny/train.py` puts only tiny/ on the path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import ArgumentParser, Number, run_command  # noqa: E402
from config import ModelConfig  # noqa: E402
from model import Transformer  # noqa: E402
from tiny import tasks  # noqa: E402

BOS, EOS = 1, 2
LOG_EVERY = 50  # steps; reading the losses waits for the device

# What a target token belongs to -> its weight in the loss. A code is its kind's position here.
KINDS = {"none": 0.0, "book": 1.0, "context": 0.1, "key": 1.0, "value": 4.0, "line": 6.0,
         "needle": 6.0, "copy": 2.0}
NONE, BOOK, CONTEXT, KEY, VALUE, LINE, NEEDLE, COPY = range(len(KINDS))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, except the data and the tokenizer."""
    steps: int = 7000
    seed: int = 0
    batch: int = 32  # windows a step; from `long_from` on, half as many of twice the length
    window: int = 4096  # tokens
    long_from: float = 0.65  # of the steps
    short_until: float = 0.1  # of the steps: till then generated documents have at most 1024 tokens
    generated: float = 0.25  # of the windows; the rest are book text
    warmup: int = 200  # steps
    decay_from: float = 0.4  # of the steps; the learning rate falls linearly to 0 from there
    lr: float = 4e-3  # of both optimisers
    weight_decay: float = 0.1  # of the matrices
    dim: int = 512
    layers: int = 7
    heads: int = 4
    head_dim: int = 128
    ffn: int = 768

    def batch_shape(self, step: int) -> tuple[int, int]:
        """B and T of a step."""
        return ((self.batch // 2, 2 * self.window) if step >= self.long_from * self.steps
                else (self.batch, self.window))

    def lr_at(self, step: int) -> float:
        decay = min(1.0, (1 - step / self.steps) / (1 - self.decay_from))
        return self.lr * min(1.0, (step + 1) / self.warmup) * decay

    def hf_config(self, vocab: int) -> dict:
        """The checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.dim,
            "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "head_dim": self.head_dim, "vocab_size": vocab,
            "max_position_embeddings": 2 * self.window, "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
            "attention_bias": False, "mlp_bias": False,
            "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
        }


PRESETS = {
    "full": Recipe(),
    "smoke": Recipe(steps=12, batch=8, window=256, warmup=2, dim=64, layers=2, heads=2,
                    head_dim=32, ffn=96),
}


# ---------------------------------------------------------------- tokenizer


def read_books(data: Path):
    """Yields the text of each training book."""
    for path in sorted(data.glob("books-train-*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            try:
                for line in lines:
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise TypeError(f"text is {text!r:.40}")
                    yield text
            except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: damaged, or not a line of JSON with a \"text\" per book "
                                 f"({error!r})") from None


def train_tokenizer(data: Path, path: Path, seed: int = 0):
    """SentencePiece BPE on 66 kB of each book and some MB of the tasks, and no pieces for hex."""
    rng = random.Random(seed)

    def sample():
        for text in read_books(data):
            for _ in range(3):
                start = rng.randrange(max(1, len(text) - 22_000))
                yield from text[start : start + 22_000].split("\n")
        for _ in range(1200):
            # Decimal digits in place of hex: digits are never merged, so these teach nothing.
            records = [(tasks.random_uuid(rng, "0123456789"), tasks.random_uuid(rng, "0123456789"))
                       for _ in range(12)]
            lines, needles = tasks.random_lines(rng, 12), tasks.random_needles(rng, 2)
            yield from (tasks.kv_prompt(records, records[0][0])
                        + tasks.kv_answer(records[0][1])).split("\n")
            yield from (tasks.lines_prompt(lines, lines[0][0])
                        + tasks.lines_answer(lines[0][1])).split("\n")
            yield from (tasks.needle_prompt("", needles, needles[0][0])
                        + tasks.needle_answer(needles[0][1])).split("\n")

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sample(), model_writer=model, model_type="bpe", vocab_size=4096,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        character_coverage=0.99995, max_sentence_length=100_000,
        unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, num_threads=os.cpu_count())
    path.write_bytes(model.getvalue())


class Tokenizer:
    """SentencePiece, with loss kinds carried from text to tokens. Ids fit int16."""

    def __init__(self, path: Path):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(
                f"{path}: not a SentencePiece model; --train_tokenizer makes one") from None
        self.vocab = self.sp.get_piece_size()
        pieces = [self.sp.id_to_piece(i) for i in range(self.vocab)]
        self.n_bytes = np.array([  # [V] bytes of text a token stands for
            0 if self.sp.is_control(i) else 1 if self.sp.is_byte(i)
            else len(piece.replace("\u2581", " ").encode())
            for i, piece in enumerate(pieces)])

    def encode_book(self, text: str) -> np.ndarray:
        return np.array([BOS, *self.sp.encode(text), EOS], dtype=np.int16)

    def encode_pieces(self, pieces: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and codes of (text, code) pieces as one text; a token has its last byte's code."""
        ids = np.array(self.sp.encode("".join(text for text, _ in pieces)), dtype=np.int16)
        last_byte = np.cumsum(self.n_bytes[ids]) - 2  # 1 for a last byte, 1 for the space in front
        piece_end = np.cumsum([len(text.encode()) for text, _ in pieces])
        codes = np.array([code for _, code in pieces], dtype=np.uint8)
        return ids, codes[np.searchsorted(piece_end, last_byte, side="right")]


def tokenize_books(data: Path, tokenizer: Tokenizer, path: Path, workers: int):
    """Writes all books, one after the other, as one int16 array."""
    with multiprocessing.Pool(workers) as pool:
        tokens = np.concatenate(list(pool.imap(tokenizer.encode_book, read_books(data))))
    np.save(path.with_suffix(".tmp.npy"), tokens)
    os.replace(path.with_suffix(".tmp.npy"), path)


# ---------------------------------------------------------------- generated documents
# A maker returns about `length` tokens as (text, code) pieces; passage(n) about n of a book.


def marked(text: str, part: str, code: int) -> list[tuple[str, int]]:
    """`text` as context, except that each `part` in it has `code`."""
    pieces = [(part, code)]
    for other in text.split(part):
        pieces += [(other, CONTEXT), (part, code)]
    return pieces[1:-1]


def budget(rng, length: int, per_fact: int, per_question: int) -> tuple[int, int]:
    """How many facts and questions fill `length` tokens; few of these in two documents of five."""
    share = rng.uniform(0.08, 0.25) if rng.random() < 0.4 else rng.uniform(0.25, 0.7)
    return max(2, int(length * (1 - share) / per_fact)), max(1, int(length * share / per_question))


def draw(rng, facts: list, n: int) -> list:
    """`n` of the facts in random order; none comes again before all have come."""
    drawn = []
    while len(drawn) < n:
        drawn += rng.sample(facts, len(facts))
    return drawn[:n]


# Other layouts of key-value items: a row, and what is asked; and (maker, tokens) of other items.
KV_LAYOUTS = (("{}: {}\n", "{}:"), ("{} -> {}\n", "Q: {}?\nA:"),
              ('"{}": "{}", ', 'The value of "{}" is'))
KV_ITEMS = ((tasks.random_uuid, 36), (tasks.random_name, 4),
            (lambda rng: tasks.random_number(rng, 6), 7),
            (lambda rng: tasks.random_uuid(rng)[:8], 8))


def kv_document(rng, length, passage):
    item, item_tokens = KV_ITEMS[0]
    row = None
    if rng.random() < 0.3:  # the others are worded as the tests are
        item, item_tokens = rng.choice(KV_ITEMS)
        row, ask = rng.choice(KV_LAYOUTS)
    n_facts, n_questions = budget(rng, length - 20, 2 * item_tokens + 3, 2 * item_tokens + 12)
    records = list({item(rng): item(rng) for _ in range(n_facts)}.items())
    pieces = [("".join(row.format(*r) for r in records) + "\n" if row
               else tasks.kv_context(records), CONTEXT)]
    for key, value in draw(rng, records, n_questions):
        pieces += marked(ask.format(key) if row else tasks.kv_question(key), key, KEY)
        pieces += [(f" {value}" if row else tasks.kv_answer(value), VALUE), ("\n", CONTEXT)]
    return pieces


def lines_document(rng, length, passage):
    n_facts, n_questions = budget(rng, length - 20, 16, 30)
    lines = tasks.random_lines(rng, n_facts)
    if rng.random() < 0.3:  # numbers as names
        first = rng.randrange(1, 900)
        lines = [(str(first + i), number) for i, (_, number) in enumerate(lines)]
        rng.shuffle(lines)
    pieces = [(tasks.lines_context(lines), CONTEXT)]
    for name, number in draw(rng, lines, n_questions):
        pieces += marked(tasks.lines_question(name), name, KEY)
        pieces += [(tasks.lines_answer(number), LINE), (".\n", CONTEXT)]
    return pieces


def needle_document(rng, length, passage):
    n = 1 if rng.random() < 0.3 else min(rng.randint(2, 8), max(1, length // 110))
    needles = tasks.random_needles(rng, n)
    n_text = max(60, length - 55 * n)  # a needle and its question take about 55 tokens
    text, code = ((passage(n_text), BOOK) if rng.random() < 0.8
                  else (tasks.random_text(rng, n_text // 2), CONTEXT))
    pieces = [(piece, (code, CONTEXT)[i % 2])
              for i, piece in enumerate(tasks.needle_pieces(text, needles))]
    for name, number, _ in rng.sample(needles, n):
        pieces += marked(tasks.needle_question(name), name, KEY)
        pieces += [(tasks.needle_answer(number), NEEDLE), (".", CONTEXT)]
    return pieces


def copy_document(rng, length, passage):
    """Pieces of a document that repeats itself. passage(n): n characters of a book."""
    n = rng.randint(1, 4)
    if rng.random() < 0.5:  # passages, other text, then the same passages in another order
        texts = [passage(int(length * rng.uniform(0.05, 0.4) / n) + 25) for _ in range(n)]
        other = passage(max(25, length - int(2 * sum(map(len, texts)) / 3.5)))  # 3.5 bytes a token
        pieces, n_told = [(text + "\n\n", BOOK) for text in [*texts, other]], 25
    else:  # lines of hex digits or words, then the same in another order
        if rng.random() < 0.4:
            texts = [tasks.random_uuid(rng).replace("-", "") for _ in range(max(1, length // 66))]
        else:
            texts = [" ".join(rng.choices(tasks.WORDS, k=8 * n))
                     for _ in range(max(1, length // (36 * n)))]
        pieces, n_told = [("\n".join(texts) + "\n\n", CONTEXT)], 6
    for text in rng.sample(texts, len(texts)):  # the first characters tell which
        n_told = min(n_told, len(text) // 2)
        pieces += [(text[:n_told], CONTEXT), (text[n_told:], COPY), ("\n", CONTEXT)]
    return pieces


# ---------------------------------------------------------------- batches


class Windows(torch.utils.data.Dataset):
    """Item i is step i's batch: tokens [B, T + 1] int16, codes of their targets [B, T] uint8."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, books: np.ndarray):
        self.recipe, self.tokenizer, self.books = recipe, tokenizer, books

    def __getitem__(self, step: int):
        B, T = self.recipe.batch_shape(step)
        max_length = T if step >= self.recipe.short_until * self.recipe.steps else min(T, 1024)
        tokens = np.full((B, T + 1), BOS, dtype=np.int16)
        codes = np.full((B, T), BOOK, dtype=np.uint8)
        for row in range(B):
            rng = random.Random(f"{self.recipe.seed} {step} {row}")
            if row < B * self.recipe.generated:
                tokens[row], codes[row] = self.generated_window(rng, T, max_length)
            else:
                tokens[row, 1:] = self.book_tokens(rng, T)
        return torch.from_numpy(tokens), torch.from_numpy(codes)

    def book_tokens(self, rng, n: int) -> np.ndarray:
        start = rng.randrange(len(self.books) - n)
        return self.books[start : start + n]

    def passage(self, rng, n: int) -> str:
        text = self.tokenizer.sp.decode(self.book_tokens(rng, n).tolist())
        return text[text.find(" ", 0, 40) + 1 :]  # starts with a whole word

    def generated_window(self, rng, T: int, max_length: int):
        """Whole documents, each between BOS and EOS, and book text where none fits any more."""
        tokens = np.full(T + 1, BOS, dtype=np.int16)
        codes = np.full(T + 1, NONE, dtype=np.uint8)
        n = 0
        while n < T - 60:
            length = int(math.exp(rng.uniform(
                math.log(100), math.log(max(101, min(max_length, T - n))))))
            if n == 0 and max_length == T and rng.random() < 0.5:  # long ones, as in the tests
                length = int(rng.uniform(0.55, 0.99) * T)
            ids, ids_codes = self.document(rng, min(length, T - n), room=T - n - 2)
            if not len(ids):
                break
            tokens[n + 1 : n + len(ids) + 2] = np.append(ids, EOS)
            codes[n + 1 : n + len(ids) + 2] = np.append(ids_codes, BOOK)
            n += len(ids) + 2
        tokens[n + 1 :] = self.book_tokens(rng, T - n)
        codes[n + 1 :] = BOOK
        return tokens, codes[1:]

    def document(self, rng, length: int, room: int):
        """A document's ids and codes, about `length`, at most `room`; empty if four tries fail."""
        make = rng.choices((kv_document, lines_document, needle_document, copy_document),
                           weights=(45, 25, 15, 15))[0]
        for shrink in (0.95, 0.8, 0.6, 0.4):
            pieces = make(rng, max(60, int(length * shrink)), lambda n: self.passage(rng, n))
            ids, codes = self.tokenizer.encode_pieces(pieces)
            if len(ids) <= room:
                return ids, codes
        return ids[:0], codes[:0]


# ---------------------------------------------------------------- model and training


class Masters:
    """fp32 copies of the bf16 model's parameters, for the optimisers: of wqkv three, of w13 two."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        generator = torch.Generator().manual_seed(recipe.seed)
        self.params, self.rows, self.weights = [], [], []
        self.matrices, self.others = [], []  # for Muon; for AdamW
        for name, param in model.named_parameters():
            # One by one: model.to(bfloat16) would take buffers such as RoPE tables along.
            param.data = param.data.to(torch.bfloat16)
            parts = 3 if "wqkv" in name else 2 if "w13" in name else 1  # equal ones: HKV = HQ
            std = 0.02 if "embed" in name else 0.03
            if "wo." in name or "w2." in name:  # these write to the residual stream
                std = 0.02 / math.sqrt(2 * recipe.layers)
            self.params.append(param)
            self.rows.append(param.shape[0] // parts)
            for part in param.split(self.rows[-1]):
                init = (torch.ones(part.shape) if part.ndim == 1
                        else std * torch.randn(part.shape, generator=generator))
                weight = nn.Parameter(init.to(param.device))
                self.weights.append(weight)
                (self.matrices if "layers" in name and part.ndim == 2
                 else self.others).append(weight)
        self.publish()

    def views(self, tensors) -> list[torch.Tensor]:
        """The parts of each tensor that the masters stand for, in their order."""
        return [part for tensor, rows in zip(tensors, self.rows) for part in tensor.split(rows)]

    def take_grads(self):
        """Moves the model's gradients to the masters."""
        for weight, grad in zip(self.weights, self.views(param.grad for param in self.params)):
            weight.grad = grad.float()
        for param in self.params:
            param.grad = None

    @torch.no_grad()
    def publish(self):
        """Rounds the masters to bf16 into the model."""
        torch._foreach_copy_(self.views(param.data for param in self.params), self.weights)


def head_loss(model, x, targets, codes, weights):
    """Weighted mean cross-entropy of x [B, T, E] to targets [B, T]; sums, counts of each kind."""
    logits = F.linear(model.norm(x), model.head_weight).float()  # [B, T, V]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # [B * T]
    is_kind = (codes.flatten()[:, None]
               == torch.arange(len(weights), device=x.device)).float()  # [B * T, kinds]
    sums, counts = (is_kind * losses[:, None]).sum(0), is_kind.sum(0)
    return (sums * weights).sum() / (counts * weights).sum(), torch.stack([sums.detach(), counts])


def export(model: nn.Module, recipe: Recipe, config: dict, tokenizer_path: Path, path: Path):
    """Writes the checkpoint directory."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(tokenizer_path, path / "tokenizer.model")
    source = ("trained by tiny/train.py on public-domain books and generated text, "
              f"{recipe.steps} steps, seed {recipe.seed}")
    tensors = {name: param.detach().cpu().contiguous() for name, param in model.named_parameters()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt", "source": source})


def train(args, recipe: Recipe, state: dict | None, began: float):
    """Trains from `state`, if any, to the last step or `args.seconds` after `began`; saves it."""
    tokenizer = Tokenizer(args.tokenizer)
    if not (args.out / "books.npy").exists():
        tokenize_books(args.data, tokenizer, args.out / "books.npy", max(1, args.workers))
    books = np.load(args.out / "books.npy", mmap_mode="r")
    print(f"{len(books)} book tokens, {time.monotonic() - began:.1f} s", flush=True)

    start = state["step"] if state else 0
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    batches = iter(torch.utils.data.DataLoader(  # its workers start here, before CUDA does
        Windows(recipe, tokenizer, books), batch_size=None, sampler=range(start, recipe.steps),
        num_workers=args.workers, pin_memory=cuda, prefetch_factor=3 if args.workers else None))

    config = recipe.hf_config(tokenizer.vocab)
    model = Transformer(ModelConfig.from_dict(config)).to(device)
    masters = Masters(model, recipe)
    # Otherwise Muon's defaults: Nesterov momentum 0.95, 5 Newton-Schulz steps. Updates scale with
    # 0.2 sqrt(max(rows, columns)).
    muon = torch.optim.Muon(masters.matrices, weight_decay=recipe.weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(masters.others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0,
                              fused=cuda)
    if state:
        with torch.no_grad():
            torch._foreach_copy_(masters.weights,
                                 [weight.to(device) for weight in state["masters"]])
        masters.publish()
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])

    compute_loss = head_loss
    attention = contextlib.nullcontext()
    if cuda:
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        compute_loss = torch.compile(head_loss, fullgraph=True, dynamic=False)
        # On an H200 cuDNN's attention is 1.6 times as fast as flash attention here.
        attention = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
                                set_priority=True)

    weights = torch.tensor(list(KINDS.values()), device=device)
    totals = torch.zeros(2, len(KINDS), device=device)  # sums and counts since the last print
    rope, step, n_tokens, since = {}, start, 0, time.monotonic()
    with attention:
        while step < recipe.steps and not (
                args.seconds and time.monotonic() - began > args.seconds):
            tokens, codes = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            tokens = tokens.long()
            B, T = codes.shape
            if T not in rope:
                rope[T] = model.rope(torch.arange(T, device=device)[None])
            x = model.embed(tokens[:, :-1])  # [B, T, E]
            for layer in model.layers:
                x = layer(x, *rope[T])
            loss, kinds = compute_loss(model, x, tokens[:, 1:].contiguous(), codes, weights)
            loss.backward()
            masters.take_grads()
            for optimizer in (muon, adamw):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step)
                optimizer.step()
            masters.publish()

            totals += kinds
            n_tokens += B * T
            step += 1
            if step % LOG_EVERY == 0 or step == recipe.steps:
                means = (totals[0] / totals[1].clamp(min=1)).tolist()
                losses = "  ".join(f"{kind} {mean:.4f}" for kind, mean in zip(KINDS, means)
                                   if kind != "none")
                now = time.monotonic()
                print(f"step {step}/{recipe.steps}  {losses}  "
                      f"{n_tokens / (now - since):.0f} tokens/s  {now - began:.0f} s", flush=True)
                totals.zero_()
                n_tokens, since = 0, now

    torch.save({"step": step, "recipe": dataclasses.asdict(recipe), "muon": muon.state_dict(),
                "adamw": adamw.state_dict(),
                "masters": [weight.detach() for weight in masters.weights]}, args.out / "state.tmp")
    os.replace(args.out / "state.tmp", args.out / "state.pt")
    if step < recipe.steps:
        print(f"stopped after step {step}; the same command continues")
    else:
        export(model, recipe, config, args.tokenizer, args.out / "checkpoint")
        print(f"wrote {args.out / 'checkpoint'}")


def main():
    """The command line: trains, resumes or exports."""
    began = time.monotonic()
    full, smoke = PRESETS["full"], PRESETS["smoke"]
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    arg = parser.add_argument
    arg("--data", type=Path, default="../shared/data", help="directory with books-train-*.jsonl.xz")
    arg("--out", type=Path, help="directory for book tokens, resumable state and checkpoint")
    arg("--preset", choices=PRESETS, default="full",
        help="model and schedule; smoke is a tiny one for a CPU")
    arg("--steps", type=Number(int, 1),
        help=f"optimiser steps; default {full.steps}, with --preset smoke {smoke.steps}")
    arg("--seconds", type=Number(float, 0), default=0,
        help="save the state and stop so many seconds after the start; 0: never")
    arg("--seed", type=Number(int, 0), default=full.seed,
        help="decides the initial weights, all batches and the tokenizer's sample")
    arg("--workers", type=Number(int, 0), default=max(1, os.cpu_count() - 2),
        help="processes that make batches")
    arg("--tokenizer", type=Path, default=Path(__file__).parent / "tokenizer.model",
        help="SentencePiece model")
    arg("--train_tokenizer", action="store_true",
        help="train the tokenizer on the data, write it, exit")
    args = parser.parse_args()

    recipe = dataclasses.replace(PRESETS[args.preset], seed=args.seed)
    if args.steps is not None:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    if not list(args.data.glob("books-train-*.jsonl.xz")):
        raise ValueError(f"--data {args.data}: has no books-train-*.jsonl.xz; name the directory "
                         "that holds them")
    if args.train_tokenizer:
        if args.tokenizer.exists():
            raise ValueError(f"{args.tokenizer}: is there, and checkpoints depend on it; remove "
                             "it, or give another --tokenizer")
        return train_tokenizer(args.data, args.tokenizer, args.seed)
    if args.out is None:
        raise ValueError("--out: is missing; name a directory")
    if not args.tokenizer.exists():
        raise ValueError(
            f"--tokenizer {args.tokenizer}: does not exist; --train_tokenizer makes it")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no torch.optim.Muon: training needs torch "
                         "2.9 or newer")
    args.out.mkdir(parents=True, exist_ok=True)
    state = None
    if (args.out / "state.pt").exists():
        try:
            state = torch.load(args.out / "state.pt", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise ValueError(
                f"{args.out / 'state.pt'}: not a saved state; use another --out") from None
        if state["recipe"] != dataclasses.asdict(recipe):
            raise ValueError(f"--out {args.out}: holds a run of another recipe, "
                             f"{state['recipe']}; use another directory")
    train(args, recipe, state, began)


if __name__ == "__main__":
    run_command(main)
