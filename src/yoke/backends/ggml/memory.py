"""Tensors that outlive a graph: weights in the device's best layout, and the key/value cache."""

from collections.abc import Iterable

import numpy as np

from yoke.backends.ggml.library import InitParams, Library
from yoke.core.errors import BackendError
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType

WEIGHTS_USAGE = 1  # ggml-backend.h, GGML_BACKEND_BUFFER_USAGE_WEIGHTS


class Arena:
    """Buffers on one device, each with its tensors, freed together.

    Matrices go into the first of the device's extra buffer types (the CPU's repacked layouts among them) whose kernels take them. Repacked weights cannot be read
    back or viewed in part: they are sliced before they come here.
    """

    def __init__(self, library: Library, device: int) -> None:
        self._library = library
        self._device = device
        self._default = library.backend_dev_buffer_type(device)
        self._extra = _extra_buffer_types(library, device)
        self._choices: dict[tuple[TensorType, tuple[int, ...]], int] = {}
        self._contexts: list[int] = []
        self._buffers: list[int] = []

    def load(self, weights: Iterable[StoredTensor]) -> dict[str, int]:
        """Upload weights one by one; the handles by name."""
        handles = {}
        for tensor in weights:
            data = np.frombuffer(tensor.data, dtype=np.uint8)
            handle = self._place(tensor.info, self._buffer_type(tensor.info))
            self._library.backend_tensor_set(handle, data.ctypes.data, 0, data.nbytes)
            handles[tensor.info.name] = handle
        return handles

    def zeros(self, info: TensorInfo) -> int:
        """A tensor of zeros in plain memory."""
        handle = self._place(info, self._default)
        self._library.backend_buffer_clear(self._buffers[-1], 0)
        return handle

    def close(self) -> None:
        """Free everything."""
        for buffer in self._buffers:
            self._library.backend_buffer_free(buffer)
        for context in self._contexts:
            self._library.free(context)
        self._buffers, self._contexts = [], []

    def _buffer_type(self, info: TensorInfo) -> int:
        if len(info.shape) < 2:
            return int(self._default)
        key = (info.type, info.shape)
        if key not in self._choices:
            self._choices[key] = next((extra for extra in self._extra if self._can_multiply(info, extra)), self._default)
        return self._choices[key]

    def _can_multiply(self, info: TensorInfo, buffer_type: int) -> bool:
        """Ask the device whether a product with a matrix in that buffer type is in its power; the trial memory is reserved but never touched."""
        library = self._library
        context = library.init(InitParams(8 * library.tensor_overhead(), None, True))
        matrix = _new_tensor(library, context, info)
        buffer = library.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        try:
            if not buffer:
                return False
            vector = library.new_tensor_2d(context, TensorType.F32, info.shape[1], 1)
            return bool(library.backend_dev_supports_op(self._device, library.mul_mat(context, matrix, vector)))
        finally:
            if buffer:
                library.backend_buffer_free(buffer)
            library.free(context)

    def _place(self, info: TensorInfo, buffer_type: int) -> int:
        context = self._library.init(InitParams(2 * self._library.tensor_overhead(), None, True))
        self._contexts.append(context)
        handle = _new_tensor(self._library, context, info)
        buffer = self._library.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise BackendError(f"the device has no room for tensor {info.name!r} of {info.n_bytes} bytes")
        self._buffers.append(buffer)
        self._library.backend_buffer_set_usage(buffer, WEIGHTS_USAGE)
        return handle


def _new_tensor(library: Library, context: int, info: TensorInfo) -> int:
    if len(info.shape) > 2:
        raise BackendError(f"tensor {info.name!r} has {len(info.shape)} dims; expected one or two")
    if len(info.shape) == 1:
        return int(library.new_tensor_1d(context, info.type, info.shape[0]))
    return int(library.new_tensor_2d(context, info.type, info.shape[1], info.shape[0]))


def _extra_buffer_types(library: Library, device: int) -> list[int]:
    list_extra = library.cpu_function(device, "ggml_backend_dev_get_extra_bufts")
    found: list[int] = []
    if list_extra is not None:
        types = list_extra(device)
        while types and types[len(found)]:
            found.append(types[len(found)])
    return found
