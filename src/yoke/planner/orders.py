"""In which order the stages of given groups come: the one whose ways take least; if blocks differ in size, together with their division."""

from collections.abc import Sequence

from yoke.planner.field import Group
from yoke.planner.workbench import Stages, Workbench

Found = tuple[float, tuple[int, ...]]
"""Seconds so far, and the groups so far, by number."""


def shortest_order(bench: Workbench, groups: Sequence[Group], last: int) -> Stages:
    """The groups in the order of least path; the first of them stays first, and number ``last`` comes last."""
    middle = [index for index in range(1, len(groups)) if index != last]
    numbers = _shortest(bench, groups, middle, last) if len(middle) > 1 else (0, *middle, *([last] if last else []))
    return tuple(groups[number] for number in numbers)


def best_order(bench: Workbench, groups: Sequence[Group], last: int) -> Stages:
    """The same, where blocks differ in size by path and division together; equal blocks go with any order as well."""
    middle = [index for index in range(1, len(groups)) if index != last]
    if len(middle) < 2 or bench.field(len(groups)).is_uniform:
        return shortest_order(bench, groups, last)
    return tuple(groups[number] for number in _quickest(bench, groups, middle, last))


def _shortest(bench: Workbench, groups: Sequence[Group], middle: Sequence[int], last: int) -> tuple[int, ...]:
    """An exact dynamic programme over (groups placed, the last of them)."""
    field = bench.field(len(groups))
    best: dict[tuple[int, int], Found] = {(0, 0): (0.0, (0,))}
    for _ in middle:
        reached: dict[tuple[int, int], Found] = {}
        for (placed, current), (seconds, order) in best.items():
            for number in middle:
                if placed >> number & 1:
                    continue
                found = (seconds + field.crossing(groups[current], groups[number])[0], (*order, number))
                key = (placed | 1 << number, number)
                if key not in reached or found < reached[key]:
                    reached[key] = found
        best = reached
    return (*min((seconds + field.crossing(groups[current], groups[last])[0], order) for (_, current), (seconds, order) in best.items())[1], last)


def _quickest(bench: Workbench, groups: Sequence[Group], middle: Sequence[int], last: int) -> tuple[int, ...]:
    """The order with the least sum of path and stages: the same programme with the blocks given away as a further dimension."""
    field, n_blocks = bench.field(len(groups)), bench.spec.n_blocks
    most = [len(bench.bounds(len(groups)).in_blocks(group, number == last)) for number, group in enumerate(groups)]
    best: dict[tuple[int, int], dict[int, Found]] = {(0, 0): {0: (0.0, (0,))}}
    for n_placed in range(1, len(groups)):
        n_after = len(groups) - n_placed - 1
        reached: dict[tuple[int, int], dict[int, Found]] = {}
        for (placed, current), starts in best.items():
            followers = [number for number in middle if not placed >> number & 1] or [last]
            for number in followers:
                way_s, leader = field.crossing(groups[current], groups[number])
                seats = (leader, *(node for node in groups[current] if node != leader))
                table = bench.table(field, seats, is_first=current == 0, is_last=False)
                stops = reached.setdefault((placed | 1 << number, number), {})
                held_after = sum(most[other] for other in (*middle, last) if other != current and not placed >> other & 1)
                for start, (seconds, order) in starts.items():
                    for stop in range(max(start + 1, n_blocks - held_after), min(start + most[current], n_blocks - n_after - 1) + 1):
                        total = seconds + way_s + table.seconds(start, stop)
                        if total < _least_s(stops, stop):
                            stops[stop] = (total, (*order, number))
        best = reached
    seats = bench.field(len(groups)).seats((groups[0], groups[last]))[1]
    table = bench.table(field, seats, is_first=False, is_last=True)
    ends = [(seconds + table.seconds(start, n_blocks), order) for starts in best.values() for start, (seconds, order) in starts.items()]
    return min(ends)[1] if ends else (0, *middle, last)


def _least_s(stops: dict[int, Found], stop: int) -> float:
    """The least seconds found so far for a division that gives away ``stop`` blocks."""
    found = stops.get(stop)
    return found[0] if found is not None else float("inf")
