"""From a grouping of nodes into stages to a whole plan: blocks by stage, heads, columns and vocabulary by rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from yoke.core.errors import PlacementError
from yoke.core.node import NodeId
from yoke.core.plan import Plan, Shard, Span, Stage
from yoke.core.spec import ModelSpec
from yoke.planner.shares import ROW_MULTIPLE, cut_columns, cut_evenly, cut_exactly, cut_heads


@dataclass(frozen=True, slots=True)
class Seat:
    """A node's place in a layout: its device, and the speed that its share is in proportion to."""

    node: NodeId
    device: str
    speed: float


Layout = tuple[tuple[Seat, ...], ...]
"""Stages of ranks."""


def build_plan(spec: ModelSpec, layout: Layout, version: int, allowed: Callable[[int, int, int], bool] | None = None) -> Plan:
    """The plan of a layout. ``allowed(stage, start, stop)`` may forbid blocks, for want of memory.

    Raises
    ------
    PlacementError
        if there are more stages than blocks, or no allowed cut.
    """
    if len(layout) > spec.n_blocks:
        raise PlacementError(f"{len(layout)} stages are wished, but {spec.name} has {spec.n_blocks} blocks; a stage holds at least one")
    speeds = [sum(seat.speed for seat in seats) for seats in layout]
    blocks = _cut_blocks(spec, speeds, allowed)
    last = len(layout) - 1
    stages = tuple(Stage(blocks=span, shards=_shards(spec, seats, index == last)) for index, (span, seats) in enumerate(zip(blocks, layout, strict=True)))
    return Plan(version=version, spec=spec, stages=stages)


def grid_plan(spec: ModelSpec, nodes: Sequence[NodeId], *, stages: int, ranks: int, shares: Sequence[float] | None = None, version: int = 1) -> Plan:
    """A plan of ``stages`` x ``ranks`` over ``nodes`` in order, all on their device ``CPU``, with the same relative ``shares`` of ranks in every stage.

    Raises
    ------
    PlacementError
        if there are too few nodes, or too many stages.
    """
    check_grid(len(nodes), stages, ranks, shares)
    weights = tuple(shares) if shares is not None else (1.0,) * ranks
    seats = [Seat(node, "CPU", weights[index % ranks]) for index, node in enumerate(nodes[: stages * ranks])]
    return build_plan(spec, tuple(tuple(seats[stage * ranks : (stage + 1) * ranks]) for stage in range(stages)), version)


def check_grid(n_nodes: int, stages: int, ranks: int, shares: Sequence[float] | None) -> None:
    """Refuse a grid that the nodes cannot fill.

    Raises
    ------
    PlacementError
        saying what is missing.
    """
    if n_nodes < stages * ranks:
        raise PlacementError(f"{stages} stages of {ranks} ranks take {stages * ranks} nodes; there are {n_nodes}")
    if shares is not None and len(shares) != ranks:
        raise PlacementError(f"{len(shares)} shares are given for {ranks} ranks; expected one each")


def _cut_blocks(spec: ModelSpec, speeds: Sequence[float], allowed: Callable[[int, int, int], bool] | None) -> list[Span]:
    """Blocks for each stage, in proportion to its speed: at least one each, and within memory."""
    stage = iter(range(len(speeds)))
    if allowed is None:
        return cut_exactly(range(spec.n_blocks + 1), [max(speed, 1e-12) for speed in speeds], lambda start, stop: stop > start)
    best: dict[int, tuple[float, list[Span]]] = {0: (0.0, [])}
    whole = sum(speeds)
    for speed in speeds:
        index, ideal = next(stage), spec.n_blocks * speed / whole
        reached: dict[int, tuple[float, list[Span]]] = {}
        for start, (distance, spans) in best.items():
            for stop in range(start + 1, spec.n_blocks + 1):
                if not allowed(index, start, stop):
                    continue
                cost = distance + (stop - start - ideal) ** 2
                if stop not in reached or cost < reached[stop][0]:
                    reached[stop] = (cost, [*spans, Span(start, stop)])
        best = reached
    if spec.n_blocks not in best:
        raise PlacementError(f"no cut of {spec.n_blocks} blocks into {len(speeds)} stages fits their memory")
    return best[spec.n_blocks][1]


def _shards(spec: ModelSpec, seats: Sequence[Seat], is_last: bool) -> tuple[Shard, ...]:
    speeds = [seat.speed for seat in seats]
    if sum(speeds) <= 0:
        raise PlacementError(f"the shares of a stage are {speeds}; expected at least one above 0")
    heads = cut_heads(spec, speeds)
    columns = cut_columns(spec.columns, spec.column_block, speeds)
    vocabulary = cut_evenly(spec.vocabulary, ROW_MULTIPLE, speeds) if is_last else [Span(0, 0)] * len(seats)
    experts = cut_evenly(spec.n_experts, 1, speeds)
    return tuple(
        Shard(node=seat.node, device=seat.device, heads=heads[i], columns=columns[i], vocabulary=vocabulary[i], experts=experts[i])
        for i, seat in enumerate(seats)
    )
