"""How fast a device decodes and reads prompts with weights of one type, and attends: blocks of a decoder, recorded and computed as a shard's are.

Knows one shape of block, that of Llama 3.2 1B. Knows no models, files or other machines. Legend of shapes as in ``backends.ops``.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yoke.backends.ggml.graph import GraphKey, RecordedGraph, Recorder, Storage
from yoke.backends.ggml.library import Library, ThreadpoolParams
from yoke.backends.ggml.memory import Arena
from yoke.backends.ops import ATTENTION, Ops, ShardShape, TensorT
from yoke.core.errors import BackendError
from yoke.core.node import Rate
from yoke.core.spec import Rope, RopeStyle
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType

WIDTH, KV_WIDTH, HEAD_DIM, COLUMNS = 2048, 512, 64, 8192
"""What surrounds the products (norms, rotation, gates) takes about 5 % of a step of this width, and less of a wider model's: a rate includes it."""

LEAST_BYTES = 128_000_000
"""More than the caches of most chips, so that weights come from memory as they do when a model runs."""

MOST_BYTES = 512_000_000
N_CELLS, N_SEEN = 256, 32
"""Weights are measured in a short session, of so many tokens: what a long one costs is said by attention's own rate."""

ATTENTION_BLOCKS, ATTENTION_CELLS = 16, 1024
ATTENTION_ROWS, ATTENTION_ROW_BLOCKS = 64, 4
"""Attention is measured over a cache of 33 MB by one row, and over a part of it by many."""

BURSTS, RUNS = 3, 5
"""A rate is that of the best burst's median run: what others compute meanwhile falls into one burst rather than into all (they are spread over the time)."""

FIRST_ROWS, MOST_ROWS = 32, 256
PROMPT_S = 0.1
"""A product of many rows is given as many (whole `FIRST_ROWS`) as it computes in this time, at most `MOST_ROWS`: those of a prompt's step."""

_ROPE = Rope(style=RopeStyle.HALVES, dims=HEAD_DIM)
_MATRICES = {
    "q": (WIDTH, WIDTH),
    "k": (KV_WIDTH, WIDTH),
    "v": (KV_WIDTH, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate": (COLUMNS, WIDTH),
    "up": (COLUMNS, WIDTH),
    "down": (WIDTH, COLUMNS),
}
_BLOCK_ELEMENTS = sum(rows * columns for rows, columns in _MATRICES.values())
# Random weights: equal ones stream up to a sixth faster than a model's (measured). With these bits of every byte fixed, no scale or number of any type is infinite,
# or so small that the chip takes its slow way; signs stay random, so that sums stay small.
_KEPT_BITS, _SET_BITS = 0x9F, 0x20


class _Feature(ctypes.Structure):
    """``struct ggml_backend_feature`` (ggml-backend.h)."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


def features(library: Library, device: int) -> frozenset[str]:
    """What the library's code for that device makes use of, in ggml's names: ``AVX2``, ``NEON``, ``REPACK``, ... Empty where it does not tell."""
    registry = library.backend_dev_backend_reg(device)
    address = library.backend_reg_get_proc_address(registry, b"ggml_backend_get_features")
    if not address:
        return frozenset()
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registry)
    found: set[str] = set()
    index = 0
    while listed[index].name:
        if listed[index].value == b"1":
            found.add(listed[index].name.decode(errors="replace"))
        index += 1
    return frozenset(found)


def measure_weights(library: Library, device: int, weight_type: TensorType, thread_counts: Sequence[int], budget_s: float) -> tuple[Rate, ...]:
    """Rates of one device for weights of one type, none if it lacks an operation; see `yoke.backends.ops.Backend.measure`.

    Raises
    ------
    BackendError
        if the device has no room, or fails.
    """
    block_bytes = sum(_info(name, weight_type).n_bytes for name in _MATRICES)
    n_blocks = -(-min(MOST_BYTES, max(LEAST_BYTES, 2 * _cache_bytes())) // block_bytes)
    stop = time.perf_counter() + budget_s
    probe = Probe(library, device, _Blocks(n_blocks), _shape(n_blocks, N_CELLS), probe_weights(n_blocks, weight_type))
    best: dict[int, tuple[float, float]] = {}
    rows = dict.fromkeys(thread_counts, FIRST_ROWS)
    try:
        if not (probe.can_compute(1) and probe.can_compute(FIRST_ROWS)):
            return ()
        for threads in turns(thread_counts, stop, time.perf_counter):
            probe.use_threads(threads)
            if threads not in best:
                probe.run(FIRST_ROWS, FIRST_ROWS)
            row_s = probe.run(rows[threads], rows[threads]) / rows[threads]
            rows[threads] = max(1, min(MOST_ROWS, int(PROMPT_S / row_s)) // FIRST_ROWS) * FIRST_ROWS
            _keep_best(best, threads, (probe.median_s(N_SEEN, stop), row_s))
    finally:
        probe.close()
    return tuple(
        Rate(
            weight_type=weight_type.name,
            threads=threads,
            matvec_bytes_per_s=n_blocks * block_bytes / best[threads][0],
            matmul_flop_per_s=2 * _BLOCK_ELEMENTS / best[threads][1],
        )
        for threads in thread_counts
        if threads in best
    )


def measure_attention(library: Library, device: int, thread_counts: Sequence[int], budget_s: float) -> tuple[Rate, ...]:
    """Rates of attention over a cache in F16, named `yoke.backends.ops.ATTENTION`; else as `measure_weights`.

    Raises
    ------
    BackendError
        if the device has no room, or fails.
    """
    stop = time.perf_counter() + budget_s
    probe = Probe(library, device, _Attention(), _shape(ATTENTION_BLOCKS, ATTENTION_CELLS), probe_weights(1, TensorType.F16, ("k",)))
    per_cell = 4 * WIDTH  # two bytes a number, or two operations, for each query head's keys and for its values
    row_cells = sum(range(ATTENTION_CELLS - ATTENTION_ROWS + 1, ATTENTION_CELLS + 1))
    best: dict[int, tuple[float, float]] = {}
    try:
        if not (probe.can_compute(1) and probe.can_compute(ATTENTION_ROWS)):
            return ()
        for threads in turns(thread_counts, stop, time.perf_counter):
            probe.use_threads(threads)
            if threads not in best:
                probe.run(ATTENTION_ROWS, ATTENTION_CELLS)
            rows_s = probe.run(ATTENTION_ROWS, ATTENTION_CELLS)
            _keep_best(best, threads, (probe.median_s(ATTENTION_CELLS, stop), rows_s))
    finally:
        probe.close()
    return tuple(
        Rate(
            weight_type=ATTENTION,
            threads=threads,
            matvec_bytes_per_s=ATTENTION_BLOCKS * ATTENTION_CELLS * per_cell / best[threads][0],
            matmul_flop_per_s=ATTENTION_ROW_BLOCKS * row_cells * per_cell / best[threads][1],
        )
        for threads in thread_counts
        if threads in best
    )


def turns(thread_counts: Sequence[int], stop: float, now: Callable[[], float]) -> Iterator[int]:
    """Every number of threads, `BURSTS` times over; from ``stop`` (on the clock that ``now`` reads) on only the first one, once."""
    for burst in range(BURSTS):
        for threads in thread_counts:
            if now() < stop or (burst == 0 and threads == thread_counts[0]):
                yield threads


def _keep_best(best: dict[int, tuple[float, float]], threads: int, seconds: tuple[float, float]) -> None:
    before = best.get(threads, seconds)
    best[threads] = (min(before[0], seconds[0]), min(before[1], seconds[1]))


class _Blocks:
    """The text that is measured: what `yoke.models.decoder` says of blocks of Llama."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks

    def __call__(self, ops: Ops[TensorT], x_TD: TensorT, n_tokens: int) -> TensorT:
        """One token goes through all blocks, more than one through the first."""
        norm = ops.weight("norm")
        for block in range(self._n_blocks if n_tokens == 1 else 1):
            h_TD = ops.rms_norm(x_TD, norm, 1e-5)
            q, k, v = (ops.linear(h_TD, ops.weight(f"{name}.{block}")) for name in "qkv")
            q_THC = ops.rope(ops.heads(q, WIDTH // HEAD_DIM), _ROPE, None)
            k_TKC = ops.rope(ops.heads(k, KV_WIDTH // HEAD_DIM), _ROPE, None)
            v_TKC = ops.heads(v, KV_WIDTH // HEAD_DIM)
            mixed = ops.attention(q_THC, k_TKC, v_TKC, block=block, scale=HEAD_DIM**-0.5, window=None)
            x_TD = ops.add(x_TD, ops.linear(mixed, ops.weight(f"o.{block}")))
            h_TD = ops.rms_norm(x_TD, norm, 1e-5)
            gated = ops.swiglu(ops.linear(h_TD, ops.weight(f"gate.{block}")), ops.linear(h_TD, ops.weight(f"up.{block}")))
            x_TD = ops.add(x_TD, ops.linear(gated, ops.weight(f"down.{block}")))
        return x_TD


class _Attention:
    """Attention, and as little else as it can do with."""

    def __call__(self, ops: Ops[TensorT], x_TD: TensorT, n_tokens: int) -> TensorT:
        """One token attends in all blocks, more than one in the first few."""
        k_TKC = ops.heads(ops.linear(x_TD, ops.weight("k.0")), KV_WIDTH // HEAD_DIM)
        for block in range(ATTENTION_BLOCKS if n_tokens == 1 else ATTENTION_ROW_BLOCKS):
            mixed = ops.attention(ops.heads(x_TD, WIDTH // HEAD_DIM), k_TKC, k_TKC, block=block, scale=HEAD_DIM**-0.5, window=None)
            x_TD = ops.add(x_TD, mixed)
        return x_TD


class Probe:
    """A text on one device, computed with any number of threads.

    Raises
    ------
    BackendError
        if the device has no room, or does not start.
    """

    def __init__(self, library: Library, device: int, text: "_Blocks | _Attention", shape: ShardShape, weights: Iterable[StoredTensor]) -> None:
        self._library, self._device, self._text, self._shape = library, device, text, shape
        self._graphs: dict[int, _Recorded] = {}
        self._pool: int | None = None
        self._backend = library.backend_dev_init(device, None)
        if not self._backend:
            raise BackendError(f"device {library.backend_dev_name(device).decode()!r} failed to start")
        self._arena = Arena(library, device)
        try:
            cache = [(self._cells(), self._cells()) for _ in range(shape.n_blocks)]
            self._storage = Storage(weights=self._arena.load(weights), cache=cache)
        except BaseException:
            self.close()
            raise

    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from now on, where the device is one that takes a number."""
        library, device = self._library, self._device
        set_threads = library.cpu_function(device, "ggml_backend_set_n_threads")
        new_pool, set_pool = library.cpu_function(device, "ggml_threadpool_new"), library.cpu_function(device, "ggml_backend_cpu_set_threadpool")
        if set_threads is not None:
            set_threads(self._backend, threads)
        if new_pool is not None and set_pool is not None:
            params = ThreadpoolParams()
            library.threadpool_params_init(byref(params), threads)
            pool = new_pool(byref(params))
            set_pool(self._backend, pool)
            self._free_pool()
            self._pool = pool

    def can_compute(self, n_tokens: int) -> bool:
        """Whether the device has every operation of a step of so many tokens: some, such as BLAS, only multiply."""
        return all(self._library.backend_dev_supports_op(self._device, node) for node in self._graph(n_tokens).nodes)

    def run(self, n_tokens: int, n_seen: int) -> float:
        """Seconds for one step of so many tokens, the last of which sees ``n_seen`` cells, and each other one less than the next."""
        graph = self._graph(n_tokens).graph
        tokens = np.arange(n_tokens, dtype=np.int64)
        hidden = np.full((n_tokens, WIDTH), 0.01, dtype=np.float32)
        last_seen = n_seen - n_tokens + tokens[:, None]
        seen = np.where(np.arange(self._shape.n_cells) <= last_seen, np.float16(0), np.float16(-np.inf))
        started = time.perf_counter()
        graph.fill({"x": hidden, "positions": tokens.astype(np.int32), "cells": tokens}, {None: seen})
        for segment in graph.segments:
            if (status := self._library.backend_graph_compute(self._backend, segment.graph)) != 0:
                raise BackendError(f"ggml failed to compute {n_tokens} rows for measuring (status {status})")
        graph.result()
        return time.perf_counter() - started

    def median_s(self, n_seen: int, stop: float) -> float:
        """Seconds for a step of one token: the median of `RUNS`, or of fewer from ``stop`` on, after one to wake the threads."""
        self.run(1, n_seen)
        seconds = [self.run(1, n_seen)]
        while len(seconds) < RUNS and time.perf_counter() < stop:
            seconds.append(self.run(1, n_seen))
        return statistics.median(seconds)

    def close(self) -> None:
        """Free everything. Harmless when called twice."""
        for recorded in self._graphs.values():
            recorded.graph.close()
            self._library.gallocr_free(recorded.allocator)
        self._graphs.clear()
        self._arena.close()
        if self._backend:
            self._library.backend_free(self._backend)
            self._backend = None
            self._free_pool()

    def _cells(self) -> int:
        """Keys or values of one block, with something in them."""
        info = TensorInfo(name="cache", type=TensorType.F16, shape=(self._shape.n_cells, KV_WIDTH))
        handle = self._arena.zeros(info)
        values = np.random.default_rng(0).standard_normal(info.shape, dtype=np.float32).astype(np.float16)
        self._library.backend_tensor_set(handle, values.ctypes.data, 0, values.nbytes)
        return handle

    def _free_pool(self) -> None:
        free_pool = self._library.cpu_function(self._device, "ggml_threadpool_free")
        if self._pool is not None and free_pool is not None:
            free_pool(self._pool)
        self._pool = None

    def _graph(self, n_tokens: int) -> "_Recorded":
        if n_tokens not in self._graphs:
            self._graphs[n_tokens] = self._record(n_tokens)
        return self._graphs[n_tokens]

    def _record(self, n_tokens: int) -> "_Recorded":
        library = self._library
        recorder = Recorder(library, GraphKey(n_tokens, self._shape.n_cells, n_tokens), self._shape, self._storage, grouped=False)
        graph = RecordedGraph(library, recorder, self._text(recorder, recorder.x, n_tokens))
        nodes = tuple(library.graph_node(recorder.graph, index) for index in range(library.graph_n_nodes(recorder.graph)))
        buffer_type = library.backend_dev_buffer_type(self._device)
        recorded = _Recorded(graph, library.gallocr_new(buffer_type), nodes)
        try:
            graph.allocate(recorded.allocator, bool(library.backend_buft_is_host(buffer_type)))
        except BaseException:
            graph.close()
            library.gallocr_free(recorded.allocator)
            raise
        return recorded


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph with memory of its own, so that no other graph moves it, and its nodes."""

    graph: RecordedGraph
    allocator: int
    nodes: tuple[int, ...]


def _shape(n_blocks: int, n_cells: int) -> ShardShape:
    return ShardShape(width=WIDTH, n_blocks=n_blocks, n_kv_heads=KV_WIDTH // HEAD_DIM, head_dim=HEAD_DIM, n_cells=n_cells, is_last=False)


def probe_weights(n_blocks: int, weight_type: TensorType, matrices: Iterable[str] = tuple(_MATRICES)) -> Iterable[StoredTensor]:
    """Random weights for so many blocks."""
    norm = np.full(WIDTH, 1e-3, dtype=np.float32)  # keeps what comes of such weights within the float16 of the cache
    yield StoredTensor(info=TensorInfo(name="norm", type=TensorType.F32, shape=(WIDTH,)), data=norm.tobytes())
    infos = {matrix: _info(matrix, weight_type) for matrix in matrices}
    noise = np.frombuffer(np.random.default_rng(0).bytes(max(info.n_bytes for info in infos.values())), dtype=np.uint8)
    filling = ((noise & _KEPT_BITS) | _SET_BITS).data
    for matrix, info in infos.items():
        data = filling[: info.n_bytes]
        for block in range(n_blocks):
            yield StoredTensor(info=TensorInfo(name=f"{matrix}.{block}", type=info.type, shape=info.shape), data=data)


def _info(matrix: str, weight_type: TensorType) -> TensorInfo:
    return TensorInfo(name=matrix, type=weight_type, shape=_MATRICES[matrix])


def _cache_bytes() -> int:
    """The largest cache of the first core, where the system tells; 0 elsewhere."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) * 1024)
    return largest
