"""How an answer is written in the OpenAI dialect: whole objects and stream chunks, as bytes. Pure; knows no HTTP and no cluster.

A stream's chunks differ only in the text, so everything around it is encoded once for each answer and a token costs one string encoding and a join.
"""

from dataclasses import dataclass

import msgspec

from yoke.core.request import Finished, Piece

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What sets one endpoint's answers apart. ``before`` and ``after`` surround a chunk's text; ``opening`` and ``closing`` are choices without text."""

    prefix: str
    whole_object: str
    chunk_object: str
    opening: bytes | None
    before: bytes
    after: bytes
    closing: bytes

    def choice(self, text: str, reason: str) -> dict[str, object]:
        """The one choice of a whole answer."""
        body: dict[str, object] = {"text": text} if self.opening is None else {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": 0, **body, "logprobs": None, "finish_reason": reason}


CHAT = Dialect(
    prefix="chatcmpl-",
    whole_object="chat.completion",
    chunk_object="chat.completion.chunk",
    opening=b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}',
    before=b'{"index":0,"delta":{"content":',
    after=b'},"logprobs":null,"finish_reason":null}',
    closing=b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"%b"}',
)
COMPLETION = Dialect(
    prefix="cmpl-",
    whole_object="text_completion",
    chunk_object="text_completion",
    opening=None,
    before=b'{"index":0,"text":',
    after=b',"logprobs":null,"finish_reason":null}',
    closing=b'{"index":0,"text":"","logprobs":null,"finish_reason":"%b"}',
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer's constant part. ``created`` is seconds since the epoch."""

    dialect: Dialect
    request_id: str
    model: str
    created: int
    include_usage: bool = False
    timings: bool = False

    def whole(self, text: str, finished: Finished) -> bytes:
        """The body of an answer that is not streamed."""
        body = self._head(self.dialect.whole_object)
        body["choices"] = [self.dialect.choice(text, finished.reason.value)]
        body["usage"] = usage(finished)
        if self.timings:
            body["yoke"] = timings(finished)
        return msgspec.json.encode(body)

    def chunks(self) -> "Chunks":
        """The writer of this answer's stream."""
        return Chunks(self)

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self.dialect.prefix + self.request_id, "object": kind, "created": self.created, "model": self.model}


class Chunks:
    """Writes the server-sent events of one answer."""

    __slots__ = ("_after", "_before", "_dialect", "_head", "_tail", "_timings", "_usage")

    def __init__(self, answer: Answer) -> None:
        dialect = answer.dialect
        self._dialect = dialect
        self._timings = answer.timings
        self._usage = answer.include_usage
        self._head = b"data: " + msgspec.json.encode(answer._head(dialect.chunk_object))[:-1] + b',"choices":['
        # OpenAI says "usage": null in every chunk of a stream that will end with one that has it.
        self._tail = b'],"usage":null' if answer.include_usage else b"]"
        self._before = self._head + dialect.before
        self._after = dialect.after + self._tail + (b',"yoke":{"sampled_at_s":' if answer.timings else b"}\n\n")

    def opening(self) -> bytes:
        """What comes before the first text: the role, in a chat; nothing in a completion."""
        return b"" if self._dialect.opening is None else self._head + self._dialect.opening + self._tail + b"}\n\n"

    def piece(self, piece: Piece) -> bytes:
        """The event for more text."""
        text = msgspec.json.encode(piece.text)
        if self._timings:
            return b"%b%b%b%b}}\n\n" % (self._before, text, self._after, msgspec.json.encode(piece.sampled_at_s))
        return b"%b%b%b" % (self._before, text, self._after)

    def closing(self, finished: Finished) -> bytes:
        """The events that end the stream: the reason, the usage if it was asked for, and the mark."""
        extra = b',"yoke":' + msgspec.json.encode(timings(finished)) if self._timings else b""
        end = self._head + self._dialect.closing % finished.reason.value.encode() + self._tail + extra + b"}\n\n"
        if self._usage:
            end += self._head + b'],"usage":' + msgspec.json.encode(usage(finished)) + b"}\n\n"
        return end + DONE


def usage(finished: Finished) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


def timings(finished: Finished) -> dict[str, float]:
    """Where the answer's time went, and how fast it was."""
    return {
        "queue_s": finished.queue_s,
        "prefill_s": finished.prefill_s,
        "decode_s": finished.decode_s,
        "prefill_tokens_per_s": finished.prefill_tokens_per_s,
        "decode_tokens_per_s": finished.decode_tokens_per_s,
    }
