"""Groupings of many nodes: rows of them cut in stages, stages grown node by node, and both improved step by step. Good, not proven best.

Everything is judged by its bound, which takes microseconds; plans are made of the best few. The search is given a number of bounds, not a time: the same machines
give the same plan.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain

from yoke.planner.cost import needed_bytes
from yoke.planner.field import Field, Group
from yoke.planner.wish import Goal
from yoke.planner.workbench import INFINITE, Stages, Workbench

GROUP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Ranks of a stage that are tried where rows are cut: each rank more has less to gain and more to exchange."""

POOL = 32
"""Of each ranking, the first so many nodes are considered at least, and at most so many for the company of one."""

ALL_CUTS = 5
"""Rows of so many nodes are cut in every way."""

STARTS = 4
"""The best so many groupings are improved."""

EFFORT = 40_000
"""Nodes in all groupings that are tried to improve them: about half a second's worth; four times as many for clusters beyond `LARGE` nodes."""

LARGE = 64

TOLERANCE = 1e-6
"""What is better by less is no improvement."""

PLANS = 6
"""Plans that are made."""

MORE_SEATS = 200
"""Nodes in all plans that are made besides, of small changes to the best one."""

FEW = 16
"""In plans of so many nodes, each two of them are tried in each other's place."""

NEWCOMERS = 12
"""Nodes outside a plan that are tried in it."""


def search(bench: Workbench) -> None:
    """Make the most promising plans."""
    field = bench.field(1)
    pool = _pool(bench, field)
    judged = {stages: bench.bound_s(stages) for stages in dict.fromkeys(suggestions(bench, pool))}
    starts = sorted((stages for stages, bound_s in judged.items() if bound_s < INFINITE), key=lambda stages: judged[stages])
    if bench.wish.goal is Goal.THROUGHPUT:
        # What a step costs depends on how many stages share the streams: small changes hardly lead from one number of stages to another.
        starts = list({len(stages): stages for stages in reversed(starts)}.values())
        starts.sort(key=lambda stages: judged[stages])
    effort = _effort(bench)
    for stages in starts[: STARTS if bench.wish.goal is Goal.LATENCY else 2 * STARTS]:
        climb = _Climb(bench, stages, judged[stages], pool, effort)
        effort = climb.run()
        judged.update(climb.found)
    made = 0
    for stages in sorted(judged, key=lambda stages: judged[stages]):
        if judged[stages] == INFINITE or made == PLANS:
            break
        made += bool(bench.make(stages))
    if made:
        _polish(bench, pool)


def suggestions(bench: Workbench, pool: Sequence[int]) -> Iterator[Stages]:
    """Stages worth a bound."""
    field, n_nodes = bench.field(1), len(bench.nodes)
    rankings = _rankings(field, pool if not bench.wish.use_all else range(1, n_nodes))
    most_ranks = [size for size in GROUP_SIZES if size <= n_nodes]
    most_ranks += [-(-n_nodes // bench.spec.n_blocks), n_nodes] if bench.wish.use_all else []
    for ranking in rankings:
        for size in [n_nodes] if bench.wish.use_all else _sizes(len(ranking) + 1):
            row = (0, *ranking[: size - 1])
            for parts in _compositions(size) if size <= ALL_CUTS else (_equal_parts(size, ranks) for ranks in most_ranks):
                if len(parts) <= bench.spec.n_blocks:
                    yield _cut(row, parts)
    if not bench.wish.use_all:
        for ranking in rankings:
            for ranks in most_ranks:
                yield from _grown(bench, field, ranking, ranks)


def _pool(bench: Workbench, field: Field) -> list[int]:
    """The nodes that are considered at all: of each ranking the first ones, and as many as could hold the model by themselves."""
    others = [node for node in range(1, field.n_nodes) if field.rooms[node] >= 0]
    if len(others) <= POOL:
        return others
    needed = 1.25 * needed_bytes(bench.spec, bench.wish)  # whole blocks do not fill a node
    chosen: set[int] = set()
    for ranking in _rankings(field, others):
        held = accumulate(field.rooms[node] for node in ranking)
        n_holders = next((count for count, n_bytes in enumerate(held, 1) if n_bytes >= needed), len(ranking))
        chosen.update(ranking[: max(POOL, n_holders)])
    return sorted(chosen)


def _rankings(field: Field, nodes: Sequence[int]) -> list[list[int]]:
    """The nodes by speed, by memory, by nearness to the coordinator, and by what a byte costs on them as a stage of their own, the way to it shared by all bytes."""
    model_bytes, crossing_s = max(1, sum(field.block_bytes)), field.machine.costs.boundary_s

    def way_s(node: int) -> float:
        return field.way(0, node)[0] + field.hidden * field.way(0, node)[1]

    def price(node: int) -> float:
        return field.s_per_byte[node] + (way_s(node) + crossing_s) / max(1, min(field.rooms[node], model_bytes))

    return [
        sorted(nodes, key=lambda node: (field.s_per_byte[node], node)),
        sorted(nodes, key=lambda node: (-field.rooms[node], node)),
        sorted(nodes, key=lambda node: (way_s(node), field.s_per_byte[node], node)),
        sorted(nodes, key=lambda node: (price(node), node)),
    ]


def _sizes(n_nodes: int) -> list[int]:
    sizes, size = [], 1
    while size < n_nodes:
        sizes.append(size)
        size = max(size + 1, size * 5 // 4)
    return [*sizes, n_nodes]


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as an ordered sum."""
    if total == 0:
        yield ()
    for head in range(total, 0, -1):
        for rest in _compositions(total - head):
            yield (head, *rest)


def _equal_parts(total: int, ranks: int) -> tuple[int, ...]:
    return (*[ranks] * (total // ranks), *([total % ranks] if total % ranks else []))


def _cut(row: Sequence[int], parts: Sequence[int]) -> Stages:
    stages, start = [], 0
    for part in parts:
        stages.append(tuple(sorted(row[start : start + part])))
        start += part
    return tuple(stages)


def _grown(bench: Workbench, field: Field, ranking: Sequence[int], most_ranks: int) -> Iterator[Stages]:
    """Stages of up to ``most_ranks`` nodes, each grown around the best node left, until they hold the model; with the coordinator in company and alone."""
    needed = 1.02 * needed_bytes(bench.spec, bench.wish)
    for first_ranks in sorted({1, most_ranks}):
        stages: list[Group] = []
        free, held = list(ranking), 0.0
        while held < needed and len(stages) < bench.spec.n_blocks:
            seed = free.pop(0) if stages else 0
            group = _company(field, seed, free, first_ranks if seed == 0 else most_ranks)
            free = [node for node in free if node not in group]
            stages.append(tuple(sorted(group)))
            held += sum(max(0, field.rooms[node]) for node in group)
            if not free:
                break
        yield tuple(stages)
        if len(stages) < bench.spec.n_blocks and free and len(stages) == 1:  # a second stage may be so much faster that the first had better hold little
            yield (stages[0], tuple(sorted(_company(field, free[0], free[1:], most_ranks))))


def _company(field: Field, seed: int, free: Sequence[int], most_ranks: int) -> list[int]:
    """``seed`` and those that make a byte of blocks take least with it, as long as each one helps."""
    group, speed = [seed], 1 / field.s_per_byte[seed]
    empty_s = per_byte_s = 0.0
    slope = field.s_per_byte[seed]
    block_bytes = max(1.0, sum(field.block_bytes) / len(field.block_bytes))
    left = list(free[:POOL])
    while left and len(group) < most_ranks:
        trials = []
        for node in left:
            ways = [way for mate in group for way in (field.way(node, mate), field.way(mate, node))]
            slowest = max(empty_s, *(way[0] for way in ways)), max(per_byte_s, *(way[1] for way in ways))
            exchange_s = 2 * (slowest[0] + slowest[1] * field.hidden * len(group))
            trials.append((1 / (speed + 1 / field.s_per_byte[node]) + exchange_s / block_bytes, node, slowest))
        best = min(trials)
        if best[0] >= slope:
            break
        slope, node, (empty_s, per_byte_s) = best
        speed += 1 / field.s_per_byte[node]
        group.append(node)
        left.remove(node)
    return group


def make_around(bench: Workbench, stages: Stages) -> None:
    """Make the plans of these stages, and of the most promising ones with one node more."""
    bench.make(stages)
    used = set(chain.from_iterable(stages))
    newcomers = [node for node in _pool(bench, bench.field(1)) if node not in used][: 2 * NEWCOMERS]
    changed = {more: bench.bound_s(more) for node in newcomers for more in placed(stages, node) if len(more) <= bench.spec.n_blocks}
    for more in sorted((more for more in changed if changed[more] < INFINITE), key=lambda more: changed[more])[:PLANS]:
        bench.make(more)


def _polish(bench: Workbench, pool: Sequence[int]) -> None:
    """Make plans of what differs from the best one by one change and has a bound below it, as long as that helps."""
    left, effort = MORE_SEATS, _effort(bench)
    while left > 0 and effort > 0:
        stages, best_s = min(((stages, plans[0].value_s) for stages, plans in bench.made.items() if plans), key=lambda found: found[1])
        hopeful: list[tuple[float, Stages]] = []
        for changed in _Climb(bench, stages, best_s, pool, 0).changes():
            effort -= sum(map(len, changed))
            if changed not in bench.made and (bound_s := bench.bound_s(changed)) < best_s * (1 - TOLERANCE):
                hopeful.append((bound_s, changed))
            if effort <= 0:
                break
        is_better = False
        for _, changed in sorted(hopeful):
            if left <= 0:
                break
            left -= sum(map(len, changed))
            is_better = any(plan.value_s < best_s * (1 - TOLERANCE) for plan in bench.make(changed))
            if is_better:
                break
        if not is_better:
            return


def _effort(bench: Workbench) -> int:
    return EFFORT if len(bench.nodes) <= LARGE else 4 * EFFORT


class _Climb:
    """Stages that are changed step by step, always for the better. ``found`` is what they have been, each with its bound."""

    def __init__(self, bench: Workbench, stages: Stages, bound_s: float, pool: Sequence[int], effort: int) -> None:
        self._bench, self._pool, self._effort = bench, pool, effort
        self._stages, self._bound_s = stages, bound_s
        self.found = {stages: bound_s}

    def run(self) -> int:
        """Go on until nothing helps any more, or the effort is spent; what is left of it."""
        before = math.inf
        while self._bound_s < before * (1 - TOLERANCE) and self._effort > 0:
            before = self._bound_s
            for index in range(1, len(self._stages)):
                if index < len(self._stages):  # there may be fewer by now
                    self._take(_around(self._stages, index, may_drop=not self._bench.wish.use_all))
            for node in sorted(chain.from_iterable(self._stages))[1:]:
                self._take(self._elsewhere(node))
            if not self._bench.wish.use_all:
                for node in self._newcomers():
                    self._take(self._with(node))
        return self._effort

    def changes(self) -> Iterator[Stages]:
        """Everything that differs by one change."""
        for index in range(1, len(self._stages)):
            yield from _around(self._stages, index, may_drop=not self._bench.wish.use_all)
        for node in sorted(chain.from_iterable(self._stages))[1:]:
            yield from self._elsewhere(node)
        if not self._bench.wish.use_all:
            for node in self._newcomers():
                yield from self._with(node)

    def _take(self, changes: Iterable[Stages]) -> None:
        """Take the best of these changes, if it is for the better."""
        for stages in changes:
            if self._effort <= 0:
                return
            if len(stages) > self._bench.spec.n_blocks or stages in self.found:
                continue
            self._effort -= sum(map(len, stages))
            bound_s = self._bench.bound_s(stages)
            if bound_s < self._bound_s * (1 - TOLERANCE):
                self._stages, self._bound_s = stages, bound_s
                self.found[stages] = bound_s

    def _elsewhere(self, node: int) -> Iterator[Stages]:
        """One node in every other place, and in none; where there are few nodes, also in exchange for each later one."""
        now = self._stages  # they may change while these are tried
        here = next(index for index, group in enumerate(now) if node in group)
        rest = tuple(mate for mate in now[here] if mate != node)
        stages = (*now[:here], *((rest,) if rest else ()), *now[here + 1 :])
        if not self._bench.wish.use_all:
            yield stages
        yield from placed(stages, node)
        everyone = list(chain.from_iterable(now))
        for other in everyone if len(everyone) <= FEW else ():
            if other > node and other not in now[here]:
                changed = {node: other, other: node}
                yield tuple(tuple(sorted(changed.get(mate, mate) for mate in group)) for group in now)

    def _newcomers(self) -> list[int]:
        """The first nodes of each ranking that have no place."""
        used = set(chain.from_iterable(self._stages))
        free = [node for node in self._pool if node not in used]
        field = self._bench.field(len(self._stages))
        return list(dict.fromkeys(chain.from_iterable(ranking[: NEWCOMERS // 4] for ranking in _rankings(field, free))))

    def _with(self, newcomer: int) -> Iterator[Stages]:
        """A further node in every place, and instead of every other node."""
        stages = self._stages
        yield from placed(stages, newcomer)
        for index, group in enumerate(stages):
            for node in group:
                if node:
                    others = tuple(mate for mate in group if mate != node)
                    yield (*stages[:index], _joined(others, (newcomer,)), *stages[index + 1 :])


def placed(stages: Stages, node: int) -> Iterator[Stages]:
    """One ``node`` added to each stage, and as a stage of its own after each."""
    for index, group in enumerate(stages):
        yield (*stages[:index], _joined(group, (node,)), *stages[index + 1 :])
        yield (*stages[: index + 1], (node,), *stages[index + 1 :])


def _around(stages: Stages, index: int, *, may_drop: bool) -> Iterator[Stages]:
    """One stage later, joined to the one before, and left out."""
    if index + 1 < len(stages):
        yield (*stages[:index], stages[index + 1], stages[index], *stages[index + 2 :])
    yield (*stages[: index - 1], _joined(stages[index - 1], stages[index]), *stages[index + 1 :])
    if may_drop:
        yield (*stages[:index], *stages[index + 1 :])


def _joined(group: Group, more: Group) -> Group:
    return tuple(sorted((*group, *more)))
