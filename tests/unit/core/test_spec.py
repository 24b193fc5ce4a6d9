"""A model's shape refuses what no model can be."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import ModelError
from yoke.core.spec import ModelSpec, Rope, RopeStyle


def spec_of(**changes: Any) -> ModelSpec:
    return ModelSpec(**{
        "name": "m", "architecture": "llama", "n_blocks": 2, "width": 64, "n_heads": 8, "n_kv_heads": 2, "head_dim": 16, "columns": 96, "vocabulary": 300,
        "context": 64, "norm_epsilon": 1e-5, "rope": Rope(style=RopeStyle.HALVES, dims=16), **changes,
    })  # fmt: skip


@pytest.mark.parametrize("name", ["n_blocks", "width", "n_heads", "n_kv_heads", "head_dim", "columns", "vocabulary", "context", "head_block", "column_block"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_positive(name: str, value: int) -> None:
    with pytest.raises(ModelError, match=f"m: {name} is {value}; expected a positive number"):
        spec_of(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "8 heads cannot share 3 key/value heads evenly"),
        ({"head_dim": 8}, "turns 16 dims of a head that has 8"),
        ({"head_block": 256}, "not whole quantisation blocks"),
        ({"column_block": 256}, "not whole quantisation blocks"),
        ({"attention_bytes": (1,)}, "1 block sizes for 2 blocks"),
        ({"feed_forward_bytes": (1, 2, 3)}, "3 block sizes for 2 blocks"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(**changes)


@pytest.mark.parametrize("values", [{"dims": 0}, {"dims": 3}, {"dims": 4, "base": 0.0}, {"dims": 4, "scale": -1.0}, {"dims": 4, "base": float("nan")}])
def test_rotary_embedding_turns_pairs(values: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        Rope(style=RopeStyle.INTERLEAVED, **values)


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_key_value_heads_are_those_that_the_queries_attend_with(n_kv_heads: int, group: int, data: st.DataObject) -> None:
    spec = spec_of(n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, spec.n_heads)] * 2)))
    first, end = spec.kv_heads_of(start, stop)
    assert set(range(first, end)) == {head // spec.group for head in range(start, stop)}


def test_heads_are_cut_on_the_edge_of_a_quantisation_block() -> None:
    spec = spec_of(head_block=32)
    assert [spec.is_head_cut(head) for head in range(5)] == [True, False, True, False, True]


def test_cache_holds_keys_and_values() -> None:
    assert spec_of().cache_bytes_per_cell(2) == 2 * 2 * 16 * 2
    assert spec_of().cache_bytes_per_cell(2, element_bytes=4) == 2 * 2 * 16 * 4
