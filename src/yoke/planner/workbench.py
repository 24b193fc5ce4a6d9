"""What every search shares: the bound of stages that it considers, and the plans that are made of them. Knows the goal; does not know which stages to consider."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yoke.core.errors import PlacementError
from yoke.core.node import Node
from yoke.core.plan import Plan, Span, Stage
from yoke.core.spec import ModelSpec
from yoke.planner.bounds import Bounds, slowest_in_blocks_s, slowest_s, summed_s
from yoke.planner.cost import Machine, seconds_per_token, seconds_per_token_together
from yoke.planner.field import Field, Group
from yoke.planner.layout import cut_blocks
from yoke.planner.stages import StageTable
from yoke.planner.wish import Goal, Wish

Stages = tuple[Group, ...]
"""The groups of all stages, in order; that of the engine's node first."""

INFINITE = float("inf")

Combine = Callable[[float, float], float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that fits, and the predicted seconds that the goal is to make few of."""

    value_s: float
    plan: Plan


def value_s(plan: Plan, machine: Machine, wish: Wish) -> float:
    """What the goal makes least: seconds for a token of one stream, or of all streams together."""
    if wish.goal is Goal.LATENCY:
        return seconds_per_token(plan, machine)
    return seconds_per_token_together(plan, machine, wish.streams)


class Workbench:
    """Bounds and plans of stages, each computed once.

    Parameters
    ----------
    nodes : that of the engine first.
    """

    def __init__(self, spec: ModelSpec, nodes: Sequence[Node], machine: Machine, wish: Wish) -> None:
        self.spec, self.nodes, self.machine, self.wish = spec, tuple(nodes), machine, wish
        self._fields: dict[float, Field] = {}
        self._bounds: dict[float, Bounds] = {}
        self._tables: dict[tuple[float, Group, bool, bool], StageTable] = {}
        self.made: dict[Stages, tuple[Candidate, ...]] = {}

    def field(self, n_stages: int) -> Field:
        """The machines as they are for a plan of so many stages: with several streams, steps are the smaller the more stages share them."""
        rows = 1.0 if self.wish.goal is Goal.LATENCY else self.wish.streams / min(n_stages, self.wish.streams)
        if rows not in self._fields:
            self._fields[rows] = Field(self.spec, self.nodes, self.machine, self.wish, rows)
        return self._fields[rows]

    def bounds(self, n_stages: int) -> Bounds:
        """The bounds of `field`."""
        field = self.field(n_stages)
        if field.rows not in self._bounds:
            self._bounds[field.rows] = Bounds(field)
        return self._bounds[field.rows]

    def poured_s(self, stages: Sequence[Group], path_s: float) -> float:
        """No plan of these stages, of which the last holds the output matrix, has a lower value if its ways take at least ``path_s``."""
        n_stages, bounds, costs = len(stages), self.bounds(len(stages)), self.machine.costs
        vessels = []
        for index, group in enumerate(stages):
            vessel = bounds.vessel(group, index == n_stages - 1)
            if vessel is None:
                return INFINITE
            vessels.append(vessel)
        left = bounds.left(n_stages)
        one_s = path_s + summed_s(vessels, left)
        if self.wish.goal is Goal.LATENCY:
            return one_s
        rows, n_batches = self.field(n_stages).rows, min(n_stages, self.wish.streams)
        slowest = slowest_s(vessels, left, costs.engine_s, costs.draw_s * rows)
        if slowest < INFINITE:
            times = [bounds.in_blocks(group, index == n_stages - 1) for index, group in enumerate(stages)]
            besides = [0.0] * n_stages
            besides[0] += costs.engine_s
            besides[-1] += costs.draw_s * rows
            slowest = slowest_in_blocks_s(times, besides, self.spec.n_blocks, slowest)
        return max(one_s, n_batches * slowest) / self.wish.streams

    def bound_s(self, stages: Stages) -> float:
        """No plan of these stages in this order has a lower value."""
        return self.poured_s(stages, self.field(len(stages)).path_s(stages))

    def make(self, stages: Stages) -> tuple[Candidate, ...]:
        """The plans of these stages that are fastest by the goal, the best first; none if they do not fit."""
        if stages not in self.made:
            combines = (operator.add, max) if self.wish.goal is Goal.THROUGHPUT and len(stages) > 1 else (operator.add,)
            try:
                tables, most = self._tables_of(stages)
                divisions = dict.fromkeys(tuple(divided(tables, self.spec.n_blocks, combine, most)) for combine in combines)
                plans = (self.candidate(tables, blocks) for blocks in divisions)
                self.made[stages] = tuple(sorted(plans, key=lambda plan: plan.value_s))
            except PlacementError:
                self.made[stages] = ()
        return self.made[stages]

    def make_even(self, stages: Stages) -> Candidate:
        """The plan of these stages with work as equal for each as can be: it keeps several streams in flight.

        Raises
        ------
        PlacementError
            if they do not fit.
        """
        tables, most = self._tables_of(stages)
        return self.candidate(tables, divided_evenly(tables, self.spec.n_blocks, most))

    def candidate(self, tables: Sequence[StageTable], blocks: Sequence[Span]) -> Candidate:
        """The plan of stages and their blocks."""
        stages = tuple(Stage(blocks=span, shards=table.shards(span.start, span.stop)) for table, span in zip(tables, blocks, strict=True))
        plan = Plan(version=self.wish.version, spec=self.spec, stages=stages)
        return Candidate(value_s(plan, self.machine, self.wish), plan)

    def table(self, field: Field, seats: Group, *, is_first: bool, is_last: bool) -> StageTable:
        """One stage's seconds and shards for any blocks."""
        key = (field.rows, seats, is_first, is_last)
        if key not in self._tables:
            self._tables[key] = StageTable(field, seats, is_first=is_first, is_last=is_last)
        return self._tables[key]

    def _tables_of(self, stages: Stages) -> tuple[list[StageTable], list[int]]:
        """The stages' tables, and how many blocks each holds at most."""
        n_stages = len(stages)
        if n_stages > self.spec.n_blocks:
            raise PlacementError(f"{n_stages} stages are wished, but {self.spec.name} has {self.spec.n_blocks} blocks; a stage holds at least one")
        field, bounds = self.field(n_stages), self.bounds(n_stages)
        places = enumerate(field.seats(stages))
        tables = [self.table(field, seats, is_first=index == 0, is_last=index == n_stages - 1) for index, seats in places]
        return tables, [len(bounds.in_blocks(group, index == n_stages - 1)) for index, group in enumerate(stages)]


def divided(tables: Sequence[StageTable], n_blocks: int, combine: Combine, most: Sequence[int] | None = None) -> list[Span]:
    """The blocks of each stage, so that their seconds combined are least.

    Raises
    ------
    PlacementError
        if no division fits.
    """
    return cut_blocks(n_blocks, len(tables), lambda stage, start, stop: tables[stage].seconds(start, stop), combine, most)


def divided_evenly(tables: Sequence[StageTable], n_blocks: int, most: Sequence[int] | None = None) -> list[Span]:
    """The blocks of each stage, so that the slowest takes least, and the others are as near to it as can be.

    Raises
    ------
    PlacementError
        if no division fits.
    """
    blocks = divided(tables, n_blocks, max, most)
    slowest = max(table.seconds(span.start, span.stop) for table, span in zip(tables, blocks, strict=True))

    def short_of_it(stage: int, start: int, stop: int) -> float:
        seconds = tables[stage].seconds(start, stop)
        return (slowest - seconds) ** 2 if seconds <= slowest else INFINITE

    return cut_blocks(n_blocks, len(tables), short_of_it, most=most)
