"""A GGUF file, mapped into memory: metadata, tensor infos, and slices of tensors in whatever quantisation they are stored.

Knows bytes and shapes; not what a model is. Why not the gguf package's reader: docs/decisions/0002-own-gguf-reader.md.
"""

import hashlib
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from yoke.core.errors import ModelError
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType
from yoke.weights.gguf_header import ArrayInfo, Header, MetadataValue, Scalar, decode_array, decode_strings, read_header

__all__ = ["ArrayInfo", "GgufFile", "MetadataValue", "Scalar"]

Range = tuple[int, int]

# Smallest GGUF: magic, version and two counts. An empty file cannot be mapped at all.
_LEAST_FILE_BYTES = 24


class GgufFile:
    """A GGUF file of version 2 or 3, little-endian, read-only and memory-mapped. Build it with :meth:`open`; use it as a context manager or call :meth:`close`.

    ``metadata`` holds scalars, strings, short lists, and :class:`ArrayInfo` for long arrays (see :meth:`array`). ``tensors`` maps names to infos whose shapes
    are rows first. Reading is thread-safe; closing is not.
    """

    def __init__(self, path: Path, mapped: tuple[int, mmap.mmap], header: Header) -> None:
        self.path = path
        self._descriptor, mapping = mapped
        self._reading = threading.Lock()
        self.metadata: Mapping[str, MetadataValue] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(header.tensors)
        self.version = header.version
        self.n_bytes = len(mapping)
        self._mapping = mapping
        self._header = header
        self._view = memoryview(mapping)
        self._digest: str | None = None

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map the file and read its header.

        Raises
        ------
        ModelError
            if the file cannot be opened, is no GGUF, is cut short or damaged, is one part of a split model, or holds a tensor type that Yoke does not know.
        """
        path = Path(path)
        descriptor, mapping = _map(path)
        view = memoryview(mapping)
        try:
            header = read_header(view, str(path))
            n_parts = header.metadata.get("split.count", 1)
            if isinstance(n_parts, int) and n_parts > 1:
                raise ModelError(f"{path}: is one of {n_parts} parts of a model; join them first with `llama-gguf-split --merge`")
        except BaseException:
            view.release()
            mapping.close()
            os.close(descriptor)
            raise
        view.release()
        return cls(path, (descriptor, mapping), header)

    def close(self) -> None:
        """Unmap the file. Views that :meth:`read` gave out stay valid: then the file stays mapped until the last of them is gone."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        try:
            self._view.release()
            self._mapping.close()
        except BufferError:
            # A view is still in use; dropping our references leaves the unmapping to the last one.
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}: {len(self.tensors)} tensors, {self.n_bytes} bytes)"

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the header (metadata and tensor infos) and the file's size: by it nodes agree that they mean the same model.

        The weights themselves are not read, so two models that differ in nothing else have one digest.
        """
        if self._digest is None:
            self._digest = header_digest(self.header).hex()
        return self._digest

    @property
    def header(self) -> bytes:
        """The file's size, 8 bytes, and its header as it stands there: by `header_digest` of it, whoever knows the digest knows that it is the right one."""
        return self.n_bytes.to_bytes(8, "little") + bytes(self._view[: self._header.n_bytes])

    def array(self, key: str) -> list[Scalar]:
        """A metadata array as a list, however long. Costs about 1 µs a string; nothing is kept.

        Raises
        ------
        ModelError
            if there is no such key, or its value is no array.
        """
        value = self.metadata.get(key)
        if isinstance(value, list):
            return value
        if isinstance(value, ArrayInfo):
            return decode_array(self._view, value, str(self.path))
        raise self._error(f"metadata {key!r} is {value!r}; expected an array")

    def raw_strings(self, key: str) -> list[bytes]:
        """A metadata array of strings, as the bytes that the file holds.

        Raises
        ------
        ModelError
            if there is no such key, or its value is no array of strings.
        """
        value = self.metadata.get(key)
        if isinstance(value, ArrayInfo) and value.element == "string":
            return decode_strings(self._view, value, str(self.path))
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [str(item).encode() for item in value]
        raise self._error(f"metadata {key!r} is no array of strings")

    def read(self, name: str, rows: Range | None = None, columns: Range | None = None) -> StoredTensor:
        """A tensor or a slice of it, in its stored quantisation.

        Parameters
        ----------
        name : of the tensor.
        rows : half-open range along the first dim (of experts, if the tensor has three).
        columns : half-open range along the last dim, in whole quantisation blocks. A tensor of one dim takes ``rows`` or ``columns``, which mean the same.

        Returns
        -------
        The slice. Without ``columns`` its data is a view into the mapped file, not a copy; with them it is a copy of those bytes alone.

        Raises
        ------
        ModelError
            if there is no such tensor, a range is empty or out of bounds, or ``columns`` cut a quantisation block.
        """
        info = self._info(name)
        if len(info.shape) == 1:
            if rows is not None and columns is not None:
                raise self._error(f"tensor {name!r} has one dim; give rows or columns, not both")
            return self._read_vector(info, rows or columns)
        start, stop = self._check(info, "rows", rows, info.shape[0])
        first, last = self._check(info, "columns", columns, info.shape[-1])
        data = self._bytes(info)
        stride = info.n_bytes // info.shape[0]
        view = data[start * stride : stop * stride]
        shape = (stop - start, *info.shape[1:-1], last - first)
        part = TensorInfo(name=name, type=info.type, shape=shape)
        if columns is None:
            return StoredTensor(info=part, data=view)
        row_bytes = info.type.row_bytes(info.shape[-1])
        block_rows = np.frombuffer(view, dtype=np.uint8).reshape(-1, row_bytes)
        copied = np.ascontiguousarray(block_rows[:, info.type.row_bytes(first) : info.type.row_bytes(last)])
        return StoredTensor(info=part, data=copied.reshape(-1).data)

    def _read_vector(self, info: TensorInfo, span: Range | None) -> StoredTensor:
        start, stop = self._check(info, "columns", span, info.shape[0])
        part = TensorInfo(name=info.name, type=info.type, shape=(stop - start,))
        return StoredTensor(info=part, data=self._bytes(info)[info.type.row_bytes(start) : info.type.row_bytes(stop)])

    def release(self, name: str) -> None:
        """Tell the system that the tensor's pages are not needed in memory for now, where it can be told (``madvise``). Reading them again still works.

        Raises
        ------
        ModelError
            if there is no such tensor.
        """
        self._advise(name, "MADV_DONTNEED")

    def _advise(self, name: str, advice: str) -> None:
        info = self._info(name)
        if hasattr(self._mapping, "madvise") and hasattr(mmap, advice):
            start = self._header.offsets[name] // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(getattr(mmap, advice), start, self._header.offsets[name] + info.n_bytes - start)

    def dequantized_rows(self, name: str, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows of a matrix as float32: the embedding lookup.

        Parameters
        ----------
        name : of a tensor with two dims.
        ids : row numbers, in any order, with repetitions.

        Returns
        -------
        float32 array [len(ids), columns], a copy. One row of 2048 columns of Q4_0 takes about 40 µs.

        Raises
        ------
        ModelError
            if there is no such matrix, an id is out of bounds, or the type cannot be dequantised.
        """
        if not ids:
            return np.empty((0, self._info(name).shape[-1]), dtype=np.float32)
        rows = self.stored_rows(name, ids)
        return dequantize(rows.info.type, np.frombuffer(rows.data, dtype=np.uint8).reshape(len(ids), -1))

    def stored_rows(self, name: str, ids: Sequence[int]) -> StoredTensor:
        """Rows of a matrix as they are stored, in any order, with repetitions, at least one.

        They are read past the mapping, which would bring 64 kB around each of them into memory, and take longer.

        Raises
        ------
        ModelError
            if there is no such matrix, or an id is out of bounds.
        """
        info = self._info(name)
        if len(info.shape) != 2:
            raise self._error(f"tensor {name!r} has shape {info.shape}; expected a matrix")
        if any(not 0 <= i < info.shape[0] for i in ids):
            raise self._error(f"rows {min(ids)}..{max(ids)} of tensor {name!r} are wanted; it has {info.shape[0]}")
        start, row_bytes = self._header.offsets[name], info.type.row_bytes(info.shape[1])
        rows = []
        with self._reading:
            for row in ids:
                os.lseek(self._descriptor, start + row * row_bytes, os.SEEK_SET)
                rows.append(os.read(self._descriptor, row_bytes))
        part = TensorInfo(name=name, type=info.type, shape=(len(rows), info.shape[1]))
        return StoredTensor(info=part, data=b"".join(rows))

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise self._error(f"has no tensor {name!r}; the file may be incomplete or of another architecture")
        return info

    def _bytes(self, info: TensorInfo) -> memoryview:
        start = self._header.offsets[info.name]
        return self._view[start : start + info.n_bytes]

    def _check(self, info: TensorInfo, axis: str, span: Range | None, size: int) -> Range:
        start, stop = (0, size) if span is None else span
        if not 0 <= start < stop <= size:
            raise self._error(f"{axis} {start}..{stop} of tensor {info.name!r} are wanted; expected a range within 0..{size} that is not empty")
        if axis == "columns" and (start % info.type.block or stop % info.type.block):
            raise self._error(f"columns {start}..{stop} of tensor {info.name!r} cut a {info.type.name} block; expected multiples of {info.type.block}")
        return start, stop

    def _error(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {message}")


def header_digest(header: bytes) -> bytes:
    """SHA-256 of what `GgufFile.header` gives: the header, then the file's size."""
    return hashlib.sha256(header[8:] + header[:8]).digest()


def dequantize(tensor_type: TensorType, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Stored bytes as float32.

    Parameters
    ----------
    tensor_type : how the bytes are to be read.
    data : uint8 array whose last dim is whole quantisation blocks.

    Returns
    -------
    float32 array of the same leading dims.

    Raises
    ------
    ModelError
        if the type cannot be dequantised.
    """
    data = np.ascontiguousarray(data)
    match tensor_type:
        case TensorType.F32:
            return data.view("<f4").astype(np.float32, copy=False)
        case TensorType.F16:
            return data.view("<f2").astype(np.float32)
        case TensorType.BF16:
            # bfloat16 is the upper half of a float32.
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        case TensorType.I32:
            raise ModelError("a tensor of integers (I32) cannot be dequantised")
    # Imported here: a worker that only maps its shard does without the package.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    rows: npt.NDArray[np.float32] = dequantize_blocks(data, GGMLQuantizationType(tensor_type.value))
    return rows


def _map(path: Path) -> tuple[int, mmap.mmap]:
    """A descriptor of the file, and the whole of it mapped."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            n_bytes = os.fstat(descriptor).st_size
            if n_bytes < _LEAST_FILE_BYTES:
                raise ModelError(f"{path}: has {n_bytes} bytes; a GGUF file has at least {_LEAST_FILE_BYTES}. Download it again")
            return descriptor, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be opened: {error}; expected a GGUF file") from error
