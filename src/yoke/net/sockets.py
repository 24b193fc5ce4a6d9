"""Sockets made ready for a channel: options, TLS handshake, waiting. Knows which system has what; does not know who may connect."""

import contextlib
import select
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Callable

BUFFER_BYTES = 1 << 20
"""Asked of the system for each socket and direction. `yoke.net.group` relies on a part of it: see the note on deadlock there."""

LOOK_S = 1.0
"""How often a call that waits looks whether the peer's system still answers."""

_UNANSWERED = 4  # retransmissions after 0.2, 0.4, 0.8 and 1.6 s: about 3 s of silence

EARLY_S = 2e-3
"""How long before the expected moment a `Nap` stops sleeping: poll() counts in milliseconds, and steps are not quite equal."""

LONGEST_S = 0.5

TICK_S = 0.1
"""How soon a closing listener is noticed by its threads."""


def open_connection(host: str, port: int, deadline: float) -> socket.socket:
    """A TCP connection to the first address of ``host`` that answers; its options are set before it connects.

    Raises
    ------
    OSError
        if no address answered by ``deadline`` (monotonic clock).
    """
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            size_buffers(connection)
            tune(connection)
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


def secure(context: ssl.SSLContext, connection: socket.socket, is_server: bool, deadline: float, is_cancelled: Callable[[], bool]) -> ssl.SSLSocket:
    """The TLS handshake over ``connection``, whole within the deadline: a peer that sends a byte now and then gains nothing.

    Takes ``connection`` over, and closes it on failure. ``deadline`` is of the monotonic clock; ``is_cancelled`` is asked now and then.

    Raises
    ------
    OSError
        if TLS refuses the peer (`ssl.SSLError`), the connection ends, the deadline passes, or the handshake is cancelled.
    """
    secured = context.wrap_socket(connection, server_side=is_server, do_handshake_on_connect=False)
    try:
        secured.setblocking(False)
        waiters = {writing: waiter(secured, writing=writing) for writing in (False, True)}
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                writing = False
            except ssl.SSLWantWriteError:
                writing = True
            else:
                return secured
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or is_cancelled():
                raise TimeoutError("the handshake took too long")
            waiters[writing](min(remaining_s, TICK_S))
    except BaseException:
        secured.close()
        raise


def waiter(secured: socket.socket, *, writing: bool) -> Callable[[float | None], bool]:
    """A function that waits until ``secured`` can be read, or written to: at most so many seconds, None for ever; whether it can. For one thread at a time."""
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(secured, select.POLLOUT if writing else select.POLLIN)
        poll = poller.poll
        return lambda timeout_s: bool(poll(None if timeout_s is None else timeout_s * 1000))
    # Windows has no poll().
    reading, sending = ([], [secured]) if writing else ([secured], [])
    return lambda timeout_s: any(select.select(reading, sending, [], timeout_s))


class Alarm:
    """Waits for a socket to become readable, or for another thread to ring. Close it when the socket is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._selector = selectors.DefaultSelector() if not hasattr(selectors, "PollSelector") else selectors.PollSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(self._ear, selectors.EVENT_READ)

    def wait(self, timeout_s: float) -> bool:
        """Whether the socket is readable. Returns before the time is over if it is, or if somebody rings, or has rung since the last call."""
        ready = [key.fileobj for key, _ in self._selector.select(timeout_s)]
        if self._ear in ready:
            with contextlib.suppress(BlockingIOError):
                self._ear.recv(4096)
        return self._connection in ready

    def ring(self) -> None:
        """Let `wait` return, from any thread."""
        with contextlib.suppress(OSError):  # full of earlier rings, or closed: there is nothing to wake
            self._bell.send(b"\0")

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        self._bell.close()
        self._ear.close()


class Nap:
    """A wait for something that comes at regular moments. ``spin_s`` 0 always sleeps.

    Steps take equally long, so the last wait tells when to be awake again: the core of a stage that waits for the others sleeps, and yet its wake-up (up to
    0.2 ms after some milliseconds of sleep, measured) is over before the frame comes.
    """

    def __init__(self, spin_s: float) -> None:
        self._spin_s = spin_s
        self._began_s = self._last_s = 0.0

    def doze(self, ready: Callable[[float], bool]) -> bool:
        """Whether it came while this asked without sleeping: for ``spin_s`` from now, or around the moment when it came the last time."""
        now, spin_s = time.perf_counter, self._spin_s
        self._began_s = now()
        if not spin_s:
            return False
        if EARLY_S < self._last_s < LONGEST_S:
            if ready(self._last_s - EARLY_S):
                return True
            spin_s = 2 * EARLY_S
        stop = now() + spin_s
        while now() < stop:
            if ready(0.0):
                return True
        return False

    def end(self) -> None:
        """It came: remember how long that took."""
        self._last_s = time.perf_counter() - self._began_s


def size_buffers(connection: socket.socket) -> None:
    """Ask for `BUFFER_BYTES` each way; the system may grant less. Comes before connecting or listening: a window's scale is agreed on in its first packet."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def is_silent(connection: socket.socket) -> bool:
    """Whether the peer's system has left several packets in a row unacknowledged, over some seconds. Always False where the system does not tell.

    TCP_USER_TIMEOUT would do this too, but it also ends the connection to a peer that is well and merely computes for longer without reading (measured on
    Linux 6.18).
    """
    if not sys.platform.startswith("linux"):
        return False
    # The first bytes of struct tcp_info (linux/tcp.h): state, congestion state, retransmits, probes. Both count from the last acknowledgement.
    _, _, retransmits, probes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
    return max(retransmits, probes) >= _UNANSWERED


def tune(connection: socket.socket) -> None:
    """No delay, quick notice of a silent peer, and a congestion control that does not pace small messages; each where the system has it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted: tuple[tuple[str, int | bytes], ...] = (
        ("TCP_NODELAY", 1),
        ("TCP_CONGESTION", b"cubic"),  # bbr's pacing cost 10 ms for a 16 KB message on a slow link (measured)
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPALIVE", 1),  # macOS's name for the same, in seconds
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", 3),
    )
    for name, value in wanted:
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
