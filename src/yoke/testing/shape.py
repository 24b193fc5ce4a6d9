"""What a cable or a radio does to packets, as values and one pure queue: delay, jitter, loss, rate, a bounded queue, spikes.

Knows arrival times, sizes and chance; knows nothing of sockets, devices, clocks or what is in a packet.
"""

import math
import random
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

from yoke.core.errors import UserError

MEGABIT = 125_000.0
"""Bytes a second of one Mbit/s."""
DROPPED = math.inf
"""The time at which a packet arrives that a full queue has dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One direction of one cable: between a machine and the switch.

    Parameters
    ----------
    delay_s : how long a packet is under way, in seconds, once it has been sent.
    jitter_s : the delay is drawn evenly between ``delay_s - jitter_s`` and ``delay_s + jitter_s``.
    loss : the share of packets that are lost on the way, each by its own draw.
    bytes_per_s : what goes through in a second, with all headers; infinite is no limit.
    queue_s : a packet that would have to wait longer for its turn is dropped.
    spikes_per_s : how often the cable stands still, as a mean; the times between are drawn.
    spike_s : for how long it stands still then.
    keeps_order : packets wait for those before them, however jitter has fallen.

    Raises
    ------
    UserError
        if a number is out of bounds.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = math.inf
    queue_s: float = 0.25
    spikes_per_s: float = 0.0
    spike_s: float = 0.2
    keeps_order: bool = True

    def __post_init__(self) -> None:
        for name in ("delay_s", "jitter_s", "queue_s", "spikes_per_s", "spike_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"a cable's {name} is {getattr(self, name)}; expected a number from 0 up")
        if not self.jitter_s <= self.delay_s:
            raise UserError(f"a cable's jitter is {self.jitter_s} s and its delay {self.delay_s} s; no packet can arrive before it was sent: take less jitter")
        if not 0 <= self.loss < 1:
            raise UserError(f"a cable's loss is {self.loss}; expected a share from 0 to less than 1; to lose everything, cut the cable")
        if not self.bytes_per_s > 0:
            raise UserError(f"a cable's bytes_per_s is {self.bytes_per_s}; expected more than 0; to stop everything, cut the cable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A network by name: the first machine has the first cable, and so on, from the start again when there are more machines. Both directions are alike.

    Raises
    ------
    UserError
        if there is no cable.
    """

    name: str
    cables: tuple[Shape, ...]

    def __post_init__(self) -> None:
        if not self.cables:
            raise UserError(f"the network {self.name!r} has no cables; expected one at least")

    def cables_for(self, count: int) -> tuple[Shape, ...]:
        """The cables of ``count`` machines, in order."""
        return tuple(islice(cycle(self.cables), count))


# A packet passes two cables each way, and four on a round trip: each has a quarter of the round trip's delay and jitter, and half of a way's loss.
_ETHERNET = Shape(delay_s=0.2e-3 / 4, bytes_per_s=1000 * MEGABIT)
_RADIO = Shape(delay_s=3e-3 / 4, jitter_s=3e-3 / 4, loss=1 - math.sqrt(1 - 0.01), bytes_per_s=100 * MEGABIT)

WIRED = Profile(name="wired", cables=(_ETHERNET,))
"""A home's cables: round trip 0.2 ms, 1 Gbit/s."""
WIFI = Profile(name="wifi", cables=(_RADIO,))
"""Every machine on Wi-Fi: round trip 3 ms, give or take 3 ms, 1 % of packets lost each way, 100 Mbit/s."""
MIXED = Profile(name="mixed", cables=(_ETHERNET, _RADIO))
"""Machines by turns on a cable and on Wi-Fi; between the two kinds: 1.6 ms, give or take 1.5 ms, 0.5 % lost each way."""
PROFILES = {profile.name: profile for profile in (WIRED, WIFI, MIXED)}


class Hop:
    """The queue and the way of one direction of a cable: arrival times in, times at the other end out. Calls come in order of arrival.

    Parameters
    ----------
    shape : what the cable does.
    chance : where draws come from; the same state gives the same times and losses.
    """

    def __init__(self, shape: Shape, chance: random.Random) -> None:
        self._chance = chance
        self._free_s = -math.inf  # when the last byte so far is sent
        self._last_s = -math.inf  # when it is at the other end
        self._spike_end_s = -math.inf
        self.reshape(shape)

    def reshape(self, shape: Shape) -> None:
        """Do something else to packets from now on; those under way are not overtaken."""
        self.shape = shape
        self.least_s = shape.delay_s - shape.jitter_s
        self._wait_s = shape.queue_s + (shape.spike_s if shape.spikes_per_s else 0.0)
        self._next_spike_s = -math.inf if shape.spikes_per_s else math.inf

    def carry(self, arrival_s: float, n_bytes: int, span_s: float = 0.0) -> float:
        """When packets of ``n_bytes`` together are at the other end; `DROPPED` if the queue is full.

        Their last byte came at ``arrival_s``, and they took ``span_s`` to come: sending them may begin with the first byte, but cannot end before the last.
        """
        shape = self.shape
        begin_s = arrival_s - span_s
        start_s = max(self._free_s, begin_s)
        if shape.spikes_per_s:
            start_s = self._after_spikes(start_s)
        if start_s - begin_s > self._wait_s:
            return DROPPED
        self._free_s = start_s + n_bytes / shape.bytes_per_s
        end_s = max(self._free_s, arrival_s) + shape.delay_s
        if shape.jitter_s:
            end_s += self._chance.uniform(-shape.jitter_s, shape.jitter_s)
        if shape.keeps_order and end_s < self._last_s:
            end_s = self._last_s
        self._last_s = end_s
        return end_s

    def survivors(self, count: int) -> list[range] | None:
        """Which of ``count`` packets are not lost, as ranges without gaps; None if all of them arrive."""
        if not self.shape.loss:
            return None
        lost = [index for index in range(count) if self._chance.random() < self.shape.loss]
        if not lost:
            return None
        borders = [-1, *lost, count]
        return [range(low + 1, high) for low, high in pairwise(borders) if low + 1 < high]

    def _after_spikes(self, at_s: float) -> float:
        """``at_s``, or the end of the spike that covers it."""
        if self._next_spike_s == -math.inf:  # the first one is drawn when time is known
            self._next_spike_s = at_s + self._chance.expovariate(self.shape.spikes_per_s)
        while self._next_spike_s <= at_s:
            self._spike_end_s = self._next_spike_s + self.shape.spike_s
            self._next_spike_s = self._spike_end_s + self._chance.expovariate(self.shape.spikes_per_s)
        return max(at_s, self._spike_end_s)
