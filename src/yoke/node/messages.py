"""The control plane's vocabulary: what a node process, its worker and the coordinator say to each other.

A worker does not know whether its coordinator is in the next process or on another machine: a member's node process relays. Every message is MessagePack, checked
against these types; how it lies on a stream is in `yoke.node.framing`.
"""

from enum import StrEnum
from typing import TypeVar

import msgspec

from yoke.backends.ops import CacheType
from yoke.core.errors import RemoteProtocolError, YokeError
from yoke.core.node import Device, NodeId
from yoke.core.plan import Plan
from yoke.core.request import Event, Finished, Piece, Request, StageTimes, Started
from yoke.net.group import WireType
from yoke.node.framing import framed
from yoke.node.notes import ErrorNote, error_note, noted_error
from yoke.run.intake import Resume

MessageT = TypeVar("MessageT")


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker, first: who it is and what it may use.

    ``threads`` 0 means all cores, ``device`` empty the fastest, ``store_bytes`` is what its store may take. Speeds are measured for ``weight_type``, or if
    ``is_thorough`` for many types, unless an earlier worker of this node has found ``known`` and ``notes``.
    """

    state_dir: str
    name: str
    host: str
    backend: str = "ggml"
    library: str = ""
    device: str = ""
    threads: int = 0
    spin_s: float = 0.0
    memory_share: float = 0.8
    store_bytes: int = 0
    weight_type: str = ""
    is_thorough: bool = False
    known: tuple[Device, ...] = ()
    notes: tuple[str, ...] = ()


class Measure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker that has nothing to do yet: find out how fast it is with weights of this type, and introduce yourself again."""

    weight_type: str


class Measuring(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker, before it is ready: what it measures, and the share of all that is done."""

    what: str
    share: float


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: its key, where its data plane listens, and what its machine offers. ``device`` is the one that it will use, ``notes`` what to know of it."""

    id: NodeId
    name: str
    certificate: bytes
    port: int
    device: Device
    devices: tuple[Device, ...]
    backend_version: str
    yoke_version: str
    notes: tuple[str, ...] = ()


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a member's worker is reached, and the certificate that it must show."""

    id: NodeId
    name: str
    certificate: bytes
    host: str
    port: int


class Use(StrEnum):
    """What a worker shall do with a place: take part; hold its shard ready loaded; or have its weights in the store."""

    SERVE = "serve"
    STANDBY = "standby"
    PREPARE = "prepare"


class Members(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: nodes that it may meet from now on."""

    peers: tuple[Peer, ...]


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: a node that it must not let in any more."""

    id: NodeId


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: the plan and its place in it; answered with `Loaded` or `LoadFailed`.

    ``model`` tells one model's weights from another's. Where ``model_path`` is None, the weights come from ``suppliers``, the last of them the coordinator, whose
    ``manifest`` has this digest.
    """

    plan: Plan
    model: bytes
    stage: int
    rank: int
    nonce: bytes
    peers: tuple[Peer, ...]
    n_cells: int
    chunk: int
    max_sessions: int
    context: int
    cache_type: CacheType
    wire_type: WireType
    model_path: str | None = None
    chat_template: str | None = None
    use: Use = Use.SERVE
    manifest: bytes = b""
    suppliers: tuple[NodeId, ...] = ()

    @property
    def is_engine(self) -> bool:
        """Whether the engine runs in this place."""
        return (self.stage, self.rank) == (0, 0)


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the worker that has the model's file: let others fetch from it; answered with `Offered`."""

    path: str
    head_dim: int


class Offered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: others may fetch now."""


class StandDown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: stop the work of all plans up to this version, at once. What is loaded stays."""

    version: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: bytes of weights loaded so far, and in all."""

    done_bytes: int
    total_bytes: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: its shard is loaded and all its channels stand."""

    version: int
    has_chat_template: bool = False


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: it has in its store all that its place in the plan asks of it."""

    version: int


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: it could not load its shard, or reach its neighbours."""

    version: int
    error: ErrorNote


class Broken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker that served: a neighbour is gone, or its device failed. It has stood down and waits for orders."""

    version: int
    error: ErrorNote


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine's worker: answer this; with ``resume``, go on with it."""

    request: Request
    resume: Resume | None = None


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the engine's worker: a request is understood, and these are its prompt's tokens."""

    id: str
    prompt: tuple[int, ...]


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the engine's worker: nobody waits for that answer any more."""

    id: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: are you there?"""


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: it is there. In the plan of ``version`` it has computed ``single_steps`` steps of one token, in ``single_s`` seconds."""

    version: int = 0
    single_steps: int = 0
    single_s: float = 0.0


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: measure the link to that node; answered with `Probed`."""

    id: NodeId


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: what lies between it and a node; zeros if it could not be measured."""

    id: NodeId
    rtt_s: float = 0.0
    send_bytes_per_s: float = 0.0
    receive_bytes_per_s: float = 0.0


class Leaving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a member's node process: it would like to go."""


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: it is not needed any more and may end."""


class AskStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a worker: how are you?"""


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: its times, and in the engine's worker the sessions that run and wait, and the cells that are free."""

    times: StageTimes | None = None
    running: int = 0
    queued: int = 0
    free_cells: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """From the engine's worker: one event of an answer; exactly one of the four is there."""

    id: str
    started: Started | None = None
    piece: Piece | None = None
    finished: Finished | None = None
    error: ErrorNote | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a worker: it cannot go on."""

    error: ErrorNote


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To a member: the coordinator will not have it, and why."""

    error: ErrorNote


ToWorker = Start | Measure | Members | Forget | Offer | Load | StandDown | Submit | CancelRequest | Ping | Probe | AskStatus | Release | Refused
FromWorker = Measuring | Ready | Offered | Progress | Prepared | Loaded | LoadFailed | Broken | Status | Accepted | Answer | Pong | Probed | Leaving | Failed

_encoder = msgspec.msgpack.Encoder()
_to_worker: "msgspec.msgpack.Decoder[ToWorker]" = msgspec.msgpack.Decoder(ToWorker)
_from_worker: "msgspec.msgpack.Decoder[FromWorker]" = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """A message as it lies on a stream.

    Raises
    ------
    InvariantError
        if it is longer than `yoke.node.framing.MAX_MESSAGE_BYTES`.
    """
    return framed(_encoder.encode(message))


def decode_to_worker(body: bytes) -> ToWorker:
    """Read a message for a worker.

    Raises
    ------
    RemoteProtocolError
        if the bytes are no such message.
    """
    return _decode(_to_worker, body)


def decode_from_worker(body: bytes) -> FromWorker:
    """Read a message from a worker.

    Raises
    ------
    RemoteProtocolError
        if the bytes are no such message.
    """
    return _decode(_from_worker, body)


def _decode(decoder: "msgspec.msgpack.Decoder[MessageT]", body: bytes) -> MessageT:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, YokeError, RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"a control message of {len(body)} bytes cannot be read: {error}") from error


def event_answer(request_id: str, event: Event | YokeError) -> Answer:
    """An event on its way to the asker."""
    match event:
        case Started():
            return Answer(id=request_id, started=event)
        case Piece():
            return Answer(id=request_id, piece=event)
        case Finished():
            return Answer(id=request_id, finished=event)
        case YokeError():
            return Answer(id=request_id, error=error_note(event))


def answer_event(answer: Answer) -> Event | YokeError:
    """What an answer tells; an error if it tells nothing."""
    event = answer.started or answer.piece or answer.finished
    if event is not None:
        return event
    return noted_error(answer.error) if answer.error is not None else RemoteProtocolError("an answer without an event")
