"""Who is there, and what is known of each: its node, whether it leaves, what its worker has loaded, and how its speed has changed since it was planned with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from yoke.cluster.places import Place, Seat, Seating
from yoke.cluster.policy import Policy
from yoke.cluster.trials import Trials
from yoke.core.errors import InvariantError
from yoke.core.node import Node, NodeId


@dataclass(slots=True)
class Member:
    """One member. ``holds`` is the shard that its worker last said it has loaded; ``drift_since_s`` is when its measured speed left what plans count on."""

    node: Node
    is_leaving: bool = False
    is_released: bool = False
    holds: Place | None = None
    drift_since_s: float | None = None
    is_drift_up: bool = False

    def has_drifted(self, bytes_per_s: float, now: float, policy: Policy) -> bool:
        """Whether a measured speed has been off, to the same side, for long enough to plan with it."""
        planned = self.node.device.matvec_bytes_per_s
        if abs(bytes_per_s - planned) < policy.drift * planned:
            self.drift_since_s = None
            return False
        is_up = bytes_per_s > planned
        if self.drift_since_s is None or is_up is not self.is_drift_up:
            self.drift_since_s, self.is_drift_up = now, is_up
        return now - self.drift_since_s >= policy.drift_s

    def take_speed(self, bytes_per_s: float) -> None:
        """From now on plans count on this speed; what was measured of single weight types and of prompts changes in the same proportion."""
        device = self.node.device
        ratio = bytes_per_s / device.matvec_bytes_per_s
        rates = tuple(
            replace(rate, matvec_bytes_per_s=rate.matvec_bytes_per_s * ratio, matmul_flop_per_s=rate.matmul_flop_per_s * ratio) for rate in device.rates
        )
        self.node = replace(self.node, device=replace(device, matvec_bytes_per_s=bytes_per_s, rates=rates))
        self.drift_since_s = None


class Roster:
    """The members by id, the coordinator among them, and the failures of all that ever were."""

    def __init__(self, policy: Policy) -> None:
        self.members: dict[NodeId, Member] = {}
        self.trials = Trials(policy.retry_s)
        self.own: NodeId | None = None
        self._leavers: dict[NodeId, None] = {}

    def __contains__(self, node: NodeId) -> bool:
        return node in self.members

    def add(self, node: Node, *, is_coordinator: bool) -> None:
        """A member has come.

        Raises
        ------
        InvariantError
            if it says that it is the coordinator, and another one is.
        """
        if is_coordinator:
            if self.own not in (None, node.id):
                raise InvariantError(f"{node.name} joined as the coordinator, but {str(self.own)[:12]} is that; a cluster has one")
            self.own = node.id
        self.members[node.id] = Member(node)

    def remove(self, node: NodeId) -> Member:
        """A member is gone."""
        self._leavers.pop(node, None)
        return self.members.pop(node)

    def leave(self, node: NodeId) -> None:
        """A member wants to go, and is in no plan from now on."""
        self.members[node].is_leaving = True
        self._leavers[node] = None

    def name(self, node: NodeId) -> str:
        """What people call a node."""
        return self.members[node].node.name if node in self.members else node[:12]

    def names(self, nodes: Iterable[NodeId]) -> str:
        """Several of them, in words."""
        return ", ".join(self.name(node) for node in nodes)

    def living(self, nodes: Iterable[NodeId]) -> tuple[NodeId, ...]:
        """Those that are there."""
        return tuple(node for node in nodes if node in self.members)

    def leavers(self) -> list[NodeId]:
        """Those that want to go and have not been let go, in the order in which they asked."""
        return [node for node in self._leavers if not self.members[node].is_released]

    def candidates(self, now: float) -> tuple[Node, ...]:
        """The nodes to plan with, the coordinator first; none if it is missing or rests. Takes O(members)."""
        if self.own not in self.members or self.trials.is_barred(self.own, now):
            return ()
        others = (member.node for node, member in self.members.items() if node != self.own and self._is_fit(node, member, now))
        return (self.members[self.own].node, *others)

    def spares(self, seating: Seating, now: float) -> dict[NodeId, Member]:
        """The members that could be in a plan and are not in this one. Takes O(members)."""
        return {node: member for node, member in self.members.items() if node not in seating.seats and self._is_fit(node, member, now)}

    def nodes(self, nodes: Iterable[NodeId]) -> dict[NodeId, Node]:
        """The nodes as they are now."""
        return {node: self.members[node].node for node in nodes}

    def _is_fit(self, node: NodeId, member: Member, now: float) -> bool:
        return not member.is_leaving and not self.trials.is_barred(node, now)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """A member as status shows it. ``standby`` is the stage and rank whose shard it holds, or loads, as a copy."""

    node: Node
    silent_s: float
    suspect: bool
    standby: Seat | None
    leaving: bool


class Views(Mapping[NodeId, MemberView]):
    """All members by id; each view is made when it is asked for, so that asking for one takes the same time in every cluster."""

    def __init__(self, members: Mapping[NodeId, Member], view: Callable[[NodeId], MemberView]) -> None:
        self._members, self._view = members, view

    def __getitem__(self, node: NodeId) -> MemberView:
        if node not in self._members:
            raise KeyError(node)
        return self._view(node)

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
