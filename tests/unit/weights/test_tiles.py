"""Tiles are a model without gap or overlap, and a shard is made of whole ones."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.core.errors import ModelError
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.core.tensor import TensorInfo, TensorType
from yoke.models.families import expected_tensors
from yoke.models.shards import Cut, shard_cuts
from yoke.planner import grid_plan
from yoke.planner.shares import ROW_MULTIPLE
from yoke.weights.tiles import LEAST_TILE_BYTES, MAX_HEAD_DIM, MOST_TILE_BYTES, ROW_UNIT, Layout

# name: blocks (all but one have fewer here than in truth: blocks are alike), width, heads, key/value heads, head dim, columns, vocabulary, biases, is tied
SHAPES = {
    "llama 3.2 1b": (16, 2048, 32, 8, 64, 8192, 32000, False, False),
    "llama 3 8b": (4, 4096, 32, 8, 128, 14336, 128256, False, False),
    "llama 2 70b": (4, 8192, 64, 8, 128, 28672, 32000, False, False),
    "qwen2 0.5b": (4, 896, 14, 2, 64, 4864, 151936, True, True),
    "qwen3 4b": (4, 2560, 32, 8, 128, 9728, 151936, False, True),
    "smollm 135m": (4, 576, 9, 3, 64, 1536, 49152, False, True),
    "openllama 3b": (4, 3200, 32, 32, 100, 8640, 32000, False, False),
}
WIDE = ("llama 3.2 1b", "llama 3 8b", "llama 2 70b", "qwen3 4b")
TYPES = (TensorType.Q4_0, TensorType.Q8_0, TensorType.F16, TensorType.Q4_K, TensorType.Q6_K)
MATRICES = ((name, kind) for name in SHAPES for kind in TYPES if kind.block == 32 or kind.block == 1 or name in WIDE)
CASES = [(name, kind) for name, kind in MATRICES if kind.block == 1 or name != "openllama 3b"]  # heads of 100 cut quantisation blocks
SPLITS = ((1, (1.0, 1.0)), (2, (3.0, 1.0, 2.0)), (1, (1.0, 5.0, 2.0, 2.0, 1.0, 3.0, 1.0, 1.0)))


def spec_of(shape: tuple[int, int, int, int, int, int, int, bool, bool], kind: TensorType) -> ModelSpec:
    n_blocks, width, n_heads, n_kv_heads, head_dim, columns, vocabulary, bias, tied = shape
    return ModelSpec(
        name="shape",
        architecture="llama",
        n_blocks=n_blocks,
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        columns=columns,
        vocabulary=vocabulary,
        context=64,
        norm_epsilon=1e-5,
        rope=Rope(style=RopeStyle.HALVES, dims=2),
        has_qkv_bias=bias,
        tied=tied,
        head_block=kind.block,
        column_block=kind.block,
    )


def tensors_of(spec: ModelSpec, kind: TensorType) -> list[TensorInfo]:
    return [TensorInfo(name=name, type=kind if len(shape) > 1 else TensorType.F32, shape=shape) for name, shape in expected_tensors(spec).items()]


def cut_bytes(layout: Layout, cut: Cut) -> int:
    grid = layout.grid(cut.name)
    (start, stop), (left, right) = grid.area(cut.rows, cut.columns)
    return (stop - start) * grid.info.type.row_bytes(right - left)


def overheads(layout: Layout, plan: Plan) -> Iterable[float]:
    """For each shard, what its tiles have beyond what it needs, as a share of that."""
    sizes = [size for grid in layout.grids.values() for size in grid.sizes()]
    for stage, rank, _ in plan.places():
        cuts = shard_cuts(plan, stage, rank)
        tiles = {tile_id for cut in cuts for tile_id in layout.grid(cut.name).cover(cut.rows, cut.columns)}
        needed = sum(cut_bytes(layout, cut) for cut in cuts)
        if needed:
            yield sum(sizes[tile_id] for tile_id in tiles) / needed - 1


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: getattr(value, "name", value))
def test_tiles_of_a_shard_are_the_shard_and_little_more(name: str, kind: TensorType) -> None:
    spec = spec_of(SHAPES[name], kind)
    layout = Layout(tensors_of(spec, kind), spec.head_dim)
    for stages, shares in SPLITS:
        nodes = [NodeId(f"{index:064x}") for index in range(stages * len(shares))]
        plan = grid_plan(spec, nodes, stages=stages, ranks=len(shares), shares=shares)
        assert max(overheads(layout, plan)) <= 0.02, (stages, shares)


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelSpec, TensorType, Plan]:
    kind = draw(st.sampled_from([TensorType.F16, TensorType.Q4_0, TensorType.Q8_0, TensorType.Q4_K]))
    step = max(32, kind.block)
    head_dim = draw(st.sampled_from([64, 80, 96, 128]))
    n_kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    if (n_kv_heads * group * head_dim) % kind.block:
        head_dim = step
    # Narrower models have tiles of several units: see LEAST_TILE_BYTES.
    width, columns = step * draw(st.integers(512 // step, 2048 // step)), step * draw(st.integers(2048 // step, 6144 // step))
    shape = (draw(st.integers(1, 4)), width, n_kv_heads * group, n_kv_heads, head_dim, columns, draw(st.integers(2000, 9000)), False, draw(st.booleans()))
    spec = spec_of(shape, kind)
    ranks, stages = draw(st.integers(1, 8)), draw(st.integers(1, spec.n_blocks))
    shares = draw(st.lists(st.floats(0.2, 1.0), min_size=ranks, max_size=ranks))
    nodes = [NodeId(f"{index:064x}") for index in range(stages * ranks)]
    return spec, kind, grid_plan(spec, nodes, stages=stages, ranks=ranks, shares=shares)


@settings(deadline=None)
@given(splits())
def test_tiles_of_random_splits_are_the_shards_and_little_more(split: tuple[ModelSpec, TensorType, Plan]) -> None:
    spec, kind, plan = split
    assert max(overheads(Layout(tensors_of(spec, kind), spec.head_dim), plan), default=0.0) <= 0.02


@st.composite
def infos(draw: st.DrawFn) -> TensorInfo:
    kind = draw(st.sampled_from([TensorType.F32, TensorType.Q4_0, TensorType.Q6_K]))
    name = draw(st.sampled_from(["blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.0.ffn_down.weight", "blk.0.ffn_up.weight", "output.weight", "other"]))
    above = draw(st.sampled_from([(), (1,), (37,), (300,), (3, 50)]))
    return TensorInfo(name=name, type=kind, shape=(*above, draw(st.integers(1, 40)) * kind.block))


@given(infos(), st.sampled_from([1, 16, 64, 80, 100, 128]))
def test_every_element_is_in_exactly_one_tile(info: TensorInfo, head_dim: int) -> None:
    layout = Layout([TensorInfo(name="before", type=TensorType.F32, shape=(5,)), info], head_dim)
    grid = layout.grid(info.name)
    tiles = [layout.tile(tile_id) for tile_id in range(grid.first, layout.n_tiles)]
    assert sum(tile.n_bytes for tile in tiles) == info.n_bytes
    assert [tile.n_bytes for tile in tiles] == grid.sizes()
    rows = {tile.rows for tile in tiles}
    columns = {tile.columns for tile in tiles}
    assert len(tiles) == len(rows) * len(columns) == len({(tile.rows, tile.columns) for tile in tiles})
    for spans, size in ((rows, grid.n_rows), (columns, info.shape[-1])):
        edges = [0, *(edge for span in sorted(spans) for edge in span), size]
        assert edges[::2] == edges[1::2]


@given(infos(), st.data())
def test_a_cut_is_covered_by_the_tiles_that_touch_it_and_no_others(info: TensorInfo, data: st.DataObject) -> None:
    layout = Layout([info], 64)
    grid = layout.grid(info.name)
    n_first = info.shape[0] if len(info.shape) > 1 else 1
    start = data.draw(st.integers(0, n_first - 1))
    stop = data.draw(st.integers(start + 1, n_first))
    n_blocks = info.shape[-1] // info.type.block
    left = data.draw(st.integers(0, n_blocks - 1))
    right = data.draw(st.integers(left + 1, n_blocks))
    depth = grid.n_rows // n_first
    area = ((start * depth, stop * depth), (left * info.type.block, right * info.type.block))
    rows = (start, stop) if len(info.shape) > 1 else None
    assert grid.area(rows, area[1]) == area
    touched = [
        tile.id
        for tile in map(layout.tile, range(layout.n_tiles))
        if all(low < span[1] and span[0] < high for (low, high), span in zip((tile.rows, tile.columns), area, strict=True))
    ]
    assert grid.cover(rows, area[1]) == touched


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", WIDE)
def test_tiles_of_a_wide_model_are_of_the_size_that_is_documented(name: str, kind: TensorType) -> None:
    spec = spec_of(SHAPES[name], kind)
    layout = Layout(tensors_of(spec, kind), spec.head_dim)
    matrices = [size for grid in layout.grids.values() if len(grid.info.shape) > 1 for size in grid.sizes()[:-1]]
    assert min(matrices) >= 32 << 10
    assert max(matrices) <= MOST_TILE_BYTES == 512 << 10


def test_a_rows_unit_is_the_planners() -> None:
    assert ROW_UNIT == ROW_MULTIPLE


def test_narrow_tensors_are_not_cut_too_small() -> None:
    layout = Layout([TensorInfo(name="output.weight", type=TensorType.F32, shape=(4000, 8))], 64)
    assert min(layout.grid("output.weight").sizes()[:-1]) == LEAST_TILE_BYTES


def test_one_element_in_a_huge_row_is_still_in_a_small_tile() -> None:
    info = TensorInfo(name="output.weight", type=TensorType.F32, shape=(3, 1 << 20))
    grid = Layout([info], 64).grid(info.name)
    assert max(grid.sizes()) <= MOST_TILE_BYTES
    assert sum(grid.sizes()) == info.n_bytes


def test_the_same_tensors_always_give_the_same_tiles() -> None:
    """Nodes of one cluster must agree on this: whoever changes it changes the version of manifests."""
    shape = SHAPES["llama 3.2 1b"]
    layout = Layout(tensors_of(spec_of(shape, TensorType.Q4_0), TensorType.Q4_0), 64)
    expected = {
        "token_embd.weight": (0, 32, 2048),
        "blk.0.attn_q.weight": (2002, 64, 2048),
        "blk.0.attn_k.weight": (2034, 64, 2048),
        "blk.0.attn_output.weight": (2050, 2048, 64),
        "blk.0.ffn_norm.weight": (2082, 1, 2048),
        "blk.0.ffn_gate.weight": (2083, 32, 2048),
        "blk.0.ffn_down.weight": (2595, 2048, 32),
    }
    assert {name: (layout.grid(name).first, layout.grid(name).rows, layout.grid(name).columns) for name in expected} == expected
    assert layout.n_tiles == 2001 + 16 * 850


@pytest.mark.parametrize(
    ("rows", "columns", "told"),
    [((0, 0), None, "are wanted"), ((2, 7), None, "are wanted"), (None, (0, 96), "are wanted"), (None, (0, 33), "cut a Q4_0 block"), ((-1, 2), None, "wanted")],
)
def test_a_cut_outside_of_its_tensor_is_refused(rows: tuple[int, int] | None, columns: tuple[int, int] | None, told: str) -> None:
    grid = Layout([TensorInfo(name="m", type=TensorType.Q4_0, shape=(6, 64))], 64).grid("m")
    with pytest.raises(ModelError, match=told):
        grid.cover(rows, columns)


def test_a_vector_takes_rows_or_columns_but_not_both() -> None:
    grid = Layout([TensorInfo(name="v", type=TensorType.F32, shape=(64,))], 64).grid("v")
    assert grid.area((3, 9), None) == grid.area(None, (3, 9)) == ((0, 1), (3, 9))
    with pytest.raises(ModelError, match="one dim"):
        grid.area((3, 9), (3, 9))


def test_what_is_not_there_is_said() -> None:
    layout = Layout([TensorInfo(name="v", type=TensorType.F32, shape=(64,))], 64)
    with pytest.raises(ModelError, match="no tensor 'w'"):
        layout.grid("w")
    for tile_id in (-1, 1):
        with pytest.raises(ModelError, match=f"no tile {tile_id}"):
            layout.tile(tile_id)


def test_models_that_cannot_be_handed_out_are_refused() -> None:
    info = TensorInfo(name="m", type=TensorType.F32, shape=(1 << 30, 1 << 20))
    with pytest.raises(ModelError, match="tiles"):
        Layout([info], 64)
    with pytest.raises(ModelError, match="listed twice"):
        Layout([TensorInfo(name="m", type=TensorType.F32, shape=(4,))] * 2, 64)
    for head_dim in (0, MAX_HEAD_DIM + 1):
        with pytest.raises(ModelError, match="heads of"):
            Layout([], head_dim)
