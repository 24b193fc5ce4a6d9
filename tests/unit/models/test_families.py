"""From a file's metadata and tensors to a spec, or to a refusal that names what is wrong."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import ModelError
from yoke.core.spec import ModelSpec, RopeStyle
from yoke.core.tensor import TensorInfo, TensorType
from yoke.models.families import FAMILIES, expected_tensors, model_spec

Tensors = dict[str, TensorInfo]


def metadata(architecture: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "context_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def tensors(architecture: str, *, tied: bool = False, kind: TensorType = TensorType.F32, **changes: tuple[int, ...] | None) -> Tensors:
    """All tensors of the model above, written down by hand; a change of None takes one away."""
    family = FAMILIES[architecture]
    shapes: dict[str, tuple[int, ...] | None] = {"token_embd.weight": (300, 64), "output_norm.weight": (64,)}
    if not tied:
        shapes["output.weight"] = (300, 64)
    for block in range(2):
        prefix = f"blk.{block}."
        shapes |= {prefix + "attn_norm.weight": (64,), prefix + "attn_q.weight": (64, 64), prefix + "attn_output.weight": (64, 64)}
        shapes |= {prefix + "attn_k.weight": (32, 64), prefix + "attn_v.weight": (32, 64)}
        shapes |= {prefix + "ffn_norm.weight": (64,), prefix + "ffn_gate.weight": (96, 64), prefix + "ffn_up.weight": (96, 64)}
        shapes |= {prefix + "ffn_down.weight": (64, 96)}
        if family.has_qkv_bias:
            shapes |= {prefix + "attn_q.bias": (64,), prefix + "attn_k.bias": (32,), prefix + "attn_v.bias": (32,)}
        if family.has_qk_norm:
            shapes |= {prefix + "attn_q_norm.weight": (16,), prefix + "attn_k_norm.weight": (16,)}
    shapes |= {name.replace("__", "."): shape for name, shape in changes.items()}
    return {n: TensorInfo(name=n, type=kind if len(s) > 1 else TensorType.F32, shape=s) for n, s in shapes.items() if s is not None}


def spec_of(architecture: str = "llama", tensor_changes: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    return model_spec("tiny", metadata(architecture, **changes), tensors(architecture, **(tensor_changes or {})))


@pytest.mark.parametrize(
    ("architecture", "style", "has_bias", "has_norm"),
    [("llama", RopeStyle.INTERLEAVED, False, False), ("qwen2", RopeStyle.HALVES, True, False), ("qwen3", RopeStyle.HALVES, False, True)],
)
def test_each_family_becomes_its_spec(architecture: str, style: RopeStyle, has_bias: bool, has_norm: bool) -> None:
    spec = spec_of(architecture)
    assert (spec.architecture, spec.rope.style, spec.has_qkv_bias, spec.has_qk_norm) == (architecture, style, has_bias, has_norm)
    assert (spec.n_blocks, spec.width, spec.n_heads, spec.n_kv_heads, spec.head_dim) == (2, 64, 4, 2, 16)
    assert (spec.columns, spec.vocabulary, spec.context, spec.norm_epsilon) == (96, 300, 128, 1e-5)
    assert expected_tensors(spec) == {name: info.shape for name, info in tensors(architecture).items()}


def test_every_known_family_is_tested_above() -> None:
    assert set(FAMILIES) == {"llama", "qwen2", "qwen3"}


def test_what_a_file_does_not_say_has_defaults() -> None:
    spec = spec_of()
    assert (spec.rope.dims, spec.rope.base, spec.rope.scale, spec.rope.has_factors) == (16, 10_000.0, 1.0, False)
    assert (spec.window, spec.tied, spec.n_experts, spec.head_block, spec.column_block) == (None, False, 0, 1, 1)
    alone = model_spec(
        "tiny",
        metadata("llama", attention__head_count_kv=None),
        tensors("llama", **{f"blk.{b}.attn_{part}.weight": (64, 64) for b in range(2) for part in "kv"}),
    )
    assert alone.n_kv_heads == alone.n_heads


def test_what_a_file_says_is_taken() -> None:
    spec = spec_of(
        rope__freq_base=500_000.0,
        rope__scaling__type="linear",
        rope__scaling__factor=4.0,
        attention__sliding_window=32,
        rope__dimension_count=8,
        tensor_changes={"rope_freqs.weight": (4,), "tied": True},
    )
    assert (spec.rope.base, spec.rope.scale, spec.rope.dims, spec.rope.has_factors, spec.window, spec.tied) == (500_000.0, 0.25, 8, True, 32, True)
    assert spec_of(attention__head_count=[4, 4], attention__sliding_window=0).n_heads == 4


def test_sizes_are_those_of_the_tensors() -> None:
    spec = spec_of("qwen2")
    assert (spec.embedding_bytes, spec.head_bytes) == (300 * 64 * 4, 300 * 64 * 4)
    assert spec.attention_bytes == (4 * (64 + 64 * 64 * 2 + 32 * 64 * 2 + 64 + 32 + 32),) * 2
    assert spec.feed_forward_bytes == (4 * (64 + 3 * 96 * 64),) * 2
    tied = spec_of(tensor_changes={"tied": True})
    assert tied.head_bytes == tied.embedding_bytes


def test_largest_quantisation_block_decides_where_may_be_cut() -> None:
    mixed = tensors("llama", kind=TensorType.Q8_0)
    mixed["blk.1.attn_output.weight"] = TensorInfo(name="blk.1.attn_output.weight", type=TensorType.F16, shape=(64, 64))
    spec = model_spec("tiny", metadata("llama"), mixed)
    assert (spec.head_block, spec.column_block) == (32, 32)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"tiny: architecture 'mamba' is not supported; known are llama \(Llama 2 and 3.*qwen2.*qwen3"):
        model_spec("tiny", metadata("mamba"), {})


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "attention__head_count", "feed_forward_length", "context_length", "attention__layer_norm_rms_epsilon"],
)
@pytest.mark.parametrize("value", [None, "12", True, [], [1, 2], 1.5, float("nan"), -1, 0])
def test_needed_entries_that_are_missing_or_odd_are_refused(key: str, value: Any) -> None:
    if key.endswith("epsilon") and value in (1.5, 0):
        assert spec_of(**{key: value}).norm_epsilon == value
        return
    with pytest.raises(ModelError):
        spec_of(**{key: value})
    if not isinstance(value, int | float) or isinstance(value, bool):
        with pytest.raises(ModelError, match=f"llama.{key.replace('__', '.')}.*expected one number"):
            spec_of(**{key: value})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"expert_count": 8}, "mixture of 8 experts is not supported"),
        ({"attention__value_length": 32}, "keys and values have different sizes"),
        ({"rope__scaling__type": "yarn"}, "rotary scaling 'yarn' is not supported"),
        ({"rope__dimension_count": 7}, "positive even number"),
        ({"rope__dimension_count": 18}, "turns 18 dims of a head that has 16"),
        ({"rope__freq_base": 0.0}, "rotary base"),
        ({"attention__sliding_window": -3}, "window"),
        ({"attention__head_count_kv": 3}, "cannot share"),
        ({"attention__head_count_kv": [2, 1]}, "expected one number"),
        ({"block_count": 2**62}, "blocks are announced, but there are"),
        ({"block_count": 3}, "blk.2.* is missing"),
        ({"block_count": 1}, "do not belong"),
        ({"feed_forward_length": 128}, r"'blk.0.ffn_gate.weight' has shape \(96, 64\); expected \(128, 64\)"),
    ],
)
def test_metadata_that_contradicts_or_is_not_understood_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        spec_of(**changes)


def test_file_without_an_architecture_is_no_model() -> None:
    for found in ({}, {"general.architecture": 3}):
        with pytest.raises(ModelError, match="Is this a model file"):
            model_spec("tiny", found, {})


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_any_missing_tensor_is_named(architecture: str) -> None:
    for name in tensors(architecture):
        if name == "output.weight":
            continue  # then the embedding is the output matrix
        with pytest.raises(ModelError, match=f"tensor '{name}' is missing"):
            spec_of(architecture, {name: None})


@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_any_wrong_shape_is_named(architecture: str) -> None:
    for name, info in tensors(architecture).items():
        wrong = (*info.shape[:-1], info.shape[-1] + 32)
        with pytest.raises(ModelError, match="has shape") as caught:
            spec_of(architecture, {name: wrong})
        assert f"{name!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "v.patch_embd.weight", "blk.2.attn_norm.weight"])
def test_tensors_that_would_change_the_models_meaning_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"1 tensors such as '{name}' do not belong to architecture 'llama'"):
        spec_of("llama", {name: (64,)})


values = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4) | st.lists(st.integers(0, 3), max_size=3)


@given(
    changes=st.dictionaries(st.sampled_from([*metadata("llama"), "llama.rope.dimension_count", "llama.rope.freq_base", "llama.attention.key_length"]), values)
)
def test_any_metadata_gives_a_spec_or_a_model_error(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ModelError):
        model_spec("tiny", metadata("llama") | changes, tensors("llama"))
