"""What moves is counted exactly: as many bytes as the pieces that a node has not, when every head, column and row weighs the same."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec
from yoke.planner import COSTS, Machine, grid_plan, moved_bytes, moving_s

IDS = [NodeId(f"{index:064x}") for index in range(12)]
UNIT = 1000


def weighed(world: SimpleNamespace) -> ModelSpec:
    """Each head of a block weighs `UNIT`, each column 10, each row 7."""
    spec: ModelSpec = world.spec_of(
        n_blocks=6, n_heads=8, n_kv_heads=4, columns=640, vocabulary=320, embedding_bytes=5000, head_bytes=320 * 7,
        attention_bytes=(12 * UNIT,) * 6, feed_forward_bytes=(6400,) * 6,
    )  # fmt: skip
    return spec


def pieces(plan: Plan, node: NodeId) -> set[tuple[object, ...]]:
    """Every head, column and row that a node holds."""
    found: set[tuple[object, ...]] = set()
    for stage, rank, shard in plan.places():
        if shard.node != node:
            continue
        kv_heads = plan.kv_heads(shard)
        for block in range(plan.stages[stage].blocks.start, plan.stages[stage].blocks.stop):
            found |= {(UNIT, "q", block, head) for head in range(shard.heads.start, shard.heads.stop)}
            found |= {(UNIT, "kv", block, head) for head in range(kv_heads.start, kv_heads.stop)}
            found |= {(10, "column", block, column) for column in range(shard.columns.start, shard.columns.stop)}
        found |= {(7, "row", row) for row in range(shard.vocabulary.start, shard.vocabulary.stop)}
        found |= {(5000, "embedding")} if (stage, rank) == (0, 0) else set()
    return found


grids = st.tuples(st.integers(1, 3), st.integers(1, 4), st.permutations(IDS[1:]))


@settings(deadline=None, max_examples=150)
@given(st.none() | grids, grids, st.data())
def test_what_moves_is_what_a_node_lacks(
    world: SimpleNamespace, old: tuple[int, int, list[NodeId]] | None, new: tuple[int, int, list[NodeId]], data: st.DataObject
) -> None:
    spec, plans = weighed(world), []
    for grid in (old, new):
        shares = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=grid[1], max_size=grid[1]).filter(any)) if grid is not None else None
        plans.append(grid_plan(spec, [IDS[0], *grid[2]], stages=grid[0], ranks=grid[1], shares=shares) if grid is not None else None)
    before, after = plans
    assert after is not None
    moved = moved_bytes(before, after)
    assert moved.keys() == {shard.node for _, _, shard in after.places()}
    for node, n_bytes in moved.items():
        lacks = pieces(after, node) - (pieces(before, node) if before is not None else set())
        assert n_bytes == sum(int(piece[0]) for piece in lacks)  # type: ignore[call-overload]


def test_nothing_moves_for_the_same_plan_and_all_for_another_model(world: SimpleNamespace) -> None:
    plan = grid_plan(world.spec_of(), IDS, stages=2, ranks=3)
    assert set(moved_bytes(plan, plan).values()) == {0}
    other = grid_plan(world.spec_of(name="another"), IDS, stages=2, ranks=3)
    assert moved_bytes(other, plan) == moved_bytes(None, plan) == {shard.node: plan.shard_bytes(stage, rank) for stage, rank, shard in plan.places()}


def test_moving_takes_as_long_as_the_slowest_link_or_all_on_the_best_or_the_disk(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index) for index in range(1, 4)]
    ids = [node.id for node in nodes]
    plan = grid_plan(world.spec_of(), ids, stages=3, ranks=1)
    first, second, third = (plan.shard_bytes(stage, 0) for stage in range(3))
    links = world.links_of(nodes, 1e-3, 100e6)
    assert moving_s(None, plan, Machine.of(nodes, links), ids[0]) == pytest.approx((second + third) / 100e6), "they share the coordinator's connection"
    slow = [link if link.target != ids[2] else world.links_of(nodes, 1e-3, 10e6)[links.index(link)] for link in links]
    assert moving_s(None, plan, Machine.of(nodes, slow), ids[0]) == pytest.approx(third / 10e6)
    alone = grid_plan(world.spec_of(), ids[:1], stages=1, ranks=1)
    assert moving_s(None, alone, Machine.of(nodes, links), ids[0]) == pytest.approx(alone.shard_bytes(0, 0) / COSTS.disk_bytes_per_s)
    assert moving_s(plan, plan, Machine.of(nodes, links), ids[0]) == 0
    assert 0 < moving_s(plan, alone, Machine.of(nodes, links), ids[0]) < moving_s(None, alone, Machine.of(nodes, links), ids[0])
    assert moving_s(None, grid_plan(world.spec_of(), ids[1:2], stages=1, ranks=1), Machine.of(nodes, links), ids[0]) == pytest.approx(
        alone.shard_bytes(0, 0) / 100e6
    ), "the coordinator gives all, and keeps nothing"
    assert first > 0
