"""What the state of a cluster decides, policy by policy: events in, commands out, and the time is an argument."""

from collections.abc import Iterable, Sequence

import pytest

from yoke.cluster import messages as m
from yoke.cluster.places import Place
from yoke.cluster.state import Phase, Policy, State
from yoke.cluster.trials import ACCIDENTS
from yoke.core.errors import BackendError, InvariantError, NodeError, NodeGone, PlacementError, YokeError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan
from yoke.planner import Machine, grid_plan, seconds_per_token
from yoke.testing.laws import Laws
from yoke.testing.simulated import SPEC, WISH, simulated_node

OWN, B, C, D, E = (simulated_node(number) for number in range(1, 6))
FULL = BackendError("the disk is full")


class Table:
    """A state, the time, and a caller that does what the test says. The laws are watched all the while."""

    def __init__(self, *nodes: Node, policy: Policy | None = None) -> None:
        self.now = 100.0
        self.state, self.laws = State(policy, WISH), Laws()
        self.silent: set[NodeId] = set()
        for node in nodes:
            self.join(node)

    def do(self, event: m.Event) -> list[m.Command]:
        """What follows from an event, without pings."""
        self.laws.handling(event, self.now)
        commands = self.state.handle(event, self.now)
        self.laws.carrying_out(commands, self.now)
        return [command for command in commands if not isinstance(command, m.Ping)]

    def join(self, node: Node) -> list[m.Command]:
        return self.do(m.Joined(node=node, is_coordinator=node is OWN))

    def wait(self, seconds: float) -> list[m.Command]:
        """Ticks; everybody who is not silent is heard."""
        commands: list[m.Command] = []
        for _ in range(round(seconds * 10)):
            self.now = round(self.now + 0.1, 6)
            for node in [node for node in self.state.members if node not in self.silent]:
                commands += self.do(m.Heard(id=node))
            commands += self.do(m.Tick())
        return commands

    def made(self, plan: Plan, seconds: float | None = None, moving_s: float = 1.0) -> list[m.Command]:
        nodes = [self.state.members[shard.node].node for _, _, shard in plan.places()]
        predicted = seconds_per_token(plan, Machine.of(nodes, []))
        return self.do(m.PlanMade(version=plan.version, plan=plan, seconds_per_token=predicted if seconds is None else seconds, moving_s=moving_s))

    def all_report(self, plan: Plan, event: type[m.Loaded] | type[m.Prepared]) -> list[m.Command]:
        return [command for _, _, shard in plan.places() for command in self.do(event(version=plan.version, id=shard.node))]

    def serve(self, *nodes: Node, version: int | None = None, seconds: float | None = None) -> Plan:
        """From the planning that has just been asked for to serving, over these nodes one after the other."""
        plan = pipeline(nodes, version if version is not None else self.state._course.version)
        assert [type(command) for command in self.made(plan, seconds)] == [m.Load]
        assert m.Serve(version=plan.version) in self.all_report(plan, m.Loaded)
        return plan


def pipeline(nodes: Sequence[Node], version: int) -> Plan:
    return grid_plan(SPEC, [node.id for node in nodes], stages=len(nodes), ranks=1, version=version)


def serving(*nodes: Node, spares: Sequence[Node] = (), policy: Policy | None = None, seconds: float | None = None) -> tuple[Table, Plan]:
    """A table whose plan is served by ``nodes``, for long enough to be trusted."""
    table = Table(*nodes, *spares, policy=policy)
    table.wait(0.5)
    plan = table.serve(*nodes, seconds=seconds)
    table.wait(20)
    return table, plan


def only(commands: Iterable[m.Command], kind: type) -> list:
    return [command for command in commands if isinstance(command, kind)]


def the(commands: Iterable[m.Command], kind: type):
    found = only(commands, kind)
    assert len(found) == 1, f"expected one {kind.__name__} in {list(commands)}"
    return found[0]


def ids(*nodes: Node) -> tuple[NodeId, ...]:
    return tuple(node.id for node in nodes)


def why(commands: Iterable[m.Command]) -> str:
    return "\n".join(note.text for note in only(commands, m.Note))


# from the first machine to the first token


def test_newcomers_share_one_planning_with_the_coordinator_first() -> None:
    table = Table(B, OWN)
    assert table.wait(0.3) == []
    table.join(C)
    asked = the(table.wait(0.2), m.MakePlan)
    assert (asked.version, asked.nodes) == (1, (OWN, B, C))
    assert "node-3 has joined" in asked.reason
    assert table.wait(5) == []
    assert table.state.phase is Phase.PLANNING


def test_nothing_is_planned_without_the_coordinator() -> None:
    table = Table(B, C)
    assert only(table.wait(20), m.MakePlan) == []
    the(table.join(OWN), m.MakePlan)


def test_a_plan_is_served_when_each_of_its_nodes_is_loaded_and_not_before() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    plan = pipeline((OWN, B, C), 1)
    assert table.made(plan) == [m.Load(version=1, plan=plan)], "nothing serves, so nothing is prepared"
    for node in (C, OWN):
        assert table.do(m.Loaded(version=1, id=node.id)) == []
    assert table.do(m.Loaded(version=1, id=OWN.id)) == [], "said twice"
    assert table.do(m.Loaded(version=1, id=B.id)) == [m.Serve(version=1)]
    assert (table.state.phase, table.state.plan, table.state.version) == (Phase.SERVING, plan, 1)


def test_what_is_said_of_another_version_is_counted_and_changes_nothing() -> None:
    table, plan = serving(OWN, B)
    before = table.state.late
    for event in (
        m.PlanMade(version=1, plan=plan, seconds_per_token=1.0, moving_s=0.0),
        m.PlanFailed(version=1, error=PlacementError("no")),
        m.Prepared(version=1, id=B.id),
        m.Loaded(version=7, id=B.id),
        m.LoadFailed(version=1, id=B.id, error=FULL),
        m.Broken(version=3, id=B.id, why="lost"),
        m.Loaded(version=1, id=E.id),
    ):
        assert table.do(event) == []
    assert table.state.late == before + 7
    assert table.state.phase is Phase.SERVING


@pytest.mark.parametrize("wrong", [pipeline((OWN, B), 2), pipeline((OWN, E), 1)], ids=["version", "stranger"])
def test_a_plan_that_was_not_asked_for_is_our_own_fault(wrong: Plan) -> None:
    table = Table(OWN, B)
    table.wait(0.5)
    with pytest.raises(InvariantError):
        table.state.handle(m.PlanMade(version=1, plan=wrong, seconds_per_token=0.1, moving_s=0.0), table.now)


def test_a_second_coordinator_is_our_own_fault() -> None:
    table = Table(OWN)
    with pytest.raises(InvariantError, match="a cluster has one"):
        table.state.handle(m.Joined(node=B, is_coordinator=True), table.now)


# changes that nobody is forced to make


def asked_for_newcomer(table: Table, newcomer: Node) -> m.MakePlan:
    table.join(newcomer)
    assert only(table.wait(0.4), m.MakePlan) == []
    return the(table.wait(0.2), m.MakePlan)


def test_a_newcomer_that_is_worth_it_is_prepared_while_the_old_plan_serves() -> None:
    table, old = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    assert table.state.phase is Phase.REPLANNING
    new = pipeline((OWN, B, C), asked.version)
    commands = table.made(new, 0.08, moving_s=11.9)
    assert [type(command) for command in commands] == [m.Note, m.Prepare]
    assert "80.0 ms instead of 100.0 ms" in why(commands)
    assert "saves 12.0 s in 60 s and costs 11.9 s" in why(commands)
    assert (table.state.phase, table.state.plan) == (Phase.PREPARING, old)
    assert table.do(m.Prepared(version=new.version, id=OWN.id)) == []
    assert table.do(m.Prepared(version=new.version, id=C.id)) == []
    assert table.do(m.Prepared(version=new.version, id=B.id)) == [m.StandDown(version=1, ids=ids(OWN, B)), m.Load(version=new.version, plan=new)]
    assert (table.state.phase, table.state.version) == (Phase.LOADING, new.version)
    assert table.all_report(new, m.Loaded) == [m.Serve(version=new.version)]
    assert table.wait(30) == []


@pytest.mark.parametrize(("seconds", "moving_s"), [(0.0951, 0.0), (0.08, 12.1), (0.2, 0.0)], ids=["gain", "cost", "worse"])
def test_a_change_that_is_not_worth_it_is_not_made_and_the_figures_are_told(seconds: float, moving_s: float) -> None:
    table, plan = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    commands = table.made(pipeline((OWN, B, C), asked.version), seconds, moving_s)
    assert [type(command) for command in commands] == [m.Note]
    assert f"{1e3 * seconds:.1f} ms instead of 100.0 ms" in why(commands)
    assert (f"costs {moving_s:.1f} s of loading" in why(commands)) == (seconds < 0.1), "what would be worse has no price"
    assert ": the plan stays" in why(commands)
    assert (table.state.phase, table.state.plan) == (Phase.SERVING, plan)
    assert table.wait(100) == [], "and not asked for again"


def test_the_same_plan_again_moves_nothing() -> None:
    table, plan = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    commands = table.made(pipeline((OWN, B), asked.version), 0.01)
    assert [type(command) for command in commands] == [m.Note]
    assert "still the best" in why(commands)
    assert table.state.plan == plan


def test_what_is_predicted_anew_of_the_plan_that_serves_counts_from_then_on() -> None:
    table, _ = serving(OWN, B, seconds=0.1)
    table.made(pipeline((OWN, B), asked_for_newcomer(table, C).version), 0.05)
    commands = table.made(pipeline((OWN, B, C), asked_for_newcomer(table, D).version), 0.049)
    assert "49.0 ms instead of 50.0 ms" in why(commands)
    assert table.state.phase is Phase.SERVING


def test_a_layout_that_a_person_wished_for_replaces_another_whatever_it_costs() -> None:
    table, old = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    new = pipeline((OWN, B, C), asked.version)
    commands = table.do(m.PlanMade(version=new.version, plan=new, seconds_per_token=0.2, moving_s=100.0, is_wished=True))
    assert [type(command) for command in commands] == [m.Note, m.Prepare]
    assert "the plan changes" in why(commands)
    table.all_report(new, m.Prepared)
    table.all_report(new, m.Loaded)
    assert table.state.plan == new != old
    asked = asked_for_newcomer(table, D)
    same_layout = pipeline((OWN, B, D), asked.version)
    commands = table.do(m.PlanMade(version=asked.version, plan=same_layout, seconds_per_token=0.2, moving_s=0.0, is_wished=True))
    assert "the plan stays" in why(commands), "the layout that serves is the wished one already"


def test_a_plan_by_hand_comes_back_with_the_machines_that_it_names() -> None:
    table, _ = serving(OWN, C, seconds=0.1)
    asked = asked_for_newcomer(table, B)
    by_hand = pipeline((OWN, B), asked.version)
    made = m.PlanMade(version=asked.version, plan=by_hand, seconds_per_token=0.1, moving_s=1.0, is_wished=True, is_by_hand=True)
    assert [type(command) for command in table.do(made)] == [m.Note, m.Prepare]


def test_the_coordinators_worker_that_dies_while_others_load_without_it_starts_all_over() -> None:
    """It gives them the model: nobody of them is to blame."""
    table = Table(OWN, B, C)
    table.wait(0.5)
    plan = pipeline((B, C), 1)
    table.made(plan)
    commands = table.do(m.Lost(id=OWN.id, why="own is gone"))
    assert [command for command in commands if isinstance(command, m.StandDown)] == [m.StandDown(version=1, ids=(B.id, C.id))]
    assert not [command for command in commands if isinstance(command, m.MakePlan)], "not before it is back"
    again = table.do(m.Joined(node=OWN, is_coordinator=True))
    assert [len(command.nodes) for command in [*again, *table.wait(1.0)] if isinstance(command, m.MakePlan)] == [3]


def test_a_coordinator_that_has_waited_in_vain_blames_those_who_were_not_ready() -> None:
    table = Table(OWN, B)
    table.wait(0.5)
    table.made(pipeline((B, OWN), 1))
    commands = table.do(m.LoadFailed(version=1, id=OWN.id, error=NodeGone("B did not come")))
    for node in (OWN, B):
        commands += table.do(m.Heard(id=node.id))
    assert "B cannot do its part" in why(commands) or f"{B.name} cannot do its part" in why(commands)
    assert not [command for command in commands if isinstance(command, m.FailStreams)]


def test_no_other_plan_fits_and_the_one_that_serves_stays() -> None:
    table, plan = serving(OWN, B)
    asked = asked_for_newcomer(table, C)
    assert "stays" in why(table.do(m.PlanFailed(version=asked.version, error=PlacementError("too little memory"))))
    assert (table.state.phase, table.state.plan) == (Phase.SERVING, plan)


def test_a_planner_that_fell_over_is_asked_again_and_one_that_found_nothing_is_not() -> None:
    for error, is_asked_again in ((NodeError("out of memory"), True), (PlacementError("too little memory"), False)):
        table = Table(OWN, B)
        table.wait(0.5)
        table.do(m.PlanFailed(version=1, error=error))
        assert only(table.wait(9.9), m.MakePlan) == []
        assert bool(only(table.wait(0.2), m.MakePlan)) is is_asked_again


def test_who_joins_while_a_change_is_under_way_waits_for_its_end() -> None:
    table, _ = serving(OWN, B, seconds=0.1)
    first = asked_for_newcomer(table, C)
    table.join(D)
    assert table.wait(10) == []
    table.made(pipeline((OWN, B, C), first.version), 0.2)
    second = the(table.wait(0.1), m.MakePlan)
    assert (second.version, second.nodes) == (first.version + 1, (OWN, B, C, D))


def measure(table: Table, node: Node, speed: float, for_s: float) -> list[m.Command]:
    commands = []
    for _ in range(round(for_s / 0.5)):
        commands += table.do(m.Measured(id=node.id, matvec_bytes_per_s=speed)) + table.wait(0.5)
    return commands


def test_a_node_that_stays_slow_is_planned_with_as_it_is() -> None:
    table, _ = serving(OWN, B)
    assert measure(table, B, 3.1e9, 30) == [], "less than a quarter off"
    assert measure(table, B, 1e9, 4.5) == []
    assert measure(table, B, 4e9, 0.5) == [], "it was a moment only"
    assert measure(table, B, 1e9, 5.0) == []
    asked = the(measure(table, B, 1e9, 1.0), m.MakePlan)
    assert asked.nodes[1].device.matvec_bytes_per_s == 1e9
    assert "node-2 computes at 1.00 GB/s, not 4.00" in asked.reason


def test_a_slow_node_counts_against_the_plan_that_serves() -> None:
    table, plan = serving(OWN, B)
    asked = the(measure(table, B, 1e9, 6.0), m.MakePlan)
    after = seconds_per_token(plan, Machine.of(asked.nodes, []))
    commands = table.made(grid_plan(SPEC, ids(OWN), stages=1, ranks=1, version=asked.version), after / 2)
    assert f"{1e3 * after / 2:.1f} ms instead of {1e3 * after:.1f} ms" in why(commands)
    the(commands, m.Prepare)


# losses


def test_a_dead_node_of_the_plan_stops_the_others_at_once_and_who_is_left_starts_over() -> None:
    table, _ = serving(OWN, B, C)
    commands = table.do(m.Lost(id=B.id, why="node-2 is gone"))
    assert [type(command) for command in commands] == [m.Note, m.StandDown, m.MakePlan]
    assert the(commands, m.StandDown) == m.StandDown(version=1, ids=ids(OWN, C))
    assert the(commands, m.MakePlan) == m.MakePlan(version=2, nodes=(OWN, C), reason="node-2 is gone")
    table.serve(OWN, C)


def test_a_dead_node_that_has_no_place_is_only_forgotten() -> None:
    table, _ = serving(OWN, B, spares=(C,))
    assert table.do(m.Lost(id=C.id, why="node-3 is gone")) == []
    assert C.id not in table.state.members
    assert table.do(m.Lost(id=C.id, why="node-3 is gone")) == []
    assert table.do(m.Leaving(id=C.id)) == table.do(m.Heard(id=C.id)) == table.do(m.Measured(id=C.id, matvec_bytes_per_s=1.0)) == []


def test_a_death_while_nothing_serves_yet_starts_the_planning_over() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    assert table.do(m.Lost(id=B.id, why="gone")) == [
        m.MakePlan(version=2, nodes=(OWN, C), reason="node-1 has joined; node-2 has joined; node-3 has joined; gone")
    ]
    late = table.state.late
    assert table.do(m.PlanMade(version=1, plan=pipeline((OWN, B, C), 1), seconds_per_token=0.1, moving_s=0.0)) == []
    assert table.state.late == late + 1
    table.serve(OWN, C)


def test_a_death_while_another_plan_is_looked_for_starts_that_over_and_the_old_one_serves_on() -> None:
    table, plan = serving(OWN, B, spares=(D,), seconds=0.1)
    asked = asked_for_newcomer(table, C)
    commands = table.do(m.Lost(id=D.id, why="node-4 is gone"))
    assert the(commands, m.MakePlan).nodes == (OWN, B, C)
    assert only(commands, m.StandDown) == []
    assert the(commands, m.MakePlan).version == asked.version + 1
    assert table.state.plan == plan


def test_a_death_while_preparing_starts_over_and_the_old_plan_serves_on() -> None:
    table, plan = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    table.made(pipeline((OWN, B, C), asked.version), 0.05)
    commands = table.do(m.Lost(id=C.id, why="node-3 is gone"))
    assert [type(command) for command in commands] == [m.MakePlan]
    assert (table.state.phase, table.state.plan) == (Phase.REPLANNING, plan)


def test_a_death_in_the_serving_plan_while_preparing_gives_both_up() -> None:
    table, _ = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    table.made(pipeline((OWN, B, C), asked.version), 0.05)
    commands = table.do(m.Lost(id=B.id, why="node-2 is gone"))
    assert the(commands, m.StandDown) == m.StandDown(version=1, ids=ids(OWN))
    assert the(commands, m.MakePlan).nodes == (OWN, C)
    assert table.do(m.Prepared(version=asked.version, id=OWN.id)) == []
    table.serve(OWN, C)


def test_a_death_while_loading_starts_over_with_who_is_left() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    plan = pipeline((OWN, B, C), 1)
    table.made(plan)
    table.do(m.Loaded(version=1, id=B.id))
    commands = table.do(m.Lost(id=C.id, why="node-3 is gone"))
    assert the(commands, m.StandDown) == m.StandDown(version=1, ids=ids(OWN, B))
    assert the(commands, m.MakePlan).nodes == (OWN, B)
    assert table.do(m.Loaded(version=1, id=OWN.id)) == []
    table.serve(OWN, B)


def test_a_death_during_replay_starts_over() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    table.serve(OWN, B, C)
    the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.MakePlan)
    table.serve(OWN, C)


def test_several_that_fall_silent_together_are_buried_together() -> None:
    table, _ = serving(OWN, B, C, D)
    table.silent = {B.id, D.id}
    commands = table.wait(2.6)
    assert [command.id for command in only(commands, m.Drop)] == [B.id, D.id]
    assert the(commands, m.StandDown).ids == ids(OWN, C)
    assert the(commands, m.MakePlan).nodes == (OWN, C)


def test_the_coordinators_own_worker_may_die_and_come_back() -> None:
    table, _ = serving(OWN, B)
    commands = table.do(m.Lost(id=OWN.id, why="node-1 is gone"))
    assert the(commands, m.StandDown).ids == ids(B)
    assert only(commands, m.MakePlan) == []
    assert table.wait(5) == []
    assert the(table.join(OWN), m.MakePlan).nodes == (OWN, B)
    table.serve(OWN, B)


def test_a_coordinator_that_does_not_come_back_ends_the_streams() -> None:
    table, _ = serving(OWN, B)
    table.do(m.Lost(id=OWN.id, why="node-1 is gone"))
    assert only(table.wait(59.8), m.FailStreams) == []
    error = the(table.wait(0.4), m.FailStreams).error
    assert isinstance(error, NodeError)
    assert str(error).startswith("node-1 is gone. Nothing could serve the model for 60 s")


def test_a_member_that_comes_back_before_it_was_missed_is_empty() -> None:
    table, _ = serving(OWN, B)
    commands = table.join(B)
    assert the(commands, m.StandDown).ids == ids(OWN)
    assert the(commands, m.MakePlan).nodes == (OWN,)
    assert B.id in table.state.members
    assert "came back with an empty worker" in why(commands)


def test_a_node_that_dies_again_and_again_while_it_loads_is_left_out_for_a_while() -> None:
    table = Table(OWN)
    for expected in (*[(OWN, B)] * (1 + ACCIDENTS), (OWN,)):
        table.join(B)
        asked = the(table.wait(0.5), m.MakePlan)
        assert asked.nodes == expected
        if B in expected:
            table.made(pipeline((OWN, B), asked.version))
            table.do(m.PlanFailed(version=the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.MakePlan).version, error=PlacementError("too big")))
    table.do(m.PlanFailed(version=asked.version, error=PlacementError("too big")))
    assert only(table.wait(9.0), m.MakePlan) == []
    assert the(table.wait(1.0), m.MakePlan).nodes == (OWN, B)


# silence


def test_a_silent_member_is_suspected_then_dropped_within_three_seconds() -> None:
    table, _ = serving(OWN, B)
    table.silent = {B.id}
    assert table.wait(0.9) == []
    suspect = the(table.wait(0.3), m.Suspect)
    assert (suspect.id, suspect.silent_s) == (B.id, pytest.approx(1.0, abs=0.11))
    view = table.state.members[B.id]
    assert (view.suspect, view.silent_s) == (True, pytest.approx(1.2, abs=0.01))
    commands = table.wait(1.5)
    drop = the(commands, m.Drop)
    assert (drop.id, drop.why) == (B.id, "node-2 is gone: not heard for 2.5 s")
    the(commands, m.MakePlan)
    assert table.do(m.Lost(id=B.id, why="closed")) == []


def test_a_suspect_that_is_heard_in_time_is_trusted_again() -> None:
    table, _ = serving(OWN, B)
    table.silent = {B.id}
    table.wait(2.3)
    table.silent = set()
    assert table.do(m.Heard(id=B.id)) == [m.Trust(id=B.id)]
    assert table.wait(10) == []


def test_every_member_is_pinged_and_its_own_pause_is_nobodys_fault() -> None:
    table, _ = serving(OWN, B)
    pinged = []
    for _ in range(10):
        table.now = round(table.now + 0.1, 6)
        pinged += [command.id for command in table.state.handle(m.Tick(), table.now) if isinstance(command, m.Ping)]
    assert pinged.count(OWN.id) == pinged.count(B.id) == 3
    table.now += 600
    assert only(table.do(m.Tick()), m.Drop) == []


# going in peace


def test_who_leaves_is_let_go_when_a_plan_without_it_serves_even_a_slower_one() -> None:
    table, old = serving(OWN, B, seconds=0.05)
    asked = the(table.do(m.Leaving(id=B.id)), m.MakePlan)
    assert (asked.nodes, asked.reason) == ((OWN,), "node-2 leaves")
    assert table.do(m.Leaving(id=B.id)) == [], "once is enough"
    assert table.state.members[B.id].leaving
    new = pipeline((OWN,), asked.version)
    commands = table.made(new, 0.1, moving_s=500.0)
    assert "the plan changes" in why(commands)
    the(commands, m.Prepare)
    assert table.state.plan == old
    assert [type(c) for c in table.all_report(new, m.Prepared)] == [m.StandDown, m.Load]
    assert table.all_report(new, m.Loaded) == [m.Serve(version=new.version), m.Release(id=B.id)]
    assert table.wait(10) == []
    assert table.do(m.Lost(id=B.id, why="left")) == []


def test_who_has_no_place_leaves_at_once() -> None:
    table, _ = serving(OWN, B, spares=(C,))
    assert table.do(m.Leaving(id=C.id)) == [m.Release(id=C.id)]
    assert table.wait(10) == []
    table.join(D)
    assert C not in the(table.wait(0.6), m.MakePlan).nodes


def test_a_leaving_that_stops_the_model_is_noted_and_granted() -> None:
    table, _ = serving(OWN, B)
    asked = the(table.do(m.Leaving(id=B.id)), m.MakePlan)
    commands = table.do(m.PlanFailed(version=asked.version, error=PlacementError("60 MB are missing")))
    assert [type(command) for command in commands] == [m.Note, m.Release]
    assert why(commands) == "no plan without node-2 fits (60 MB are missing): its leaving stops the model"
    assert table.state.phase is Phase.SERVING
    the(table.do(m.Lost(id=B.id, why="node-2 left")), m.StandDown)


def test_who_leaves_while_a_plan_with_it_is_prepared_stops_that() -> None:
    table, _ = serving(OWN, B, seconds=0.1)
    first = asked_for_newcomer(table, C)
    table.made(pipeline((OWN, B, C), first.version), 0.05)
    commands = table.do(m.Leaving(id=C.id))
    assert the(commands, m.Release).id == C.id
    assert the(commands, m.MakePlan).nodes == (OWN, B)


def test_who_leaves_while_its_plan_loads_is_let_go_by_the_next_one() -> None:
    table = Table(OWN, B)
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    assert table.do(m.Leaving(id=B.id)) == []
    assert table.all_report(plan, m.Loaded) == [m.Serve(version=1)]
    assert the(table.wait(0.1), m.MakePlan).nodes == (OWN,)


def test_who_leaves_while_its_plan_loads_is_let_go_when_that_is_given_up() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    table.made(pipeline((OWN, B, C), 1))
    assert table.do(m.Leaving(id=B.id)) == []
    commands = table.do(m.LoadFailed(version=1, id=C.id, error=FULL))
    assert the(commands, m.Release).id == B.id
    assert the(commands, m.MakePlan).nodes == (OWN,)


def test_who_leaves_when_nothing_serves_goes_at_once() -> None:
    table = Table(OWN, B)
    assert table.do(m.Leaving(id=B.id)) == [m.Release(id=B.id)]
    assert the(table.wait(0.5), m.MakePlan).nodes == (OWN,)


def test_the_coordinators_leaving_stops_the_model() -> None:
    table, _ = serving(OWN, B)
    commands = table.do(m.Leaving(id=OWN.id))
    assert [type(command) for command in commands] == [m.Note, m.Release]
    assert "stops the model" in why(commands)


# patience


def starved() -> Table:
    table, _ = serving(OWN, B)
    asked = the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.MakePlan)
    table.do(m.PlanFailed(version=asked.version, error=PlacementError("60 MB are missing")))
    assert table.state.phase is Phase.WAITING
    return table


def test_streams_wait_for_a_machine_and_end_once_in_a_named_error() -> None:
    table = starved()
    assert table.wait(59.8) == []
    error = the(table.wait(0.4), m.FailStreams).error
    assert isinstance(error, NodeError)
    assert "node-2 is gone; 60 MB are missing. Nothing could serve the model for 60 s" in str(error)
    assert table.wait(100) == []


def test_any_newcomer_is_tried_and_a_plan_that_fits_serves_again() -> None:
    table = starved()
    table.wait(70)
    asked = asked_for_newcomer(table, C)
    assert asked.nodes == (OWN, C)
    table.do(m.PlanFailed(version=asked.version, error=PlacementError("20 MB are missing")))
    assert table.wait(50) == []
    asked_for_newcomer(table, D)
    table.serve(OWN, C, D)


def test_a_newcomer_that_is_not_enough_does_not_make_streams_wait_longer() -> None:
    table = starved()
    table.wait(50)
    asked = asked_for_newcomer(table, C)
    table.do(m.PlanFailed(version=asked.version, error=PlacementError("20 MB are missing")))
    assert only(table.wait(8), m.FailStreams) == []
    the(table.wait(2), m.FailStreams)


def test_streams_do_not_end_while_a_plan_is_being_looked_for() -> None:
    table, _ = serving(OWN, B)
    asked = the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.MakePlan)
    assert table.wait(70) == []
    commands = table.do(m.PlanFailed(version=asked.version, error=PlacementError("60 MB are missing")))
    assert [type(command) for command in commands] == [m.Note, m.FailStreams], "they have waited long enough"


def test_patience_begins_anew_with_each_plan_that_served() -> None:
    table = starved()
    table.wait(50)
    asked_for_newcomer(table, C)
    table.serve(OWN, C)
    asked = the(table.do(m.Lost(id=C.id, why="node-3 is gone")), m.MakePlan)
    table.do(m.PlanFailed(version=asked.version, error=PlacementError("no")))
    assert table.wait(50) == []


# loads that fail


def loading(*nodes: Node, policy: Policy | None = None) -> tuple[Table, Plan]:
    table = Table(*nodes, policy=policy)
    table.wait(0.5)
    plan = pipeline(nodes, 1)
    table.made(plan)
    return table, plan


def test_a_node_that_cannot_load_is_left_out_for_longer_each_time() -> None:
    table, _ = loading(OWN, B, C)
    version = 1
    for wait_s in (10, 20, 40):
        commands = table.do(m.LoadFailed(version=version, id=B.id, error=FULL))
        assert the(commands, m.StandDown).version == version
        assert the(commands, m.MakePlan).nodes == (OWN, C)
        assert f"node-2 cannot do its part (the disk is full); it is left out of plans until it is tried again in {wait_s} s" in why(commands)
        table.serve(OWN, C, seconds=0.1)
        assert only(table.wait(wait_s - 0.1), m.MakePlan) == []
        asked = the(table.wait(0.2), m.MakePlan)
        assert (asked.nodes, asked.reason) == ((OWN, B, C), "node-2 may be tried again")
        version, plan = asked.version, pipeline((OWN, B, C), asked.version)
        table.made(plan, 0.05)
        table.all_report(plan, m.Prepared)


def test_a_node_that_has_served_well_since_it_failed_starts_afresh() -> None:
    table, _ = loading(OWN, B, C)
    table.do(m.LoadFailed(version=1, id=B.id, error=FULL))
    table.serve(OWN, C, seconds=0.1)
    table.wait(10.1)
    plan = pipeline((OWN, B, C), table.state._course.version)
    table.made(plan, 0.05)
    table.all_report(plan, m.Prepared)
    table.all_report(plan, m.Loaded)
    table.wait(10.1)
    asked = the(table.do(m.Lost(id=C.id, why="node-3 is gone")), m.MakePlan)
    table.made(pipeline((OWN, B), asked.version))
    assert "tried again in 10 s" in why(table.do(m.LoadFailed(version=asked.version, id=B.id, error=FULL)))


def test_a_coordinator_that_cannot_load_ends_the_streams_and_is_tried_again() -> None:
    table, _ = loading(OWN, B)
    for wait_s in (10, 20):
        commands = table.do(m.LoadFailed(version=table.state.version, id=OWN.id, error=FULL))
        assert [type(command) for command in commands] == [m.Note, m.StandDown, m.FailStreams]
        assert the(commands, m.FailStreams).error is FULL
        assert table.wait(wait_s - 0.1) == []
        asked = the(table.wait(0.2), m.MakePlan)
        assert asked.nodes == (OWN, B)
        table.made(pipeline((OWN, B), asked.version))
    table.all_report(pipeline((OWN, B), asked.version), m.Loaded)
    assert table.state.phase is Phase.SERVING


def test_a_node_that_cannot_prepare_disturbs_nobody() -> None:
    table, plan = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    table.made(pipeline((OWN, B, C), asked.version), 0.05)
    commands = table.do(m.LoadFailed(version=asked.version, id=C.id, error=FULL))
    assert [type(command) for command in commands] == [m.Note, m.MakePlan]
    assert the(commands, m.MakePlan).nodes == (OWN, B)
    assert table.state.plan == plan


def test_a_coordinator_that_cannot_prepare_goes_on_serving_and_lets_the_leavers_go() -> None:
    table, plan = serving(OWN, B)
    asked = the(table.do(m.Leaving(id=B.id)), m.MakePlan)
    table.made(pipeline((OWN,), asked.version), 0.1)
    commands = table.do(m.LoadFailed(version=asked.version, id=OWN.id, error=FULL))
    assert [type(command) for command in commands] == [m.Note, m.Note, m.Release]
    assert table.state.plan == plan
    assert only(table.wait(9.9), m.MakePlan) == []
    the(table.wait(0.2), m.MakePlan)


def test_a_coordinator_that_could_not_prepare_still_answers_a_death_at_once() -> None:
    table = Table(OWN, B, C)
    table.wait(0.5)
    table.serve(OWN, B, C, seconds=0.1)
    asked = asked_for_newcomer(table, D)
    table.made(pipeline((OWN, B, C, D), asked.version), 0.05)
    assert only(table.do(m.LoadFailed(version=asked.version, id=OWN.id, error=FULL)), m.MakePlan) == []
    assert the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.MakePlan).nodes == (OWN, C, D)


def test_a_load_that_does_not_end_is_the_fault_of_those_who_have_not_reported() -> None:
    table, _ = loading(OWN, B, C, policy=Policy(load_s=30.0))
    table.do(m.Loaded(version=1, id=B.id))
    assert table.wait(29.9) == []
    commands = table.wait(0.2)
    assert the(commands, m.MakePlan).nodes == (OWN, B), "the coordinator waits for the others, so it is not to blame"
    assert "node-3 has not loaded its part of plan 1 within 30 s" in why(commands)


def test_a_load_that_only_the_coordinator_does_not_end_ends_the_streams() -> None:
    table, _ = loading(OWN, B, policy=Policy(load_s=30.0))
    table.do(m.Loaded(version=1, id=B.id))
    assert isinstance(the(table.wait(30.1), m.FailStreams).error, NodeError)


# a plan that breaks


def broken(error: YokeError | None) -> tuple[Table, list[m.Command]]:
    if error is None:
        table, plan = serving(OWN, B, C)
        return table, table.do(m.Broken(version=plan.version, id=B.id, why="node-2 has lost a neighbour"))
    table, _ = loading(OWN, B, C)
    return table, table.do(m.LoadFailed(version=1, id=B.id, error=error))


@pytest.mark.parametrize("error", [None, NodeGone("a neighbour is gone")], ids=["serving", "loading"])
def test_when_a_plan_breaks_everybody_is_asked_and_the_dead_one_is_found(error: YokeError | None) -> None:
    table, commands = broken(error)
    assert [type(command) for command in commands] == [m.Note, m.StandDown]
    assert table.state.phase is Phase.CALLING
    assert table.do(m.Broken(version=1, id=OWN.id, why="so have I")) == []
    for node in (OWN, B):
        assert table.do(m.Heard(id=node.id)) == []
    commands = table.do(m.Lost(id=C.id, why="node-3 is gone"))
    assert the(commands, m.MakePlan).nodes == (OWN, B), "who reported it has done nothing wrong"
    table.serve(OWN, B)


def test_the_roll_is_called_by_pings_out_of_turn() -> None:
    table, plan = serving(OWN, B)
    commands = table.state.handle(m.Broken(version=plan.version, id=B.id, why="lost"), table.now)
    assert [command.id for command in only(commands, m.Ping)] == [OWN.id, B.id]


def test_when_all_are_there_the_same_nodes_try_again() -> None:
    table, _ = broken(None)
    commands = table.wait(0.1)
    assert the(commands, m.MakePlan).nodes == (OWN, B, C)
    table.serve(OWN, B, C)


def test_a_node_whose_plan_breaks_again_and_again_without_a_death_is_left_out() -> None:
    table, _ = broken(None)
    table.wait(0.1)
    for expected in (*[(OWN, B, C)] * ACCIDENTS, (OWN, C)):
        plan = table.serve(OWN, B, C)
        table.do(m.Broken(version=plan.version, id=B.id, why="node-2 has lost a neighbour"))
        asked = the(table.wait(0.1), m.MakePlan)
        assert asked.nodes == expected


def test_a_node_that_cannot_reach_its_neighbours_is_left_out() -> None:
    table, _ = broken(NodeGone("a neighbour is gone"))
    assert the(table.wait(0.1), m.MakePlan).nodes == (OWN, C)


def test_whom_the_coordinator_cannot_reach_is_left_out() -> None:
    table, _ = loading(OWN, B, C)
    table.do(m.Loaded(version=1, id=B.id))
    table.do(m.LoadFailed(version=1, id=OWN.id, error=NodeGone("a neighbour is gone")))
    commands = table.wait(0.1)
    assert the(commands, m.MakePlan).nodes == (OWN, B)
    assert only(commands, m.FailStreams) == []


# copies


REPLICAS = Policy(replicas=1)


def with_copies() -> tuple[Table, Plan, m.Standby, m.Standby]:
    table = Table(OWN, B, C, D, E, policy=REPLICAS)
    table.wait(0.5)
    plan = pipeline((OWN, B, C), 1)
    table.made(plan)
    orders = only(table.all_report(plan, m.Loaded), m.Standby)
    assert {order.id for order in orders} == set(ids(D, E))
    assert {(order.stage, order.rank, order.version, order.plan) for order in orders} == {(1, 0, 1, plan), (2, 0, 1, plan)}
    for order in orders:
        assert table.do(m.Loaded(version=1, id=order.id)) == []
    table.wait(20)
    by_place = {order.stage: order for order in orders}
    return table, plan, by_place[1], by_place[2]


def test_a_spare_that_holds_the_place_of_the_dead_takes_over_without_planning() -> None:
    table, plan, copy, _ = with_copies()
    commands = table.do(m.Lost(id=B.id, why="node-2 is gone"))
    assert [type(command) for command in commands] == [m.Note, m.StandDown, m.Load]
    new = the(commands, m.Load).plan
    assert new.version == 2
    assert [shard.node for _, _, shard in new.places()] == [OWN.id, copy.id, C.id]
    assert [stage.blocks for stage in new.stages] == [stage.blocks for stage in plan.stages]
    assert Place.of(new, (1, 0)) == Place.of(plan, (1, 0))
    served = table.all_report(new, m.Loaded)
    assert served[0] == m.Serve(version=2)
    assert "took over" in the(table.wait(1), m.MakePlan).reason, "is there a better plan, now that nothing is urgent?"


def test_copies_that_are_still_right_are_kept_by_the_next_plan() -> None:
    table, _, _, kept = with_copies()
    new = the(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.Load).plan
    assert only(table.all_report(new, m.Loaded), m.Standby) == [], "one spare took over, the other keeps its copy"
    assert table.state.members[kept.id].standby == (2, 0)
    again = the(table.do(m.Lost(id=C.id, why="node-3 is gone")), m.Load).plan
    assert [shard.node for _, _, shard in again.places()][2] == kept.id


def test_a_spare_that_has_not_loaded_its_copy_cannot_take_over() -> None:
    table = Table(OWN, B, C, policy=REPLICAS)
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    assert the(table.all_report(plan, m.Loaded), m.Standby).id == C.id
    assert table.state.members[C.id].standby == (1, 0)
    commands = table.do(m.Lost(id=B.id, why="node-2 is gone"))
    asked = the(commands, m.MakePlan)
    commands = table.made(pipeline((OWN, C), asked.version))
    assert [type(command) for command in commands] == [m.StandDown, m.Load], "it loads its new place at once"
    assert the(commands, m.StandDown) == m.StandDown(version=1, ids=ids(C))


def test_the_coordinators_place_has_no_copy() -> None:
    table, _, _, _ = with_copies()
    commands = table.do(m.Lost(id=OWN.id, why="node-1 is gone"))
    assert only(commands, m.Load) == []
    the(table.join(OWN), m.MakePlan)


def test_a_spare_that_cannot_hold_a_copy_is_replaced_by_another() -> None:
    table = Table(OWN, B, C, policy=REPLICAS)
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    table.all_report(plan, m.Loaded)
    table.wait(20)
    commands = table.do(m.LoadFailed(version=1, id=C.id, error=FULL))
    assert "node-3 cannot hold a copy (the disk is full)" in why(commands)
    asked = asked_for_newcomer(table, D)
    assert asked.nodes == (OWN, B, D)
    assert the(table.made(pipeline((OWN, B), asked.version)), m.Standby).id == D.id


def test_a_copy_that_is_never_ready_is_given_to_another() -> None:
    table = Table(OWN, B, C, policy=Policy(replicas=1, load_s=30.0))
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    table.all_report(plan, m.Loaded)
    assert "was not ready within 30 s" in why(table.wait(30.1))
    assert table.state.members[C.id].standby is None


def test_a_spare_with_a_copy_that_dies_is_followed_by_another() -> None:
    table = Table(OWN, B, D, E, policy=REPLICAS)
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    first = the(table.all_report(plan, m.Loaded), m.Standby)
    other = {D.id: E.id, E.id: D.id}[first.id]
    assert the(table.do(m.Lost(id=first.id, why="gone")), m.Standby).id == other


def test_a_spare_that_came_back_empty_is_ordered_to_copy_again() -> None:
    table = Table(OWN, B, C, policy=REPLICAS)
    table.wait(0.5)
    plan = pipeline((OWN, B), 1)
    table.made(plan)
    table.all_report(plan, m.Loaded)
    table.do(m.Loaded(version=1, id=C.id))
    table.wait(20)
    asked_for_newcomer(table, D)
    asked = the(table.do(m.Lost(id=C.id, why="node-3 is gone")), m.MakePlan)
    table.join(C)
    assert the(table.made(pipeline((OWN, B), asked.version)), m.Standby).id in ids(C, D)
    the(table.wait(0.6), m.MakePlan)
    assert only(table.do(m.Lost(id=B.id, why="node-2 is gone")), m.Load) == [], "nobody holds its place"


def test_a_spare_that_began_to_load_another_place_holds_its_copy_no_more() -> None:
    table = Table(OWN, B, C, policy=REPLICAS)
    table.wait(0.5)
    old = pipeline((OWN, B), 1)
    table.made(old, 0.1)
    table.all_report(old, m.Loaded)
    table.do(m.Loaded(version=1, id=C.id))
    table.wait(20)
    table.join(D)
    asked = asked_for_newcomer(table, E)
    new = pipeline((OWN, C, D, E), asked.version)
    table.made(new, 0.05)
    table.all_report(new, m.Prepared)
    asked = the(table.do(m.Lost(id=D.id, why="node-4 is gone")), m.MakePlan)
    again = pipeline((OWN, B), asked.version)
    table.made(again)
    assert the(table.all_report(again, m.Loaded), m.Standby).id == C.id


def test_a_node_that_held_a_place_before_can_take_it_over_again() -> None:
    table, old = serving(OWN, B, spares=(C,), seconds=0.1)
    table.join(D)
    asked = the(table.wait(0.6), m.MakePlan)
    new = grid_plan(SPEC, ids(OWN, C), stages=2, ranks=1, version=asked.version)
    table.made(new, 0.05)
    table.all_report(new, m.Prepared)
    table.all_report(new, m.Loaded)
    assert Place.of(new, (1, 0)) == Place.of(old, (1, 0))
    assert [shard.node for _, _, shard in the(table.do(m.Lost(id=C.id, why="gone")), m.Load).plan.places()] == list(ids(OWN, B))


# what status sees


def test_status_sees_phases_members_and_the_plan() -> None:
    table = Table()
    assert (table.state.phase, table.state.plan, table.state.version, len(table.state.members)) == (Phase.WAITING, None, 0, 0)
    table.join(OWN)
    table.join(B)
    assert set(table.state.members) == {OWN.id, B.id}
    view = table.state.members[B.id]
    assert (view.node, view.suspect, view.standby, view.leaving) == (B, False, None, False)
    assert C.id not in table.state.members
    table.wait(0.5)
    table.made(pipeline((OWN, B), 1))
    assert repr(table.state) == "State(loading: plan 1 on 2 of 2 nodes, 0 late)"
    assert str(table.state.phase) == "loading"


def test_a_version_that_was_not_made_is_not_the_version_that_serves() -> None:
    table, _ = serving(OWN, B, seconds=0.1)
    asked = asked_for_newcomer(table, C)
    assert asked.version == 2
    table.made(pipeline((OWN, B, C), 2), 0.2)
    assert table.state.version == 1
