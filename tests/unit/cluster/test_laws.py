"""Any order of events: the laws hold at every step, streams never wait for ever, and after quiet the cluster serves if a plan fits.

The caller here is as unkind as the vocabulary allows: answers come in any order, twice, late or from the dead, and machines vanish between any two of them.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from yoke.cluster import messages as m
from yoke.cluster.state import Phase, Policy, State
from yoke.core.errors import BackendError, InvariantError, NodeGone, PlacementError, YokeError
from yoke.core.node import Node
from yoke.planner import grid_plan
from yoke.testing.laws import Laws
from yoke.testing.simulated import MB, SPEC, WISH, real_plan, simulated_node

NODES = [simulated_node(number, speed=2e9 + number * 1e9, room_bytes=150 * MB) for number in range(1, 6)]
OWN = NODES[0]
VERSIONS = st.integers(0, 3)
"""How many versions ago."""


class Clusters(RuleBasedStateMachine):
    """One cluster and its unkind caller."""

    @initialize(replicas=st.integers(0, 2))
    def begin(self, replicas: int) -> None:
        self.now = 0.0
        self.state, self.laws = State(Policy(replicas=replicas), WISH), Laws()
        self.alive: dict[str, Node] = {}
        self.silent: set[str] = set()
        self.asked: m.MakePlan | None = None
        self.orders: list[m.Event] = []
        self.is_waiting_since: float | None = 0.0
        self.join(OWN)

    def do(self, event: m.Event) -> None:
        if isinstance(event, m.Lost):
            self.alive.pop(event.id, None)
        self.laws.handling(event, self.now)
        commands = self.state.handle(event, self.now)
        self.laws.carrying_out(commands, self.now)
        for command in commands:
            self.note(command)

    def note(self, command: m.Command) -> None:
        """What the caller would do; the answers to it wait until a rule sends them."""
        match command:
            case m.MakePlan():
                self.asked = command
            case m.Prepare(version=version, plan=plan):
                self.orders += [m.Prepared(version=version, id=shard.node) for _, _, shard in plan.places()]
            case m.Load(version=version, plan=plan):
                self.orders += [m.Loaded(version=version, id=shard.node) for _, _, shard in plan.places()]
                self.is_waiting_since = None
            case m.Standby(version=version, id=node):
                self.orders.append(m.Loaded(version=version, id=node))
            case m.Serve() | m.FailStreams():
                self.is_waiting_since = None
            case m.StandDown():
                self.is_waiting_since = self.now
            case m.Drop(id=node):
                self.alive.pop(node, None)
            case m.Release(id=node):
                self.orders.append(m.Lost(id=node, why=f"{node[-4:]} left"))

    @rule(node=st.sampled_from(NODES))
    def join(self, node: Node) -> None:
        self.alive[node.id] = node
        self.silent.discard(node.id)
        self.do(m.Joined(node=node, is_coordinator=node is OWN))

    @rule(node=st.sampled_from(NODES))
    def lose(self, node: Node) -> None:
        self.do(m.Lost(id=node.id, why=f"{node.name} is gone"))

    @rule(node=st.sampled_from(NODES))
    def fall_silent(self, node: Node) -> None:
        self.silent.add(node.id)

    @rule(node=st.sampled_from(NODES[1:]))
    def leave(self, node: Node) -> None:
        self.do(m.Leaving(id=node.id))

    @rule(node=st.sampled_from(NODES), speed=st.sampled_from([1e8, 2e9, 9e9]))
    def measure(self, node: Node, speed: float) -> None:
        self.do(m.Measured(id=node.id, matvec_bytes_per_s=speed))

    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 12.0, 70.0]))
    def wait(self, seconds: float) -> None:
        for tick in range(round(seconds * 10)):
            self.now += 0.1
            for node in [node for node in self.alive if node not in self.silent] if tick % 5 == 0 else ():
                self.do(m.Heard(id=self.alive[node].id))
            self.do(m.Tick())

    @precondition(lambda self: self.asked is not None)
    @rule()
    def plan_is_made(self) -> None:
        asked, self.asked = self.asked, None
        try:
            outlook = real_plan(asked.nodes, asked.version)
        except PlacementError as error:
            self.do(m.PlanFailed(version=asked.version, error=error))
        else:
            self.do(m.PlanMade(version=asked.version, plan=outlook.plan, seconds_per_token=outlook.seconds_per_token, moving_s=0.5))

    @precondition(lambda self: self.asked is not None)
    @rule()
    def planner_fails(self) -> None:
        asked, self.asked = self.asked, None
        self.do(m.PlanFailed(version=asked.version, error=BackendError("the planner fell over")))

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def someone_reports(self, data: st.DataObject) -> None:
        self.do(self.orders.pop(data.draw(st.integers(0, len(self.orders) - 1))))

    @precondition(lambda self: self.orders)
    @rule()
    def all_report(self) -> None:
        orders, self.orders = self.orders, []
        for order in orders:
            self.do(order)

    @rule(node=st.sampled_from(NODES), ago=VERSIONS, event=st.sampled_from([m.Prepared, m.Loaded]))
    def someone_reports_what_is_not_so(self, node: Node, ago: int, event: type[m.Prepared] | type[m.Loaded]) -> None:
        """Of an earlier version, so that it is late: a node that lies about the present one is beyond what a state can know."""
        self.do(event(version=max(0, self.state._course.version - 1 - ago), id=node.id))

    @rule(node=st.sampled_from(NODES), ago=VERSIONS, error=st.sampled_from([BackendError("the disk is full"), NodeGone("a neighbour is gone")]))
    def a_load_fails(self, node: Node, ago: int, error: YokeError) -> None:
        self.do(m.LoadFailed(version=max(0, self.state._course.version - ago), id=node.id, error=error))

    @rule(node=st.sampled_from(NODES), ago=VERSIONS)
    def a_plan_breaks(self, node: Node, ago: int) -> None:
        self.do(m.Broken(version=max(0, self.state._course.version - ago), id=node.id, why=f"{node.name} has lost a neighbour"))

    @rule(ago=VERSIONS)
    def the_planner_answers_late(self, ago: int) -> None:
        version = self.state._course.version - 1 - ago
        if version >= 1:
            plan = grid_plan(SPEC, [OWN.id], stages=1, ranks=1, version=version)
            self.do(m.PlanMade(version=version, plan=plan, seconds_per_token=0.1, moving_s=0.0))

    @invariant()
    def what_status_sees_agrees_with_what_was_commanded(self) -> None:
        if not hasattr(self, "state"):
            return
        is_serving = self.state.phase in (Phase.SERVING, Phase.REPLANNING, Phase.PREPARING)
        assert is_serving is (self.laws.serving is not None), self.laws.story()
        assert not is_serving or self.state.plan == self.laws.serving
        assert set(self.state.members) == self.alive.keys()
        assert self.state.version <= self.state._course.version

    @invariant()
    def streams_do_not_wait_beyond_patience_while_nothing_is_done(self) -> None:
        if hasattr(self, "state") and self.state.phase is Phase.WAITING and self.is_waiting_since is not None and not self.state._course._has_failed:
            assert self.now - self.is_waiting_since <= self.state.policy.patience_s + 0.2, self.laws.story()

    def teardown(self) -> None:
        """Quiet: everybody answers as they should, and all who failed have been tried again."""
        if not hasattr(self, "state"):
            return
        self.silent = set()
        if OWN.id not in self.alive:
            self.join(OWN)
        quiet_since = self.now
        while self.now < quiet_since + 1500:
            if self.asked is not None:
                self.plan_is_made()
            if self.orders:
                self.all_report()
            self.wait(0.6 if self.state.phase is not Phase.WAITING else 12.0)
            if self.state.phase is Phase.SERVING and self.asked is None and not self.orders:
                return
            if self.state.phase is Phase.WAITING and not self.fits():
                return
        raise AssertionError(f"a plan fits and none serves: {self.state}\n{self.laws.story()}")

    def fits(self) -> bool:
        there = [self.state.members[node].node for node in self.alive if node != OWN.id and not self.state.members[node].leaving]
        try:
            real_plan([self.state.members[OWN.id].node, *there], 1)
        except PlacementError:
            return False
        return True


TestClusters = Clusters.TestCase
TestClusters.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


# The watch itself: a law that is broken is noticed.


def watched(*messages: m.Event | m.Command) -> None:
    laws = Laws()
    for message in messages:
        if isinstance(message, m.Event):
            laws.handling(message, 0.0)
        else:
            laws.carrying_out([message], 0.0)


PLAN = grid_plan(SPEC, [OWN.id, NODES[1].id], stages=2, ranks=1, version=1)
HERE = (m.Joined(node=OWN, is_coordinator=True), m.Joined(node=NODES[1]))
MADE = (*HERE, m.MakePlan(version=1, nodes=tuple(NODES[:2]), reason=""), m.PlanMade(version=1, plan=PLAN, seconds_per_token=1.0, moving_s=0.0))
LOADING = (*MADE, m.Load(version=1, plan=PLAN))
SERVING = (*LOADING, m.Loaded(version=1, id=OWN.id), m.Loaded(version=1, id=NODES[1].id), m.Serve(version=1))


def test_a_plan_served_by_the_book_breaks_no_law() -> None:
    watched(*SERVING, m.StandDown(version=1, ids=(OWN.id, NODES[1].id)))


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        ((*HERE, m.Ping(id=NODES[2].id)), "dead"),
        ((*HERE, m.Drop(id=NODES[1].id, why=""), m.Ping(id=NODES[1].id)), "dead"),
        ((*HERE, m.Drop(id=NODES[1].id, why=""), m.Drop(id=NODES[1].id, why="")), "dropped twice"),
        ((*HERE, m.MakePlan(version=2, nodes=(OWN,), reason="")), "version 2 follows 0"),
        ((*MADE, m.MakePlan(version=1, nodes=(OWN,), reason="")), "version 1 follows 1"),
        ((*HERE, m.MakePlan(version=1, nodes=(NODES[1], OWN), reason="")), "not the first"),
        ((*HERE, m.MakePlan(version=1, nodes=(OWN, NODES[2]), reason="")), "dead or leave"),
        ((*HERE, m.Leaving(id=NODES[1].id), m.MakePlan(version=1, nodes=(OWN, NODES[1]), reason="")), "dead or leave"),
        ((*MADE, m.Prepare(version=1, plan=PLAN)), "while nothing serves"),
        ((*MADE, m.Lost(id=NODES[1].id, why=""), m.Load(version=1, plan=PLAN)), "dead nodes"),
        ((*LOADING, m.Serve(version=1)), "2 of its nodes are not loaded"),
        ((*LOADING, m.Loaded(version=1, id=OWN.id), m.Loaded(version=2, id=NODES[1].id), m.Serve(version=1)), "1 of its nodes"),
        ((*LOADING, m.Serve(version=2)), "not being loaded"),
        ((*SERVING, m.Load(version=2, plan=PLAN)), "as version 2"),
        ((*SERVING, m.StandDown(version=1, ids=(OWN.id,)), m.Load(version=1, plan=PLAN)), "still work"),
        ((*SERVING, m.StandDown(version=1, ids=(NODES[2].id,))), "stood down"),
        ((*SERVING, m.Release(id=NODES[1].id)), "never asked"),
        ((*LOADING, m.Standby(version=1, plan=PLAN, stage=1, rank=0, id=NODES[1].id)), "does not serve"),
    ],
)
def test_a_broken_law_is_noticed(broken: tuple[m.Event | m.Command, ...], law: str) -> None:
    with pytest.raises(InvariantError, match=law):
        watched(*broken)
