"""Many nodes are planned over well: held to the exact search where there is one, and to what no plan can beat where there is none."""

import random
import statistics
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from yoke.core.node import Link, Node
from yoke.core.plan import whole_model
from yoke.core.spec import ModelSpec
from yoke.planner import COSTS, Goal, Machine, Wish, exact, make_plan, many, seconds_per_token
from yoke.planner.cost import missing_bytes
from yoke.planner.workbench import Workbench

MB = 1_000_000


def cluster_of(world: SimpleNamespace, seed: int, n_nodes: int, *, memory_share: float, has_links: bool = True) -> tuple[list[Node], list[Link]]:
    """Machines of which each holds about ``memory_share`` of the model; the first holds a little more."""
    rng = random.Random(seed)
    model = 5000 * MB
    nodes = [world.node_of(1, 20e9, int(COSTS.worker_bytes + 400 * MB + 1.5 * memory_share * model))]
    for index in range(2, n_nodes + 1):
        memory = COSTS.worker_bytes + memory_share * model * rng.choice([0.3, 0.6, 1, 2]) * rng.uniform(0.9, 1.1)
        nodes.append(world.node_of(index, rng.choice([10e9, 20e9, 40e9, 200e9]) * rng.uniform(0.7, 1.4), int(memory)))
    rtt_s, rate = rng.choice([(1e-4, 1.2e9), (4e-4, 110e6), (3e-3, 30e6)])
    return nodes, world.links_of(nodes, rtt_s, rate, lambda: rng.uniform(0.5, 2)) if has_links else []


def least_s(spec: ModelSpec, nodes: Sequence[Node], links: Sequence[Link], wish: Wish) -> float:
    """No plan has less seconds for a token.

    A stage of g ranks takes at least a g-th of the sum of its ranks' seconds, and its exchanges; so each byte has a price on each node, that of the best g; and the
    model's blocks are bought where they are cheapest and have room.
    """
    machine, mean = Machine.of(nodes, links), (sum(spec.attention_bytes) + sum(spec.feed_forward_bytes)) / spec.n_blocks
    ways = [machine.way(link.source, link.target) for link in links] or [machine.way(nodes[0].id, nodes[1].id)]
    empty_s, s_per_byte = min(way[0] for way in ways), min(way[1] for way in ways)
    hidden = COSTS.hidden_bytes * spec.width

    def price(node: Node) -> float:
        own = 1 / machine.bytes_per_s(node.id, spec.weight_type)
        return min(own / g + (2 * (empty_s + (g - 1) * hidden * s_per_byte) / mean if g > 1 else 0.0) for g in range(1, 65))

    left, total = mean * spec.n_blocks, COSTS.engine_s + COSTS.draw_s
    for node in sorted(nodes, key=price):
        taken = min(left, max(0, machine.room(node.id)))
        left, total = left - taken, total + taken * price(node)
    return total


@pytest.mark.parametrize("goal", Goal)
def test_limited_search_comes_near_the_exact_one(world: SimpleNamespace, goal: Goal) -> None:
    ratios = []
    for seed in range(15):
        nodes, links = cluster_of(world, seed, 6, memory_share=0.6)
        bench = Workbench(world.spec_of(), nodes, Machine.of(nodes, links), Wish(n_cells=4096, goal=goal))
        many.search(bench)
        limited = min(plan.value_s for plans in bench.made.values() for plan in plans)
        ratios.append(limited / exact.search(bench, limited))
    assert min(ratios) == 1, "the exact search can only improve"
    assert statistics.median(ratios) < 1.005
    assert max(ratios) < 1.1


@pytest.mark.parametrize(("n_nodes", "memory_share"), [(12, 0.2), (24, 0.1), (64, 0.5), (64, 0.03)])
def test_many_nodes_are_planned_over_too(world: SimpleNamespace, n_nodes: int, memory_share: float) -> None:
    for seed in range(2):
        nodes, links = cluster_of(world, seed, n_nodes, memory_share=memory_share)
        for goal in Goal:
            wish = Wish(n_cells=1024, goal=goal)
            outlook = make_plan(world.spec_of(), nodes, links, wish)
            assert missing_bytes(outlook.plan, Machine.of(nodes, links), wish) == 0
            assert len(outlook.why) + len(outlook.left_out) == n_nodes
            if goal is Goal.LATENCY:
                bound = least_s(world.spec_of(), nodes, links, wish)
                assert bound <= outlook.best_s <= 4 * bound


def test_a_thousand_nodes_are_planned_over(world: SimpleNamespace) -> None:
    nodes, links = cluster_of(world, 1, 1000, memory_share=0.05, has_links=False)
    wish = Wish(n_cells=1024)
    outlook = make_plan(world.spec_of(), nodes, links, wish)
    assert missing_bytes(outlook.plan, Machine.of(nodes, links), wish) == 0
    bound = least_s(world.spec_of(), nodes, links, wish)
    assert bound <= outlook.best_s <= 4 * bound
    assert len(outlook.left_out) > 950
    fastest = [nodes[0], *sorted(nodes[1:], key=lambda node: -node.device.matvec_bytes_per_s)[:63]]
    assert outlook.best_s <= 1.05 * make_plan(world.spec_of(), fastest, links, wish).best_s


def test_work_does_not_grow_with_the_cluster(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are numbers of bounds and of plans, so that the same machines always give the same plan, and a slow one only takes longer."""
    counted: list[int] = []
    for n_nodes in (32, 1000):
        nodes, links = cluster_of(world, 3, n_nodes, memory_share=0.1, has_links=False)
        bench = Workbench(world.spec_of(), nodes, Machine.of(nodes, links), Wish(n_cells=1024))
        n_bounds = 0
        original = bench.bound_s

        def bound_s(stages: tuple[tuple[int, ...], ...], original=original) -> float:  # type: ignore[no-untyped-def]
            nonlocal n_bounds
            n_bounds += 1
            return original(stages)  # type: ignore[no-any-return]

        monkeypatch.setattr(bench, "bound_s", bound_s)
        many.search(bench)
        counted.append(n_bounds)
        assert len(bench.made) < 250
    assert counted[1] < 20 * counted[0]


def test_never_slower_than_the_coordinator_alone_with_many_nodes_either(world: SimpleNamespace) -> None:
    nodes = [world.node_of(1, 200e9), *(world.node_of(index, 1e9 * index) for index in range(2, 20))]
    outlook = make_plan(world.spec_of(), nodes, world.links_of(nodes, 1e-3), Wish(n_cells=1024))
    assert outlook.seconds_per_token <= seconds_per_token(whole_model(world.spec_of(), nodes[0].id, "CPU"), Machine.of(nodes, ()))


def test_all_of_many_nodes_are_used_if_that_is_wished(world: SimpleNamespace) -> None:
    for n_nodes in (9, 40, 70):
        nodes = [world.node_of(index, 1e9 * (10 + index % 7)) for index in range(1, n_nodes + 1)]
        outlook = make_plan(world.spec_of(), nodes, (), Wish(n_cells=256, use_all=True))
        assert not outlook.left_out
        assert len(outlook.why) == n_nodes
