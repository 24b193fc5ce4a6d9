"""Few nodes are planned over exactly: held to every grouping, every division and, for tiny models, every share, tried one by one without the planner's searches."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, combinations_with_replacement, pairwise, permutations, product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from yoke.core.errors import PlacementError
from yoke.core.node import Link, Node, NodeId
from yoke.core.plan import Plan, Span, Stage, is_head_share, whole_model
from yoke.core.spec import ModelSpec
from yoke.planner import COSTS, Goal, Machine, Wish, make_plan, seconds_per_token, seconds_per_token_together
from yoke.planner.cost import missing_bytes
from yoke.planner.exact import search
from yoke.planner.field import Field
from yoke.planner.search import ALL_HOSTS
from yoke.planner.stages import StageTable
from yoke.planner.wish import NEAR
from yoke.planner.workbench import Workbench, value_s

MB = 1_000_000
Grouping = tuple[tuple[int, ...], ...]
Cluster = tuple[ModelSpec, list[Node], list[Link], Wish]


def partitions(rest: Sequence[int]) -> Iterator[Grouping]:
    """Every way to divide numbers into groups, in every order of groups."""
    if not rest:
        yield ()
    for size in range(1, len(rest) + 1):
        for group in combinations(rest, size):
            for later in partitions([number for number in rest if number not in group]):
                yield (group, *later)


def groupings(n_nodes: int) -> Iterator[Grouping]:
    """Every subset with number 0 in it, as groups in every order, that of number 0 first."""
    for size in range(n_nodes):
        for others in combinations(range(1, n_nodes), size):
            for n_mates in range(size + 1):
                for mates in combinations(others, n_mates):
                    for later in partitions([number for number in others if number not in mates]):
                        yield ((0, *mates), *later)


def divisions(n_blocks: int, n_stages: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations(range(1, n_blocks), n_stages - 1):
        yield list(pairwise((0, *inner, n_blocks)))


def seats_of(grouping: Grouping, ids: Sequence[NodeId], machine: Machine, hidden: float, rows: float) -> list[tuple[int, ...]]:
    """Each group with its leader first: who reaches the next group first, or in the last one collects and answers first."""

    def end_s(leader: int, group: tuple[int, ...]) -> float:
        gathered = max((machine.transfer_s(ids[node], ids[leader], COSTS.best_bytes * rows) for node in group if node != leader), default=0.0)
        return gathered + machine.transfer_s(ids[leader], ids[0], COSTS.token_bytes * rows)

    seats = []
    for index, group in enumerate(grouping):
        following = [ids[node] for node in grouping[index + 1]] if index + 1 < len(grouping) else None
        if index == 0:
            leader = 0
        elif following is not None:
            leader = min(group, key=lambda node, following=following: (machine.spread_s(ids[node], following, hidden), node))  # type: ignore[misc]
        else:
            leader = min(group, key=lambda node, group=group: (end_s(node, group), node))  # type: ignore[misc]
        seats.append((leader, *(node for node in group if node != leader)))
    return seats


def in_order(nodes: Sequence[Node], host: int = 0) -> list[Node]:
    others = [node for index, node in enumerate(nodes) if index != host]
    return [nodes[host], *sorted(others, key=lambda node: (-node.device.matvec_bytes_per_s, -node.device.free_bytes, node.id))]


def best_of_all(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    """The least value of any grouping and any division, with the engine on any node; infinite if nothing fits."""
    return min(best_at(spec, in_order(nodes, host), links, wish) for host in range(len(nodes)))


def best_at(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    """The same with the engine on the first node."""
    machine, best = Machine.of(nodes, links), math.inf
    ids = [node.id for node in nodes]
    tables: dict[Any, StageTable] = {}
    for grouping in groupings(len(nodes)):
        n_stages = len(grouping)
        rows = 1.0 if wish.goal is Goal.LATENCY else wish.streams / min(n_stages, wish.streams)
        held = []
        for index, seats in enumerate(seats_of(grouping, ids, machine, COSTS.hidden_bytes * spec.width * rows, rows)):
            key = (rows, seats, index == 0, index == n_stages - 1)
            if key not in tables:
                tables[key] = StageTable(Field(spec, nodes, machine, wish, rows), seats, is_first=key[2], is_last=key[3])
            held.append(tables[key])
        for division in divisions(spec.n_blocks, n_stages):
            places = list(zip(held, division, strict=True))
            if any(table.seconds(*span) == math.inf for table, span in places):
                continue
            stages = tuple(Stage(blocks=Span(*span), shards=table.shards(*span)) for table, span in places)
            plan = Plan(version=1, spec=spec, stages=stages)
            assert missing_bytes(plan, machine, wish) == 0
            best = min(best, value_s(plan, machine, wish))
    return best


def best_found(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    try:
        return make_plan(spec, nodes, links, wish).best_s
    except PlacementError:
        return math.inf


def cluster_of(world: SimpleNamespace, seed: int, n_nodes: int, *, is_uniform: bool | None = None) -> Cluster:
    """A random model of 2 to 6 blocks over nodes of which most cannot hold it."""
    rng = random.Random(seed)
    n_blocks, feed_forward = rng.randint(2, 6), rng.choice([30, 100]) * MB
    is_even = rng.random() < 0.5 if is_uniform is None else is_uniform
    spec = world.spec_of(
        n_blocks=n_blocks,
        attention_bytes=(rng.choice([8, 24]) * MB,) * n_blocks,
        feed_forward_bytes=tuple(feed_forward if is_even else int(feed_forward * rng.uniform(0.7, 1.3)) for _ in range(n_blocks)),
        embedding_bytes=30 * MB, head_bytes=30 * MB, head_block=(block := rng.choice([1, 32, 256])), column_block=block, n_kv_heads=rng.choice([2, 4, 8]),
    )  # fmt: skip
    memory = rng.choice([120, 250, 500])
    nodes = [
        world.node_of(index, rng.choice([5e9, 20e9, 40e9, 300e9]) * rng.uniform(0.8, 1.2), int(134e6 + memory * rng.choice([0.3, 0.6, 1, 2, 4]) * MB))
        for index in range(1, n_nodes + 1)
    ]
    links = world.links_of(nodes, rng.choice([1e-4, 4e-4, 1e-3]), rng.choice([12e6, 110e6, 1e9]), lambda: rng.uniform(0.5, 2))
    return spec, nodes, links, Wish(n_cells=1024, goal=rng.choice(list(Goal)))


@pytest.mark.parametrize("seed", range(40))
def test_four_nodes_are_planned_as_well_as_by_trying_everything(world: SimpleNamespace, seed: int) -> None:
    cluster = cluster_of(world, seed, 4)
    assert best_found(*cluster) == pytest.approx(best_of_all(*cluster), rel=2e-6)


@pytest.mark.parametrize("seed", range(100, 106))
def test_five_nodes_are_planned_as_well_as_by_trying_everything(world: SimpleNamespace, seed: int) -> None:
    cluster = cluster_of(world, seed, 5)
    assert best_found(*cluster) == pytest.approx(best_of_all(*cluster), rel=2e-6)


def test_trying_everything_is_tried_on_clusters_that_matter(world: SimpleNamespace) -> None:
    plans = [make_plan(*cluster_of(world, seed, 4)).plan for seed in range(80) if best_found(*cluster_of(world, seed, 4)) < math.inf]
    shapes = {tuple(len(stage.shards) for stage in plan.stages) for plan in plans}
    assert len(plans) >= 30
    assert {(1,), (1, 1), (2,), (1, 1, 1)} <= shapes


def cuts(total: int, n_ranks: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations_with_replacement(range(total + 1), n_ranks - 1):
        yield list(pairwise((0, *inner, total)))


def quickest_shares_s(spec: ModelSpec, machine: Machine, ids: Sequence[NodeId], blocks: tuple[int, int], wish: Wish) -> float:
    """A stage's least seconds over every cut of heads and of columns that fits. The output matrix weighs nothing."""
    attention, feed_forward = sum(spec.attention_bytes[slice(*blocks)]), sum(spec.feed_forward_bytes[slice(*blocks)])
    n_blocks, best = blocks[1] - blocks[0], math.inf
    for heads in cuts(spec.n_heads, len(ids)):
        if not all(is_head_share(spec, *span) for span in heads):
            continue
        kv_heads = [stop - start for start, stop in (spec.kv_heads_of(*span) for span in heads)]
        fixed = [attention * (b - a + kv) // (spec.n_heads + spec.n_kv_heads) for (a, b), kv in zip(heads, kv_heads, strict=True)]
        cached = [n_blocks * wish.n_cells * spec.cache_bytes_per_cell(kv, wish.cache_element_bytes) for kv in kv_heads]
        for columns in cuts(spec.columns // spec.column_block, len(ids)):
            held = [n + feed_forward * (b - a) * spec.column_block // spec.columns for n, (a, b) in zip(fixed, columns, strict=True)]
            embedding = spec.embedding_bytes if blocks[0] == 0 else 0
            rooms = [machine.room(node) - (embedding if rank == 0 else 0) for rank, node in enumerate(ids)]
            if all(n + cache <= room for n, cache, room in zip(held, cached, rooms, strict=True)):
                best = min(best, max(n * machine.s_per_byte(node, spec, 1) for n, node in zip(held, ids, strict=True)))
    return best + 2 * n_blocks * machine.exchange_s(ids, COSTS.hidden_bytes * spec.width)


def optimum_s(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    """The least seconds for a token of any plan at all: every place of the engine, grouping, order of ranks, division, and share."""
    return min(optimum_at_s(spec, in_order(nodes, host), links, wish) for host in range(len(nodes)))


def optimum_at_s(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    """The same with the engine on the first node."""
    machine, best = Machine.of(nodes, links), math.inf
    known: dict[Any, float] = {}
    hidden = COSTS.hidden_bytes * spec.width
    for grouping in groupings(len(nodes)):
        for seats in product(*(permutations(group) for group in grouping)):
            if seats[0][0] != 0:
                continue
            stages = [[nodes[number].id for number in group] for group in seats]
            path = COSTS.engine_s + COSTS.draw_s + machine.spread_s(stages[0][0], stages[0], hidden)
            path += sum(machine.spread_s(a[0], b, hidden) + COSTS.boundary_s for a, b in pairwise(stages))
            path += max((machine.transfer_s(node, stages[-1][0], COSTS.best_bytes) for node in stages[-1][1:]), default=0.0)
            path += machine.transfer_s(stages[-1][0], stages[0][0], COSTS.token_bytes) + COSTS.boundary_s if len(stages) > 1 else 0.0
            for division in divisions(spec.n_blocks, len(stages)):
                for key in zip(map(tuple, stages), division, strict=True):
                    if key not in known:
                        known[key] = quickest_shares_s(spec, machine, *key, wish)
                best = min(best, path + sum(known[key] for key in zip(map(tuple, stages), division, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_at_all_is_better_than_predicted_as_best_by_more_than_coarse_shares_cost(world: SimpleNamespace, seed: int) -> None:
    rng = random.Random(seed)
    spec = world.spec_of(
        n_blocks=2, width=64, n_heads=8, n_kv_heads=4, head_dim=32, columns=8 * 32, head_bytes=0, embedding_bytes=20 * MB, vocabulary=300,
        attention_bytes=(10 * MB, 12 * MB), feed_forward_bytes=(50 * MB, 44 * MB),
    )  # fmt: skip
    nodes = [world.node_of(index, rng.choice([5e9, 20e9, 40e9]) * rng.uniform(0.8, 1.2), 134_300_000 + rng.choice([60, 120, 300]) * MB) for index in (1, 2, 3)]
    links = world.links_of(nodes, 1e-4, 1e9, lambda: rng.uniform(0.5, 2))
    wish = Wish(n_cells=rng.choice([256, 40_000]))
    best, found = optimum_s(spec, nodes, links, wish), best_found(spec, nodes, links, wish)
    assert found >= best * (1 - 1e-9)
    assert found <= best * 1.25 or best == math.inf


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_a_further_node_never_makes_the_best_plan_worse(world: SimpleNamespace, seed: int, n_nodes: int, has_links: bool) -> None:
    spec, nodes, links, wish = cluster_of(world, seed, n_nodes + 1)
    assume(n_nodes + 1 <= ALL_HOSTS[wish.goal])
    used = links if has_links else []
    fewer = [link for link in used if nodes[-1].id not in {link.source, link.target}]
    assert best_found(spec, nodes, used, wish) <= best_found(spec, nodes[:-1], fewer, wish) * (1 + 2e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 6), st.randoms(use_true_random=False))
def test_the_order_of_the_other_nodes_does_not_matter(world: SimpleNamespace, seed: int, n_nodes: int, rng: random.Random) -> None:
    spec, nodes, links, wish = cluster_of(world, seed, n_nodes)
    shuffled = [nodes[0], *rng.sample(nodes[1:], n_nodes - 1)]
    if best_found(spec, nodes, links, wish) < math.inf:
        assert make_plan(spec, shuffled, links, wish).plan == make_plan(spec, nodes, links, wish).plan
    else:
        assert best_found(spec, shuffled, links, wish) == math.inf


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_plans_fit_and_are_as_good_as_the_best_and_as_any_node_alone(world: SimpleNamespace, seed: int, n_nodes: int) -> None:
    spec, nodes, links, wish = cluster_of(world, seed, n_nodes)
    machine = Machine.of(nodes, links)
    if best_found(spec, nodes, links, wish) == math.inf:
        return
    outlook = make_plan(spec, nodes, links, wish)
    assert missing_bytes(outlook.plan, machine, wish) == 0
    assert outlook.best_s <= value_s(outlook.plan, machine, wish) <= outlook.best_s * (1 + NEAR)
    for node in nodes:
        alone = whole_model(spec, node.id, "CPU")
        if missing_bytes(alone, machine, wish) == 0:
            assert value_s(outlook.plan, machine, wish) <= value_s(alone, machine, wish) * (1 + NEAR)
    assert outlook.seconds_per_token == seconds_per_token(outlook.plan, machine)
    assert outlook.seconds_per_token_together == seconds_per_token_together(outlook.plan, machine, wish.streams)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_no_plan_is_below_its_bound_and_each_is_predicted_as_it_was_judged(world: SimpleNamespace, seed: int, n_nodes: int) -> None:
    spec, nodes, links, wish = cluster_of(world, seed, n_nodes)
    bench = Workbench(spec, in_order(nodes), Machine.of(nodes, links), wish)
    for stages in list(groupings(n_nodes))[:: max(1, n_nodes - 2)]:
        for plan in bench.make(stages):
            assert bench.bound_s(stages) <= plan.value_s * (1 + 1e-9)
            assert tuple(tuple(sorted(bench.nodes.index(node) for node in nodes if node.id in ids)) for ids in held_by(plan.plan)) == stages


def held_by(plan: Plan) -> list[set[NodeId]]:
    return [{shard.node for shard in stage.shards} for stage in plan.stages]


def test_few_plans_are_made_of_many_groupings(world: SimpleNamespace) -> None:
    for rtt_s in (1e-4, 1e-3, 1e-2):
        rng = random.Random(1)
        nodes = [world.node_of(index, 20e9 * rng.uniform(0.5, 2), 1200 * MB) for index in range(1, 9)]
        links = world.links_of(nodes, rtt_s, 1e9, lambda: rng.uniform(0.5, 2))  # noqa: B023 - used at once
        bench = Workbench(world.spec_of(), in_order(nodes), Machine.of(nodes, links), Wish(n_cells=1024))
        assert search(bench, math.inf) < math.inf
        assert len(bench.made) < 200  # of 189,171


def test_equal_nodes_are_not_tried_in_each_others_place(world: SimpleNamespace) -> None:
    nodes = [world.node_of(index, 20e9, 1200 * MB) for index in range(1, 9)]
    bench = Workbench(world.spec_of(), nodes, Machine.of(nodes, ()), Wish(n_cells=1024, goal=Goal.THROUGHPUT))
    search(bench, math.inf)
    kinds = [tuple(len(group) for group in stages) for stages in bench.made]
    assert len(kinds) == len({(kind[0], *sorted(kind[1:-1]), kind[-1]) for kind in kinds})


def test_a_fast_machine_works_alone_with_the_engine_and_the_slow_coordinator_is_left_out_or_computes_nothing(world: SimpleNamespace) -> None:
    spec, wish = world.spec_of(), Wish(n_cells=1024)
    slow, fast = world.node_of(1, 2e9), world.node_of(2, 200e9)
    far = make_plan(spec, [slow, fast], world.links_of([slow, fast], 0.005), wish)
    assert held_by(far.plan) == [{fast.id}]
    assert "left out" in far.left_out[slow.id]
    short = replace(spec, n_blocks=1, attention_bytes=(24 * MB,), feed_forward_bytes=(100 * MB,))
    slow = world.node_of(1, 5e6)
    near = make_plan(short, [slow, fast], world.links_of([slow, fast], 1e-4, 1e9), replace(wish, use_all=True))
    idle = next(shard for shard in near.plan.stages[0].shards if shard.node == slow.id)
    assert (len(idle.heads), len(idle.columns), len(idle.vocabulary)) == (0, 0, 0)
    assert "computes nothing" in near.why[slow.id]


def test_a_coordinator_without_room_lets_another_node_have_the_engine(world: SimpleNamespace) -> None:
    small, large = world.node_of(1, 20e9, 100 * MB), world.node_of(2, 20e9)
    for nodes in ([small, large], [small, *(world.node_of(index, 10e9, 800 * MB) for index in range(2, 12))]):
        outlook = make_plan(world.spec_of(), nodes, (), Wish(n_cells=1024))
        assert small.id in outlook.left_out
