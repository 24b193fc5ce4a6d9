"""Who is asked for which tile: every tile comes once if anybody can bring it, and nobody is asked for what he has not."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.node.allotment import LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES, Allotment, Pace

KB = 1 << 10
TILE = 64 * KB
PACE = Pace(window_s=0.5, stall_s=1.0, grace_s=2.0, help_s=30.0)


def bitmap(ids: object, n_tiles: int = 400) -> bytes:
    bits = bytearray(-(-n_tiles // 8))
    for tile_id in ids:  # type: ignore[attr-defined]
        bits[tile_id >> 3] |= 1 << (tile_id & 7)
    return bytes(bits)


def make(n_tiles: int, *last_resorts: bool, n_bytes: int = TILE, pace: Pace = PACE) -> Allotment:
    return Allotment(dict.fromkeys(range(n_tiles), n_bytes), last_resorts, 0.0, pace)


def drain(allotment: Allotment, source: int, now: float, step_s: float = 1e-3) -> tuple[list[int], float]:
    """Let a source bring all that it is asked for, a tile each ``step_s``."""
    brought: list[int] = []
    while ids := allotment.take(source, now):
        for tile_id in ids:
            now += step_s
            allotment.arrived(source, tile_id, now)
            brought.append(tile_id)
    return brought, now


def test_one_source_with_all_brings_all_in_order() -> None:
    allotment = make(100, False)
    allotment.offer(0, bitmap(range(100)))
    assert drain(allotment, 0, 0.0)[0] == list(range(100))
    assert allotment.is_over
    assert not allotment.left
    assert allotment.done_bytes(0) == 100 * TILE


def test_nothing_is_asked_of_a_source_that_has_not_spoken_or_has_enough_to_do() -> None:
    allotment = make(100, False)
    assert allotment.take(0, 0.0) == []
    allotment.offer(0, bitmap(range(100)))
    assert len(allotment.take(0, 0.0)) == LEAST_WINDOW_BYTES // TILE
    assert allotment.take(0, 0.0) == []


def test_a_fast_source_is_given_more_at_a_time_up_to_a_bound() -> None:
    allotment = make(400, False)
    allotment.offer(0, bitmap(range(400)))
    first = allotment.take(0, 0.0)
    for tile_id in first:
        allotment.arrived(0, tile_id, 0.01)
    assert len(allotment.take(0, 0.01)) == MOST_WINDOW_BYTES // TILE
    slow = make(400, False)
    slow.offer(0, bitmap(range(400)))
    for tile_id in slow.take(0, 0.0):
        slow.arrived(0, tile_id, 10.0)
    assert len(slow.take(0, 10.0)) == LEAST_WINDOW_BYTES // TILE


def test_what_few_have_is_asked_of_them_first() -> None:
    allotment = make(20, False, False)
    allotment.offer(0, bitmap(range(20)))
    allotment.offer(1, bitmap(range(10)))
    assert allotment.take(0, 0.0) == [10, 11, 12, 13]
    assert allotment.take(1, 0.0) == [0, 1, 2, 3]


def test_the_last_resort_gets_only_what_nobody_else_has() -> None:
    allotment = make(20, False, True)
    allotment.offer(1, bitmap(range(20)))
    assert allotment.take(1, 0.0) == [], "the other has not yet said what it has"
    allotment.offer(0, bitmap(range(15)))
    brought, now = drain(allotment, 1, 0.1)
    assert brought == list(range(15, 20))
    assert drain(allotment, 0, now)[0] == list(range(15))
    assert allotment.is_over


def test_the_last_resort_does_not_wait_for_ever_for_others_to_speak() -> None:
    allotment = make(20, False, True)
    allotment.offer(1, bitmap(range(20)))
    assert allotment.take(1, PACE.grace_s - 0.1) == []
    assert allotment.take(1, PACE.grace_s) != []


@pytest.mark.parametrize(("step_s", "helps"), [(0.5, True), (0.01, False)])
def test_the_last_resort_helps_when_the_others_are_too_slow(step_s: float, helps: bool) -> None:
    """400 tiles of 64 KB take 200 s at one in half a second, and 4 s at a hundred a second."""
    allotment, now = make(400, False, True), 0.0
    for source in range(2):
        allotment.offer(source, bitmap(range(400)))
    while now < PACE.grace_s:
        assert allotment.take(1, now) == []
        for tile_id in allotment.take(0, now):
            now += step_s
            allotment.arrived(0, tile_id, now)
    assert bool(allotment.take(1, now)) == helps


def test_a_stalled_sources_tiles_are_asked_of_who_has_nothing_to_do() -> None:
    allotment = make(4, False, False)
    allotment.offer(0, bitmap(range(4)))
    allotment.offer(1, bitmap(range(4)))
    assert allotment.take(0, 0.0) == [0, 1, 2, 3]
    assert allotment.take(1, 0.0) == []
    assert allotment.take(1, PACE.stall_s) == [3, 2, 1, 0]
    assert allotment.take(0, PACE.stall_s) == []
    for tile_id in (3, 2, 1, 0):
        assert allotment.arrived(1, tile_id, 1.1)
    assert allotment.is_over
    assert not allotment.arrived(0, 0, 1.2), "it comes twice"
    assert allotment.wasted_bytes == TILE


def test_a_source_that_will_take_long_for_what_it_holds_is_relieved() -> None:
    allotment = make(8, False, False)
    allotment.offer(0, bitmap(range(8)))
    for tile_id in allotment.take(0, 0.0):
        allotment.arrived(0, tile_id, 4.0)
    assert allotment.take(0, 4.0) == [4, 5, 6, 7]
    allotment.offer(1, bitmap(range(8)))
    assert allotment.take(1, 4.1) == [7, 6, 5, 4], "64 KB/s for 256 KB take 4 s"


def test_no_third_source_is_asked_while_a_second_is_at_it() -> None:
    allotment = make(4, False, False, False)
    for source in range(3):
        allotment.offer(source, bitmap(range(4)))
    allotment.take(0, 0.0)
    assert allotment.take(1, 1.0) != []
    assert allotment.take(2, 1.5) == []
    assert allotment.take(2, 2.0) != [], "until that one stalls too"


def test_what_a_lost_source_was_asked_for_goes_to_the_others() -> None:
    allotment = make(8, False, False, True)
    for source in range(3):
        allotment.offer(source, bitmap(range(8)))
    assert allotment.take(0, 0.0) == [0, 1, 2, 3]
    assert allotment.take(1, 0.0) == [4, 5, 6, 7]
    allotment.drop(0)
    allotment.arrived(1, 4, 0.1)
    allotment.arrived(1, 5, 0.1)
    assert allotment.take(1, 0.1) != []
    allotment.drop(1)
    assert set(drain(allotment, 2, 0.2)[0]) == {0, 1, 2, 3, 6, 7}
    assert allotment.is_over


def test_a_source_that_comes_back_goes_on() -> None:
    allotment = make(4, False)
    allotment.offer(0, bitmap(range(4)))
    allotment.take(0, 0.0)
    allotment.arrived(0, 0, 0.1)
    allotment.drop(0, is_coming_back=True)
    assert not allotment.is_over
    assert allotment.take(0, 0.2) == []
    allotment.offer(0, bitmap(range(4)))
    assert set(drain(allotment, 0, 0.3)[0]) == {1, 2, 3}


def test_it_is_over_when_nobody_is_left_who_has_any_of_the_rest() -> None:
    allotment = make(4, False, False)
    allotment.offer(0, bitmap([0]))
    assert not allotment.is_over, "the second has not spoken"
    drain(allotment, 0, 0.0)
    allotment.drop(1)
    assert allotment.is_over
    assert allotment.left == {1, 2, 3}


def test_a_source_that_has_not_what_it_promised_is_not_asked_for_it_again() -> None:
    allotment = make(2, False, True)
    for source in range(2):
        allotment.offer(source, bitmap(range(2)))
    assert allotment.take(0, 0.0) == [0, 1]
    allotment.lacks(0, 1)
    allotment.arrived(0, 0, 0.1)
    assert allotment.take(0, 0.1) == []
    assert allotment.take(1, 0.1) == [1]


def test_nothing_wanted_is_over_at_once() -> None:
    assert make(0, False).is_over


@settings(deadline=None)
@given(st.data())
def test_every_tile_comes_once_if_anybody_can_bring_it(data: st.DataObject) -> None:
    """Sources answer, lack, die, come back and stall in any order; what is left in the end nobody alive has."""
    n_tiles, n_sources = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    sizes = {tile_id: data.draw(st.sampled_from([KB, 100 * KB, 300 * KB])) for tile_id in range(n_tiles)}
    last = tuple(data.draw(st.lists(st.booleans(), min_size=n_sources, max_size=n_sources)))
    has = [data.draw(st.sets(st.integers(0, n_tiles - 1))) for _ in range(n_sources)]
    allotment = Allotment(sizes, last, 0.0, PACE)
    asked: list[list[int]] = [[] for _ in range(n_sources)]
    alive, came, now = [True] * n_sources, set(), 0.0
    for source in range(n_sources):
        allotment.offer(source, bitmap(has[source], n_tiles))
    for turn in itertools.count():
        now += data.draw(st.sampled_from([0.01, 0.3, 1.5])) if turn < 60 else 0.5
        for source in range(n_sources):
            ids = allotment.take(source, now)
            assert len(set(ids)) == len(ids)
            assert set(ids) <= has[source]
            assert not set(ids) & set(asked[source])
            assert alive[source] or not ids
            asked[source] += ids
        if allotment.is_over:
            break
        assert turn < 1000, "it goes on for ever"
        for source in range(n_sources):
            event = data.draw(st.sampled_from(["bring", "bring", "bring", "nothing", "lack", "die", "return"])) if turn < 60 else "bring"
            if event == "bring":
                for tile_id in asked[source]:
                    assert allotment.arrived(source, tile_id, now) == (tile_id not in came)
                    came.add(tile_id)
                asked[source] = []
            elif event == "lack" and asked[source]:
                has[source].discard(asked[source][0])
                allotment.lacks(source, asked[source].pop(0))
            elif event == "die" and alive[source] and turn % 7 == 0:
                allotment.drop(source)
                alive[source], asked[source] = False, []
            elif event == "return" and alive[source]:
                allotment.drop(source, is_coming_back=True)
                asked[source] = []
                allotment.offer(source, bitmap(has[source], n_tiles))
    assert allotment.left == set(range(n_tiles)) - came
    for source in range(n_sources):
        assert not (alive[source] and allotment.left & has[source])


def test_each_of_very_many_tiles_is_asked_for_once() -> None:
    n_tiles = 100_000
    allotment = make(n_tiles, False, False)
    for source in range(2):
        allotment.offer(source, bitmap(range(n_tiles), n_tiles))
    asked = 0
    while not allotment.is_over:
        for source in range(2):
            ids = allotment.take(source, 0.0)
            asked += len(ids)
            for tile_id in ids:
                allotment.arrived(source, tile_id, 0.0)
    assert asked == n_tiles
