"""A plan is a value that cannot be built wrong."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import InvariantError, ModelError
from yoke.core.node import NodeId
from yoke.core.plan import Plan, Shard, Span, Stage, is_head_share, whole_model
from yoke.core.spec import ModelSpec, Rope, RopeStyle


def node_id(index: int) -> NodeId:
    return NodeId(f"{index:064x}")


def tiny_spec(**changes: object) -> ModelSpec:
    values: dict[str, object] = {
        "name": "tiny",
        "architecture": "llama",
        "n_blocks": 4,
        "width": 64,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 16,
        "columns": 256,
        "vocabulary": 320,
        "context": 128,
        "norm_epsilon": 1e-5,
        "rope": Rope(style=RopeStyle.HALVES, dims=16),
        "embedding_bytes": 1000,
        "head_bytes": 3201,
        "attention_bytes": (811, 822, 833, 844),
        "feed_forward_bytes": (2561, 2562, 2563, 2564),
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def spans(edges: list[int]) -> list[Span]:
    return [Span(a, b) for a, b in itertools.pairwise(edges)]


def stage(index: int, blocks: Span, heads: list[int], columns: list[int], words: list[int]) -> Stage:
    cuts = zip(spans(heads), spans(columns), spans(words), strict=True)
    shards = (
        Shard(node=node_id(100 * index + rank), device="CPU", heads=head, columns=column, vocabulary=rows) for rank, (head, column, rows) in enumerate(cuts)
    )
    return Stage(blocks=blocks, shards=tuple(shards))


def two_by_two() -> Plan:
    first = stage(0, Span(0, 1), [0, 2, 8], [0, 32, 256], [0, 0, 0])
    return Plan(version=1, spec=tiny_spec(), stages=(first, stage(1, Span(1, 4), [0, 6, 8], [0, 0, 256], [0, 7, 320])))


def changed(shard_changes: dict[str, object], stage_index: int = 0, rank: int = 0) -> Callable[[], Plan]:
    def build() -> Plan:
        plan = two_by_two()
        old = plan.stages[stage_index]
        shards = list(old.shards)
        shards[rank] = dataclasses.replace(shards[rank], **shard_changes)
        stages = list(plan.stages)
        stages[stage_index] = dataclasses.replace(old, shards=tuple(shards))
        return dataclasses.replace(plan, stages=tuple(stages))

    return build


def edges(draw: st.DrawFn, total: int, parts: int, allowed: list[int]) -> list[int]:
    inner = sorted(draw(st.lists(st.sampled_from(allowed), min_size=parts - 1, max_size=parts - 1)))
    return [0, *inner, total]


@st.composite
def any_specs(draw: st.DrawFn) -> ModelSpec:
    group, n_kv_heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.sampled_from([16, 32, 64, 96, 128]))
    n_heads = group * n_kv_heads
    head_block = draw(st.sampled_from([b for b in (1, 32, 256) if n_heads * head_dim % b == 0]))
    column_block = draw(st.sampled_from([1, 32, 256]))
    n_blocks = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 10**7), min_size=n_blocks, max_size=n_blocks).map(tuple)
    return tiny_spec(
        n_blocks=n_blocks,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        head_block=head_block,
        columns=column_block * draw(st.integers(1, 12)),
        column_block=column_block,
        vocabulary=draw(st.integers(1, 1000)),
        attention_bytes=draw(sizes),
        feed_forward_bytes=draw(sizes),
        head_bytes=draw(st.integers(0, 10**7)),
        embedding_bytes=draw(st.integers(0, 10**7)),
    )


def head_edges(draw: st.DrawFn, spec: ModelSpec, parts: int) -> list[int]:
    """Any allowed cut of the heads: ``parts`` shares, and as many more as it takes to reach the end."""
    stops: dict[int, list[int]] = {spec.n_heads: [spec.n_heads]}
    for start in range(spec.n_heads - 1, -1, -1):  # only starts from which the end can be reached
        found = [h for h in stops if spec.is_head_cut(h) and is_head_share(spec, start, h)]
        if found and spec.is_head_cut(start):
            stops[start] = sorted([*found, start])
    cut = [0]
    for _ in range(parts - 1):
        cut.append(draw(st.sampled_from(stops[cut[-1]])))
    while len(cut) == 1 or cut[-1] != spec.n_heads:
        cut.append(max(stops[cut[-1]]))
    return cut


@st.composite
def any_plans(draw: st.DrawFn) -> Plan:
    spec = draw(any_specs())
    n_stages = draw(st.integers(1, spec.n_blocks))
    inner = draw(st.lists(st.integers(1, max(1, spec.n_blocks - 1)), unique=True, min_size=n_stages - 1, max_size=n_stages - 1)) if n_stages > 1 else []
    blocks = spans([0, *sorted(inner), spec.n_blocks])
    stages = []
    for index, span in enumerate(blocks):
        heads = head_edges(draw, spec, draw(st.integers(1, 4)))
        ranks = len(heads) - 1
        columns = edges(draw, spec.columns, ranks, list(range(0, spec.columns + 1, spec.column_block)))
        is_last = index == n_stages - 1
        words = edges(draw, spec.vocabulary, ranks, list(range(spec.vocabulary + 1))) if is_last else [0] * (ranks + 1)
        stages.append(stage(index, span, heads, columns, words))
    return Plan(version=draw(st.integers(1, 2**31)), spec=spec, stages=tuple(stages))


@given(plan=any_plans())
def test_any_uneven_shares_that_are_whole_construct_and_add_up(plan: Plan) -> None:
    spec = plan.spec
    places = list(plan.places())
    total = sum(plan.shard_bytes(s, r) for s, r, _ in places)
    whole = sum(spec.attention_bytes) + sum(spec.feed_forward_bytes) + spec.head_bytes + spec.embedding_bytes
    copies = [sum(len(plan.kv_heads(shard)) for shard in stage.shards) - spec.n_kv_heads for stage in plan.stages]
    assert min(copies) >= 0  # every key/value head is somewhere
    unit = spec.n_heads + spec.n_kv_heads
    extra = sum(sum(spec.attention_bytes[s.blocks.start : s.blocks.stop]) * n / unit for s, n in zip(plan.stages, copies, strict=True))
    assert math.floor(whole + extra) - 3 * len(places) <= total <= math.ceil(whole + extra)
    cache = sum(plan.cache_bytes(s, r, 10) for s, r, _ in places)
    assert cache == sum(len(s.blocks) * 10 * 2 * (spec.n_kv_heads + n) * spec.head_dim * 2 for s, n in zip(plan.stages, copies, strict=True))
    for stage_ in plan.stages:
        held = [set(range(shard.heads.start, shard.heads.stop)) for shard in stage_.shards]
        assert sorted(h for heads in held for h in heads) == list(range(spec.n_heads))
        for shard, heads in zip(stage_.shards, held, strict=True):
            kv = plan.kv_heads(shard)
            assert {h // spec.group for h in heads} == set(range(kv.start, kv.stop))


@given(plan=any_plans(), data=st.data())
def test_moving_one_edge_of_one_share_never_makes_a_plan(plan: Plan, data: st.DataObject) -> None:
    stage_index, rank, shard = data.draw(st.sampled_from(list(plan.places())))
    what = data.draw(st.sampled_from(["heads", "columns", "vocabulary", "experts"]))
    span: Span = getattr(shard, what)
    start, stop = data.draw(st.sampled_from([(span.start + 1, span.stop + 1), (span.start, span.stop + 1), (span.start + 1, max(span.stop, span.start + 1))]))
    old = plan.stages[stage_index]
    shards = [dataclasses.replace(s, **{what: Span(start, stop)}) if r == rank else s for r, s in enumerate(old.shards)]
    stages = [dataclasses.replace(old, shards=tuple(shards)) if i == stage_index else s for i, s in enumerate(plan.stages)]
    with pytest.raises(InvariantError):
        dataclasses.replace(plan, stages=tuple(stages))


def test_plan_of_two_stages_of_two_ranks_knows_its_places() -> None:
    plan = two_by_two()
    assert [(s, r) for s, r, _ in plan.places()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [str(plan.kv_heads(shard)) for _, _, shard in plan.places()] == ["0..0", "1..3", "0..2", "3..3"]


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (changed({"heads": Span(0, 4)}), r"stage 0: heads: overlap at 2: a share is 2..8, expected to start at 4"),
        (changed({"heads": Span(0, 1)}), r"stage 0: heads: gap at 1"),
        (changed({"heads": Span(2, 8)}, rank=0), r"stage 0: heads"),
        (changed({"heads": Span(2, 6)}, rank=1), r"stage 0: heads: shares end at 6, expected 8"),
        (changed({"columns": Span(0, 64)}), r"stage 0: columns"),
        (changed({"columns": Span(32, 255)}, rank=1), r"columns: shares end at 255, expected 256"),
        (changed({"vocabulary": Span(0, 320)}), r"stage 0: vocabulary"),
        (changed({"vocabulary": Span(0, 0)}, 1, 0), r"stage 1: vocabulary"),
        (changed({"vocabulary": Span(7, 319)}, 1, 1), r"vocabulary: shares end at 319, expected 320"),
        (changed({"experts": Span(0, 1)}), r"stage 0: experts"),
        (changed({"node": node_id(100)}), r"two shards of one plan"),
        (lambda: dataclasses.replace(two_by_two(), version=0), r"version 0"),
        (lambda: dataclasses.replace(two_by_two(), stages=()), r"blocks: shares end at 0, expected 4"),
        (lambda: dataclasses.replace(two_by_two(), stages=two_by_two().stages[:1]), r"vocabulary|blocks"),
        (lambda: dataclasses.replace(two_by_two(), stages=two_by_two().stages[::-1]), r"blocks"),
        (lambda: dataclasses.replace(two_by_two(), stages=two_by_two().stages[1:]), r"blocks"),
    ],
)
def test_gaps_overlaps_and_doubles_are_refused_by_name(build: Callable[[], Plan], told: str) -> None:
    with pytest.raises(InvariantError, match=told):
        build()


@pytest.mark.parametrize(("block", "heads"), [(32, [0, 1, 8]), (32, [0, 3, 8]), (256, [0, 2, 8])])
def test_heads_cut_inside_a_quantisation_block_are_refused(block: int, heads: list[int]) -> None:
    spec = tiny_spec(head_block=block, n_heads=32 if block == 256 else 8, n_kv_heads=32 if block == 256 else 8)
    scaled = [h if h != 8 else spec.n_heads for h in heads]
    with pytest.raises(InvariantError, match=f"cut a quantisation block of {block}"):
        Plan(version=1, spec=spec, stages=(stage(0, Span(0, 4), scaled, [0, 256, 256], [0, 320, 320]),))


@pytest.mark.parametrize(("block", "edge"), [(32, 16), (32, 33), (256, 128)])
def test_columns_cut_inside_a_quantisation_block_are_refused(block: int, edge: int) -> None:
    with pytest.raises(InvariantError, match=f"columns .* cut a quantisation block of {block}"):
        Plan(version=1, spec=tiny_spec(column_block=block), stages=(stage(0, Span(0, 4), [0, 8, 8], [0, edge, 256], [0, 320, 320]),))


@pytest.mark.parametrize("edge", [3, 5])
def test_heads_that_straddle_key_value_groups_are_refused(edge: int) -> None:
    spec = tiny_spec(n_kv_heads=2)
    with pytest.raises(InvariantError, match="neither whole key/value groups of 4 nor a part of one"):
        Plan(version=1, spec=spec, stages=(stage(0, Span(0, 4), [0, edge, 8], [0, 0, 256], [0, 0, 320]),))


def test_more_ranks_than_key_value_heads_hold_copies_of_one() -> None:
    spec = tiny_spec(n_kv_heads=2)
    plan = Plan(version=1, spec=spec, stages=(stage(0, Span(0, 4), [0, 1, 4, 4, 8], [0, 0, 0, 0, 256], [0, 0, 0, 0, 320]),))
    assert [plan.kv_heads(shard) for _, _, shard in plan.places()] == [Span(0, 1), Span(0, 1), Span(0, 0), Span(1, 2)]
    one_head = plan.cache_bytes(0, 0, 100)
    assert [plan.cache_bytes(0, rank, 100) for rank in range(4)] == [one_head, one_head, 0, one_head]


def test_whole_model_on_one_node_takes_all_bytes() -> None:
    spec = tiny_spec()
    plan = whole_model(spec, node_id(1), "CPU")
    assert plan.shard_bytes(0, 0) == sum(spec.attention_bytes) + sum(spec.feed_forward_bytes) + spec.embedding_bytes + spec.head_bytes
    assert plan.cache_bytes(0, 0, 1) == 4 * 4 * 16 * 2 * 2


def test_empty_stage_and_stage_without_ranks_are_refused() -> None:
    shard = two_by_two().stages[0].shards
    with pytest.raises(InvariantError, match="no block"):
        Stage(blocks=Span(1, 1), shards=shard)
    with pytest.raises(InvariantError, match="no rank"):
        Stage(blocks=Span(0, 1), shards=())


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (2, 1), (-3, -2)])
def test_spans_run_forwards_from_zero(start: int, stop: int) -> None:
    with pytest.raises(InvariantError, match="backwards"):
        Span(start, stop)


def test_span_is_written_inclusively_and_empty_as_a_dash() -> None:
    assert (str(Span(3, 5)), str(Span(3, 3)), len(Span(3, 5))) == ("3..4", "-", 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        *(({name: 0}, name) for name in ("n_blocks", "width", "n_heads", "n_kv_heads", "head_dim", "columns", "vocabulary", "context", "head_block")),
        ({"n_heads": -8}, "n_heads is -8"),
        ({"n_kv_heads": 3}, "8 heads cannot share 3"),
        ({"rope": Rope(style=RopeStyle.HALVES, dims=18)}, "turns 18 dims of a head that has 16"),
        ({"head_block": 256}, "not whole quantisation blocks"),
        ({"columns": 250, "column_block": 32}, "not whole quantisation blocks"),
        ({"attention_bytes": (1, 2)}, "2 block sizes for 4 blocks"),
        ({"feed_forward_bytes": (1,) * 5}, "5 block sizes for 4 blocks"),
        ({"norm_epsilon": math.nan}, "norm_epsilon"),
        ({"norm_epsilon": -1.0}, "norm_epsilon"),
        ({"window": 0}, "window"),
        ({"window": -5}, "window"),
    ],
)
def test_impossible_specs_are_refused_by_name(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        tiny_spec(**changes) if changes != {"head_block": 256} else tiny_spec(n_heads=4, **changes)


@pytest.mark.parametrize(
    "values", [{"dims": 0}, {"dims": 7}, {"dims": -2}, {"dims": 4, "base": 0.0}, {"dims": 4, "base": math.inf}, {"dims": 4, "scale": math.nan}]
)
def test_impossible_rotary_embeddings_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="rotary"):
        Rope(style=RopeStyle.INTERLEAVED, **values)  # type: ignore[arg-type]
