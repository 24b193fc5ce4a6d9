"""Running a shard with ggml: inputs in, segments computed, sums exchanged between them, result out."""

from collections import OrderedDict
from ctypes import byref

import numpy as np

from yoke.backends.cells import CellTable
from yoke.backends.ggml.graph import Array, GraphKey, RecordedGraph, Recorder, Segment, Storage
from yoke.backends.ggml.library import Library, ThreadpoolParams
from yoke.backends.ggml.memory import Arena
from yoke.backends.ops import Floats, Program, ShardShape, check_hidden, output_row_indices
from yoke.core.errors import BackendError
from yoke.core.frame import Batch
from yoke.core.tensor import TensorInfo, TensorType

KEPT_GRAPHS = 24  # batch shapes repeat: decoding uses one for each count of sessions, prompts one for each chunk size
CELL_MULTIPLE = 256  # attention looks at the cache in steps of this many cells, so that a graph lives for as many tokens
CPU_TYPE = 0  # ggml-backend.h, GGML_BACKEND_DEVICE_TYPE_CPU


class GgmlExecutor:
    """A shard on one ggml device."""

    def __init__(self, library: Library, program: Program, *, device: str, threads: int) -> None:
        self._library, self._program = library, program
        handle = library.backend_dev_by_name(device.encode())
        if not handle:
            names = ", ".join(library.backend_dev_name(library.backend_dev_get(i)).decode() for i in range(library.backend_dev_count()))
            raise BackendError(f"ggml {library.version} offers no device {device!r}; it offers {names}")
        self._closed = False
        self._graphs: OrderedDict[GraphKey, RecordedGraph] = OrderedDict()
        self._arena = Arena(library, handle)
        self._pool: int | None = None
        self._backend = library.backend_dev_init(handle, None)
        if not self._backend:
            raise BackendError(f"device {device!r} failed to start")
        self._start_threads(handle, threads)
        buffer_type = library.backend_dev_buffer_type(handle)
        self._on_host = bool(library.backend_buft_is_host(buffer_type))
        self._allocator = library.gallocr_new(buffer_type)
        self._cells = CellTable(program.shape.n_cells)
        self._storage = Storage(weights=self._arena.load(program.weights), cache=_empty_cache(self._arena, program.shape))

    def compute(self, hidden: Floats, batch: Batch) -> Floats:
        """One step."""
        check_hidden(hidden, batch, self._program.shape.width)
        self._cells.apply(batch)
        rows = output_row_indices(batch)
        key = GraphKey(len(batch.tokens), self._cells.n_used(CELL_MULTIPLE), len(rows))
        graph = self._graph(key)
        masks = {window: _additive_mask(self._cells, batch, key.n_cells, window) for window in graph.windows}
        values: dict[str, Array] = {
            "x": np.ascontiguousarray(hidden),
            "positions": np.asarray(batch.positions, np.int32),
            "cells": np.asarray(batch.cells, np.int64),
            "rows": rows,
        }
        graph.fill(values, masks)
        for segment in graph.segments:
            status = self._library.backend_graph_compute(self._backend, segment.graph)
            if status != 0:
                raise BackendError(f"ggml failed to compute a graph of {key} (status {status})")
            self._exchange(segment)
        return graph.result().reshape(key.n_outputs if self._program.shape.is_last else key.n_tokens, -1)

    def clear(self) -> None:
        """Forget what the cache holds."""
        self._cells.clear()

    def close(self) -> None:
        """Free graphs, weights, cache, threads."""
        if self._closed:
            return
        self._closed = True
        self._drop_graphs()
        self._library.gallocr_free(self._allocator)
        self._arena.close()
        self._library.backend_free(self._backend)
        if self._pool is not None:
            self._free_pool(self._pool)

    def _start_threads(self, device: int, threads: int) -> None:
        """One pool that lives as long as the executor: starting threads for every graph would cost more than some graphs."""
        library = self._library
        new_pool, set_pool = library.cpu_function(device, "ggml_threadpool_new"), library.cpu_function(device, "ggml_backend_cpu_set_threadpool")
        free_pool, set_threads = library.cpu_function(device, "ggml_threadpool_free"), library.cpu_function(device, "ggml_backend_set_n_threads")
        if set_threads is not None:
            set_threads(self._backend, threads)
        if new_pool is not None and set_pool is not None and free_pool is not None:
            params = ThreadpoolParams()
            library.threadpool_params_init(byref(params), threads)
            self._pool, self._free_pool = new_pool(byref(params)), free_pool
            set_pool(self._backend, self._pool)

    def _graph(self, key: GraphKey) -> RecordedGraph:
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        recorder = Recorder(self._library, key, self._program.shape, self._storage, self._program.reducer.size > 1)
        try:
            graph = RecordedGraph(self._library, recorder, self._program.text(recorder, recorder.x))
        except BaseException:
            self._library.free(recorder.context)
            raise
        before = self._library.gallocr_get_buffer_size(self._allocator, 0)
        graph.allocate(self._allocator, self._on_host)
        if self._library.gallocr_get_buffer_size(self._allocator, 0) != before:
            self._drop_graphs()  # the shared buffer moved, so the graphs that lie in it are void
        elif len(self._graphs) >= KEPT_GRAPHS:
            self._graphs.popitem(last=False)[1].close()
        self._graphs[key] = graph
        return graph

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _exchange(self, segment: Segment) -> None:
        """Sum what the segment computed over all ranks, in place."""
        if segment.view is not None:
            self._program.reducer.all_reduce(segment.view)
        elif segment.exchanged is not None:
            values = np.empty(self._library.nbytes(segment.exchanged) // 4, dtype=np.float32)
            self._library.backend_tensor_get(segment.exchanged, values.ctypes.data, 0, values.nbytes)
            self._program.reducer.all_reduce(values)
            self._library.backend_tensor_set(segment.exchanged, values.ctypes.data, 0, values.nbytes)


def _empty_cache(arena: Arena, shape: ShardShape) -> list[tuple[int, int]]:
    if shape.n_kv_heads == 0:
        return []
    type_ = TensorType.F16 if shape.cache_type == "f16" else TensorType.F32
    info = TensorInfo(name="cache", type=type_, shape=(shape.n_cells, shape.n_kv_heads * shape.head_dim))
    return [(arena.zeros(info), arena.zeros(info)) for _ in range(shape.n_blocks)]


def _additive_mask(cells: CellTable, batch: Batch, n_cells: int, window: int | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """0 where a token attends, minus infinity elsewhere: [T, cells], float16."""
    seen = cells.visible(batch, n_cells, window)
    return np.where(seen, np.float16(0), np.float16(-np.inf))
