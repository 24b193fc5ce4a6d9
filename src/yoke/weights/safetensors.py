"""Safetensors files, mapped into memory: names, shapes and raw values, one file or the shards of an index. Knows no model.

Read here and not with the safetensors package, because its numpy form has no bfloat16. Format: https://github.com/huggingface/safetensors#format.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.weights.gguf import dequantize

# The safetensors library refuses longer headers (MAX_HEADER_SIZE in its tensor.rs).
MAX_HEADER_BYTES: Final = 100_000_000
INDEX_NAME: Final = "model.safetensors.index.json"
_TYPES: Final = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """One tensor of a safetensors file: its type, its shape (rows first), and its bytes ``start..stop`` within file number ``file``."""

    type: TensorType
    shape: tuple[int, ...]
    file: int
    start: int
    stop: int


class SafetensorsDirectory:
    """All tensors of a Hugging Face model directory, memory-mapped. Use it as a context manager or call :meth:`close`."""

    def __init__(self, maps: list[mmap.mmap], tensors: Mapping[str, SourceTensor]) -> None:
        self.tensors = tensors
        self._maps = maps

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map every safetensors file of the model and read the headers.

        Raises
        ------
        ModelError
            if a file is missing, cut short or damaged, a tensor is in two files, or of a type other than F32, F16 and BF16.
        """
        maps: list[mmap.mmap] = []
        tensors: dict[str, SourceTensor] = {}
        try:
            for number, path in enumerate(_files(directory)):
                mapping, found = _open_file(path, number)
                maps.append(mapping)
                if twice := tensors.keys() & found.keys():
                    raise ModelError(f"{path}: tensors that another file holds too: {', '.join(sorted(twice)[:5])}; download the model again")
                tensors.update(found)
        except BaseException:
            for mapping in maps:
                mapping.close()
            raise
        return cls(maps, tensors)

    def close(self) -> None:
        """Unmap the files."""
        for mapping in self._maps:
            mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start..stop`` (first dim) of a tensor as float32, a copy: array [stop - start, ...]."""
        tensor = self.tensors[name]
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        first = tensor.start + start * row_bytes
        # Bytes are copied out, so that no view keeps the file mapped after close().
        data = np.frombuffer(self._maps[tensor.file][first : first + (stop - start) * row_bytes], dtype=np.uint8)
        return dequantize(tensor.type, data).reshape(stop - start, *tensor.shape[1:])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises
    ------
    ModelError
        if it cannot be read, is no JSON, or is no object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}; expected a Hugging Face model directory") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


def _files(directory: Path) -> list[Path]:
    if (index := directory / INDEX_NAME).is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelError(f"{index}: has no weight_map from tensor to file; download it again")
        names = sorted(set(shards.values()))
        # An index comes from elsewhere: it may name files of its own directory only.
        if foreign := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ModelError(f"{index}: names the file {foreign[0]!r}; expected a .safetensors file in the same directory")
        return [directory / name for name in names]
    if (single := directory / "model.safetensors").is_file():
        return [single]
    raise ModelError(f"{directory}: holds neither model.safetensors nor {INDEX_NAME}; expected a Hugging Face directory with safetensors weights")


def _open_file(path: Path, number: int) -> tuple[mmap.mmap, dict[str, SourceTensor]]:
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be opened: {error}; download the model again") from error
    try:
        return mapping, _read_header(path, mapping, number)
    except BaseException:
        mapping.close()
        raise


def _read_header(path: Path, mapping: mmap.mmap, number: int) -> dict[str, SourceTensor]:
    n_header = int.from_bytes(mapping[:8], "little")
    if len(mapping) < 8 or n_header > min(MAX_HEADER_BYTES, len(mapping) - 8):
        raise ModelError(f"{path}: claims a header of {n_header} bytes in a file of {len(mapping)}; it is no safetensors file or cut short; download it again")
    try:
        header = json.loads(mapping[8 : 8 + n_header])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its header is no JSON: {error}; download it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: its header is a JSON {type(header).__name__}; expected an object")
    header.pop("__metadata__", None)
    return {name: _read_entry(f"{path}: tensor {name!r}", entry, number, 8 + n_header, len(mapping)) for name, entry in header.items()}


def _read_entry(where: str, entry: object, number: int, data_start: int, n_file: int) -> SourceTensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if all(isinstance(n, int) and n > 0 for n in shape):
            pass
        case _:
            raise ModelError(f"{where} has a malformed entry; expected dtype, a positive shape and two data_offsets")
    if dtype not in _TYPES:
        raise ModelError(f"{where} is of type {dtype}; expected one of {', '.join(_TYPES)}. Take a model that is not quantised")
    tensor_type = _TYPES[dtype]
    if not 0 <= start < stop <= n_file - data_start or stop - start != prod(shape) * tensor_type.block_bytes:
        raise ModelError(f"{where} of {dtype} {shape} lies at {start}..{stop}, which does not fit its shape or the file; download it again")
    return SourceTensor(type=tensor_type, shape=tuple(shape), file=number, start=data_start + start, stop=data_start + stop)
