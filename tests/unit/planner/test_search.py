"""Plans are made, not only promised: they cover the model, fit into memory, and are never slower than the coordinator alone."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import PlacementError
from yoke.core.node import Device, Link, Node, NodeId
from yoke.core.plan import Span, whole_model
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.planner import Machine, Outlook, Wish, grid_plan, make_plan, seconds_per_token
from yoke.planner.cost import EXCHANGE_S, OVERHEAD_BYTES, UNMEASURED_BYTES_PER_S, UNMEASURED_RTT_S, needed_bytes, node_bytes
from yoke.planner.groupings import groupings

MB = 1_000_000
PLENTY = 100_000 * MB


def spec_of(**changes: Any) -> ModelSpec:
    """About a model of 8 billion weights in 4 bits."""
    n_blocks = changes.get("n_blocks", 32)
    sizes = {"attention_bytes": (24 * MB,) * n_blocks, "feed_forward_bytes": (100 * MB,) * n_blocks}
    return ModelSpec(**{
        "name": "m", "architecture": "llama", "n_blocks": 32, "width": 4096, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "columns": 14336,
        "vocabulary": 128256, "context": 8192, "norm_epsilon": 1e-5, "rope": Rope(style=RopeStyle.HALVES, dims=128), "head_block": 32, "column_block": 32,
        "embedding_bytes": 300 * MB, "head_bytes": 300 * MB, **sizes, **changes,
    })  # fmt: skip


def node_of(number: int, speed: float = 20e9, free_bytes: int = PLENTY) -> Node:
    device = Device(name="CPU", description="", backend="ggml", free_bytes=free_bytes, matvec_bytes_per_s=speed)
    return Node(id=NodeId(f"{number:064x}"), name=f"node-{number}", device=device, measured_at=0.0)


def links_of(nodes: list[Node], rtt_s: float, rate: float = 110e6) -> list[Link]:
    return [Link(source=a.id, target=b.id, rtt_s=rtt_s, bandwidth_bytes_per_s=rate) for a in nodes for b in nodes if a is not b]


def check(outlook: Outlook, nodes: list[Node], wish: Wish) -> None:
    by_id = {node.id: node for node in nodes}
    placed = {shard.node for _, _, shard in outlook.plan.places()}
    assert outlook.plan.stages[0].shards[0].node == nodes[0].id
    assert placed == outlook.why.keys() == outlook.bytes_per_node.keys()
    assert placed | outlook.left_out.keys() == by_id.keys()
    assert not placed & outlook.left_out.keys()
    for stage, rank, shard in outlook.plan.places():
        assert node_bytes(outlook.plan, stage, rank, wish) == outlook.bytes_per_node[shard.node] <= by_id[shard.node].device.free_bytes
    assert 0 < outlook.seconds_per_token < math.inf


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    n_kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim = draw(st.sampled_from([16, 64, 80, 128]))
    n_heads = n_kv_heads * group
    column_block = draw(st.sampled_from([1, 32, 256]))
    n_blocks = draw(st.integers(1, 12))
    sizes = st.lists(st.integers(1, 50 * MB), min_size=n_blocks, max_size=n_blocks).map(tuple)
    return spec_of(
        n_blocks=n_blocks, width=draw(st.sampled_from([64, 2048])), n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        head_block=draw(st.sampled_from([b for b in (1, 32, 256) if n_heads * head_dim % b == 0])), rope=Rope(style=RopeStyle.HALVES, dims=head_dim),
        columns=column_block * draw(st.integers(1, 60)), column_block=column_block, vocabulary=draw(st.integers(1, 2000)),
        attention_bytes=draw(sizes), feed_forward_bytes=draw(sizes), embedding_bytes=draw(st.integers(0, 50 * MB)), head_bytes=draw(st.integers(0, 50 * MB)),
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(specs(), st.lists(st.tuples(st.floats(1e8, 1e12), st.integers(130 * MB, 2000 * MB)), min_size=1, max_size=5), st.floats(0, 0.05), st.booleans())
def test_any_plan_fits_and_is_no_slower_than_the_coordinator_alone(spec: ModelSpec, machines: list[tuple[float, int]], rtt_s: float, use_all: bool) -> None:
    nodes = [node_of(index, speed, free_bytes) for index, (speed, free_bytes) in enumerate(machines, 1)]
    links, wish = links_of(nodes, rtt_s), Wish(n_cells=256, use_all=use_all)
    try:
        outlook = make_plan(spec, nodes, links, wish)
    except PlacementError as error:
        alone_fits = needed_bytes(spec, wish) + OVERHEAD_BYTES <= nodes[0].device.free_bytes
        assert use_all or not alone_fits
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.missing_bytes > 0 or "blocks" in str(refusal)
        return
    check(outlook, nodes, wish)
    assert not (use_all and outlook.left_out)
    alone = whole_model(spec, nodes[0].id, "CPU")
    if not use_all and node_bytes(alone, 0, 0, wish) <= nodes[0].device.free_bytes:
        assert outlook.seconds_per_token <= seconds_per_token(alone, Machine.of(nodes, links))


@settings(deadline=None)
@given(specs(), st.integers(1, 4), st.integers(1, 5), st.data())
def test_any_grid_can_be_planned(spec: ModelSpec, stages: int, ranks: int, data: st.DataObject) -> None:
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


def test_more_ranks_than_key_value_heads_share_them() -> None:
    plan = grid_plan(spec_of(n_kv_heads=2, n_heads=8), [NodeId(f"{i:064x}") for i in range(4)], stages=1, ranks=4)
    assert [plan.kv_heads(shard) for shard in plan.stages[0].shards] == [Span(0, 1), Span(0, 1), Span(1, 2), Span(1, 2)]


def test_more_ranks_than_heads_leave_some_without() -> None:
    plan = grid_plan(spec_of(n_kv_heads=1, n_heads=2), [NodeId(f"{i:064x}") for i in range(5)], stages=1, ranks=5, devices=["CPU", "CUDA0", "c", "d", "e"])
    assert sorted(len(shard.heads) for shard in plan.stages[0].shards) == [0, 0, 0, 1, 1]
    assert plan.stages[0].shards[1].device == "CUDA0"


@pytest.mark.parametrize(("stages", "ranks", "shares"), [(2, 3, None), (1, 2, (1.0,)), (0, 1, None), (1, 2, (0.0, 0.0))])
def test_impossible_grids_are_refused(stages: int, ranks: int, shares: tuple[float, ...] | None) -> None:
    with pytest.raises(PlacementError):
        grid_plan(spec_of(), [NodeId("0" * 64)] * 4, stages=stages, ranks=ranks, shares=shares)


def test_two_equal_nodes_on_a_fast_link_share_in_halves() -> None:
    nodes = [node_of(1), node_of(2)]
    outlook = make_plan(spec_of(), nodes, links_of(nodes, 1e-4), Wish(n_cells=4096))
    first, second = outlook.plan.stages[0].shards
    assert (len(first.heads), len(first.columns), len(first.vocabulary)) == (len(second.heads), len(second.columns), len(second.vocabulary))


def test_slow_link_is_not_worth_it() -> None:
    nodes = [node_of(1), node_of(2)]
    outlook = make_plan(spec_of(), nodes, links_of(nodes, 0.02), Wish(n_cells=4096))
    assert len(outlook.plan.stages) == 1
    assert "node-2 is left out: it streams 20.0 GB/s" in outlook.left_out[nodes[1].id]


def test_slow_node_is_left_out_with_its_reason() -> None:
    nodes = [node_of(1), node_of(2), node_of(3, speed=5e8)]
    outlook = make_plan(spec_of(), nodes, links_of(nodes, 2e-4), Wish(n_cells=4096))
    assert list(outlook.left_out) == [nodes[2].id]
    assert "a token would take at least" in outlook.left_out[nodes[2].id]


def test_model_too_big_for_each_goes_over_both_and_fills_the_fast_one() -> None:
    nodes = [node_of(1, 10e9, 3000 * MB), node_of(2, 500e9, 4500 * MB)]
    wish = Wish(n_cells=1024)
    outlook = make_plan(spec_of(), nodes, links_of(nodes, 0.01), wish)
    check(outlook, nodes, wish)
    assert len(outlook.plan.stages) == 2
    assert outlook.bytes_per_node[nodes[1].id] > 4300 * MB
    assert outlook.why[nodes[1].id].endswith("all that fits")


def test_nearly_equal_stages_stay_balanced() -> None:
    nodes = [node_of(1, 20e9, 4000 * MB), node_of(2, 20.5e9, 4000 * MB)]
    outlook = make_plan(spec_of(), nodes, links_of(nodes, 0.01), Wish(n_cells=1024))
    assert [len(stage.blocks) for stage in outlook.plan.stages] == [17, 15]  # the second has the output matrix too


def test_memory_moves_shares_away_from_speed() -> None:
    nodes = [node_of(1, 10e9, 4000 * MB), node_of(2, 100e9, 1500 * MB)]
    wish = Wish(n_cells=256, stages=1, ranks=2)
    outlook = make_plan(spec_of(), nodes, (), wish)
    check(outlook, nodes, wish)
    assert len(outlook.plan.stages[0].shards[0].columns) > len(outlook.plan.stages[0].shards[1].columns)


def test_too_little_memory_says_exactly_how_much() -> None:
    nodes = [node_of(1, free_bytes=1000 * MB), node_of(2, free_bytes=500 * MB), node_of(3, free_bytes=MB)]
    wish = Wish(n_cells=1024)
    with pytest.raises(PlacementError, match="are missing") as caught:
        make_plan(spec_of(), nodes, (), wish)
    assert caught.value.missing_bytes == needed_bytes(spec_of(), wish) - (1500 * MB - 2 * OVERHEAD_BYTES)
    assert str(caught.value.missing_bytes) in str(caught.value)


def test_enough_memory_in_the_wrong_places_says_what_the_nearest_plan_lacks() -> None:
    sizes = {"attention_bytes": (400 * MB,), "feed_forward_bytes": (MB,), "embedding_bytes": 0, "head_bytes": 0}
    spec = spec_of(n_blocks=1, n_heads=1, n_kv_heads=1, **sizes)  # its one head cannot be cut
    nodes = [node_of(1, free_bytes=OVERHEAD_BYTES + 210 * MB), node_of(2, free_bytes=OVERHEAD_BYTES + 250 * MB)]
    with pytest.raises(PlacementError, match="no cut into whole blocks") as caught:
        make_plan(spec, nodes, (), Wish(n_cells=1))
    assert 150 * MB <= caught.value.missing_bytes <= 191 * MB


def test_forced_grid_uses_nodes_in_order() -> None:
    nodes = [node_of(index, speed=1e9 * index) for index in range(1, 6)]
    outlook = make_plan(spec_of(), nodes, (), Wish(n_cells=16, stages=2, ranks=2))
    assert [shard.node for _, _, shard in outlook.plan.places()] == [node.id for node in nodes[:4]]
    assert outlook.left_out[nodes[4].id] == "node-5 is left out: the wished layout takes 4 nodes, and this is a later one"
    first, second = outlook.plan.stages
    assert len(second.blocks) > len(first.blocks)


def test_explicit_shares_may_be_zero_and_imply_ranks() -> None:
    nodes = [node_of(index) for index in range(1, 4)]
    outlook = make_plan(spec_of(), nodes, (), Wish(n_cells=16, shares=(1, 0, 3)))
    assert [len(shard.heads) for shard in outlook.plan.stages[0].shards] == [8, 0, 24]


@pytest.mark.parametrize(
    "wish", [{"stages": 3, "ranks": 2}, {"ranks": 5}, {"stages": 5}, {"ranks": 2, "shares": (1.0, 1.0, 1.0)}, {"stages": 1, "shares": (1.0,) * 5}]
)
def test_forced_grid_needs_its_nodes(wish: dict[str, Any]) -> None:
    with pytest.raises(PlacementError, match=r"nodes; there are 4|shares are given"):
        make_plan(spec_of(), [node_of(index) for index in range(1, 5)], (), Wish(n_cells=16, **wish))


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(PlacementError, match="3 stages are wished, but m has 2 blocks"):
        make_plan(spec_of(n_blocks=2), [node_of(index) for index in range(1, 4)], (), Wish(n_cells=16, stages=3))


@pytest.mark.parametrize(
    "values", [{"n_cells": 0}, {"stages": 0}, {"ranks": 0}, {"shares": ()}, {"shares": (0.0,)}, {"shares": (-1.0, 2.0)}, {"shares": (math.nan,)}]
)
def test_impossible_wishes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PlacementError):
        Wish(**{"n_cells": 1, **values})


def test_nodes_must_be_there_once() -> None:
    for nodes in ([], [node_of(1), node_of(1)]):
        with pytest.raises(PlacementError, match="each once"):
            make_plan(spec_of(), nodes, (), Wish(n_cells=1))


def test_prediction_adds_what_the_rules_say() -> None:
    spec, nodes = spec_of(), [node_of(1, 10e9), node_of(2, 20e9)]
    ids = [node.id for node in nodes]
    links = links_of(nodes, 1e-3, 100e6)
    streamed = 32 * 124e6 + 300e6
    way = 5e-4 + EXCHANGE_S
    assert seconds_per_token(whole_model(spec, ids[0], "CPU"), Machine.of(nodes, ())) == pytest.approx(streamed / 10e9)
    stages = grid_plan(spec, ids, stages=2, ranks=1)
    expected = 16 * 124e6 / 10e9 + (16 * 124e6 + 300e6) / 20e9 + 2 * way + (4 * 4096 + 16) / 100e6
    assert seconds_per_token(stages, Machine.of(nodes, links)) == pytest.approx(expected)
    ranks = grid_plan(spec, ids, stages=1, ranks=2)
    expected = streamed / 2 / 10e9 + 64 * (way + 4 * 4096 / 100e6) + way + 4 * 64128 / 100e6
    assert seconds_per_token(ranks, Machine.of(nodes, links)) == pytest.approx(expected)
    assert Machine.of(nodes, ()).transfer_s(*ids, 1000) == pytest.approx(UNMEASURED_RTT_S / 2 + 1000 / UNMEASURED_BYTES_PER_S + EXCHANGE_S)


def test_all_groupings_of_few_nodes_are_tried_once() -> None:
    nodes = [node_of(index) for index in range(1, 6)]
    found = list(groupings(nodes, Machine.of(nodes, ()), use_all=False))
    unordered = {tuple(frozenset(node.id for node in stage) for stage in grouping) for grouping in found}
    assert len(found) == len(unordered) == 299  # sum over k of C(4, k) times the ordered partitions of k + 1 nodes with the first in the first stage
    assert all(grouping[0][0] is nodes[0] for grouping in found)


def test_many_nodes_are_planned_over_too() -> None:
    nodes = [node_of(index, 1e9 * (10 + index % 7), 700 * MB) for index in range(1, 25)]
    wish = Wish(n_cells=1024)
    outlook = make_plan(spec_of(), nodes, (), wish)
    check(outlook, nodes, wish)


def test_unknown_sizes_are_planned_by_count() -> None:
    spec = spec_of(attention_bytes=(), feed_forward_bytes=(), embedding_bytes=0, head_bytes=0)
    outlook = make_plan(spec, [node_of(1), node_of(2)], (), Wish(n_cells=16, stages=2))
    assert [len(stage.blocks) for stage in outlook.plan.stages] == [16, 16]
    assert make_plan(spec, [node_of(1)], (), Wish(n_cells=16)).tokens_per_s == math.inf
