"""Who has failed to load, and is left out of plans for a while: twice as long each time.

So a machine that cannot do its part does not stop the others again and again.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from yoke.core.node import NodeId

MAX_DOUBLINGS = 6
"""10 s become 640 s: a machine that was mended is taken back within some minutes, without anybody's help."""

ACCIDENTS = 3
"""Deaths while loading that are forgiven: people restart machines, and one that crashes for want of memory does so every time."""

MAX_REMEMBERED = 4096
"""Nodes whose failures are kept in mind; the oldest is forgotten when there are more."""


@dataclass(frozen=True, slots=True)
class _Trial:
    times: int
    until_s: float


class Trials:
    """Failures by node, until it is told to `forget` them. Every call takes O(log n) of n nodes that failed; `over` and `forget` do so for each node."""

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._trials: OrderedDict[NodeId, _Trial] = OrderedDict()
        self._ends: list[tuple[float, NodeId]] = []

    def __len__(self) -> int:
        return len(self._trials)

    def failed(self, node: NodeId, now: float, *, is_barred: bool = True) -> float:
        """A node could not load. The answer is for how many seconds it should rest; unless ``is_barred`` is false, it is left out of plans meanwhile."""
        times = self._times(node) + 1
        wait_s = self._retry_s * 2.0 ** min(times - 1, MAX_DOUBLINGS)
        self._remember(node, times, now, wait_s if is_barred else 0.0)
        return wait_s

    def stumbled(self, node: NodeId, now: float) -> float:
        """A node died while it loaded, or soon after. `ACCIDENTS` may happen; from then on it is left out like one that failed."""
        times = self._times(node) + 1
        wait_s = self._retry_s * 2.0 ** min(times - 1 - ACCIDENTS, MAX_DOUBLINGS) if times > ACCIDENTS else 0.0
        self._remember(node, times, now, wait_s)
        return wait_s

    def forget(self, nodes: Iterable[NodeId]) -> None:
        """These have done well since."""
        for node in nodes:
            self._trials.pop(node, None)

    def is_barred(self, node: NodeId, now: float) -> bool:
        """Whether a node is left out of plans."""
        trial = self._trials.get(node)
        return trial is not None and now < trial.until_s

    def over(self, now: float) -> list[NodeId]:
        """The nodes whose rest has ended since the last call."""
        ended = []
        while self._ends and self._ends[0][0] <= now:
            _, node = heapq.heappop(self._ends)
            if node in self._trials and not self.is_barred(node, now):
                ended.append(node)
        return ended

    def _times(self, node: NodeId) -> int:
        trial = self._trials.get(node)
        return trial.times if trial is not None else 0

    def _remember(self, node: NodeId, times: int, now: float, rest_s: float) -> None:
        self._trials[node] = _Trial(times, now + rest_s)
        self._trials.move_to_end(node)
        if rest_s:
            heapq.heappush(self._ends, (now + rest_s, node))
        if len(self._trials) > MAX_REMEMBERED:
            self._trials.popitem(last=False)
