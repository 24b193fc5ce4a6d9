"""One stage of given nodes: how long it takes for given blocks, with the shares that make it fastest, before there is a plan.

Heads are in proportion to speed; they are few and large, so columns are shared out to make good for them. Where that does not fit, several ways of sharing the heads
are tried, by speed, by memory, and among those with much memory only, since heads bring the cache with them; rows and columns then go to whoever is done with them
first and has room. The engine's node may have a share of 0 in a stage with others, since it must be there but need not compute.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from yoke.core.errors import PlacementError
from yoke.core.plan import Shard, Span
from yoke.planner.field import Field, Group
from yoke.planner.layout import Seat, cut_stage, shards_of
from yoke.planner.shares import cut_columns, cut_heads, cut_rows

Sizes = tuple[int, int, int]
"""Bytes of attention and of feed-forward, and how many blocks."""


@dataclass(frozen=True, slots=True)
class _Rank:
    """One rank's parts of a block, and what it can do. ``units`` are of query and key/value heads together, as in `Plan.shard_bytes`."""

    units: int
    columns: int
    head_bytes: int
    cache_bytes: int
    room: int
    s_per_byte: float


@dataclass(frozen=True, slots=True)
class _Cut:
    """A stage's shards, and the same in numbers."""

    shards: tuple[Shard, ...]
    ranks: tuple[_Rank, ...]


class StageTable:
    """Seconds and shards of one stage for any blocks, each computed once.

    Parameters
    ----------
    seats : nodes in the order of ranks.
    is_first, is_last : where the stage is: in the first one the engine's node may be idle, the last one has the output matrix.
    shares : relative shares of the ranks instead of the best ones.
    """

    def __init__(self, field: Field, seats: Group, *, is_first: bool, is_last: bool, shares: Sequence[float] | None = None) -> None:
        self._field, self._is_last = field, is_last
        self._rooms, self._s_per_byte = [field.rooms[number] for number in seats], [field.s_per_byte[number] for number in seats]
        self._speeds = [1 / s_per_byte for s_per_byte in self._s_per_byte]
        nodes = [field.nodes[number] for number in seats]
        self._seats = [Seat(node.id, node.device.name, speed) for node, speed in zip(nodes, self._speeds, strict=True)]
        self._exchange_s = field.block_exchange_s(tuple(sorted(seats)))
        self._is_free = shares is None and len(seats) > 1
        self._known: dict[Sizes, tuple[float, _Cut]] = {}
        if shares is not None:
            given = [Seat(seat.node, seat.device, share) for seat, share in zip(self._seats, shares, strict=True)]
            self._by_speed = [self._measured(cut_stage(field.spec, given, is_last=is_last))]
        else:
            self._by_speed = [self._cut_by_speed(self._speeds)]
        if is_first and self._is_free:
            self._by_speed.append(self._cut_by_speed([0.0, *self._speeds[1:]]))

    def seconds(self, start: int, stop: int) -> float:
        """Seconds for one step with blocks ``start..stop``; infinite if they do not fit into the memory of every rank."""
        return self._best(start, stop)[0]

    def shards(self, start: int, stop: int) -> tuple[Shard, ...]:
        """Who holds what of blocks ``start..stop``; whether that fits, `seconds` says."""
        return self._best(start, stop)[1].shards

    def _best(self, start: int, stop: int) -> tuple[float, _Cut]:
        field = self._field
        sizes = (field.attention[stop] - field.attention[start], field.feed_forward[stop] - field.feed_forward[start], stop - start)
        found = self._known.get(sizes)
        if found is None:
            tried = [(self._seconds(cut, sizes), cut) for cut in self._by_speed]
            if tried[0][0] == math.inf and self._is_free:
                tried += [(self._seconds(cut, sizes), cut) for cut in self._cuts_by_room(sizes)]
            found = self._known[sizes] = min(tried, key=lambda each: each[0])
        return found

    def _seconds(self, cut: _Cut, sizes: Sizes) -> float:
        attention, feed_forward, n_blocks = sizes
        spec, slowest = self._field.spec, 0.0
        n_units = spec.n_heads + spec.n_kv_heads
        for rank in cut.ranks:
            streamed = attention * rank.units // n_units + feed_forward * rank.columns // spec.columns + rank.head_bytes
            if streamed + n_blocks * rank.cache_bytes > rank.room:
                return math.inf
            slowest = max(slowest, streamed * rank.s_per_byte)
        return slowest + n_blocks * self._exchange_s

    def _cut_by_speed(self, speeds: Sequence[float]) -> _Cut:
        """Shares for any number of blocks, memory or not: of the model's own mixture of attention and feed-forward."""
        field, spec = self._field, self._field.spec
        heads = self._heads_by(speeds)
        units, column_bytes = self._units(heads), field.feed_forward[-1] / spec.columns
        per_unit = field.attention[-1] / (spec.n_heads + spec.n_kv_heads)
        loads = [n * per_unit / column_bytes for n in units] if column_bytes else None
        columns = cut_columns(spec.columns, spec.column_block, speeds, loads)
        vocabulary = cut_rows(spec.vocabulary, speeds) if self._is_last else [Span(0, 0)] * len(speeds)
        return self._measured(shards_of(spec, self._seats, heads, columns, vocabulary))

    def _cuts_by_room(self, sizes: Sizes) -> Iterator[_Cut]:
        """Shares for these blocks within the memory of each rank, for several ways of sharing the heads."""
        attention, feed_forward, n_blocks = sizes
        spec = self._field.spec
        head_bytes = spec.head_bytes if self._is_last else 0
        if attention + feed_forward + head_bytes + n_blocks * spec.n_kv_heads * self._field.cell_bytes > sum(self._rooms) or min(self._rooms) < 0:
            return
        for weights in self._head_weights(sizes):
            heads = self._heads_by(weights)
            units, cells = self._units(heads), [stop - start for start, stop in (spec.kv_heads_of(span.start, span.stop) for span in heads)]
            held = [attention * n / (spec.n_heads + spec.n_kv_heads) for n in units]
            left = [room - own - n_blocks * n * self._field.cell_bytes for room, own, n in zip(self._rooms, held, cells, strict=True)]
            try:
                vocabulary = self._shared(cut_rows, (spec.vocabulary,), head_bytes, held, left) if self._is_last else [Span(0, 0)] * len(held)
                columns = self._shared(cut_columns, (spec.columns, spec.column_block), feed_forward, held, left)
            except PlacementError:
                continue
            yield self._measured(shards_of(spec, self._seats, heads, columns, vocabulary))

    def _shared(self, cut: Callable[..., list[Span]], what: tuple[int, ...], n_bytes: int, held: list[float], left: list[float]) -> list[Span]:
        """A cut of ``n_bytes`` to whoever is done with them first and has room ``left``; what each rank then holds, and has left, is counted."""
        each = n_bytes / what[0]
        loads, most = ([own / each for own in held], [room / each for room in left]) if each else (None, None)
        spans = cut(*what, self._speeds, loads, most)
        for rank, span in enumerate(spans):
            held[rank] += len(span) * each
            left[rank] -= len(span) * each
        return spans

    def _head_weights(self, sizes: Sizes) -> Iterator[tuple[float, ...]]:
        """By speed as far as memory goes, by memory, and by speed without the ranks of least memory: one of them, two, four, ..."""
        attention, feed_forward, n_blocks = sizes
        stage_bytes = attention + feed_forward + n_blocks * self._field.spec.n_kv_heads * self._field.cell_bytes
        if stage_bytes and sum(self._rooms) >= stage_bytes:
            yield tuple(filled_shares(self._speeds, [room / stage_bytes for room in self._rooms]))
        yield tuple(map(float, self._rooms))
        poorest = sorted(range(len(self._rooms)), key=lambda rank: self._rooms[rank])
        n_without = 0
        while n_without < len(poorest):
            yield tuple(0.0 if rank in poorest[:n_without] else speed for rank, speed in enumerate(self._speeds))
            n_without = 2 * n_without or 1

    def _heads_by(self, weights: Sequence[float]) -> list[Span]:
        key, known = tuple(weights), self._field.heads
        if key not in known:
            known[key] = cut_heads(self._field.spec, weights)
        return known[key]

    def _units(self, heads: Sequence[Span]) -> list[int]:
        """Query and key/value heads of each rank together."""
        kv_heads = (self._field.spec.kv_heads_of(span.start, span.stop) for span in heads)
        return [len(span) + stop - start for span, (start, stop) in zip(heads, kv_heads, strict=True)]

    def _measured(self, shards: tuple[Shard, ...]) -> _Cut:
        field, spec = self._field, self._field.spec
        ranks = []
        for shard, room, s_per_byte in zip(shards, self._rooms, self._s_per_byte, strict=True):
            first, end = spec.kv_heads_of(shard.heads.start, shard.heads.stop)
            units, head_bytes = len(shard.heads) + end - first, spec.head_bytes * len(shard.vocabulary) // spec.vocabulary
            ranks.append(_Rank(units, len(shard.columns), head_bytes, (end - first) * field.cell_bytes, room, s_per_byte))
        return _Cut(shards, tuple(ranks))


def filled_shares(speeds: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Shares of 1 in proportion to speed, but none above its cap; what that leaves, the others take, in proportion again. ``caps`` sum to at least 1."""
    left, speed_left = 1.0, sum(speeds)
    shares = [0.0] * len(speeds)
    for rank in sorted(range(len(speeds)), key=lambda rank: caps[rank] / speeds[rank]):  # those that are full first
        shares[rank] = min(caps[rank], left * speeds[rank] / speed_left) if speed_left > 0 else caps[rank]
        left = max(0.0, left - shares[rank])
        speed_left -= speeds[rank]
    return shares
