"""The worker's door: every connection to its data plane comes in here and is handed to whom it is for. Knows purposes; does not know what is done with a channel."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.node import NodeId
from yoke.net.channel import Channel, receive_message
from yoke.net.codec import HELLO_LIMITS, Hello, Purpose
from yoke.net.tcp import Listener

HELLO_S = 10.0
LOOK_S = 0.2

MAX_EARLY = 256
"""Channels of plans that this worker has not been told of yet; the oldest is closed when more come."""

Place = tuple[int, int]
Key = tuple[Purpose, Place]
Service = Callable[[Channel], None]


class Porter:
    """Accepts members' channels and reads what each is for.

    Parameters
    ----------
    listener : where members connect; the porter owns it.
    services : what serves a channel of a purpose that belongs to no plan; called in a thread of the channel's own, which ends it.
    """

    def __init__(self, listener: Listener, services: Mapping[Purpose, Service]) -> None:
        self._listener, self._services = listener, services
        self._arrived = threading.Condition()
        self._early: list[tuple[Hello, Channel]] = []
        threading.Thread(target=self._accept_all, name="yoke-porter", daemon=True).start()

    def collect(self, version: int, nonce: bytes, expected: Mapping[Key, NodeId], deadline: float, is_stopped: Callable[[], bool]) -> dict[Key, Channel]:
        """The channels of a plan, by purpose and by the place that opens them; ``expected`` says which node that is. Those of earlier versions are closed.

        Parameters
        ----------
        deadline : of the monotonic clock.

        Raises
        ------
        NodeGone
            if not all came by then, or ``is_stopped``.
        """
        found: dict[Key, Channel] = {}
        with self._arrived:
            while True:
                self._sort(version, nonce, expected, found)
                if len(found) == len(expected):
                    return found
                if is_stopped() or time.monotonic() >= deadline:
                    for channel in found.values():
                        channel.close()
                    missing = ", ".join(f"{purpose} of stage {stage}, rank {rank}" for purpose, (stage, rank) in sorted(set(expected) - set(found)))
                    raise NodeGone("stood down" if is_stopped() else f"these channels never came: {missing}")
                self._arrived.wait(min(LOOK_S, max(0.0, deadline - time.monotonic())))

    def _sort(self, version: int, nonce: bytes, expected: Mapping[Key, NodeId], found: dict[Key, Channel]) -> None:
        """Take what belongs to the plan, close what is of the past or a lie, and keep what may be of the future."""
        kept = []
        for hello, channel in self._early:
            key = (hello.purpose, (hello.stage, hello.rank))
            if (hello.plan_version, hello.nonce) == (version, nonce) and expected.get(key) == channel.peer and key not in found:
                found[key] = channel
            elif hello.plan_version > version:
                kept.append((hello, channel))
            else:
                channel.close()
        self._early = kept

    def _accept_all(self) -> None:
        with contextlib.suppress(NodeGone):  # the listener was closed
            while True:
                channel = self._listener.accept()
                if channel is not None:
                    threading.Thread(target=self._receive, args=(channel,), name="yoke-hello", daemon=True).start()

    def _receive(self, channel: Channel) -> None:
        try:
            channel.set_timeout(HELLO_S)
            hello = receive_message(channel, HELLO_LIMITS)
            channel.set_timeout(None)
        except (NodeGone, RemoteProtocolError):
            channel.close()
            return
        if not isinstance(hello, Hello):
            channel.close()
        elif (service := self._services.get(hello.purpose)) is not None:
            try:
                service(channel)
            except (NodeGone, RemoteProtocolError):
                pass  # the peer is gone, or not fit to talk to
            finally:
                channel.close()
        else:
            with self._arrived:
                self._early.append((hello, channel))
                if len(self._early) > MAX_EARLY:
                    self._early.pop(0)[1].close()
                self._arrived.notify_all()
