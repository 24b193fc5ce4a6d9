"""Uneven cuts: dividing a row of indivisible things among ranks, as near to their weights as the allowed cuts let. A rank of weight 0 gets nothing."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from yoke.core.errors import InvariantError, PlacementError
from yoke.core.plan import Span, is_head_share
from yoke.core.spec import ModelSpec

ROW_MULTIPLE = 32
"""Kernels take weights in groups of 8 rows (ggml's repacked layouts); whole quantisation blocks of 32 satisfy them all."""


def cut_heads(spec: ModelSpec, weights: Sequence[float]) -> list[Span]:
    """Query heads for each rank: the cut whose slowest rank is fastest, among those that the model allows; of equals, one near to proportion.

    An exact dynamic programme over (ranks placed, heads given away).

    Raises
    ------
    PlacementError
        if every weight is 0.
    """
    ideal = spec.n_heads / _sum_of(weights)
    last_resort = _time_of_whole_groups(spec, weights)
    for limit in (1.15 * ideal, 1.5 * ideal):  # looking only at ranks that are not much slower than the rest is quicker, and mostly enough
        if limit < last_resort and (edges := _fastest_heads(spec, weights, limit)) is not None:
            break
    else:
        edges = _fastest_heads(spec, weights, last_resort * (1 + 1e-9))
    if edges is None:
        raise InvariantError(f"no cut of {spec.n_heads} heads by {list(weights)}, though one between whole groups takes {last_resort}")
    return [Span(start, stop) for start, stop in pairwise(edges)]


def _fastest_heads(spec: ModelSpec, weights: Sequence[float], limit: float) -> list[int] | None:
    """Where to cut the heads so that the slowest rank is fastest; None if every cut has a rank that takes longer than ``limit``."""
    stops, each = _allowed_stops(spec), spec.n_heads / sum(weights)
    best: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}  # by heads given away: the slowest rank's time, and the distance from proportion
    origins: list[dict[int, int]] = []
    for weight in weights:
        reached: dict[int, tuple[float, float]] = {}
        origin: dict[int, int] = {}
        most, ideal = limit * weight, weight * each
        for start, (slowest, distance) in best.items():
            for stop in stops[start] if weight > 0 else (start,):
                n_heads = stop - start
                if n_heads > most:
                    break
                cost = (max(slowest, n_heads / weight) if n_heads else slowest, distance + (n_heads - ideal) * (n_heads - ideal))
                if stop not in reached or cost < reached[stop]:
                    reached[stop], origin[stop] = cost, start
        best = reached
        origins.append(origin)
    if spec.n_heads not in best:
        return None
    edges = [spec.n_heads]
    for origin in reversed(origins):
        edges.append(origin[edges[-1]])
    return edges[::-1]


def cut_columns(total: int, block: int, weights: Sequence[float], loads: Sequence[float] | None = None, most: Sequence[float] | None = None) -> list[Span]:
    """Feed-forward columns for each rank, in whole blocks, and in multiples of `ROW_MULTIPLE` where there are enough of them; otherwise as `cut_evenly`."""
    step = math.lcm(block, ROW_MULTIPLE)
    if total % step or total // step < len(weights):
        step = block
    return cut_evenly(total, step, weights, loads, most)


def cut_rows(total: int, weights: Sequence[float], loads: Sequence[float] | None = None, most: Sequence[float] | None = None) -> list[Span]:
    """Rows of a matrix for each rank, in multiples of `ROW_MULTIPLE` where there are enough of them; otherwise as `cut_evenly`."""
    return cut_evenly(total, ROW_MULTIPLE if total >= ROW_MULTIPLE * len(weights) else 1, weights, loads, most)


def cut_evenly(total: int, step: int, weights: Sequence[float], loads: Sequence[float] | None = None, most: Sequence[float] | None = None) -> list[Span]:
    """``total`` in units of ``step``, so that the slowest rank is as fast as can be; what is no whole unit goes to the last rank that works.

    ``loads`` is what each rank has to do already: whoever has more of that gets less of this. ``most`` is what each has room for; both are in the measure of
    ``total``. Every rank first gets the whole units that it would have in exact proportion, then each unit left goes to the rank that is done with it first: this
    is optimal.

    Raises
    ------
    PlacementError
        if every weight is 0, or there is room for less than ``total``.
    """
    _sum_of(weights)
    n_units = total // step
    before = [load / step for load in loads] if loads is not None else [0.0] * len(weights)
    room = [max(0, int(limit // step)) for limit in most] if most is not None else [n_units] * len(weights)
    working = [rank for rank, weight in enumerate(weights) if weight > 0]
    units = _in_proportion(n_units, weights, before, room)
    while sum(units) > n_units:  # rounding upwards in the division, by one unit at most
        units[max((rank for rank in working if units[rank]), key=lambda rank: (before[rank] + units[rank]) / weights[rank])] -= 1
    while sum(units) < n_units:
        open_ranks = [rank for rank in working if units[rank] < room[rank]]
        if not open_ranks:
            raise PlacementError(f"{total} are to be shared, but there is room for {list(most or [])}")
        units[min(open_ranks, key=lambda rank: ((before[rank] + units[rank] + 1) / weights[rank], rank))] += 1
    sizes = [n * step for n in units]
    sizes[working[-1]] += total % step
    spans, start = [], 0
    for size in sizes:
        spans.append(Span(start, start + size))
        start += size
    return spans


def _in_proportion(n_units: int, weights: Sequence[float], before: Sequence[float], room: Sequence[int]) -> list[int]:
    """Whole units for each rank, so that those who have room would be done at once; a rank without as much room gets what it has room for."""
    units, full = [0] * len(weights), [not weight for weight in weights]
    left = n_units
    while left and not all(full):
        time = _common_time(left, [0.0 if is_full else weight for weight, is_full in zip(weights, full, strict=True)], before)
        wanted = [0.0 if is_full else weight * time - load for weight, load, is_full in zip(weights, before, full, strict=True)]
        newly_full = [rank for rank, want in enumerate(wanted) if not full[rank] and want >= room[rank] + 1]
        if not newly_full:
            return [own if is_full else min(room[rank], max(0, int(wanted[rank]))) for rank, (own, is_full) in enumerate(zip(units, full, strict=True))]
        for rank in newly_full:
            units[rank], full[rank] = room[rank], True
            left -= room[rank]
    return units


def _common_time(n_units: float, weights: Sequence[float], before: Sequence[float]) -> float:
    """When all ranks would be done at once, if units could be divided and those who have more than that to do already got none."""
    time, work, weight_sum = 0.0, float(n_units), 0.0
    for busy_until, load, weight in sorted((load / weight, load, weight) for load, weight in zip(before, weights, strict=True) if weight > 0):
        if weight_sum and busy_until >= time:
            break
        work += load
        weight_sum += weight
        time = work / weight_sum
    return time


def _sum_of(weights: Sequence[float]) -> float:
    whole = sum(weights)
    if not 0 < whole < math.inf or min(weights) < 0:
        raise PlacementError(f"the shares of a stage are {list(weights)}; expected numbers of at least 0, and one above 0")
    return whole


def _time_of_whole_groups(spec: ModelSpec, weights: Sequence[float]) -> float:
    """The slowest rank's time when heads are cut between whole key/value groups, as near to proportion as that lets."""
    whole, slowest, before, start = sum(weights), 0.0, 0.0, 0
    cuts = _whole_cuts(spec)
    for weight in weights:
        before += weight
        stop = min(cuts, key=lambda cut: abs(cut - spec.n_heads * before / whole)) if before < whole else spec.n_heads
        slowest = max(slowest, (stop - start) / weight if stop > start and weight > 0 else 0.0)
        start = stop
    return slowest


@lru_cache(maxsize=16)
def _whole_cuts(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(head for head in range(0, spec.n_heads + 1, spec.group) if spec.is_head_cut(head))


@lru_cache(maxsize=16)
def _allowed_stops(spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
    """For each head where a share may start, the heads where it may stop."""
    cuts = [head for head in range(spec.n_heads + 1) if spec.is_head_cut(head)]
    stops: list[tuple[int, ...]] = [()] * (spec.n_heads + 1)
    for start in cuts:
        stops[start] = tuple(stop for stop in cuts if stop >= start and is_head_share(spec, start, stop))
    return tuple(stops)
