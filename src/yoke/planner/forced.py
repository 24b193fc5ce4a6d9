"""Plans whose stages are given: a grid over the first nodes, or named nodes by hand. Shares and blocks that are not given follow from speed and memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from yoke.core.errors import PlacementError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner.cost import Machine, needed_bytes, node_bytes
from yoke.planner.explain import amount, too_little_memory
from yoke.planner.layout import check_grid, cut_blocks
from yoke.planner.stages import StageTable
from yoke.planner.wish import StageWish, Wish
from yoke.planner.workbench import Candidate, Workbench, divided_evenly

ENDLESS_BYTES = 1 << 60


def forced_stages(nodes: Sequence[Node], wish: Wish) -> tuple[StageWish, ...]:
    """The stages that a wish forces: those by hand, or its grid over the first nodes, in their order if shares are given by it.

    What is not said of a grid's stages and ranks follows from the number of shares, or of nodes.

    Raises
    ------
    PlacementError
        if there are too few nodes, a node is unknown or named twice, or shares are not one a rank.
    """
    if wish.layout is not None:
        _check_names(wish.layout, nodes)
        return wish.layout
    ranks = wish.ranks if wish.ranks is not None else len(wish.shares) if wish.shares is not None else None
    stages = wish.stages if wish.stages is not None else max(1, len(nodes) // (ranks or 1))
    ranks = ranks if ranks is not None else max(1, len(nodes) // stages)
    check_grid(len(nodes), stages, ranks, wish.shares)
    ids = [node.id for node in nodes[: stages * ranks]]
    if wish.shares is None:  # who came when does not matter: a cluster that starts again has the same plan, and the weights where they were
        ids[1:] = sorted(ids[1:])
    return tuple(StageWish(nodes=tuple(ids[stage * ranks : (stage + 1) * ranks]), shares=wish.shares) for stage in range(stages))


def forced_plan(spec: ModelSpec, nodes: Sequence[Node], machine: Machine, wish: Wish) -> Candidate:
    """The plan of the forced stages, with work as equal for each of them as memory lets.

    Raises
    ------
    PlacementError
        as `forced_stages`; or if it does not fit, saying which nodes lack how much.
    """
    stages = forced_stages(nodes, wish)
    if len(stages) > spec.n_blocks:
        raise PlacementError(f"{len(stages)} stages are wished, but {spec.name} has {spec.n_blocks} blocks; a stage holds at least one")
    _check_blocks(spec, stages)
    try:
        return _divided(Workbench(spec, nodes, machine, wish), stages)
    except PlacementError:
        used = [node for stage in stages for node in stage.nodes]
        offered = sum(max(0, machine.room(node)) for node in used)
        if needed_bytes(spec, wish) > offered:
            raise too_little_memory(spec, wish, offered, len(used), machine.costs) from None
        endless = [replace(node, device=replace(node.device, free_bytes=ENDLESS_BYTES)) for node in nodes]
        links = machine.links.values()
        wanted = _divided(Workbench(spec, endless, Machine.of(endless, tuple(links), machine.costs), wish), stages).plan
        raise _does_not_fit(wanted, machine, wish) from None


def _divided(bench: Workbench, stages: Sequence[StageWish]) -> Candidate:
    number = {node.id: index for index, node in enumerate(bench.nodes)}
    field, n_blocks = bench.field(len(stages)), bench.spec.n_blocks
    tables = []
    for index, stage in enumerate(stages):
        seats = tuple(number[node] for node in stage.nodes)
        tables.append(StageTable(field, seats, is_first=index == 0, is_last=index == len(stages) - 1, shares=stage.shares))
    if all(stage.blocks is None for stage in stages):
        return bench.candidate(tables, divided_evenly(tables, n_blocks))
    return bench.candidate(tables, cut_blocks(n_blocks, len(tables), _by_hand(tables, stages, n_blocks)))


def _by_hand(tables: Sequence[StageTable], stages: Sequence[StageWish], n_blocks: int) -> Callable[[int, int, int], float]:
    """What blocks cost where some stages' numbers are given: those without one are as equal as can be."""
    open_stages = [index for index, stage in enumerate(stages) if stage.blocks is None]
    n_open = n_blocks - sum(stage.blocks or 0 for stage in stages)

    def cost(index: int, start: int, stop: int) -> float:
        wanted = stages[index].blocks
        seconds = tables[index].seconds(start, stop)
        if seconds == math.inf or (wanted is not None and stop - start != wanted):
            return math.inf
        return 0.0 if wanted is not None else (stop - start - n_open / len(open_stages)) ** 2

    return cost


def _check_names(layout: Sequence[StageWish], nodes: Sequence[Node]) -> None:
    known = {node.id: node.name for node in nodes}
    named = [node for stage in layout for node in stage.nodes]
    for node in named:
        if node not in known:
            raise PlacementError(f"the layout by hand names node {node[:12]}, which is not there; there are {', '.join(known.values())}")
    if len(set(named)) != len(named):
        twice = next(node for node in named if named.count(node) > 1)
        raise PlacementError(f"the layout by hand names {known[twice]} twice; a node holds one part")


def _check_blocks(spec: ModelSpec, stages: Sequence[StageWish]) -> None:
    given = sum(stage.blocks or 0 for stage in stages)
    n_open = sum(stage.blocks is None for stage in stages)
    if any(stage.blocks is not None for stage in stages) and (given + n_open > spec.n_blocks or (not n_open and given < spec.n_blocks)):
        raise PlacementError(
            f"the stages by hand hold {given} blocks; {spec.name} has {spec.n_blocks}: each belongs to one stage, and a stage holds at least one"
        )


def _does_not_fit(plan: Plan, machine: Machine, wish: Wish) -> PlacementError:
    """Which nodes lack how much for a plan that was forced."""
    lacks: dict[NodeId, int] = {}
    told = []
    for stage, rank, shard in plan.places():
        node, needed = machine.nodes[shard.node], node_bytes(plan, stage, rank, wish, machine.costs)
        if needed > node.device.free_bytes:
            lacks[shard.node] = needed - node.device.free_bytes
            told.append(f"{node.name} needs {amount(needed)} and offers {amount(node.device.free_bytes)}")
    return PlacementError(
        f"the wished layout of {plan.spec.name} does not fit, even with the shares that memory lets: {'; '.join(told)}. Free memory there, wish for another layout, "
        "or a smaller cache (--cells)",
        missing_bytes=sum(lacks.values()),
    )
