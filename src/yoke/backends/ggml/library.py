"""Finding, checking and binding ggml's shared libraries. Knows names and signatures; knows nothing of models."""

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from yoke.core.errors import BackendError

MINIMUM_VERSION = (0, 9, 4)
"""ggml_set_rows with 64-bit indices, flash attention with a mask of any height and ggml_version() are all there from this release on."""

INSTALL_HINT = "install it with `pip install llama-cpp-python`, or name a directory that holds ggml's libraries with the setting `library`"

_P, _I, _L, _F, _Z, _B, _S = c_void_p, c_int, c_int64, c_float, c_size_t, c_bool, c_char_p


class InitParams(ctypes.Structure):
    """``struct ggml_init_params`` (ggml.h)."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ThreadpoolParams(ctypes.Structure):
    """``struct ggml_threadpool_params`` (ggml.h)."""

    _fields_ = (("cpumask", c_bool * 512), ("n_threads", c_int), ("prio", c_int), ("poll", c_uint32), ("strict_cpu", c_bool), ("paused", c_bool))


_TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` (ggml.h)."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", c_void_p),
    )


# name without "ggml_" -> (result, arguments); ggml.h, ggml-alloc.h, ggml-backend.h
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "init": (_P, (InitParams,)),
    "free": (None, (_P,)),
    "tensor_overhead": (_Z, ()),
    "graph_overhead_custom": (_Z, (_Z, _B)),
    "new_tensor_1d": (_P, (_P, _I, _L)),
    "new_tensor_2d": (_P, (_P, _I, _L, _L)),
    "nbytes": (_Z, (_P,)),
    "get_data": (_P, (_P,)),
    "set_input": (None, (_P,)),
    "set_output": (None, (_P,)),
    "mul_mat": (_P, (_P, _P, _P)),
    "add": (_P, (_P, _P, _P)),
    "mul": (_P, (_P, _P, _P)),
    "scale": (_P, (_P, _P, _F)),
    "rms_norm": (_P, (_P, _P, _F)),
    "swiglu_split": (_P, (_P, _P, _P)),
    "rope_ext": (_P, (_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F)),
    "get_rows": (_P, (_P, _P, _P)),
    "set_rows": (_P, (_P, _P, _P, _P)),
    "reshape_2d": (_P, (_P, _P, _L, _L)),
    "reshape_3d": (_P, (_P, _P, _L, _L, _L)),
    "view_3d": (_P, (_P, _P, _L, _L, _L, _Z, _Z, _Z)),
    "permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "cont": (_P, (_P, _P)),
    "flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "flash_attn_ext_set_prec": (None, (_P, _I)),
    "new_graph_custom": (_P, (_P, _Z, _B)),
    "build_forward_expand": (None, (_P, _P)),
    "graph_n_nodes": (_I, (_P,)),
    "graph_node": (_P, (_P, _I)),
    "graph_add_node": (None, (_P, _P)),
    "gallocr_new": (_P, (_P,)),
    "gallocr_free": (None, (_P,)),
    "gallocr_alloc_graph": (_B, (_P, _P)),
    "gallocr_get_buffer_size": (_Z, (_P, _I)),
    "backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "backend_buffer_free": (None, (_P,)),
    "backend_buffer_clear": (None, (_P, c_uint8)),
    "backend_buffer_set_usage": (None, (_P, _I)),
    "backend_buft_is_host": (_B, (_P,)),
    "backend_buft_name": (_S, (_P,)),
    "backend_tensor_set": (None, (_P, _P, _Z, _Z)),
    "backend_tensor_get": (None, (_P, _P, _Z, _Z)),
    "backend_graph_compute": (_I, (_P, _P)),
    "backend_free": (None, (_P,)),
    "backend_dev_count": (_Z, ()),
    "backend_dev_get": (_P, (_Z,)),
    "backend_dev_by_name": (_P, (_S,)),
    "backend_dev_name": (_S, (_P,)),
    "backend_dev_description": (_S, (_P,)),
    "backend_dev_memory": (None, (_P, POINTER(_Z), POINTER(_Z))),
    "backend_dev_type": (_I, (_P,)),
    "backend_dev_init": (_P, (_P, _S)),
    "backend_dev_buffer_type": (_P, (_P,)),
    "backend_dev_supports_op": (_B, (_P, _P)),
    "backend_dev_backend_reg": (_P, (_P,)),
    "backend_reg_get_proc_address": (_P, (_P, _S)),
    "backend_load_all_from_path": (None, (_S,)),
    "get_type_traits": (POINTER(TypeTraits), (_I,)),
    "log_set": (None, (_P, _P)),
    "threadpool_params_init": (None, (POINTER(ThreadpoolParams), _I)),
}

# found at run time through the CPU's registry, so that builds which load their CPU code on demand work too
_CPU_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_threadpool_new": (_P, (POINTER(ThreadpoolParams),)),
    "ggml_threadpool_free": (None, (_P,)),
    "ggml_backend_cpu_set_threadpool": (None, (_P, _P)),
    "ggml_backend_set_n_threads": (None, (_P, _I)),
    "ggml_backend_dev_get_extra_bufts": (POINTER(_P), (_P,)),
}

_QUIET = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda _level, _text, _data: None)


class Library:
    """ggml's functions as attributes, without their ``ggml_`` prefix.

    Parameters
    ----------
    directory : where ``libggml``, ``libggml-base`` and ``libggml-cpu`` lie.

    Raises
    ------
    BackendError
        if a library is missing, is not ggml, or is older than `MINIMUM_VERSION`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if sys.platform == "win32":
            os.add_dll_directory(str(directory))
        self._libraries = [_open(path) for path in _library_files(directory)]
        self.version = self._check_version()
        for name, (result, arguments) in _SIGNATURES.items():
            function = self._find(f"ggml_{name}")
            if function is None:
                raise BackendError(
                    f"ggml {self.version} in {directory} lacks ggml_{name}; needed is version {_dotted(MINIMUM_VERSION)} or newer: {INSTALL_HINT}"
                )
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.log_set(_QUIET, None)
        self.backend_load_all_from_path(str(directory).encode())
        if self.backend_dev_count() == 0:
            raise BackendError(f"ggml {self.version} in {directory} offers no device: {INSTALL_HINT}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Only reached for names that are not bound."""
        raise AttributeError(f"ggml_{name} is not bound; add it to the table of signatures")

    def cpu_function(self, device: int, name: str) -> Callable[..., Any] | None:
        """A function that only some devices' registries have, or None."""
        result, arguments = _CPU_SIGNATURES[name]
        address = self.backend_reg_get_proc_address(self.backend_dev_backend_reg(device), name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def memory(self, device: int) -> int:
        """Free bytes on a device, by its own account."""
        free, total = c_size_t(), c_size_t()
        self.backend_dev_memory(device, byref(free), byref(total))
        return free.value

    def _find(self, symbol: str) -> Any | None:
        for library in self._libraries:
            if (function := getattr(library, symbol, None)) is not None:
                return function
        return None

    def _check_version(self) -> str:
        function = self._find("ggml_version")
        if function is None:
            kind = "is older than 0.9.1" if self._find("ggml_init") else "is not ggml"
            raise BackendError(f"the library in {self.directory} {kind}; needed is ggml {_dotted(MINIMUM_VERSION)} or newer: {INSTALL_HINT}")
        function.restype = c_char_p
        version = str(function().decode(errors="replace"))
        numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
        if numbers < MINIMUM_VERSION:
            raise BackendError(f"ggml {version} in {self.directory} is too old; needed is {_dotted(MINIMUM_VERSION)} or newer: {INSTALL_HINT}")
        return version


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _library_files(directory: Path) -> list[Path]:
    """The base library first: the others need it. ``ggml-cpu`` is absent from builds that load it on demand."""
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
    found = [directory / f"{prefix}{name}{suffix}" for name in ("ggml-base", "ggml-cpu", "ggml")]
    missing = [path for path in (found[0], found[2]) if not path.is_file()]
    if missing:
        raise BackendError(f"{missing[0].name} is not in {directory}: {INSTALL_HINT}")
    return [path for path in found if path.is_file()]


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded ({error}): {INSTALL_HINT}") from error


def installed_directory() -> Path:
    """Where llama-cpp-python keeps its libraries. Does not import it.

    Raises
    ------
    BackendError
        if it is not installed.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise BackendError(f"ggml was not found: {INSTALL_HINT}")
    return Path(found.origin).parent / "lib"


@cache
def load_library(directory: str = "") -> Library:
    """The library in ``directory``, or the one that llama-cpp-python installed; loaded once in a process."""
    return Library(Path(directory) if directory else installed_directory())
