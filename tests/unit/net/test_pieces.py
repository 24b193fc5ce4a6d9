"""Requests and answers about pieces: what was meant arrives, and nothing that a peer sends costs more than it sent."""

import contextlib
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import InvariantError, NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.memory import memory_pair
from yoke.net.pieces import (
    ANSWER_BYTES,
    MAX_IDS,
    REQUEST_BYTES,
    Request,
    Want,
    ask_have,
    ask_tiles,
    ask_whole,
    encode_request,
    read_answer_head,
    read_request_head,
    receive_request,
    receive_tile,
    send_answer,
)

MODEL = bytes(range(32))
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=MAX_IDS).map(tuple)
requests = st.one_of(
    st.builds(Request, want=st.sampled_from([Want.MANIFEST, Want.HAVE, Want.HEADER]), model=st.binary(min_size=32, max_size=32)),
    st.builds(Request, want=st.just(Want.TILES), model=st.binary(min_size=32, max_size=32), ids=IDS),
)


@contextlib.contextmanager
def pair():
    here, there = memory_pair(NodeId("a" * 64), NodeId("b" * 64))
    with contextlib.closing(here), contextlib.closing(there):
        here.set_timeout(10)
        there.set_timeout(10)
        yield here, there


@given(requests)
def test_a_request_arrives_as_it_was_sent(request):
    with pair() as (here, there):
        here.send(encode_request(request))
        assert receive_request(there) == request


def test_requests_are_small_enough_to_be_sent_unread():
    """A client sends one before it has read the answer to the last one: both would wait for ever if it did not fit into the buffers between them."""
    assert len(encode_request(Request(want=Want.TILES, model=MODEL, ids=tuple(range(MAX_IDS))))) <= 4200


def test_the_layout_is_the_documented_one():
    request = Request(want=Want.TILES, model=MODEL, ids=(7, 2**32 - 1))
    assert encode_request(request) == bytes([3, 0, 0, 0, 2, 0, 0, 0]) + MODEL + bytes([7, 0, 0, 0, 255, 255, 255, 255])
    with pair() as (here, there):
        send_answer(here, 7, b"tile")
        send_answer(here, 8, None)
        data = bytearray(20)
        there.receive_into(memoryview(data))
        assert data == bytes([7, 0, 0, 0, 4, 0, 0, 0]) + b"tile" + bytes([8, 0, 0, 0, 0, 0, 0, 0])


@given(st.binary(min_size=REQUEST_BYTES, max_size=REQUEST_BYTES))
def test_random_bytes_are_a_request_within_bounds_or_refused(data):
    with contextlib.suppress(RemoteProtocolError):
        want, n_ids, model = read_request_head(data)
        assert n_ids <= MAX_IDS
        assert (n_ids > 0) == (want is Want.TILES)
        assert len(model) == 32


@given(st.binary(max_size=200))
def test_a_server_that_is_sent_anything_gets_requests_or_errors(data):
    with pair() as (here, there):
        here.send(data)
        here.close()
        with pytest.raises((RemoteProtocolError, NodeGone)):
            read_all(there)


def read_all(channel):
    while True:
        receive_request(channel)


@given(st.data(), requests)
def test_a_damaged_request_is_a_request_or_refused(data, request):
    damaged = bytearray(encode_request(request))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, min(len(damaged), 60) - 1))] = data.draw(st.integers(0, 255))
    with pair() as (here, there):
        here.send(damaged)
        here.close()
        with contextlib.suppress(RemoteProtocolError, NodeGone):
            assert len(receive_request(there).ids) <= MAX_IDS


@pytest.mark.parametrize(
    ("kind", "reserved", "n_ids", "told"),
    [
        (0, 0, 0, "kind 0"),
        (5, 0, 0, "kind 5"),
        (1, 1, 0, "reserved"),
        (1, 0, 1, "manifest with 1 tiles"),
        (2, 0, 1, "have with 1 tiles"),
        (3, 0, 0, "tiles with 0 tiles"),
        (3, 0, MAX_IDS + 1, "expected 1 to"),
        (3, 0, 2**32 - 1, "expected 1 to"),
    ],
)
def test_a_request_that_breaks_a_rule_is_refused_by_its_head(kind, reserved, n_ids, told):
    with pytest.raises(RemoteProtocolError, match=told):
        read_request_head(struct.pack("<BBHI32s", kind, reserved, 0, n_ids, MODEL))


@pytest.mark.parametrize("fields", [{"model": b"short"}, {"want": Want.TILES}, {"ids": (1,)}, {"want": Want.TILES, "ids": (1,) * (MAX_IDS + 1)}])
def test_a_request_outside_its_bounds_cannot_be_built(fields):
    with pytest.raises(InvariantError):
        Request(**({"want": Want.HAVE, "model": MODEL} | fields))


@pytest.mark.parametrize("tile_id", [-1, 2**32])
def test_a_number_that_does_not_fit_is_our_own_error(tile_id):
    with pytest.raises(InvariantError, match="does not fit"):
        encode_request(Request(want=Want.TILES, model=MODEL, ids=(tile_id,)))


@given(st.binary(max_size=20), st.integers(0, 100), st.integers(0, 2**32 - 1), st.booleans())
def test_an_answers_head_is_what_was_expected_or_refused(data, expected, n_bytes, is_exact):
    try:
        announced = read_answer_head(data, expected, n_bytes, is_exact=is_exact)
    except RemoteProtocolError:
        return
    assert announced in (0, n_bytes) if is_exact else announced <= n_bytes
    assert struct.unpack("<II", data) == (expected, announced)


def test_manifests_and_what_a_server_has_arrive():
    manifest = bytes(range(256)) * 12_345
    with pair() as (here, there), ThreadPoolExecutor(1) as server:
        for ask, answer, expected in (
            (lambda: ask_whole(here, Want.MANIFEST, MODEL, len(manifest)), manifest, manifest),
            (lambda: ask_whole(here, Want.MANIFEST, MODEL, len(manifest)), None, None),
            (lambda: ask_have(here, MODEL, 12), b"\x01\x0f", b"\x01\x0f"),
            (lambda: ask_have(here, MODEL, 12), None, None),
        ):
            asked = server.submit(answer_next, there, answer)
            assert ask() == expected
            assert asked.result(10).model == MODEL


def answer_next(channel, data):
    request = receive_request(channel)
    send_answer(channel, request.want, data)
    return request


def test_tiles_arrive_in_the_order_in_which_they_were_asked_for():
    with pair() as (here, there):
        ask_tiles(here, MODEL, [5, 9])
        ask_tiles(here, MODEL, [2])
        assert [receive_request(there).ids, receive_request(there).ids] == [(5, 9), (2,)]
        for tile_id, data in ((5, b"five!"), (9, None), (2, b"two")):
            send_answer(there, tile_id, data)
        room = memoryview(bytearray(5))
        assert receive_tile(here, 5, room)
        assert room == b"five!"
        assert not receive_tile(here, 9, room)
        assert receive_tile(here, 2, room[:3])
        assert room[:3] == b"two"


@pytest.mark.parametrize(("tile_id", "n_bytes", "told"), [(6, 4, "about 6 came; expected one about 5"), (5, 3, "of 3 bytes"), (5, 2**32 - 1, "expected 4")])
def test_an_answer_to_something_else_is_refused(tile_id, n_bytes, told):
    with pair() as (here, there):
        there.send(struct.pack("<II", tile_id, n_bytes), bytes(4))
        with pytest.raises(RemoteProtocolError, match=told):
            receive_tile(here, 5, memoryview(bytearray(4)))


@pytest.mark.parametrize("n_bytes", [1, 3, 2**32 - 1])
def test_what_a_server_has_must_be_one_bit_a_tile(n_bytes):
    with pair() as (here, there):
        there.send(struct.pack("<II", Want.HAVE, n_bytes), bytes(4))
        with pytest.raises(RemoteProtocolError, match="expected 2, or none"):
            ask_have(here, MODEL, 12)


def test_a_manifest_that_is_announced_and_does_not_come_takes_no_room():
    with pair() as (here, there):
        there.send(struct.pack("<II", Want.MANIFEST, 1 << 30), bytes(ANSWER_BYTES))
        there.close()
        tracemalloc.start()
        try:
            with pytest.raises(NodeGone):
                ask_whole(here, Want.MANIFEST, MODEL, 1 << 30)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_a_manifest_that_is_too_long_is_refused_by_its_head():
    with pair() as (here, there):
        there.send(struct.pack("<II", Want.MANIFEST, 101))
        with pytest.raises(RemoteProtocolError, match="at most 100"):
            ask_whole(here, Want.MANIFEST, MODEL, 100)


def test_a_tile_is_not_copied_on_its_way_to_the_channel():
    class Kept:
        def send(self, *buffers):
            self.buffers = buffers

    channel, tile = Kept(), memoryview(bytearray(100_000))
    send_answer(channel, 1, tile)
    assert channel.buffers[-1] is tile
