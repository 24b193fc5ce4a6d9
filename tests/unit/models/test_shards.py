"""The slices of all shards together are the model, each piece once; key/value heads may be there twice, and norms in every rank."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.node import NodeId
from yoke.core.plan import Plan, Shard, Span, Stage
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.models.families import expected_tensors
from yoke.models.shards import Cut, shard_cuts
from yoke.planner import grid_plan

REPLICATED = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "output_norm", "rope_freqs")


def tiny_spec(group: int, n_kv_heads: int, n_blocks: int, *, bias: bool, norm: bool, tied: bool, factors: bool, column_block: int = 1) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        architecture="llama",
        n_blocks=n_blocks,
        width=24,
        n_heads=group * n_kv_heads,
        n_kv_heads=n_kv_heads,
        head_dim=4,
        columns=96,
        vocabulary=70,
        context=64,
        norm_epsilon=1e-5,
        rope=Rope(style=RopeStyle.HALVES, dims=4, has_factors=factors),
        has_qkv_bias=bias,
        has_qk_norm=norm,
        tied=tied,
        column_block=column_block,
    )


specs = st.builds(
    tiny_spec,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    bias=st.booleans(),
    norm=st.booleans(),
    tied=st.booleans(),
    factors=st.booleans(),
    column_block=st.sampled_from([1, 32]),
)


def pieces(spec: ModelSpec, cut: Cut) -> list[tuple[str, int]]:
    """The rows that a cut takes, or its columns where it takes all rows."""
    shape = expected_tensors(spec)[cut.name]
    assert cut.rows is None or cut.columns is None
    if cut.columns is not None:
        assert 0 <= cut.columns[0] < cut.columns[1] <= shape[-1]
        return [(cut.name, index) for index in range(*cut.columns)]
    start, stop = cut.rows if cut.rows is not None else (0, shape[0])
    assert 0 <= start < stop <= shape[0]
    return [(cut.name, index) for index in range(start, stop)]


@given(spec=specs, stages=st.integers(1, 3), shares=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_all_shards_together_hold_each_piece_once(spec: ModelSpec, stages: int, shares: list[int]) -> None:
    stages, ranks = min(stages, spec.n_blocks), len(shares)
    plan = grid_plan(spec, [NodeId(f"{i:064x}") for i in range(stages * ranks)], stages=stages, ranks=ranks, shares=shares)
    held: Counter[tuple[str, int]] = Counter()
    for stage, rank, shard in plan.places():
        cuts = shard_cuts(plan, stage, rank)
        assert len({cut.name for cut in cuts}) == len(cuts)
        assert bool(cuts) == bool(shard.heads or shard.columns or shard.vocabulary)
        held.update(piece for cut in cuts for piece in pieces(spec, cut))
    for name, shape in expected_tensors(spec).items():
        if name == "token_embd.weight" and not spec.tied:
            assert (name, 0) not in held  # looked up where the text enters
            continue
        by_columns = name.endswith(("attn_output.weight", "ffn_down.weight"))
        counts = [held[name, index] for index in range(shape[-1] if by_columns else shape[0])]
        assert min(counts) >= 1, f"a piece of {name} is nobody's"
        if not any(part in name for part in REPLICATED) and name.split(".")[-2] not in ("attn_k", "attn_v"):
            assert max(counts) == 1, f"a piece of {name} is held twice"
    for stage in plan.stages:
        copies = Counter(head for shard in stage.shards for head in range(plan.kv_heads(shard).start, plan.kv_heads(shard).stop))
        for head in range(spec.n_kv_heads):
            assert held[f"blk.{stage.blocks.start}.attn_k.weight", head * spec.head_dim] == copies[head]


@pytest.mark.parametrize("tied", [False, True])
def test_empty_shares_load_nothing(tied: bool) -> None:
    spec = tiny_spec(1, 2, 1, bias=True, norm=True, tied=tied, factors=True)
    full = Shard(node=NodeId("a" * 64), device="CPU", heads=Span(0, 2), columns=Span(0, 96), vocabulary=Span(0, 70))
    empty = Shard(node=NodeId("b" * 64), device="CPU", heads=Span(2, 2), columns=Span(96, 96), vocabulary=Span(70, 70))
    plan = Plan(version=1, spec=spec, stages=(Stage(blocks=Span(0, 1), shards=(full, empty)),))
    assert shard_cuts(plan, 0, 1) == ()
    assert {cut.name for cut in shard_cuts(plan, 0, 0)} == set(expected_tensors(spec)) - (set() if tied else {"token_embd.weight"})
