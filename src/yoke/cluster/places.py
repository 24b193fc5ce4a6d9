"""A place in a plan, apart from who holds it: what a loaded shard can stand in for. Knows plans; does not know who is there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from yoke.core.errors import InvariantError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan, Span
from yoke.core.spec import ModelSpec
from yoke.planner import Machine, seconds_per_token

ENGINES = (0, 0)
"""Stage and rank of the engine, in whose place no copy is kept."""

Seat = tuple[int, int]
"""Stage and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What two plans must agree on for one loaded shard to serve both: the same slices of the same model, computed in the same way.

    ``is_shared`` says that the stage has several ranks, which sum their contributions; ``is_last`` that the stage holds the output matrix.
    """

    spec: ModelSpec
    blocks: Span
    heads: Span
    columns: Span
    vocabulary: Span
    experts: Span
    is_shared: bool
    is_last: bool

    @classmethod
    def of(cls, plan: Plan, seat: Seat) -> Self:
        """The place of one stage and rank."""
        stage, rank = seat
        shards = plan.stages[stage].shards
        shard = shards[rank]
        return cls(
            spec=plan.spec,
            blocks=plan.stages[stage].blocks,
            heads=shard.heads,
            columns=shard.columns,
            vocabulary=shard.vocabulary,
            experts=shard.experts,
            is_shared=len(shards) > 1,
            is_last=stage == len(plan.stages) - 1,
        )


@dataclass(frozen=True, slots=True)
class Seating:
    """A plan with its nodes as they were when it was made, and what is predicted of it."""

    plan: Plan
    seconds_per_token: float
    nodes: Mapping[NodeId, Node]
    seats: Mapping[NodeId, Seat]

    @classmethod
    def of(cls, plan: Plan, seconds_per_token: float, nodes: Mapping[NodeId, Node]) -> Self:
        """Keep of ``nodes`` those of the plan.

        Raises
        ------
        InvariantError
            if the plan has a node that is not among them.
        """
        seats = {shard.node: (stage, rank) for stage, rank, shard in plan.places()}
        if strangers := seats.keys() - nodes.keys():
            raise InvariantError(f"plan {plan.version} places a shard on {min(strangers)[:12]}, which is not among the nodes that it was to be made of")
        return cls(plan, seconds_per_token, {node: nodes[node] for node in seats}, seats)

    @property
    def engine(self) -> NodeId:
        """The node where the engine runs."""
        return self.plan.stages[0].shards[0].node

    def place(self, node: NodeId) -> Place:
        """The place that ``node`` has."""
        return Place.of(self.plan, self.seats[node])

    def seconds_with(self, nodes: Mapping[NodeId, Node]) -> float:
        """Predicted seconds per token if its nodes are as ``nodes`` says. The links are taken for unchanged: what they cost is in the prediction already."""
        change_s = seconds_per_token(self.plan, Machine(nodes, {})) - seconds_per_token(self.plan, Machine(self.nodes, {}))
        return max(0.0, self.seconds_per_token + change_s)

    def with_others(self, others: Mapping[NodeId, Node], version: int) -> "Seating":
        """The same plan as a new version, with some nodes replaced: ``others`` says by whom. Nothing else of it changes."""
        stages = []
        for stage in self.plan.stages:
            shards = tuple(
                replace(shard, node=others[shard.node].id, device=others[shard.node].device.name) if shard.node in others else shard for shard in stage.shards
            )
            stages.append(replace(stage, shards=shards))
        plan = replace(self.plan, version=version, stages=tuple(stages))
        nodes = {(others[old].id if old in others else old): others.get(old, node) for old, node in self.nodes.items()}
        before_s, after_s = (seconds_per_token(p, Machine(n, {})) for p, n in ((self.plan, self.nodes), (plan, nodes)))
        return Seating.of(plan, max(0.0, self.seconds_per_token + after_s - before_s), nodes)
