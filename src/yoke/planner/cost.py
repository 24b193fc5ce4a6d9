"""What a plan costs: seconds for a step of tokens, seconds to the first token, and bytes on each node. Every constant of the prediction is in `CostModel`.

The stages of one stream wait for each other, so their times add up; within a stage the slowest rank counts. Weights are read once a step, so a rank's time is its
bytes over its measured speed; each further token in the step adds its operations over the measured rate of products with many rows. What crosses the network
costs half a round trip, its bytes over the bandwidth, and `CostModel.exchange_s`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from yoke.core.node import Link, Node, NodeId, Rate
from yoke.core.plan import Plan, Shard
from yoke.core.spec import ModelSpec
from yoke.planner.wish import Wish

MAX_CHUNKS = 1024
"""A longer prompt is predicted with so many larger chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The constants of the prediction, in one place to be calibrated. Sources: docs/benchmarks.md (21 November 2026), unless said otherwise.

    Attributes
    ----------
    exchange_s : what a message costs beyond half of a round trip that was measured between two processes (which has waking up and encryption in it) and its
        bytes. Round trips are measured one right after the other; messages come after computing, which has taken the caches: 8 KB between two ranks take 30 us of
        a core's time one after the other and 70 us more after a pause of 1.5 ms (of which loopback hides most: 50 to 65 us where a round trip takes 70 to 90).
    engine_s : choosing and embedding the next step, and handing out its tokens: what a token takes beyond what the stages compute (0.35 ms with drawing).
    draw_s : drawing one token from its logits.
    boundary_s : crossing from one stage to the next, or back to the first, beyond the message: the threads there have slept (0.35 ms a crossing on loopback, of
        which 0.1 ms is the message; 0.5 ms more than the message over an emulated 1 Gbit/s).
    unmeasured_rtt_s, unmeasured_bytes_per_s : taken for links that nobody has measured: wired, 1 Gbit/s, 0.2 ms and twice 0.1 ms for the processes at its ends.
    unmeasured_flop_per_byte : operations a second for each byte a second of a matrix-vector product, where no rate was measured: 8 with one thread, 11 with two
        (prompts of 512 tokens read at 68 and 135 tokens/s by a machine that decodes at 26 and 42 tokens/s).
    row_costs : below so many tokens in a step, each one after the first takes so many times what it takes among many: kernels for products work on several rows at
        once (2 sessions on one node write 30.8 tokens/s together, 4 write 41.3, where one writes 29.3 and prompts are read at 68).
    worker_bytes : what a worker takes beyond weights and cache: the interpreter, and buffers for a 512-token step of a 1B model (about 100 MiB).
    disk_bytes_per_s : reading weights where the file lies; a guess for a plain SSD.
    hidden_bytes : an element of the residual stream and of contributions to it (float32).
    token_bytes : a drawn token on its way back; best_bytes : a rank's likeliest token and its logit.
    """

    exchange_s: float = 5e-5
    engine_s: float = 3e-4
    draw_s: float = 5e-5
    boundary_s: float = 4e-4
    unmeasured_rtt_s: float = 4e-4
    unmeasured_bytes_per_s: float = 110e6
    unmeasured_flop_per_byte: float = 8.0
    row_costs: tuple[tuple[float, float], ...] = ((4, 1.8), (32, 1.3))
    worker_bytes: int = 128 * 1024 * 1024
    disk_bytes_per_s: float = 500e6
    hidden_bytes: int = 4
    token_bytes: int = 16
    best_bytes: int = 8

    def row_cost(self, rows: float) -> float:
        """How much slower operations are when only so many tokens are computed together."""
        return next((cost for limit, cost in self.row_costs if rows < limit), 1.0)


COSTS = CostModel()


@dataclass(frozen=True, slots=True)
class Machine:
    """Nodes by id, the links between them, and what things cost."""

    nodes: Mapping[NodeId, Node]
    links: Mapping[tuple[NodeId, NodeId], Link]
    costs: CostModel = field(default=COSTS)

    @classmethod
    def of(cls, nodes: Sequence[Node], links: Sequence[Link], costs: CostModel = COSTS) -> "Machine":
        """Index nodes and links."""
        return cls({node.id: node for node in nodes}, {(link.source, link.target): link for link in links}, costs)

    def way(self, source: NodeId, target: NodeId) -> tuple[float, float]:
        """Seconds for an empty message, one way, and seconds for each byte."""
        link = self.links.get((source, target))
        if link is None:
            return self.costs.unmeasured_rtt_s / 2 + self.costs.exchange_s, 1 / self.costs.unmeasured_bytes_per_s
        return link.rtt_s / 2 + self.costs.exchange_s, 1 / link.bandwidth_bytes_per_s

    def transfer_s(self, source: NodeId, target: NodeId, n_bytes: float) -> float:
        """Seconds for one message, one way."""
        empty_s, s_per_byte = self.way(source, target)
        return empty_s + n_bytes * s_per_byte

    def exchange_s(self, nodes: Sequence[NodeId], n_bytes: float) -> float:
        """Seconds until each of ``nodes`` has ``n_bytes`` from every other one: all send at once, and the slowest pair counts. 0 for a single node."""
        return max((self.transfer_s(a, b, n_bytes * (len(nodes) - 1)) for a in nodes for b in nodes if a != b), default=0.0)

    def spread_s(self, source: NodeId, targets: Sequence[NodeId], n_bytes: float) -> float:
        """Seconds until each of ``targets`` other than ``source`` has ``n_bytes`` from it; they share its connection."""
        others = [target for target in targets if target != source]
        return max((self.transfer_s(source, target, n_bytes * len(others)) for target in others), default=0.0)

    def rate(self, node: NodeId, weight_type: str) -> Rate | None:
        """What was measured with this type of weights and as many threads as the node computes with; else what was said of any type, which is the type ``""``."""
        device = self.nodes[node].device
        rates = {rate.weight_type: rate for rate in device.rates if rate.threads == device.threads}
        return rates.get(weight_type) or rates.get("")

    def bytes_per_s(self, node: NodeId, weight_type: str) -> float:
        """Bytes of weights that stream through a matrix-vector product in a second: measured with this type, else with any."""
        rate = self.rate(node, weight_type)
        return rate.matvec_bytes_per_s if rate is not None else self.nodes[node].device.matvec_bytes_per_s

    def flop_per_s(self, node: NodeId, weight_type: str) -> float:
        """Operations a second of a product with many rows: measured, else from `bytes_per_s`."""
        rate = self.rate(node, weight_type)
        return rate.matmul_flop_per_s if rate is not None else self.costs.unmeasured_flop_per_byte * self.bytes_per_s(node, weight_type)

    def s_per_byte(self, node: NodeId, spec: ModelSpec, rows: float) -> float:
        """Seconds for each byte of weights in a step of ``rows`` tokens."""
        first = 1 / self.bytes_per_s(node, spec.weight_type)
        if rows <= 1:
            return first
        return first + (rows - 1) * self.costs.row_cost(rows) * flop_per_byte(spec) / self.flop_per_s(node, spec.weight_type)

    def room(self, node: NodeId) -> int:
        """Bytes for weights and cache: what is free, less `CostModel.worker_bytes`; below 0 not even an empty shard fits."""
        return self.nodes[node].device.free_bytes - self.costs.worker_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is computed at once: ``rows`` tokens, of ``outputs`` of which the next one is wanted. ``seen`` is how many tokens each of them attends to on average."""

    rows: float = 1.0
    outputs: float = 1.0
    seen: float = 0.0


ONE_TOKEN = Step()
"""Decoding one stream. Reading its keys and values is left out: at 1000 tokens it is a few percent of reading the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One stage's part of a step, in seconds: its slowest rank's computing, the exchanges among its ranks, and the way to it from the stage before."""

    compute_s: float
    exchange_s: float
    boundary_s: float

    @property
    def busy_s(self) -> float:
        """How long the stage is taken by a step."""
        return self.compute_s + self.exchange_s


def flop_per_byte(spec: ModelSpec) -> float:
    """Operations for each byte of weights that a token meets; 0 when the sizes are unknown."""
    attention = 2 * spec.width * spec.head_dim * (spec.n_heads + spec.n_kv_heads)
    per_block = attention + 3 * spec.width * spec.columns
    n_bytes = streamed_bytes(spec)
    n_weights = spec.n_blocks * per_block + (spec.width * spec.vocabulary if spec.head_bytes else 0)
    return 2 * n_weights / n_bytes if n_bytes else 0.0


def stage_times(plan: Plan, machine: Machine, step: Step = ONE_TOKEN) -> tuple[StageTime, ...]:
    """Each stage's part of a step; collecting the likeliest tokens belongs to the last. The way back is `way_back_s`."""
    spec, costs = plan.spec, machine.costs
    hidden = costs.hidden_bytes * spec.width * step.rows
    times = []
    leader = plan.stages[0].shards[0].node
    for index, stage in enumerate(plan.stages):
        nodes = [shard.node for shard in stage.shards]
        exchange_s = 2 * len(stage.blocks) * machine.exchange_s(nodes, hidden)
        if index == len(plan.stages) - 1:
            exchange_s += gather_s(stage.shards, machine, step.outputs)
        boundary_s = machine.spread_s(leader, nodes, hidden) + (costs.boundary_s if index else 0.0)
        compute = max(compute_s(plan, index, rank, machine, step) for rank in range(len(nodes)))
        times.append(StageTime(compute_s=compute, exchange_s=exchange_s, boundary_s=boundary_s))
        leader = nodes[0]
    return tuple(times)


def way_back_s(plan: Plan, machine: Machine, outputs: float = 1.0) -> float:
    """Seconds until the engine has the tokens that the last stage drew."""
    first, last = plan.stages[0].shards[0].node, plan.stages[-1].shards[0].node
    return 0.0 if first == last else machine.transfer_s(last, first, machine.costs.token_bytes * outputs) + machine.costs.boundary_s


def step_s(plan: Plan, machine: Machine, step: Step = ONE_TOKEN) -> float:
    """Predicted seconds for a step, from the engine through all stages and back."""
    own_s = machine.costs.engine_s + machine.costs.draw_s * step.outputs + way_back_s(plan, machine, step.outputs)
    return own_s + sum(time.busy_s + time.boundary_s for time in stage_times(plan, machine, step))


def seconds_per_token(plan: Plan, machine: Machine) -> float:
    """Predicted time to decode one token of one stream."""
    return step_s(plan, machine)


def seconds_per_token_together(plan: Plan, machine: Machine, streams: int) -> float:
    """Predicted time for each token of ``streams`` sessions together: a batch for each stage is under way, and the slowest stage sets the pace."""
    n_batches = min(len(plan.stages), streams)
    step = Step(rows=streams / n_batches, outputs=streams / n_batches)
    busy = [time.busy_s for time in stage_times(plan, machine, step)]
    busy[0] += machine.costs.engine_s
    busy[-1] += machine.costs.draw_s * step.outputs
    return max(n_batches * max(busy), step_s(plan, machine, step)) / streams


def first_token_s(plan: Plan, machine: Machine, wish: Wish) -> float:
    """Predicted seconds from a prompt of ``wish.prompt_tokens`` to its first token: its chunks follow each other through the stages."""
    free_at = [0.0] * len(plan.stages)  # when each stage has done the chunks so far
    chunk = max(wish.chunk, -(-wish.prompt_tokens // MAX_CHUNKS))
    for start in range(0, wish.prompt_tokens, chunk):
        rows = min(chunk, wish.prompt_tokens - start)
        seen = min(start + rows / 2, plan.spec.window or math.inf)
        now = free_at[0] + machine.costs.engine_s
        for index, time in enumerate(stage_times(plan, machine, Step(rows=rows, seen=seen))):
            now = free_at[index] = max(now + time.boundary_s, free_at[index]) + time.busy_s
    return free_at[-1] + machine.costs.draw_s + way_back_s(plan, machine)


def gather_s(shards: Sequence[Shard], machine: Machine, outputs: float = 1.0) -> float:
    """Seconds until the last stage's rank 0 has every other rank's likeliest token. Drawing at random takes all logits instead, which is not counted."""
    return max((machine.transfer_s(shard.node, shards[0].node, machine.costs.best_bytes * outputs) for shard in shards[1:]), default=0.0)


def compute_s(plan: Plan, stage: int, rank: int, machine: Machine, step: Step = ONE_TOKEN) -> float:
    """Seconds that one rank computes for a step. Of the embedding only one row a token is read."""
    spec, shard = plan.spec, plan.stages[stage].shards[rank]
    head = spec.head_bytes * len(shard.vocabulary) // spec.vocabulary
    blocks = plan.shard_bytes(stage, rank) - head - (spec.embedding_bytes if (stage, rank) == (0, 0) else 0)
    streamed_s = blocks * machine.s_per_byte(shard.node, spec, step.rows) + head * machine.s_per_byte(shard.node, spec, step.outputs)
    attended = 4 * spec.head_dim * len(shard.heads) * step.seen * step.rows * len(plan.stages[stage].blocks)  # two products with every earlier token
    return streamed_s + attended / machine.flop_per_s(shard.node, spec.weight_type)


def node_bytes(plan: Plan, stage: int, rank: int, wish: Wish, costs: CostModel = COSTS) -> int:
    """Memory that one rank needs: weights, cache, and `CostModel.worker_bytes`."""
    return plan.shard_bytes(stage, rank) + plan.cache_bytes(stage, rank, wish.n_cells, wish.cache_element_bytes) + costs.worker_bytes


def missing_bytes(plan: Plan, machine: Machine, wish: Wish) -> int:
    """Memory that the plan's ranks lack, in all; 0 when it fits."""
    return sum(max(0, node_bytes(plan, s, r, wish, machine.costs) - machine.nodes[shard.node].device.free_bytes) for s, r, shard in plan.places())


def streamed_bytes(spec: ModelSpec) -> int:
    """Weights that are read in every step: blocks and output matrix."""
    return sum(spec.attention_bytes) + sum(spec.feed_forward_bytes) + spec.head_bytes


def needed_bytes(spec: ModelSpec, wish: Wish) -> int:
    """Weights and cache, before anything is replicated. A tied output matrix counts twice, as it does on the nodes that hold both."""
    cache = spec.n_blocks * wish.n_cells * spec.cache_bytes_per_cell(spec.n_kv_heads, wish.cache_element_bytes)
    return streamed_bytes(spec) + spec.embedding_bytes + cache
