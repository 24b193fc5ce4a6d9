"""The seam between models and the libraries that compute: what a model's text may ask for, and what runs it.

A *text* is a function over :class:`Ops`; it is the model. An eager backend computes while the text runs; a recording backend (ggml) runs the text once per batch
shape and replays the graph. The meaning of every operation is the ``reference`` backend.

Legend of shapes: T tokens, D width, I inputs, O outputs, H heads, K key/value heads, C head dim, V vocabulary rows held here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from yoke.core.errors import BackendError
from yoke.core.frame import Batch
from yoke.core.node import Device, Rate
from yoke.core.spec import Rope
from yoke.core.tensor import StoredTensor

Floats = NDArray[np.float32]
TensorT = TypeVar("TensorT")
CacheType = Literal["f16", "f32"]

ATTENTION = "attention"
"""The type under which a rate tells of attention over a cache in F16 rather than of weights.

Its bytes are keys and values as every query head reads them: ``4 * n_heads * head_dim`` for each block and each cell that a token sees. Its operations are as
many. Query heads that share a key/value head read it again, each for itself: so the CPU's kernel does it.
"""


class Ops(Protocol[TensorT]):
    """The operations that a model's text is written in, over opaque handles. Everything is float32 but weights and cache."""

    def weight(self, name: str) -> TensorT:
        """The loaded weight of that name: a matrix [O, I], or a vector."""

    def linear(self, x_TI: TensorT, w_OI: TensorT) -> TensorT:
        """``x @ w.T`` [T, O]."""

    def add(self, a: TensorT, b: TensorT) -> TensorT:
        """Elementwise sum; ``b`` may be a vector that is added to every row."""

    def rms_norm(self, x: TensorT, weight: TensorT, epsilon: float) -> TensorT:
        """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last dim (arXiv 1910.07467)."""

    def swiglu(self, gate: TensorT, up: TensorT) -> TensorT:
        """``silu(gate) * up`` (arXiv 2002.05202)."""

    def heads(self, x_TA: TensorT, n_heads: int) -> TensorT:
        """[T, heads * C] seen as [T, heads, C]."""

    def rope(self, x_THC: TensorT, rope: Rope, factors: TensorT | None) -> TensorT:
        """Turn each head by its token's position (arXiv 2104.09864); ``factors`` [dims / 2] divide the frequencies."""

    def attention(self, q_THC: TensorT, k_TKC: TensorT, v_TKC: TensorT, *, block: int, scale: float, window: int | None) -> TensorT:
        """Store keys and values in the cache of ``block`` (counted from this shard's first), then attend over the session's cells: [T, H * C].

        A token sees the tokens of its session at its own and earlier positions, the last ``window`` of them if there is a window.
        """

    def output_rows(self, x_TD: TensorT) -> TensorT:
        """The rows whose next token is wanted; the last row if none is."""

    def zeros_like(self, x: TensorT) -> TensorT:
        """Zeros in the shape of ``x``: the contribution of a rank whose share is empty."""

    def all_reduce(self, x: TensorT) -> TensorT:
        """The sum of ``x`` over the stage's group, the same bits on every rank."""


class Text(Protocol):
    """A shard's share of a model: residual stream in, residual stream or logits out."""

    def __call__(self, ops: Ops[TensorT], x_TD: TensorT, /) -> TensorT:
        """Say the model once over ``ops``."""


class Reducer(Protocol):
    """What a backend needs of a group: how many ranks, and their sum, in place."""

    @property
    def size(self) -> int:
        """Ranks in the group."""

    def all_reduce(self, view: Floats) -> None:
        """Replace the flat ``view`` by its sum over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardShape:
    """What a backend must set aside for a shard: cache for ``n_blocks`` blocks of ``n_kv_heads`` heads of ``head_dim``, ``n_cells`` tokens deep.

    A shard of the last stage (``is_last``) answers a step with one row for each wanted output, any other with the whole residual stream.
    """

    width: int
    n_blocks: int
    n_kv_heads: int
    head_dim: int
    n_cells: int
    is_last: bool
    cache_type: CacheType = "f16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Everything a backend needs to run a shard. ``weights`` is consumed once, tensor by tensor, so that no more than one is in flight."""

    text: Text
    shape: ShardShape
    weights: Iterable[StoredTensor]
    reducer: Reducer


class Executor(Protocol):
    """A shard loaded on a device. One thread at a time."""

    def compute(self, hidden: Floats, batch: Batch) -> Floats:
        """One step: [T, D] in; [T, D] out, or logits [outputs or 1, V] from a shard that holds vocabulary rows.

        Raises
        ------
        BackendError
            if the device fails, for example by running out of memory.
        """

    def clear(self) -> None:
        """Forget what the cache holds."""

    def close(self) -> None:
        """Free the device's memory. Harmless when called twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A device that nobody has measured: what its library says of it.

    ``threads`` are those that it computes with when nobody says otherwise; only a chip that ``is_host``, the machine's own processor, takes another number.
    """

    name: str
    description: str
    free_bytes: int
    threads: int
    is_host: bool


class Backend(Protocol):
    """A library that computes."""

    @property
    def name(self) -> str:
        """The name that a setting chooses it by."""

    @property
    def version(self) -> str:
        """The library's own version: what was measured with one does not hold for another."""

    def chips(self) -> tuple[Chip, ...]:
        """Every device that this build offers. Takes no time to speak of."""

    def measure(self, device: str, weight_type: str, thread_counts: Sequence[int], budget_s: float) -> tuple[Rate, ...]:
        """How fast a device computes with weights of a type (``Q4_0``, ``F16``, ...), or attends (`ATTENTION`), for each number of threads.

        The first number is always measured, the others while ``budget_s`` seconds last. Nothing comes back if the device cannot multiply with that type.

        Raises
        ------
        BackendError
            if there is no such device or type, no number of threads, or not enough memory on the device.
        """

    def devices(self) -> tuple[Device, ...]:
        """Every device that this build offers and that can run a decoder, measured in haste with weights in Q4_0. Takes a second or two."""

    def dequantize(self, tensor: StoredTensor) -> Floats:
        """A stored matrix's values [rows, columns]: the embedding look-up.

        Raises
        ------
        BackendError
            if the library does not know the type.
        """

    def open(self, program: Program, *, device: str, threads: int) -> Executor:
        """Load a shard on a device.

        Raises
        ------
        BackendError
            if there is no such device, or not enough memory on it.
        """


def measured_device(chip: Chip, backend: str, rates: tuple[Rate, ...]) -> Device:
    """A chip with its rates, the most important one first: its speed is that one's."""
    return Device(
        name=chip.name,
        description=chip.description,
        backend=backend,
        free_bytes=chip.free_bytes,
        matvec_bytes_per_s=rates[0].matvec_bytes_per_s,
        threads=chip.threads,
        rates=rates,
    )


class SoloReducer:
    """A group of one: the sum is the value."""

    size = 1

    def all_reduce(self, view: Floats) -> None:
        """Leave ``view`` as it is."""


def output_row_indices(batch: Batch) -> NDArray[np.int32]:
    """Rows of ``batch`` whose next token is wanted, or the last row so that every step has a result."""
    rows = [output.row for output in batch.outputs] or [len(batch.tokens) - 1]
    return np.asarray(rows, dtype=np.int32)


def check_hidden(hidden: Floats, batch: Batch, width: int) -> None:
    """Refuse a residual stream that does not belong to ``batch``.

    Raises
    ------
    BackendError
        if the shape is not [T, width].
    """
    if hidden.shape != (len(batch.tokens), width):
        raise BackendError(f"residual stream of shape {hidden.shape} for {len(batch.tokens)} tokens of width {width}")
