"""Time as an argument: what needs the time takes a :class:`Clock`."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment, never going back."""

    def epoch(self) -> float:
        """Seconds since 1970-01-01 UTC."""


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """Seconds since the machine started, or thereabouts."""
        return time.monotonic()

    def epoch(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()
