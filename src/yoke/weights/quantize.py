"""Quantisation of a GGUF file by libllama, whose mixes decide tensor by tensor. Knows files, not models."""

import ctypes
from pathlib import Path
from typing import Final

from yoke.core.errors import ModelError
from yoke.weights.tokenizer import libllama, library_error

# llama.h, enum llama_ftype.
FILE_TYPES: Final = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}

# Rows that libllama keeps as float32 while it works; its own default is 8 GiB.
_BUFFER_BYTES: Final = 256 << 20


def quantize_file(source: Path, target: Path, type_name: str, threads: int = 0) -> None:
    """Write ``target`` as ``source`` in another quantisation. Matrices whose rows do not fit its blocks get the type that libllama falls back to.

    Parameters
    ----------
    source : a GGUF file of F32, F16 or BF16 weights.
    target : is overwritten; not atomic.
    type_name : a key of ``FILE_TYPES``.
    threads : to compute with; 0 for as many as there are cores.

    Raises
    ------
    ModelError
        if the type is unknown or libllama fails; the message carries its reason.
    """
    if type_name not in FILE_TYPES:
        raise ModelError(f"quantisation {type_name!r} is unknown; known are {', '.join(FILE_TYPES)}")
    library = libllama()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[type_name]
    parameters.nthread = threads
    parameters.max_buf_size = _BUFFER_BYTES
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        raise ModelError(f"{target}: libllama cannot quantise to {type_name}: {library_error()}; is the disk full?")
