"""What a person is told of a plan: a sentence for each node, and what is missing when there is none."""

import math

from yoke.core.errors import PlacementError
from yoke.core.node import Node
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner.cost import CostModel, Machine, compute_s, needed_bytes
from yoke.planner.wish import NEAR, Goal, Wish

FULL = 0.95
"""A node of whose memory more than this is taken is called full."""


def amount(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def reason(plan: Plan, stage: int, rank: int, machine: Machine, n_bytes: int) -> str:
    """Why a node is in the plan with this share."""
    shard = plan.stages[stage].shards[rank]
    node = machine.nodes[shard.node]
    speed = f"{node.name} streams {machine.bytes_per_s(shard.node, plan.spec.weight_type) / 1e9:.1f} GB/s"
    if not (shard.heads or shard.columns or shard.vocabulary):
        return f"{speed}: it computes nothing, for the others are done sooner without its help, and takes {amount(n_bytes)} of memory"
    limit = ", all that fits" if n_bytes > FULL * node.device.free_bytes else ""
    return f"{speed}: it computes {1e3 * compute_s(plan, stage, rank, machine):.1f} ms of each token and takes {amount(n_bytes)} of memory{limit}"


def not_wished(node: Node, n_wished: int) -> str:
    """A node beyond a forced layout."""
    return f"{node.name} is left out: the wished layout takes {n_wished} nodes, and this is another one"


def too_small(node: Node, costs: CostModel) -> str:
    """A node that cannot hold even an empty share."""
    memory = amount(node.device.free_bytes)
    return f"{node.name} is left out: its memory of {memory} is less than the {amount(costs.worker_bytes)} that a worker itself takes"


def slower_with(node: Node, plan: Plan, machine: Machine, wish: Wish, values_s: tuple[float, float]) -> str:
    """A node that would make tokens slower, not enough faster, or has room for nothing; ``values_s`` are with it, at least, and as chosen."""
    with_s, chosen_s = values_s
    way_s, _ = machine.way(plan.stages[0].shards[0].node, node.id)
    speed = machine.bytes_per_s(node.id, plan.spec.weight_type)
    offer = f"{node.name} is left out: it streams {speed / 1e9:.1f} GB/s and a message to it takes {1e3 * way_s:.2f} ms"
    each = "a token" if wish.goal is Goal.LATENCY else f"a token of {wish.streams} streams together"
    if with_s == math.inf:
        return f"{offer}, but no plan with it that was tried fits into memory"
    if with_s >= chosen_s:
        return f"{offer}; with it {each} would take at least {1e3 * with_s:.2f} ms, not {1e3 * chosen_s:.2f} ms"
    if with_s >= chosen_s / (1 + NEAR):
        return f"{offer}; with it {each} would take {1e3 * with_s:.2f} ms, not {1e3 * chosen_s:.2f} ms: too little to be worth another machine"
    return f"{offer}, and no plan with it that was tried is better"


def too_little_memory(spec: ModelSpec, wish: Wish, offered: int, n_nodes: int, costs: CostModel) -> PlacementError:
    """All nodes together have too little memory; ``offered`` is what they have beyond `CostModel.worker_bytes` each."""
    needed = needed_bytes(spec, wish)
    return PlacementError(
        f"{spec.name} needs {amount(needed)} for weights and a cache of {wish.n_cells} tokens; {n_nodes} node(s) offer {amount(offered)}, what a worker itself "
        f"takes ({amount(costs.worker_bytes)} each) not counted: {amount(needed - offered)} are missing. Add a node, use a smaller model or quantisation, or a "
        "smaller cache (--cells)",
        missing_bytes=needed - offered,
    )


def no_cut_fits(spec: ModelSpec, wish: Wish, offered: int, n_nodes: int, missing: int) -> PlacementError:
    """There is enough memory in all, but not in the right places; ``missing`` is what the nearest plan lacks."""
    lacks = f"the nearest one lacks {amount(missing)}. " if missing else ""
    return PlacementError(
        f"{spec.name} needs {amount(needed_bytes(spec, wish))} for weights and a cache of {wish.n_cells} tokens, and {n_nodes} node(s) offer {amount(offered)}, but "
        f"no cut into whole blocks, heads and columns fits each of them; {lacks}Free memory on the fullest node, wish for another layout, or add a node",
        missing_bytes=missing,
    )
