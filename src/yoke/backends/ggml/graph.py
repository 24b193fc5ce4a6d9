"""Recording a model's text as a ggml graph, cut where ranks must exchange, and replaying it.

ggml writes shapes the other way round: what is [T, D] here is ``ne = (D, T)`` there. Legend as in ``backends.ops``.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from yoke.backends.ggml.library import InitParams, Library
from yoke.backends.ops import Floats, ShardShape
from yoke.core.errors import BackendError, ModelError
from yoke.core.spec import Rope, RopeStyle
from yoke.core.tensor import TensorType

PRECISION_F32 = 10  # ggml.h, GGML_PREC_F32
ROPE_MODES = {RopeStyle.INTERLEAVED: 0, RopeStyle.HALVES: 2}  # ggml.h, GGML_ROPE_TYPE_NORMAL and _NEOX
TENSORS_PER_BLOCK = 64  # a Qwen3 block takes 34 tensors with all their views
Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
I64 = 27  # ggml.h, GGML_TYPE_I64


@dataclass(frozen=True, slots=True)
class GraphKey:
    """The sizes that a recorded graph is good for."""

    n_tokens: int
    n_cells: int
    n_outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The lasting tensors of a shard: weights by name, and each block's (keys, values), both [cells, K * C]."""

    weights: dict[str, int]
    cache: Sequence[tuple[int, int]]


class Recorder:
    """The operations as ggml nodes. After the text has run, ``cuts`` holds (node count, handle) of every exchange."""

    def __init__(self, library: Library, key: GraphKey, shape: ShardShape, storage: Storage, grouped: bool) -> None:
        self._library, self._key, self._shape, self._storage, self._grouped = library, key, shape, storage, grouped
        n_tensors = 64 + TENSORS_PER_BLOCK * shape.n_blocks
        # every segment is a graph of its own over the same nodes, so twice the graph's memory is enough for all of them with their headers
        graphs = 2 + (2 * shape.n_blocks if grouped else 0)
        memory = (
            n_tensors * library.tensor_overhead()
            + library.graph_overhead_custom(n_tensors, False)
            + graphs * library.graph_overhead_custom(TENSORS_PER_BLOCK, False)
        )
        self.context = library.init(InitParams(memory, None, True))
        self.graph = library.new_graph_custom(self.context, n_tensors, False)
        self.inputs: dict[str, int] = {}
        self.masks: dict[int | None, int] = {}
        self.cuts: list[tuple[int, int]] = []
        self.x = library.new_tensor_2d(self.context, TensorType.F32, shape.width, key.n_tokens)
        library.set_input(self.x)
        self.inputs["x"] = self.x

    def weight(self, name: str) -> int:
        """The loaded weight."""
        try:
            return self._storage.weights[name]
        except KeyError:
            raise ModelError(f"tensor {name!r} is missing from this shard") from None

    def linear(self, x_TI: int, w_OI: int) -> int:
        """Matrix product."""
        return int(self._library.mul_mat(self.context, w_OI, x_TI))

    def add(self, a: int, b: int) -> int:
        """Sum."""
        return int(self._library.add(self.context, a, b))

    def rms_norm(self, x: int, weight: int, epsilon: float) -> int:
        """Normalise and scale; the CPU fuses both."""
        return int(self._library.mul(self.context, self._library.rms_norm(self.context, x, epsilon), weight))

    def swiglu(self, gate: int, up: int) -> int:
        """Gated linear unit."""
        return int(self._library.swiglu_split(self.context, gate, up))

    def heads(self, x_TA: int, n_heads: int) -> int:
        """A view by heads."""
        return int(self._library.reshape_3d(self.context, x_TA, self._shape.head_dim, n_heads, self._key.n_tokens))

    def rope(self, x_THC: int, rope: Rope, factors: int | None) -> int:
        """Rotary embedding. The YaRN arguments (0, 1, 32, 1) switch it off."""
        mode = ROPE_MODES[rope.style]
        return int(
            self._library.rope_ext(
                self.context,
                x_THC,
                self._indices("positions", TensorType.I32, self._key.n_tokens),
                factors,
                rope.dims,
                mode,
                0,
                rope.base,
                rope.scale,
                0.0,
                1.0,
                32.0,
                1.0,
            )
        )

    def attention(self, q_THC: int, k_TKC: int, v_TKC: int, *, block: int, scale: float, window: int | None) -> int:
        """Flash attention over views of the cache. Storing comes first in the graph, since a view of the cache does not depend on it."""
        library, context, key = self._library, self.context, self._key
        head_dim, n_kv_heads = self._shape.head_dim, self._shape.n_kv_heads
        row = head_dim * n_kv_heads
        element = 2 if self._shape.cache_type == "f16" else 4
        cells = self._indices("cells", I64, key.n_tokens)
        views = []
        for stored, new in zip(self._storage.cache[block], (k_TKC, v_TKC), strict=True):
            library.build_forward_expand(self.graph, library.set_rows(context, stored, library.reshape_2d(context, new, row, key.n_tokens), cells))
            views.append(library.view_3d(context, stored, head_dim, key.n_cells, n_kv_heads, row * element, head_dim * element, 0))
        q_HTC = library.permute(context, q_THC, 0, 2, 1, 3)
        mixed = library.flash_attn_ext(context, q_HTC, views[0], views[1], self._mask(window), scale, 0.0, 0.0)
        library.flash_attn_ext_set_prec(mixed, PRECISION_F32)
        library.build_forward_expand(self.graph, mixed)
        return int(library.reshape_2d(context, mixed, library.nbytes(mixed) // (4 * key.n_tokens), key.n_tokens))

    def output_rows(self, x_TD: int) -> int:
        """The wanted rows; all of them need no gathering."""
        if self._key.n_outputs == self._key.n_tokens == 1:
            return x_TD
        rows = self._indices("rows", TensorType.I32, self._key.n_outputs)
        return int(self._library.get_rows(self.context, x_TD, rows))

    def zeros_like(self, x: int) -> int:
        """Zeros."""
        return int(self._library.scale(self.context, x, 0.0))

    def all_reduce(self, x: int) -> int:
        """End the segment here: between segments the ranks sum ``x`` in place. ggml keeps its memory, since it is used again after the cut."""
        if self._grouped:
            self._library.build_forward_expand(self.graph, x)
            self.cuts.append((self._library.graph_n_nodes(self.graph), x))
        return x

    def _mask(self, window: int | None) -> int:
        if window not in self.masks:
            mask = self._library.new_tensor_2d(self.context, TensorType.F16, self._key.n_cells, self._key.n_tokens)
            self._library.set_input(mask)
            self.masks[window] = mask
        return self.masks[window]

    def _indices(self, name: str, kind: int, length: int) -> int:
        """An input vector, made when it is first asked for: ggml gives no memory to an input that no node reads."""
        if name not in self.inputs:
            self.inputs[name] = self._library.new_tensor_1d(self.context, kind, length)
            self._library.set_input(self.inputs[name])
        return self.inputs[name]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a graph between exchanges. ``exchanged`` is the tensor whose sum the ranks exchange after it, ``view`` its floats if they lie on the host."""

    graph: int
    exchanged: int | None
    view: Floats | None = None


class RecordedGraph:
    """A graph for one batch shape, ready to be filled and computed, segment by segment."""

    def __init__(self, library: Library, recorder: Recorder, output: int) -> None:
        self._library, self._recorder = library, recorder
        library.set_output(output)
        library.build_forward_expand(recorder.graph, output)
        self.output = output
        self.n_output_floats = library.nbytes(output) // 4

    def allocate(self, allocator: int, on_host: bool) -> None:
        """Give every tensor its place; call once, with the allocator that all graphs of the executor share. ``on_host``: that place is the CPU's memory."""
        if not self._library.gallocr_alloc_graph(allocator, self._recorder.graph):
            raise BackendError(f"the device has no room for the compute buffers of {self._recorder.inputs}")
        self.segments = self._cut(on_host)

    def _cut(self, on_host: bool) -> list[Segment]:
        """One graph when nothing is exchanged, else one for each stretch between exchanges, over the same nodes."""
        library, recorder = self._library, self._recorder
        if not recorder.cuts:
            return [Segment(recorder.graph, None)]
        segments: list[Segment] = []
        start = 0
        for stop, exchanged in [*recorder.cuts, (library.graph_n_nodes(recorder.graph), None)]:
            segment = library.new_graph_custom(recorder.context, max(1, stop - start), False)
            for index in range(start, stop):
                library.graph_add_node(segment, library.graph_node(recorder.graph, index))
            view = _host_view(library, exchanged) if on_host and exchanged is not None else None
            segments.append(Segment(segment, exchanged, view))
            start = stop
        return segments

    def fill(self, values: Mapping[str, Array], masks: Mapping[int | None, Array]) -> None:
        """Set the inputs of one step; values that the text never asked for are left out."""
        for name, handle in self._recorder.inputs.items():
            self._set(handle, values[name])
        for window, handle in self._recorder.masks.items():
            self._set(handle, masks[window])

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention windows that need a mask."""
        return tuple(self._recorder.masks)

    def _set(self, handle: int, array: Array) -> None:
        self._library.backend_tensor_set(handle, array.ctypes.data, 0, array.nbytes)

    def result(self) -> Floats:
        """A copy of the output, flat."""
        result = np.empty(self.n_output_floats, dtype=np.float32)
        self._library.backend_tensor_get(self.output, result.ctypes.data, 0, result.nbytes)
        return result

    def close(self) -> None:
        """Free the graph's bookkeeping; its tensors' memory belongs to the allocator."""
        self._library.free(self._recorder.context)


def _host_view(library: Library, handle: int) -> Floats:
    """The floats of a tensor that lies in the CPU's memory, without a copy."""
    n_floats = library.nbytes(handle) // 4
    pointer = ctypes.cast(library.get_data(handle), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, (n_floats,))
