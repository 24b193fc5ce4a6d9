"""Every connection reaches whom it is for, whenever it comes; what is for nobody is closed."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from yoke.core.errors import NodeGone
from yoke.net.channel import Channel, send_message
from yoke.net.codec import Hello, Purpose
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, connect
from yoke.node.porter import Porter

NONCE = bytes(range(16))
SOON_S = 10.0


class Door:
    """A porter, and two nodes that know it."""

    def __init__(self, directory: Path) -> None:
        self.here, self.attic, self.cellar = (Identity.load_or_create(directory / name) for name in ("here", "attic", "cellar"))
        self.listener = Listener("127.0.0.1", 0, self.here, [self.attic.certificate_der, self.cellar.certificate_der])
        self.served: list[Channel] = []
        self.is_served = threading.Event()
        self.porter = Porter(self.listener, {Purpose.RESULT: self.serve})
        self.open: list[Channel] = []

    def serve(self, channel: Channel) -> None:
        self.served.append(channel)
        self.is_served.set()

    def knock(self, who: Identity, **hello: object) -> Channel:
        channel = connect(self.listener.address, self.here.id, who, [self.here.certificate_der], deadline_s=5)
        self.open.append(channel)
        send_message(channel, Hello(**{"plan_version": 1, "purpose": Purpose.PIPE, "stage": 0, "rank": 0, "nonce": NONCE, **hello}))  # type: ignore[arg-type]
        return channel

    def collect(self, version: int = 1, wait_s: float = SOON_S, **expected: Identity) -> dict[tuple[Purpose, tuple[int, int]], Channel]:
        keys = {(Purpose.PIPE, (int(place[1]), int(place[2]))): who.id for place, who in expected.items()}
        found = self.porter.collect(version, NONCE, keys, time.monotonic() + wait_s, lambda: False)
        self.open += found.values()
        return found


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path)
    with contextlib.closing(door.listener):
        yield door
        for channel in door.open:
            channel.close()


def is_closed(channel: Channel) -> bool:
    channel.set_timeout(SOON_S)
    try:
        channel.receive_into(memoryview(bytearray(1)))
    except NodeGone as gone:
        return "no answer" not in str(gone)
    return False


def test_channels_come_before_and_after_they_are_asked_for(door: Door) -> None:
    door.knock(door.attic)
    late = threading.Timer(0.05, lambda: door.knock(door.cellar, rank=1))
    late.start()
    found = door.collect(p00=door.attic, p01=door.cellar)
    late.join()
    assert {key[1]: channel.peer for key, channel in found.items()} == {(0, 0): door.attic.id, (0, 1): door.cellar.id}


def test_channel_of_a_later_plan_waits_for_it_and_one_of_an_earlier_plan_is_closed(door: Door) -> None:
    early, late = door.knock(door.attic, plan_version=3), door.knock(door.cellar, plan_version=1)
    door.knock(door.cellar, plan_version=2)
    assert len(door.collect(version=2, p00=door.cellar)) == 1
    assert is_closed(late)
    assert door.collect(version=3, p00=door.attic)[Purpose.PIPE, (0, 0)].peer == door.attic.id
    early.send(b"x")


def test_member_at_anothers_place_or_of_another_start_is_turned_away(door: Door) -> None:
    liar, stale = door.knock(door.cellar), door.knock(door.attic, nonce=bytes(16))
    with pytest.raises(NodeGone, match="never came: pipe of stage 0, rank 0"):
        door.collect(wait_s=0.3, p00=door.attic)
    assert is_closed(liar)
    assert is_closed(stale)


def test_waiting_ends_when_the_plan_is_given_up(door: Door) -> None:
    stopped = threading.Event()
    threading.Timer(0.05, stopped.set).start()
    with pytest.raises(NodeGone, match="stood down"):
        door.porter.collect(1, NONCE, {(Purpose.PIPE, (0, 0)): door.attic.id}, time.monotonic() + 60, stopped.is_set)


def test_purpose_that_belongs_to_no_plan_is_served_at_once_and_closed_after(door: Door) -> None:
    channel = door.knock(door.attic, purpose=Purpose.RESULT, plan_version=0)
    assert door.is_served.wait(SOON_S)
    assert door.served[0].peer == door.attic.id
    assert is_closed(channel)
