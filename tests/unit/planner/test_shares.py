"""Cuts are compared with every cut that there is, for rows small enough to try them all."""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import PlacementError
from yoke.core.plan import Span, is_head_share
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.planner.layout import cut_blocks
from yoke.planner.shares import ROW_MULTIPLE, cut_columns, cut_evenly, cut_heads, cut_rows

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e12)), min_size=1, max_size=5).filter(any)


def spec_of(n_kv_heads: int, group: int, head_dim: int, head_block: int = 1) -> ModelSpec:
    return ModelSpec(
        name="m", architecture="llama", n_blocks=2, width=64, n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads, head_dim=head_dim, columns=256,
        vocabulary=300, context=64, norm_epsilon=1e-5, rope=Rope(style=RopeStyle.HALVES, dims=head_dim), head_block=head_block,
    )  # fmt: skip


@st.composite
def specs(draw: st.DrawFn, most_heads: int = 64) -> ModelSpec:
    n_kv_heads = draw(st.integers(1, min(8, most_heads)))
    group = draw(st.integers(1, most_heads // n_kv_heads))
    head_dim = draw(st.sampled_from([8, 16, 32, 64, 80, 96, 128]))
    blocks = [block for block in (1, 32, 256) if n_kv_heads * group * head_dim % block == 0]
    return spec_of(n_kv_heads, group, head_dim, draw(st.sampled_from(blocks)))


def every_cut(total: int, n_ranks: int) -> Iterator[list[tuple[int, int]]]:
    for inner in combinations_with_replacement(range(total + 1), n_ranks - 1):
        edges = (0, *inner, total)
        yield list(pairwise(edges))


def slowest(spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> float:
    return max((stop - start) / weight if weight else (0.0 if start == stop else float("inf")) for (start, stop), weight in zip(spans, weights, strict=True))


def pairs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in spans]


@settings(deadline=None)
@given(specs(most_heads=12), st.lists(st.one_of(st.just(0.0), st.floats(0.1, 100)), min_size=1, max_size=4).filter(any))
def test_heads_are_cut_as_well_as_by_trying_every_cut(spec: ModelSpec, weights: list[float]) -> None:
    allowed = (
        cut
        for cut in every_cut(spec.n_heads, len(weights))
        if all(spec.is_head_cut(start) and spec.is_head_cut(stop) and is_head_share(spec, start, stop) for start, stop in cut)
    )
    best = min(slowest(cut, weights) for cut in allowed)
    assert slowest(pairs(cut_heads(spec, weights)), weights) == pytest.approx(best)


@settings(deadline=None)
@given(specs(), WEIGHTS)
def test_heads_are_all_given_away_at_allowed_cuts(spec: ModelSpec, weights: list[float]) -> None:
    spans = cut_heads(spec, weights)
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == spec.n_heads
    assert all(is_head_share(spec, span.start, span.stop) and spec.is_head_cut(span.stop) for span in spans)
    assert all(not span for span, weight in zip(spans, weights, strict=True) if weight == 0)


@settings(deadline=None)
@given(st.integers(0, 12), st.lists(st.one_of(st.just(0.0), st.floats(0.1, 100)), min_size=1, max_size=4).filter(any))
def test_units_are_cut_as_well_as_by_trying_every_cut(total: int, weights: list[float]) -> None:
    best = min(slowest(cut, weights) for cut in every_cut(total, len(weights)))
    assert slowest(pairs(cut_evenly(total, 1, weights)), weights) == pytest.approx(best)


@given(st.integers(0, 200_000), st.integers(1, 256), WEIGHTS)
def test_rows_are_all_given_away_in_whole_units_but_the_rest(total: int, step: int, weights: list[float]) -> None:
    spans = cut_evenly(total, step, weights)
    assert sum(map(len, spans)) == total
    assert all(span.start % step == 0 or span.start == total for span in spans)
    assert all(not span for span, weight in zip(spans, weights, strict=True) if weight == 0)
    whole = sum(weights)
    assert all(len(span) <= total * weight / whole + 2 * step for span, weight in zip(spans, weights, strict=True))


@given(st.integers(1, 6), st.integers(1, 4000))
def test_identical_ranks_differ_by_one_unit_at_most(n_ranks: int, total: int) -> None:
    sizes = [len(span) for span in cut_evenly(total * 32, 32, [2.5] * n_ranks)]
    assert max(sizes) - min(sizes) in {0, 32}


@pytest.mark.parametrize(
    ("total", "block", "n_ranks", "step"),
    [(8192, 32, 3, 32), (8192, 1, 3, 32), (8192, 256, 3, 256), (96, 1, 3, 32), (96, 1, 4, 1), (100, 1, 2, 1)],
)
def test_columns_keep_to_rows_of_32_where_there_are_enough(total: int, block: int, n_ranks: int, step: int) -> None:
    spans = cut_columns(total, block, [1.0] * n_ranks)
    assert all(span.stop % step == 0 for span in spans[:-1])
    assert max(map(len, spans)) - min(map(len, spans)) <= step


def test_words_keep_to_rows_of_32_and_the_last_takes_the_rest() -> None:
    spans = cut_rows(128_300, [1.0, 2.0, 1.0])
    assert all(span.stop % ROW_MULTIPLE == 0 for span in spans[:-1])
    assert spans[-1].stop == 128_300
    assert [len(span) for span in cut_rows(10, [1.0] * 5)] == [2] * 5


def test_rest_goes_to_the_last_rank_that_works() -> None:
    assert pairs(cut_evenly(100, 32, [1, 0, 2, 0, 0])) == [(0, 32), (32, 32), (32, 100), (100, 100), (100, 100)]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("inf")], [float("nan")]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(PlacementError, match="at least 0"):
        cut_evenly(10, 1, weights)
    with pytest.raises(PlacementError, match="at least 0"):
        cut_heads(spec_of(2, 2, 8), weights)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.data())
def test_blocks_are_divided_as_well_as_by_trying_every_division(n_blocks: int, n_stages: int, data: st.DataObject) -> None:
    speeds = data.draw(st.lists(st.floats(0.1, 10), min_size=n_stages, max_size=n_stages))
    rooms = data.draw(st.lists(st.integers(0, 8), min_size=n_stages, max_size=n_stages))

    def cost(stage: int, start: int, stop: int) -> float:
        return (stop - start) ** 2 / speeds[stage] if stop - start <= rooms[stage] else float("inf")

    divisions = (cut for cut in every_cut(n_blocks, n_stages) if all(start < stop for start, stop in cut))
    best = min((sum(cost(stage, *span) for stage, span in enumerate(cut)) for cut in divisions), default=float("inf"))
    if best == float("inf"):
        with pytest.raises(PlacementError):
            cut_blocks(n_blocks, n_stages, cost)
    else:
        assert sum(cost(stage, *span) for stage, span in enumerate(pairs(cut_blocks(n_blocks, n_stages, cost)))) == pytest.approx(best)


def slowest_with(units: Sequence[int], weights: Sequence[float], loads: Sequence[float]) -> float:
    """When the last rank that got anything is done."""
    return max(((load + own) / weight for own, weight, load in zip(units, weights, loads, strict=True) if own), default=0.0)


@settings(deadline=None)
@given(st.integers(1, 10), st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(0.1, 100)), st.floats(0, 20), st.integers(0, 8)), min_size=1, max_size=4))
def test_units_go_to_those_who_are_done_first_and_have_room(total: int, ranks: list[tuple[float, float, int]]) -> None:
    weights, loads, most = ([rank[index] for rank in ranks] for index in range(3))
    if not any(weights):
        return
    room = sum(limit for limit, weight in zip(most, weights, strict=True) if weight)
    if room < total:
        with pytest.raises(PlacementError, match="room for"):
            cut_evenly(total, 1, weights, loads, most)
        return
    found = [len(span) for span in cut_evenly(total, 1, weights, loads, most)]
    assert sum(found) == total
    assert all(own <= limit for own, limit in zip(found, most, strict=True))
    assert all(not own for own, weight in zip(found, weights, strict=True) if not weight)
    allowed = (
        [stop - start for start, stop in cut]
        for cut in every_cut(total, len(weights))
        if all(stop - start <= (limit if weight else 0) for (start, stop), limit, weight in zip(cut, most, weights, strict=True))
    )
    best = min(slowest_with(cut, weights, loads) for cut in allowed)
    assert slowest_with(found, weights, loads) == pytest.approx(best)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(2, 4), st.data())
def test_blocks_are_divided_for_the_slowest_stage_too_and_within_limits(n_blocks: int, n_stages: int, data: st.DataObject) -> None:
    speeds = data.draw(st.lists(st.floats(0.1, 10), min_size=n_stages, max_size=n_stages))
    most = data.draw(st.lists(st.integers(1, 8), min_size=n_stages, max_size=n_stages))

    def cost(stage: int, start: int, stop: int) -> float:
        return (stop - start) / speeds[stage]

    divisions = [
        cut for cut in every_cut(n_blocks, n_stages) if all(start < stop and stop - start <= limit for (start, stop), limit in zip(cut, most, strict=True))
    ]
    if not divisions:
        with pytest.raises(PlacementError):
            cut_blocks(n_blocks, n_stages, cost, max, most)
        return
    best = min(max(cost(stage, *span) for stage, span in enumerate(cut)) for cut in divisions)
    assert max(cost(stage, *span) for stage, span in enumerate(pairs(cut_blocks(n_blocks, n_stages, cost, max, most)))) == pytest.approx(best)
