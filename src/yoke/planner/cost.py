"""What a plan costs: seconds to decode one token of one stream, and bytes on each node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan, Stage
from yoke.core.spec import ModelSpec

EXCHANGE_S = 1e-4
"""What one exchange costs beyond the network's own time: system calls, encryption, waking up (measured at 0.08 to 0.1 ms)."""

UNMEASURED_RTT_S = 2e-4
UNMEASURED_BYTES_PER_S = 110e6
"""A wired home network of 1 Gbit/s: taken for links that nobody has measured."""

OVERHEAD_BYTES = 128 * 1024 * 1024
"""What a worker takes beyond weights and cache: the interpreter, and compute buffers for a 512-token step of a 1B model (measured about 100 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the plan shall offer: cache for ``n_cells`` tokens of ``cache_element_bytes`` numbers. ``stages``, ``ranks`` and ``shares`` force a layout.

    ``use_all`` forbids leaving a node out.
    """

    n_cells: int
    cache_element_bytes: int = 2
    stages: int | None = None
    ranks: int | None = None
    shares: tuple[float, ...] | None = None
    version: int = 1
    use_all: bool = False

    def __post_init__(self) -> None:
        if self.n_cells < 1 or any(n is not None and n < 1 for n in (self.stages, self.ranks)):
            raise PlacementError(f"a plan needs at least one cell, stage and rank; wished are {self.n_cells}, {self.stages}, {self.ranks}")
        if self.shares is not None and (not self.shares or min(self.shares) < 0 or not 0 < sum(self.shares) < float("inf")):
            raise PlacementError(f"shares are {self.shares}; expected numbers of at least 0, one a rank, not all 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A plan and what is predicted of it. ``why`` has a sentence for each node of the plan, ``left_out`` for each other one."""

    plan: Plan
    seconds_per_token: float
    bytes_per_node: Mapping[NodeId, int]
    why: Mapping[NodeId, str]
    left_out: Mapping[NodeId, str]

    @property
    def tokens_per_s(self) -> float:
        """Predicted decoding speed of one stream."""
        return 1.0 / self.seconds_per_token


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes by id, and the links between them."""

    nodes: Mapping[NodeId, Node]
    links: Mapping[tuple[NodeId, NodeId], Link]

    @classmethod
    def of(cls, nodes: Sequence[Node], links: Sequence[Link]) -> "Machine":
        """Index nodes and links."""
        return cls({node.id: node for node in nodes}, {(link.source, link.target): link for link in links})

    def transfer_s(self, source: NodeId, target: NodeId, n_bytes: float) -> float:
        """Seconds for one message, one way."""
        link = self.links.get((source, target))
        rtt_s, rate = (link.rtt_s, link.bandwidth_bytes_per_s) if link is not None else (UNMEASURED_RTT_S, UNMEASURED_BYTES_PER_S)
        return rtt_s / 2 + n_bytes / rate + EXCHANGE_S

    def speed(self, node: NodeId) -> float:
        """Bytes of weights a second."""
        return self.nodes[node].device.matvec_bytes_per_s


def seconds_per_token(plan: Plan, machine: Machine) -> float:
    """Predicted time to decode one token of one stream: every stage's slowest rank, its exchanges, and the way between stages."""
    total = 0.0
    row_bytes = 4.0 * plan.spec.width
    for index, stage in enumerate(plan.stages):
        total += max(_compute_s(plan, index, rank, machine) for rank in range(len(stage.shards)))
        total += _collective_s(plan, index, machine)
        if index + 1 < len(plan.stages):
            total += machine.transfer_s(stage.shards[0].node, plan.stages[index + 1].shards[0].node, row_bytes)
    if len(plan.stages) > 1:
        total += machine.transfer_s(plan.stages[-1].shards[0].node, plan.stages[0].shards[0].node, 16)
    return total


def node_bytes(plan: Plan, stage: int, rank: int, wish: Wish) -> int:
    """Memory that one rank needs: weights, cache, and `OVERHEAD_BYTES`."""
    return plan.shard_bytes(stage, rank) + plan.cache_bytes(stage, rank, wish.n_cells, wish.cache_element_bytes) + OVERHEAD_BYTES


def fits(plan: Plan, machine: Machine, wish: Wish) -> bool:
    """Whether every rank's memory suffices."""
    return all(node_bytes(plan, s, r, wish) <= machine.nodes[shard.node].device.free_bytes for s, r, shard in plan.places())


def model_bytes(spec: ModelSpec) -> int:
    """All weights of a model; a tied output matrix counts twice, as it does on the nodes that hold both."""
    return sum(spec.attention_bytes) + sum(spec.feed_forward_bytes) + spec.embedding_bytes + spec.head_bytes


def _compute_s(plan: Plan, stage: int, rank: int, machine: Machine) -> float:
    shard = plan.stages[stage].shards[rank]
    streamed = plan.shard_bytes(stage, rank) - (plan.spec.embedding_bytes if (stage, rank) == (0, 0) else 0)  # of the embedding one row is read
    return streamed / machine.speed(shard.node)


def _collective_s(plan: Plan, index: int, machine: Machine) -> float:
    stage = plan.stages[index]
    if len(stage.shards) == 1:
        return 0.0
    row_bytes = 4.0 * plan.spec.width * (len(stage.shards) - 1)
    total = 2 * len(stage.blocks) * _slowest_s(stage, machine, row_bytes)
    if index == len(plan.stages) - 1:
        total += _slowest_s(stage, machine, 4.0 * max(len(shard.vocabulary) for shard in stage.shards))
    return total


def _slowest_s(stage: Stage, machine: Machine, n_bytes: float) -> float:
    nodes = [shard.node for shard in stage.shards]
    return max(machine.transfer_s(a, b, n_bytes) for a in nodes for b in nodes if a != b)
