"""Choosing a plan: of the groupings of `planner.groupings`, the one with the least predicted time for a token that fits into memory.

The first node is the coordinator: the engine runs there, so it is always stage 0, rank 0. Within a stage, shares are in proportion to speed, or as near to that as
memory allows. Across stages, blocks are in proportion to speed too, unless another division is faster by `BALANCE_MARGIN`.
"""

from collections.abc import Iterator, Sequence

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner import explain
from yoke.planner.cost import HIDDEN_BYTES, Machine, Outlook, Wish, missing_bytes, needed_bytes, seconds_per_token, streamed_bytes, ways_s
from yoke.planner.forecast import Forecast
from yoke.planner.groupings import Grouping, forced_grouping, groupings
from yoke.planner.layout import Layout, Seat, build_plan, cut_ranks

BALANCE_MARGIN = 0.05
"""One stream is fastest when the fastest stage holds all that it can, several are when stages take equal time. Measured speeds of one machine differ by as much as
this from run to run, so less is no reason to leave the balance."""

FILL_LEVELS = (1.0, 0.95, 0.85)
"""How much of a node's memory proportional shares may fill: whole heads and blocks take more than their proportion, and then need the rest."""


def make_plan(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> Outlook:
    """The plan with the least predicted time per token that fits into memory. The first of ``nodes`` is the coordinator.

    Since the coordinator alone is among the plans tried, the choice is never slower than it by its own prediction, unless ``wish`` forces a layout or all nodes.

    Raises
    ------
    PlacementError
        if nothing fits, saying how many bytes are missing; or if the wished layout needs more nodes.
    """
    if not nodes or len({node.id for node in nodes}) != len(nodes):
        raise PlacementError(f"a plan is for {len(nodes)} nodes, {len({node.id for node in nodes})} of them different; expected at least one, each once")
    machine = Machine.of(nodes, links)
    tried = [forced_grouping(nodes, wish)] if wish.is_forced else groupings(nodes, machine, wish.use_all)
    best: tuple[float, Plan] | None = None
    at_least: dict[NodeId, float] = {}  # for each node, the least time of the plans that it is in
    for grouping in tried:
        if not _has_room(spec, grouping, machine, wish):
            continue
        seconds = _lower_bound_s(spec, grouping, machine)
        if best is None or seconds < best[0]:
            plan = _fitting_plan(spec, grouping, machine, wish)
            if plan is None:
                continue
            seconds = seconds_per_token(plan, machine)
            if best is None or seconds < best[0]:
                best = (seconds, plan)
        for node in (node for stage in grouping for node in stage):
            at_least[node.id] = min(seconds, at_least.get(node.id, seconds))
    if best is None:
        raise _nothing_fits(spec, nodes, machine, wish)
    return explain.outlook(best[1], best[0], machine, wish, at_least)


def _has_room(spec: ModelSpec, grouping: Grouping, machine: Machine, wish: Wish) -> bool:
    return needed_bytes(spec, wish) <= sum(machine.room(node.id) for stage in grouping for node in stage)


def _lower_bound_s(spec: ModelSpec, grouping: Grouping, machine: Machine) -> float:
    """No plan of this grouping takes less: all weights at the speed of the fastest stage, and the way between stages."""
    fastest = max(sum(node.device.matvec_bytes_per_s for node in stage) for stage in grouping)
    rounded_off = 3 * sum(len(stage) for stage in grouping)  # bytes: each rank's parts of attention, feed-forward and output matrix are rounded down
    exchange_s = min(machine.exchange_s([node.id for node in stage], HIDDEN_BYTES * spec.width) for stage in grouping)
    ways = ways_s([stage[0].id for stage in grouping], spec, machine)
    return (streamed_bytes(spec) - rounded_off) / fastest + 2 * spec.n_blocks * exchange_s + ways


def _fitting_plan(spec: ModelSpec, grouping: Grouping, machine: Machine, wish: Wish) -> Plan | None:
    """The plan in proportion to speed if it fits, else the nearest one that does."""
    for layout in _layouts(spec, grouping, machine, wish):
        try:
            return _divided(spec, layout, machine, wish)
        except PlacementError:
            continue
    return None


def _divided(spec: ModelSpec, layout: Layout, machine: Machine, wish: Wish) -> Plan:
    shards = cut_ranks(spec, layout)
    forecast = Forecast(spec, shards, layout, machine, wish)
    even = build_plan(spec, layout, shards, wish.version, forecast.imbalance)
    if len(layout) == 1 or wish.is_forced or wish.use_all:
        return even
    quick = build_plan(spec, layout, shards, wish.version, forecast.seconds)
    is_worth_it = seconds_per_token(quick, machine) < (1 - BALANCE_MARGIN) * seconds_per_token(even, machine)
    return quick if is_worth_it else even


def _layouts(spec: ModelSpec, grouping: Grouping, machine: Machine, wish: Wish) -> Iterator[Layout]:
    """The grouping with weights: speeds; or speeds, as far as memory allows; at last memory."""
    speeds = [[machine.speed(node.id) for node in stage] for stage in grouping]
    if wish.shares is not None:
        shares = [share / sum(wish.shares) for share in wish.shares]
        paces = [min(speed / share for speed, share in zip(stage, shares, strict=True) if share > 0) for stage in speeds]
        yield _seated(grouping, [[pace * share for share in shares] for pace in paces])
        return
    yield _seated(grouping, speeds)
    rooms = [[float(machine.room(node.id)) for node in stage] for stage in grouping]
    rooms[0][0] = max(0.0, rooms[0][0] - spec.embedding_bytes)
    needed = float(needed_bytes(spec, wish) - spec.embedding_bytes)
    for level in FILL_LEVELS:
        yield _seated(grouping, _filled(speeds, [[room * level for room in stage] for stage in rooms], needed))
    yield _seated(grouping, rooms)


def _filled(speeds: list[list[float]], rooms: list[list[float]], needed: float) -> list[list[float]]:
    """What each rank takes of ``needed`` bytes: in proportion to its speed, but no more than its room; what that leaves, the others take, in proportion again."""
    left, speed_left = needed, sum(map(sum, speeds))
    places = [(room / speed, s, r) for s, stage in enumerate(rooms) for r, (room, speed) in enumerate(zip(stage, speeds[s], strict=True))]
    weights = [[0.0] * len(stage) for stage in rooms]
    for _, s, r in sorted(places):  # those that are full first
        weights[s][r] = min(rooms[s][r], left * speeds[s][r] / speed_left) if speed_left > 0 else rooms[s][r]
        left -= weights[s][r]
        speed_left -= speeds[s][r]
    return weights


def _seated(grouping: Grouping, weights: Sequence[Sequence[float]]) -> Layout:
    return tuple(
        tuple(Seat(node.id, node.device.name, weight) for node, weight in zip(stage, row, strict=True)) for stage, row in zip(grouping, weights, strict=True)
    )


def _nothing_fits(spec: ModelSpec, nodes: Sequence[Node], machine: Machine, wish: Wish) -> PlacementError:
    """What is missing: memory in all, or in the right places."""
    tried = [forced_grouping(nodes, wish)] if wish.is_forced else list(groupings(nodes, machine, wish.use_all))
    used = {node.id: node for grouping in tried for stage in grouping for node in stage}
    offered = sum(machine.room(node) for node in used)
    if needed_bytes(spec, wish) > offered:
        return explain.too_little_memory(spec, wish, offered, len(used))
    least: int | None = None
    for grouping in tried:
        *_, by_memory = _layouts(spec, grouping, machine, wish)
        try:
            lacks = missing_bytes(_unlimited(spec, by_memory, wish.version), machine, wish)
        except PlacementError:
            continue
        least = lacks if least is None else min(least, lacks)
    if least is None and wish.is_forced and len(tried[0]) > spec.n_blocks:
        return PlacementError(f"{len(tried[0])} stages are wished, but {spec.name} has {spec.n_blocks} blocks; a stage holds at least one")
    return explain.no_cut_fits(spec, wish, offered, len(used), least or 0)


def _unlimited(spec: ModelSpec, layout: Layout, version: int) -> Plan:
    """The plan of a layout with blocks in proportion to its stages' weights, whether it fits or not."""
    shards = cut_ranks(spec, layout)
    weights = [sum(seat.weight for seat in seats) for seats in layout]
    ideal = [spec.n_blocks * weight / sum(weights) for weight in weights]
    return build_plan(spec, layout, shards, version, lambda stage, start, stop: (stop - start - ideal[stage]) ** 2)
