"""A switch and its cables, decided: a frame and the time go in; frames come out, each when its time has come, and for whom.

Knows who is where, which cables are cut, what each does to packets, and what is under way. Knows nothing of devices, clocks or namespaces.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from heapq import heappop, heappush
from typing import NamedTuple

from yoke.core.errors import UserError
from yoke.testing.ethernet import address_of, cut, destination_of, is_group, measure
from yoke.testing.shape import DROPPED, Hop, Shape

MAX_MACHINES = 250


class Way(Enum):
    """A direction of a cable: from the machine, or to it."""

    UP = "up"
    DOWN = "down"


@dataclass(slots=True)
class Counts:
    """Packets since the start: that a machine sent, and that reached it; and of those that it sent: lost by chance, dropped by a full queue, stopped by a cut."""

    sent: int = 0
    sent_bytes: int = 0
    reached: int = 0
    lost: int = 0
    dropped: int = 0
    stopped: int = 0

    def numbers(self) -> dict[str, int]:
        """All of them by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class _Parcel(NamedTuple):
    """A frame under way from one machine; its first byte is ``span_s`` before its end."""

    source: int
    frame: bytes
    packets: int
    wire_bytes: int
    span_s: float


@dataclass(slots=True)
class _Port:
    """One machine's place at the switch."""

    name: str
    up: Hop
    down: Hop
    is_cut: bool = False
    counts: Counts = field(default_factory=Counts)


class Fabric:
    """Machines by index, in the order of ``cables``; each has a cable whose two directions are shaped apart.

    Every packet passes its sender's way up, the way between the two if that is shaped, and its receiver's way down, which takes packets in the order in
    which they have passed what was before.

    Parameters
    ----------
    cables : by the machine's name; both directions are alike to begin with.
    seed : decides every draw.

    Raises
    ------
    UserError
        if there are no machines, or too many.
    """

    def __init__(self, cables: Mapping[str, Shape], seed: int = 0) -> None:
        if not 1 <= len(cables) <= MAX_MACHINES:
            raise UserError(f"{len(cables)} machines at one switch; expected 1 to {MAX_MACHINES}")
        self._seed = seed
        self._ports = [_Port(name, self._hop(shape, name, "up"), self._hop(shape, name, "down")) for name, shape in cables.items()]
        self._indices = {name: index for index, name in enumerate(cables)}
        self._by_address = {address_of(index): (index,) for index in range(len(cables))}
        self._between: dict[tuple[int, int], Hop] = {}
        self._walls: set[tuple[int, int]] = set()
        # When, a number that decides between equals, for whom, what; and the time at which it comes to its way down, or None when it is through.
        self._heap: list[tuple[float, int, int, _Parcel, float | None]] = []
        self._number = 0

    def __repr__(self) -> str:
        cuts = [port.name for port in self._ports if port.is_cut]
        return f"Fabric({len(self._ports)} machines, {len(self._heap)} frames under way, cut: {', '.join(cuts) or 'none'}, {len(self._walls)} ways closed)"

    @property
    def next_s(self) -> float | None:
        """When `leave` has something to do next; None if nothing is under way."""
        return self._heap[0][0] if self._heap else None

    def counts(self) -> dict[str, Counts]:
        """What has become of each machine's packets."""
        return {port.name: port.counts for port in self._ports}

    def enter(self, now_s: float, source: int, frame: bytes) -> None:
        """Take a frame from a machine. Calls come in order of time."""
        port = self._ports[source]
        packets, wire_bytes = measure(frame)
        port.counts.sent += packets
        port.counts.sent_bytes += wire_bytes
        if port.is_cut:
            port.counts.stopped += packets
            return
        parcel = _Parcel(source, frame, packets, wire_bytes, wire_bytes / port.up.shape.bytes_per_s)
        at_s = port.up.carry(now_s, wire_bytes)
        destinations = self._destinations(source, frame)
        for part in self._survivors(port.up, at_s, parcel):
            for destination in destinations:
                between = self._between.get((source, destination))
                if between is None:
                    self._await_way_down(at_s, destination, part)
                else:
                    self._cross(between, at_s, destination, part)

    def leave(self, now_s: float) -> list[tuple[int, bytes]]:
        """What has come to its end by now, in order: the machine, and the frame."""
        heap = self._heap
        there: list[tuple[int, bytes]] = []
        while heap and heap[0][0] <= now_s:
            _, _, destination, parcel, arrival_s = heappop(heap)
            if arrival_s is not None:
                self._descend(arrival_s, destination, parcel)
            elif self._is_open(parcel.source, destination):
                self._ports[destination].counts.reached += parcel.packets
                there.append((destination, parcel.frame))
            else:
                self._ports[parcel.source].counts.stopped += parcel.packets
        return there

    def cut(self, names: Iterable[str]) -> None:
        """Nothing passes these machines' cables from now on; what is under way to or from them is lost."""
        for index in [self._index(name) for name in names]:
            self._ports[index].is_cut = True

    def mend(self, names: Iterable[str]) -> None:
        """Undo `cut`."""
        for index in [self._index(name) for name in names]:
            self._ports[index].is_cut = False

    def close(self, source: str, destination: str) -> None:
        """Nothing passes from the one to the other from now on; the way back stays as it is."""
        self._walls.add((self._index(source), self._index(destination)))

    def part(self, sets: Iterable[Iterable[str]]) -> None:
        """Machines of different sets cannot reach each other; a machine of no set reaches all.

        Raises
        ------
        UserError
            if a machine is in two sets.
        """
        homes: dict[int, int] = {}
        for number, names in enumerate(sets):
            for name in names:
                if homes.setdefault(self._index(name), number) != number:
                    raise UserError(f"the machine {name!r} is in two sets of a partition; put it into one")
        self._walls |= {(a, b) for a in homes for b in homes if homes[a] != homes[b]}

    def heal(self) -> None:
        """Undo every `close` and `part`."""
        self._walls.clear()

    def shape_of(self, name: str, way: Way) -> Shape:
        """What a machine's cable does now."""
        return self._way(name, way).shape

    def reshape(self, name: str, way: Way, shape: Shape) -> None:
        """Let a machine's cable do something else from now on."""
        self._way(name, way).reshape(shape)

    def shape_between(self, source: str, destination: str, shape: Shape) -> None:
        """Shape what goes from the one to the other, besides what their cables do."""
        pair = self._index(source), self._index(destination)
        if pair in self._between:
            self._between[pair].reshape(shape)
        else:
            self._between[pair] = self._hop(shape, source, destination)

    def _index(self, name: str) -> int:
        if name not in self._indices:
            raise UserError(f"there is no machine {name!r} at this switch; expected one of {', '.join(self._indices)}")
        return self._indices[name]

    def _way(self, name: str, way: Way) -> Hop:
        port = self._ports[self._index(name)]
        return port.up if way is Way.UP else port.down

    def _hop(self, shape: Shape, *place: str) -> Hop:
        return Hop(shape, random.Random("/".join((str(self._seed), *place))))  # noqa: S311 - the same draws for the same seed are what is wanted

    def _is_open(self, source: int, destination: int) -> bool:
        ports = self._ports
        return not (ports[source].is_cut or ports[destination].is_cut or (source, destination) in self._walls)

    def _destinations(self, source: int, frame: bytes) -> Iterable[int]:
        address = destination_of(frame)
        found = self._by_address.get(address)
        if found is not None:
            return found
        return [other for other in range(len(self._ports)) if other != source] if is_group(address) else ()

    def _cross(self, between: Hop, at_s: float, destination: int, parcel: _Parcel) -> None:
        """The way between two machines, where there is more than their cables."""
        later_s = between.carry(at_s, parcel.wire_bytes, parcel.span_s)
        for part in self._survivors(between, later_s, parcel):
            self._await_way_down(later_s, destination, part._replace(span_s=max(part.span_s, part.wire_bytes / between.shape.bytes_per_s)))

    def _await_way_down(self, at_s: float, destination: int, parcel: _Parcel) -> None:
        # It is looked at again when it could be through at the soonest: mostly it is, so the device's process need not wake twice. The shift is the same for
        # all that wait for this way down, so they come to it in the order in which they reach the switch.
        self._number += 1
        heappush(self._heap, (at_s + self._ports[destination].down.least_s, self._number, destination, parcel, at_s))

    def _descend(self, at_s: float, destination: int, parcel: _Parcel) -> None:
        down = self._ports[destination].down
        later_s = down.carry(at_s, parcel.wire_bytes, parcel.span_s)
        for part in self._survivors(down, later_s, parcel):
            self._number += 1
            heappush(self._heap, (later_s, self._number, destination, part, None))

    def _survivors(self, hop: Hop, end_s: float, parcel: _Parcel) -> Iterable[_Parcel]:
        """What a way leaves of a frame: nothing if the queue was full, else what is not lost."""
        counts = self._ports[parcel.source].counts
        if end_s == DROPPED:
            counts.dropped += parcel.packets
            return ()
        kept = hop.survivors(parcel.packets)
        if kept is None:
            return (parcel,)
        counts.lost += parcel.packets - sum(map(len, kept))
        if parcel.packets == 1:
            return ()
        # The parts are at the end together, with the last of the frame; each has been coming since its own first packet.
        spans_s = [parcel.span_s * (1 - each.start / parcel.packets) for each in kept]
        frames = [cut(parcel.frame, each) for each in kept]
        return [_Parcel(parcel.source, frame, *measure(frame), span_s) for frame, span_s in zip(frames, spans_s, strict=True)]
