"""The wire format of the data plane: values to buffers and back. Pure: knows no socket, clock or tensor library.

A message is a fixed header and a body. Everything that the header announces is held to :class:`Limits` before anybody allocates room for the body,
and the body's length must follow from the announced counts. Whatever the bytes, decoding gives a value or raises `RemoteProtocolError`. The format is
written down in docs/protocol.md.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import assert_never

from yoke.core.errors import InvariantError, RemoteProtocolError, RequestError
from yoke.core.frame import MAX_BATCH_TOKENS, MAX_SLOTS, Batch, Drawn, Frame, Output
from yoke.core.request import Sampling

Buffer = bytes | bytearray | memoryview

PROTOCOL_VERSION = 1
NONCE_BYTES = 16
MAX_STAGES = 1024
MAX_RANKS = 1024

_MAGIC = b"YOKE"
# magic, protocol version, kind, reserved, plan version, step, body bytes, tokens, outputs, freed slots, width
_HEADER = struct.Struct("<4sHBBIQIIIII")
# row, temperature, top_k, top_p, min_p, seed
_OUTPUT = struct.Struct("<IdIddQ")
# purpose, stage, rank, nonce
_HELLO = struct.Struct(f"<III{NONCE_BYTES}s")

HEADER_BYTES = _HEADER.size
"""Length of the header that starts every message."""


class Kind(IntEnum):
    """What a message carries."""

    HELLO = 1
    FRAME = 2
    DRAWN = 3


class Purpose(StrEnum):
    """What a connection is for, said once by the side that opened it."""

    PIPE = "pipe"
    """The previous stage's head, or the engine, sends frames."""
    GROUP = "group"
    """Two ranks of one stage exchange their contributions."""
    RESULT = "result"
    """The last stage's head sends drawn tokens to the engine."""
    WEIGHTS = "weights"
    """A node asks for pieces of a model: `yoke.net.pieces`. Belongs to no plan; stage, rank and plan version are 0."""
    PROBE = "probe"
    """A node measures the link. Belongs to no plan either."""


_KINDS = {int(kind): kind for kind in Kind}
_PURPOSE_NUMBERS = {Purpose.PIPE: 1, Purpose.GROUP: 2, Purpose.RESULT: 3, Purpose.WEIGHTS: 4, Purpose.PROBE: 5}
_PURPOSES = {number: purpose for purpose, number in _PURPOSE_NUMBERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message on a connection: which plan and purpose it serves, and the ``stage`` and ``rank`` of the shard that opened it (the engine is 0, 0).

    ``nonce`` is 16 bytes that all workers of one start of a plan were given: a connection left over from an earlier start is told apart by it.
    """

    plan_version: int
    purpose: Purpose
    stage: int
    rank: int
    nonce: bytes = bytes(NONCE_BYTES)

    def __post_init__(self) -> None:
        if not (0 <= self.stage < MAX_STAGES and 0 <= self.rank < MAX_RANKS):
            raise InvariantError(f"hello from stage {self.stage}, rank {self.rank}; expected at most {MAX_STAGES - 1} and {MAX_RANKS - 1}")
        if len(self.nonce) != NONCE_BYTES:
            raise InvariantError(f"hello with a nonce of {len(self.nonce)} bytes; expected {NONCE_BYTES}")


Message = Frame | Drawn | Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a receiver accepts. ``width`` is the exact width of a frame's hidden state: 0 where frames carry none (the first stage)."""

    max_tokens: int
    width: int
    max_outputs: int
    max_body_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.max_tokens <= MAX_BATCH_TOKENS or min(self.width, self.max_outputs, self.max_body_bytes) < 0:
            raise InvariantError(f"limits {self} are negative, or allow more than {MAX_BATCH_TOKENS} tokens")


HELLO_LIMITS = Limits(max_tokens=0, width=0, max_outputs=0, max_body_bytes=_HELLO.size)
"""For a connection's first message: admits no frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header that kept its receiver's limits: ``body_bytes`` more bytes belong to the message, and follow from the counts."""

    kind: Kind
    plan_version: int
    step: int
    body_bytes: int
    n_tokens: int
    n_outputs: int
    n_freed: int
    width: int


def encode(message: Message) -> list[Buffer]:
    """The buffers whose concatenation is ``message`` on the wire. A frame's hidden state is not copied: it is the last buffer.

    Raises
    ------
    InvariantError
        if a number does not fit its field, or the hidden state is not whole float32 rows.
    """
    try:
        match message:
            case Frame():
                return _encode_frame(message)
            case Drawn():
                n = len(message.tokens)
                return [_header(Kind.DRAWN, message.plan_version, message.step, 4 * n, n) + struct.pack(f"<{n}I", *message.tokens)]
            case Hello():
                body = _HELLO.pack(_PURPOSE_NUMBERS[message.purpose], message.stage, message.rank, message.nonce)
                return [_header(Kind.HELLO, message.plan_version, 0, len(body)) + body]
            case _:
                assert_never(message)
    except struct.error as error:
        raise InvariantError(f"a number of a {type(message).__name__} does not fit its field on the wire: {error}") from error


def read_header(data: Buffer, limits: Limits) -> Header:
    """Check a message's first `HEADER_BYTES` bytes; allocates nothing that the sender could choose the size of.

    Raises
    ------
    RemoteProtocolError
        if the bytes are no header of this protocol version, or announce more than ``limits`` allow.
    """
    if len(data) != HEADER_BYTES:
        raise RemoteProtocolError(f"a header of {len(data)} bytes; expected {HEADER_BYTES}")
    magic, version, kind_number, reserved, plan_version, step, body_bytes, n_tokens, n_outputs, n_freed, width = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise RemoteProtocolError("a message does not start with the mark of this protocol; is the peer another program?")
    if version != PROTOCOL_VERSION:
        raise RemoteProtocolError(f"a peer speaks protocol version {version}, this node {PROTOCOL_VERSION}; install the same version of Yoke on both")
    kind = _KINDS.get(kind_number)
    if kind is None or reserved:
        raise RemoteProtocolError(f"a message of kind {kind_number} with reserved byte {reserved}; expected kind 1 to {len(Kind)} and 0")
    _check_counts(kind, (n_tokens, n_outputs, n_freed, width), step, limits)
    expected = _body_bytes(kind, n_tokens, n_outputs, n_freed, width)
    if body_bytes != expected or body_bytes > limits.max_body_bytes:
        raise RemoteProtocolError(f"a body of {body_bytes} bytes; its counts make {expected}, and at most {limits.max_body_bytes} are allowed")
    return Header(kind=kind, plan_version=plan_version, step=step, body_bytes=body_bytes, n_tokens=n_tokens, n_outputs=n_outputs, n_freed=n_freed, width=width)


def decode(header: Header, body: Buffer) -> Message:
    """The message of a checked header and its body. A frame's ``hidden`` is a view of ``body``, which must not be reused while the frame lives.

    Raises
    ------
    RemoteProtocolError
        if the body's length is not the announced one, or its values are not allowed.
    """
    view = memoryview(body)
    if view.nbytes != header.body_bytes:
        raise RemoteProtocolError(f"a body of {view.nbytes} bytes arrived; {header.body_bytes} were announced")
    try:
        match header.kind:
            case Kind.FRAME:
                return _decode_frame(header, view)
            case Kind.DRAWN:
                return Drawn(plan_version=header.plan_version, step=header.step, tokens=struct.unpack(f"<{header.n_tokens}I", view))
            case Kind.HELLO:
                number, stage, rank, nonce = _HELLO.unpack(view)
                purpose = _PURPOSES.get(number)
                if purpose is None:
                    raise RemoteProtocolError(f"a hello with purpose {number}; expected 1 to {len(_PURPOSES)}")
                return Hello(plan_version=header.plan_version, purpose=purpose, stage=stage, rank=rank, nonce=nonce)
            case _:
                assert_never(header.kind)
    except (InvariantError, RequestError, struct.error) as error:
        # The values' own constructors know what is allowed; here it is the peer that broke the rule.
        raise RemoteProtocolError(f"a peer sent a message that breaks a rule: {error}") from error


def _header(kind: Kind, plan_version: int, step: int, body_bytes: int, n_tokens: int = 0) -> bytes:
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, 0, plan_version, step, body_bytes, n_tokens, 0, 0, 0)


def _body_bytes(kind: Kind, n_tokens: int, n_outputs: int, n_freed: int, width: int) -> int:
    if kind is Kind.FRAME:
        return 16 * n_tokens + 4 * n_freed + _OUTPUT.size * n_outputs + 4 * n_tokens * width
    return 4 * n_tokens if kind is Kind.DRAWN else _HELLO.size


def _check_counts(kind: Kind, counts: tuple[int, int, int, int], step: int, limits: Limits) -> None:
    """Hold the announced counts (tokens, outputs, freed slots, width) to ``limits``."""
    n_tokens, n_outputs, n_freed, width = counts
    match kind:
        case Kind.FRAME:
            if not (0 < n_tokens <= limits.max_tokens and n_outputs <= limits.max_outputs and n_freed <= MAX_SLOTS):
                raise RemoteProtocolError(
                    f"a frame of {n_tokens} tokens, {n_outputs} outputs and {n_freed} freed slots; "
                    f"expected 1 to {limits.max_tokens}, at most {limits.max_outputs} and at most {MAX_SLOTS}"
                )
            if width != limits.width:
                raise RemoteProtocolError(f"a frame's hidden state is {width} wide; expected {limits.width}")
        case Kind.DRAWN:
            if n_tokens > limits.max_outputs or n_outputs or n_freed or width:
                raise RemoteProtocolError(f"an answer of {n_tokens} tokens, with counts {counts[1:]}; expected at most {limits.max_outputs}, and zeros")
        case Kind.HELLO:
            if step or any(counts):
                raise RemoteProtocolError(f"a hello with step {step} and counts {counts}; expected zeros")
        case _:
            assert_never(kind)


def _encode_frame(frame: Frame) -> list[Buffer]:
    batch = frame.batch
    n, n_freed = len(batch.tokens), len(batch.freed_slots)
    hidden = memoryview(frame.hidden).cast("B")
    width, rest = divmod(hidden.nbytes, 4 * n)
    if rest:
        raise InvariantError(f"a hidden state of {hidden.nbytes} bytes is not {n} rows of float32")
    outputs = [
        _OUTPUT.pack(output.row, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
        for output in batch.outputs
        for sampling in (output.sampling,)
    ]
    body_bytes = _body_bytes(Kind.FRAME, n, len(outputs), n_freed, width)
    head = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, Kind.FRAME, 0, frame.plan_version, frame.step, body_bytes, n, len(outputs), n_freed, width)
    numbers = struct.pack(f"<{4 * n + n_freed}I", *batch.tokens, *batch.slots, *batch.positions, *batch.cells, *batch.freed_slots)
    prefix = b"".join((head, numbers, *outputs))
    return [prefix, hidden] if width else [prefix]


def _decode_frame(header: Header, view: memoryview) -> Frame:
    n, n_freed = header.n_tokens, header.n_freed
    numbers = struct.unpack_from(f"<{4 * n + n_freed}I", view)
    outputs_start = 16 * n + 4 * n_freed
    hidden_start = outputs_start + _OUTPUT.size * header.n_outputs
    outputs = tuple(
        Output(row=row, sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed))
        for row, temperature, top_k, top_p, min_p, seed in _OUTPUT.iter_unpack(view[outputs_start:hidden_start])
    )
    batch = Batch(
        tokens=numbers[:n],
        slots=numbers[n : 2 * n],
        positions=numbers[2 * n : 3 * n],
        cells=numbers[3 * n : 4 * n],
        outputs=outputs,
        freed_slots=numbers[4 * n :],
    )
    return Frame(plan_version=header.plan_version, step=header.step, batch=batch, hidden=view[hidden_start:])
