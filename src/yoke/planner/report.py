"""From a chosen plan to its outlook: predictions, where the time goes, runners-up, and a sentence for each node."""

from collections.abc import Mapping, Sequence

from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.planner import exact, explain, many
from yoke.planner.cost import first_token_s, node_bytes, seconds_per_token, seconds_per_token_together, stage_times, way_back_s
from yoke.planner.moving import moved_bytes, moving_s
from yoke.planner.outlook import Alternative, Outlook
from yoke.planner.workbench import INFINITE, Candidate, Stages, Workbench

RUNNERS_UP = 3


def outlook(bench: Workbench, chosen: Candidate, found: Sequence[Candidate], coordinator: NodeId) -> Outlook:
    """The chosen one of the plans found, with its predictions. ``bench`` is the one that it was made on."""
    plan, machine, wish = chosen.plan, bench.machine, bench.wish
    by_node = {shard.node: node_bytes(plan, stage, rank, wish, machine.costs) for stage, rank, shard in plan.places()}
    return Outlook(
        plan=plan,
        seconds_per_token=seconds_per_token(plan, machine),
        bytes_per_node=by_node,
        why={shard.node: explain.reason(plan, stage, rank, machine, by_node[shard.node]) for stage, rank, shard in plan.places()},
        left_out=_left_out(bench, chosen),
        seconds_per_token_together=seconds_per_token_together(plan, machine, wish.streams),
        first_token_s=first_token_s(plan, machine, wish),
        stages=stage_times(plan, machine),
        own_s=machine.costs.engine_s + machine.costs.draw_s + way_back_s(plan, machine),
        best_s=min(candidate.value_s for candidate in found),
        goal=wish.goal,
        streams=wish.streams,
        prompt_tokens=wish.prompt_tokens,
        runners_up=_runners_up(bench, plan, found),
        moved_bytes=moved_bytes(wish.keep, plan),
        moving_s=moving_s(wish.keep, plan, machine, coordinator),
    )


def _runners_up(bench: Workbench, plan: Plan, found: Sequence[Candidate]) -> tuple[Alternative, ...]:
    """The best plans with other groups of nodes, and each node alone that was tried."""
    seen = {_groups_of(plan)}
    told: list[Candidate] = []
    for candidate in sorted(found, key=lambda candidate: candidate.value_s):
        groups = _groups_of(candidate.plan)
        if groups not in seen and (len(told) < RUNNERS_UP or n_nodes(candidate.plan) == 1):
            told.append(candidate)
        seen.add(groups)
    return tuple(
        Alternative(
            stages=_nodes_of(candidate.plan),
            seconds_per_token=seconds_per_token(candidate.plan, bench.machine),
            seconds_per_token_together=seconds_per_token_together(candidate.plan, bench.machine, bench.wish.streams),
        )
        for candidate in told
    )


def n_nodes(plan: Plan) -> int:
    """How many nodes a plan takes."""
    return sum(len(stage.shards) for stage in plan.stages)


def _groups_of(plan: Plan) -> frozenset[frozenset[NodeId]]:
    return frozenset(map(frozenset, _nodes_of(plan)))


def _nodes_of(plan: Plan) -> tuple[tuple[NodeId, ...], ...]:
    return tuple(tuple(shard.node for shard in stage.shards) for stage in plan.stages)


def _left_out(bench: Workbench, chosen: Candidate) -> Mapping[NodeId, str]:
    """A sentence for each node that the plan does not use."""
    number = {node.id: index for index, node in enumerate(bench.nodes)}
    stages: Stages = tuple(tuple(sorted(number[node] for node in group)) for group in _nodes_of(chosen.plan))
    used = {node for group in stages for node in group}
    told: dict[NodeId, str] = {}
    is_few = len(bench.nodes) <= exact.EXACT_NODES  # of more, the bound is all that is told
    for index, node in enumerate(bench.nodes):
        if index in used:
            continue
        if bench.wish.is_forced:
            told[node.id] = explain.not_wished(node, len(used))
        elif bench.machine.room(node.id) < 0:
            told[node.id] = explain.too_small(node, bench.machine.costs)
        else:
            with_s = _value_with(bench, stages, index, chosen.value_s if is_few else 0.0)
            told[node.id] = explain.slower_with(node, chosen.plan, bench.machine, bench.wish, (with_s, chosen.value_s))
    return told


def _value_with(bench: Workbench, stages: Stages, node: int, tell_s: float) -> float:
    """The least that the plan takes with one node more, in its best place: by its bound, or, where that is below ``tell_s``, by the plan itself."""
    changed = ((bench.bound_s(more), more) for more in many.placed(stages, node) if len(more) <= bench.spec.n_blocks)
    least_s = INFINITE
    for bound_s, more in sorted(changed):
        if bound_s >= least_s:
            break
        least_s = bound_s if bound_s >= tell_s else min((candidate.value_s for candidate in bench.make(more)), default=least_s)
    return least_s
