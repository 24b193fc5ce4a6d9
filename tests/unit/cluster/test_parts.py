"""The parts that a cluster's state is made of: figures, signs of life, failures, places, copies."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.cluster.change import Agenda, Change, Step
from yoke.cluster.members import Member
from yoke.cluster.places import Place, Seating
from yoke.cluster.policy import DEAD_PERIODS, MAX_PINGS_PER_S, Policy
from yoke.cluster.pulse import STALL_S, Pulse
from yoke.cluster.standbys import Standbys, successors
from yoke.cluster.trials import MAX_DOUBLINGS, MAX_REMEMBERED, Trials
from yoke.core.errors import InvariantError, UserError
from yoke.core.node import NodeId, Rate
from yoke.core.plan import Plan, whole_model
from yoke.planner import Machine, Wish, grid_plan, seconds_per_token
from yoke.testing.simulated import MB, SPEC, simulated_node

NODES = [simulated_node(number, speed=number * 1e9) for number in range(1, 8)]
IDS = [node.id for node in NODES]
BY_ID = {node.id: node for node in NODES}


def grid(stages: int, ranks: int, version: int = 1) -> Plan:
    return grid_plan(SPEC, IDS[: stages * ranks], stages=stages, ranks=ranks, version=version)


def seating(stages: int, ranks: int) -> Seating:
    plan = grid(stages, ranks)
    return Seating.of(plan, seconds_per_token(plan, Machine.of(NODES, [])), BY_ID)


# figures


@given(st.integers(0, 5000))
def test_pings_of_all_together_stay_within_bounds_and_silence_is_many_pings_long(n_members: int) -> None:
    policy = Policy()
    period_s, dead_s, suspect_s = policy.period_s(n_members), policy.dead_after_s(n_members), policy.suspect_after_s(n_members)
    assert n_members / period_s <= MAX_PINGS_PER_S * (1 + 1e-9)
    assert period_s == 0.25 or n_members > 64
    assert dead_s >= max(2.5, DEAD_PERIODS * period_s)
    assert 1.0 <= suspect_s < dead_s
    assert dead_s == 2.5 or n_members > 100


@pytest.mark.parametrize("wrong", [{"patience_s": -1.0}, {"ping_s": 0.0}, {"suspect_s": 3.0}, {"ping_s": 1.0}, {"retry_s": 0.0}, {"gain": float("nan")}])
def test_a_policy_that_does_not_agree_with_itself_cannot_be_made(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        Policy(**wrong)


@pytest.mark.parametrize(
    ("now_s", "then_s", "moving_s", "is_worth_it"),
    [
        (0.100, 0.090, 1.0, True),
        (0.100, 0.0951, 0.0, False),  # less than 5 %
        (0.100, 0.0949, 0.0, True),
        (0.100, 0.090, 5.9, True),  # 10 % of 60 s is 6 s
        (0.100, 0.090, 6.1, False),
        (0.100, 0.120, 0.0, False),
        (0.0, 0.0, 0.0, False),  # a model whose sizes nobody knows
    ],
)
def test_a_change_is_weighed_by_gain_and_by_cost(now_s: float, then_s: float, moving_s: float, is_worth_it: bool) -> None:
    weighing = Policy().weigh(now_s, then_s, moving_s)
    assert weighing.is_worth_it is is_worth_it
    assert f"{1e3 * then_s:.1f} ms instead of {1e3 * now_s:.1f} ms" in weighing.text
    assert (f"costs {moving_s:.1f} s" in weighing.text) == (then_s < now_s)


# signs of life


def silent_after(pulse: Pulse, start: float, stop: float) -> tuple[dict[NodeId, float], dict[NodeId, float]]:
    dead, suspects = {}, {}
    for tick in range(round(start * 10) + 1, round(stop * 10) + 1):
        pulse.listen(tick / 10)
        more_dead, more_suspects = pulse.silent(tick / 10)
        dead |= {node: silent_s for node, silent_s in more_dead.items() if node not in dead}
        suspects |= more_suspects
    return dead, suspects


def test_silence_is_suspected_once_and_then_death() -> None:
    pulse = Pulse(Policy())
    pulse.listen(0.0)
    for node in IDS[:2]:
        pulse.add(node, 0.0)
    assert silent_after(pulse, 0.0, 0.9) == ({}, {})
    assert pulse.heard(IDS[0], 0.9) is False
    assert silent_after(pulse, 0.9, 1.5) == ({}, {IDS[1]: pytest.approx(1.0)})
    assert pulse.is_suspect(IDS[1])
    assert pulse.heard(IDS[1], 1.5) is True
    assert not pulse.is_suspect(IDS[1])
    dead, _ = silent_after(pulse, 1.5, 4.0)
    assert dead == {IDS[0]: pytest.approx(2.5), IDS[1]: pytest.approx(2.5)}


def test_a_pause_of_this_side_is_not_blamed_on_the_members() -> None:
    pulse = Pulse(Policy())
    pulse.listen(0.0)
    pulse.add(IDS[0], 0.0)
    silent_after(pulse, 0.0, 0.5)
    assert silent_after(pulse, 599.9, 600.0) == ({}, {})
    assert pulse.silent_s(IDS[0], 600.0) == pytest.approx(0.6)
    dead, _ = silent_after(pulse, 600.0, 603.0)
    assert dead.keys() == {IDS[0]}


def test_a_tick_that_is_late_by_less_than_a_stall_counts_in_full() -> None:
    pulse = Pulse(Policy())
    pulse.listen(0.0)
    pulse.add(IDS[0], 0.0)
    now = 0.0
    while now < 2.4:
        now += 0.9 * STALL_S
        pulse.listen(now)
    assert pulse.silent_s(IDS[0], now) == pytest.approx(now)


@pytest.mark.parametrize("n_members", [1, 3, 64, 65, 300, 1000])
def test_everyone_is_asked_in_turn_and_never_too_many_at_once(n_members: int) -> None:
    pulse, policy = Pulse(Policy()), Policy()
    ids = [simulated_node(number).id for number in range(n_members)]
    pulse.listen(0.0)
    for node in ids:
        pulse.add(node, 0.0)
    period_s = policy.period_s(n_members)
    asked: dict[NodeId, list[float]] = {node: [0.0] for node in ids}
    in_last_second: list[int] = []
    for tick in range(1, round(40 * period_s * 10)):
        due = pulse.asks(tick / 10)
        in_last_second = [*in_last_second[-9:], len(due)]
        assert n_members <= 64 or sum(in_last_second) <= MAX_PINGS_PER_S + 10, "rounded up once a tick"
        for node in due:
            asked[node].append(tick / 10)
    for times in asked.values():
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(gaps) >= period_s - 1e-9
        assert max(gaps[1:]) <= period_s + 0.3, "ticks round up; the first round is what spreads them"
        assert gaps[0] <= 2 * period_s + 0.3
    assert len(asked[ids[-1]]) > 25


# failures


def test_rest_doubles_with_each_failure_and_ends() -> None:
    trials, now, waits = Trials(10.0), 0.0, []
    for _ in range(MAX_DOUBLINGS + 3):
        waits.append(trials.failed(IDS[0], now))
        assert trials.is_barred(IDS[0], now + waits[-1] - 0.1)
        assert trials.over(now + waits[-1] - 0.1) == []
        now += waits[-1]
        assert not trials.is_barred(IDS[0], now)
        assert trials.over(now) == [IDS[0]]
    assert waits[:4] == [10, 20, 40, 80]
    assert waits[-1] == waits[-2] == 640
    trials.forget(IDS[:1])
    assert trials.failed(IDS[0], now) == 10


def test_one_early_death_is_an_accident_and_two_are_not() -> None:
    trials = Trials(10.0)
    assert [trials.stumbled(IDS[0], now) for now in range(5)] == [0, 0, 0, 10, 20]
    assert trials.is_barred(IDS[0], 21.9)
    assert not trials.is_barred(IDS[1], 2.0)


def test_a_failure_without_rest_counts_for_the_next_one() -> None:
    trials = Trials(10.0)
    assert trials.failed(IDS[0], 0.0, is_barred=False) == 10
    assert not trials.is_barred(IDS[0], 0.0)
    assert trials.failed(IDS[0], 0.0) == 20


def test_failures_of_machines_that_never_come_back_take_bounded_room() -> None:
    trials = Trials(10.0)
    for number in range(MAX_REMEMBERED + 50):
        trials.failed(simulated_node(number).id, float(number))
    assert len(trials) == MAX_REMEMBERED
    assert trials.over(1e9)[0] == simulated_node(50).id


# members


def test_a_speed_must_be_off_to_the_same_side_for_long_enough() -> None:
    member, policy = Member(simulated_node(1, speed=4e9)), Policy()
    assert not member.has_drifted(2.9e9, 0.0, policy)
    assert not member.has_drifted(2.9e9, 4.9, policy)
    assert member.has_drifted(2.9e9, 5.0, policy)
    assert not member.has_drifted(3.1e9, 5.1, policy), "within a quarter"
    assert not member.has_drifted(2.9e9, 5.2, policy), "counted anew"
    assert not member.has_drifted(5.1e9, 10.1, policy), "the other side"
    assert not member.has_drifted(2.9e9, 15.0, policy)
    assert member.has_drifted(2.9e9, 20.0, policy)


def test_a_new_speed_changes_all_that_was_measured_in_proportion() -> None:
    node = simulated_node(1, speed=4e9)
    rates = (Rate(weight_type="Q4_0", threads=1, matvec_bytes_per_s=3e9, matmul_flop_per_s=8e10),)
    member = Member(replace(node, device=replace(node.device, rates=rates)))
    member.take_speed(2e9)
    assert member.node.device.matvec_bytes_per_s == 2e9
    assert member.node.device.rates == (Rate(weight_type="Q4_0", threads=1, matvec_bytes_per_s=1.5e9, matmul_flop_per_s=4e10),)


# places


def test_a_place_is_the_same_in_two_plans_if_its_slices_are() -> None:
    two, three = grid(2, 1), grid(3, 1)
    assert Place.of(two, (1, 0)) == Place.of(replace(two, version=9), (1, 0))
    assert Place.of(two, (1, 0)) != Place.of(two, (0, 0))
    assert Place.of(two, (1, 0)) != Place.of(three, (1, 0))
    assert Place.of(grid(1, 2), (0, 0)) != Place.of(grid(1, 3), (0, 0))


def test_a_place_of_the_last_stage_is_another_one_than_the_same_blocks_before() -> None:
    last = Place.of(grid(2, 1), (1, 0))
    assert last.is_last
    assert replace(last, is_last=False) != last
    assert not last.is_shared
    assert Place.of(grid(1, 2), (0, 1)).is_shared


def test_a_plan_with_a_node_replaced_is_the_same_in_all_else() -> None:
    before = seating(2, 2)
    dead, heir = IDS[2], replace(NODES[6], device=replace(NODES[6].device, name="CUDA0"))
    after = before.with_others({dead: heir}, 5)
    assert after.plan.version == 5
    for (stage, rank, old), (_, _, new) in zip(before.plan.places(), after.plan.places(), strict=True):
        assert replace(new, node=old.node, device=old.device) == old
        assert (new.node, new.device) == ((heir.id, "CUDA0") if old.node == dead else (old.node, old.device))
        assert Place.of(before.plan, (stage, rank)) == Place.of(after.plan, (stage, rank))
    assert after.seats[heir.id] == before.seats[dead]
    assert after.nodes.keys() == {*IDS[:4], heir.id} - {dead}


def test_the_prediction_follows_the_speed_of_the_nodes_and_keeps_what_the_links_cost() -> None:
    base = seating(2, 1)
    slow_links = replace_seconds(base, base.seconds_per_token + 0.5)
    slower = {**BY_ID, IDS[0]: simulated_node(1, speed=0.5e9)}
    compute_s = base.plan.shard_bytes(0, 0) - SPEC.embedding_bytes
    assert slow_links.seconds_with(BY_ID) == pytest.approx(slow_links.seconds_per_token)
    assert slow_links.seconds_with(slower) == pytest.approx(slow_links.seconds_per_token + compute_s / 0.5e9 - compute_s / 1e9)
    faster = simulated_node(9, speed=4e9)
    after = slow_links.with_others({IDS[1]: faster}, 2)
    assert after.seconds_per_token == pytest.approx(slow_links.seconds_per_token - base.plan.shard_bytes(1, 0) * (1 / 2e9 - 1 / 4e9))


def replace_seconds(base: Seating, seconds: float) -> Seating:
    return Seating(base.plan, seconds, base.nodes, base.seats)


def test_a_plan_of_strangers_is_refused() -> None:
    with pytest.raises(InvariantError, match="not among the nodes"):
        Seating.of(whole_model(SPEC, IDS[0], "CPU"), 0.1, {IDS[1]: NODES[1]})


# copies


def spares(*members: Member) -> dict[NodeId, Member]:
    return {member.node.id: member for member in members}


def test_the_place_whose_loss_costs_most_is_copied_first_by_the_fastest_spare() -> None:
    plan = grid(3, 1)
    served = Seating.of(plan, 0.1, BY_ID)
    biggest = max((1, 2), key=lambda stage: plan.shard_bytes(stage, 0))
    standbys = Standbys(1, Wish(n_cells=8))
    assert standbys.settle(served, spares(Member(NODES[3]), Member(NODES[5])), 600.0) == {IDS[5]: (biggest, 0), IDS[3]: (3 - biggest, 0)}
    assert standbys.settle(served, spares(Member(NODES[3]), Member(NODES[5]), Member(NODES[6])), 600.0) == {}, "one copy of each is enough"
    assert standbys.get(IDS[5]).seat == (biggest, 0)
    assert standbys.overdue(599.9) == []
    standbys.ready(IDS[5])
    assert standbys.overdue(600.0) == [IDS[3]]


def test_every_place_has_a_copy_before_one_has_two_and_a_spare_holds_one() -> None:
    served = seating(3, 1)
    ordered = Standbys(2, Wish(n_cells=8)).settle(served, spares(*(Member(node) for node in NODES[3:6])), 600.0)
    assert len(ordered) == 3
    assert set(ordered.values()) == {(1, 0), (2, 0)}


def test_nobody_copies_the_coordinators_place_or_one_that_does_not_fit() -> None:
    alone = seating(1, 1)
    assert Standbys(1, Wish(n_cells=8)).settle(alone, spares(Member(NODES[5])), 600.0) == {}
    served = seating(2, 1)
    needed = served.plan.shard_bytes(1, 0)
    tight = simulated_node(9, room_bytes=needed - 2 * MB)  # `WORKER_BYTES` is rounded up by less than 1 MB
    assert Standbys(1, Wish(n_cells=8)).settle(served, spares(Member(tight)), 600.0) == {}
    roomy = simulated_node(9, room_bytes=needed + MB)
    assert Standbys(1, Wish(n_cells=8)).settle(served, spares(Member(roomy)), 600.0) == {roomy.id: (1, 0)}
    cells = 2 * MB // SPEC.cache_bytes_per_cell(SPEC.n_kv_heads)
    assert Standbys(1, Wish(n_cells=cells)).settle(served, spares(Member(roomy)), 600.0) == {}, "no room for the cache"


def test_what_a_spare_holds_already_counts_as_a_copy() -> None:
    served = seating(2, 1)
    held = Member(NODES[4], holds=served.place(IDS[1]))
    standbys = Standbys(1, Wish(n_cells=8))
    assert standbys.settle(served, spares(held, Member(NODES[5])), 600.0) == {}
    assert standbys.get(IDS[4]).is_ready


def test_a_copy_is_kept_while_its_place_is_the_same_and_given_up_when_it_is_not() -> None:
    standbys = Standbys(1, Wish(n_cells=8))
    spare = spares(Member(NODES[4]))
    standbys.settle(seating(2, 1), spare, 600.0)
    assert standbys.in_the_way(grid(2, 1, version=2)) == {}
    assert standbys.get(IDS[4]) is not None
    assert standbys.in_the_way(grid(4, 1, version=3)).keys() == {IDS[4]}
    assert standbys.get(IDS[4]) is None


def test_a_spare_that_gets_a_place_of_its_own_stops_copying() -> None:
    standbys = Standbys(1, Wish(n_cells=8))
    served = seating(2, 1)
    standbys.settle(served, spares(Member(NODES[4])), 600.0)
    after = served.with_others({IDS[1]: NODES[4]}, 2)
    assert standbys.in_the_way(after.plan).keys() == {IDS[4]}, "it was still loading"
    assert standbys.get(IDS[4]) is None


def test_the_dead_are_followed_by_spares_that_hold_exactly_their_places() -> None:
    served = seating(3, 1)
    slow, fast = Member(NODES[4], holds=served.place(IDS[1])), Member(NODES[5], holds=served.place(IDS[1]))
    third = Member(NODES[6], holds=served.place(IDS[2]))
    assert successors(served, [IDS[1]], spares(slow, fast, third)) == {IDS[1]: IDS[5]}
    assert successors(served, [IDS[1], IDS[2]], spares(slow, third)) == {IDS[1]: IDS[4], IDS[2]: IDS[6]}
    assert successors(served, [IDS[1], IDS[2]], spares(slow, fast)) is None, "one has nobody"
    assert successors(served, [IDS[0]], spares(Member(NODES[4], holds=served.place(IDS[0])))) is None, "the engine's place"
    assert successors(served, [IDS[1]], spares(Member(NODES[4]))) is None


def test_two_dead_with_equal_places_are_followed_by_two_spares() -> None:
    idle = grid_plan(SPEC, IDS[:3], stages=1, ranks=3, shares=[1.0, 0.0, 0.0])
    served = Seating.of(idle, 0.1, BY_ID)
    assert served.place(IDS[1]) == served.place(IDS[2])
    one, other = (Member(node, holds=served.place(IDS[1])) for node in NODES[4:6])
    followed = successors(served, IDS[1:3], spares(one, other))
    assert followed is not None
    assert sorted(followed.values()) == [IDS[4], IDS[5]]
    assert successors(served, IDS[1:3], spares(one)) is None


# what is wanted


def test_the_first_reason_sets_the_time_and_all_are_told() -> None:
    agenda = Agenda()
    agenda.want("a has joined", 5.0)
    agenda.want("b has joined", 6.0)
    agenda.want("a has joined", 7.0)
    assert agenda.due_s == 5.0
    for number in range(100):
        agenda.want(f"c{number} has joined", 8.0)
    assert agenda.take() == ("a has joined", "b has joined", "c0 has joined", "c1 has joined", "98 more")
    assert (agenda.due_s, agenda.take()) == (None, ())


def test_what_a_dropped_change_should_have_answered_is_wanted_again() -> None:
    agenda = Agenda()
    agenda.put_back(Change(1, Step.PLANNING, ("a leaves",), {}), 3.0)
    assert (agenda.due_s, agenda.take()) == (3.0, ("a leaves",))
