"""How often strangers may knock and guess: token buckets, for each source address and for all together. Knows no socket; the time is an argument."""

from collections import OrderedDict
from dataclasses import dataclass

from yoke.net.strangers import source

KNOCKS, KNOCKS_PER_S = 30.0, 2.0
"""What one address may do at once and for long. A member that lost its cluster knocks once in 5 s; eight behind one router, at once."""

WRONG_COST = 5.0
"""What a wrong secret, code or signature costs its address, in knocks."""

GUESSES, GUESSES_PER_S = 100.0, 1.0
"""Wrong secrets and codes of all addresses together. Members that come back with their keys are not held up by it."""

MAX_SOURCES = 4096
"""Addresses remembered; the one that has been quiet for longest is forgotten first."""


@dataclass(slots=True)
class Bucket:
    """``level`` tokens at ``at_s`` seconds, filling up at ``per_s`` tokens a second to at most ``most``."""

    most: float
    per_s: float
    level: float
    at_s: float

    @classmethod
    def full(cls, most: float, per_s: float, now_s: float) -> "Bucket":
        """A bucket that nobody has taken from."""
        return cls(most, per_s, most, now_s)

    def fill(self, now_s: float) -> float:
        """The level now. A clock that goes back adds nothing."""
        self.level = min(self.most, self.level + max(0.0, now_s - self.at_s) * self.per_s)
        self.at_s = max(self.at_s, now_s)
        return self.level

    def take(self, cost: float, now_s: float) -> bool:
        """Whether there was so much, and it was taken."""
        if self.fill(now_s) < cost:
            return False
        self.level -= cost
        return True

    def drain(self, cost: float, now_s: float) -> None:
        """Take so much, or what there is."""
        self.level = max(0.0, self.fill(now_s) - cost)


class Turnstile:
    """Who may knock now."""

    def __init__(self) -> None:
        self._sources: OrderedDict[str, Bucket] = OrderedDict()
        self._guesses: Bucket | None = None

    def __len__(self) -> int:
        return len(self._sources)

    def may_knock(self, host: str, now_s: float) -> bool:
        """Whether ``host`` may knock once more. Asked before a byte is read."""
        return self._source(host, now_s).take(1.0, now_s)

    def may_guess(self, now_s: float) -> bool:
        """Whether secrets and codes are looked at now."""
        return self._all(now_s).fill(now_s) >= 1.0

    def wrong(self, host: str, now_s: float) -> None:
        """``host`` guessed wrong."""
        self._source(host, now_s).drain(WRONG_COST, now_s)
        self._all(now_s).drain(1.0, now_s)

    def _all(self, now_s: float) -> Bucket:
        if self._guesses is None:
            self._guesses = Bucket.full(GUESSES, GUESSES_PER_S, now_s)
        return self._guesses

    def _source(self, host: str, now_s: float) -> Bucket:
        name = source(host)
        if (bucket := self._sources.get(name)) is None:
            bucket = self._sources[name] = Bucket.full(KNOCKS, KNOCKS_PER_S, now_s)
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(name)
        return bucket
