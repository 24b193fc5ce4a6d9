"""Six digits, read from one machine's screen and typed at another, by which both learn each other's key with nobody in between.

SPAKE2 (Abdalla and Pointcheval 2005; RFC 9382 describes the same protocol) turns the digits into a strong key without showing them: whoever listens learns
nothing, and whoever is in between gets one guess for each exchange that he spoils. The exchange is bound to both nodes' ids and to a transcript that the caller
gives. Both sides then prove that they have the key, the newcomer first, so that a stranger who guesses learns nothing but that he was wrong.

Knows no socket and no clock. Does not know how the messages travel (`yoke.node.admission`), or which ids are right: that is what the two sides find out.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from yoke.core.errors import AdmissionError, RemoteProtocolError, UserError
from yoke.core.node import NodeId

CODE_DIGITS = 6
CODE_S = 600.0
"""How long a code may be used, in seconds."""

TRIES = 3
"""Exchanges that may be begun with one code: a guesser succeeds three times in a million."""

MESSAGE_BYTES = 32
CONFIRMATION_BYTES = 32

_NEWCOMER, _HOST = b"A", b"B"  # the library's names for the two sides; they are said by who speaks, so they do not travel
_CONTEXT = b"yoke pairing 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A code that is open: ``expires_s`` is of the clock that `Codes` is asked with."""

    digits: str
    expires_s: float
    tries_left: int = TRIES

    def __str__(self) -> str:
        half = CODE_DIGITS // 2
        return f"{self.digits[:half]} {self.digits[half:]}"


class Codes:
    """The first machine's code: at most one is open at a time. ``draw`` gives a number below its argument, by chance."""

    def __init__(self, draw: Callable[[int], int] = secrets.randbelow) -> None:
        self._draw = draw
        self._code: Code | None = None

    def open(self, now_s: float) -> Code:
        """A new code; an older one ends."""
        digits = f"{self._draw(10**CODE_DIGITS):0{CODE_DIGITS}d}"
        self._code = Code(digits=digits, expires_s=now_s + CODE_S)
        return self._code

    def current(self, now_s: float) -> Code | None:
        """The code with which an exchange may be begun now."""
        code = self._code
        return code if code is not None and now_s < code.expires_s and code.tries_left > 0 else None

    def begin(self, now_s: float) -> Code | None:
        """The code for one exchange, or None if none is open.

        The try counts from here on: exchanges at the same time get no more guesses than one after the other, and one that is broken off counts too.
        """
        code = self.current(now_s)
        if code is not None:
            self._code = replace(code, tries_left=code.tries_left - 1)
        return code

    def redeem(self, code: Code) -> bool:
        """Use ``code`` up after an exchange that went well. False if it was used or closed meanwhile, or replaced by another."""
        is_good = self._code is not None and (self._code.digits, self._code.expires_s) == (code.digits, code.expires_s)
        if is_good:
            self._code = None
        return is_good

    def close(self) -> None:
        """End the code: it shall not be used."""
        self._code = None


def read_code(text: str) -> str:
    """The digits of a code as a person types it; spaces and hyphens do no harm.

    Raises
    ------
    UserError
        if it is not six digits.
    """
    digits = "".join(text.split()).replace("-", "")
    if len(digits) != CODE_DIGITS or not (digits.isascii() and digits.isdigit()):
        raise UserError(f"this is not a code: found {text.strip()[:40]!r}, expected the {CODE_DIGITS} digits that the first machine shows")
    return digits


class Exchange:
    """One side of one exchange.

    Parameters
    ----------
    digits : the code.
    newcomer, host : the two nodes, as this side sees them.
    is_host : whether this is the machine that shows the code.
    """

    def __init__(self, digits: str, newcomer: NodeId, host: NodeId, *, is_host: bool) -> None:
        from spake2 import SPAKE2_A, SPAKE2_B  # here, because it takes 36 ms, and few commands pair

        kind, self._other = (SPAKE2_B, _NEWCOMER) if is_host else (SPAKE2_A, _HOST)
        self._is_host = is_host
        self._side = kind(digits.encode(), idA=newcomer.encode(), idB=host.encode())
        self.message: bytes = self._side.start()[1:]
        """What the other side has to get: 32 bytes, different each time."""

    def finish(self, message: bytes, transcript: bytes) -> tuple[bytes, bytes]:
        """The confirmation that this side shows, and the one that the other side must. Can be called once.

        Parameters
        ----------
        message : what the other side sent, 32 bytes.
        transcript : what else both sides must have seen alike.

        Raises
        ------
        RemoteProtocolError
            if the message is none that the protocol could have made.
        """
        from spake2 import SPAKEError
        from spake2.ed25519_basic import NotOnCurve

        if len(message) != MESSAGE_BYTES:
            raise RemoteProtocolError(f"a pairing message of {len(message)} bytes; expected {MESSAGE_BYTES}")
        try:
            key: bytes = self._side.finish(self._other + message)
        except (SPAKEError, NotOnCurve, ValueError) as error:
            raise RemoteProtocolError(f"bytes that are no pairing message: {error!r}") from error
        seen = _CONTEXT + hashlib.sha256(transcript).digest()
        newcomers, hosts = (hmac.digest(key, seen + role, "sha256") for role in (_NEWCOMER, _HOST))
        return (hosts, newcomers) if self._is_host else (newcomers, hosts)


def check_confirmation(shown: bytes, expected: bytes) -> None:
    """In constant time.

    Raises
    ------
    AdmissionError
        if they differ: the codes do, or somebody is in between.
    """
    if not hmac.compare_digest(shown, expected):
        raise AdmissionError(
            "the code is not the one that the first machine shows, or another machine is in between; type the code again, or ask for a new one there"
        )
