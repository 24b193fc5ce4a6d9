"""Making the channels that a plan needs, from one worker's place in it. Who opens which connection follows from the plan alone.

A stage's head opens a pipe to every rank of the next stage; the engine (stage 0, rank 0) opens one to its own mates; the last head opens the result channel to
the engine; within a group the higher rank opens to the lower.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.net.channel import Channel, send_message
from yoke.net.codec import Hello, Purpose
from yoke.net.identity import Identity
from yoke.net.tcp import connect
from yoke.node.messages import Load, Peer
from yoke.node.porter import Key, Place, Porter

WIRING_S = 120.0
"""How long all workers of a plan may take to load and connect after the first one has; the slowest disk decides."""


@dataclass(slots=True)
class Wires:
    """A worker's channels: ``inlet`` brings frames, ``mates`` and ``following`` take them, ``result`` brings or takes drawn tokens, ``group`` is by rank."""

    inlet: Channel | None = None
    result: Channel | None = None
    mates: list[Channel] = field(default_factory=list)
    following: list[Channel] = field(default_factory=list)
    group: dict[int, Channel] = field(default_factory=dict)

    def close(self) -> None:
        """End all channels, from any thread: whoever waits in one is told `NodeGone`."""
        for channel in (self.inlet, self.result, *self.mates, *self.following, *self.group.values()):
            if channel is not None:
                channel.close()


def outgoing(plan: Plan, place: Place) -> Iterator[tuple[Purpose, Place]]:
    """The connections that the worker at ``place`` opens, with the place at the other end."""
    stage, rank = place
    if rank == 0:
        if stage == 0:
            yield from ((Purpose.PIPE, (0, mate)) for mate in range(1, len(plan.stages[0].shards)))
        if stage + 1 < len(plan.stages):
            yield from ((Purpose.PIPE, (stage + 1, other)) for other in range(len(plan.stages[stage + 1].shards)))
        elif stage > 0:
            yield (Purpose.RESULT, (0, 0))
    yield from ((Purpose.GROUP, (stage, lower)) for lower in range(rank))


def incoming(plan: Plan, place: Place) -> set[Key]:
    """The connections that the worker at ``place`` must be given, by the place that opens them."""
    return {(purpose, (stage, rank)) for stage, rank, _ in plan.places() for purpose, target in outgoing(plan, (stage, rank)) if target == place}


def wire(load: Load, porter: Porter, identity: Identity, spin_s: float, stopped: threading.Event) -> Wires:
    """Open and accept all channels of this worker.

    Raises
    ------
    NodeGone
        if a neighbour cannot be reached, or does not come, in `WIRING_S`; or if ``stopped`` is set meanwhile.
    """
    plan, here = load.plan, (load.stage, load.rank)
    peers: Mapping[NodeId, Peer] = {peer.id: peer for peer in load.peers}
    owners = {(stage, rank): shard.node for stage, rank, shard in plan.places()}
    certificates = [peer.certificate for peer in load.peers]
    opened: dict[Key, Channel] = {}

    def open_one(purpose: Purpose, place: Place) -> None:
        peer = peers[owners[place]]
        channel = connect((peer.host, peer.port), peer.id, identity, certificates, deadline_s=WIRING_S, spin_s=spin_s, is_cancelled=stopped.is_set)
        opened[purpose, place] = channel
        send_message(channel, Hello(plan_version=plan.version, purpose=purpose, stage=load.stage, rank=load.rank, nonce=load.nonce))

    targets = list(outgoing(plan, here))
    expected = {key: owners[key[1]] for key in incoming(plan, here)}
    try:
        with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
            opening = [pool.submit(open_one, *target) for target in targets]
            accepted = porter.collect(plan.version, load.nonce, expected, time.monotonic() + WIRING_S, stopped.is_set)
            for attempt in opening:
                attempt.result()
    except BaseException:
        for channel in opened.values():
            channel.close()
        raise
    return _sorted_wires(here, opened, accepted)


def _sorted_wires(here: Place, opened: Mapping[Key, Channel], accepted: Mapping[Key, Channel]) -> Wires:
    wires = Wires()
    for (purpose, place), channel in sorted(opened.items()):
        if purpose is Purpose.GROUP:
            wires.group[place[1]] = channel
        elif purpose is Purpose.RESULT:
            wires.result = channel
        elif place[0] == here[0]:
            wires.mates.append(channel)
        else:
            wires.following.append(channel)
    for (purpose, place), channel in accepted.items():
        if purpose is Purpose.GROUP:
            wires.group[place[1]] = channel
        elif purpose is Purpose.RESULT:
            wires.result = channel
        else:
            wires.inlet = channel
    return wires
