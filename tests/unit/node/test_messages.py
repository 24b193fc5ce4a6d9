"""The control plane's messages: every kind comes back as it was, and no bytes do worse than a RemoteProtocolError."""

import asyncio
import contextlib
import inspect
import io
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core import errors
from yoke.core.errors import InvariantError, NodeGone, PlacementError, RemoteProtocolError, RequestError, YokeError
from yoke.core.node import Device, NodeId
from yoke.core.plan import Plan
from yoke.core.request import Finished, FinishReason, Message, Piece, Request, Role, Sampling, StageTimes, Started
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.net.group import WireType
from yoke.node import framing
from yoke.node import messages as say
from yoke.node.notes import ErrorNote, error_note, noted_error
from yoke.planner import grid_plan
from yoke.run.intake import Resume

NODES = [NodeId(f"{i:064x}") for i in range(4)]
DEVICE = Device(name="CPU", description="a chip", backend="ggml", free_bytes=2**40, matvec_bytes_per_s=1e10, threads=4)


def tiny_plan() -> Plan:
    spec = ModelSpec(
        name="tiny",
        architecture="llama",
        n_blocks=2,
        width=16,
        n_heads=4,
        n_kv_heads=2,
        head_dim=4,
        columns=64,
        vocabulary=70,
        context=64,
        norm_epsilon=1e-5,
        rope=Rope(style=RopeStyle.HALVES, dims=4, has_factors=True),
        window=3,
        attention_bytes=(1, 2),
        feed_forward_bytes=(3, 4),
    )
    return grid_plan(spec, NODES, stages=2, ranks=2, shares=(2, 1), version=7)


def load(plan: Plan) -> say.Load:
    peers = tuple(say.Peer(id=node, name="n", certificate=b"\x30\x82", host="10.0.0.1", port=7000 + i) for i, node in enumerate(NODES))
    return say.Load(
        plan=plan,
        model=bytes(32),
        stage=1,
        rank=0,
        nonce=bytes(16),
        peers=peers,
        n_cells=100,
        chunk=8,
        max_sessions=2,
        context=64,
        cache_type="f16",
        wire_type=WireType.Q8_0,
        chat_template="{{ x }}",
    )


REQUEST = Request(
    id="r",
    model="tiny",
    messages=(Message(role=Role.USER, content="hé 🐂"),),
    max_tokens=2**63 - 1,
    sampling=Sampling(temperature=0.7, seed=2**63 - 1),
    stop=("\n",),
    ignore_eos=True,
)
NOTE = ErrorNote(kind="RequestError", message="no", field="prompt", status=404)
PEER = say.Peer(id=NODES[0], name="attic", certificate=b"c", host="10.0.0.1", port=7)
TIMES = StageTimes(stage=0, rank=1, node="attic", steps=1, tokens=2, compute_s=0.1, collective_s=0.2, wire_s=0.3, waiting_s=0.4)

TO_WORKER: list[say.ToWorker] = [
    say.Start(state_dir="/x", name="attic", host="127.0.0.1", threads=2, spin_s=1e-4),
    load(tiny_plan()),
    say.Members(peers=(PEER,)),
    say.Forget(id=NODES[0]),
    say.Submit(request=REQUEST),
    say.Submit(request=Request(id="t", model="", tokens=(0, 2**31))),
    say.Submit(request=Request(id="u", model="", text="")),
    say.CancelRequest(id="r"),
    say.Submit(request=Request(id="v", model="", text="x"), resume=Resume(prompt=(1, 2), drawn=(3,))),
    say.StandDown(version=3),
    say.Measure(weight_type="Q4_K"),
    say.Offer(path="/x.gguf", head_dim=64),
    say.Probe(id=NODES[0]),
    say.Ping(),
    say.Release(),
    say.AskStatus(),
    say.Refused(error=NOTE),
]
FINISHED = Finished(reason=FinishReason.LENGTH, prompt_tokens=3, completion_tokens=4, queue_s=0.0, prefill_s=0.5, decode_s=1.5)
FROM_WORKER: list[say.FromWorker] = [
    say.Ready(id=NODES[0], name="attic", certificate=b"c", port=1, device=DEVICE, devices=(DEVICE,), backend_version="1", yoke_version="2"),
    say.Progress(done_bytes=2**40, total_bytes=2**41),
    say.Loaded(version=3, has_chat_template=True),
    say.LoadFailed(version=3, error=NOTE),
    say.Broken(version=3, error=NOTE),
    say.Accepted(id="r", prompt=(1, 2)),
    say.Pong(version=3, single_steps=4, single_s=0.5),
    say.Leaving(),
    say.Offered(),
    say.Measuring(what="CPU Q4_K", share=0.5),
    say.Probed(id=NODES[0], rtt_s=1e-3, send_bytes_per_s=1e8, receive_bytes_per_s=1e8),
    say.Prepared(version=3),
    say.Status(),
    say.Status(times=TIMES, running=1, queued=2, free_cells=3),
    say.Answer(id="r", started=Started(prompt_tokens=3)),
    say.Answer(id="r", piece=Piece(text="é", tokens=(1, 2), sampled_at_s=12.5)),
    say.Answer(id="r", finished=FINISHED),
    say.Answer(id="r", error=NOTE),
    say.Failed(error=NOTE),
]


def test_every_kind_of_message_is_tried_below() -> None:
    assert {type(m) for m in TO_WORKER} == set(say.ToWorker.__args__)  # type: ignore[attr-defined]
    assert {type(m) for m in FROM_WORKER} == set(say.FromWorker.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda m: type(m).__name__)
def test_orders_come_back_as_they_were(message: say.ToWorker) -> None:
    body = framing.read_body(io.BytesIO(say.encode(message)))
    assert body is not None
    assert say.decode_to_worker(body) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda m: type(m).__name__)
def test_reports_come_back_as_they_were(message: say.FromWorker) -> None:
    body = framing.read_body(io.BytesIO(say.encode(message)))
    assert body is not None
    assert say.decode_from_worker(body) == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda m: type(m).__name__)
def test_reports_are_no_orders(message: say.FromWorker) -> None:
    with pytest.raises(RemoteProtocolError, match="cannot be read"):
        say.decode_to_worker(say.encode(message)[4:])


@given(body=st.binary(max_size=200))
def test_random_bytes_are_refused(body: bytes) -> None:
    for decode in (say.decode_to_worker, say.decode_from_worker):
        with pytest.raises(RemoteProtocolError):
            decode(body)


@given(index=st.integers(0, len(TO_WORKER) + len(FROM_WORKER) - 1), place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 400))
def test_damaged_messages_are_read_or_refused(index: int, place: int, byte: int, cut: int | None) -> None:
    body = bytearray(say.encode([*TO_WORKER, *FROM_WORKER][index])[4:])
    body[place % len(body)] = byte
    decode: Any = say.decode_to_worker if index < len(TO_WORKER) else say.decode_from_worker
    with contextlib.suppress(RemoteProtocolError):
        decode(bytes(body[:cut]))


def altered(message: say.ToWorker, path: tuple[Any, ...], value: Any) -> bytes:
    tree = msgspec.msgpack.decode(say.encode(message)[4:])
    at = tree
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return msgspec.msgpack.encode(tree)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("plan", "version"), 0),
        (("plan", "spec", "n_heads"), 0),
        (("plan", "spec", "n_heads"), 2**64 - 1),
        (("plan", "spec", "n_kv_heads"), 3),
        (("plan", "stages"), []),
        (("plan", "stages", 0, "blocks", "stop"), 2**64 - 1),
        (("plan", "stages", 0, "shards", 0, "heads", "stop"), 3),
        (("plan", "stages", 0, "shards", 0, "heads", "stop"), 2**63),
        (("plan", "stages", 0, "shards", 0, "node"), NODES[3]),
        (("plan", "spec", "rope", "style"), "sideways"),
        (("cache_type",), "f64"),
        (("wire_type",), "int2"),
        (("nonce",), 3),
        (("stage",), "one"),
    ],
)
def test_message_whose_values_are_impossible_is_the_peers_fault(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(RemoteProtocolError, match="cannot be read"):
        say.decode_to_worker(altered(load(tiny_plan()), path, value))


def test_request_with_impossible_sampling_is_the_peers_fault() -> None:
    for key, value in (("temperature", float("nan")), ("top_p", 2.0), ("seed", 2**64 - 1), ("top_k", -1)):
        with pytest.raises(RemoteProtocolError):
            say.decode_to_worker(altered(say.Submit(request=REQUEST), ("request", "sampling", key), value))


class Counted(io.BytesIO):
    """A stream that knows how much was asked of it at once."""

    most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, size or 0)
        return super().read(size)


@pytest.mark.parametrize("length", [framing.MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_oversized_length_is_refused_before_anything_is_set_aside_for_it(length: int) -> None:
    stream = Counted(struct.pack("<I", length) + b"xx")
    with pytest.raises(RemoteProtocolError, match=f"claims {length} bytes"):
        framing.read_body(stream)
    assert stream.most == 4

    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(struct.pack("<I", length))
        with pytest.raises(RemoteProtocolError, match=f"claims {length} bytes"):
            await framing.Bodies(reader).next()

    asyncio.run(read())


def test_streams_end_between_messages_or_break_inside_one() -> None:
    whole = say.encode(say.AskStatus())
    assert framing.read_body(io.BytesIO(b"")) is None
    for n_bytes in range(1, len(whole)):
        with pytest.raises(RemoteProtocolError, match="inside a message"):
            framing.read_body(io.BytesIO(whole[:n_bytes]))

    async def read(data: bytes) -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await framing.Bodies(reader).next()

    assert say.decode_to_worker(asyncio.run(read(whole))) == say.AskStatus()
    for n_bytes in (0, 3, len(whole) - 1):
        with pytest.raises(NodeGone, match="control connection ended"):
            asyncio.run(read(whole[:n_bytes]))


def test_message_that_no_peer_would_take_is_not_sent() -> None:
    with pytest.raises(InvariantError, match=r"a message of .* bytes"):
        say.encode(say.CancelRequest(id="x" * framing.MAX_MESSAGE_BYTES))


@pytest.mark.parametrize("kind", [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, YokeError)])
def test_every_error_travels_with_all_its_parts(kind: type[YokeError]) -> None:
    error = kind("what happened")
    if isinstance(error, RequestError):
        error = RequestError("what happened", field="prompt", status=413)
    if isinstance(error, PlacementError):
        error = PlacementError("what happened", missing_bytes=2**50)
    body = say.encode(say.Failed(error=error_note(error)))[4:]
    found = say.decode_from_worker(body)
    assert isinstance(found, say.Failed)
    again = noted_error(found.error)
    assert (type(again), str(again), vars(again)) == (kind, "what happened", vars(error))
    assert (again.exit_code, again.http_status) == (error.exit_code, error.http_status)


@pytest.mark.parametrize("kind", ["", "Nonsense", "__name__", "__doc__", "__builtins__", "Exception", "KeyboardInterrupt"])
def test_unknown_kind_of_error_becomes_the_root(kind: str) -> None:
    error = noted_error(ErrorNote(kind=kind, message="hm"))
    assert (type(error), str(error)) == (YokeError, "hm")


def test_each_event_becomes_an_answer_of_its_own_kind() -> None:
    for event in (Started(prompt_tokens=1), Piece(text="", tokens=(), sampled_at_s=0.0), FINISHED, NodeGone("x")):
        answer = say.event_answer("r", event)
        there = [x for x in (answer.started, answer.piece, answer.finished, answer.error) if x is not None]
        assert answer.id == "r"
        assert there == [error_note(event) if isinstance(event, YokeError) else event]
