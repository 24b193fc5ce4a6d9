"""From a request to a submission that the engine can run: template, tokens, limits. Runs outside the token loop, so that a long prompt disturbs nobody."""

from dataclasses import dataclass
from typing import Protocol

from yoke.core.errors import RequestError
from yoke.core.request import Request, Sampling
from yoke.core.spec import ModelSpec
from yoke.run.chat import ChatTemplate

MAX_PROMPT_CHARACTERS_PER_TOKEN = 64  # a longer text cannot fit the context: no vocabulary has longer tokens on average


class Vocabulary(Protocol):
    """What intake and engine need of a tokenizer."""

    n_tokens: int

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request in the engine's own terms. ``max_tokens`` is already cut to what the context leaves.

    ``drawn`` are tokens of the answer that another engine has given already: this one goes on after them.
    """

    id: str
    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    submitted_at_s: float
    drawn: tuple[int, ...] = ()
    is_resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """An answer that was under way when a machine was lost: its prompt's tokens, as they were made then, and those drawn since."""

    prompt: tuple[int, ...]
    drawn: tuple[int, ...]


class Intake:
    """Turns requests into submissions for one model with ``context`` tokens of room in each session."""

    def __init__(self, spec: ModelSpec, vocabulary: Vocabulary, template: ChatTemplate | None, context: int) -> None:
        self._spec, self._vocabulary, self._template, self._context = spec, vocabulary, template, context

    def prepare(self, request: Request, now_s: float, resume: Resume | None = None) -> Submission:
        """Template, tokens, limits; or, of an answer that goes on, what was made of it at first.

        Raises
        ------
        RequestError
            if the prompt is empty, longer than the context, or not understood by this model.
        """
        tokens = self._tokens(request) if resume is None else resume.prompt
        if not tokens:
            raise RequestError("the prompt is empty; expected at least one token", field="prompt")
        room = self._context - len(tokens)
        if room < 1:
            raise RequestError(f"the prompt is {len(tokens)} tokens long; the context holds {self._context} with at least one for the answer", field="prompt")
        return Submission(
            id=request.id,
            tokens=tokens,
            max_tokens=min(room, request.max_tokens or room),
            sampling=request.sampling,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
            submitted_at_s=now_s,
            drawn=() if resume is None else resume.drawn,
            is_resumed=resume is not None,
        )

    def _tokens(self, request: Request) -> tuple[int, ...]:
        if request.tokens is not None:
            if any(not 0 <= token < self._spec.vocabulary for token in request.tokens):
                raise RequestError(f"the prompt has a token outside the vocabulary of {self._spec.vocabulary}", field="prompt")
            return request.tokens
        if request.messages is not None:
            if self._template is None:
                raise RequestError("this model has no chat template; use completions, or start it with one (--chat-template FILE)", field="messages")
            text, is_template = self._template.render(request.messages), True
        else:
            text, is_template = request.text or "", False
        limit = self._context * MAX_PROMPT_CHARACTERS_PER_TOKEN
        if len(text) > limit:
            raise RequestError(f"the prompt has {len(text)} characters; a context of {self._context} tokens holds fewer than {limit}", field="prompt")
        # A template writes its own special tokens; what a user typed is plain text.
        return tuple(self._vocabulary.encode(text, not is_template, is_template))
