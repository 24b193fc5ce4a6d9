"""From a grouping of nodes into stages to a whole plan: blocks by stage, heads, columns and vocabulary by rank. Knows weights, not what they stand for."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from yoke.core.errors import PlacementError
from yoke.core.node import NodeId
from yoke.core.plan import Plan, Shard, Span, Stage
from yoke.core.spec import ModelSpec
from yoke.planner.shares import cut_columns, cut_evenly, cut_heads, cut_rows
from yoke.planner.wish import check_shares


@dataclass(frozen=True, slots=True)
class Seat:
    """A node's place in a layout: its device, and the weight that its share is in proportion to, within its stage and across stages."""

    node: NodeId
    device: str
    weight: float


Layout = tuple[tuple[Seat, ...], ...]
"""Stages of ranks."""

BlockCost = Callable[[int, int, int], float]
"""What it costs that stage (first argument) holds blocks from (second) to before (third); infinite where it cannot."""


def grid_plan(
    spec: ModelSpec,
    nodes: Sequence[NodeId],
    *,
    stages: int,
    ranks: int,
    shares: Sequence[float] | None = None,
    devices: Sequence[str] | None = None,
    version: int = 1,
) -> Plan:
    """A plan of ``stages`` x ``ranks`` over ``nodes`` in order, with the same relative ``shares`` of ranks in every stage, and no regard to speed or memory.

    ``devices`` are the nodes' own; without them, each uses its ``CPU``.

    Raises
    ------
    PlacementError
        if there are too few nodes, or more stages than blocks, or shares are not one a rank and one of them above 0.
    """
    check_grid(len(nodes), stages, ranks, shares)
    names = devices if devices is not None else ["CPU"] * len(nodes)
    weights = tuple(shares) if shares is not None else (1.0,) * ranks
    seats = [Seat(nodes[index], names[index], weights[index % ranks]) for index in range(stages * ranks)]
    layout = tuple(tuple(seats[stage * ranks : (stage + 1) * ranks]) for stage in range(stages))
    ideal = spec.n_blocks / stages
    return build_plan(spec, layout, cut_ranks(spec, layout), version, lambda _, start, stop: (stop - start - ideal) ** 2)


def check_grid(n_nodes: int, stages: int, ranks: int, shares: Sequence[float] | None) -> None:
    """Refuse a grid that the nodes cannot fill.

    Raises
    ------
    PlacementError
        saying what is missing.
    """
    if stages < 1 or ranks < 1:
        raise PlacementError(f"{stages} stages of {ranks} ranks; expected at least one of each")
    if n_nodes < stages * ranks:
        raise PlacementError(f"{stages} stages of {ranks} ranks take {stages * ranks} nodes; there are {n_nodes}")
    if shares is not None:
        check_shares(tuple(shares), ranks)


def cut_ranks(spec: ModelSpec, layout: Layout) -> list[tuple[Shard, ...]]:
    """What each rank of each stage holds of every block of that stage; the output matrix is the last stage's.

    Raises
    ------
    PlacementError
        if all weights of a stage are 0.
    """
    return [cut_stage(spec, seats, is_last=index == len(layout) - 1) for index, seats in enumerate(layout)]


def cut_stage(spec: ModelSpec, seats: Sequence[Seat], *, is_last: bool) -> tuple[Shard, ...]:
    """What each rank of one stage holds of every block: heads, columns and the rest each in proportion to the seats' weights.

    Raises
    ------
    PlacementError
        if all weights are 0.
    """
    weights = [seat.weight for seat in seats]
    columns = cut_columns(spec.columns, spec.column_block, weights)
    vocabulary = cut_rows(spec.vocabulary, weights) if is_last else [Span(0, 0)] * len(seats)
    return shards_of(spec, seats, cut_heads(spec, weights), columns, vocabulary)


def shards_of(spec: ModelSpec, seats: Sequence[Seat], heads: Sequence[Span], columns: Sequence[Span], vocabulary: Sequence[Span]) -> tuple[Shard, ...]:
    """The shards of cuts; experts are in proportion to the seats' weights."""
    experts = cut_evenly(spec.n_experts, 1, [seat.weight for seat in seats])
    return tuple(
        Shard(node=seat.node, device=seat.device, heads=heads[i], columns=columns[i], vocabulary=vocabulary[i], experts=experts[i])
        for i, seat in enumerate(seats)
    )


def build_plan(spec: ModelSpec, layout: Layout, shards: Sequence[tuple[Shard, ...]], version: int, cost: BlockCost) -> Plan:
    """The plan of a layout whose ranks were cut, with the blocks divided so that the sum of ``cost`` is least.

    Raises
    ------
    PlacementError
        if there are more stages than blocks, or every division costs infinitely much.
    """
    if len(layout) > spec.n_blocks:
        raise PlacementError(f"{len(layout)} stages are wished, but {spec.name} has {spec.n_blocks} blocks; a stage holds at least one")
    blocks = cut_blocks(spec.n_blocks, len(layout), cost)
    return Plan(version=version, spec=spec, stages=tuple(Stage(blocks=span, shards=held) for span, held in zip(blocks, shards, strict=True)))


def cut_blocks(
    n_blocks: int, n_stages: int, cost: BlockCost, combine: Callable[[float, float], float] = operator.add, most: Sequence[int] | None = None
) -> list[Span]:
    """At least one block for each stage, in order, so that the sum of ``cost`` is least: an exact dynamic programme over (stages placed, blocks given away).

    ``combine`` may be ``max`` instead of the sum: then the costliest stage costs least. ``most`` is how many blocks each stage can hold, where that is known.

    Raises
    ------
    PlacementError
        if every division costs infinitely much.
    """
    limits = most if most is not None else (n_blocks,) * n_stages
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(n_stages):
        still = n_stages - stage - 1  # each stage after this one needs a block
        after = sum(limits[stage + 1 :])  # and they hold no more than this
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (total, edges) in best.items():
            for stop in range(max(start + 1, n_blocks - after), min(start + limits[stage], n_blocks - still) + 1):
                whole = combine(total, cost(stage, start, stop))
                if whole < math.inf and (stop not in reached or whole < reached[stop][0]):
                    reached[stop] = (whole, (*edges, stop))
        best = reached
    if n_blocks not in best:
        raise PlacementError(f"no division of {n_blocks} blocks into {n_stages} stages fits their memory")
    edges = best[n_blocks][1]
    return [Span(start, stop) for start, stop in pairwise(edges)]
