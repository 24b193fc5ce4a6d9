"""The laws of one way: order, rate, a bounded queue, work done as soon as it can be, the share that is lost; whatever arrives when."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import UserError
from yoke.testing.shape import DROPPED, MIXED, PROFILES, WIFI, WIRED, Hop, Profile, Shape

# Times in thousandths, so that sums of them are not at the edge of what floats tell apart.
GAPS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 3000)), min_size=1, max_size=60)
SEEDS = st.integers(0, 2**32)
SLACK = 1e-9


def arrivals(gaps):
    """Times and sizes from gaps in milliseconds and sizes."""
    now = 0
    for gap, size in gaps:
        now += gap
        yield now / 1000, size


def carried(shape, gaps, seed=0):
    """(arrival, size, end) of each packet."""
    hop = Hop(shape, random.Random(seed))
    return [(at, size, hop.carry(at, size)) for at, size in arrivals(gaps)]


@st.composite
def shapes(draw):
    delay = draw(st.integers(0, 300)) / 1000
    return Shape(
        delay_s=delay,
        jitter_s=delay * draw(st.integers(0, 4)) / 4,
        bytes_per_s=draw(st.sampled_from([math.inf, 1000.0, 10_000.0, 1e6])),
        queue_s=draw(st.sampled_from([0.0, 0.25, 2.0])),
        spikes_per_s=draw(st.sampled_from([0.0, 0.5, 5.0])),
        spike_s=draw(st.sampled_from([0.1, 0.2])),
    )


@settings(deadline=None)
@given(shapes(), GAPS, SEEDS)
def test_nothing_overtakes_and_nothing_comes_too_soon(shape, gaps, seed):
    last = 0.0
    for at, size, end in carried(shape, gaps, seed):
        if end != DROPPED:
            assert end >= last
            assert end >= at + size / shape.bytes_per_s + shape.delay_s - shape.jitter_s - SLACK
            last = end


@settings(deadline=None)
@given(shapes(), GAPS, SEEDS)
def test_no_stretch_of_time_passes_more_than_the_rate(shape, gaps, seed):
    steady = replace(shape, jitter_s=0.0)
    passed = [(size, end) for _, size, end in carried(steady, gaps, seed) if end != DROPPED]
    for first in range(len(passed)):
        total = 0
        for size, end in passed[first:]:
            total += size
            # From the moment at which the first began to be sent.
            assert total <= (end - passed[first][1] + passed[first][0] / steady.bytes_per_s + SLACK) * steady.bytes_per_s or steady.bytes_per_s == math.inf


@settings(deadline=None)
@given(GAPS, st.sampled_from([1000.0, 10_000.0]), st.sampled_from([0.0, 0.1, 0.25, 2.0]))
def test_a_queue_holds_what_it_is_said_to_hold_and_never_idles(gaps, rate, queue_s):
    """Against a queue kept as an amount of bytes that drains."""
    shape = Shape(bytes_per_s=rate, queue_s=queue_s, delay_s=0.01)
    waiting, before = 0.0, 0.0
    for at, size, end in carried(shape, gaps):
        waiting = max(0.0, waiting - (at - before) * rate)
        before = at
        if abs(waiting / rate - queue_s) > SLACK:  # at the border, rounding decides
            assert (end == DROPPED) == (waiting / rate > queue_s)
        if end != DROPPED:
            waiting += size
            assert end == pytest.approx(at + waiting / rate + shape.delay_s, abs=1e-6)


@settings(deadline=None)
@given(shapes(), GAPS, SEEDS)
def test_the_same_seed_gives_the_same_times(shape, gaps, seed):
    assert carried(shape, gaps, seed) == carried(shape, gaps, seed)


@settings(deadline=None)
@given(GAPS, SEEDS)
def test_jitter_lies_on_both_sides_of_the_delay(gaps, seed):
    shape = Shape(delay_s=0.1, jitter_s=0.04, keeps_order=False)
    for at, _, end in carried(shape, gaps, seed):
        assert at + 0.06 - SLACK <= end <= at + 0.14 + SLACK


def test_jitter_is_spread_evenly_and_may_turn_the_order():
    shape = Shape(delay_s=0.1, jitter_s=0.1, keeps_order=False)
    ends = [end - at for at, _, end in carried(shape, [(1, 100)] * 4000)]
    assert sum(ends) / len(ends) == pytest.approx(0.1, abs=0.005)
    assert min(ends) < 0.01
    assert max(ends) > 0.19


@settings(deadline=None)
@given(st.integers(0, 80), st.floats(0, 0.9), SEEDS)
def test_survivors_are_ranges_with_something_lost_between_them(count, loss, seed):
    kept = Hop(Shape(loss=loss), random.Random(seed)).survivors(count)
    if kept is None:
        return
    assert sum(map(len, kept)) < count
    assert all(kept)
    assert all(before.stop < after.start for before, after in pairwise(kept))
    assert all(0 <= each.start < each.stop <= count for each in kept)


@pytest.mark.parametrize("burst", [1, 45])
def test_the_share_that_is_lost_is_the_one_asked_for_however_packets_come(burst):
    hop = Hop(Shape(loss=0.01), random.Random(1))
    rounds = 90_000 // burst
    lost = sum(burst - sum(map(len, kept)) for _ in range(rounds) if (kept := hop.survivors(burst)) is not None)
    assert lost == pytest.approx(900, abs=4 * 30)


def test_without_loss_no_draw_is_made():
    hop = Hop(Shape(), random.Random(1))
    assert [hop.survivors(5) for _ in range(100)] == [None] * 100


def test_packets_that_come_in_a_train_are_sent_on_as_they_come():
    """A way of the same rate adds nothing to a burst that took its time; a slower one what it lacks."""
    equal = Hop(Shape(bytes_per_s=1000.0), random.Random(0))
    assert equal.carry(10.0, 500, span_s=0.5) == 10.0
    slower = Hop(Shape(bytes_per_s=500.0), random.Random(0))
    assert slower.carry(10.0, 500, span_s=0.5) == 10.5
    faster = Hop(Shape(bytes_per_s=2000.0), random.Random(0))
    assert faster.carry(10.0, 500, span_s=0.5) == 10.0


def test_a_spike_holds_packets_until_its_end_and_then_it_is_over():
    hop = Hop(Shape(spikes_per_s=1.0, spike_s=0.2), random.Random(3))
    delays = [hop.carry(index / 1000, 1) - index / 1000 for index in range(20_000)]
    held = [delay for delay in delays if delay > 0]
    assert max(held) == pytest.approx(0.2, abs=0.001)
    # 20 s with a spike every 1.2 s in the mean: each holds some 200 packets.
    assert len(held) / 200 == pytest.approx(20 / 1.2, abs=4 * 4)
    assert sum(delay == 0 for delay in delays) > 10_000


def test_a_spike_comes_on_top_of_the_queue():
    hop = Hop(Shape(spikes_per_s=1000.0, spike_s=0.2, queue_s=0.0), random.Random(3))
    hop.carry(0.0, 1)
    assert hop.carry(0.1, 1) != DROPPED


def test_a_new_shape_lets_nothing_overtake_what_is_under_way():
    hop = Hop(Shape(delay_s=1.0), random.Random(0))
    assert hop.carry(0.0, 100) == 1.0
    hop.reshape(Shape())
    assert hop.carry(0.1, 100) == 1.0
    assert hop.carry(2.0, 100) == 2.0


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"delay_s": -1.0}, "delay_s is -1.0"),
        ({"delay_s": math.nan}, "delay_s is nan"),
        ({"delay_s": math.inf}, "delay_s is inf"),
        ({"queue_s": -0.1}, "queue_s is -0.1"),
        ({"spikes_per_s": -1.0}, "spikes_per_s is -1.0"),
        ({"delay_s": 0.1, "jitter_s": 0.2}, "no packet can arrive before it was sent"),
        ({"loss": 1.0}, "cut the cable"),
        ({"loss": -0.1}, "loss is -0.1"),
        ({"loss": math.nan}, "loss is nan"),
        ({"bytes_per_s": 0.0}, "cut the cable"),
        ({"bytes_per_s": math.nan}, "bytes_per_s is nan"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(fields, what):
    with pytest.raises(UserError, match=what):
        Shape(**fields)


def round_trip(profile, first, second):
    """Least and most seconds of a round trip of nothing between two machines of a profile."""
    ways = [cable for index, cable in enumerate(profile.cables_for(max(first, second) + 1)) if index in {first, second}]
    middle, spread = 2 * sum(way.delay_s for way in ways), 2 * sum(way.jitter_s for way in ways)
    return middle - spread, middle + spread


def arriving(profile):
    """The share of packets that arrive between the first two machines."""
    first, second = profile.cables_for(2)
    return (1 - first.loss) * (1 - second.loss)


def test_profiles_are_what_they_say():
    assert round_trip(WIRED, 0, 1) == pytest.approx((0.2e-3, 0.2e-3))
    assert round_trip(WIFI, 0, 1) == pytest.approx((0.0, 6e-3))
    assert round_trip(MIXED, 0, 1) == pytest.approx((0.1e-3, 3.1e-3))
    assert round_trip(MIXED, 0, 2) == pytest.approx((0.2e-3, 0.2e-3))
    assert [arriving(profile) for profile in (WIRED, WIFI, MIXED)] == pytest.approx([1.0, 0.99, 0.995], abs=1e-4)
    assert [[8 * cable.bytes_per_s / 1e6 for cable in profile.cables] for profile in (WIRED, WIFI, MIXED)] == [[1000], [100], [1000, 100]]
    assert {name: profile.name for name, profile in PROFILES.items()} == {"wired": "wired", "wifi": "wifi", "mixed": "mixed"}


def test_a_profile_without_cables_is_refused():
    with pytest.raises(UserError, match="expected one at least"):
        Profile(name="none", cables=())
