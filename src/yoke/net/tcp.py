"""Channels over TCP and TLS 1.3 with both sides pinned by their node key: blocking calls, plain threads.

Sockets are non-blocking underneath: every call into TLS is short and made under a lock, and the waiting happens in poll() outside of it. So one thread
can send while another receives (OpenSSL forbids concurrent use of a connection), a deadline covers the whole call, and a close from another thread wakes
whoever waits.
"""

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable

from yoke.core.errors import AdmissionError, NodeGone, RemoteProtocolError, SettingError
from yoke.core.node import NodeId
from yoke.net.codec import Buffer
from yoke.net.identity import Identity, certificate_id, client_context, server_context
from yoke.net.sockets import LOOK_S, TICK_S, Alarm, Nap, is_silent, open_connection, secure, size_buffers, tune, waiter
from yoke.net.strangers import Stranger, Strangers

HANDSHAKE_S = 5.0
MAX_HANDSHAKES = 16
"""Strangers that may be in a handshake at once; when more come, the oldest of the address that has most places goes (`yoke.net.strangers`)."""

_COALESCE_BYTES = 1 << 16  # below this, one copy costs less than a second TLS record and its wake-up
_ACCEPTED = b"\x06"  # the server's word that it let the client in: with TLS 1.3 the client's handshake ends before the server has judged its certificate
_RETRY_S = 0.05


class TcpChannel:
    """A `yoke.net.channel.Channel` over an established TLS connection, which it owns from now on.

    Parameters
    ----------
    secured : a connection whose handshake is over.
    peer : whose key the certificate at the other end is of.
    spin_s : how long a receive asks again and again before it sleeps. Saves the wake-up of a sleeping core (about 20 us); only worth it with a core to spare.
    """

    def __init__(self, secured: ssl.SSLSocket, peer: NodeId, *, spin_s: float = 0.0) -> None:
        secured.setblocking(False)
        self._socket = secured
        self._peer = peer
        self._nap = Nap(spin_s)
        self._timeout_s: float | None = None
        self._ended: str | None = None
        self._tls = threading.Lock()
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self._wait_readable = waiter(secured, writing=False)
        self._wait_writable = waiter(secured, writing=True)
        self._is_nudged = False
        self._alarm: Alarm | None = None

    @property
    def peer(self) -> NodeId:
        """Who is at the other end."""
        return self._peer

    def set_timeout(self, seconds: float | None) -> None:
        """Let later calls wait at most ``seconds`` each; None means for ever. A call that waited too long ends the channel."""
        self._timeout_s = seconds

    def send(self, *buffers: Buffer) -> None:
        """Send the concatenation of ``buffers``: small ones in one TLS record, large ones without copying them.

        Raises
        ------
        NodeGone
            if the connection ended, or the timeout passed.
        """
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if len(views) > 1 and sum(map(len, views)) < _COALESCE_BYTES:
            views = [memoryview(b"".join(views))]
        with self._sending:
            deadline = self._start()
            for view in views:
                self._write(view, deadline)

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes from the peer, exactly.

        Raises
        ------
        NodeGone
            if the connection ended before that, or the timeout passed.
        """
        view = view.cast("B")
        with self._receiving:
            deadline = self._start()
            while view:
                with self._tls:
                    is_decrypted = self._socket.pending() > 0
                if not is_decrypted:
                    self._await_bytes(deadline)
                try:
                    with self._tls:
                        n = self._socket.recv_into(view)
                except ssl.SSLWantReadError:  # poll() saw a part of a record
                    continue
                except ssl.SSLWantWriteError:
                    self._wait(waiter(self._socket, writing=True), deadline)
                    continue
                except (OSError, ValueError) as error:
                    raise self._gone(error) from error
                if not n:
                    raise self._gone(None)
                view = view[n:]

    def await_bytes(self) -> bool:
        """Wait until there is something to receive, or the connection has ended: True. False if `nudge` was called since the last call of this."""
        with self._receiving:
            if self._alarm is None and self._ended is None:
                self._alarm = Alarm(self._socket)  # whoever nudges from now on rings it; an earlier nudge left its mark
            while self._ended is None and not self._is_nudged:
                with self._tls:
                    is_decrypted = self._socket.pending() > 0
                if is_decrypted or self._is_readable():
                    return True
            is_nudged, self._is_nudged = self._is_nudged and self._ended is None, False
            return not is_nudged

    def nudge(self) -> None:
        """Let `await_bytes` return, now or at its next call. From any thread; does nothing on an ended channel."""
        self._is_nudged = True
        if self._alarm is not None:
            self._alarm.ring()

    def close(self) -> None:
        """End the channel, from any thread; calls that wait in other threads raise `NodeGone`. Closing twice does nothing."""
        self._end(f"this node closed its connection to node {self._peer[:12]}")
        # Whoever waits was woken by the shutdown and lets go; only then may the descriptor be given back to the system.
        with self._sending, self._receiving:
            self._socket.close()
            if self._alarm is not None:
                self._alarm.close()

    def _start(self) -> float | None:
        if self._ended is not None:
            raise NodeGone(self._ended)
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def _write(self, view: memoryview, deadline: float | None) -> None:
        while view:
            try:
                with self._tls:
                    n = self._socket.send(view)
            except ssl.SSLWantWriteError:
                self._wait(self._wait_writable, deadline)
                continue
            except ssl.SSLWantReadError:
                self._wait(waiter(self._socket, writing=False), deadline)
                continue
            except (OSError, ValueError) as error:
                raise self._gone(error) from error
            view = view[n:]

    def _await_bytes(self, deadline: float | None) -> None:
        """Return when there may be something to read."""
        if not self._nap.doze(self._wait_readable):
            self._wait(self._wait_readable, deadline)
        self._nap.end()

    def _is_woken(self, timeout_s: float) -> bool:
        """Whether there is something to read, or a nudge. A ring alone is neither: it may be left from a nudge that was noticed before it rang."""
        return (self._alarm is not None and self._alarm.wait(timeout_s)) or self._is_nudged

    def _is_readable(self) -> bool:
        """Whether the socket has something; waits until it has, or the alarm rings, or it is time to look."""
        if self._alarm is None:
            return True
        try:
            is_readable = self._nap.doze(self._is_woken) or self._is_woken(LOOK_S)
            self._nap.end()
            return (is_readable and not self._is_nudged) or is_silent(self._socket)
        except (OSError, ValueError):
            return True  # the receive that follows says what happened

    def _wait(self, ready: Callable[[float | None], bool], deadline: float | None) -> None:
        try:
            while not ready(LOOK_S if deadline is None else min(LOOK_S, max(0.0, deadline - time.monotonic()))):
                if is_silent(self._socket):
                    raise self._gone(TimeoutError("it no longer answers; the network between is cut, or the machine is down"))
                if deadline is not None and time.monotonic() >= deadline:
                    raise self._gone(TimeoutError(f"no answer for {self._timeout_s} s"))
        except (OSError, ValueError) as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception | None) -> NodeGone:
        name = self._peer[:12]
        self._end(f"node {name} closed the connection" if error is None else f"the connection to node {name} ended: {error}")
        return NodeGone(self._ended)

    def _end(self, cause: str) -> None:
        """Make every later call raise, and every waiting one return. The first cause stays."""
        if self._ended is None:
            self._ended = cause
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown(), which takes the encryption off: a receive in another thread would then read raw bytes.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class Listener:
    """Accepts connections from members. Strangers cost a short-lived thread for at most `HANDSHAKE_S`, and never reach a parser of ours.

    Parameters
    ----------
    host, port : where to listen; port 0 lets the system choose.
    identity : this node's key.
    members : certificates (DER) of the nodes that may connect.
    spin_s : given to every channel.

    Raises
    ------
    SettingError
        if the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, identity: Identity, members: Iterable[bytes], *, spin_s: float = 0.0) -> None:
        self._identity = identity
        self._spin_s = spin_s
        self._admit = self._admission(members)
        self._ready: queue.Queue[TcpChannel | None] = queue.Queue(maxsize=1024)
        self._closed = threading.Event()
        self._strangers = Strangers(MAX_HANDSHAKES)
        self._counting = threading.Lock()
        self._refused = 0
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._socket = socket.create_server(address[:2], family=family, backlog=128)
        except OSError as error:
            raise SettingError(f"cannot listen on {host} port {port}: {error}; choose another address or port") from error
        size_buffers(self._socket)
        self._socket.settimeout(TICK_S)
        self._acceptor = threading.Thread(target=self._accept_all, name="yoke-listener", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that this listener is bound to."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def refused(self) -> int:
        """How many connections were dropped: strangers, broken handshakes, and those that made room for others."""
        return self._refused

    def set_members(self, members: Iterable[bytes]) -> None:
        """Accept these members (certificates, DER) from now on. Channels that exist stay."""
        self._admit = self._admission(members)

    def accept(self, timeout_s: float | None = None) -> TcpChannel | None:
        """The next member's channel, or None if nobody came in ``timeout_s`` (None waits for ever).

        Raises
        ------
        NodeGone
            if the listener was closed.
        """
        channel = None
        if not self._closed.is_set():
            try:
                channel = self._ready.get(timeout=timeout_s)
            except queue.Empty:
                return None
            if channel is None:
                self._ready.put(None)  # for whoever else waits
        if channel is None:
            raise NodeGone("this node stopped listening")
        return channel

    def close(self) -> None:
        """Stop listening, and close the channels that nobody has accepted."""
        self._closed.set()
        self._acceptor.join()
        self._socket.close()
        self._strangers.join()
        with contextlib.suppress(queue.Empty):
            while True:
                channel = self._ready.get_nowait()
                if channel is not None:
                    channel.close()
        self._ready.put(None)

    def _admission(self, members: Iterable[bytes]) -> tuple[ssl.SSLContext, frozenset[NodeId]]:
        certificates = tuple(members)
        return server_context(self._identity, certificates), frozenset(map(certificate_id, certificates))

    def _accept_all(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._socket.accept()
                self._strangers.receive(connection, str(address[0]), self._admit_one)
            except TimeoutError:
                continue
            except OSError:  # the caller was gone before we looked, or the system is out of descriptors
                self._closed.wait(_RETRY_S)

    def _admit_one(self, stranger: Stranger) -> None:
        """One caller's handshake, in a thread of its own: a slow one delays nobody."""
        context, ids = self._admit
        try:
            tune(stranger.connection)
            secured = secure(context, stranger.connection, True, time.monotonic() + HANDSHAKE_S, self._closed.is_set)
            channel = TcpChannel(secured, _peer_id(secured), spin_s=self._spin_s)
            try:
                if channel.peer not in ids or not self._strangers.let_in(stranger):
                    raise AdmissionError(f"node {channel.peer} is no member, or had to make room")
                channel.set_timeout(HANDSHAKE_S)
                channel.send(_ACCEPTED)
                channel.set_timeout(None)
                self._ready.put_nowait(channel)
            except BaseException:
                channel.close()
                raise
        except (OSError, ValueError, queue.Full, AdmissionError, NodeGone, RemoteProtocolError):
            stranger.connection.close()
            with self._counting:
                self._refused += 1


def connect(
    address: tuple[str, int],
    expected: NodeId,
    identity: Identity,
    members: Iterable[bytes],
    *,
    deadline_s: float,
    spin_s: float = 0.0,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> TcpChannel:
    """A channel to node ``expected`` at ``address`` (host and port), retrying for ``deadline_s`` seconds: the other node may still be starting.

    Returns only after the other side has let this node in.

    Raises
    ------
    NodeGone
        if nobody answered in time, the other node did not let this one in, or ``is_cancelled`` said so.
    AdmissionError
        if another node, or an unknown one, answers at this address.
    """
    context = client_context(identity, members)
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return _connect_once(address, expected, context, deadline, spin_s, is_cancelled)
        except ssl.SSLCertVerificationError as error:
            raise AdmissionError(f"an unknown node answers at {address[0]} port {address[1]}; expected node {expected[:12]}: {error.verify_message}") from error
        except (OSError, ValueError, NodeGone, RemoteProtocolError) as error:
            if is_cancelled() or time.monotonic() + _RETRY_S >= deadline:
                raise NodeGone(f"cannot reach node {expected[:12]} at {address[0]} port {address[1]} in {deadline_s:g} s: {error}") from error
        time.sleep(_RETRY_S)


def _connect_once(
    address: tuple[str, int], expected: NodeId, context: ssl.SSLContext, deadline: float, spin_s: float, is_cancelled: Callable[[], bool]
) -> TcpChannel:
    connection = open_connection(*address, min(deadline, time.monotonic() + HANDSHAKE_S))
    try:
        secured = secure(context, connection, False, min(deadline, time.monotonic() + HANDSHAKE_S), is_cancelled)
        channel = TcpChannel(secured, _peer_id(secured), spin_s=spin_s)
    except BaseException:
        connection.close()
        raise
    try:
        if channel.peer != expected:
            raise AdmissionError(f"node {channel.peer[:12]} answers at {address[0]} port {address[1]}; expected node {expected[:12]}")
        answer = bytearray(len(_ACCEPTED))
        channel.set_timeout(max(0.0, min(HANDSHAKE_S, deadline - time.monotonic())))
        channel.receive_into(memoryview(answer))
        if answer != _ACCEPTED:
            raise RemoteProtocolError(f"node {expected[:12]} answered a connection with {bytes(answer)!r}; expected {_ACCEPTED!r}")
        channel.set_timeout(None)
    except BaseException:
        channel.close()
        raise
    return channel


def _peer_id(secured: ssl.SSLSocket) -> NodeId:
    return certificate_id(secured.getpeercert(binary_form=True) or b"")
