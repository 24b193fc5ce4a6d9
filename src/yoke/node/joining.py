"""How a machine comes into a cluster the first time, and how it finds its way back by itself: after a cut, a restart of either side, or with a new address.

What is remembered is in ``joined.json`` in the state directory (`yoke.node.membership`); what is said at the door, in `yoke.node.admission`. Knows neither
workers nor terminals.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from yoke.core.clock import Clock, SystemClock
from yoke.core.errors import NodeError, NodeGone, SettingError
from yoke.core.node import NodeId
from yoke.net.identity import Identity
from yoke.net.invite import MAX_HOSTS, Invite
from yoke.net.pairing import read_code
from yoke.node.admission import Stream, knock, knock_with_code, knock_with_key
from yoke.node.membership import Joined, forget, remember, remembered
from yoke.node.roster import Refused, Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a coordinator answers, and whose key must."""

    node: NodeId
    hosts: tuple[str, ...]
    port: int


First = Callable[[], Awaitable[tuple[Place, Stream]]]
"""Comes in for the first time."""

Look = Callable[[NodeId], Awaitable[Place | None]]
"""Asks the network where a coordinator answers now: a hint, which may be wrong or a lie."""


def by_invite(invite: Invite, identity: Identity) -> First:
    """Come in with an invite: see `yoke.node.admission.knock`."""

    async def first() -> tuple[Place, Stream]:
        """Show the secret."""
        stream = await knock(invite, identity)
        return Place(node=invite.node_id, hosts=invite.hosts, port=invite.port), stream

    return first


def by_code(digits: str, hosts: tuple[str, ...], port: int, identity: Identity) -> First:
    """Come in with a code, where somebody was found: see `yoke.node.admission.knock_with_code`.

    ``digits`` may be as a person types them. The key that is remembered is the one that the code has proved, whatever was announced.

    Raises
    ------
    UserError
        if they are not six digits.
    """
    digits = read_code(digits)

    async def first() -> tuple[Place, Stream]:
        """Prove the code."""
        node, stream = await knock_with_code(hosts, port, digits, identity)
        return Place(node=node, hosts=hosts, port=port), stream

    return first


class Way:
    """The way of this machine into its cluster. Call it for a control connection: the first time as ``first`` says, from then on with this machine's key.

    Parameters
    ----------
    directory : where the cluster is remembered for the next start.
    first : how to come in; None goes back to the cluster that is remembered.
    look : asked when the coordinator does not answer where it did last; None asks nobody.

    Raises
    ------
    SettingError
        if there is no ``first`` and nothing is remembered, or what is cannot be read.
    """

    def __init__(self, identity: Identity, directory: Path, first: First | None = None, *, look: Look | None = None, clock: Clock | None = None) -> None:
        self._identity, self._directory, self._first, self._look = identity, directory, first, look
        self._clock = clock or SystemClock()
        self._place: Place | None = None
        self._was_in = False
        if first is None:
            known = remembered(directory)
            if known is None:
                raise SettingError("this machine has joined no cluster yet; give it an invite, or the code that the first machine shows")
            self._place = Place(node=known.cluster, hosts=known.hosts, port=known.port)

    async def __call__(self) -> Stream:
        """Knock.

        Raises
        ------
        NodeGone
            if the coordinator does not answer, or has not noticed yet that this machine was gone: try again.
        AdmissionError
            if it refuses (`Refused`), or another node answers at an invite's address. A cluster that this machine does not belong to any more is forgotten.
        """
        try:
            place, stream = await (self._first() if self._place is None and self._first is not None else self._return())
        except Refused as refused:
            if refused.why is Why.CONNECTED and self._was_in:
                raise NodeGone("the cluster has not noticed yet that this machine was gone") from refused
            if refused.why in {Why.REMOVED, Why.UNKNOWN}:
                forget(self._directory)
            raise
        self._was_in = True
        try:
            self._keep(place, stream)
        except BaseException:
            stream[1].close()
            raise
        return stream

    async def _return(self) -> tuple[Place, Stream]:
        place = self._place
        assert place is not None
        try:
            return place, await knock_with_key(place.hosts, place.port, place.node, self._identity)
        except NodeGone:
            found = await self._find(place.node)
            if found is None or found == place:
                raise
        return found, await knock_with_key(found.hosts, found.port, found.node, self._identity)

    async def _find(self, node: NodeId) -> Place | None:
        if self._look is None:
            return None
        try:
            found = await self._look(node)
        except NodeError:  # no network that can be asked: then the coordinator's silence is what there is to tell
            return None
        return found if found is not None and found.node == node else None

    def _keep(self, place: Place, stream: Stream) -> None:
        """Remember the address that worked before the others."""
        worked = str(stream[1].get_extra_info("peername")[0])
        if "%" not in worked:  # an address of one link, found by a name, has to be found anew each time
            place = replace(place, hosts=tuple(dict.fromkeys((worked, *place.hosts)))[:MAX_HOSTS])
        if place != self._place:
            remember(self._directory, Joined(cluster=place.node, hosts=place.hosts, port=place.port, joined_at=self._clock.epoch()))
        self._place = place
