"""Conformance suites: what every implementation of a protocol must do. An implementation of your own is right when it passes."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.frame import Batch, Frame, Output
from yoke.core.request import Sampling
from yoke.net.channel import Channel, receive_message, send_message
from yoke.net.codec import HELLO_LIMITS, Hello, Limits, Purpose
from yoke.net.group import Float32, Group

Result = TypeVar("Result")
MakePair = Callable[[], tuple[Channel, Channel]]
MakeGroups = Callable[[int], Sequence[Group]]

_WAIT_S = 30.0


def check_channel(make_pair: MakePair) -> None:
    """Check a `Channel` implementation. ``make_pair`` gives both ends of a new connection at every call; the suite closes them.

    Raises
    ------
    AssertionError
        if the implementation breaks the contract.
    """
    for check in (
        _keeps_order_and_bytes,
        _carries_messages,
        _carries_both_ways_at_once,
        _waits_when_nobody_reads,
        _delivers_before_it_ends,
        _ends_for_good,
        _wakes_who_waits_when_closed_here,
        _waits_for_bytes_or_a_nudge,
        _times_out,
    ):
        a, b = make_pair()
        try:
            check(a, b)
        finally:
            a.close()
            b.close()


def check_group(make_groups: MakeGroups, *, tolerance: float = 0.0) -> None:
    """Check a `Group` implementation. ``make_groups(n)`` gives the ranks of a new group of n; the suite closes them.

    Parameters
    ----------
    tolerance : how far a sum may be from the exact one, relative to the largest contribution; 0 demands the sum in rank order, bit for bit.

    Raises
    ------
    AssertionError
        if the implementation breaks the contract.
    """
    for size in (1, 2, 3, 4):
        groups = make_groups(size)
        try:
            assert [(group.rank, group.size) for group in groups] == [(rank, size) for rank in range(size)], "ranks and size are wrong"
            # Around the edges of blocks and chunks, and far more than any buffer holds.
            for length in (0, 1, 31, 33, 2048, 16385, 700_001):
                _sums_alike(groups, length, tolerance)
            _gathers(groups)
            _counts(groups)
        finally:
            for group in groups:
                group.close()
        if size > 1:
            _notices_loss(make_groups(size))


def _receive(channel: Channel, n: int) -> bytes:
    data = bytearray(n)
    channel.receive_into(memoryview(data))
    return bytes(data)


def _expect_gone(call: Callable[[], object]) -> None:
    try:
        call()
    except NodeGone:
        return
    raise AssertionError("expected NodeGone")


def _keeps_order_and_bytes(a: Channel, b: Channel) -> None:
    assert a.peer != b.peer, "each end's peer is the other"
    a.send(b"one", b"", bytearray(b"two"), memoryview(b"three"))
    a.send()
    a.send(b"four")
    assert _receive(b, 0) == b""
    assert _receive(b, 9) == b"onetwothr", "reads need not follow the writes' bounds"
    assert _receive(b, 6) == b"eefour"
    numbers = np.arange(6, dtype=np.float32)
    a.send(numbers.data)
    arrived = np.zeros(6, np.float32)
    b.receive_into(arrived.data)
    assert np.array_equal(arrived, numbers), "views of other than bytes are taken as their bytes"


def _carries_messages(a: Channel, b: Channel) -> None:
    hello = Hello(plan_version=3, purpose=Purpose.PIPE, stage=1, rank=2, nonce=bytes(range(16)))
    batch = Batch(tokens=(5, 6), slots=(0, 1), positions=(9, 0), cells=(4, 7), outputs=(Output(row=1, sampling=Sampling(seed=8)),), freed_slots=(2,))
    frame = Frame(plan_version=3, step=1, batch=batch, hidden=bytes(range(32)))
    send_message(a, hello)
    send_message(a, frame)
    assert receive_message(b, HELLO_LIMITS) == hello
    limits = Limits(max_tokens=2, width=4, max_outputs=1, max_body_bytes=1 << 16)
    received = receive_message(b, limits)
    assert received == frame, "a frame arrives as it was sent"
    send_message(a, frame)
    try:
        receive_message(b, HELLO_LIMITS)
    except RemoteProtocolError:
        return
    raise AssertionError("a frame passed where only a hello was allowed")


def _carries_both_ways_at_once(a: Channel, b: Channel) -> None:
    data = np.random.default_rng(1).bytes(3_000_000)
    with ThreadPoolExecutor(4) as threads:
        sent = [threads.submit(end.send, data[:10], data) for end in (a, b)]
        received = [threads.submit(_receive, end, len(data) + 10) for end in (a, b)]
        for sending in sent:
            sending.result(_WAIT_S)
        for receiving in received:
            assert receiving.result(_WAIT_S) == data[:10] + data


def _waits_when_nobody_reads(a: Channel, b: Channel) -> None:
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(a.send, bytes(64 << 20))
        time.sleep(0.1)
        assert not sending.done(), "a channel is bounded: it must not take 64 MiB that nobody reads"
        b.close()
        _expect_gone(lambda: sending.result(_WAIT_S))


def _delivers_before_it_ends(a: Channel, b: Channel) -> None:
    a.send(b"last words")
    a.close()
    assert _receive(b, 10) == b"last words"
    _expect_gone(lambda: _receive(b, 1))


def _ends_for_good(a: Channel, b: Channel) -> None:
    a.send(b"half")
    a.close()
    a.close()
    for _ in range(2):
        _expect_gone(lambda: _receive(b, 5))
        _expect_gone(lambda: b.send(b"x"))
        _expect_gone(lambda: _receive(a, 1))
        _expect_gone(lambda: a.send(b"x"))


def _wakes_who_waits_when_closed_here(a: Channel, b: Channel) -> None:
    with ThreadPoolExecutor(1) as threads:
        receiving = threads.submit(_receive, a, 1)
        time.sleep(0.05)
        a.close()
        _expect_gone(lambda: receiving.result(_WAIT_S))
    _expect_gone(lambda: _receive(b, 1))


def _waits_for_bytes_or_a_nudge(a: Channel, b: Channel) -> None:
    b.nudge()
    assert not b.await_bytes(), "a nudge before the call ends it"
    a.send(b"x")
    assert b.await_bytes(), "there is a byte"
    assert _receive(b, 1) == b"x"
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(b.await_bytes)
        time.sleep(0.05)
        assert not waiting.done(), "nothing has come"
        b.nudge()
        assert not waiting.result(_WAIT_S), "a nudge is not bytes"
        waiting = pool.submit(b.await_bytes)
        a.send(b"y")
        assert waiting.result(_WAIT_S), "bytes end the wait"
        assert _receive(b, 1) == b"y"
        waiting = pool.submit(b.await_bytes)
        a.close()
        assert waiting.result(_WAIT_S), "the end is something to receive"
    _expect_gone(lambda: _receive(b, 1))
    b.nudge()
    assert b.await_bytes(), "and stays so"


def _times_out(a: Channel, b: Channel) -> None:
    a.set_timeout(0.05)
    b.send(b"in time")
    assert _receive(a, 7) == b"in time"
    _expect_gone(lambda: _receive(a, 1))
    a.set_timeout(None)
    _expect_gone(lambda: _receive(a, 1))


def _together(groups: Sequence[Group], work: Callable[[Group], Result]) -> list[Result]:
    """What ``work`` gives for each rank, all at once."""
    with ThreadPoolExecutor(len(groups)) as threads:
        return [future.result(_WAIT_S) for future in [threads.submit(work, group) for group in groups]]


def _sums_alike(groups: Sequence[Group], length: int, tolerance: float) -> None:
    contributions = [np.random.default_rng(rank).standard_normal(length).astype(np.float32) for rank in range(len(groups))]
    expected = contributions[0].copy()
    for contribution in contributions[1:]:
        expected += contribution

    def reduce(group: Group) -> Float32:
        view = contributions[group.rank].copy()
        group.all_reduce(view)
        return view

    sums = _together(groups, reduce)
    for found in sums:
        assert found.tobytes() == sums[0].tobytes(), f"ranks disagree on a sum of {length} values"
    if len(groups) == 1 or not tolerance:
        assert sums[0].tobytes() == expected.tobytes(), f"a sum of {length} values is not the one in rank order"
    elif length:
        scale = max(float(np.abs(contribution).max()) for contribution in contributions)
        assert float(np.abs(sums[0] - expected).max()) <= tolerance * scale * len(groups), f"a sum of {length} values is too far off"


def _gathers(groups: Sequence[Group]) -> None:
    for lengths in (tuple(range(len(groups))), tuple(40_000 * (1 + rank) for rank in range(len(groups)))):
        parts = [np.full(length, rank + 0.1, np.float32) for rank, length in enumerate(lengths)]

        def gather(group: Group, parts: Sequence[Float32] = parts, lengths: tuple[int, ...] = lengths) -> list[Float32] | None:
            return group.gather(parts[group.rank], lengths)

        gathered = _together(groups, gather)
        assert all(other is None for other in gathered[1:]), "only rank 0 gets what is gathered"
        assert gathered[0] is not None
        assert len(gathered[0]) == len(parts)
        assert all(np.array_equal(found, part) for found, part in zip(gathered[0], parts, strict=True)), "gathered parts are not in rank order"


def _counts(groups: Sequence[Group]) -> None:
    for group in groups:
        assert group.collective_s >= 0
        assert (group.bytes_sent > 0) == (len(groups) > 1), "bytes go to peers, and only to peers"


def _notices_loss(groups: Sequence[Group]) -> None:
    closing = threading.Timer(0.05, groups[-1].close)
    closing.start()
    try:
        _together(groups[:-1], lambda group: _expect_gone(lambda: group.all_reduce(np.ones(2048, np.float32))))
    finally:
        closing.join()
        for group in groups:
            group.close()
