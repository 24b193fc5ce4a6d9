"""Choosing a plan: the one that is predicted to be best, or one that is nearly as good and moves less.

The engine runs on stage 0, rank 0. The coordinator is tried there, and so are others (`_hosts`); the rest are put into an order that does not depend on how they
were given. Up to `exact.EXACT_NODES` nodes are searched exactly (`planner.exact`), more of them well (`planner.many`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan, whole_model
from yoke.core.spec import ModelSpec
from yoke.planner import exact, explain, many
from yoke.planner.cost import COSTS, CostModel, Machine, missing_bytes, needed_bytes
from yoke.planner.forced import forced_plan
from yoke.planner.layout import Seat, build_plan, cut_ranks
from yoke.planner.moving import moved_bytes
from yoke.planner.outlook import Outlook
from yoke.planner.report import n_nodes, outlook
from yoke.planner.wish import NEAR, Goal, Wish
from yoke.planner.workbench import INFINITE, Candidate, Stages, Workbench, value_s

NEAREST = 200
"""Groupings among which the one that lacks least is looked for when nothing fits."""

ALL_HOSTS = {Goal.LATENCY: exact.EXACT_NODES, Goal.THROUGHPUT: 5}
"""Up to so many nodes, each is tried as the engine's: with 8 that takes up to a second for one goal, and would take six for the other."""


def make_plan(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish, costs: CostModel = COSTS) -> Outlook:
    """The plan that is best by the wish's goal and fits into memory; of those within `NEAR` of it, the one that moves least, then that of fewest nodes.

    The first of ``nodes`` is the coordinator. The choice is never slower than the best single node by its own prediction, unless the wish forces a layout or all
    nodes.

    Raises
    ------
    PlacementError
        if nothing fits, saying how much is missing; or if the wished layout is impossible.
    """
    if not nodes or len({node.id for node in nodes}) != len(nodes):
        raise PlacementError(f"a plan is for {len(nodes)} nodes, {len({node.id for node in nodes})} of them different; expected at least one, each once")
    machine, own = Machine.of(nodes, links, costs), nodes[0].id
    if wish.is_forced:
        chosen = forced_plan(spec, nodes, machine, wish)
        return outlook(Workbench(spec, nodes, machine, wish), chosen, [chosen], own)
    benches = [Workbench(spec, _order(nodes, host, machine, spec), machine, wish) for host in _hosts(nodes, machine, spec, wish)]
    found: dict[Workbench, list[Candidate]] = {}
    for bench in benches:
        found[bench] = _search(bench, min((plan.value_s for plans in found.values() for plan in plans), default=INFINITE))
    if not any(found.values()):
        raise _nothing_fits(benches[0])
    bench, chosen = _choose(found, own)
    return outlook(bench, chosen, [plan for plans in found.values() for plan in plans], own)


def _hosts(nodes: Sequence[Node], machine: Machine, spec: ModelSpec, wish: Wish) -> list[Node]:
    """Where the engine may be: of few nodes with any; of many with the coordinator, with the plan that is there already, or with the best node alone or, where
    none can hold the model, the fastest.
    """
    others = sorted((node for node in nodes[1:] if machine.room(node.id) > 0), key=lambda node: _rank(node, machine, spec))
    if len(nodes) > ALL_HOSTS[wish.goal]:
        kept = wish.keep.stages[0].shards[0].node if wish.keep is not None else None
        alone = {node.id: whole_model(spec, node.id, node.device.name) for node in others if needed_bytes(spec, wish) <= machine.room(node.id)}
        best = min(alone, key=lambda node: value_s(alone[node], machine, wish), default=others[0].id if others else None)
        others = [node for node in others if node.id in (kept, best)]
    return [nodes[0], *others]


def _order(nodes: Sequence[Node], host: Node, machine: Machine, spec: ModelSpec) -> tuple[Node, ...]:
    """The engine's node, then all others by speed."""
    return (host, *sorted((node for node in nodes if node.id != host.id), key=lambda node: _rank(node, machine, spec)))


def _rank(node: Node, machine: Machine, spec: ModelSpec) -> tuple[float, int, str]:
    return -machine.bytes_per_s(node.id, spec.weight_type), -node.device.free_bytes, node.id


def _search(bench: Workbench, known_s: float) -> list[Candidate]:
    """Plans that fit, the best one among them unless it is no better than ``known_s``."""
    if not bench.wish.use_all:
        bench.make(((0,),))
    many.search(bench)
    kept = _kept(bench)
    best_s = min((plan.value_s for plan in [*_made(bench), *kept]), default=INFINITE)
    if len(bench.nodes) <= exact.EXACT_NODES:
        best_s = exact.search(bench, min(best_s, known_s))
    near = [stages for stages, plans in bench.made.items() if plans and plans[0].value_s <= best_s * (1 + NEAR) and len(stages) > 1]
    return [*_made(bench), *kept, *(bench.make_even(stages) for stages in near)]


def _made(bench: Workbench) -> Iterator[Candidate]:
    return (plan for plans in bench.made.values() for plan in plans)


def _kept(bench: Workbench) -> list[Candidate]:
    """The plan that is there already, if it still holds; and as `bench.made`, its stages with who is left, and with one node more."""
    keep, number = bench.wish.keep, {node.id: index for index, node in enumerate(bench.nodes)}
    if keep is None or keep.spec != bench.spec or keep.stages[0].shards[0].node != bench.nodes[0].id:
        return []
    left = (tuple(sorted(number[shard.node] for shard in stage.shards if shard.node in number)) for stage in keep.stages)
    many.make_around(bench, tuple(group for group in left if group))
    used = {shard.node for _, _, shard in keep.places()}
    if not used <= number.keys() or (bench.wish.use_all and used != number.keys()) or missing_bytes(keep, bench.machine, bench.wish):
        return []
    plan = replace(keep, version=bench.wish.version)
    return [Candidate(value_s(plan, bench.machine, bench.wish), plan)]


def _choose(found: Mapping[Workbench, Sequence[Candidate]], own: NodeId) -> tuple[Workbench, Candidate]:
    """Of the plans that are as good as the best, and if of several nodes no worse than any of them alone: the one that moves least, of fewest nodes, with the engine
    at the coordinator, best for other streams too.
    """
    best_s = min(plan.value_s for plans in found.values() for plan in plans)
    alone_s = min((plan.value_s for bench in found for plan in bench.made.get(((0,),), ())), default=INFINITE)
    bench = next(iter(found))
    keep, machine, wish = bench.wish.keep, bench.machine, bench.wish
    other_goal = replace(wish, goal=Goal.THROUGHPUT if wish.goal is Goal.LATENCY else Goal.LATENCY)

    def preference(item: tuple[Workbench, Candidate]) -> tuple[int, int, bool, float, float]:
        bench, candidate = item
        plan = candidate.plan
        moved = sum(moved_bytes(keep, plan).values()) if keep is not None else 0
        return moved, n_nodes(plan), bench.nodes[0].id != own, value_s(plan, machine, other_goal), candidate.value_s

    def is_good(plan: Candidate) -> bool:
        return plan.value_s <= best_s * (1 + NEAR) and (plan.value_s <= alone_s or n_nodes(plan.plan) == 1)

    return min(((bench, plan) for bench, plans in found.items() for plan in plans if is_good(plan)), key=preference)


def _nothing_fits(bench: Workbench) -> PlacementError:
    """What is missing: memory in all, or in the right places."""
    spec, wish, machine = bench.spec, bench.wish, bench.machine
    offered = sum(max(0, machine.room(node.id)) for node in bench.nodes)
    if needed_bytes(spec, wish) > offered:
        return explain.too_little_memory(spec, wish, offered, len(bench.nodes), machine.costs)
    least = math.inf
    for stages in islice(many.suggestions(bench, range(1, len(bench.nodes))), NEAREST):
        try:
            least = min(least, missing_bytes(_by_memory(bench, stages), machine, wish))
        except PlacementError:
            continue
    return explain.no_cut_fits(spec, wish, offered, len(bench.nodes), int(least) if least < math.inf else 0)


def _by_memory(bench: Workbench, stages: Stages) -> Plan:
    """The plan of these stages in proportion to memory, whether it fits or not."""
    spec, field = bench.spec, bench.field(1)
    nodes = bench.nodes
    layout = tuple(tuple(Seat(nodes[node].id, nodes[node].device.name, max(0.0, field.rooms[node])) for node in group) for group in stages)
    shards = cut_ranks(spec, layout)
    weights = [sum(seat.weight for seat in seats) for seats in layout]
    ideal = [spec.n_blocks * weight / sum(weights) for weight in weights]
    return build_plan(spec, layout, shards, bench.wish.version, lambda stage, start, stop: (stop - start - ideal[stage]) ** 2)
