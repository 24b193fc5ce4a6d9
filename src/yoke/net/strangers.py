"""Callers that have not shown yet who they are: a bounded number at once, each in a thread of its own, and who has to go when more come.

When all places are taken, the address that holds most of them gives the one that it has held for longest: a neighbour's handshake takes some milliseconds, so
that those who dawdle lose their places to those who do not. Knows nothing of handshakes and members.
"""

import contextlib
import ipaddress
import socket
import threading
from collections import Counter
from collections.abc import Callable


class Stranger:
    """A caller: its connection, and a second handle on it, since TLS takes over the first, and ending it must be possible from any thread."""

    def __init__(self, connection: socket.socket, host: str) -> None:
        self.connection = connection
        self.source = source(host)
        self._line = connection.dup()

    def hang_up(self) -> None:
        """End the connection; whoever waits for it wakes up."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the second handle back; the connection is whose it is."""
        self._line.close()


class Strangers:
    """The callers that are being heard, at most ``n_places`` at once, and their threads."""

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._changed = threading.Lock()
        self._present: dict[Stranger, threading.Thread] = {}  # the oldest first
        self._threads: set[threading.Thread] = set()

    def receive(self, connection: socket.socket, host: str, hear: Callable[[Stranger], None]) -> None:
        """Have a caller heard in a thread of its own. For one thread at a time; returns when no more than ``n_places`` are heard, this one among them.

        Raises
        ------
        OSError
            if the system has no descriptor left; the connection is closed then.
        """
        try:
            stranger = Stranger(connection, host)
        except OSError:
            connection.close()
            raise
        thread = threading.Thread(target=self._attend, args=(stranger, hear), name="yoke-handshake", daemon=True)
        displaced = None
        with self._changed:
            if len(self._present) >= self._n_places:
                displaced = self._displace()
            self._present[stranger] = thread
            self._threads.add(thread)
        thread.start()
        if displaced is not None:
            displaced.join()  # hung up on, it has nothing to wait for; so threads are bounded too

    def let_in(self, stranger: Stranger) -> bool:
        """The caller is a stranger no more, and gives its place back. False if it had lost it before, and its connection with it."""
        with self._changed:
            return self._present.pop(stranger, None) is not None

    def join(self) -> None:
        """Wait until nobody is heard any more."""
        for thread in tuple(self._threads):
            thread.join()

    def _attend(self, stranger: Stranger, hear: Callable[[Stranger], None]) -> None:
        try:
            hear(stranger)
        finally:
            self.let_in(stranger)
            stranger.close()
            self._threads.discard(threading.current_thread())

    def _displace(self) -> threading.Thread:
        """One stranger has to go: of the address with most places, the oldest."""
        held = Counter(stranger.source for stranger in self._present)
        gone = max(self._present, key=lambda stranger: held[stranger.source])  # max() takes the first of equals
        gone.hang_up()
        return self._present.pop(gone)


def source(host: str) -> str:
    """Whom an address is counted as: an IPv4 address as itself, also when written as IPv6; an IPv6 address as its network of 64 bits.

    One machine may have such a network to itself, and as many addresses in it as it likes.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
