"""Links between machines that were measured before, kept in the coordinator's directory: a cluster that starts again need not measure them again.

A measurement is for two nodes at the two addresses that they had then, and holds for `MAX_AGE_S`: a laptop that has gone from the cable to the radio has another.
The file is a copy of what can be measured again: one that cannot be read is no fault, and is written anew.
"""

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec

from yoke.core.clock import Clock
from yoke.core.node import NodeId
from yoke.weights.manifest import write_whole

FILE_NAME = "links.json"
MAX_AGE_S = 7 * 86400.0
MAX_FILE_BYTES, MAX_LINKS = 1 << 20, 2048

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class KeptLink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pair of nodes, where they were, the round trip, and bytes a second from the first to the second and back. ``measured_at`` is seconds since the epoch."""

    nodes: tuple[NodeId, NodeId]
    hosts: tuple[str, str]
    rtt_s: Positive
    there_bytes_per_s: Positive
    back_bytes_per_s: Positive
    measured_at: float


class LinkBook:
    """The links in one file."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._path, self._clock = directory / FILE_NAME, clock
        self._links = {link.nodes: link for link in _read(self._path)}

    def find(self, nodes: tuple[NodeId, NodeId], hosts: tuple[str, str]) -> KeptLink | None:
        """What was measured between these nodes at these addresses, if it is not too old."""
        link = self._links.get(nodes)
        if link is None or link.hosts != hosts or not 0 <= self._clock.epoch() - link.measured_at <= MAX_AGE_S:
            return None
        return link

    def keep(self, nodes: tuple[NodeId, NodeId], hosts: tuple[str, str], rtt_s: float, there_bytes_per_s: float, back_bytes_per_s: float) -> None:
        """Remember a measurement; the oldest are forgotten when there are too many. A full disk costs nothing but measuring again."""
        link = KeptLink(
            nodes=nodes, hosts=hosts, rtt_s=rtt_s, there_bytes_per_s=there_bytes_per_s, back_bytes_per_s=back_bytes_per_s, measured_at=self._clock.epoch()
        )
        newest = sorted((old for old in self._links.values() if old.nodes != nodes), key=lambda old: -old.measured_at)
        self._links = {each.nodes: each for each in (link, *newest[: MAX_LINKS - 1])}
        with contextlib.suppress(OSError):
            write_whole(self._path, msgspec.json.encode(list(self._links.values())))


def _read(path: Path) -> list[KeptLink]:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_FILE_BYTES), type=list[KeptLink])[:MAX_LINKS]
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
