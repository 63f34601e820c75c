"""Text and conversations to token ids and back, as transformers has them for the same files.

Read of a checkpoint: tokenizer.json or, without it, tokenizer.model (SentencePiece); beside it
tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.
"""
import datetime
import json
from pathlib import Path

import sentencepiece
import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from config import read_json

# ---------------------------------------------------------------- files


def read_text(path):
    """The text of a UTF-8 file, without the byte-order mark that some begin with."""
    try:
        return Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def builtin_text():
    """The Python language reference, in every Python: real English text that needs no download."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_json_if_any(path):
    """As read_json; {} where there is no file."""
    return read_json(path) if path.exists() else {}


def from_json(path):
    """tokenizer.json -> tokenizers.Tokenizer, without the truncation and padding saved in it."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # which is what the package raises
            raise
        raise ValueError(f"{path}: not a file of the package tokenizers") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


SPACE = "\u2581"  # as SentencePiece writes it
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of its pieces
# of this, SentencePiece models of another kind than Llama's make other tokens than we would
PROBE = " Two  spaces,\ttab\n\nlines , \ufb01ne caf\u00e9 \u2460 \u65e5\u672c\u3000\U0001f642 1234 "


def sentencepiece_bpe(pieces, prefix=True):
    """A tokenizers.Tokenizer that encodes as SentencePiece does with these pieces, (text, score,
    type) each: it merges the pair whose piece has the best score. prefix: a space goes in front."""
    pieces = list(pieces)
    ranks = {piece: (-score, i) for i, (piece, score, kind) in enumerate(pieces)
             if kind in (NORMAL, USER_DEFINED)}
    merges = sorted((*rank, piece[:cut], piece[cut:]) for piece, rank in ranks.items()
                    for cut in range(1, len(piece))
                    if piece[:cut] in ranks and piece[cut:] in ranks)
    backend = tokenizers.Tokenizer(models.BPE(
        {piece: i for i, (piece, *_) in enumerate(pieces)}, [merge[2:] for merge in merges],
        unk_token=next((piece for piece, _, kind in pieces if kind == UNKNOWN), None),
        fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)])
    backend.decoder = space_decoder(prefix)
    return backend


def from_sentencepiece(path):
    """tokenizer.model -> (tokenizers.Tokenizer that encodes alike and can keep added tokens whole,
    its special tokens by the names that tokenizer_config.json has for them)."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path}: not a SentencePiece model; if it is tiktoken's, a "
                         "tokenizer.json is needed beside it") from None

    def kind(i):
        return (CONTROL if sp.is_control(i) else UNKNOWN if sp.is_unknown(i)
                else None if sp.is_byte(i) or sp.is_unused(i) else NORMAL)

    pieces = [(sp.id_to_piece(i), sp.get_score(i), kind(i)) for i in range(sp.get_piece_size())]
    backend = sentencepiece_bpe(pieces)
    if backend.encode(PROBE).ids != sp.encode(PROBE):
        raise ValueError(f"{path}: of SentencePiece models only Llama's kind is implemented (BPE, "
                         "bytes for unknown characters, no normalisation)")
    backend.add_special_tokens([piece for piece, _, kind in pieces if kind == CONTROL])
    ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    return backend, {name: pieces[i][0] for name, i in ids.items() if i >= 0}


def space_decoder(prefix=True):
    """SentencePiece's way back to text. prefix: encoding puts a space in front of it."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1)] * prefix)


def set_spaces(backend, config):
    """The rule of transformers' LlamaTokenizer, whatever the file says: a space in front of the
    text, of each part of it between added tokens (legacy), or none."""
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = space_decoder(prefix)


def text_of(token):
    """A config's token: a string, or an object with flags."""
    return token["content"] if isinstance(token, dict) else token


def added_token(token, **more):
    """A config's token -> AddedToken; more: flags that it has in any case."""
    token = token if isinstance(token, dict) else {"content": token}
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: token[name] for name in names if name in token}
    return AddedToken(token["content"], **flags | more)


def load_tokenizer(checkpoint, config):
    """config: of tokenizer_config.json -> (tokenizers.Tokenizer, special tokens by name)."""
    llama = (read_json_if_any(checkpoint / "config.json").get("model_type") == "llama"
             and config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"))
    own = {}  # special tokens of a tokenizer.model
    if (checkpoint / "tokenizer.json").exists():
        backend = from_json(checkpoint / "tokenizer.json")
        llama = llama and getattr(backend.model, "byte_fallback", False)  # else of a wrong class
    elif (checkpoint / "tokenizer.model").exists():
        backend, own = from_sentencepiece(checkpoint / "tokenizer.model")
    else:
        raise ValueError(f"{checkpoint}: no tokenizer.json or tokenizer.model")
    if llama or own and not config.get("legacy", True):
        set_spaces(backend, config)

    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(more, dict):  # by name, as the others
        config, more = config | more, []
    named = own | {name: token for name, token in config.items() if name.endswith("_token")
                   and isinstance(token, (str, dict)) and text_of(token)}
    special = [*named.values(), *more]
    if "added_tokens_decoder" in config:
        if not all(i.isdigit() for i in config["added_tokens_decoder"]):
            raise TypeError("added_tokens_decoder: must be by token id")
        by_id = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    else:
        texts = [text_of(token) for token in special]
        by_id = {i: {"content": text, "special": text in texts}
                 for text, i in read_json_if_any(checkpoint / "added_tokens.json").items()}
    # beside a tokenizer.model they are looked for in the text as it is, with its spaces
    raw = {"normalized": False} if own else {}
    backend.add_tokens([added_token(by_id[i], **raw) for i in sorted(by_id)])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([added_token(token, special=True) for token in special
                        if text_of(token) not in known])

    named = {name: text_of(token) for name, token in named.items()}
    if own:  # a tokenizer.json says itself what goes around a text
        around = [named.get("bos_token") if config.get("add_bos_token", True) else None, "$A",
                  named.get("eos_token") if config.get("add_eos_token") else None]
        backend.post_processor = processors.TemplateProcessing(
            [token for token in around if token],
            special_tokens=[(token, backend.token_to_id(token)) for token in around[::2] if token])
    return backend, named


# ---------------------------------------------------------------- chat templates


class Generation(Extension):
    """{% generation %}, which marks what the model says in a conversation; printed as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], True), lineno=line)


# what a program that somebody else wrote raises, of types, names, sizes and its own
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError,
                   TypeError, ValueError)


def raise_exception(message):
    raise TemplateError(message)


def strftime_now(form):
    return datetime.datetime.now().strftime(form)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def render(template, variables):
    """A chat template's text, in jinja2's sandbox: a template is a program, by anybody."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template).render(variables)
    except TEMPLATE_ERRORS as error:
        said = " ".join(str(error).split())
        raise ValueError(f"the chat template fails: {said} ({type(error).__name__})") from None


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, checkpoint, vocab_size=None):
        """checkpoint: a directory. vocab_size: the model's; the tokenizer may have more tokens,
        as long as no text uses them.

        Raises ValueError for files that are missing or damaged.
        """
        self.checkpoint, self.vocab_size = Path(checkpoint), vocab_size
        config = read_json_if_any(self.checkpoint / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # older checkpoints have other files for such
            config |= read_json_if_any(self.checkpoint / "special_tokens_map.json")
        template, file = config.get("chat_template"), self.checkpoint / "chat_template.jinja"
        try:
            self.backend, self.named = load_tokenizer(self.checkpoint, config)
            if isinstance(template, list):
                template = {each["name"]: each["template"] for each in template}
            if isinstance(template, dict):  # several, by name
                template = template["default"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{checkpoint}: a token or a template of tokenizer_config.json or a "
                             f"file beside it is malformed ({error!r})") from None
        self.chat_template = read_text(file) if file.exists() else template
        found = self.backend.encode("a")
        # the token ids that every text begins with: [], or [BOS]
        self.prefix = found.ids[: (found.special_tokens_mask + [0]).index(0)]

    def encode(self, text, special=True):
        """text -> token ids. special=False: without what the tokenizer puts around it, as BOS.

        Raises ValueError for a token that the model does not have.
        """
        text.encode()  # raises for a command line argument that was not UTF-8
        ids = self.backend.encode(text, add_special_tokens=special).ids
        last = max(ids, default=0)
        if self.vocab_size is not None and last >= self.vocab_size:
            raise ValueError(f"the text has {self.backend.id_to_token(last)!r}, token {last}: the "
                             f"model's vocabulary has {self.vocab_size}")
        return ids

    def encode_line(self, line):
        """Token ids of a new line after other text: not with the space that a text begins with."""
        before = self.encode("a", special=False)  # no token holds a letter and the newline after it
        return self.encode(f"a\n{line}", special=False)[len(before) :]

    def decode(self, ids):
        """token ids -> text. Special tokens, and ids past the tokenizer's, are nothing in it."""
        return self.backend.decode(ids)

    def chat_text(self, messages, add_generation_prompt=True):
        """A conversation, list of {"role", "content"} -> the chat template's text of it.

        Raises ValueError without a chat template, and for whatever the template does wrong.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.checkpoint}: has no chat template; leave out --chat")
        variables = {"messages": messages, "add_generation_prompt": add_generation_prompt,
                     "tools": None, "documents": None}
        return render(self.chat_template, self.named | variables)

    def chat(self, messages):
        """A conversation -> token ids, where the answer comes next; raises as chat_text does."""
        return self.encode(self.chat_text(messages), special=False)
