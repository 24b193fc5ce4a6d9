"""Measuring a link: over channels in memory and real ones, and against peers that lie, stall or ask for too much."""

import contextlib
import struct
import threading

import pytest

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net import measuring
from yoke.net.identity import Identity
from yoke.net.measuring import MAX_REQUESTS, MOST_BYTES, Kind, LinkMeasure, answer, measure
from yoke.net.memory import memory_pair
from yoke.net.tcp import Listener, connect

A, B = NodeId("a" * 64), NodeId("b" * 64)


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@contextlib.contextmanager
def memory_ends():
    here, there = memory_pair(A, B)
    with contextlib.closing(here), contextlib.closing(there):
        yield here, there


@contextlib.contextmanager
def tcp_ends(tmp_path):
    attic, kitchen = (Identity.load_or_create(tmp_path / name) for name in ("attic", "kitchen"))
    with contextlib.closing(Listener("127.0.0.1", 0, attic, [kitchen.certificate_der])) as listener:
        here = connect(listener.address, attic.id, kitchen, [attic.certificate_der], deadline_s=5)
        there = listener.accept(5)
        with contextlib.closing(here), contextlib.closing(there):
            yield here, there


@pytest.fixture(params=["memory", "tcp"])
def ends(request, tmp_path):
    with memory_ends() if request.param == "memory" else tcp_ends(tmp_path) as pair:
        yield pair


@contextlib.contextmanager
def beside(work, *arguments):
    """Run ``work`` in a thread meanwhile; yields where its error will be, or None."""
    errors = []

    def run():
        try:
            errors.append(work(*arguments))
        except (NodeGone, RemoteProtocolError) as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        thread.join(20)
        assert not thread.is_alive()


def test_both_ways_and_the_round_trip_are_measured(ends):
    here, there = ends
    with beside(answer, there) as ending:
        found = measure(here)
    assert ending == [None]
    assert 0 < found.rtt_s < 1
    assert min(found.send_bytes_per_s, found.receive_bytes_per_s) > 1e6


def test_the_channel_is_still_good_afterwards(ends):
    here, there = ends
    for _ in range(2):
        with beside(answer, there) as ending:
            measure(here)
        assert ending == [None]


def test_a_measure_is_two_links():
    found = LinkMeasure(rtt_s=0.001, send_bytes_per_s=1e6, receive_bytes_per_s=2e6)
    there, back = found.links(A, B)
    assert (there.source, there.target, there.rtt_s, there.bandwidth_bytes_per_s) == (A, B, 0.001, 1e6)
    assert (back.source, back.target, back.rtt_s, back.bandwidth_bytes_per_s) == (B, A, 0.001, 2e6)


@pytest.mark.parametrize("figures", [(-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (0.1, 0.0, 1.0), (0.1, 1.0, float("inf")), (0.1, float("nan"), 1.0)])
def test_impossible_figures_are_no_measure(figures):
    with pytest.raises(RemoteProtocolError, match="expected at least 0 s"):
        LinkMeasure(rtt_s=figures[0], send_bytes_per_s=figures[1], receive_bytes_per_s=figures[2])


def test_a_slow_way_is_told_from_a_fast_way_back():
    """A way that takes its time for every byte: amounts stop growing when they take long enough, and the other way does not suffer."""
    here, there = memory_pair(A, B)
    slow = Slow(here, bytes_per_s=4e6)
    with contextlib.closing(here), contextlib.closing(there), beside(answer, there) as ending:
        found = measure(slow)
    assert ending == [None]
    assert found.send_bytes_per_s < 4.4e6
    assert found.receive_bytes_per_s > 2 * found.send_bytes_per_s
    assert slow.sent < 3e6, "an amount that took long enough is the last"


class Slow:
    """A channel on which every piece takes its time to be sent."""

    def __init__(self, channel, bytes_per_s):
        self._channel, self._bytes_per_s, self.sent = channel, bytes_per_s, 0
        self._busy = threading.Event()

    def __getattr__(self, name):
        return getattr(self._channel, name)

    def send(self, *buffers):
        n_bytes = sum(len(buffer) for buffer in buffers)
        self._busy.wait(n_bytes / self._bytes_per_s)
        self.sent += n_bytes
        self._channel.send(*buffers)


def request(kind, number):
    return struct.pack("<II", kind, number)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (request(0, 0), "request 0; expected 1 to 4"),
        (request(2**32 - 1, 0), "expected 1 to 4"),
        (request(Kind.GIVE, MOST_BYTES + 1), f"expected 2 to {MOST_BYTES}"),
        (request(Kind.TAKE, 2**32 - 1), f"expected 2 to {MOST_BYTES}"),
        (request(Kind.TAKE, 1), "expected 2 to"),
        (b"GET / HTTP/1.1\r\n", "expected 1 to 4"),
    ],
)
def test_who_asks_what_is_forbidden_is_told_nothing(said, complaint):
    with memory_ends() as (here, there):
        here.send(said)
        with pytest.raises(RemoteProtocolError, match=complaint):
            answer(there)


def test_who_asks_without_end_is_stopped():
    with memory_ends() as (here, there):
        here.send(request(Kind.ECHO, 7) * (MAX_REQUESTS + 1))
        with pytest.raises(RemoteProtocolError, match=f"more than {MAX_REQUESTS}"):
            answer(there)


def test_who_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(measuring, "ANSWER_S", 0.05)
    monkeypatch.setattr(measuring, "MEASURE_S", 0.05)
    for end in (answer, measure):
        with memory_ends() as (_, there), pytest.raises(NodeGone):
            end(there)


def test_who_dribbles_is_given_up_in_time(monkeypatch):
    """Each byte comes soon, all of them never: the deadline is for the whole conversation."""
    monkeypatch.setattr(measuring, "ANSWER_S", 0.2)
    with memory_ends() as (here, there):
        over = threading.Event()

        def dribble():
            here.send(request(Kind.TAKE, MOST_BYTES))
            while not over.wait(0.01):
                here.send(b"x")

        with beside(dribble):
            with pytest.raises(NodeGone):
                answer(there)
            over.set()


def test_who_leaves_in_the_middle_is_gone(ends):
    here, there = ends
    here.send(request(Kind.TAKE, MOST_BYTES))
    here.send(bytes(1000))
    here.close()
    with pytest.raises(NodeGone):
        answer(there)


def liar(channel, seconds, n_echoes=12):
    """Echoes as it should, then takes an amount and says how long that took."""
    room = bytearray(MOST_BYTES)
    for _ in range(n_echoes):
        channel.receive_into(memoryview(room)[:8])
        channel.send(room[:8])
    while True:
        channel.receive_into(memoryview(room)[:8])
        _, n_bytes = struct.unpack("<II", room[:8])
        channel.receive_into(memoryview(room)[:n_bytes])
        channel.send(struct.pack("<d", seconds))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 0.0, 1e9, 1e-300])
def test_a_time_that_cannot_be_is_not_believed(seconds):
    with memory_ends() as (here, there), beside(liar, there, seconds):
        with pytest.raises(RemoteProtocolError):
            measure(here)
        here.close()


def test_an_echo_that_comes_back_changed_is_not_counted():
    with memory_ends() as (here, there):
        there.send(bytes(8))
        with pytest.raises(RemoteProtocolError, match="did not send an echo back as it was"):
            measure(here)
