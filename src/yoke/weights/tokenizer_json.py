"""A Hugging Face ``tokenizer.json`` as a :class:`Vocabulary`: byte-level BPE, and sentencepiece-style BPE with byte fallback.

What llama.cpp would not tokenise alike is refused by name, never approximated. Format: https://github.com/huggingface/tokenizers, ``Tokenizer.to_str``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from yoke.core.errors import ModelError
from yoke.weights.config import SourceConfig
from yoke.weights.safetensors import read_json
from yoke.weights.vocabulary import TokenKind, Vocabulary

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names by the steps of the pre-tokenizer and by whether whole words skip the merges (llama-vocab.cpp: the name decides both).
# "byte-level" stands for the regular expression that ByteLevel has built in, GPT-2's.
_PRE_TOKENIZERS: Final[dict[tuple[tuple[str, ...], bool], str]] = {
    (("byte-level",), False): "gpt-2",
    (("digits", "byte-level"), False): "smollm",
    ((_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL,), True): "llama-bpe",
    ((_CONTRACTIONS + r"\p{N}{1,3}" + _TAIL,), False): "dbrx",
    ((_CONTRACTIONS + r"\p{N}" + _TAIL,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE: Final = "▁"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The three files a vocabulary is read from, and a name for messages."""

    where: str
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    config: SourceConfig

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.where}: {message}")

    def part(self, name: str) -> dict[str, Any]:
        """A component such as the normalizer; empty if there is none."""
        value = self.tokenizer.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{name} is {value!r}; expected an object")
        return value or {}


def read_vocabulary(directory: Path, config: SourceConfig) -> Vocabulary:
    """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` of a Hugging Face directory.

    Returns
    -------
    The vocabulary, padded with unused tokens to the rows of the model's embedding.

    Raises
    ------
    ModelError
        if a file is missing or malformed, the tokenizer is of a kind that libllama does not run alike, or has more tokens than the model.
    """
    settings_path = directory / "tokenizer_config.json"
    source = _Source(
        where=str(directory / "tokenizer.json"),
        tokenizer=read_json(directory / "tokenizer.json"),
        settings=read_json(settings_path) if settings_path.is_file() else {},
        config=config,
    )
    model = source.part("model")
    if model.get("type") != "BPE":
        raise source.error(f"model is of type {model.get('type')!r}; expected BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise source.error(f"model has {key} {model[key]!r}, which libllama does not know; expected none")
    ids = _token_ids(source, model)
    tokens, kinds = _padded_tokens(source, ids)
    specials = _special_tokens(source, ids)
    merges = _merges(source, model)
    template = _templates(source, directory)
    first, last = _framing(source, specials.begin)
    if not model.get("byte_fallback"):
        return Vocabulary(
            model="gpt2", pre=_pre_tokenizer(source, model), tokens=tokens, kinds=kinds, merges=tuple(f"{left} {right}" for left, right in merges),
            begin=specials.begin, end=specials.end, padding=specials.padding, adds_begin=first, adds_end=last, templates=template,
        )  # fmt: skip
    unknown = ids.get(str(model.get("unk_token")))
    kinds = tuple(_piece_kind(token, kind, index == unknown) for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)))
    return Vocabulary(
        model="llama", pre="default", tokens=tokens, kinds=kinds, scores=_scores(tokens, merges), begin=specials.begin, end=specials.end,
        padding=specials.padding, unknown=unknown, adds_begin=first, adds_end=last, adds_space=_adds_space(source), templates=template,
    )  # fmt: skip


def _token_ids(source: _Source, model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not all(isinstance(token, int) for token in vocabulary.values()):
        raise source.error("model.vocab is no object of token ids")
    ids: dict[str, int] = dict(vocabulary)
    for added in _added_tokens(source):
        ids[added["content"]] = added["id"]
    limit = source.config.vocabulary
    if outside := [token for token, index in ids.items() if not 0 <= index < limit]:
        raise source.error(f"token {outside[0]!r} has id {ids[outside[0]]}, but the model's vocab_size is {limit}; the tokenizer is of another model")
    return ids


def _added_tokens(source: _Source) -> Iterator[dict[str, Any]]:
    added = source.tokenizer.get("added_tokens") or []
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not isinstance(entry.get("id"), int):
            raise source.error(f"added token {entry!r} has no content or id")
        yield entry


def _padded_tokens(source: _Source, ids: dict[str, int]) -> tuple[tuple[str, ...], tuple[TokenKind, ...]]:
    tokens: list[str | None] = [None] * source.config.vocabulary
    kinds = [TokenKind.NORMAL] * len(tokens)
    for token, index in ids.items():
        if tokens[index] is not None:
            raise source.error(f"tokens {tokens[index]!r} and {token!r} have the same id {index}")
        tokens[index] = token
    for added in _added_tokens(source):
        kinds[added["id"]] = TokenKind.CONTROL if added.get("special") else TokenKind.USER_DEFINED
    padded: list[str] = []
    for index, known in enumerate(tokens):
        if known is None:
            kinds[index] = TokenKind.UNUSED
        padded.append(f"[PAD{index}]" if known is None else known)
    return tuple(padded), tuple(kinds)


def _merges(source: _Source, model: dict[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for merge in model.get("merges") or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part and " " not in part for part in parts):
            raise source.error(f"merge {merge!r} is no pair of tokens")
        merges.append((parts[0], parts[1]))
    if not merges:
        raise source.error("model has no merges; expected a trained BPE")
    return merges


def _pre_tokenizer(source: _Source, model: dict[str, Any]) -> str:
    # NFC is what Qwen asks for; libllama does not normalise, which differs only for text that is not in that form already.
    normalizer = source.part("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        raise source.error(f"normalizer is {normalizer.get('type')!r}; expected none or NFC with byte-level BPE")
    outer = source.part("pre_tokenizer")
    parts = outer.get("pretokenizers") if outer.get("type") == "Sequence" else [outer]
    steps = tuple(step for part in parts or [] for step in _pre_tokenizer_step(source, part))
    name = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        known = ", ".join(sorted(set(_PRE_TOKENIZERS.values())))
        raise source.error(f"pre-tokenizer splits by {steps} (ignore_merges {bool(model.get('ignore_merges'))}); known are those of {known}")
    return name


def _pre_tokenizer_step(source: _Source, part: object) -> Iterator[str]:
    match part:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            raise source.error("pre-tokenizer puts a space before a text (add_prefix_space), which libllama does not with byte-level BPE")
        case {"type": "ByteLevel", "use_regex": False}:
            pass
        case {"type": "ByteLevel"}:
            yield "byte-level"
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            yield pattern
        case _:
            raise source.error(f"pre-tokenizer has the part {part!r}; expected ByteLevel, Digits (individual) or Split by a regular expression")


def _adds_space(source: _Source) -> bool:
    """Whether a sentencepiece-style tokenizer puts a space before a text: said by the normalizer in the old form, by the pre-tokenizer in the new.

    libllama follows sentencepiece itself: it puts one before every text and after every control token. The new form differs where a text starts with a space,
    and after control tokens unless its scheme is ``always``.
    """
    outer = source.part("normalizer")
    steps = outer.get("normalizers") or [] if outer.get("type") == "Sequence" else [outer] if outer else []
    split = source.part("pre_tokenizer")
    match [*steps, *([split] if split else [])]:
        case [{"type": "Prepend", "prepend": prefix}, {"type": "Replace", "pattern": {"String": " "}, "content": content}] if prefix == content == _SPACE:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": content}] if content == _SPACE:
            return False
        case [{"type": "Metaspace", "replacement": content, "prepend_scheme": scheme}] if content == _SPACE and not split.get("split", True):
            return bool(scheme != "never")
        case other:
            raise source.error(f"spaces are handled by {other!r}; expected Llama's way: each space becomes {_SPACE!r}, with or without one put before a text")


def _scores(tokens: tuple[str, ...], merges: list[tuple[str, str]]) -> tuple[float, ...]:
    """A piece's score: minus the rank of the first merge that makes it, so that the pair joined first is the one that BPE joins first.

    A piece that no merge makes comes last: BPE never reaches it.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def _piece_kind(token: str, kind: TokenKind, is_unknown: bool) -> TokenKind:
    if is_unknown:
        return TokenKind.UNKNOWN
    return TokenKind.BYTE if kind is TokenKind.NORMAL and _BYTE_TOKEN.fullmatch(token) else kind


@dataclass(frozen=True, slots=True, kw_only=True)
class _Specials:
    begin: int | None
    end: tuple[int, ...]
    padding: int | None


def _special_tokens(source: _Source, ids: dict[str, int]) -> _Specials:
    def named(key: str) -> int | None:
        value = source.settings.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        return ids.get(content) if isinstance(content, str) else None

    begin, end = named("bos_token"), named("eos_token")
    ends = ([] if end is None else [end]) + list(source.config.end_tokens)
    return _Specials(begin=source.config.begin_token if begin is None else begin, end=tuple(dict.fromkeys(ends)), padding=named("pad_token"))


def _framing(source: _Source, begin: int | None) -> tuple[bool, bool]:
    """Whether a first and a last token are put around a text: the post-processor says so, or without one the settings."""
    outer = source.part("post_processor")
    for part in outer.get("processors") or [] if outer.get("type") == "Sequence" else [outer]:
        if isinstance(part, dict) and part.get("type") == "TemplateProcessing":
            pieces = [next(iter(piece), "") if isinstance(piece, dict) else "" for piece in part.get("single") or []]
            if pieces not in (["Sequence"], ["SpecialToken", "Sequence"], ["Sequence", "SpecialToken"], ["SpecialToken", "Sequence", "SpecialToken"]):
                raise source.error(f"post-processor frames a text as {pieces}; expected at most one token before and one after it")
            return pieces[0] == "SpecialToken", pieces[-1] == "SpecialToken"
    return bool(source.settings.get("add_bos_token")) and begin is not None, bool(source.settings.get("add_eos_token"))


def _templates(source: _Source, directory: Path) -> dict[str, str]:
    templates: dict[str, str] = {}
    match source.settings.get("chat_template"):
        case str(text):
            templates["default"] = text
        case [*choices]:
            for choice in choices:
                if isinstance(choice, dict) and isinstance(choice.get("name"), str) and isinstance(choice.get("template"), str):
                    templates[choice["name"]] = choice["template"]
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            templates["default"] = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from error
    return templates
