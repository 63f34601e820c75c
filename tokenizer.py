"""A checkpoint's tokenizer and chat template: text to token ids and back, as transformers has them.

Of a checkpoint directory these files are read: tokenizer.json or, without it, tokenizer.model (SentencePiece);
tokenizer_config.json, special_tokens_map.json, added_tokens.json; chat_template.jinja.
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

SPACE = "\u2581"  # SentencePiece's
# Of this text a SentencePiece model of another kind than Llama's makes other tokens than from_sentencepiece's.
PROBE = " Two  spaces,\ttab\n\nlines , \ufb01ne caf\u00e9 \u2460 \u65e5\u672c\u3000\U0001f642 1234 "


def read_text(path):
    """The text of a UTF-8 file, without the byte-order mark that some begin with."""
    try:
        return Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path):
    """The object in a JSON file; {} where there is no file."""
    try:
        content = json.loads(read_text(path)) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


# ---------------------------------------------------------------- a checkpoint's files


def from_json(path):
    """tokenizer.json -> tokenizers.Tokenizer, without the truncation and padding that may be saved in it."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # of no narrower class
        raise ValueError(f"{path}: not a file of the package tokenizers") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def from_sentencepiece(path):
    """tokenizer.model -> (tokenizers.Tokenizer that encodes alike and keeps added tokens whole, its special tokens by
    their names in tokenizer_config.json). It must be of Llama's kind: BPE, bytes for unknown characters, no normalisation."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise ValueError(f"{path}: not a SentencePiece model; where it is tiktoken's, a tokenizer.json is needed beside "
                         "it") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    ranks = {piece: (-sp.get_score(i), i) for i, piece in enumerate(pieces)
             if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))}
    merges = sorted((*rank, piece[:cut], piece[cut:]) for piece, rank in ranks.items() for cut in range(1, len(piece))
                    if piece[:cut] in ranks and piece[cut:] in ranks)
    backend = tokenizers.Tokenizer(models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [merge[2:] for merge in merges],
        unk_token=pieces[sp.unk_id()], fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = space_decoder()
    if backend.encode(PROBE).ids != sp.encode(PROBE):
        raise ValueError(f"{path}: only SentencePiece models of Llama's kind are implemented (BPE, bytes for unknown "
                         "characters, no normalisation)")
    backend.add_special_tokens([piece for i, piece in enumerate(pieces) if sp.is_control(i)])
    ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
    return backend, {name: pieces[i] for name, i in ids.items() if i >= 0}


def space_decoder(prefix=True):
    """SentencePiece's way back to text; prefix: encoding put a space in front of the text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1)] * prefix)


def set_spaces(backend, config):
    """Gives a tokenizer the rule that transformers' LlamaTokenizer has for spaces, whatever its file says: one in front of
    the text, of each part between added tokens (legacy), or of none."""
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = space_decoder(prefix)


def content(token):
    """The text of a token in a config: a string, or an object with its flags."""
    return token["content"] if isinstance(token, dict) else token


def added_token(token, **more):
    """A token in a config -> AddedToken; a mere string is a special one."""
    token = dict(token) if isinstance(token, dict) else {"content": token, "special": True}
    flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token}
    return AddedToken(token["content"], **flags | more)


def load(checkpoint):
    """A checkpoint directory -> (tokenizers.Tokenizer, special tokens by name, chat template or None)."""
    config = read_json(checkpoint / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older checkpoints have files of their own for such
        config |= read_json(checkpoint / "special_tokens_map.json")
    llama = (read_json(checkpoint / "config.json").get("model_type") == "llama"
             and str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer")
    if (checkpoint / "tokenizer.json").exists():
        backend, own = from_json(checkpoint / "tokenizer.json"), {}
        llama = llama and getattr(backend.model, "byte_fallback", False)  # else it is a byte-level one by a wrong name
    elif (checkpoint / "tokenizer.model").exists():
        backend, own = from_sentencepiece(checkpoint / "tokenizer.model")
    else:
        raise ValueError(f"{checkpoint}: no tokenizer.json or tokenizer.model")
    if llama or own and not config.get("legacy", True):
        set_spaces(backend, config)

    special = own | {name: content(token) for name, token in config.items()
                     if name.endswith("_token") and isinstance(token, str | dict) and content(token)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    specials = [token for name, token in (own | config).items() if name in special] + list(extra)
    if "added_tokens_decoder" in config:
        added = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        names = [content(token) for token in specials]
        ids = read_json(checkpoint / "added_tokens.json")
        added = [{"content": token, "special": token in names} for token in sorted(ids, key=ids.get)]
    raw = {"normalized": False} if own else {}  # looked for in the text as it is, before spaces are replaced
    backend.add_tokens([added_token(token, **raw) for token in added])
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([added_token(token) for token in specials if content(token) not in known])

    if own:  # in tokenizer.json it is said which tokens go around a text
        around = [special.get("bos_token") if config.get("add_bos_token", True) else None, "$A",
                  special.get("eos_token") if config.get("add_eos_token") else None]
        around = [token for token in around if token]
        backend.post_processor = processors.TemplateProcessing(around, special_tokens=[
            (token, backend.token_to_id(token)) for token in around if token != "$A"])

    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    file = checkpoint / "chat_template.jinja"
    return backend, special, read_text(file) if file.exists() else template


# ---------------------------------------------------------------- chat templates


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the model has said: printed as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def raise_exception(message):
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template, **variables):
    """A chat template's text, rendered in jinja2's sandbox with what transformers offers to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return environment.from_string(template).render(variables)
    except Exception as error:  # a template is a program, by anybody: it may raise what it likes
        raise ValueError(f"the chat template fails: {type(error).__name__}: {' '.join(str(error).split())}") from None


# ---------------------------------------------------------------- the tokenizer


class Tokenizer:
    """Text and conversations to token ids, and back."""

    def __init__(self, checkpoint, vocab_size=None):
        """checkpoint: a directory. vocab_size: the model's; a tokenizer may have more, as long as no text uses them.

        Raises ValueError for files that are missing or damaged.
        """
        self.checkpoint, self.vocab_size = Path(checkpoint), vocab_size
        try:
            self.backend, self.special, self.chat_template = load(self.checkpoint)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{checkpoint}: tokenizer_config.json or a file beside it has a token or a chat template of "
                             f"the wrong form ({error!r})") from None
        found = self.backend.encode("a")
        # the token ids that every text begins with: [], or [BOS]
        self.prefix = found.ids[: found.special_tokens_mask.index(0)]

    def encode(self, text, special=True):
        """text -> token ids; special=False: without the tokens that the tokenizer puts around a text, as BOS.

        Raises ValueError for a token that the model does not have.
        """
        text.encode()  # raises for a command line argument that was not UTF-8
        ids = self.backend.encode(text, add_special_tokens=special).ids
        if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
            raise ValueError(f"the text has the token {self.backend.id_to_token(max(ids))!r}, number {max(ids)} of the "
                             f"tokenizer: the model's vocabulary has {self.vocab_size}")
        return ids

    def encode_line(self, line):
        """Token ids of one more line after other text: without a space in front, as the begin of a text has it."""
        first = self.encode("a", special=False)  # no token holds a letter and the newline after it
        return self.encode(f"a\n{line}", special=False)[len(first) :]

    def decode(self, ids):
        """token ids -> text. Special tokens, and ids past the tokenizer's, are nothing in it."""
        return self.backend.decode(ids)

    def chat(self, messages):
        """A conversation, a list of {"role": ..., "content": ...} -> token ids, up to where the assistant's answer begins.

        Raises ValueError without a chat template, and for what the template does wrong.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.checkpoint}: has no chat template; leave out --chat")
        text = render(self.chat_template, messages=messages, add_generation_prompt=True, tools=None, documents=None,
                      **self.special)
        return self.encode(text, special=False)
