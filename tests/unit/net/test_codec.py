import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import InvariantError, RemoteProtocolError
from yoke.core.frame import MAX_CELLS, MAX_SLOTS, Batch, Drawn, Frame, Output
from yoke.core.request import MAX_SEED, Sampling
from yoke.net.codec import HEADER_BYTES, HELLO_LIMITS, MAX_RANKS, MAX_STAGES, Hello, Limits, Purpose, decode, encode, read_header

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LIMITS = Limits(max_tokens=8, width=3, max_outputs=8, max_body_bytes=1 << 16)

samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, MAX_SEED),
)
hellos = st.builds(
    Hello,
    plan_version=U32,
    purpose=st.sampled_from(Purpose),
    stage=st.integers(0, MAX_STAGES - 1),
    rank=st.integers(0, MAX_RANKS - 1),
    nonce=st.binary(min_size=16, max_size=16),
)
answers = st.builds(Drawn, plan_version=U32, step=U64, tokens=st.lists(U32, max_size=8).map(tuple))


@st.composite
def frames(draw):
    n = draw(st.integers(1, 8))

    def of(values, **options):
        return tuple(draw(st.lists(values, min_size=n, max_size=n, **options)))

    batch = Batch(
        tokens=of(U32),
        slots=of(st.integers(0, MAX_SLOTS - 1)),
        positions=of(U32),
        cells=of(st.integers(0, MAX_CELLS - 1), unique=True),
        outputs=tuple(draw(st.lists(st.builds(Output, row=st.integers(0, n - 1), sampling=samplings), max_size=8))),
        freed_slots=tuple(draw(st.lists(st.integers(0, MAX_SLOTS - 1), max_size=4))),
    )
    return Frame(plan_version=draw(U32), step=draw(U64), batch=batch, hidden=draw(st.binary(min_size=12 * n, max_size=12 * n)))


messages = st.one_of(frames(), answers, hellos)


def parse(data, limits=LIMITS):
    return decode(read_header(data[:HEADER_BYTES], limits), data[HEADER_BYTES:])


def wire(message):
    return b"".join(encode(message))


@given(messages)
def test_message_comes_back_as_it_was_sent(message):
    assert parse(wire(message)) == message


@given(st.binary(max_size=200))
def test_random_bytes_give_only_protocol_errors(data):
    with pytest.raises(RemoteProtocolError):
        parse(data)


@given(messages, st.data())
def test_mutated_messages_give_values_or_protocol_errors(message, data):
    damaged = bytearray(wire(message))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RemoteProtocolError):
        parse(bytes(damaged))


@given(messages, st.data())
def test_truncated_messages_give_protocol_errors(message, data):
    whole = wire(message)
    with pytest.raises(RemoteProtocolError):
        parse(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(messages, st.integers(0, 4), U32)
def test_header_that_lies_about_a_count_is_refused(message, field, value):
    whole = bytearray(wire(message))
    if struct.unpack_from("<I", whole, 20 + 4 * field)[0] == value:
        return
    struct.pack_into("<I", whole, 20 + 4 * field, value)
    with pytest.raises(RemoteProtocolError):
        read_header(whole[:HEADER_BYTES], LIMITS)


def frame(n=2, width=3, **changes):
    return Frame(
        plan_version=1,
        step=2,
        batch=Batch(tokens=(1,) * n, slots=(0,) * n, positions=tuple(range(n)), cells=tuple(range(n)), **changes),
        hidden=bytes(4 * n * width),
    )


@pytest.mark.parametrize(
    ("message", "limits"),
    [
        (frame(n=9), LIMITS),
        (frame(width=4), LIMITS),
        (frame(width=0), LIMITS),
        (frame(outputs=(Output(row=0, sampling=Sampling()),) * 9), LIMITS),
        (frame(), Limits(max_tokens=8, width=3, max_outputs=8, max_body_bytes=10)),
        (frame(), HELLO_LIMITS),
        (Drawn(plan_version=1, step=1, tokens=(1,)), HELLO_LIMITS),
    ],
)
def test_more_than_the_limits_allow_is_refused_by_the_header(message, limits):
    with pytest.raises(RemoteProtocolError, match=r"expected|at most"):
        read_header(wire(message)[:HEADER_BYTES], limits)


def test_other_protocol_version_is_named():
    data = bytearray(wire(frame()))
    data[4] = 9
    with pytest.raises(RemoteProtocolError, match="protocol version 9, this node 1"):
        read_header(data[:HEADER_BYTES], LIMITS)


def test_value_that_breaks_a_rule_of_core_is_the_peers_fault():
    data = bytearray(wire(frame()))
    data[HEADER_BYTES + 28 : HEADER_BYTES + 32] = data[HEADER_BYTES + 24 : HEADER_BYTES + 28]  # the two cells become the same
    with pytest.raises(RemoteProtocolError, match="cells must be distinct"):
        parse(bytes(data))


def test_hidden_state_is_copied_neither_way():
    hidden = bytearray(24)
    sent = Frame(plan_version=1, step=1, batch=frame().batch, hidden=hidden)
    buffers = encode(sent)
    assert buffers[-1].obj is hidden
    data = b"".join(buffers)
    body = bytearray(data[HEADER_BYTES:])
    received = decode(read_header(data[:HEADER_BYTES], LIMITS), body)
    assert received.hidden.obj is body


def test_wire_layout_is_the_documented_one():
    sampling = Sampling(temperature=0.5, top_k=40, top_p=0.25, min_p=0.125, seed=7)
    batch = Batch(tokens=(10,), slots=(1,), positions=(2,), cells=(3,), outputs=(Output(row=0, sampling=sampling),), freed_slots=(4,))
    head = b"YOKE" + struct.pack("<HBBIQIIIII", 1, 2, 0, 5, 6, 16 + 4 + 40 + 4, 1, 1, 1, 1)
    body = struct.pack("<IIIII", 10, 1, 2, 3, 4) + struct.pack("<IdIddQ", 0, 0.5, 40, 0.25, 0.125, 7) + b"abcd"
    assert wire(Frame(plan_version=5, step=6, batch=batch, hidden=b"abcd")) == head + body
    assert wire(Drawn(plan_version=5, step=6, tokens=(8,))) == b"YOKE" + struct.pack("<HBBIQIIIII", 1, 3, 0, 5, 6, 4, 1, 0, 0, 0) + struct.pack("<I", 8)
    hello = Hello(plan_version=5, purpose=Purpose.RESULT, stage=1, rank=2, nonce=b"n" * 16)
    assert wire(hello) == b"YOKE" + struct.pack("<HBBIQIIIII", 1, 1, 0, 5, 0, 28, 0, 0, 0, 0) + struct.pack("<III", 3, 1, 2) + b"n" * 16


@pytest.mark.parametrize(
    "message",
    [
        Drawn(plan_version=2**32, step=0, tokens=()),
        Drawn(plan_version=0, step=-1, tokens=()),
        Frame(plan_version=0, step=0, batch=frame().batch, hidden=bytes(23)),
    ],
)
def test_what_does_not_fit_the_wire_is_our_own_error(message):
    with pytest.raises(InvariantError):
        encode(message)


@pytest.mark.parametrize("changes", [{"stage": MAX_STAGES}, {"rank": -1}, {"nonce": b"short"}])
def test_hello_outside_its_bounds_cannot_be_built(changes):
    with pytest.raises(InvariantError, match="hello"):
        Hello(**({"plan_version": 1, "purpose": Purpose.PIPE, "stage": 0, "rank": 0} | changes))


def test_limits_beyond_a_batch_cannot_be_built():
    with pytest.raises(InvariantError, match="limits"):
        Limits(max_tokens=1 << 20, width=1, max_outputs=1, max_body_bytes=1)
