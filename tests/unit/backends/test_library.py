"""Finding ggml: what is refused, and with which words. The wrong libraries are real ones, compiled here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ggml.library import Library, installed_directory
from yoke.core.errors import BackendError

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="needs a C compiler named cc, gcc or clang")


def library_of(directory: Path, source: str) -> Path:
    """A directory that looks like ggml's, with libraries compiled from ``source``."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    code = directory / "library.c"
    code.write_text(source)
    for name in ("libggml-base", "libggml"):
        subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(directory / (name + suffix)), str(code)], check=True)
    return directory


@needs_compiler
def test_a_library_that_is_too_old_is_refused_with_its_version_and_what_is_needed(tmp_path: Path) -> None:
    directory = library_of(tmp_path, 'const char *ggml_version(void) { return "0.9.1"; }')
    with pytest.raises(BackendError, match=r"ggml 0\.9\.1 in .* is too old; needed is 0\.9\.4 or newer: install it with"):
        Library(directory)


@needs_compiler
def test_a_library_from_before_versions_is_refused(tmp_path: Path) -> None:
    directory = library_of(tmp_path, "int ggml_init(void) { return 0; }")
    with pytest.raises(BackendError, match=r"is older than 0\.9\.1; needed is ggml 0\.9\.4"):
        Library(directory)


@needs_compiler
def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    directory = library_of(tmp_path, "int something(void) { return 0; }")
    with pytest.raises(BackendError, match="is not ggml"):
        Library(directory)


@needs_compiler
def test_a_library_that_lacks_a_function_is_refused_by_the_functions_name(tmp_path: Path) -> None:
    directory = library_of(tmp_path, 'const char *ggml_version(void) { return "9.0.0"; }')
    with pytest.raises(BackendError, match=r"ggml 9\.0\.0 in .* lacks ggml_init"):
        Library(directory)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"is not in .*: install it with"):
        Library(tmp_path)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    for name in ("ggml-base", "ggml"):
        (tmp_path / f"{prefix}{name}{suffix}").write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        Library(tmp_path)


def test_every_device_of_the_build_is_listed_by_its_own_name_and_measured() -> None:
    devices = GgmlBackend(threads=1).devices()
    assert "CPU" in [device.name for device in devices]
    for device in devices:
        assert device.matvec_bytes_per_s > 1e8, f"{device.name} streams less than 0.1 GB/s"
        assert device.free_bytes > 0


def test_the_installed_library_says_its_version() -> None:
    assert installed_directory().is_dir()
    assert GgmlBackend(threads=1).version[0].isdigit()
