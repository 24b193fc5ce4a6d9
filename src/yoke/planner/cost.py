"""What a plan costs: seconds to decode one token of one stream, and bytes on each node.

The stages of one stream wait for each other, so their times add up; within a stage the slowest rank counts. Weights are read once a token, so a rank's time is its
bytes over its measured speed. What crosses the network costs half a round trip, its bytes over the bandwidth, and `EXCHANGE_S`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan, Shard
from yoke.core.spec import ModelSpec

EXCHANGE_S = 1e-4
"""What one exchange costs beyond the network's own time: system calls, encryption, waking up (measured at 0.08 to 0.1 ms)."""

UNMEASURED_RTT_S = 2e-4
UNMEASURED_BYTES_PER_S = 110e6
"""A wired home network of 1 Gbit/s: taken for links that nobody has measured."""

OVERHEAD_BYTES = 128 * 1024 * 1024
"""What a worker takes beyond weights and cache: the interpreter, and compute buffers for a 512-token step of a 1B model (measured about 100 MiB)."""

HIDDEN_BYTES = 4
"""The residual stream, contributions to it and logits travel as float32."""

TOKEN_MESSAGE_BYTES = 16
"""The drawn token on its way back from the last stage to the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the plan shall offer: cache for ``n_cells`` tokens of ``cache_element_bytes`` numbers. ``stages``, ``ranks`` and ``shares`` force a layout.

    ``shares`` are relative ones, one a rank, the same in every stage; 0 gives a rank no work. ``use_all`` forbids leaving a node out.

    Raises
    ------
    PlacementError
        if a number is out of bounds.
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
        if self.shares is not None and not (self.shares and min(self.shares) >= 0 and 0 < sum(self.shares) < math.inf):
            raise PlacementError(f"shares are {self.shares}; expected numbers of at least 0, one a rank, not all 0")

    @property
    def is_forced(self) -> bool:
        """Whether a layout is given, so that there is nothing to choose."""
        return self.stages is not None or self.ranks is not None or self.shares is not None


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
        """Predicted decoding speed of one stream; infinite when the model's sizes are unknown and no link is crossed."""
        return 1.0 / self.seconds_per_token if self.seconds_per_token > 0 else math.inf


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

    def exchange_s(self, nodes: Sequence[NodeId], n_bytes: float) -> float:
        """Seconds until each of ``nodes`` has ``n_bytes`` from every other one: all send at once, and the slowest pair counts. 0 for a single node."""
        return max((self.transfer_s(a, b, n_bytes * (len(nodes) - 1)) for a in nodes for b in nodes if a != b), default=0.0)

    def speed(self, node: NodeId) -> float:
        """Bytes of weights a second."""
        return self.nodes[node].device.matvec_bytes_per_s

    def room(self, node: NodeId) -> int:
        """Bytes for weights and cache: what is free, less `OVERHEAD_BYTES`."""
        return max(0, self.nodes[node].device.free_bytes - OVERHEAD_BYTES)


def seconds_per_token(plan: Plan, machine: Machine) -> float:
    """Predicted time to decode one token of one stream: every stage's slowest rank, its exchanges, and the way between stages."""
    total = 0.0
    for index, stage in enumerate(plan.stages):
        nodes = [shard.node for shard in stage.shards]
        total += max(compute_s(plan, index, rank, machine) for rank in range(len(nodes)))
        total += 2 * len(stage.blocks) * machine.exchange_s(nodes, HIDDEN_BYTES * plan.spec.width)
    total += gather_s(plan.stages[-1].shards, machine)
    return total + ways_s([stage.shards[0].node for stage in plan.stages], plan.spec, machine)


def gather_s(shards: Sequence[Shard], machine: Machine) -> float:
    """Seconds until the last stage's rank 0 has all logits: every other rank sends it those of its own words."""
    return max((machine.transfer_s(shard.node, shards[0].node, HIDDEN_BYTES * len(shard.vocabulary)) for shard in shards[1:]), default=0.0)


def ways_s(leaders: Sequence[NodeId], spec: ModelSpec, machine: Machine) -> float:
    """Seconds for the residual stream from stage to stage, between their ranks 0, and for the drawn token back to the first."""
    if len(leaders) == 1:
        return 0.0
    forward = sum(machine.transfer_s(a, b, HIDDEN_BYTES * spec.width) for a, b in pairwise(leaders))
    return forward + machine.transfer_s(leaders[-1], leaders[0], TOKEN_MESSAGE_BYTES)


def compute_s(plan: Plan, stage: int, rank: int, machine: Machine) -> float:
    """Seconds that one rank computes for one token. Of the embedding only one row is read."""
    streamed = plan.shard_bytes(stage, rank) - (plan.spec.embedding_bytes if (stage, rank) == (0, 0) else 0)
    return streamed / machine.speed(plan.stages[stage].shards[rank].node)


def node_bytes(plan: Plan, stage: int, rank: int, wish: Wish) -> int:
    """Memory that one rank needs: weights, cache, and `OVERHEAD_BYTES`."""
    return plan.shard_bytes(stage, rank) + plan.cache_bytes(stage, rank, wish.n_cells, wish.cache_element_bytes) + OVERHEAD_BYTES


def missing_bytes(plan: Plan, machine: Machine, wish: Wish) -> int:
    """Memory that the plan's ranks lack, in all; 0 when it fits."""
    return sum(max(0, node_bytes(plan, s, r, wish) - machine.nodes[shard.node].device.free_bytes) for s, r, shard in plan.places())


def streamed_bytes(spec: ModelSpec) -> int:
    """Weights that are read for every token: blocks and output matrix."""
    return sum(spec.attention_bytes) + sum(spec.feed_forward_bytes) + spec.head_bytes


def needed_bytes(spec: ModelSpec, wish: Wish) -> int:
    """Weights and cache, before anything is replicated. A tied output matrix counts twice, as it does on the nodes that hold both."""
    cache = spec.n_blocks * wish.n_cells * spec.cache_bytes_per_cell(spec.n_kv_heads, wish.cache_element_bytes)
    return streamed_bytes(spec) + spec.embedding_bytes + cache
