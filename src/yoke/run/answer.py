"""From drawn tokens to text: whole UTF-8 characters, and nothing of a stop string."""

from yoke.weights.tokenizer import IncrementalDecoder


class AnswerText:
    """The text of one answer as it grows.

    Text that might be the beginning of a stop string is held back until it is known not to be; once a stop string is complete, ``is_stopped`` is set and the
    answer ends before it.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._decoder = IncrementalDecoder()
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def feed(self, piece: bytes) -> str:
        """Text that is now certain, after one more token's bytes."""
        return self._certain(self._decoder.feed(piece))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.is_stopped:
            return ""
        rest = self._certain(self._decoder.flush())
        held, self._held = self._held, ""
        return rest if self.is_stopped else rest + held

    def _certain(self, text: str) -> str:
        self._held += text
        found = [(index + len(stop), index) for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, so that the text does not depend on how it was cut into tokens
            self.is_stopped = True
            return self._held[: min(found)[1]]
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain = self._held[: len(self._held) - hold]
        self._held = self._held[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
