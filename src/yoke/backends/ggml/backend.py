"""ggml as a backend: its devices, their speed, and shards loaded on them."""

from collections.abc import Sequence

import numpy as np
import psutil

from yoke.backends.ggml.executor import CPU_TYPE, GgmlExecutor
from yoke.backends.ggml.library import load_library
from yoke.backends.ggml.measuring import features, measure_attention, measure_weights
from yoke.backends.ops import ATTENTION, Chip, Floats, Program, measured_device
from yoke.core.errors import BackendError
from yoke.core.node import Device, Rate
from yoke.core.tensor import StoredTensor, TensorType


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

    @property
    def features(self) -> frozenset[str]:
        """What ggml's code for this machine's processor makes use of: ``AVX2``, ``NEON``, ``REPACK``, ...; empty where it does not tell."""
        return next((features(self._library, handle) for handle in self._handles() if self._is_host(handle)), frozenset())

    def chips(self) -> tuple[Chip, ...]:
        """Each device under its own name."""
        return tuple(self._chip(handle) for handle in self._handles())

    def measure(self, device: str, weight_type: str, thread_counts: Sequence[int], budget_s: float) -> tuple[Rate, ...]:
        """Blocks of a decoder, computed as a shard's are. The first number of threads takes about half a second."""
        handle = self._library.backend_dev_by_name(device.encode())
        known = TensorType.__members__
        if not handle or weight_type not in {*known, ATTENTION} or not thread_counts or min(thread_counts) < 1:
            names = ", ".join(chip.name for chip in self.chips())
            raise BackendError(
                f"cannot measure {weight_type!r} on device {device!r} with {list(thread_counts)} threads; "
                f"expected one of {names}, one of {ATTENTION}, {', '.join(known)}, and at least one number from 1 up"
            )
        if weight_type == ATTENTION:
            return measure_attention(self._library, handle, thread_counts, budget_s)
        return measure_weights(self._library, handle, known[weight_type], thread_counts, budget_s)

    def devices(self) -> tuple[Device, ...]:
        """Each device that can run a decoder, under its own name, with its speed in Q4_0. About half a second a device."""
        measured = ((chip, self.measure(chip.name, "Q4_0", (chip.threads,), 0.0)) for chip in self.chips())
        return tuple(measured_device(chip, self.name, rates) for chip, rates in measured if rates)

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

    def _handles(self) -> list[int]:
        return [self._library.backend_dev_get(index) for index in range(self._library.backend_dev_count())]

    def _is_host(self, handle: int) -> bool:
        return bool(self._library.backend_dev_type(handle) == CPU_TYPE)

    def _chip(self, handle: int) -> Chip:
        is_host = self._is_host(handle)
        return Chip(
            name=self._library.backend_dev_name(handle).decode(),
            description=self._library.backend_dev_description(handle).decode(),
            free_bytes=psutil.virtual_memory().available if is_host else self._library.memory(handle),
            threads=self._threads if is_host else 1,
            is_host=is_host,
        )


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted twice."""
    cores = psutil.cpu_count(logical=False) or 1
    process = psutil.Process()
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else cores
    return max(1, min(cores, allowed))
