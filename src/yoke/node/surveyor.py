"""Measures the cluster's links, one after the other, as `yoke.node.survey` decides."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from yoke.core.clock import Clock
from yoke.core.node import Link, NodeId
from yoke.node import messages as say
from yoke.node.links import WorkerLink
from yoke.node.survey import Survey

PROBE_S, PAUSE_S = 10.0, 0.1


class Surveyor:
    """Asks workers to measure. ``links`` leads to those that are there; ``is_idle`` says whether anybody would be disturbed.

    ``is_done`` is set while there is nothing that was never tried.
    """

    def __init__(self, links: Mapping[NodeId, WorkerLink], own: NodeId, is_idle: Callable[[], bool], clock: Clock) -> None:
        self._links, self._own, self._is_idle, self._clock = links, own, is_idle, clock
        self._survey = Survey()
        self._probed: asyncio.Future[say.Probed] | None = None
        self.is_done = asyncio.Event()

    @property
    def links(self) -> tuple[Link, ...]:
        """What was measured between those that are there."""
        return tuple(link for link in self._survey.links if link.source in self._links and link.target in self._links)

    def hear(self, found: say.Probed) -> None:
        """A worker has measured."""
        if self._probed is not None and not self._probed.done():
            self._probed.set_result(found)

    async def run(self) -> None:
        """Measure for ever."""
        while True:
            nodes = sorted(self._links, key=lambda node: node != self._own)
            self._survey.keep(nodes)
            pair = self._survey.next(nodes, self._clock.monotonic(), is_idle=self._is_idle()) if nodes else None
            if pair is None:
                self.is_done.set()
                await asyncio.sleep(PAUSE_S)
                continue
            self.is_done.clear()
            self._probed = asyncio.get_running_loop().create_future()
            self._links[pair[0]].post(say.Probe(id=pair[1]))
            found = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    found = await self._probed
            now_s = self._clock.monotonic()
            if found is not None and found.id == pair[1] and found.rtt_s > 0:
                self._survey.found(pair, found.rtt_s, found.send_bytes_per_s, found.receive_bytes_per_s, now_s)
            else:
                self._survey.failed(pair, now_s)
