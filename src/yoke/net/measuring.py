"""How far away a peer is, and how much goes through: round trip, and bytes a second each way, over a channel that carries nothing else meanwhile.

Both ends run this: one `measure`, the other `answer`. Knows no addresses, and does not know who opens the channel or what the figures are for.

A request is 8 bytes: a kind (u32) and a number (u32), little-endian. ``ECHO`` comes back as it is. ``TAKE`` is followed by so many bytes, and answered with how
long they took from the first to the last, in seconds (f64). ``GIVE`` is answered with so many bytes. ``END`` is the last one, and is not answered.
"""

import math
import os
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.node import Link, NodeId
from yoke.net.channel import Channel

ECHOES = 11
FIRST_BYTES, MOST_BYTES, GROWTH = 1 << 16, 1 << 23, 4
LONG_ENOUGH_S, LONG_ENOUGH_ROUND_TRIPS = 0.05, 8
"""An amount that took as long is the last: a connection first has to find out how much it may send, which takes it some round trips."""

MEASURE_S, ANSWER_S = 20.0, 30.0
"""How long all of it may take, at either end; reached only over links of less than 0.1 Mbit/s."""

MAX_REQUESTS = 64
MAX_BYTES_PER_S = 1e12

_REQUEST = struct.Struct("<II")
_SECONDS = struct.Struct("<d")
_PIECE_BYTES = 1 << 16
_NOISE = memoryview(os.urandom(_PIECE_BYTES))  # what a tunnel on the way could press together would go through too fast
_CLOCK_S = 1e-6  # shorter than that, a time says more about the clock than about the link


class Kind(IntEnum):
    """What is asked."""

    ECHO = 1
    TAKE = 2
    GIVE = 3
    END = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasure:
    """What lies between the two ends: median round trip in seconds, and bytes a second from here to there and back.

    Raises
    ------
    RemoteProtocolError
        if a figure is not possible: the peer has a say in them.
    """

    rtt_s: float
    send_bytes_per_s: float
    receive_bytes_per_s: float

    def __post_init__(self) -> None:
        rates = (self.send_bytes_per_s, self.receive_bytes_per_s)
        if not 0 <= self.rtt_s < math.inf or not all(0 < rate <= MAX_BYTES_PER_S for rate in rates):
            raise RemoteProtocolError(
                f"a link with a round trip of {self.rtt_s} s and {rates} bytes/s; expected at least 0 s, and rates up to {MAX_BYTES_PER_S:g}"
            )

    def links(self, here: NodeId, there: NodeId) -> tuple[Link, Link]:
        """The same as values for the planner: from ``here`` to ``there``, and back."""
        return (
            Link(source=here, target=there, rtt_s=self.rtt_s, bandwidth_bytes_per_s=self.send_bytes_per_s),
            Link(source=there, target=here, rtt_s=self.rtt_s, bandwidth_bytes_per_s=self.receive_bytes_per_s),
        )


def measure(channel: Channel) -> LinkMeasure:
    """Measure the link of ``channel``, whose other end runs `answer`. Takes about 0.3 s at 100 Mbit/s. The caller closes the channel, whatever happens.

    Raises
    ------
    NodeGone
        if the connection ended, or it took longer than `MEASURE_S`.
    RemoteProtocolError
        if the peer answers something else.
    """
    line = _Line(channel, MEASURE_S)
    rtt_s = _round_trip(line)
    send = _growing(rtt_s, lambda n_bytes: _sending_s(line, n_bytes))
    receive = _growing(rtt_s, lambda n_bytes: _receiving_s(line, n_bytes))
    line.send(_REQUEST.pack(Kind.END, 0))
    return LinkMeasure(rtt_s=rtt_s, send_bytes_per_s=send, receive_bytes_per_s=receive)


def answer(channel: Channel) -> None:
    """Be measured, until the other end has enough. The caller closes the channel, whatever happens.

    Raises
    ------
    NodeGone
        if the connection ended, or it took longer than `ANSWER_S`.
    RemoteProtocolError
        if the peer asks what the protocol forbids, or more than anybody needs.
    """
    line = _Line(channel, ANSWER_S)
    for _ in range(MAX_REQUESTS):
        request = line.receive(_REQUEST.size)
        kind, number = _REQUEST.unpack(request)
        if kind in {Kind.TAKE, Kind.GIVE} and not 1 < number <= MOST_BYTES:
            raise RemoteProtocolError(f"node {channel.peer[:12]} measures with {number} bytes; expected 2 to {MOST_BYTES}")
        match kind:
            case Kind.ECHO:
                line.send(request)
            case Kind.TAKE:
                line.send(_SECONDS.pack(line.drain(number)))
            case Kind.GIVE:
                line.pour(number)
            case Kind.END:
                return
            case _:
                raise RemoteProtocolError(f"node {channel.peer[:12]} measures with request {kind}; expected 1 to {len(Kind)}")
    raise RemoteProtocolError(f"node {channel.peer[:12]} asked more than {MAX_REQUESTS} things for one measurement")


class _Line:
    """A channel with a deadline for everything that is said on it together, and room for what comes."""

    def __init__(self, channel: Channel, limit_s: float) -> None:
        self._channel, self._limit_s = channel, limit_s
        self._deadline = time.monotonic() + limit_s
        self._room = memoryview(bytearray(_PIECE_BYTES))

    def send(self, data: bytes | memoryview) -> None:
        self._limit()
        self._channel.send(data)

    def receive(self, n_bytes: int) -> bytes:
        """So many bytes, few enough to keep."""
        self._limit()
        self._channel.receive_into(self._room[:n_bytes])
        return bytes(self._room[:n_bytes])

    def pour(self, n_bytes: int) -> None:
        """Send so many bytes that mean nothing. The first one goes alone, so that it arrives before the others, not with them."""
        self.send(_NOISE[:1])
        left = n_bytes - 1
        while left:
            piece = _NOISE[:left]
            self.send(piece)
            left -= len(piece)

    def drain(self, n_bytes: int) -> float:
        """Receive so many bytes and forget them; seconds from the first to the last."""
        self.receive(1)
        started, left = time.perf_counter(), n_bytes - 1
        while left:
            self._limit()
            piece = self._room[:left]
            self._channel.receive_into(piece)
            left -= len(piece)
        return max(_CLOCK_S, time.perf_counter() - started)

    def _limit(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise NodeGone(f"measuring the link to node {self._channel.peer[:12]} took longer than {self._limit_s:g} s")
        self._channel.set_timeout(left_s)


def _round_trip(line: _Line) -> float:
    seconds = []
    for number in range(1 + ECHOES):  # the first one wakes the other end up
        request = _REQUEST.pack(Kind.ECHO, number)
        started = time.perf_counter()
        line.send(request)
        if line.receive(len(request)) != request:
            raise RemoteProtocolError("a peer did not send an echo back as it was")
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _growing(rtt_s: float, seconds_of: Callable[[int], float]) -> float:
    """Bytes a second of the first amount that took long enough, or of the largest."""
    n_bytes = FIRST_BYTES
    while True:
        seconds = seconds_of(n_bytes)
        if n_bytes >= MOST_BYTES or seconds >= max(LONG_ENOUGH_S, LONG_ENOUGH_ROUND_TRIPS * rtt_s):
            return (n_bytes - 1) / seconds
        n_bytes = min(MOST_BYTES, n_bytes * GROWTH)


def _sending_s(line: _Line, n_bytes: int) -> float:
    """Seconds that ``n_bytes`` take to the other end, by its clock."""
    started = time.perf_counter()
    line.send(_REQUEST.pack(Kind.TAKE, n_bytes))
    line.pour(n_bytes)
    (seconds,) = _SECONDS.unpack(line.receive(_SECONDS.size))
    if not n_bytes / MAX_BYTES_PER_S <= seconds <= time.perf_counter() - started + _CLOCK_S:
        raise RemoteProtocolError(f"a peer says that {n_bytes} bytes took it {seconds} s; expected no more than it took to send them and hear of it")
    return float(seconds)


def _receiving_s(line: _Line, n_bytes: int) -> float:
    """Seconds that ``n_bytes`` take from the other end."""
    line.send(_REQUEST.pack(Kind.GIVE, n_bytes))
    return line.drain(n_bytes)
