"""The port that strangers may knock at: accepts, holds off, hears out, and hands over whoever was let in.

A stranger costs a place among `MAX_KNOCKS`, for at most `ADMISSION_S`, and little memory. When all places are taken, the address that holds most of them gives
the one that it has held for longest: an introduction takes some milliseconds, so that those who dawdle lose their places to those who do not. An address that
knocks or guesses too often (`yoke.node.turnstile`) is hung up on before TLS. Strangers are let begin one after another, `PACE_S` apart, so that their
handshakes leave room for what members say in the same process.

Decides nothing about membership (`yoke.node.membership`), and knows nothing of what members say.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import NodeGone, SettingError, YokeError
from yoke.core.node import NodeId
from yoke.net.addresses import local_addresses
from yoke.net.identity import Identity, admission_server_context
from yoke.net.invite import MAX_HOSTS, Invite
from yoke.net.pairing import Code, Codes
from yoke.net.strangers import source
from yoke.node.admission import ADMISSION_S, Host, Stream, hear
from yoke.node.membership import Membership
from yoke.node.roster import Applicant, Member, Refused, Why
from yoke.node.turnstile import Turnstile

MAX_KNOCKS = 16
"""Strangers that may be introducing themselves at once."""

STREAM_BYTES = 1 << 16
"""What is read ahead from a stranger, or a member; longer messages arrive in parts."""

FAREWELL_S = 1.0
"""How long a refused stranger may take to hear why."""

PACE_S = 0.005
"""Between two strangers. One costs 1 to 2 ms of processor time (measured, one core of an AMD EPYC), mostly for TLS."""

RETRY_S = 0.1

_WRONG = frozenset({Why.NOT_INVITED, Why.UNKNOWN, Why.REMOVED, Why.WRONG_CODE, Why.FORGED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A machine that was let in, and its connection."""

    id: NodeId
    certificate: bytes
    host: str
    stream: Stream


@dataclass(slots=True)
class Counts:
    """What has happened at the door."""

    knocks: int = 0
    admitted: int = 0
    refused: int = 0
    """Heard, and told why not."""

    broken: int = 0
    """Did not finish their introduction: noise, slowness, hanging up."""

    held_off: int = 0
    """Hung up on before TLS, because their address had knocked or guessed too often."""

    displaced: int = 0
    """Made room for others."""


Welcome = Callable[[Guest], Awaitable[None]]


class Door:
    """The coordinator's port for newcomers. Use it as an async context manager: at its end nobody is heard any more, and whoever was handed over stays.

    Parameters
    ----------
    identity : this node's key.
    membership : who belongs to the cluster.
    address : where to listen. Port 0 is the port of the last time if that is free, so that members find it again, else any.
    welcome : takes over a guest. If it raises `YokeError` or `TimeoutError`, the guest's connection is closed.
    is_connected : whether a node with this key is here already.
    note : told in a sentence what somebody should look after.
    """

    def __init__(
        self,
        identity: Identity,
        membership: Membership,
        address: tuple[str, int],
        welcome: Welcome,
        is_connected: Callable[[NodeId], bool],
        *,
        note: Callable[[str], None] = lambda _text: None,
        clock: Clock | None = None,
    ) -> None:
        self._identity, self._membership, self._address = identity, membership, address
        self._welcome, self._is_connected, self._note = welcome, is_connected, note
        self._clock = clock or SystemClock()
        self._codes, self._turnstile = Codes(), Turnstile()
        self._host = Host(identity.id, identity.certificate_der)
        self._context = admission_server_context(identity)
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], str] = {}  # and whose they are; the oldest first
        self._guests: dict[NodeId, asyncio.Task[None]] = {}
        self.counts = Counts()

    async def __aenter__(self) -> Self:
        """Listen.

        Raises
        ------
        SettingError
            if the address cannot be listened on.
        """
        host, port = self._address
        self._socket = _listen(host, port, self._membership.port)
        self._address = host, self._socket.getsockname()[1]
        try:
            self._membership.keep_port(self._address[1])
        except BaseException:
            self._socket.close()
            raise
        self._start(self._accept_all())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()
        self._codes.close()

    @property
    def node(self) -> NodeId:
        """Whose door it is."""
        return self._identity.id

    @property
    def hosts(self) -> tuple[str, ...]:
        """The addresses at which this machine answers, best first."""
        host = self._address[0]
        return local_addresses(MAX_HOSTS) if host in {"", "0.0.0.0", "::"} else (host,)  # noqa: S104 (compared with, not bound to)

    @property
    def port(self) -> int:
        """Where newcomers knock."""
        return self._address[1]

    def invite(self, uses: int = 1, valid_s: float = 86400.0, label: str = "", *, is_lasting: bool = True) -> Invite:
        """A new invite: see `Membership.invite`.

        Raises
        ------
        RequestError
            if a number is out of bounds, or there are too many invites.
        """
        return self._membership.invite(self.hosts, self.port, uses=uses, valid_s=valid_s, label=label, is_lasting=is_lasting)

    def open_code(self) -> Code:
        """A new six-digit code, for one machine; an older one ends. Only when a person asks: a code that renews itself can be guessed at for ever."""
        return self._codes.open(self._clock.monotonic())

    def close_code(self) -> None:
        """No code is open."""
        self._codes.close()

    def remove(self, name: str) -> Member:
        """Put a machine out: its key, all open invites and the code are worth nothing from here on. The caller ends the connection that it was given.

        Raises
        ------
        RequestError
            if there is none of that name.
        """
        gone = self._membership.remove(name)
        self._codes.close()
        if (welcoming := self._guests.get(gone.id)) is not None:
            welcoming.cancel()
        return gone

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:  # a fault of ours: told, and the door stays open
            asyncio.get_running_loop().call_exception_handler({"message": "a knock ended in an error of this program", "exception": error, "task": task})

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._socket)
            except OSError:  # the caller was gone before we looked, or the system is out of descriptors
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(PACE_S if self._receive(connection, str(address[0])) else 0)  # also for 0, everybody else has a turn

    def _receive(self, connection: socket.socket, host: str) -> bool:
        """Whether the caller may begin."""
        self.counts.knocks += 1
        if not self._turnstile.may_knock(host, self._clock.monotonic()):
            self.counts.held_off += 1
            connection.close()
            return False
        if len(self._strangers) >= MAX_KNOCKS:
            self._displace()
        visit = _Visit(connection)
        task = self._start(self._attend(visit, host))
        self._strangers[task] = source(host)

        def ended(_: asyncio.Task[None]) -> None:
            """Not in the task itself: it may be cancelled before its first step."""
            self._strangers.pop(task, None)
            visit.end()

        task.add_done_callback(ended)
        return True

    def _displace(self) -> None:
        """One stranger has to go: of the address with most places, the oldest."""
        held = Counter(self._strangers.values())
        task = max(self._strangers, key=lambda stranger: held[self._strangers[stranger]])  # max() takes the first of equals
        del self._strangers[task]
        self.counts.displaced += 1
        task.cancel()

    async def _attend(self, visit: "_Visit", host: str) -> None:
        """One knock, from the first byte to the hand-over."""
        applicant = await self._hear(visit, host)
        own = asyncio.current_task()
        if applicant is None or own is None or applicant.id in self._guests:
            return
        self._strangers.pop(own, None)
        self.counts.admitted += 1
        self._guests[applicant.id] = own
        try:
            await self._welcome(Guest(id=applicant.id, certificate=applicant.certificate, host=applicant.host, stream=visit.stream))
            visit.is_handed_over = True
        except (YokeError, TimeoutError):
            self.counts.broken += 1
        finally:
            del self._guests[applicant.id]

    async def _hear(self, visit: "_Visit", host: str) -> Applicant | None:
        """Who was let in; None if nobody was."""
        try:
            async with asyncio.timeout(ADMISSION_S):
                await visit.secure(self._context)
                return await hear(visit.stream, self._host, _Judge(self._membership, self._codes, self._turnstile, self._clock, self._is_here))
        except Refused as refused:
            self.counts.refused += 1
            if refused.why in _WRONG:
                self._turnstile.wrong(host, self._clock.monotonic())
            await visit.say_goodbye()
        except SettingError as error:  # the newcomer is right, but cannot be written down
            self.counts.broken += 1
            self._note(f"a machine could not be let in: {error}")
        except (NodeGone, TimeoutError, OSError):
            self.counts.broken += 1
        return None

    def _is_here(self, node: NodeId) -> bool:
        return node in self._guests or self._is_connected(node)


class _Visit:
    """A stranger's connection, whose it is until it is handed over."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._is_ours = connection, True
        self._writer: asyncio.StreamWriter | None = None
        self.is_handed_over = False

    async def secure(self, context: ssl.SSLContext) -> None:
        """The TLS handshake. Made by hand because asyncio's own server would let any number of strangers wait in it."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=STREAM_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        self._is_ours = False  # it is asyncio's from here on, also if this fails
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, self._connection, ssl=context, ssl_handshake_timeout=ADMISSION_S, ssl_shutdown_timeout=FAREWELL_S
        )
        self._writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self.stream: Stream = reader, self._writer

    async def say_goodbye(self) -> None:
        """Close once the last word has been taken."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(TimeoutError, OSError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._writer.wait_closed()

    def end(self) -> None:
        """Drop the connection, unless it is somebody else's by now."""
        if self._is_ours:
            self._connection.close()
        if self._writer is not None and not self.is_handed_over:
            self._writer.transport.abort()


@dataclass(frozen=True, slots=True)
class _Judge:
    """What `hear` asks."""

    membership: Membership
    codes: Codes
    turnstile: Turnstile
    clock: Clock
    is_here: Callable[[NodeId], bool]

    def is_member(self, node: NodeId) -> bool:
        return self.membership.is_member(node)

    def is_connected(self, node: NodeId) -> bool:
        return self.is_here(node)

    def may_guess(self) -> bool:
        return self.turnstile.may_guess(self.clock.monotonic())

    def admit(self, applicant: Applicant, secret: bytes | None) -> None:
        if secret is None:
            self.membership.admit_by_key(applicant)
        else:
            self.membership.admit_by_secret(applicant, secret)

    def begin_code(self) -> Code | None:
        return self.codes.begin(self.clock.monotonic())

    def admit_by_code(self, applicant: Applicant, code: Code) -> None:
        if not self.codes.redeem(code):
            raise Refused(Why.NO_CODE)
        self.membership.admit_by_code(applicant)


def _listen(host: str, port: int, last_port: int) -> socket.socket:
    failure: OSError | None = None
    for wanted in dict.fromkeys((port or last_port, port)):
        try:
            family, _, _, _, address = socket.getaddrinfo(host or None, wanted, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            is_both = family == socket.AF_INET6 and host in {"", "::"} and socket.has_dualstack_ipv6()
            listening = socket.create_server(address[:2], family=family, backlog=128, dualstack_ipv6=is_both)
        except OSError as error:
            failure = error
        else:
            listening.setblocking(False)
            return listening
    raise SettingError(f"cannot listen for joining machines on {host} port {port}: {failure}; choose another") from failure
