"""A tokenizer as GGUF stores it. Knows how it is written; not where it comes from.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. Their meaning here is that of llama.cpp's ``llama_vocab``.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from yoke.core.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter


class TokenKind(IntEnum):
    """What a token is (llama.h, ``enum llama_token_type``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens with their kinds, and how text becomes tokens.

    ``model`` is ``gpt2`` (byte-level pairs, joined by ``merges``, "left right", the best first) or ``llama`` (pieces with a score, the highest joined first).
    ``pre`` is llama.cpp's name of the pre-tokenizer. ``templates`` are chat templates by name; the main one is called ``default``.
    ``end`` lists the ids that end a text; GGUF has room for three.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    end: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    begin: int | None = None
    padding: int | None = None
    unknown: int | None = None
    adds_begin: bool = False
    adds_end: bool = False
    adds_space: bool = False
    templates: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not n or len(self.kinds) != n or (self.scores and len(self.scores) != n):
            raise ModelError(f"a vocabulary of {n} tokens has {len(self.kinds)} kinds and {len(self.scores)} scores")
        if len(set(self.tokens)) != n:
            twice = next(token for token in self.tokens if self.tokens.count(token) > 1)
            raise ModelError(f"token {twice!r} is twice in the vocabulary; expected each once")
        for token in (*self.end, self.begin, self.padding, self.unknown):
            if token is not None and not 0 <= token < n:
                raise ModelError(f"a special token has id {token}, outside the vocabulary of {n}")
        if not self.end:
            raise ModelError("no token ends a text; expected eos_token in tokenizer_config.json or eos_token_id in generation_config.json or config.json")
        if self.adds_begin and self.begin is None:
            raise ModelError("the tokenizer puts a first token before a text, but none is named; expected bos_token in tokenizer_config.json")


def write_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary) -> None:
    """Put the vocabulary into the header of a GGUF file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    # llama.cpp also knows some ends by their text; what a file says outright does not depend on that.
    for token, add in zip(vocabulary.end, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    if vocabulary.begin is not None:
        writer.add_bos_token_id(vocabulary.begin)
    if vocabulary.padding is not None:
        writer.add_pad_token_id(vocabulary.padding)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.templates:
        writer.add_chat_template([{"name": name, "template": template} for name, template in vocabulary.templates.items()])
