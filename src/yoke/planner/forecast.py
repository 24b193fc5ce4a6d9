"""How long a stage takes and whether it fits, for any range of blocks, before there is a plan: what dividing the blocks is decided by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from yoke.core.plan import Shard
from yoke.core.spec import ModelSpec
from yoke.planner.cost import HIDDEN_BYTES, OVERHEAD_BYTES, Machine, Wish
from yoke.planner.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankForecast:
    """One rank's parts of a block, and what it can do: ``room`` in bytes for weights and cache, ``speed`` in bytes per second.

    ``attention_units`` are of the query and key/value heads together, as in `Plan.shard_bytes`.
    """

    attention_units: int
    columns: int
    head_bytes: int
    embedding_bytes: int
    cache_bytes_per_block: int
    room: int
    speed: float


class Forecast:
    """What every stage of a layout would cost.

    Parameters
    ----------
    shards : what each rank of each stage holds of its blocks.
    layout : the same places, with the weights that blocks are divided by.
    """

    def __init__(self, spec: ModelSpec, shards: Sequence[Sequence[Shard]], layout: Layout, machine: Machine, wish: Wish) -> None:
        self._attention = (0, *accumulate(spec.attention_bytes or (0,) * spec.n_blocks))
        self._feed_forward = (0, *accumulate(spec.feed_forward_bytes or (0,) * spec.n_blocks))
        self._n_units, self._n_columns = spec.n_heads + spec.n_kv_heads, spec.columns
        self._ranks = [[_rank(spec, shard, (stage, rank), machine, wish) for rank, shard in enumerate(held)] for stage, held in enumerate(shards)]
        self._exchange_s = [2 * machine.exchange_s([shard.node for shard in held], HIDDEN_BYTES * spec.width) for held in shards]
        self._weights = [sum(seat.weight for seat in seats) for seats in layout]
        self._head = [spec.head_bytes if index == len(shards) - 1 else 0 for index in range(len(shards))]
        self._ideal = (self._bytes(0, spec.n_blocks) + spec.head_bytes) / sum(self._weights)

    def seconds(self, stage: int, start: int, stop: int) -> float:
        """Seconds for one token with blocks ``start..stop``; infinite if they do not fit into the memory of every rank."""
        attention, feed_forward = self._attention[stop] - self._attention[start], self._feed_forward[stop] - self._feed_forward[start]
        slowest = 0.0
        for rank in self._ranks[stage]:
            streamed = attention * rank.attention_units // self._n_units + feed_forward * rank.columns // self._n_columns + rank.head_bytes
            if streamed + rank.embedding_bytes + (stop - start) * rank.cache_bytes_per_block > rank.room:
                return math.inf
            slowest = max(slowest, streamed / rank.speed)
        return slowest + (stop - start) * self._exchange_s[stage]

    def imbalance(self, stage: int, start: int, stop: int) -> float:
        """How far the stage's time is from that of all stages in exact proportion to their weights, squared; infinite if the blocks do not fit.

        The least sum of it keeps several streams in flight, since then the slowest stage sets the pace.
        """
        if self.seconds(stage, start, stop) == math.inf:
            return math.inf
        return ((self._bytes(start, stop) + self._head[stage]) / self._weights[stage] - self._ideal) ** 2

    def _bytes(self, start: int, stop: int) -> int:
        sizes = self._attention[stop] - self._attention[start] + self._feed_forward[stop] - self._feed_forward[start]
        return sizes or stop - start  # sizes that nobody knows count one a block


def _rank(spec: ModelSpec, shard: Shard, place: tuple[int, int], machine: Machine, wish: Wish) -> RankForecast:
    first, end = spec.kv_heads_of(shard.heads.start, shard.heads.stop)
    return RankForecast(
        attention_units=len(shard.heads) + end - first,
        columns=len(shard.columns),
        head_bytes=spec.head_bytes * len(shard.vocabulary) // spec.vocabulary,
        embedding_bytes=spec.embedding_bytes if place == (0, 0) else 0,
        cache_bytes_per_block=wish.n_cells * spec.cache_bytes_per_cell(end - first, wish.cache_element_bytes),
        room=machine.nodes[shard.node].device.free_bytes - OVERHEAD_BYTES,  # below 0 even an empty share does not fit
        speed=machine.speed(shard.node),
    )
