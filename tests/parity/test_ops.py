"""Every operation of ggml against the reference, on random inputs.

Tolerances are in standard deviations of the reference's result. Where they are wide, ggml rounds what the reference does not: activations to float16, bfloat16
or blocks of int8 before a product with weights of that kind, attention's sums to float16 over a float16 cache.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import pytest

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend, Executor, Floats, Program, ShardShape, SoloReducer
from yoke.backends.reference import ReferenceBackend
from yoke.core.errors import BackendError, ModelError
from yoke.core.frame import Batch, Output
from yoke.core.request import Sampling
from yoke.core.spec import Rope, RopeStyle
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType

# Measured 2026-11 on x86-64 with AVX2: the largest was a half to a third of each.
TOLERANCE = {"F32": 1e-5, "F16": 3e-3, "BF16": 2e-2, "Q8_0": 4e-2, "Q4_0": 4e-2, "Q4_K": 6e-2}
CACHE_TOLERANCE = {"f32": 2e-5, "f16": 1e-2}
WIDTH = 256


class DoublingReducer:
    """A group of two whose other rank always has the same to add."""

    size = 2

    def all_reduce(self, view: Floats) -> None:
        view *= 2


@dataclass(kw_only=True)
class Pair:
    """One program on ggml and on the reference."""

    text: Callable[[Any, Any], Any]
    weights: Sequence[StoredTensor] = ()
    shape: dict[str, Any] = field(default_factory=dict)
    reducer: Any = field(default_factory=SoloReducer)

    def __post_init__(self) -> None:
        defaults = {"width": WIDTH, "n_blocks": 1, "n_kv_heads": 0, "head_dim": 1, "n_cells": 64, "is_last": False}
        backends: tuple[Backend, ...] = (GgmlBackend(threads=1), ReferenceBackend())
        self.executors: list[Executor] = []
        for backend in backends:
            program = Program(text=self.text, shape=ShardShape(**{**defaults, **self.shape}), weights=iter(self.weights), reducer=self.reducer)
            self.executors.append(backend.open(program, device="CPU", threads=1))

    def compute(self, hidden: Floats, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """ggml's result and the reference's, both [rows, ...]."""
        found, expected = (executor.compute(hidden.copy(), batch) for executor in self.executors)
        return found.reshape(len(found), -1), expected.reshape(len(expected), -1)

    def close(self) -> None:
        for executor in self.executors:
            executor.close()


MakePair = Callable[..., Pair]


@pytest.fixture
def make_pair() -> Iterator[MakePair]:
    """Makes pairs, and closes them."""
    pairs = []

    def make(text: Callable[[Any, Any], Any], *weights: StoredTensor, **options: Any) -> Pair:
        pairs.append(Pair(text=text, weights=weights, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def stored(name: str, values: np.ndarray, type_name: str = "F32") -> StoredTensor:
    info = TensorInfo(name=name, type=TensorType[type_name], shape=values.shape)
    if type_name == "Q4_K":
        return StoredTensor(info=info, data=random_q4_k(info))
    return StoredTensor(info=info, data=np.ascontiguousarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])).tobytes())


def random_q4_k(info: TensorInfo) -> bytes:
    """Random blocks with scales that keep values near 1: gguf reads this type but does not write it. A block is d, dmin, 12 bytes of scales, 128 of values."""
    blocks = np.random.default_rng(3).integers(0, 256, (info.n_bytes // 144, 144), dtype=np.uint8)
    blocks[:, 0:2] = np.frombuffer(np.float16(0.004).tobytes(), np.uint8)
    blocks[:, 2:4] = np.frombuffer(np.float16(0.03).tobytes(), np.uint8)
    return blocks.tobytes()


def batch_of(n: int, **changes: Any) -> Batch:
    rows = {"tokens": (1,) * n, "slots": (0,) * n, "positions": tuple(range(n)), "cells": tuple(range(n))}
    return Batch(**{**rows, **changes})


def wanted(*rows: int) -> tuple[Output, ...]:
    return tuple(Output(row=row, sampling=Sampling()) for row in rows)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    difference = float(np.abs(found - expected).max() / expected.std())
    print(f"largest difference {difference:.2e} standard deviations")
    assert difference <= tolerance


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("type_name", TOLERANCE)
def test_linear_multiplies_by_every_type_of_weight(make_pair: MakePair, type_name: str, n_tokens: int) -> None:
    # 72 rows are whole groups of 8 of the repacked layouts; 69 are not.
    for n_rows in (72, 69):
        pair = make_pair(lambda ops, x: ops.linear(x, ops.weight("w")), stored("w", normal(n_rows, WIDTH, seed=1), type_name))
        assert_close(*pair.compute(normal(n_tokens, WIDTH), batch_of(n_tokens)), TOLERANCE[type_name])


@pytest.mark.parametrize(("type_name", "width"), [("F32", 37), ("F16", 37), ("BF16", 37), ("Q8_0", 160), ("Q4_0", 96), ("Q8_0", 32), ("Q4_0", 32)])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_linear_takes_odd_widths(make_pair: MakePair, type_name: str, width: int, n_tokens: int) -> None:
    pair = make_pair(lambda ops, x: ops.linear(x, ops.weight("w")), stored("w", normal(24, width, seed=1), type_name), shape={"width": width})
    assert_close(*pair.compute(normal(n_tokens, width), batch_of(n_tokens)), TOLERANCE[type_name])


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_add_takes_matrices_and_vectors(make_pair: MakePair, n_tokens: int) -> None:
    pair = make_pair(lambda ops, x: ops.add(ops.add(x, ops.weight("b")), x), stored("b", normal(WIDTH, seed=1)))
    assert_close(*pair.compute(normal(n_tokens, WIDTH), batch_of(n_tokens)), 1e-6)


@pytest.mark.parametrize("n_tokens", [1, 9])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_scales_rows(make_pair: MakePair, n_tokens: int, epsilon: float) -> None:
    pair = make_pair(lambda ops, x: ops.rms_norm(x, ops.weight("w"), epsilon), stored("w", 1 + normal(WIDTH, seed=1)))
    assert_close(*pair.compute(normal(n_tokens, WIDTH) * 3, batch_of(n_tokens)), 1e-5)


def test_rms_norm_scales_each_head(make_pair: MakePair) -> None:
    pair = make_pair(lambda ops, x: ops.rms_norm(ops.heads(x, 8), ops.weight("w"), 1e-6), stored("w", 1 + normal(32, seed=1)), shape={"head_dim": 32})
    hidden = normal(5, WIDTH) * np.repeat(np.arange(1, 9, dtype=np.float32), 32)
    assert_close(*pair.compute(hidden, batch_of(5)), 1e-5)


@pytest.mark.parametrize("n_tokens", [1, 9])
@pytest.mark.parametrize("scale", [0.01, 2.0, 100.0])
def test_swiglu_gates_small_and_large_values(make_pair: MakePair, n_tokens: int, scale: float) -> None:
    pair = make_pair(lambda ops, x: ops.swiglu(x, ops.add(x, ops.weight("b"))), stored("b", normal(WIDTH, seed=1)))
    assert_close(*pair.compute(normal(n_tokens, WIDTH) * np.float32(scale), batch_of(n_tokens)), 1e-5)


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize("has_factors", [False, True])
@pytest.mark.parametrize(("dims", "base", "scale"), [(32, 10_000.0, 1.0), (32, 500_000.0, 0.25), (16, 10_000.0, 1.0)])
def test_rope_turns_heads_by_position(make_pair: MakePair, style: RopeStyle, has_factors: bool, dims: int, base: float, scale: float) -> None:
    rope = Rope(style=style, dims=dims, base=base, scale=scale, has_factors=has_factors)
    factors = np.linspace(1, 8, dims // 2, dtype=np.float32)
    text = lambda ops, x: ops.rope(ops.heads(x, 8), rope, ops.weight("f") if has_factors else None)  # noqa: E731
    pair = make_pair(text, stored("f", factors), shape={"head_dim": 32})
    assert_close(*pair.compute(normal(1, WIDTH), batch_of(1, positions=(77,))), 1e-4)
    assert_close(*pair.compute(normal(4, WIDTH), batch_of(4, positions=(0, 1, 200, 5), slots=(0, 0, 0, 1))), 1e-4)
    # A float32 angle of some thousand radians is itself off by 1e-4.
    assert_close(*pair.compute(normal(2, WIDTH), batch_of(2, positions=(4000, 8000))), 2e-3)


def test_rope_leaves_position_zero_alone(make_pair: MakePair) -> None:
    rope = Rope(style=RopeStyle.HALVES, dims=32)
    pair = make_pair(lambda ops, x: ops.rope(ops.heads(x, 8), rope, None), shape={"head_dim": 32})
    hidden = normal(1, WIDTH)
    for result in pair.compute(hidden, batch_of(1)):
        np.testing.assert_allclose(result, hidden, rtol=1e-6)


def attention_pair(make_pair: MakePair, n_heads: int, n_kv_heads: int, head_dim: int, window: int | None, cache_type: str) -> Pair:
    """Projections of the input attend in two blocks with a cache each."""
    weights = [
        stored(part, normal(n * head_dim, WIDTH, seed=seed) / 16) for seed, (part, n) in enumerate((("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)))
    ]
    back = stored("o", normal(WIDTH, n_heads * head_dim, seed=9) / np.float32(np.sqrt(n_heads * head_dim)))

    def text(ops: Any, x: Any) -> Any:
        for block in (0, 1):
            q, k, v = (ops.heads(ops.linear(x, ops.weight(part)), n) for part, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)))
            mixed = ops.attention(q, k, v, block=block, scale=head_dim**-0.5, window=window)
            x = ops.add(x, ops.linear(mixed, ops.weight("o")))
        return x

    shape = {"n_blocks": 2, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "n_cells": 300, "cache_type": cache_type}
    return make_pair(text, *weights, back, shape=shape)


def three_sessions() -> list[Batch]:
    """Two prompts in one step, decoding side by side, one that ends and whose slot and cells another takes, and a prompt in two chunks."""
    return [
        batch_of(9, slots=(0, 0, 0, 0, 0, 3, 3, 3, 3), positions=(0, 1, 2, 3, 4, 0, 1, 2, 3), cells=(0, 1, 2, 3, 4, 8, 7, 6, 5)),
        batch_of(2, slots=(0, 3), positions=(5, 4), cells=(9, 10)),
        batch_of(2, slots=(3, 0), positions=(5, 6), cells=(11, 12)),
        batch_of(4, slots=(0, 0, 0, 3), positions=(0, 1, 2, 6), cells=(0, 1, 9, 20), freed_slots=(0,)),
        batch_of(3, slots=(0, 1, 0), positions=(3, 0, 4), cells=(2, 290, 299)),
        batch_of(1, slots=(1,), positions=(1,), cells=(4,)),
    ]


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(4, 4, 32), (6, 2, 64), (5, 1, 32), (3, 3, 80)])
def test_attention_keeps_sessions_apart(make_pair: MakePair, cache_type: str, window: int | None, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
    pair = attention_pair(make_pair, n_heads, n_kv_heads, head_dim, window, cache_type)
    for step, batch in enumerate(three_sessions()):
        assert_close(*pair.compute(normal(len(batch.tokens), WIDTH, seed=step), batch), CACHE_TOLERANCE[cache_type])


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_attention_reaches_over_a_long_prompt_read_in_chunks(make_pair: MakePair, cache_type: str) -> None:
    pair = attention_pair(make_pair, 4, 2, 32, None, cache_type)
    for start, stop in ((0, 130), (130, 289), (289, 290), (290, 300)):
        span = tuple(range(start, stop))
        batch = batch_of(len(span), positions=span, cells=tuple((7 * cell) % 300 for cell in span))
        assert_close(*pair.compute(normal(len(span), WIDTH, seed=start), batch), CACHE_TOLERANCE[cache_type])


def test_output_rows_are_the_wanted_ones(make_pair: MakePair) -> None:
    pair = make_pair(lambda ops, x: ops.output_rows(ops.add(x, x)), shape={"is_last": True})
    hidden = normal(6, WIDTH)
    for outputs, rows in ((wanted(4, 0, 2), [4, 0, 2]), (wanted(5), [5]), ((), [5]), (wanted(*range(6)), list(range(6)))):
        for result in pair.compute(hidden, batch_of(6, outputs=outputs)):
            np.testing.assert_array_equal(result, 2 * hidden[rows])
    for result in pair.compute(hidden[:1], batch_of(1, outputs=wanted(0))):
        np.testing.assert_array_equal(result, 2 * hidden[:1])


def test_zeros_like_are_zeros(make_pair: MakePair) -> None:
    pair = make_pair(lambda ops, x: ops.zeros_like(x))
    for n_tokens in (1, 5):
        for result in pair.compute(normal(n_tokens, WIDTH), batch_of(n_tokens)):
            np.testing.assert_array_equal(result, np.zeros((n_tokens, WIDTH)))


def test_all_reduce_sums_between_segments(make_pair: MakePair) -> None:
    def text(ops: Any, x: Any) -> Any:
        for _ in range(3):
            x = ops.add(x, ops.all_reduce(ops.linear(x, ops.weight("w"))))
            x = ops.add(x, ops.all_reduce(ops.zeros_like(x)))
        return x

    pair = make_pair(text, stored("w", normal(WIDTH, WIDTH, seed=1) / 16), reducer=DoublingReducer())
    alone = make_pair(text, stored("w", normal(WIDTH, WIDTH, seed=1) / 8))
    for n_tokens in (1, 6, 1):
        hidden = normal(n_tokens, WIDTH, seed=n_tokens)
        found, expected = pair.compute(hidden, batch_of(n_tokens))
        assert_close(found, expected, 1e-5)
        assert_close(expected, alone.compute(hidden, batch_of(n_tokens))[1], 1e-5)


def test_many_batch_shapes_in_turn_give_what_each_gives_alone(make_pair: MakePair) -> None:
    pair = attention_pair(make_pair, 4, 2, 32, None, "f32")
    sizes = [*range(1, 40, 3), 200, 1, 5, 250, *range(30, 1, -2)]
    for step, n in enumerate(sizes):
        assert_close(*pair.compute(normal(n, WIDTH, seed=step), batch_of(n, freed_slots=(0,))), CACHE_TOLERANCE["f32"])


def test_what_cannot_be_computed_is_refused_by_both(make_pair: MakePair) -> None:
    pair = make_pair(lambda ops, x: ops.linear(x, ops.weight("absent")))
    sound = make_pair(lambda ops, x: ops.add(x, x))
    for broken, executor in zip(pair.executors, sound.executors, strict=True):
        with pytest.raises(ModelError, match="'absent' is missing"):
            broken.compute(normal(1, WIDTH), batch_of(1))
        with pytest.raises(BackendError, match="residual stream of shape"):
            executor.compute(normal(2, WIDTH), batch_of(1))
        with pytest.raises(BackendError, match="fills cell 64"):
            executor.compute(normal(1, WIDTH), batch_of(1, cells=(64,)))
        np.testing.assert_array_equal(executor.compute(np.ones((1, WIDTH), np.float32), batch_of(1)), 2 * np.ones((1, WIDTH)))
        executor.close()
        executor.close()
