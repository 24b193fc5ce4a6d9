"""Plans are made, not only promised: they cover the model, fit into memory, keep what is loaded, and say why."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import PlacementError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Span, whole_model
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.planner import COSTS, Goal, Machine, Outlook, StageWish, Wish, grid_plan, make_plan, seconds_per_token
from yoke.planner.cost import needed_bytes, node_bytes
from yoke.planner.wish import NEAR

MB = 1_000_000
WORKER_BYTES = COSTS.worker_bytes


def check(outlook: Outlook, nodes: list[Node], wish: Wish) -> None:
    by_id = {node.id: node for node in nodes}
    placed = {shard.node for _, _, shard in outlook.plan.places()}
    assert placed == outlook.why.keys() == outlook.bytes_per_node.keys() == outlook.moved_bytes.keys()
    assert placed | outlook.left_out.keys() == by_id.keys()
    assert not placed & outlook.left_out.keys()
    for stage, rank, shard in outlook.plan.places():
        assert node_bytes(outlook.plan, stage, rank, wish) == outlook.bytes_per_node[shard.node] <= by_id[shard.node].device.free_bytes
    parts = sum(time.compute_s + time.exchange_s + time.boundary_s for time in outlook.stages)
    assert parts + outlook.own_s == pytest.approx(outlook.seconds_per_token)
    assert 0 < outlook.seconds_per_token < math.inf
    for sentence in [*outlook.why.values(), *outlook.left_out.values()]:
        assert "\n" not in sentence
        assert not re.search(r"\d{6}", sentence), "sizes are told in MB and GB"


@st.composite
def specs(draw: st.DrawFn, spec_of: Any) -> ModelSpec:
    n_kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([16, 64, 80, 128]))
    n_heads = n_kv_heads * group
    column_block = draw(st.sampled_from([1, 32, 256]))
    n_blocks = draw(st.integers(1, 12))
    sizes = st.lists(st.integers(1, 50 * MB), min_size=n_blocks, max_size=n_blocks).map(tuple)
    spec: ModelSpec = spec_of(
        n_blocks=n_blocks, width=draw(st.sampled_from([64, 2048])), n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        head_block=draw(st.sampled_from([b for b in (1, 32, 256) if n_heads * head_dim % b == 0])), rope=Rope(style=RopeStyle.HALVES, dims=head_dim),
        columns=column_block * draw(st.integers(1, 60)), column_block=column_block, vocabulary=draw(st.integers(1, 2000)),
        attention_bytes=draw(sizes), feed_forward_bytes=draw(sizes), embedding_bytes=draw(st.integers(0, 50 * MB)), head_bytes=draw(st.integers(0, 50 * MB)),
    )  # fmt: skip
    return spec


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.lists(st.tuples(st.floats(1e8, 1e12), st.integers(130 * MB, 2000 * MB)), min_size=1, max_size=5),
    st.floats(0, 0.05),
    st.booleans(),
    st.sampled_from(Goal),
)
def test_any_plan_fits_and_is_no_slower_than_any_node_alone(
    world: SimpleNamespace, data: st.DataObject, machines: list[tuple[float, int]], rtt_s: float, use_all: bool, goal: Goal
) -> None:
    spec = data.draw(specs(world.spec_of))
    nodes = [world.node_of(index, speed, free_bytes) for index, (speed, free_bytes) in enumerate(machines, 1)]
    links, wish = world.links_of(nodes, rtt_s), Wish(n_cells=256, use_all=use_all, goal=goal)
    try:
        outlook = make_plan(spec, nodes, links, wish)
    except PlacementError as error:
        alone_fits = any(needed_bytes(spec, wish) + WORKER_BYTES <= node.device.free_bytes for node in nodes)
        assert use_all or not alone_fits
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.missing_bytes > 0 or "blocks" in str(refusal)
        return
    check(outlook, nodes, wish)
    assert not (use_all and outlook.left_out)
    for node in nodes:
        alone = whole_model(spec, node.id, "CPU")
        if not use_all and goal is Goal.LATENCY and node_bytes(alone, 0, 0, wish) <= node.device.free_bytes:
            assert outlook.seconds_per_token <= seconds_per_token(alone, Machine.of(nodes, links)) * (1 + NEAR)


@settings(deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_any_grid_can_be_planned(world: SimpleNamespace, data: st.DataObject, stages: int, ranks: int) -> None:
    spec = data.draw(specs(world.spec_of))
    shares = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks).filter(any))
    ids = [NodeId(f"{index:064x}") for index in range(20)]
    if stages > spec.n_blocks:
        with pytest.raises(PlacementError, match=f"{stages} stages are wished, but m has {spec.n_blocks} blocks"):
            grid_plan(spec, ids, stages=stages, ranks=ranks, shares=shares)
        return
    plan = grid_plan(spec, ids, stages=stages, ranks=ranks, shares=shares, version=3)
    assert [len(stage.shards) for stage in plan.stages] == [ranks] * stages
    lengths = [len(stage.blocks) for stage in plan.stages]
    assert max(lengths) - min(lengths) <= 1
    assert plan.version == 3
    for _, rank, shard in plan.places():
        assert shares is None or shares[rank] or not (shard.heads or shard.columns or shard.vocabulary)


def test_more_ranks_than_key_value_heads_share_them(world: SimpleNamespace) -> None:
    plan = grid_plan(world.spec_of(n_kv_heads=2, n_heads=8), [NodeId(f"{i:064x}") for i in range(4)], stages=1, ranks=4)
    assert [plan.kv_heads(shard) for shard in plan.stages[0].shards] == [Span(0, 1), Span(0, 1), Span(1, 2), Span(1, 2)]


def test_more_ranks_than_heads_leave_some_without(world: SimpleNamespace) -> None:
    ids = [NodeId(f"{i:064x}") for i in range(5)]
    plan = grid_plan(world.spec_of(n_kv_heads=1, n_heads=2), ids, stages=1, ranks=5, devices=["CPU", "CUDA0", "c", "d", "e"])
    assert sorted(len(shard.heads) for shard in plan.stages[0].shards) == [0, 0, 0, 1, 1]
    assert plan.stages[0].shards[1].device == "CUDA0"


@pytest.mark.parametrize(("stages", "ranks", "shares"), [(2, 3, None), (1, 2, (1.0,)), (0, 1, None), (1, 2, (0.0, 0.0))])
def test_impossible_grids_are_refused(world: SimpleNamespace, stages: int, ranks: int, shares: tuple[float, ...] | None) -> None:
    with pytest.raises(PlacementError):
        grid_plan(world.spec_of(), [NodeId("0" * 64)] * 4, stages=stages, ranks=ranks, shares=shares)


def test_two_equal_nodes_on_a_fast_link_share_in_halves(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1), world.node_of(2)]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 1e-4), Wish(n_cells=4096))
    first, second = outlook.plan.stages[0].shards
    assert (len(first.heads), len(first.columns), len(first.vocabulary)) == (len(second.heads), len(second.columns), len(second.vocabulary))


def test_slow_link_is_not_worth_it(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1), world.node_of(2)]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 0.02), Wish(n_cells=4096))
    assert len(outlook.plan.stages) == 1
    assert "node-2 is left out: it streams 20.0 GB/s and a message to it takes 10.05 ms" in outlook.left_out[nodes[1].id]


def test_slow_node_is_left_out_with_its_reason(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1), world.node_of(2), world.node_of(3, speed=5e8), world.node_of(4, free_bytes=100 * MB)]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 2e-4), Wish(n_cells=4096))
    assert set(outlook.left_out) == {nodes[2].id, nodes[3].id}
    assert "a token would take at least" in outlook.left_out[nodes[2].id]
    assert outlook.left_out[nodes[3].id] == "node-4 is left out: its memory of 100 MB is less than the 134 MB that a worker itself takes"


def test_small_gain_is_no_reason_for_another_machine(world: SimpleNamespace) -> None:
    spec = world.spec_of()
    nodes = [world.node_of(1, 20e9), world.node_of(2, 20.3e9)]
    outlook = make_plan(spec, nodes, world.links_of(nodes, 5e-3, 1e9), Wish(n_cells=1024))
    assert outlook.best_s < outlook.seconds_per_token <= outlook.best_s * (1 + NEAR)
    assert list(outlook.why) == [nodes[0].id]
    assert "node-2 is left out" in outlook.left_out[nodes[1].id]


def test_model_too_big_for_each_goes_over_both_and_fills_the_fast_one(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 10e9, 3000 * MB), world.node_of(2, 500e9, 4500 * MB)]
    wish = Wish(n_cells=1024)
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 0.01), wish)
    check(outlook, nodes, wish)
    assert len(outlook.plan.stages) == 2
    assert outlook.bytes_per_node[nodes[1].id] > 4300 * MB
    assert outlook.why[nodes[1].id].endswith("all that fits")


def test_nearly_equal_stages_stay_balanced(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 20e9, 4000 * MB), world.node_of(2, 20.2e9, 4000 * MB)]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 0.01), Wish(n_cells=1024))
    assert [len(stage.blocks) for stage in outlook.plan.stages] == [17, 15]  # the second has the output matrix too


def test_throughput_takes_more_stages_than_latency(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index) for index in range(1, 5)]
    links = world.links_of(nodes, 5e-3)
    one = make_plan(world.spec_of(), nodes, links, Wish(n_cells=4096))
    many = make_plan(world.spec_of(), nodes, links, Wish(n_cells=4096, goal=Goal.THROUGHPUT))
    assert (len(one.plan.stages), len(many.plan.stages)) == (1, 4)
    assert many.tokens_per_s_together > 1.5 * one.tokens_per_s_together
    assert many.tokens_per_s < one.tokens_per_s
    assert sorted(len(stage.blocks) for stage in many.plan.stages) == [6, 8, 9, 9]  # the last has the output matrix, the first the engine


def test_memory_with_much_cache_gives_heads_to_those_who_have_room(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 10e9, 6000 * MB), world.node_of(2, 100e9, 1500 * MB)]
    wish = Wish(n_cells=16384, stages=1, ranks=2)
    outlook = make_plan(world.spec_of(), nodes, (), wish)
    check(outlook, nodes, wish)
    first, second = outlook.plan.stages[0].shards
    assert len(first.heads) > 2 * len(second.heads)
    assert outlook.bytes_per_node[nodes[1].id] > 1400 * MB


def test_memory_moves_shares_away_from_speed(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 10e9, 4000 * MB), world.node_of(2, 100e9, 1500 * MB)]
    wish = Wish(n_cells=256, stages=1, ranks=2)
    outlook = make_plan(world.spec_of(), nodes, (), wish)
    check(outlook, nodes, wish)
    assert len(outlook.plan.stages[0].shards[0].columns) > len(outlook.plan.stages[0].shards[1].columns)


def test_too_little_memory_says_how_much(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, free_bytes=1000 * MB), world.node_of(2, free_bytes=500 * MB), world.node_of(3, free_bytes=MB)]
    wish = Wish(n_cells=1024)
    for asked in (wish, replace(wish, stages=3)):
        with pytest.raises(PlacementError, match=r"m needs 4\.70 GB .* 3\.47 GB are missing") as caught:
            make_plan(world.spec_of(), nodes, (), asked)
        assert caught.value.missing_bytes == needed_bytes(world.spec_of(), wish) - (1500 * MB - 2 * WORKER_BYTES)


def test_enough_memory_in_the_wrong_places_says_what_the_nearest_plan_lacks(world: SimpleNamespace) -> None:
    sizes = {"attention_bytes": (400 * MB,), "feed_forward_bytes": (MB,), "embedding_bytes": 0, "head_bytes": 0}
    spec = world.spec_of(n_blocks=1, n_heads=1, n_kv_heads=1, **sizes)  # its one head cannot be cut
    nodes = [world.node_of(1, free_bytes=WORKER_BYTES + 210 * MB), world.node_of(2, free_bytes=WORKER_BYTES + 250 * MB)]
    with pytest.raises(PlacementError, match="no cut into whole blocks") as caught:
        make_plan(spec, nodes, (), Wish(n_cells=1))
    assert 150 * MB <= caught.value.missing_bytes <= 191 * MB


def test_forced_grid_uses_nodes_in_order(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, speed=1e9 * index) for index in range(1, 6)]
    outlook = make_plan(world.spec_of(), nodes, (), Wish(n_cells=16, stages=2, ranks=2))
    assert [shard.node for _, _, shard in outlook.plan.places()] == [node.id for node in nodes[:4]]
    assert outlook.left_out[nodes[4].id] == "node-5 is left out: the wished layout takes 4 nodes, and this is another one"
    first, second = outlook.plan.stages
    assert len(second.blocks) > len(first.blocks)


def test_explicit_shares_may_be_zero_and_imply_ranks(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index) for index in range(1, 4)]
    outlook = make_plan(world.spec_of(), nodes, (), Wish(n_cells=16, shares=(1, 0, 3)))
    assert [len(shard.heads) for shard in outlook.plan.stages[0].shards] == [8, 0, 24]


@pytest.mark.parametrize(
    "wish", [{"stages": 3, "ranks": 2}, {"ranks": 5}, {"stages": 5}, {"ranks": 2, "shares": (1.0, 1.0, 1.0)}, {"stages": 1, "shares": (1.0,) * 5}]
)
def test_forced_grid_needs_its_nodes(world: SimpleNamespace, wish: dict[str, Any]) -> None:
    with pytest.raises(PlacementError, match=r"nodes; there are 4|shares are given"):
        make_plan(world.spec_of(), [world.node_of(index) for index in range(1, 5)], (), Wish(n_cells=16, **wish))


def test_more_stages_than_blocks_are_refused(world: SimpleNamespace) -> None:
    with pytest.raises(PlacementError, match="3 stages are wished, but m has 2 blocks"):
        make_plan(world.spec_of(n_blocks=2), [world.node_of(index) for index in range(1, 4)], (), Wish(n_cells=16, stages=3))


def test_layout_by_hand_is_obeyed_and_predicted(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, speed=1e10 * index) for index in range(1, 5)]
    ids = [node.id for node in nodes]
    layout = (StageWish(nodes=(ids[0], ids[2]), shares=(1, 3), blocks=20), StageWish(nodes=(ids[3],)), StageWish(nodes=(ids[1],), blocks=4))
    outlook = make_plan(world.spec_of(), nodes, (), Wish(n_cells=1024, layout=layout))
    assert [len(stage.blocks) for stage in outlook.plan.stages] == [20, 8, 4]
    assert [[shard.node for shard in stage.shards] for stage in outlook.plan.stages] == [[ids[0], ids[2]], [ids[3]], [ids[1]]]
    assert [len(shard.heads) for shard in outlook.plan.stages[0].shards] == [8, 24]
    assert outlook.seconds_per_token == seconds_per_token(outlook.plan, Machine.of(nodes, ()))
    free = make_plan(world.spec_of(), nodes, (), Wish(n_cells=1024, layout=tuple(StageWish(nodes=(node,)) for node in ids)))
    assert [len(stage.blocks) for stage in free.plan.stages] == [3, 7, 10, 12], "by speed: 37.2, 43.4, 41.3 and 44.7 ms with the output matrix"


def test_layouts_by_hand_that_cannot_be_are_refused(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, free_bytes=3000 * MB) for index in range(1, 4)]
    ids = [node.id for node in nodes]
    for layout, blocks, message in (
        ([[ids[0]], [NodeId("f" * 64)]], [None, None], "names node ffffffffffff, which is not there"),
        ([[ids[0], ids[0]]], [None], "names node-1 twice"),
        ([[ids[0]]], [None], r"m needs 4\.70 GB"),
        ([[ids[0]], [ids[1]]], [30, 2], r"node-1 needs 4\.28 GB and offers 3\.00 GB\. Free memory"),
        ([[ids[0]], [ids[1]]], [20, 11], "hold 31 blocks; m has 32"),
        ([[ids[0]], [ids[1]]], [20, 13], "hold 33 blocks; m has 32"),
        ([[ids[0]], [ids[1]]], [32, None], "hold 32 blocks; m has 32"),
    ):
        stages = tuple(StageWish(nodes=tuple(named), blocks=count) for named, count in zip(layout, blocks, strict=True))
        with pytest.raises(PlacementError, match=message):
            make_plan(world.spec_of(), nodes, (), Wish(n_cells=1024, layout=stages))


@pytest.mark.parametrize(
    "values",
    [
        {"n_cells": 0}, {"stages": 0}, {"ranks": 0}, {"shares": ()}, {"shares": (0.0,)}, {"shares": (-1.0, 2.0)}, {"shares": (math.nan,)},
        {"streams": 0}, {"prompt_tokens": 0}, {"chunk": 0}, {"layout": ()}, {"layout": (StageWish(nodes=(NodeId("0" * 64),)),), "ranks": 1},
    ],
)  # fmt: skip
def test_impossible_wishes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PlacementError):
        Wish(**{"n_cells": 1, **values})


@pytest.mark.parametrize("values", [{"nodes": ()}, {"shares": (1.0, 1.0)}, {"shares": (0.0,)}, {"blocks": 0}])
def test_impossible_stages_by_hand_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PlacementError):
        StageWish(**{"nodes": (NodeId("0" * 64),), **values})


def test_nodes_must_be_there_once(world: SimpleNamespace) -> None:
    for nodes in ([], [world.node_of(1), world.node_of(1)]):
        with pytest.raises(PlacementError, match="each once"):
            make_plan(world.spec_of(), nodes, (), Wish(n_cells=1))


def test_plan_that_is_there_is_kept_while_it_is_nearly_the_best(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, 20e9, 2600 * MB) for index in range(1, 4)]
    links = world.links_of(nodes, 1e-2)
    wish = Wish(n_cells=1024)
    there = make_plan(world.spec_of(), nodes, links, replace(wish, layout=tuple(StageWish(nodes=(nodes[i].id,)) for i in (0, 2)))).plan
    drifted = [replace(node, device=replace(node.device, matvec_bytes_per_s=20e9 * factor)) for node, factor in zip(nodes, (1, 1.02, 1), strict=True)]
    kept = make_plan(world.spec_of(), drifted, links, replace(wish, keep=there, version=2))
    assert (kept.plan.stages, kept.plan.version) == (there.stages, 2)
    assert set(kept.moved_bytes.values()) == {0}
    assert kept.moving_s == 0
    assert kept.best_s < kept.seconds_per_token
    faster = [replace(node, device=replace(node.device, matvec_bytes_per_s=20e9 * factor)) for node, factor in zip(nodes, (1, 1.5, 1), strict=True)]
    changed = make_plan(world.spec_of(), faster, links, replace(wish, keep=there, version=2))
    assert nodes[1].id in changed.why
    assert changed.moved_bytes[nodes[1].id] > 0
    assert changed.moving_s > 1


def test_lost_machine_is_replaced_where_it_was(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, 20e9, 2000 * MB) for index in range(1, 6)]
    links, wish = world.links_of(nodes, 1e-2), Wish(n_cells=1024)
    there = make_plan(world.spec_of(), nodes[:4], links, replace(wish, layout=tuple(StageWish(nodes=(node.id,)) for node in nodes[:3]))).plan
    after = make_plan(world.spec_of(), [nodes[0], *nodes[2:]], links, replace(wish, keep=there)).plan
    held = {shard.node: after.stages[stage].blocks for stage, _, shard in after.places()}
    assert held[nodes[0].id] == there.stages[0].blocks
    assert held[nodes[2].id] == there.stages[2].blocks


def test_runners_up_are_other_groups_and_the_coordinator_alone(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, 20e9) for index in range(1, 5)]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 1e-4, 1e9), Wish(n_cells=1024))
    chosen = {frozenset(shard.node for shard in stage.shards) for stage in outlook.plan.stages}
    others = [{frozenset(group) for group in other.stages} for other in outlook.runners_up]
    assert chosen not in others
    assert len(others) >= 2
    assert {frozenset({nodes[0].id})} in others
    values = [other.seconds_per_token for other in outlook.runners_up]
    assert values == sorted(values)
    assert values[0] >= outlook.best_s


def test_unknown_sizes_are_planned_by_count(world: SimpleNamespace) -> None:
    spec = world.spec_of(attention_bytes=(), feed_forward_bytes=(), embedding_bytes=0, head_bytes=0)
    outlook = make_plan(spec, [world.node_of(1), world.node_of(2)], (), Wish(n_cells=16, stages=2))
    assert [len(stage.blocks) for stage in outlook.plan.stages] == [16, 16]
    alone = make_plan(spec, [world.node_of(1)], (), Wish(n_cells=16))
    assert alone.seconds_per_token == pytest.approx(COSTS.engine_s + COSTS.draw_s)
