"""Who opens which connection follows from the plan alone: each has one opener and one acceptor."""

from collections import Counter

import pytest

from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.net.codec import Purpose
from yoke.node.wiring import incoming, outgoing
from yoke.planner import grid_plan

SPEC = ModelSpec(
    name="tiny",
    architecture="llama",
    n_blocks=5,
    width=16,
    n_heads=6,
    n_kv_heads=3,
    head_dim=4,
    columns=64,
    vocabulary=70,
    context=64,
    norm_epsilon=1e-5,
    rope=Rope(style=RopeStyle.HALVES, dims=4),
)
GRIDS = [(stages, ranks) for stages in range(1, 6) for ranks in range(1, 6)]


def grid(stages: int, ranks: int) -> Plan:
    return grid_plan(SPEC, [NodeId(f"{i:064x}") for i in range(stages * ranks)], stages=stages, ranks=ranks)


@pytest.mark.parametrize(("stages", "ranks"), GRIDS)
def test_every_connection_has_one_opener_and_one_acceptor(stages: int, ranks: int) -> None:
    plan = grid(stages, ranks)
    places = [(stage, rank) for stage, rank, _ in plan.places()]
    opened = Counter((purpose, here, there) for here in places for purpose, there in outgoing(plan, here))
    accepted = Counter((purpose, there, here) for here in places for purpose, there in incoming(plan, here))
    assert opened == accepted
    assert set(opened.values()) <= {1}
    assert all(here != there for _, here, there in opened)


@pytest.mark.parametrize(("stages", "ranks"), GRIDS)
def test_everybody_but_the_engine_has_one_inlet_and_groups_are_complete(stages: int, ranks: int) -> None:
    plan = grid(stages, ranks)
    for stage, rank, _ in plan.places():
        given = incoming(plan, (stage, rank))
        pipes = [place for purpose, place in given if purpose is Purpose.PIPE]
        assert pipes == ([] if (stage, rank) == (0, 0) else [(max(0, stage - 1), 0)])
        mates = [there for purpose, there in outgoing(plan, (stage, rank)) if purpose is Purpose.GROUP]
        mates += [there for purpose, there in given if purpose is Purpose.GROUP]
        assert sorted(mates) == [(stage, other) for other in range(ranks) if other != rank]
    results = [place for purpose, place in incoming(plan, (0, 0)) if purpose is Purpose.RESULT]
    assert results == ([(stages - 1, 0)] if stages > 1 else [])
