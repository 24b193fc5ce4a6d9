"""What a user wants and what comes back: the one internal request that every dialect is turned into, and the events of its answer.

Also here: :class:`Cluster`, the whole pool seen as one machine, which is all that ``api`` and ``cli`` know.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from yoke.core.errors import RequestError
from yoke.core.node import Link, Node
from yoke.core.plan import Plan

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch their filters off.

    Filters apply in the order top-k, top-p, min-p, on the distribution at ``temperature``. The draw depends on ``seed``, the position and the logits alone.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("seed", self.seed, 0, MAX_SEED)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for nan too, and exact for whole numbers that no float holds
        shown = "a huge number" if isinstance(value, int) and value.bit_length() > 64 else value
        raise RequestError(f"{name} is {shown}; expected a number from {low} to {high}", field=name)


class Role(StrEnum):
    """Who speaks in a chat."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text to generate. Exactly one of ``text``, ``tokens`` and ``messages`` is the prompt.

    ``max_tokens`` None means: up to the end of the context. ``id`` names the request in logs and on the wire between processes.
    """

    id: str
    model: str
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if sum(p is not None for p in (self.text, self.tokens, self.messages)) != 1:
            raise RequestError("a request has exactly one prompt: text, tokens or messages", field="prompt")
        if self.messages is not None and not self.messages:
            raise RequestError("messages is empty; expected at least one message", field="messages")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; expected at least 1", field="max_tokens")
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise RequestError(f"stop holds at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters", field="stop")


class FinishReason(StrEnum):
    """Why an answer ended: the model or a stop string ended it, or the length did."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The prompt was accepted: it is ``prompt_tokens`` long."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """More text of the answer: whole UTF-8 characters, possibly from several ``tokens``, possibly empty while a character or stop string is incomplete.

    ``sampled_at_s`` is the monotonic clock of the engine's machine when the newest of the tokens was drawn.
    """

    text: str
    tokens: tuple[int, ...]
    sampled_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The answer is complete. Times are seconds: waiting for a place, reading the prompt (until the first token), writing the rest."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read per second."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens written per second after the first one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


Event = Started | Piece | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a client may know of a loaded model. ``created_at`` is seconds since the epoch."""

    name: str
    context: int
    vocabulary: int
    has_chat_template: bool
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where one worker's time went since it started, in seconds, and how many steps and tokens it computed; ``late`` messages of older plans were dropped."""

    stage: int
    rank: int
    node: str
    steps: int
    tokens: int
    compute_s: float
    collective_s: float
    wire_s: float
    waiting_s: float
    late: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """A picture of the cluster at one moment.

    ``plan`` is the one that serves, None while none does; ``phase`` says in a word what the cluster is doing; ``news`` are its last sentences about itself.
    """

    nodes: tuple[Node, ...]
    plan: Plan | None
    running: int
    queued: int
    stages: tuple[StageTimes, ...] = ()
    links: tuple[Link, ...] = ()
    phase: str = ""
    predicted_tokens_per_s: float | None = None
    news: tuple[str, ...] = ()


class Cluster(Protocol):
    """The whole pool seen as one machine."""

    def models(self) -> tuple[ModelCard, ...]:
        """The models that answer now."""

    def generate(self, request: Request) -> AsyncIterator[Event]:
        """Answer ``request``: one `Started`, any number of `Piece`, one `Finished`. Closing the iterator cancels the request and frees its cells.

        Raises
        ------
        RequestError
            if the prompt does not fit the context, or the model is not loaded.
        NodeError
            if a machine that holds a part of the model is gone.
        """

    async def status(self) -> ClusterStatus:
        """Who is there, what each holds, where the time goes."""

    async def invite(self, uses: int, valid_s: float) -> str:
        """A new invite for so many machines, for so many seconds.

        Raises
        ------
        RequestError
            if nobody may join this cluster.
        """

    async def open_code(self) -> str:
        """Six digits by which one machine on the same network may join, for some minutes.

        Raises
        ------
        RequestError
            if nobody may join this cluster.
        """

    async def remove(self, name: str) -> None:
        """Put a machine out at once, and for good.

        Raises
        ------
        RequestError
            if there is none of that name, or it is the first one.
        """
