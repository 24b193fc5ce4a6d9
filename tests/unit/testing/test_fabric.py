"""What a switch does to frames between machines: who gets them, when, and what cuts, partitions, loss and other machines' traffic change."""

import struct
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import UserError
from yoke.testing.ethernet import address_of
from yoke.testing.fabric import MAX_MACHINES, Fabric, Way
from yoke.testing.shape import MIXED, WIFI, WIRED, Shape

NAMES = ["hall", "attic", "cellar"]
HALL, ATTIC, CELLAR = range(3)
BROADCAST = b"\xff" * 6
WIRE = 24  # bytes of a packet on the wire that are not in the frame
SLOW = Shape(bytes_per_s=1000.0, queue_s=100.0)


def frame(to, size=100, mark=0, source=HALL):
    """A frame of ``size`` bytes for a machine, or for an address."""
    return bytes(10) + (to if isinstance(to, bytes) else address_of(to)) + address_of(source) + mark.to_bytes(size - 12, "big")


def stream_frame(to, packets, segment=1000):
    """A frame that stands for many packets of a TCP stream over IPv4."""
    tcp = bytes(12) + b"\x50\x10" + bytes(6)
    network = b"\x45\x00" + (40 + packets * segment).to_bytes(2, "big") + bytes(4) + b"\x40\x06" + bytes(10)
    return struct.pack("=BBHHHH", 1, 1, 54, segment, 34, 16) + address_of(to) + address_of(HALL) + b"\x08\x00" + network + tcp + bytes(packets * segment)


def fabric(*cables, seed=0):
    return Fabric(dict(zip(NAMES, cables if len(cables) > 1 else cables * 3, strict=True)), seed)


def drain(switch, until=float("inf")):
    """(time, machine, frame) of all that comes out, asked for at the moment when it is due."""
    found = []
    while switch.next_s is not None and switch.next_s <= until:
        now = switch.next_s
        found += [(now, index, each) for index, each in switch.leave(now)]
    return found


def times(found):
    return [at for at, _, _ in found]


def test_a_frame_takes_both_ways():
    switch = fabric(Shape(delay_s=0.1, bytes_per_s=1000.0), Shape(delay_s=0.2, bytes_per_s=500.0), Shape())
    sent = frame(ATTIC, 100 - WIRE)
    switch.enter(5.0, HALL, sent)
    # 0.1 s up and 0.1 s of delay; the way down begins with the first byte, takes 0.2 s, and has 0.2 s of delay.
    assert drain(switch) == [(pytest.approx(5.5), ATTIC, sent)]


def test_ways_of_one_rate_take_a_bursts_time_once():
    switch = fabric(SLOW)
    switch.enter(0.0, HALL, stream_frame(ATTIC, 5))
    assert times(drain(switch)) == [pytest.approx(5 * (1054 + WIRE) / 1000)]


def test_parts_of_a_burst_are_not_later_than_all_of_it_would_have_been():
    switch = fabric(Shape(bytes_per_s=1000.0), SLOW, Shape())
    switch.reshape("hall", Way.UP, Shape(bytes_per_s=1000.0, loss=0.3))
    switch.enter(0.0, HALL, stream_frame(ATTIC, 20))
    found = drain(switch)
    assert len(found) > 2, "the seed loses packets in the middle"
    assert times(found) == pytest.approx([20 * (1054 + WIRE) / 1000] * len(found))


def test_one_waking_is_enough_where_nothing_is_in_the_way():
    switch = fabric(WIRED.cables[0])
    switch.enter(0.0, HALL, frame(ATTIC))
    assert len(switch.leave(switch.next_s)) == 1


def test_two_senders_share_a_receivers_way():
    switch = fabric(Shape(), SLOW, Shape())
    for _ in range(2):
        for source in (HALL, CELLAR):
            switch.enter(0.0, source, frame(ATTIC, 1000 - WIRE, source))
    assert times(drain(switch)) == pytest.approx([1, 2, 3, 4])


def test_one_senders_backlog_is_not_anothers():
    """What still waits at its sender is not yet at the receiver's queue, whenever it was handed in."""
    switch = fabric(SLOW, SLOW, SLOW)
    for mark in range(10):
        switch.enter(0.0, HALL, frame(ATTIC, 1000 - WIRE, mark))
    switch.enter(0.0, CELLAR, frame(ATTIC, 1000 - WIRE, 99, CELLAR))
    found = drain(switch)
    own = [at for at, _, each in found if each.endswith(b"\x63")]
    assert own == [pytest.approx(2.0)], "it is the second to be served: each sender's first arrives after a second"
    assert times(found)[-1] == pytest.approx(11.0)


def test_a_machine_on_wifi_does_not_slow_those_on_cables():
    switch = fabric(*MIXED.cables_for(3))
    for mark in range(20):
        switch.enter(mark * 1e-3, ATTIC, frame(CELLAR, 1000, mark, ATTIC))
        switch.enter(mark * 1e-3, HALL, frame(CELLAR, 1000, mark))
    wired = [at - round(at * 1e3) / 1e3 for at, _, each in drain(switch) if each[16:22] == address_of(HALL)]
    ideal = 2 * WIRED.cables[0].delay_s + (1000 + WIRE) / WIRED.cables[0].bytes_per_s
    assert len(wired) == 20
    assert max(wired) <= ideal + (1000 + WIRE) / WIRED.cables[0].bytes_per_s + 1e-9, "at most one packet of the other is in front"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from([HALL, CELLAR]), st.integers(60, 400)), max_size=40), st.integers(0, 2**16))
def test_frames_of_one_sender_arrive_in_order_and_all_are_accounted_for(steps, seed):
    shape = Shape(delay_s=0.1, jitter_s=0.1, loss=0.2, bytes_per_s=5000.0, queue_s=0.2, spikes_per_s=0.5)
    switch = fabric(shape, seed=seed)
    now = 0.0
    for number, (gap, source, size) in enumerate(steps):
        now += gap / 1000
        switch.enter(now, source, frame(ATTIC, size, number, source))
    found = drain(switch)
    for source in (HALL, CELLAR):
        marks = [int.from_bytes(each[22:], "big") for _, _, each in found if each[16:22] == address_of(source)]
        assert marks == sorted(marks)
    total = Counter()
    for counts in switch.counts().values():
        total.update(counts.numbers())
    assert total["sent"] == len(steps)
    assert total["reached"] == len(found)
    assert total["sent"] == total["reached"] + total["lost"] + total["dropped"] + total["stopped"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([HALL, CELLAR]), st.integers(60, 400)), max_size=30),
    st.lists(st.integers(1, 300), min_size=60, max_size=60),
    st.integers(0, 2**16),
)
def test_what_comes_out_does_not_depend_on_when_it_is_asked_for(steps, waits, seed):
    """A process that wakes late hands over late, but the same frames in the same order."""

    def play(ask):
        switch = fabric(Shape(delay_s=0.1, jitter_s=0.05, loss=0.1, bytes_per_s=5000.0), seed=seed)
        now, found = 0.0, []
        for number, (gap, source, size) in enumerate(steps):
            now += gap / 1000
            found += ask(switch, now)
            switch.enter(now, source, frame(ATTIC, size, number, source))
        return found + ask(switch, now + 1000.0)

    def at_once(switch, now):
        return [each for _, _, each in drain(switch, now)]

    pauses = iter(waits)

    def sometimes(switch, now):
        return [each for _, each in switch.leave(now)] if next(pauses) % 3 == 0 or now > 900 else []

    assert play(at_once) == play(sometimes)


def test_draws_are_those_of_the_seed_and_each_cable_has_its_own():
    def lost(seed, source):
        switch = fabric(WIFI.cables[0], seed=seed)
        for number in range(2000):
            switch.enter(number * 1e-2, source, frame(ATTIC, 100, number, source))
        return {int.from_bytes(each[22:], "big") for _, _, each in drain(switch)}

    assert lost(1, HALL) == lost(1, HALL)
    assert lost(1, HALL) != lost(2, HALL)
    assert lost(1, HALL) != lost(1, CELLAR)


def test_a_frame_loses_single_packets_and_the_others_arrive():
    switch = fabric(Shape(loss=0.1))
    for _ in range(100):
        switch.enter(0.0, HALL, stream_frame(ATTIC, 40))
    pieces = drain(switch)
    counts = switch.counts()
    assert counts["hall"].sent == 4000
    assert counts["hall"].lost == pytest.approx(4000 * 0.19, abs=4 * 25)
    assert counts["attic"].reached == 4000 - counts["hall"].lost
    assert len(pieces) > 300
    assert sum(len(each) - 10 - 54 for _, _, each in pieces) == counts["attic"].reached * 1000


def test_nothing_passes_a_cut_cable_either_way_until_it_is_mended():
    switch = fabric(Shape(delay_s=0.1))
    switch.enter(0.0, HALL, frame(ATTIC))
    switch.enter(0.0, ATTIC, frame(HALL))
    switch.enter(0.0, HALL, frame(CELLAR))
    switch.cut(["attic"])
    switch.enter(0.05, HALL, frame(ATTIC))
    switch.enter(0.05, ATTIC, frame(HALL))
    assert [index for _, index, _ in drain(switch)] == [CELLAR], "what was under way to or from it is lost too"
    switch.mend(["attic"])
    switch.enter(1.0, HALL, frame(ATTIC))
    assert [index for _, index, _ in drain(switch)] == [ATTIC]
    assert switch.counts()["hall"].stopped == 2
    assert switch.counts()["attic"].stopped == 2


def pairs_that_pass(switch):
    found = set()
    for source in range(3):
        switch.enter(0.0, source, frame(BROADCAST, source=source))
        found |= {(source, index) for _, index, _ in drain(switch)}
    return found


EVERYWAY = {(a, b) for a in range(3) for b in range(3) if a != b}


def test_what_is_for_all_reaches_all_others():
    assert pairs_that_pass(fabric(Shape())) == EVERYWAY


def test_a_partition_keeps_sets_apart_until_it_is_healed():
    switch = fabric(Shape())
    switch.part([["hall"], ["attic", "cellar"]])
    assert pairs_that_pass(switch) == {(ATTIC, CELLAR), (CELLAR, ATTIC)}
    switch.heal()
    assert pairs_that_pass(switch) == EVERYWAY
    switch.part([["hall"], ["attic"]])
    assert pairs_that_pass(switch) == EVERYWAY - {(HALL, ATTIC), (ATTIC, HALL)}
    switch.heal()
    switch.close("hall", "attic")
    assert pairs_that_pass(switch) == EVERYWAY - {(HALL, ATTIC)}


def test_a_frame_for_nobody_reaches_nobody():
    switch = fabric(Shape())
    switch.enter(0.0, HALL, frame(77))
    assert drain(switch) == []
    assert switch.next_s is None


def test_a_way_between_two_comes_on_top_of_their_cables():
    switch = fabric(Shape(delay_s=0.1))
    switch.shape_between("hall", "attic", Shape(delay_s=1.0, bytes_per_s=1000.0))
    switch.enter(0.0, HALL, frame(ATTIC, 500 - WIRE))
    switch.enter(0.0, HALL, frame(CELLAR, 500 - WIRE))
    switch.enter(0.0, ATTIC, frame(HALL, 500 - WIRE))
    assert times(drain(switch)) == pytest.approx([0.2, 0.2, 1.7])
    switch.shape_between("hall", "attic", Shape(loss=0.999999))
    switch.enter(9.0, HALL, frame(ATTIC))
    assert drain(switch) == []


def test_a_way_down_can_change_while_packets_are_under_way():
    switch = fabric(Shape(delay_s=0.1))
    switch.enter(0.0, HALL, frame(ATTIC, mark=1))
    switch.reshape("attic", Way.DOWN, Shape(delay_s=0.5))
    assert times(drain(switch)) == [pytest.approx(0.6)]
    assert switch.shape_of("attic", Way.DOWN).delay_s == 0.5
    assert switch.shape_of("attic", Way.UP).delay_s == 0.1


@pytest.mark.parametrize(
    "act",
    [
        lambda switch: switch.cut(["hall", "roof"]),
        lambda switch: switch.mend(["roof"]),
        lambda switch: switch.close("hall", "roof"),
        lambda switch: switch.part([["hall"], ["roof"]]),
        lambda switch: switch.reshape("roof", Way.UP, Shape()),
        lambda switch: switch.shape_between("roof", "hall", Shape()),
    ],
)
def test_a_machine_that_is_not_there_is_refused_and_nothing_changes(act):
    switch = fabric(Shape())
    with pytest.raises(UserError, match="no machine 'roof'"):
        act(switch)
    assert pairs_that_pass(switch) == EVERYWAY


def test_a_machine_in_two_sets_is_refused():
    switch = fabric(Shape())
    with pytest.raises(UserError, match="'hall' is in two sets"):
        switch.part([["hall", "attic"], ["cellar", "hall"]])
    assert pairs_that_pass(switch) == EVERYWAY


@pytest.mark.parametrize("count", [0, MAX_MACHINES + 1])
def test_a_switch_has_a_number_of_machines_that_it_can_hold(count):
    with pytest.raises(UserError, match=f"{count} machines"):
        Fabric({str(index): Shape() for index in range(count)})


def test_its_picture_says_what_is_cut_and_under_way():
    switch = fabric(Shape(delay_s=1.0))
    switch.enter(0.0, HALL, frame(ATTIC))
    switch.cut(["cellar"])
    switch.close("hall", "attic")
    assert repr(switch) == "Fabric(3 machines, 1 frames under way, cut: cellar, 1 ways closed)"
