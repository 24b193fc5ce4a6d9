"""What a change of plan moves: bytes of weights that nodes do not hold yet, and the seconds that takes. Knows plans and links, not how weights travel."""

from collections.abc import Mapping

from yoke.core.node import NodeId
from yoke.core.plan import Plan, Shard, Span
from yoke.core.spec import ModelSpec
from yoke.planner.cost import Machine


def moved_bytes(old: Plan | None, new: Plan) -> Mapping[NodeId, int]:
    """Bytes of weights that each node of ``new`` has to load: all of its shard, less what it holds by ``old``.

    What is held is counted exactly by overlap: of blocks, and within them of query and key/value heads, feed-forward columns, and rows of the output matrix. A plan
    of another model holds nothing of use.
    """
    places = {} if old is None or old.spec != new.spec else {shard.node: (stage, rank, shard) for stage, rank, shard in old.places()}
    moved = {}
    for stage, rank, shard in new.places():
        whole = new.shard_bytes(stage, rank)
        if old is not None and shard.node in places:
            old_stage, old_rank, held = places[shard.node]
            blocks = _overlap(old.stages[old_stage].blocks, new.stages[stage].blocks)
            embedding = new.spec.embedding_bytes if (stage, rank) == (old_stage, old_rank) == (0, 0) else 0
            whole = max(0, whole - _held_bytes(new.spec, blocks, held, shard) - embedding)
        moved[shard.node] = whole
    return moved


def moving_s(old: Plan | None, new: Plan, machine: Machine, coordinator: NodeId) -> float:
    """Predicted seconds until every node of ``new`` has what it has to load.

    The coordinator reads its part from its disk (`CostModel.disk_bytes_per_s`); every other node gets its own over its link from the coordinator, all at once, and
    together no faster than the best of those links. What nodes could give each other is not counted, so it may be quicker.
    """
    moved = dict(moved_bytes(old, new))
    own_s = moved.pop(coordinator, 0) / machine.costs.disk_bytes_per_s
    if not any(moved.values()):
        return own_s
    s_per_byte = {node: machine.way(coordinator, node)[1] for node in moved}
    slowest_s = max(n_bytes * s_per_byte[node] for node, n_bytes in moved.items())
    return max(own_s, slowest_s, sum(moved.values()) * min(s_per_byte.values()))


def _held_bytes(spec: ModelSpec, blocks: Span, old: Shard, new: Shard) -> int:
    """What two shards of a stage have in common in ``blocks``, sized as in `Plan.shard_bytes`."""
    old_first, old_end = spec.kv_heads_of(old.heads.start, old.heads.stop)
    new_first, new_end = spec.kv_heads_of(new.heads.start, new.heads.stop)
    n_units = len(_overlap(old.heads, new.heads)) + len(_overlap(Span(old_first, old_end), Span(new_first, new_end)))
    within = slice(blocks.start, blocks.stop)
    total = sum(spec.attention_bytes[within]) * n_units // (spec.n_heads + spec.n_kv_heads)
    total += sum(spec.feed_forward_bytes[within]) * len(_overlap(old.columns, new.columns)) // spec.columns
    return total + spec.head_bytes * len(_overlap(old.vocabulary, new.vocabulary)) // spec.vocabulary


def _overlap(a: Span, b: Span) -> Span:
    start = max(a.start, b.start)
    return Span(start, max(start, min(a.stop, b.stop)))
