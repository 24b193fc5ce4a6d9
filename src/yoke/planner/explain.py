"""What a person is told of a plan: a sentence for each node, and what is missing when there is none."""

import math
from collections.abc import Mapping

from yoke.core.errors import PlacementError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner.cost import OVERHEAD_BYTES, Machine, Outlook, Wish, compute_s, needed_bytes, node_bytes


def outlook(plan: Plan, seconds: float, machine: Machine, wish: Wish, at_least: Mapping[NodeId, float]) -> Outlook:
    """The plan with its predictions. ``at_least`` is, for each node, the least time per token of the plans tried that it was in."""
    by_node: dict[NodeId, int] = {}
    why: dict[NodeId, str] = {}
    for stage, rank, shard in plan.places():
        by_node[shard.node] = node_bytes(plan, stage, rank, wish)
        why[shard.node] = _reason(machine.nodes[shard.node], compute_s(plan, stage, rank, machine), by_node[shard.node])
    left_out = {
        node.id: _reason_against(node, plan, wish, seconds, at_least.get(node.id, math.inf)) for node in machine.nodes.values() if node.id not in by_node
    }
    return Outlook(plan=plan, seconds_per_token=seconds, bytes_per_node=by_node, why=why, left_out=left_out)


def too_little_memory(spec: ModelSpec, wish: Wish, offered: int, n_nodes: int) -> PlacementError:
    """All nodes together have too little memory; ``offered`` is what they have beyond `OVERHEAD_BYTES` each."""
    needed = needed_bytes(spec, wish)
    missing = needed - offered
    return PlacementError(
        f"{spec.name} needs {needed} bytes for weights and a cache of {wish.n_cells} tokens; {n_nodes} node(s) offer {offered}, what a worker itself takes "
        f"({OVERHEAD_BYTES} each) not counted: {missing} bytes ({missing / 1e9:.2f} GB) are missing. Add a node, use a smaller model or quantisation, or a "
        "smaller cache (--cells)",
        missing_bytes=missing,
    )


def no_cut_fits(spec: ModelSpec, wish: Wish, offered: int, n_nodes: int, missing: int) -> PlacementError:
    """There is enough memory in all, but not in the right places; ``missing`` is what the nearest plan lacks."""
    lacks = f"the nearest one lacks {missing} bytes ({missing / 1e9:.2f} GB). " if missing else ""
    return PlacementError(
        f"{spec.name} needs {needed_bytes(spec, wish)} bytes for weights and a cache of {wish.n_cells} tokens, and {n_nodes} node(s) offer {offered}, but no cut "
        f"into whole blocks, heads and columns fits each of them; {lacks}Free memory on the fullest node, wish for another layout, or add a node",
        missing_bytes=missing,
    )


def _reason(node: Node, compute_seconds: float, n_bytes: int) -> str:
    speed = f"{node.name} streams {node.device.matvec_bytes_per_s / 1e9:.1f} GB/s"
    limit = ", all that fits" if n_bytes > 0.95 * node.device.free_bytes else ""
    return f"{speed}: it computes {1e3 * compute_seconds:.1f} ms of each token and takes {n_bytes / 1e6:.0f} MB of memory{limit}"


def _reason_against(node: Node, plan: Plan, wish: Wish, seconds: float, at_least: float) -> str:
    start = f"{node.name} is left out: "
    if wish.is_forced:
        return start + f"the wished layout takes {sum(len(stage.shards) for stage in plan.stages)} nodes, and this is a later one"
    if node.device.free_bytes <= OVERHEAD_BYTES:
        return start + f"its memory of {node.device.free_bytes / 1e6:.0f} MB is less than the {OVERHEAD_BYTES / 1e6:.0f} MB that a worker itself takes"
    speed = f"it streams {node.device.matvec_bytes_per_s / 1e9:.1f} GB/s"
    if at_least < math.inf:
        return start + f"{speed}, and with its link a token would take at least {1e3 * at_least:.1f} ms, not {1e3 * seconds:.1f} ms"
    return start + f"{speed}, and no plan with it that was tried fits into memory"
