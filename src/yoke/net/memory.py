"""Channels between threads of one process: for tests, simulations, and shards that share a process."""

import threading
import time
from collections import deque
from collections.abc import Callable

from yoke.core.errors import NodeGone
from yoke.core.node import NodeId
from yoke.net.channel import Channel
from yoke.net.codec import Buffer

CAPACITY_BYTES = 1 << 20
"""Bytes that may wait in each direction: what a socket of `yoke.net.tcp` asks for, so that both fill up alike."""


def memory_pair(a: NodeId, b: NodeId, capacity_bytes: int = CAPACITY_BYTES) -> tuple[Channel, Channel]:
    """Two ends of one connection: the first is held by ``a`` (its peer is ``b``), the second by ``b``."""
    there, back = _Stream(capacity_bytes), _Stream(capacity_bytes)
    return _MemoryChannel(b, there, back), _MemoryChannel(a, back, there)


class _Stream:
    """Bytes on their way in one direction."""

    def __init__(self, capacity_bytes: int) -> None:
        self.changed = threading.Condition()
        self._free_bytes = capacity_bytes
        self._parts: deque[memoryview] = deque()
        self._ended = False
        self._nudged = False

    def end(self) -> None:
        with self.changed:
            self._ended = True
            self.changed.notify_all()

    def write(self, data: memoryview, deadline: float | None) -> bool:
        """Put ``data`` on its way; False if the stream ended or the deadline passed."""
        with self.changed:
            while data:
                self._wait(lambda: self._free_bytes > 0, deadline)
                if self._ended or not self._free_bytes:
                    return False
                part = memoryview(bytes(data[: self._free_bytes]))
                data = data[len(part) :]
                self._parts.append(part)
                self._free_bytes -= len(part)
                self.changed.notify_all()
            return not self._ended

    def read(self, view: memoryview, deadline: float | None) -> bool:
        """Fill ``view``; False if the stream ended or the deadline passed before that."""
        with self.changed:
            while view:
                self._wait(lambda: bool(self._parts), deadline)
                if not self._parts:
                    return False
                part = self._parts.popleft()
                taken = min(len(part), len(view))
                view[:taken] = part[:taken]
                view = view[taken:]
                if taken < len(part):
                    self._parts.appendleft(part[taken:])
                self._free_bytes += taken
                self.changed.notify_all()
            return True

    def await_part(self) -> bool:
        """Wait until there is something to read, or the stream ended: True. False if nudged."""
        with self.changed:
            self._wait(lambda: bool(self._parts) or self._nudged, None)
            is_nudged, self._nudged = self._nudged and not self._ended, False
            return not is_nudged

    def nudge(self) -> None:
        with self.changed:
            self._nudged = True
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool], deadline: float | None) -> None:
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        self.changed.wait_for(lambda: ready() or self._ended, timeout_s)


class _MemoryChannel:
    """One end of a memory connection."""

    def __init__(self, peer: NodeId, outgoing: _Stream, incoming: _Stream) -> None:
        self._peer = peer
        self._outgoing = outgoing
        self._incoming = incoming
        self._sending = threading.Lock()
        self._timeout_s: float | None = None
        self._gone = False

    @property
    def peer(self) -> NodeId:
        return self._peer

    def send(self, *buffers: Buffer) -> None:
        deadline = self._deadline()
        with self._sending:
            for buffer in buffers:
                if self._gone or not self._outgoing.write(memoryview(buffer).cast("B"), deadline):
                    raise self._ended()

    def receive_into(self, view: memoryview) -> None:
        if self._gone or not self._incoming.read(view.cast("B"), self._deadline()):
            raise self._ended()

    def await_bytes(self) -> bool:
        return self._incoming.await_part()

    def nudge(self) -> None:
        self._incoming.nudge()

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout_s = seconds

    def close(self) -> None:
        self._gone = True
        self._outgoing.end()
        self._incoming.end()

    def _deadline(self) -> float | None:
        return None if self._timeout_s is None else time.monotonic() + self._timeout_s

    def _ended(self) -> NodeGone:
        self.close()
        return NodeGone(f"the connection to node {self._peer[:12]} ended")
