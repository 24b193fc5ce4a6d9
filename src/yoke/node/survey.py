"""What lies between the machines: which links are to be measured next, and what was found. Decides; opens no connection.

With few machines every pair is measured, with many those of the coordinator and of the first few: a plan that needs another link takes it for an ordinary one.
One link is measured at a time, since two at once would find each other's traffic.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from yoke.core.node import Link, NodeId

REFRESH_S = 600.0
"""How old a measurement may become while nothing is being computed."""

FULL_MESH = 8
"""Up to so many machines every pair is measured."""

RETRY_S = 30.0
"""How long a pair that could not be measured is left alone."""

Pair = tuple[NodeId, NodeId]


@dataclass(slots=True)
class _Entry:
    due_s: float
    links: tuple[Link, ...] = ()


class Survey:
    """The links of a cluster. Times are of the monotonic clock."""

    def __init__(self) -> None:
        self._entries: dict[frozenset[NodeId], _Entry] = {}

    @property
    def links(self) -> tuple[Link, ...]:
        """What was measured, both directions of each pair."""
        return tuple(link for entry in self._entries.values() for link in entry.links)

    def next(self, nodes: Sequence[NodeId], now_s: float, *, is_idle: bool) -> Pair | None:
        """The pair to measure now: those never measured first; known ones again only while the cluster ``is_idle``. ``nodes`` start with the coordinator."""
        due = [pair for pair in _pairs(nodes) if self._entry(pair).due_s <= now_s]
        fresh = [pair for pair in due if not self._entry(pair).links]
        return next(iter(fresh or (due if is_idle else ())), None)

    def is_complete(self, nodes: Sequence[NodeId], now_s: float) -> bool:
        """Whether nothing is left that was never tried."""
        return self.next(nodes, now_s, is_idle=False) is None

    def found(self, pair: Pair, rtt_s: float, there_bytes_per_s: float, back_bytes_per_s: float, now_s: float) -> None:
        """A pair was measured."""
        one, other = pair
        links = (
            Link(source=one, target=other, rtt_s=rtt_s, bandwidth_bytes_per_s=there_bytes_per_s),
            Link(source=other, target=one, rtt_s=rtt_s, bandwidth_bytes_per_s=back_bytes_per_s),
        )
        self._entries[frozenset(pair)] = _Entry(now_s + REFRESH_S, links)

    def failed(self, pair: Pair, now_s: float) -> None:
        """A pair could not be measured: what was known of it stays."""
        self._entries[frozenset(pair)] = _Entry(now_s + RETRY_S, self._entry(pair).links)

    def keep(self, nodes: Collection[NodeId]) -> None:
        """Forget the links of those who are gone: they may come back elsewhere."""
        self._entries = {pair: entry for pair, entry in self._entries.items() if all(node in nodes for node in pair)}

    def _entry(self, pair: Pair) -> _Entry:
        return self._entries.get(frozenset(pair)) or _Entry(0.0)


def _pairs(nodes: Sequence[NodeId]) -> Iterator[Pair]:
    yield from combinations(nodes[:FULL_MESH], 2)
    yield from ((nodes[0], other) for other in nodes[FULL_MESH:])
