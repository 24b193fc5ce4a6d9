"""Predictions add up what the rules say, worked out by hand for small cases."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from yoke.core.node import Rate
from yoke.core.plan import whole_model
from yoke.planner import COSTS, CostModel, Machine, Wish, first_token_s, grid_plan, make_plan, seconds_per_token, seconds_per_token_together
from yoke.planner.cost import Step, compute_s, flop_per_byte, stage_times, step_s, streamed_bytes

BLOCK, HEAD = 124e6, 300e6
OWN_S = COSTS.engine_s + COSTS.draw_s


def test_prediction_adds_what_the_rules_say(world: SimpleNamespace) -> None:
    spec, nodes = world.spec_of(), [world.node_of(1, 10e9), world.node_of(2, 20e9)]
    ids = [node.id for node in nodes]
    links = world.links_of(nodes, 1e-3, 100e6)
    streamed = 32 * BLOCK + HEAD
    way = 5e-4 + COSTS.exchange_s
    hidden_s = 4 * 4096 / 100e6
    assert seconds_per_token(whole_model(spec, ids[0], "CPU"), Machine.of(nodes, ())) == pytest.approx(streamed / 10e9 + OWN_S)
    stages = grid_plan(spec, ids, stages=2, ranks=1)
    expected = 16 * BLOCK / 10e9 + (16 * BLOCK + HEAD) / 20e9 + 2 * (way + COSTS.boundary_s) + hidden_s + 16 / 100e6
    assert seconds_per_token(stages, Machine.of(nodes, links)) == pytest.approx(expected + OWN_S)
    ranks = grid_plan(spec, ids, stages=1, ranks=2)
    spread, exchanges, gathered = way + hidden_s, 64 * (way + hidden_s), way + 8 / 100e6
    assert seconds_per_token(ranks, Machine.of(nodes, links)) == pytest.approx(streamed / 2 / 10e9 + spread + exchanges + gathered + OWN_S)
    unmeasured = COSTS.unmeasured_rtt_s / 2 + 1000 / COSTS.unmeasured_bytes_per_s + COSTS.exchange_s
    assert Machine.of(nodes, ()).transfer_s(*ids, 1000) == pytest.approx(unmeasured)


def test_ranks_of_a_later_stage_share_the_senders_connection(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index) for index in range(1, 5)]
    machine = Machine.of(nodes, world.links_of(nodes, 1e-3, 100e6))
    times = stage_times(grid_plan(world.spec_of(), [node.id for node in nodes], stages=2, ranks=2), machine)
    assert times[1].boundary_s == pytest.approx(5e-4 + COSTS.exchange_s + 2 * 4 * 4096 / 100e6 + COSTS.boundary_s)
    assert times[0].boundary_s == pytest.approx(5e-4 + COSTS.exchange_s + 4 * 4096 / 100e6)


def test_slowest_pair_counts_in_an_exchange(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index) for index in range(1, 4)]
    links = [replace(link, rtt_s=0.01) if (link.source, link.target) == (nodes[2].id, nodes[0].id) else link for link in world.links_of(nodes, 1e-3, 100e6)]
    ids = [node.id for node in nodes]
    assert Machine.of(nodes, links).exchange_s(ids, 1000) == pytest.approx(5e-3 + COSTS.exchange_s + 2 * 1000 / 100e6)
    assert Machine.of(nodes, links).exchange_s(ids[:1], 1000) == 0


def rates_of(*rows: tuple[str, int, float, float]) -> tuple[Rate, ...]:
    return tuple(Rate(weight_type=name, threads=threads, matvec_bytes_per_s=speed, matmul_flop_per_s=flop) for name, threads, speed, flop in rows)


def test_rate_of_the_models_weights_counts_before_the_headline(world: SimpleNamespace) -> None:
    rates = rates_of(("Q4_0", 1, 11e9, 1e11), ("Q4_0", 4, 33e9, 3e11), ("F16", 4, 44e9, 4e11))
    node = world.node_of(1, 22e9, rates=rates, threads=4)
    machine = Machine.of([node], ())
    assert machine.bytes_per_s(node.id, "Q4_0") == 33e9
    assert machine.flop_per_s(node.id, "Q4_0") == 3e11
    assert machine.bytes_per_s(node.id, "Q8_0") == 22e9
    assert machine.flop_per_s(node.id, "Q8_0") == 22e9 * COSTS.unmeasured_flop_per_byte
    spec = world.spec_of(weight_type="F16")
    assert seconds_per_token(whole_model(spec, node.id, "CPU"), machine) == pytest.approx((32 * BLOCK + HEAD) / 44e9 + OWN_S)


def test_rate_for_any_type_counts_where_there_is_none_of_its_own(world: SimpleNamespace) -> None:
    node = world.node_of(1, 22e9, rates=rates_of(("", 1, 25e9, 5e11), ("Q4_0", 1, 33e9, 3e11)))
    machine = Machine.of([node], ())
    assert (machine.bytes_per_s(node.id, "Q8_0"), machine.flop_per_s(node.id, "Q8_0")) == (25e9, 5e11)
    assert machine.bytes_per_s(node.id, "Q4_0") == 33e9


def test_further_tokens_of_a_step_cost_operations(world: SimpleNamespace) -> None:
    spec = world.spec_of()
    node = world.node_of(1, 20e9, rates=rates_of(("", 1, 20e9, 4e11)))
    machine, plan = Machine.of([node], ()), whole_model(spec, node.id, "CPU")
    n_weights = 32 * (2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 14336) + 4096 * 128256
    assert flop_per_byte(spec) * streamed_bytes(spec) == pytest.approx(2 * n_weights)
    one, eight = step_s(plan, machine), step_s(plan, machine, Step(rows=8, outputs=8))
    assert eight - one == pytest.approx(7 * COSTS.row_cost(8) * 2 * n_weights / 4e11 + 7 * COSTS.draw_s)
    assert (COSTS.row_cost(2), COSTS.row_cost(8), COSTS.row_cost(256)) == (1.8, 1.3, 1.0)
    assert seconds_per_token_together(plan, machine, 8) == pytest.approx(eight / 8)
    assert seconds_per_token_together(plan, machine, 1) == pytest.approx(one)


def test_slowest_stage_sets_the_pace_of_many_streams(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 20e9), world.node_of(2, 10e9)]
    machine = Machine.of(nodes, world.links_of(nodes, 1e-4, 1e9))
    plan = grid_plan(world.spec_of(), [node.id for node in nodes], stages=2, ranks=1)
    step = Step(rows=4, outputs=4)
    slow = stage_times(plan, machine, step)[1].busy_s + 4 * COSTS.draw_s
    assert 2 * slow > step_s(plan, machine, step), "two batches are under way, and the second stage has no pause"
    assert seconds_per_token_together(plan, machine, 8) == pytest.approx(2 * slow / 8)


def test_first_token_comes_after_all_chunks_have_gone_through_all_stages(world: SimpleNamespace) -> None:
    spec, rates = world.spec_of(head_bytes=0), rates_of(("", 1, 20e9, 4e11))
    nodes = [world.node_of(1, rates=rates), world.node_of(2, rates=rates)]
    machine = Machine.of(nodes, world.links_of(nodes, 0.0, 1e12), replace(COSTS, exchange_s=0.0, boundary_s=0.0, engine_s=0.0, draw_s=0.0))
    one, two = whole_model(spec, nodes[0].id, "CPU"), grid_plan(spec, [node.id for node in nodes], stages=2, ranks=1)
    wish = Wish(n_cells=4096, prompt_tokens=1024, chunk=256)
    alone_s, pipelined_s = first_token_s(one, machine, wish), first_token_s(two, machine, wish)
    per_token = flop_per_byte(spec) * 32 * BLOCK / 4e11
    attended = 4 * 128 * 32 * 32 * (1024 * 512) / 4e11
    assert alone_s == pytest.approx(1020 * per_token + 4 * 32 * BLOCK / 20e9 + attended)
    assert pipelined_s == pytest.approx(alone_s * 5 / 8, rel=0.05), "five half chunks one after the other, instead of eight"
    assert first_token_s(one, machine, replace(wish, prompt_tokens=1)) == pytest.approx(32 * BLOCK / 20e9, rel=1e-4)


def test_window_bounds_what_a_token_looks_at(world: SimpleNamespace) -> None:
    node = world.node_of(1)
    wish = Wish(n_cells=8192, prompt_tokens=8192)
    whole, windowed = (first_token_s(whole_model(spec, node.id, "CPU"), Machine.of([node], ()), wish) for spec in (world.spec_of(), world.spec_of(window=512)))
    assert windowed < 0.95 * whole


def test_embedding_is_not_streamed(world: SimpleNamespace) -> None:
    node = world.node_of(1, 10e9)
    assert compute_s(whole_model(world.spec_of(), node.id, "CPU"), 0, 0, Machine.of([node], ())) == pytest.approx((32 * BLOCK + HEAD) / 10e9)


def test_constants_can_be_replaced(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1), world.node_of(2)]
    plan = grid_plan(world.spec_of(), [node.id for node in nodes], stages=2, ranks=1)
    slow = seconds_per_token(plan, Machine.of(nodes, (), CostModel(boundary_s=2e-3)))
    assert slow - seconds_per_token(plan, Machine.of(nodes, ())) == pytest.approx(2 * (2e-3 - COSTS.boundary_s))


ONE_BILLION = {
    "n_blocks": 16, "width": 2048, "n_heads": 32, "n_kv_heads": 8, "head_dim": 64, "columns": 8192, "vocabulary": 32_000, "embedding_bytes": 36_864_000,
    "head_bytes": 36_864_000, "attention_bytes": (5_898_240,) * 16, "feed_forward_bytes": (28_330_000,) * 16,
}  # fmt: skip

MEASURED = [
    # ranks, stages, sessions, tokens/s together, from docs/benchmarks.md
    (1, 1, 1, 29.3),
    (2, 1, 1, 49.1),
    (1, 2, 1, 27.5),
    (1, 1, 2, 30.8),
    (1, 1, 4, 41.3),
    (1, 2, 2, 49.3),
    (1, 2, 4, 54.5),
]


@pytest.mark.parametrize(("ranks", "stages", "sessions", "tokens_per_s"), MEASURED)
def test_what_was_measured_is_predicted_within_a_tenth(world: SimpleNamespace, ranks: int, stages: int, sessions: int, tokens_per_s: float) -> None:
    """Two processes on one machine's two cores, over TLS on loopback. Alone a core streams 17.5 GB/s, beside the other one 16.5."""
    spec = world.spec_of(**ONE_BILLION)
    speed = 17.5e9 if ranks == stages == 1 else 16.5e9
    flop = 68.4 * flop_per_byte(spec) * (streamed_bytes(spec) - spec.head_bytes)  # prompts are read at 68.4 tokens/s
    nodes = [world.node_of(index, speed, rates=rates_of(("", 1, speed, flop))) for index in (1, 2)]
    machine = Machine.of(nodes, world.links_of(nodes, 80e-6, 1.38e9))
    plan = grid_plan(spec, [node.id for node in nodes], stages=stages, ranks=ranks)
    assert 1 / seconds_per_token_together(plan, machine, sessions) == pytest.approx(tokens_per_s, rel=0.1)
    if (ranks, stages) == (1, 1):
        read_s = first_token_s(plan, machine, Wish(n_cells=1024, prompt_tokens=512))
        assert 512 / read_s == pytest.approx(68.4, rel=0.1)


WIRED, RADIO, SLOW = (0.3e-3, 115e6), (4.0e-3, 8e6), (10.65e-3, 2.35e6)
DIFFERENT = [
    # GB/s of each machine, stages, ranks, shares, link (round trip, bytes/s, as measured), tokens/s: benchmarks/clusters.py prediction
    ((7.94,), 1, 1, None, WIRED, 13.54),
    ((2.0,), 1, 1, None, WIRED, 3.41),
    ((3.98, 2.0), 1, 2, None, WIRED, 8.61),
    ((7.94, 3.98), 1, 2, None, WIRED, 15.49),
    ((7.94, 3.98), 2, 1, None, WIRED, 10.23),
    ((2.0, 7.94), 2, 1, None, WIRED, 8.72),
    ((3.98, 3.98), 1, 2, (3.0, 1.0), WIRED, 8.18),
    ((3.98, 3.98), 2, 1, None, RADIO, 6.56),
    ((3.98, 3.98), 1, 2, None, SLOW, 2.71),
    ((7.94, 3.98, 2.0), 3, 1, None, WIRED, 8.03),
    ((2.0, 1.0, 0.5), 1, 3, None, WIRED, 4.77),
    ((2.0, 2.0, 2.0, 2.0), 2, 2, None, WIRED, 5.57),
    ((1.0, 0.5, 0.5, 0.5), 1, 4, None, WIRED, 3.37),
]


def test_machines_that_differ_are_predicted_as_measured(world: SimpleNamespace) -> None:
    """Each within a quarter, and half of them within a twentieth. Ranks are predicted too fast: all machines shared two processors and one switch."""
    spec, errors = world.spec_of(**ONE_BILLION), []
    for speeds, stages, ranks, shares, link, tokens_per_s in DIFFERENT:
        nodes = [world.node_of(number, speed * 1e9) for number, speed in enumerate(speeds, 1)]
        wish = Wish(n_cells=256, stages=stages, ranks=ranks, shares=shares)
        predicted = make_plan(spec, nodes, world.links_of(nodes, *link), wish).tokens_per_s
        assert predicted == pytest.approx(tokens_per_s, rel=0.25), f"{speeds} in {stages} x {ranks}"
        errors.append(abs(predicted / tokens_per_s - 1))
    assert sorted(errors)[len(errors) // 2] < 0.05
