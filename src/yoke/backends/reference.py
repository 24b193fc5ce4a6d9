"""The definition: every operation in numpy, float32, written to be read. Slow, exact, and what all other backends are held to.

Legend of shapes: T tokens, D width, I inputs, O outputs, H heads, K key/value heads, G heads a key/value head, C head dim, N cells.
"""

from collections.abc import Iterable, Sequence

import gguf
import numpy as np
import psutil

from yoke.backends.cells import CellTable
from yoke.backends.ops import Chip, Floats, Program, ShardShape, check_hidden, output_row_indices
from yoke.core.errors import ModelError
from yoke.core.frame import Batch
from yoke.core.node import Device, Rate
from yoke.core.spec import Rope, RopeStyle
from yoke.core.tensor import StoredTensor

NOMINAL_BYTES_PER_S = 1e9  # the reference is never chosen for its speed, so it is not measured
NOMINAL_FLOP_PER_S = 1e10


def dequantize(tensor: StoredTensor) -> Floats:
    """A stored tensor's values, float32, in its shape."""
    raw = np.frombuffer(tensor.data, dtype=np.uint8)
    values = gguf.quants.dequantize(_as_rows(raw, tensor), gguf.GGMLQuantizationType(tensor.info.type))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.info.shape)


def _as_rows(raw: np.ndarray[tuple[int], np.dtype[np.uint8]], tensor: StoredTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    plain = {0: np.float32, 1: np.float16}.get(int(tensor.info.type))
    if plain is not None:
        return raw.view(plain).reshape(tensor.info.shape)
    return raw.reshape(-1, tensor.info.type.row_bytes(tensor.info.shape[-1]))


class ReferenceOps:
    """Operations that compute at once, for one step."""

    def __init__(self, executor: "ReferenceExecutor", batch: Batch) -> None:
        self._executor = executor
        self._batch = batch
        self._positions = np.asarray(batch.positions, dtype=np.float32)

    def weight(self, name: str) -> Floats:
        """The dequantised weight."""
        try:
            return self._executor.weights[name]
        except KeyError:
            raise ModelError(f"tensor {name!r} is missing from this shard") from None

    def linear(self, x_TI: Floats, w_OI: Floats) -> Floats:
        """Matrix product with the transposed weight."""
        return x_TI @ w_OI.T

    def add(self, a: Floats, b: Floats) -> Floats:
        """Sum."""
        return a + b

    def rms_norm(self, x: Floats, weight: Floats, epsilon: float) -> Floats:
        """Root-mean-square normalisation."""
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        return np.asarray(x / np.sqrt(mean_square + np.float32(epsilon)) * weight, dtype=np.float32)

    def swiglu(self, gate: Floats, up: Floats) -> Floats:
        """Gated linear unit with SiLU."""
        with np.errstate(over="ignore"):  # gates below -88: exp is infinite, and the result zero, as it should be
            return np.asarray(gate / (1.0 + np.exp(-gate)) * up, dtype=np.float32)

    def heads(self, x_TA: Floats, n_heads: int) -> Floats:
        """A view by heads."""
        return x_TA.reshape(x_TA.shape[0], n_heads, -1)

    def rope(self, x_THC: Floats, rope: Rope, factors: Floats | None) -> Floats:
        """Rotary embedding on the first ``rope.dims`` dims."""
        half = rope.dims // 2
        frequencies = np.float64(rope.base) ** (-2.0 * np.arange(half) / rope.dims)
        if factors is not None:
            frequencies = frequencies / factors
        angle = (self._positions[:, None] * rope.scale * frequencies)[:, None, :]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first, second = (slice(0, rope.dims, 2), slice(1, rope.dims, 2)) if rope.style is RopeStyle.INTERLEAVED else (slice(0, half), slice(half, rope.dims))
        turned = x_THC.copy()
        turned[..., first] = x_THC[..., first] * cos - x_THC[..., second] * sin
        turned[..., second] = x_THC[..., first] * sin + x_THC[..., second] * cos
        return turned

    def attention(self, q_THC: Floats, k_TKC: Floats, v_TKC: Floats, *, block: int, scale: float, window: int | None) -> Floats:
        """Softmax attention over the session's cells."""
        keys_NKC, values_NKC = self._executor.cache[block]
        cells = list(self._batch.cells)
        keys_NKC[cells], values_NKC[cells] = k_TKC, v_TKC
        n_used = self._executor.cells.n_used(1)
        seen_TN = self._executor.cells.visible(self._batch, n_used, window)
        n_tokens, n_heads, _ = q_THC.shape
        n_kv_heads = k_TKC.shape[1]
        q_TKGC = q_THC.reshape(n_tokens, n_kv_heads, n_heads // n_kv_heads, -1)
        scores = np.einsum("tkgc,nkc->tkgn", q_TKGC, keys_NKC[:n_used].astype(np.float32), optimize=True) * np.float32(scale)
        scores = np.where(seen_TN[:, None, None, :], scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("tkgn,nkc->tkgc", scores, values_NKC[:n_used].astype(np.float32), optimize=True)
        return np.asarray(mixed.reshape(n_tokens, -1), dtype=np.float32)

    def output_rows(self, x_TD: Floats) -> Floats:
        """The wanted rows."""
        return x_TD[output_row_indices(self._batch)]

    def zeros_like(self, x: Floats) -> Floats:
        """Zeros."""
        return np.zeros_like(x)

    def all_reduce(self, x: Floats) -> Floats:
        """Sum over the group."""
        total = np.ascontiguousarray(x).reshape(-1)
        if self._executor.program.reducer.size > 1:
            self._executor.program.reducer.all_reduce(total)
        return total.reshape(x.shape)


class ReferenceExecutor:
    """A shard in numpy arrays."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = _load(program.weights)
        self.cells = CellTable(program.shape.n_cells)
        self.cache = _empty_cache(program.shape)

    def compute(self, hidden: Floats, batch: Batch) -> Floats:
        """One step."""
        check_hidden(hidden, batch, self.program.shape.width)
        self.cells.apply(batch)
        return self.program.text(ReferenceOps(self, batch), hidden)

    def clear(self) -> None:
        """Forget what the cache holds."""
        self.cells.clear()

    def close(self) -> None:
        """Drop the arrays."""
        self.weights, self.cache = {}, []


def _load(weights: Iterable[StoredTensor]) -> dict[str, Floats]:
    return {tensor.info.name: dequantize(tensor) for tensor in weights}


def _empty_cache(shape: ShardShape) -> list[tuple[np.ndarray[tuple[int, ...], np.dtype[np.floating]], np.ndarray[tuple[int, ...], np.dtype[np.floating]]]]:
    dtype = np.float16 if shape.cache_type == "f16" else np.float32
    size = (shape.n_cells, shape.n_kv_heads, shape.head_dim)
    return [(np.zeros(size, dtype), np.zeros(size, dtype)) for _ in range(shape.n_blocks)]


class ReferenceBackend:
    """numpy on the CPU."""

    name = "reference"
    version = np.__version__

    def chips(self) -> tuple[Chip, ...]:
        """The one CPU."""
        return (Chip(name="CPU", description="numpy", free_bytes=psutil.virtual_memory().available, threads=1, is_host=True),)

    def measure(self, device: str, weight_type: str, thread_counts: Sequence[int], budget_s: float) -> tuple[Rate, ...]:
        """Nominal rates: all types are float32 here, and numpy chooses its own threads."""
        return tuple(
            Rate(weight_type=weight_type, threads=threads, matvec_bytes_per_s=NOMINAL_BYTES_PER_S, matmul_flop_per_s=NOMINAL_FLOP_PER_S)
            for threads in thread_counts
        )

    def devices(self) -> tuple[Device, ...]:
        """The one CPU."""
        (chip,) = self.chips()
        speed = NOMINAL_BYTES_PER_S
        return (Device(name=chip.name, description=chip.description, backend=self.name, free_bytes=chip.free_bytes, matvec_bytes_per_s=speed),)

    def dequantize(self, tensor: StoredTensor) -> Floats:
        """The values."""
        return dequantize(tensor)

    def open(self, program: Program, *, device: str, threads: int) -> ReferenceExecutor:
        """Load a shard; numpy chooses its own threads."""
        return ReferenceExecutor(program)
