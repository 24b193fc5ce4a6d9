"""Choosing a plan: which nodes, in which stages, with which shares.

All ways to group up to `EXACT_NODES` nodes are tried. With more, nodes are ordered by speed and groupings into equal stages are tried over the fastest of them:
good, not proven best. The first node is the coordinator: the engine runs there, so it is always stage 0, rank 0.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner.cost import OVERHEAD_BYTES, Machine, Outlook, Wish, fits, model_bytes, node_bytes, seconds_per_token
from yoke.planner.layout import Layout, Seat, build_plan, check_grid

EXACT_NODES = 6


def make_plan(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> Outlook:
    """The plan with the least predicted time per token that fits into memory.

    Since the coordinator alone is among the plans tried, the choice is never slower than it by its own prediction, unless ``wish`` forces a layout.

    Raises
    ------
    PlacementError
        if nothing fits, saying how many bytes are missing; or if the wished layout needs more nodes.
    """
    machine = Machine.of(nodes, links)
    forced = wish.stages is not None or wish.ranks is not None
    layouts = _forced_layouts(nodes, wish) if forced else _layouts(nodes, wish)
    best: tuple[float, Plan] | None = None
    for layout in layouts:
        plan = _fitting_plan(spec, layout, machine, wish)
        if plan is None:
            continue
        seconds = seconds_per_token(plan, machine)
        if best is None or seconds < best[0]:
            best = (seconds, plan)
    if best is None:
        raise _nothing_fits(spec, nodes, wish)
    return _outlook(best[1], best[0], nodes, machine, wish)


def _fitting_plan(spec: ModelSpec, layout: Layout, machine: Machine, wish: Wish) -> Plan | None:
    """The plan in proportion to speed if it fits, else the nearest one in proportion to memory."""
    by_memory = tuple(
        tuple(Seat(s.node, s.device, max(1.0, float(machine.nodes[s.node].device.free_bytes - OVERHEAD_BYTES))) for s in seats) for seats in layout
    )
    for candidate in (layout, by_memory) if wish.shares is None else (layout,):
        try:
            plan = build_plan(spec, candidate, wish.version)
        except PlacementError:
            continue
        if fits(plan, machine, wish):
            return plan
    return None


def _forced_layouts(nodes: Sequence[Node], wish: Wish) -> Iterator[Layout]:
    stages = wish.stages if wish.stages is not None else max(1, len(nodes) // (wish.ranks or 1))
    ranks = wish.ranks if wish.ranks is not None else max(1, len(nodes) // stages)
    check_grid(len(nodes), stages, ranks, wish.shares)
    seats = [_seat(node) for node in nodes[: stages * ranks]]
    if wish.shares is not None:
        seats = [Seat(seat.node, seat.device, wish.shares[index % ranks]) for index, seat in enumerate(seats)]
    yield tuple(tuple(seats[stage * ranks : (stage + 1) * ranks]) for stage in range(stages))


def _layouts(nodes: Sequence[Node], wish: Wish) -> Iterator[Layout]:
    """Every grouping that is tried, the coordinator alone first."""
    first, others = nodes[0], sorted(nodes[1:], key=lambda node: -node.device.matvec_bytes_per_s)
    sizes = [len(nodes)] if wish.use_all else range(1, len(nodes) + 1)
    for size in sizes:
        chosen = combinations(others, size - 1) if len(nodes) <= EXACT_NODES else iter([tuple(others[: size - 1])])
        for rest in chosen:
            seats = [_seat(node) for node in (first, *rest)]
            for parts in _compositions(size) if size <= EXACT_NODES else _equal_parts(size):
                yield _grouped(seats, parts)


def _grouped(seats: Sequence[Seat], parts: Sequence[int]) -> Layout:
    stages, start = [], 0
    for part in parts:
        stages.append(tuple(seats[start : start + part]))
        start += part
    return tuple(stages)


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as an ordered sum."""
    if total == 0:
        yield ()
    for head in range(total, 0, -1):
        for rest in _compositions(total - head):
            yield (head, *rest)


def _equal_parts(total: int) -> Iterator[tuple[int, ...]]:
    for ranks in (1, 2, 3, 4):
        yield (*[ranks] * (total // ranks), *([total % ranks] if total % ranks else []))


def _seat(node: Node) -> Seat:
    return Seat(node.id, node.device.name, node.device.matvec_bytes_per_s)


def _outlook(plan: Plan, seconds: float, nodes: Sequence[Node], machine: Machine, wish: Wish) -> Outlook:
    by_node: dict[NodeId, int] = {}
    why: dict[NodeId, str] = {}
    for stage, rank, shard in plan.places():
        node = machine.nodes[shard.node]
        by_node[shard.node] = node_bytes(plan, stage, rank, wish)
        why[shard.node] = (
            f"{node.name} streams {node.device.matvec_bytes_per_s / 1e9:.1f} GB/s and takes {plan.shard_bytes(stage, rank) / 1e6:.0f} MB of weights"
        )
    left_out = {
        node.id: f"{node.name} is left out: with its {node.device.matvec_bytes_per_s / 1e9:.1f} GB/s and its link every token would take longer"
        for node in nodes
        if node.id not in by_node
    }
    return Outlook(plan=plan, seconds_per_token=seconds, bytes_per_node=by_node, why=why, left_out=left_out)


def _nothing_fits(spec: ModelSpec, nodes: Sequence[Node], wish: Wish) -> PlacementError:
    """Say what is missing: memory in all, or an even enough spread of it."""
    cache = spec.n_blocks * wish.n_cells * spec.cache_bytes_per_cell(spec.n_kv_heads, wish.cache_element_bytes)
    needed = model_bytes(spec) + cache + OVERHEAD_BYTES * len(nodes)
    offered = sum(node.device.free_bytes for node in nodes)
    missing = max(0, needed - offered)
    if missing:
        return PlacementError(
            f"{spec.name} needs {needed} bytes with a cache of {wish.n_cells} tokens; {len(nodes)} node(s) offer {offered}: {missing} bytes "
            f"({missing / 1e9:.2f} GB) are missing. Add a node, use a smaller model or quantisation, or a smaller cache (--cells)",
            missing_bytes=missing,
        )
    return PlacementError(
        f"{spec.name} needs {needed} bytes and {len(nodes)} node(s) offer {offered}, but no cut into whole blocks, heads and columns fits each of them; "
        "free memory on the fullest node, or add one"
    )
