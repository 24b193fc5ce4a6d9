"""ggml as a backend: its devices, their speed, and shards loaded on them."""

import statistics
import time
from collections.abc import Iterable

import numpy as np
import psutil

from yoke.backends.ggml.executor import CPU_TYPE, GgmlExecutor
from yoke.backends.ggml.library import Library, load_library
from yoke.backends.ops import Floats, Ops, Program, ShardShape, SoloReducer, TensorT
from yoke.core.errors import BackendError
from yoke.core.frame import Batch
from yoke.core.node import Device
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType

# Larger than the caches of today's desktop chips (32 MiB here), so that weights come from memory as they do when a model runs.
_PROBE = TensorInfo(name="probe", type=TensorType.Q4_0, shape=(4096, 4096))
_PROBE_MATRICES = 8
_PROBE_RUNS = 5


class GgmlBackend:
    """Every device of the ggml build in ``directory`` (empty: the one that llama-cpp-python installed).

    Raises
    ------
    BackendError
        if the library is missing, foreign or too old.
    """

    name = "ggml"

    def __init__(self, directory: str = "", threads: int = 0) -> None:
        self._library = load_library(directory)
        self._threads = threads or physical_cores()

    @property
    def version(self) -> str:
        """The library's own version."""
        return self._library.version

    def devices(self) -> tuple[Device, ...]:
        """Each device under its own name, with its measured matrix-vector speed. About half a second a device."""
        handles = [self._library.backend_dev_get(index) for index in range(self._library.backend_dev_count())]
        return tuple(self._describe(handle) for handle in handles)

    def dequantize(self, tensor: StoredTensor) -> Floats:
        """Values by ggml's own conversion: one call, where the gguf package takes a dozen numpy operations for a row."""
        values: Floats = np.empty(tensor.info.shape, dtype=np.float32)
        data = np.frombuffer(tensor.data, dtype=np.uint8)
        if tensor.info.type is TensorType.F32:
            return data.view(np.float32).reshape(tensor.info.shape)
        traits = self._library.get_type_traits(tensor.info.type).contents
        if not traits.to_float or (traits.blck_size, traits.type_size) != (tensor.info.type.block, tensor.info.type.block_bytes):
            raise BackendError(f"ggml {self.version} cannot read values of type {tensor.info.type.name}")
        traits.to_float(data.ctypes.data, values.ctypes.data, values.size)
        return values

    def open(self, program: Program, *, device: str, threads: int) -> GgmlExecutor:
        """Load a shard on a device."""
        return GgmlExecutor(self._library, program, device=device, threads=threads or self._threads)

    def _describe(self, handle: int) -> Device:
        name = self._library.backend_dev_name(handle).decode()
        on_cpu = self._library.backend_dev_type(handle) == CPU_TYPE
        return Device(
            name=name,
            description=self._library.backend_dev_description(handle).decode(),
            backend=self.name,
            free_bytes=psutil.virtual_memory().available if on_cpu else self._library.memory(handle),
            matvec_bytes_per_s=_measure_matvec(self._library, name, self._threads),
            threads=self._threads if on_cpu else 1,
        )


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted twice."""
    cores = psutil.cpu_count(logical=False) or 1
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else cores
    return max(1, min(cores, allowed))


def _measure_matvec(library: Library, device: str, threads: int) -> float:
    """Bytes of weights a second, from a chain of Q4_0 matrix-vector products: median of a few runs."""
    shape = ShardShape(width=_PROBE.shape[1], n_blocks=1, n_kv_heads=0, head_dim=1, n_cells=1, is_last=True)
    program = Program(text=_ProbeText(), shape=shape, weights=_probe_weights(), reducer=SoloReducer())
    executor = GgmlExecutor(library, program, device=device, threads=threads)
    try:
        hidden: Floats = np.full((1, shape.width), 0.01, dtype=np.float32)
        batch = Batch(tokens=(0,), slots=(0,), positions=(0,), cells=(0,))
        executor.compute(hidden, batch)
        seconds = []
        for _ in range(_PROBE_RUNS):
            start = time.perf_counter()
            executor.compute(hidden, batch)
            seconds.append(time.perf_counter() - start)
        return _PROBE_MATRICES * _PROBE.n_bytes / statistics.median(seconds)
    finally:
        executor.close()


def _probe_weights() -> Iterable[StoredTensor]:
    block = np.zeros(TensorType.Q4_0.block_bytes, dtype=np.uint8)
    block[:2] = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    block[2:] = 0x79
    data = np.tile(block, _PROBE.n_bytes // block.size).data
    for index in range(_PROBE_MATRICES):
        yield StoredTensor(info=TensorInfo(name=f"probe.{index}", type=_PROBE.type, shape=_PROBE.shape), data=data)


class _ProbeText:
    def __call__(self, ops: Ops[TensorT], x_TD: TensorT, /) -> TensorT:
        for index in range(_PROBE_MATRICES):
            x_TD = ops.linear(x_TD, ops.weight(f"probe.{index}"))
        return x_TD
