"""What of the network is within reach of this machine: a coordinator, its clock, our own ports and name, and the interface that leads there.

Looks without saying anything: to a coordinator no more than TLS does. Knows nothing of what anybody concludes from it.
"""

import contextlib
import email.utils
import errno
import http.client
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from yoke.core.errors import RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.identity import certificate_id, joining_client_context
from yoke.net.sockets import open_connection, secure

REACH_S, NAME_S, HTTP_S = 5.0, 5.0, 2.0
MAX_ANSWER_BYTES = 1 << 16
_FAR = "192.0.2.1"  # reserved for documentation (RFC 5737): nobody has it, so what is asked is the way to the internet

ResultT = TypeVar("ResultT")


class Outcome(StrEnum):
    """What happened when somebody was called."""

    REACHED = "reached"
    ANOTHER_KEY = "another key"
    NOT_YOKE = "not yoke"
    REFUSED = "refused"
    SILENT = "silent"
    NO_WAY = "no way"
    NO_SUCH_NAME = "no such name"


class PortUse(StrEnum):
    """Who has a port of this machine."""

    FREE = "free"
    YOKE = "yoke"
    OTHER = "other"
    FORBIDDEN = "forbidden"
    NOT_HERE = "not here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One try to reach a coordinator. ``seconds`` is how long TCP and TLS took, ``skew_s`` how far its clock is ahead of ours, where that is known."""

    host: str
    port: int
    outcome: Outcome
    seconds: float
    skew_s: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """The network interface that leads somewhere. ``mbit_per_s`` is what it says of itself; 0 where it says nothing."""

    name: str
    is_wireless: bool | None
    mbit_per_s: int


def call_all(hosts: Sequence[str], port: int, expected: NodeId, api_port: int) -> tuple[Call, ...]:
    """Call a coordinator at each of its addresses, at once, and ask the clock of the first that answers: at ``api_port``, if its API is open to this machine."""
    calls = within([partial(call, host, port, expected) for host in hosts], REACH_S + NAME_S)
    found = [made or Call(host=host, port=port, outcome=Outcome.SILENT, seconds=REACH_S) for host, made in zip(hosts, calls, strict=True)]
    for index, made in enumerate(found):
        if made.outcome is Outcome.REACHED:
            found[index] = replace(made, skew_s=clock_skew(made.host, api_port))
            break
    return tuple(found)


def call(host: str, port: int, expected: NodeId) -> Call:
    """Connect to a coordinator, compare its key, and hang up."""
    started = time.monotonic()

    def ended(outcome: Outcome, detail: object = "") -> Call:
        return Call(host=host, port=port, outcome=outcome, seconds=time.monotonic() - started, detail=str(detail))

    try:
        connection = open_connection(host, port, started + REACH_S)
        with secure(joining_client_context(), connection, False, started + REACH_S, lambda: False) as secured:
            found = certificate_id(secured.getpeercert(binary_form=True) or b"")
    except (socket.gaierror, UnicodeError) as error:
        return ended(Outcome.NO_SUCH_NAME, error)
    except ConnectionRefusedError as error:
        return ended(Outcome.REFUSED, error)
    except TimeoutError as error:
        return ended(Outcome.SILENT, error)
    except (ssl.SSLError, ConnectionError, RemoteProtocolError) as error:
        return ended(Outcome.NOT_YOKE, error)
    except OSError as error:
        return ended(Outcome.NO_WAY, error)
    return ended(Outcome.REACHED if found == expected else Outcome.ANOTHER_KEY, found)


def clock_skew(host: str, port: int) -> float | None:
    """Seconds that the clock of a machine is ahead of ours, true to a second, from the date that its HTTP server writes; None if it has none that answers."""
    asked = time.time()
    answer = _ask(host, port)
    date = answer[1] if answer is not None else None
    try:
        there = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, OverflowError):
        return None
    return there + 0.5 - (asked + time.time()) / 2  # the date's seconds are cut off


def port_use(host: str, port: int) -> PortUse:
    """Who has ``port`` at this machine's address ``host``; 0 is a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(address[:2], family=family).close()
    except PermissionError:
        return PortUse.FORBIDDEN
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return PortUse.NOT_HERE
        answer = _ask(host, port)
        return PortUse.YOKE if answer is not None and answer[0] else PortUse.OTHER
    return PortUse.FREE


def addresses_of(name: str) -> tuple[str, ...] | None:
    """The addresses that a name leads to, none if it leads nowhere; None if nobody said so in `NAME_S`."""

    def ask() -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
        except (OSError, UnicodeError):
            return ()

    return within([ask], NAME_S)[0]


def interface_towards(host: str = _FAR) -> Interface | None:
    """The interface that packets to ``host`` leave by; None if none leads there. Nothing is sent."""
    own = ""
    with contextlib.suppress(OSError, UnicodeError):
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect(address)
            own = str(asking.getsockname()[0]).partition("%")[0]
    for name, entries in psutil.net_if_addrs().items():
        if own and any(entry.address.partition("%")[0] == own for entry in entries):
            status = psutil.net_if_stats().get(name)
            return Interface(name=name, is_wireless=_is_wireless(name), mbit_per_s=max(0, status.speed) if status is not None else 0)
    return None


def within(works: Sequence[Callable[[], ResultT]], seconds: float) -> list[ResultT | None]:
    """The results of several waits at once, None for each that did not end in time: what asks a resolver cannot be interrupted, so it is left behind."""
    results: queue.Queue[tuple[int, ResultT]] = queue.Queue()

    def run(index: int, work: Callable[[], ResultT]) -> None:
        results.put((index, work()))

    for each in enumerate(works):
        threading.Thread(target=run, args=each, name="yoke-look", daemon=True).start()
    found: list[ResultT | None] = [None] * len(works)
    stop = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        for _ in works:
            index, result = results.get(timeout=max(0.0, stop - time.monotonic()))
            found[index] = result
    return found


def _is_wireless(name: str) -> bool | None:
    """Whether an interface is a radio; None where the system does not tell (only Linux does)."""
    card = Path("/sys/class/net") / name
    return any((card / mark).exists() for mark in ("wireless", "phy80211")) if card.exists() else None


def _ask(host: str, port: int) -> tuple[bool, str | None] | None:
    """Whether what listens there answers over HTTP as Yoke does, and the date that it writes; None if it does not speak HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=HTTP_S)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        body = json.loads(response.read(MAX_ANSWER_BYTES))
        return isinstance(body, dict) and bool({"status", "error"} & body.keys()), response.getheader("Date")
    except ValueError:
        return False, response.getheader("Date")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
