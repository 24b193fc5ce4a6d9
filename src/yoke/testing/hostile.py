"""What somebody who means harm might throw at a node's two ports: noise, broken handshakes, forged knocks, and a member's malformed messages. Seeded.

For tests and `benchmarks/hostile.py`: they say what must hold meanwhile. Uses real sockets and real TLS; knows what is said at a door and on a channel only as far
as it takes to say it wrong.
"""

import contextlib
import hashlib
import random
import socket
import ssl
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from yoke.core.node import NodeId
from yoke.net.codec import HEADER_BYTES, Hello, Purpose, encode
from yoke.net.identity import Identity, client_context, joining_client_context

CONNECT_S = 2.0

N_SILENT = 40
"""Connections that are held open and say nothing."""

_KNOCK = struct.Struct("<B32s64s32sH")  # as docs/protocol.md has it; written again here so that a test does not believe the code
_CONTEXT = b"yoke admission 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Two ports of 127.0.0.1: ``door_port`` admits to the cluster of ``coordinator``, ``data_port`` is a listener's for the ``certificates``' nodes."""

    coordinator: NodeId
    door_port: int
    data_port: int
    certificates: tuple[bytes, ...]


class Attacker:
    """Throws one thing after another.

    Parameters
    ----------
    stranger : a key that belongs to no cluster.
    member : a key that is among the target's certificates; None leaves out what only a member can do.
    sources : how many addresses to come from, where the loopback device has more than one.
    wait_s : how long it waits to be answered or hung up on before it goes by itself.
    """

    def __init__(self, target: Target, stranger: Identity, member: Identity | None = None, *, seed: int = 0, sources: int = 1000, wait_s: float = 0.2) -> None:
        self._target, self._stranger, self._sources, self._wait_s = target, stranger, sources, wait_s
        self._random = random.Random(seed)  # noqa: S311 (chance, not secrecy)
        self._silent: deque[socket.socket] = deque()
        self._joining = joining_client_context()
        self._as_stranger = client_context(stranger, target.certificates)
        self._as_member = None if member is None else client_context(member, target.certificates)
        self._hello = _client_hello(self._joining)
        self.counts: Counter[str] = Counter()
        """How often each kind was thrown."""

        self.heard_bytes = 0
        """What came back in answer, TLS's own words included."""

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        """What there is to throw, by name."""
        door, data = self._target.door_port, self._target.data_port
        kinds = {
            "door: noise": lambda: self._raw(door, self._noise()),
            "door: broken hello": lambda: self._raw(door, self._broken_hello()),
            "door: silence": lambda: self._be_silent(door),
            "door: noise inside TLS": lambda: self._knock(self._random.randbytes(self._random.randrange(2000))),
            "door: forged knock": lambda: self._knock(self._forged_knock()),
            "door: wrong secret": lambda: self._knock(None),
            "data: noise": lambda: self._raw(data, self._noise()),
            "data: broken hello": lambda: self._raw(data, self._broken_hello()),
            "data: silence": lambda: self._be_silent(data),
            "data: stranger's handshake": lambda: self._speak(data, self._as_stranger, self._message()),
        }
        if (context := self._as_member) is not None:
            kinds["data: member's malformed message"] = lambda: self._speak(data, context, self._message())
        return kinds

    def throw(self, kind: str) -> None:
        """One of the `kinds`. That the connection breaks is what is wanted, and no error."""
        self.counts[kind] += 1
        with contextlib.suppress(OSError):
            self.kinds[kind]()

    def stop(self) -> None:
        """Let go of what is held open."""
        while self._silent:
            self._silent.popleft().close()

    def _connect(self, port: int) -> socket.socket:
        number = self._random.randrange(self._sources)
        source = ("127.1." + f"{number >> 8 & 255}.{number & 255}", 0) if sys.platform == "linux" else None
        connection = socket.create_connection(("127.0.0.1", port), timeout=CONNECT_S, source_address=source)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leave nothing behind in the system
        return connection

    def _hear_out(self, connection: socket.socket) -> None:
        connection.settimeout(self._wait_s)
        while data := connection.recv(1 << 16):
            self.heard_bytes += len(data)

    def _raw(self, port: int, data: bytes) -> None:
        with self._connect(port) as connection:
            connection.sendall(data)
            if self._random.random() < 0.5:
                connection.shutdown(socket.SHUT_WR)
                self._hear_out(connection)

    def _be_silent(self, port: int) -> None:
        self._silent.append(self._connect(port))
        if len(self._silent) > N_SILENT:
            self._silent.popleft().close()

    def _speak(self, port: int, context: ssl.SSLContext, data: bytes) -> None:
        with self._connect(port) as plain, context.wrap_socket(plain) as secured:
            secured.sendall(data)
            self._hear_out(secured)

    def _knock(self, data: bytes | None) -> None:
        """At the door, inside TLS. None is a knock that is right but for its secret."""
        with self._connect(self._target.door_port) as plain, self._joining.wrap_socket(plain) as secured:
            nonce = b""
            while len(nonce) < 33:
                part = secured.recv(33 - len(nonce))
                if not part:
                    return
                nonce += part
            secured.sendall(self._wrong_secret(nonce[1:]) if data is None else data)
            self._hear_out(secured)

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.choice((0, 1, 5, 100, 1000, 20_000)))

    def _broken_hello(self) -> bytes:
        data = bytearray(self._hello)
        for _ in range(self._random.randrange(1, 9)):
            data[self._random.randrange(len(data))] = self._random.randrange(256)
        return bytes(data[: self._random.randrange(1, len(data) + 1)])

    def _forged_knock(self) -> bytes:
        n_bytes = self._random.choice((0, 1, 430, 2048, 2049, 65535))
        kind, key, signature, payload = self._random.randrange(6), self._random.randbytes(32), self._random.randbytes(64), self._random.randbytes(32)
        return _KNOCK.pack(kind, key, signature, payload, n_bytes) + self._random.randbytes(self._random.choice((0, n_bytes)))

    def _wrong_secret(self, nonce: bytes) -> bytes:
        own = self._stranger
        payload = self._random.randbytes(10) + bytes(22)
        parties = bytes.fromhex(self._target.coordinator) + bytes.fromhex(own.id)
        signature = own.sign(_CONTEXT + bytes((1,)) + nonce + parties + payload + hashlib.sha256(own.certificate_der).digest())
        return _KNOCK.pack(1, bytes.fromhex(own.id), signature, payload, len(own.certificate_der)) + own.certificate_der

    def _message(self) -> bytes:
        """A message of the data plane that breaks a rule somewhere, or is cut off."""
        good = b"".join(bytes(part) for part in encode(Hello(plan_version=1, purpose=Purpose.PIPE, stage=0, rank=0)))
        data = bytearray(good)
        match self._random.randrange(4):
            case 0:
                return self._random.randbytes(self._random.randrange(1, 200))
            case 1:  # a header that announces much
                data[20:40] = self._random.randbytes(20)
                return bytes(data[:HEADER_BYTES])
            case 2:
                data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
                return bytes(data)
            case _:
                return bytes(data[: self._random.randrange(len(data))])


def _client_hello(context: ssl.SSLContext) -> bytes:
    """The first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    handshake = context.wrap_bio(ssl.MemoryBIO(), outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    return outgoing.read()
