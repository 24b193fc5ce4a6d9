"""The state of a cluster: an event and the time go in, commands come out. It keeps a model served while machines join, slow down and vanish.

Laws
----
1. Everything that affects a decision is in this room; nothing is asked of a clock, a network or chance.
2. At most one change is under way. Each has a version of its own; what is said of another version is late: counted, and otherwise ignored.
3. A machine that is dead is given no command, and a plan is served only when each of its nodes has said that it is loaded.
4. A change that nobody is forced to make leaves the old plan serving until the new one is planned, found to be worth it, and prepared.

Size: O(members), and O(nodes) of the plan that works, of the one on its way, and of those that failed. Work: O(1) for `Heard`, `Joined`, `Measured` and the reports;
a `Tick` takes O(pings due: 26 of 1000 members) and O(suspects). O(members) only where a planning begins, a node of the plan dies, or, with copies, a plan begins to
serve.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import assert_never

from yoke.cluster import messages as m
from yoke.cluster.change import Step
from yoke.cluster.course import Course
from yoke.cluster.members import MemberView, Roster, Views
from yoke.cluster.policy import Policy
from yoke.cluster.pulse import Pulse
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan
from yoke.planner import Wish

__all__ = ["Phase", "Policy", "State"]


class Phase(StrEnum):
    """What a cluster is doing, in words for status. In the last three a plan serves."""

    WAITING = "waiting"
    PLANNING = "planning"
    LOADING = "loading"
    CALLING = "calling the roll"
    SERVING = "serving"
    REPLANNING = "serving, replanning"
    PREPARING = "serving, preparing"


_IDLE = {None: Phase.WAITING, Step.PLANNING: Phase.PLANNING, Step.LOADING: Phase.LOADING, Step.CALLING: Phase.CALLING}
_SERVING = {None: Phase.SERVING, Step.PLANNING: Phase.REPLANNING, Step.PREPARING: Phase.PREPARING}


class State:
    """One cluster with one model.

    Parameters
    ----------
    policy : the figures that decide.
    wish : what plans shall offer. Only its cache counts here: a spare must have room for it beside a copied shard. Without it, weights alone are counted.
    """

    def __init__(self, policy: Policy | None = None, wish: Wish | None = None) -> None:
        self.policy = policy or Policy()
        self._pulse = Pulse(self.policy)
        self._roster = Roster(self.policy)
        self._course = Course(self.policy, self._roster, wish or Wish(n_cells=1))
        self._views = Views(self._roster.members, self._view)

    def __repr__(self) -> str:
        plan = f"plan {self.plan.version} on {sum(1 for _ in self.plan.places())} of {len(self.members)}" if self.plan is not None else f"{len(self.members)}"
        return f"State({self.phase}: {plan} nodes, {self.late} late)"

    @property
    def phase(self) -> Phase:
        """What the cluster is doing."""
        step = self._course.change.step if self._course.change is not None else None
        return _IDLE[step] if self._course.served is None else _SERVING[step]

    @property
    def plan(self) -> Plan | None:
        """The plan that serves, or is being loaded; None if there is none."""
        working = self._course.working
        return working.plan if working is not None and self.phase is not Phase.CALLING else None

    @property
    def version(self) -> int:
        """The version of `plan`; without one, the last version that was given to a plan, 0 at first."""
        return self.plan.version if self.plan is not None else self._course.version

    @property
    def members(self) -> Mapping[NodeId, MemberView]:
        """Who is there. A view is made when it is asked for, as of the last event."""
        return self._views

    @property
    def late(self) -> int:
        """How many events spoke of a version that was over."""
        return self._course.late

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Decide what follows from an event. A `Prepare` comes last, so that it may be answered while it is carried out.

        Parameters
        ----------
        now : monotonic seconds; never less than at the last event.

        Raises
        ------
        InvariantError
            if the event contradicts what was commanded: a plan of the wrong version or of other nodes, a second coordinator.
        """
        course = self._course
        course.now, course.out = now, []
        self._pulse.listen(now)
        match event:
            case m.Tick():
                self._tick(now)
            case m.Heard(id=node):
                self._hear(node, now)
            case m.Joined(node=newcomer, is_coordinator=is_coordinator):
                self._join(newcomer, is_coordinator, now)
            case m.Lost(id=node, why=why):
                self._bury({node: why})
            case m.Leaving(id=node):
                if node in self._roster and not self._roster.members[node].is_leaving:
                    self._roster.leave(node)
                    course.leave(node)
            case m.Measured(id=node, matvec_bytes_per_s=speed):
                self._measure(node, speed, now)
            case m.PlanMade() | m.PlanFailed():
                course.planned(event)
            case m.Prepared() | m.Loaded() | m.LoadFailed() | m.Broken():
                course.report(event)
            case _:
                assert_never(event)
        course.mind_patience()
        return course.out

    def _tick(self, now: float) -> None:
        course = self._course
        dead, suspects = self._pulse.silent(now)
        why = {node: f"{self._roster.name(node)} is gone: not heard for {silent_s:.1f} s" for node, silent_s in dead.items()}
        course.out += [m.Drop(id=node, why=text) for node, text in why.items()]
        course.out += [m.Suspect(id=node, silent_s=silent_s) for node, silent_s in suspects.items()]
        self._bury(why)
        course.out += [m.Ping(id=node) for node in self._pulse.asks(now)]
        course.tick()

    def _hear(self, node: NodeId, now: float) -> None:
        if node not in self._roster:
            return
        if self._pulse.heard(node, now):
            self._course.out.append(m.Trust(id=node))
        self._course.hear(node)

    def _join(self, node: Node, is_coordinator: bool, now: float) -> None:
        if node.id in self._roster:
            self._bury({node.id: f"{node.name} came back with an empty worker"})
        self._roster.add(node, is_coordinator=is_coordinator)
        self._pulse.add(node.id, now)
        self._course.want(f"{node.name} has joined", now + self.policy.settle_s)
        self._course.advance()  # a plan may have been wanted before, and have waited for the coordinator

    def _bury(self, why: Mapping[NodeId, str]) -> None:
        gone = {node: text for node, text in why.items() if node in self._roster}
        for node in gone:
            self._roster.remove(node)
            self._pulse.discard(node)
        if gone:
            self._course.bury(gone)

    def _measure(self, node: NodeId, speed: float, now: float) -> None:
        member = self._roster.members.get(node)
        if member is None or not member.has_drifted(speed, now, self.policy):
            return
        before = member.node.device.matvec_bytes_per_s
        member.take_speed(speed)
        self._course.want(f"{member.node.name} computes at {speed / 1e9:.2f} GB/s, not {before / 1e9:.2f}", now)

    def _view(self, node: NodeId) -> MemberView:
        member, standing = self._roster.members[node], self._course.standbys.get(node)
        return MemberView(
            node=member.node,
            silent_s=self._pulse.silent_s(node, self._course.now),
            suspect=self._pulse.is_suspect(node),
            standby=standing.seat if standing is not None else None,
            leaving=member.is_leaving,
        )
