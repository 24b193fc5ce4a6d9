"""What no plan of given groups can beat: the model poured into them like water, without regard to whole heads, columns and blocks.

A group is a row of vessels: while all its ranks have room, a byte takes one over the sum of their speeds; when the rank that is full first is full, the others go
on more slowly. Every real cut takes at least that, since its slowest rank does; so a search may leave out groups whose bound is not below what it has found.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from yoke.planner.field import Field, Group

ROUNDED_BYTES = 3
"""Each rank's parts of attention, feed-forward and output matrix are rounded down to bytes."""

_FIRST, _LAST, _BETWEEN = range(3)

Part = tuple[float, float]
"""Bytes of weights, and seconds for each of them."""


@dataclass(frozen=True, slots=True)
class Vessel:
    """What one group takes: ``start_s`` for what it holds at least (a block; the last stage also the output matrix), then ``parts``, the fastest first."""

    start_s: float
    parts: tuple[Part, ...]


class Bounds:
    """Vessels of all groups of a field, each computed once."""

    def __init__(self, field: Field) -> None:
        self._field = field
        slack = ROUNDED_BYTES * min(field.n_nodes, 64)
        self._slack = slack
        self._smallest = max(0, min(field.block_bytes) - slack)
        self._largest = max(1, *field.block_bytes)
        self._mean = sum(field.block_bytes) / len(field.block_bytes)
        self._astray = _astray(field.block_bytes, self._mean)
        self._total = max(0, sum(field.block_bytes) - slack)
        self._head = max(0, field.spec.head_bytes - slack)
        self._known: dict[tuple[Group, bool], Vessel | None] = {}
        self._whole: dict[tuple[Group, bool], tuple[float, ...]] = {}
        self._runs = [_least_runs(field.block_bytes, place, slack) for place in range(3)]
        self._rooms = [_rooms(field.block_bytes, place, field.spec.n_kv_heads * field.cell_bytes) for place in range(3)]

    @property
    def head_bytes(self) -> int:
        """The output matrix."""
        return self._head

    def left(self, n_stages: int) -> int:
        """Bytes that are to be poured when each stage has its first block."""
        return max(0, self._total - n_stages * self._smallest)

    def exchange_s_per_byte(self, group: Group) -> float:
        """Seconds that exchanges take for each byte of blocks."""
        return self._field.block_exchange_s(group) / self._largest

    def vessel(self, group: Group, is_last: bool) -> Vessel | None:
        """What the group takes; None if not even one block fits."""
        key = (group, is_last)
        if key not in self._known:
            self._known[key] = self._vessel(group, is_last)
        return self._known[key]

    def in_blocks(self, group: Group, is_last: bool) -> tuple[float, ...]:
        """Least seconds of the group for 1, 2, ... whole blocks in a row, as many as fit. The group of the engine's node has the model's first ones."""
        key = (group, is_last)
        if key not in self._whole:
            self._whole[key] = tuple(self._block_times(group, is_last))
        return self._whole[key]

    def _block_times(self, group: Group, is_last: bool) -> Iterable[float]:
        field, head = self._field, self._head if is_last else 0
        parts = list(_poured(field, group, math.inf))
        rooms = sum(field.rooms[node] for node in group) + self._slack
        per_block = field.spec.n_kv_heads * field.cell_bytes
        seconds, parts = _taken(parts, head)
        exchange_s = field.block_exchange_s(group)
        runs = self._runs[_place(group, is_last)]
        before = 0
        for n_blocks, run_bytes in enumerate(runs, 1):
            if run_bytes + head + n_blocks * per_block > rooms:
                return
            more_s, parts = _taken(parts, run_bytes - before)
            seconds, before = seconds + more_s, run_bytes
            yield seconds + n_blocks * exchange_s

    def _vessel(self, group: Group, is_last: bool) -> Vessel | None:
        field, head = self._field, self._head if is_last else 0
        if min(field.rooms[node] for node in group) < 0:  # not even an empty shard fits there
            return None
        needs, most_bytes = self._rooms[_place(group, is_last)]
        n_fitting = bisect_right(needs, sum(field.rooms[node] for node in group) + self._slack - head)
        if not n_fitting:
            return None
        parts = list(_poured(field, group, head + most_bytes[n_fitting - 1]))
        start_s, parts = _taken(parts, head)
        first_s, parts = _taken(parts, self._smallest)
        exchange, offset_s = self._exchange(group)
        start_s += first_s + exchange * self._smallest - offset_s
        return Vessel(start_s, tuple((n_bytes, s_per_byte + exchange) for n_bytes, s_per_byte in parts))

    def _exchange(self, group: Group) -> tuple[float, float]:
        """Seconds that exchanges take at least for each byte of blocks, less a constant: by the largest block, or by the mean one, whichever says more."""
        each_s = self._field.block_exchange_s(group)
        by_mean, offset_s = each_s / self._mean, each_s * self._astray / self._mean
        by_largest = each_s / self._largest
        some_bytes = self._total / 3
        return (by_mean, offset_s) if by_mean * some_bytes - offset_s > by_largest * some_bytes else (by_largest, 0.0)


def _astray(sizes: Sequence[int], mean: float) -> float:
    """How many bytes more or less than so many mean ones blocks in a row have, at most."""
    drift = [edge - index * mean for index, edge in enumerate([0, *accumulate(sizes)])]
    return max(drift) - min(drift)


def _place(group: Group, is_last: bool) -> int:
    """Where a group's blocks are."""
    return _LAST if is_last else _FIRST if group[0] == 0 else _BETWEEN


def _runs_of(sizes: Sequence[int], place: int, n_blocks: int) -> list[int]:
    """Bytes of so many blocks in a row, at the beginning, at the end, or anywhere."""
    edges = [0, *accumulate(sizes)]
    if place == _BETWEEN:
        return [stop - start for start, stop in zip(edges, edges[n_blocks:], strict=False)]
    return [edges[n_blocks] if place == _FIRST else edges[-1] - edges[-1 - n_blocks]]


def _least_runs(sizes: Sequence[int], place: int, slack: int) -> list[int]:
    """The fewest bytes of 1, 2, ... blocks in a row."""
    return [max(0, min(_runs_of(sizes, place, n_blocks)) - slack) for n_blocks in range(1, len(sizes) + 1)]


def _rooms(sizes: Sequence[int], place: int, cache_bytes: int) -> tuple[list[int], list[int]]:
    """What each run of blocks needs with its cache, in ascending order; and the most bytes of weights that a run which needs as much or less has."""
    needs = sorted((run + n * cache_bytes, run) for n in range(1, len(sizes) + 1) for run in set(_runs_of(sizes, place, n)))
    return [need for need, _ in needs], list(accumulate((run for _, run in needs), max))


def _poured(field: Field, group: Group, n_bytes: float) -> Iterable[Part]:
    """The group's ranks as they fill up, to ``n_bytes`` at most."""
    ranks = sorted((max(0, field.rooms[node]) * field.s_per_byte[node], 1 / field.s_per_byte[node]) for node in group)
    time = 0.0
    for index, (full_at, _) in enumerate(ranks):
        rate = sum(speed for _, speed in ranks[index:])
        amount = min(n_bytes, (full_at - time) * rate)
        if amount > 0:
            yield amount, 1 / rate
            n_bytes -= amount
        time = full_at


def _taken(parts: Sequence[Part], n_bytes: float) -> tuple[float, list[Part]]:
    """Seconds for the first ``n_bytes``, and what is left of the parts."""
    seconds, left = 0.0, list(parts)
    while left and n_bytes > 0:
        size, s_per_byte = left.pop(0)
        taken = min(size, n_bytes)
        seconds, n_bytes = seconds + taken * s_per_byte, n_bytes - taken
        if taken < size:
            left.insert(0, (size - taken, s_per_byte))
    return seconds, left


def summed_s(vessels: Sequence[Vessel], n_bytes: float) -> float:
    """Least sum of the stages' seconds when ``n_bytes`` are poured into them; infinite if they do not hold as much."""
    seconds = sum(vessel.start_s for vessel in vessels)
    parts = [part for vessel in vessels for part in vessel.parts]
    parts.sort(key=_slowness)
    for size, s_per_byte in parts:
        if size >= n_bytes:
            return seconds + n_bytes * s_per_byte
        seconds, n_bytes = seconds + size * s_per_byte, n_bytes - size
    return seconds if n_bytes <= 0 else math.inf


def slowest_s(vessels: Sequence[Vessel], n_bytes: float, first_s: float, last_s: float) -> float:
    """Least seconds of the slowest stage when ``n_bytes`` are poured into them; infinite if they do not hold as much.

    ``first_s`` and ``last_s`` are what the first and the last stage do besides.
    """
    starts = [vessel.start_s for vessel in vessels]
    starts[0] += first_s
    starts[-1] += last_s
    events: list[tuple[float, float]] = []  # when a part begins or ends, and how the bytes poured a second change then
    for time, vessel in zip(starts, vessels, strict=True):
        for size, s_per_byte in vessel.parts:
            events.append((time, 1 / s_per_byte))
            time += size * s_per_byte  # noqa: PLW2901 - the next part begins when this one ends
            events.append((time, -1 / s_per_byte))
    events.sort()
    left, now, rate = n_bytes, 0.0, 0.0
    for time, change in events:
        poured = rate * (time - now)
        if poured >= left:
            break
        left, now, rate = left - poured, time, rate + change
    else:
        return max(starts) if left <= 1e-9 * n_bytes else math.inf
    return max(*starts, now + left / rate if left > 0 else now)


def slowest_in_blocks_s(times: Sequence[Sequence[float]], besides: Sequence[float], n_blocks: int, at_least_s: float) -> float:
    """Least seconds of the slowest stage when ``n_blocks`` whole blocks are given to them, and no less than ``at_least_s``; infinite if they do not hold as many.

    ``times`` are of 1, 2, ... blocks of each stage, ``besides`` what each does as well.
    """
    if not all(times):
        return math.inf
    counts = [bisect_right(row, at_least_s - more) for row, more in zip(times, besides, strict=True)]
    slowest = at_least_s
    for _ in range(n_blocks - sum(counts)):
        following = [(row[count] + besides[index], index) for index, (row, count) in enumerate(zip(times, counts, strict=True)) if count < len(row)]
        if not following:
            return math.inf
        slowest, index = min(following)
        counts[index] += 1
    return max(slowest, *(row[0] + more for row, more in zip(times, besides, strict=True)))


def _slowness(part: Part) -> float:
    return part[1]
