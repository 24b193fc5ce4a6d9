"""A Hugging Face directory becomes one GGUF file, tensor by tensor: never more than a few rows' worth of weights in memory.

Knows the order of things; what the families look like is in names.py, what the files say in config.py, tokenizer_json.py and safetensors.py.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorInfo, TensorType
from yoke.weights.config import SourceConfig, read_config
from yoke.weights.gguf_header import DEFAULT_ALIGNMENT
from yoke.weights.names import IGNORED_SUFFIXES, OUTPUT, TensorRule
from yoke.weights.quantize import FILE_TYPES, quantize_file
from yoke.weights.safetensors import SafetensorsDirectory
from yoke.weights.tokenizer_json import read_vocabulary
from yoke.weights.vocabulary import Vocabulary, write_vocabulary

Progress = Callable[[str, float], None]

# Written straight away; everything else goes through libllama, whose mixes decide tensor by tensor.
_DIRECT: Final = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16, "Q8_0": TensorType.Q8_0}
_CHUNK_BYTES: Final = 64 << 20
_LARGEST_F16: Final = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One tensor to be written: as what, from which source, and how many dims a head has if its rows change order (0: they do not)."""

    info: TensorInfo
    source: str
    permuted_head_dim: int = 0


def convert(source: Path, target: Path, type_name: str, progress: Progress) -> None:
    """Convert a Hugging Face directory to a GGUF file. The target appears complete or not at all.

    Parameters
    ----------
    source : directory with config.json, tokenizer.json and safetensors weights (one file or shards with an index).
    target : the GGUF file; replaced if it is there.
    type_name : of the matrices: F32, F16, BF16, or a quantisation of ``quantize.FILE_TYPES``. Vectors stay F32.
    progress : is called with what is being done and how much of it is, from 0.0 to 1.0.

    Raises
    ------
    ModelError
        if the architecture or tokenizer is unknown, tensors are missing, superfluous or of a wrong shape, or the target cannot be written.

    Notes
    -----
    A quantisation other than Q8_0 first writes the weights in their own type beside the target, so it needs that much free space for a while.
    """
    source, target = Path(source), Path(target)
    if type_name not in FILE_TYPES:
        raise ModelError(f"type {type_name!r} is unknown; known are {', '.join(FILE_TYPES)}")
    config = read_config(source)
    vocabulary = read_vocabulary(source, config)
    plain = target.with_name(f".{target.name}.{os.getpid()}.part")
    quantised = plain.with_name(plain.name + "2")
    try:
        with SafetensorsDirectory.open(source) as checkpoint:
            jobs = list(_plan(config, checkpoint, _DIRECT.get(type_name), str(source)))
            _write(plain, _Model(config=config, vocabulary=vocabulary, jobs=tuple(jobs), type_name=type_name), checkpoint, progress)
        if type_name in _DIRECT:
            os.replace(plain, target)
        else:
            progress("quantising", 0.0)
            quantize_file(plain, quantised, type_name)
            os.replace(quantised, target)
            progress("quantising", 1.0)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}; free some space, or choose another place") from error
    finally:
        plain.unlink(missing_ok=True)
        quantised.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    config: SourceConfig
    vocabulary: Vocabulary
    jobs: tuple[_Job, ...]
    type_name: str


def _plan(config: SourceConfig, checkpoint: SafetensorsDirectory, wanted: TensorType | None, where: str) -> Iterator[_Job]:
    """Every tensor to be written. Without a ``wanted`` type each matrix keeps its own."""
    sizes = config.sizes()
    tied = OUTPUT not in checkpoint.tensors if config.tied is None else config.tied
    rules = [(rule, rule.source.format(i=i), rule.target.format(i=i)) for rule, i in _expand(config) if not (tied and rule.source == OUTPUT)]
    known = {source for _, source, _ in rules} | {OUTPUT}
    if missing := [source for _, source, _ in rules if source not in checkpoint.tensors]:
        raise ModelError(f"{where}: tensors are missing: {_some(missing)}; download the model again")
    if foreign := [name for name in checkpoint.tensors if name not in known and not name.endswith(IGNORED_SUFFIXES)]:
        raise ModelError(f"{where}: holds tensors that {config.family.architecture} models do not have: {_some(foreign)}; this variant is not supported")
    for rule, source, target in rules:
        found = checkpoint.tensors[source]
        expected = tuple(sizes[letter] for letter in rule.shape)
        if found.shape != expected:
            raise ModelError(f"{where}: tensor {source} has shape {found.shape}; config.json says {expected}")
        tensor_type = TensorType.F32 if len(expected) == 1 else _fitting(found.type if wanted is None else wanted, expected)
        head_dim = config.head_dim if rule.heads and config.family.permuted else 0
        yield _Job(info=TensorInfo(name=target, type=tensor_type, shape=expected), source=source, permuted_head_dim=head_dim)


def _expand(config: SourceConfig) -> Iterator[tuple[TensorRule, int]]:
    for rule in config.family.rules:
        for i in range(config.n_blocks if "{i}" in rule.source else 1):
            yield rule, i


def _fitting(wanted: TensorType, shape: tuple[int, ...]) -> TensorType:
    """``wanted``, or F16 where a row is no whole number of its blocks: libllama's choice too."""
    return TensorType.F16 if shape[-1] % wanted.block else wanted


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _write(path: Path, model: _Model, checkpoint: SafetensorsDirectory, progress: Progress) -> None:
    _write_header(path, model)
    total = sum(job.info.n_bytes for job in model.jobs)
    done = 0
    with path.open("ab") as file:
        _pad(file)
        if model.config.rope_factors is not None:
            file.write(model.config.rope_factors.tobytes())
            _pad(file)
        for job in model.jobs:
            for chunk in _chunks(job, checkpoint):
                file.write(chunk.data)
                done += chunk.nbytes
                progress("writing", done / total)
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _write_header(path: Path, model: _Model) -> None:
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

    config = model.config
    writer = GGUFWriter(path, config.family.architecture)
    try:
        writer.add_type("model")
        writer.add_name(config.name)
        writer.add_file_type(FILE_TYPES[model.type_name])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocabulary)
        writer.add_context_length(config.context)
        writer.add_embedding_length(config.width)
        writer.add_block_count(config.n_blocks)
        writer.add_feed_forward_length(config.columns)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_base)
        if config.rope_scale != 1.0:
            writer.add_string(f"{config.family.architecture}.rope.scaling.type", "linear")
            writer.add_rope_scaling_factor(config.rope_scale)
        if config.window is not None:
            writer.add_sliding_window(config.window)
        write_vocabulary(writer, model.vocabulary)
        if (factors := config.rope_factors) is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for job in model.jobs:
            kind = GGMLQuantizationType(job.info.type.value)
            writer.add_tensor_info(job.info.name, job.info.shape, np.dtype(np.float32), job.info.n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _chunks(job: _Job, checkpoint: SafetensorsDirectory) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of one tensor, some rows at a time."""
    n_rows = job.info.shape[0]
    unit = job.permuted_head_dim or 1
    row_bytes = 4 * int(np.prod(job.info.shape[1:], dtype=np.int64))
    step = max(unit, _CHUNK_BYTES // row_bytes // unit * unit)
    for start in range(0, n_rows, step):
        rows = checkpoint.rows(job.source, start, min(start + step, n_rows))
        if job.permuted_head_dim:
            rows = interleave(rows, job.permuted_head_dim)
        yield _encode(rows, job)


def interleave(rows: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """Rows of query or key weights, [heads * head_dim, ...], reordered within each head from halves to neighbours: 0, C/2, 1, C/2 + 1, ..."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def _encode(rows: npt.NDArray[np.float32], job: _Job) -> npt.NDArray[np.uint8]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if job.info.type is TensorType.F16 and rows.size and float(np.abs(rows).max()) > _LARGEST_F16:
        raise ModelError(f"tensor {job.source} holds numbers beyond {_LARGEST_F16}, the largest of F16; choose BF16")
    encoded = quantize(rows, GGMLQuantizationType(job.info.type.value))
    return np.ascontiguousarray(encoded).reshape(-1).view(np.uint8)
