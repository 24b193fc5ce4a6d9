"""How a matrix lies in a file: quantisation types by their ggml numbers, and a stored tensor with its raw bytes.

Shapes are written rows first, as numpy does: a matrix that maps I inputs to O outputs is ``(O, I)``, and a row of I elements is contiguous.
"""

from dataclasses import dataclass
from enum import IntEnum
from math import prod

from yoke.core.errors import ModelError


class TensorType(IntEnum):
    """The element types that a GGUF file may hold, by ggml's number (ggml.h, ``enum ggml_type``)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    I32 = 26
    BF16 = 30

    @property
    def block(self) -> int:
        """Elements in one quantisation block; 1 for plain numbers."""
        return _LAYOUT[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes that one quantisation block takes."""
        return _LAYOUT[self][1]

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` elements.

        Raises
        ------
        ModelError
            if the row is not a whole number of quantisation blocks.
        """
        if columns % self.block:
            raise ModelError(f"a row of {columns} elements is not a whole number of {self.name} blocks of {self.block}")
        return columns // self.block * self.block_bytes


# (elements, bytes) of a block: ggml-common.h, the static asserts behind each block_* struct.
_LAYOUT: dict[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I32: (1, 4),
    TensorType.BF16: (1, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor's name, type and shape (rows first)."""

    name: str
    type: TensorType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 4 or min(self.shape) < 1:
            raise ModelError(f"tensor {self.name!r} has shape {self.shape}; expected 1 to 4 positive numbers")
        self.type.row_bytes(self.shape[-1])

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor, or a slice of one, with its bytes in file order."""

    info: TensorInfo
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        n_bytes = memoryview(self.data).nbytes
        if n_bytes != self.info.n_bytes:
            raise ModelError(f"tensor {self.info.name!r} of {self.info.type.name} {self.info.shape} takes {self.info.n_bytes} bytes, but {n_bytes} are there")
