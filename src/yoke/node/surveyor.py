"""Measures the cluster's links, one after the other, as `yoke.node.survey` decides."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from yoke.core.clock import Clock
from yoke.core.node import Link, NodeId
from yoke.node import messages as say
from yoke.node.linkbook import LinkBook
from yoke.node.links import WorkerLink
from yoke.node.survey import Pair, Survey

PROBE_S, PAUSE_S = 10.0, 0.1


class Surveyor:
    """Asks workers to measure. ``links`` leads to those that are there; ``is_idle`` says whether anybody would be disturbed; ``book`` has what was measured before.

    ``is_done`` is set while there is nothing that was never tried.
    """

    def __init__(self, links: Mapping[NodeId, WorkerLink], own: NodeId, is_idle: Callable[[], bool], book: LinkBook, clock: Clock) -> None:
        self._links, self._own, self._is_idle, self._book, self._clock = links, own, is_idle, book, clock
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
            if self._recalled(pair):
                continue
            self._probed = asyncio.get_running_loop().create_future()
            self._links[pair[0]].post(say.Probe(id=pair[1]))
            found = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    found = await self._probed
            now_s = self._clock.monotonic()
            if found is not None and found.id == pair[1] and found.rtt_s > 0:
                self._survey.found(pair, found.rtt_s, found.send_bytes_per_s, found.receive_bytes_per_s, now_s)
                if (hosts := self._hosts(pair)) is not None:
                    self._book.keep(pair, hosts, found.rtt_s, found.send_bytes_per_s, found.receive_bytes_per_s)
            else:
                self._survey.failed(pair, now_s)

    def _recalled(self, pair: Pair) -> bool:
        """Whether what was measured by an earlier server will do, for a pair of which nothing is known yet."""
        hosts = self._hosts(pair)
        if hosts is None or any({link.source, link.target} == set(pair) for link in self._survey.links):
            return False
        one, other = pair
        if (kept := self._book.find(pair, hosts)) is not None:
            self._survey.found(pair, kept.rtt_s, kept.there_bytes_per_s, kept.back_bytes_per_s, self._clock.monotonic())
        elif (kept := self._book.find((other, one), hosts[::-1])) is not None:
            self._survey.found(pair, kept.rtt_s, kept.back_bytes_per_s, kept.there_bytes_per_s, self._clock.monotonic())
        return kept is not None

    def _hosts(self, pair: Pair) -> tuple[str, str] | None:
        """Where the two are; None if one has gone."""
        one, other = (self._links.get(node) for node in pair)
        return (one.host, other.host) if one is not None and other is not None else None
