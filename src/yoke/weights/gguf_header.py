"""A GGUF file's header: metadata and tensor infos, every length and count bounded by the file before anything is allocated.

Knows bytes only: no mapping, no file handle. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import struct
from dataclasses import dataclass
from typing import Final

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorInfo, TensorType

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
# ggml.h, GGML_MAX_NAME: longer names do not load in llama.cpp either.
MAX_TENSOR_NAME_BYTES: Final = 64
# Arrays of up to this many elements become lists at once; a vocabulary has tens of thousands and stays in the file until it is asked for.
EAGER_ARRAY_ELEMENTS: Final = 1024

MAX_HEADER_BYTES: Final = 1 << 26
"""The most that a header may have to be sent to another node: four times that of a vocabulary of 262,000 tokens."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Final = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<B")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Smallest possible entries: key length, type and one byte; name length, dim count, one dim, type and offset.
_LEAST_METADATA_BYTES, _LEAST_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayInfo:
    """A long metadata array that stays in the file: its element type by GGUF's name, its length, and where its elements lie (bytes ``start..stop``)."""

    element: str
    length: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.length


MetadataValue = Scalar | list[Scalar] | ArrayInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF header says. ``offsets`` are from the start of the file, in bytes; ``n_bytes`` is the header's size with its padding."""

    version: int
    metadata: dict[str, MetadataValue]
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    n_bytes: int


def read_header(buffer: memoryview, where: str) -> Header:
    """Parse the header at the start of ``buffer``, the bytes of a whole GGUF file.

    Raises
    ------
    ModelError
        if the bytes are no little-endian GGUF of version 2 or 3, are cut short, or contradict themselves. No other exception, whatever the bytes.
    """
    cursor = _Cursor(buffer, where)
    version, n_tensors, n_metadata = _read_preamble(cursor)
    metadata = _read_metadata(cursor, n_metadata)
    alignment = _alignment(cursor, metadata)
    entries = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for info, offset in entries:
        if info.name in tensors:
            raise cursor.error(f"tensor {info.name!r} is listed twice; download or convert the file again")
        if offset % alignment:
            raise cursor.error(f"tensor {info.name!r} starts at {offset}, which is not a multiple of the alignment {alignment}")
        if start + offset + info.n_bytes > len(buffer):
            raise cursor.error(
                f"tensor {info.name!r} should end at byte {start + offset + info.n_bytes}, but the file has {len(buffer)}: it is cut short; download it again"
            )
        tensors[info.name], offsets[info.name] = info, start + offset
    return Header(version=version, metadata=metadata, tensors=tensors, offsets=offsets, n_bytes=min(start, len(buffer)))


def without_tensors(buffer: memoryview, where: str) -> bytes:
    """A whole GGUF file with the metadata of the header in ``buffer`` and no tensor: enough for a vocabulary.

    Raises
    ------
    ModelError
        as `read_header`.
    """
    cursor = _Cursor(buffer, where)
    version, _, n_metadata = _read_preamble(cursor)
    start = cursor.position
    _read_metadata(cursor, n_metadata)
    return MAGIC + _U32.pack(version) + _U64.pack(0) + _U64.pack(n_metadata) + bytes(buffer[start : cursor.position])


def decode_array(buffer: memoryview, info: ArrayInfo, where: str) -> list[Scalar]:
    """The elements of a metadata array as Python values. Bytes of a string that are not UTF-8 become U+FFFD."""
    cursor = _Cursor(buffer, where, info.start)
    if info.element == "string":
        return [cursor.string("array element") for _ in range(info.length)]
    return cursor.scalars(next(number for number, (name, _) in _SCALARS.items() if name == info.element), info.length)


def decode_strings(buffer: memoryview, info: ArrayInfo, where: str) -> list[bytes]:
    """The elements of a string array, undecoded."""
    cursor = _Cursor(buffer, where, info.start)
    return [cursor.raw_string("array element") for _ in range(info.length)]


class _Cursor:
    """A position in the file's bytes that cannot leave them."""

    __slots__ = ("_buffer", "_where", "position")

    def __init__(self, buffer: memoryview, where: str, position: int = 0) -> None:
        self._buffer = buffer
        self._where = where
        self.position = position

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self._where}: {message}")

    @property
    def left(self) -> int:
        return len(self._buffer) - self.position

    def take(self, n_bytes: int, what: str) -> int:
        """Move over ``n_bytes`` and return where they start."""
        if n_bytes > self.left:
            raise self.error(
                f"{what} at byte {self.position} needs {n_bytes} bytes, but {self.left} are left: the file is cut short or damaged; download it again"
            )
        start = self.position
        self.position += n_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self._buffer, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self._buffer, self.take(8, what))[0]
        return value

    def raw_string(self, what: str) -> bytes:
        n_bytes = self.u64(what)
        start = self.take(n_bytes, what)
        return bytes(self._buffer[start : start + n_bytes])

    def raw_bytes(self, n_bytes: int) -> bytes:
        start = self.take(n_bytes, "preamble")
        return bytes(self._buffer[start : start + n_bytes])

    def string(self, what: str) -> str:
        return self.raw_string(what).decode("utf-8", errors="replace")

    def scalars(self, number: int, count: int) -> list[Scalar]:
        _, layout = _SCALARS[number]
        start = self.take(count * layout.size, "array")
        values = struct.unpack_from(f"<{count}{layout.format[-1]}", self._buffer, start)
        return [bool(value) for value in values] if number == _BOOL else list(values)

    def skip_strings(self, count: int) -> None:
        """Move over ``count`` strings. The loop is kept bare: a vocabulary and its merges have 400,000 of them."""
        buffer, position, unpack = self._buffer, self.position, _U64.unpack_from
        end = len(buffer) - 8
        for _ in range(count):
            if position > end:
                break
            position += 8 + unpack(buffer, position)[0]
        else:
            if position <= len(buffer):
                self.position = position
                return
        raise self.error(f"an array of {count} strings at byte {self.position} runs past the end of the file: it is cut short or damaged; download it again")


def _read_preamble(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.raw_bytes(4) if cursor.left >= 4 else b""
    if magic != MAGIC:
        raise cursor.error(f"starts with {magic!r}; expected {MAGIC!r}. Give a GGUF file, or convert a Hugging Face directory with `yoke convert`")
    version = cursor.u32("version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise cursor.error(f"is a big-endian GGUF of version {swapped}; expected little-endian. Convert the model again on this machine")
        raise cursor.error(f"is GGUF version {version}; expected 2 or 3. Convert the model again")
    n_tensors, n_metadata = cursor.u64("tensor count"), cursor.u64("metadata count")
    if n_metadata * _LEAST_METADATA_BYTES + n_tensors * _LEAST_TENSOR_BYTES > cursor.left:
        raise cursor.error(f"claims {n_metadata} metadata entries and {n_tensors} tensors, more than the {cursor.left} bytes left can hold; download it again")
    return version, n_tensors, n_metadata


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.string("metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} is there twice; convert the model again")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> MetadataValue:
    number = cursor.u32(f"type of {key!r}")
    if number == _STRING:
        return cursor.string(f"value of {key!r}")
    if number in _SCALARS:
        return cursor.scalars(number, 1)[0]
    if number != _ARRAY:
        raise cursor.error(f"metadata {key!r} has value type {number}; expected 0 to 12")
    element, length = cursor.u32(f"element type of {key!r}"), cursor.u64(f"length of {key!r}")
    if element != _STRING and element not in _SCALARS:
        raise cursor.error(f"metadata array {key!r} has element type {element}; expected numbers, truth values or strings (no arrays of arrays)")
    least = 8 if element == _STRING else _SCALARS[element][1].size
    if length * least > cursor.left:
        raise cursor.error(f"metadata array {key!r} claims {length} elements, more than the {cursor.left} bytes left can hold; download the file again")
    if length <= EAGER_ARRAY_ELEMENTS:
        return [cursor.string(key) for _ in range(length)] if element == _STRING else cursor.scalars(element, length)
    start = cursor.position
    if element == _STRING:
        cursor.skip_strings(length)
        return ArrayInfo(element="string", length=length, start=start, stop=cursor.position)
    cursor.take(length * least, f"array {key!r}")
    return ArrayInfo(element=_SCALARS[element][0], length=length, start=start, stop=cursor.position)


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}; expected a power of two")
    return alignment


def _read_tensor_info(cursor: _Cursor) -> tuple[TensorInfo, int]:
    raw_name = cursor.raw_string("tensor name")
    if len(raw_name) >= MAX_TENSOR_NAME_BYTES:
        raise cursor.error(f"a tensor name has {len(raw_name)} bytes; expected fewer than {MAX_TENSOR_NAME_BYTES}")
    name = raw_name.decode("utf-8", errors="replace")
    n_dims = cursor.u32(f"dim count of {name!r}")
    if not 1 <= n_dims <= 4:
        raise cursor.error(f"tensor {name!r} has {n_dims} dims; expected 1 to 4")
    dims = [cursor.u64(f"dims of {name!r}") for _ in range(n_dims)]
    number, offset = cursor.u32(f"type of {name!r}"), cursor.u64(f"offset of {name!r}")
    try:
        tensor_type = TensorType(number)
    except ValueError:
        known = ", ".join(f"{t.value} {t.name}" for t in TensorType)
        message = f"tensor {name!r} is of type {number}, which Yoke does not know; known are {known}. Take another quantisation of this model"
        raise cursor.error(message) from None
    try:
        # GGUF writes the contiguous dim first; Yoke writes rows first.
        return TensorInfo(name=name, type=tensor_type, shape=tuple(reversed(dims))), offset
    except ModelError as error:
        raise cursor.error(str(error)) from error
