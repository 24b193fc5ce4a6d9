"""A model's manifest: its tensors, and the hash of every tile. By its digest nodes agree that they mean the same weights, bit for bit.

A manifest is all that a node without the model's file needs to ask for tiles, to check them, and to put slices of tensors together again. Vocabulary and
metadata are needed only where the engine is: their hash tells whether what comes of them is right. Knows files and bytes; does not know where tiles come from.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Self

import numpy as np

from yoke.core.errors import ModelError, RemoteProtocolError, SettingError
from yoke.core.tensor import TensorInfo, TensorType
from yoke.weights.gguf import GgufFile
from yoke.weights.gguf_header import MAX_TENSOR_NAME_BYTES
from yoke.weights.tiles import MAX_TENSORS, MAX_TILES, Grid, Layout, Tile

HASH_BYTES: Final = 32
DIGEST_BYTES: Final = 32

_MAGIC: Final = b"YKMF"
_VERSION: Final = 1
# magic, version, head dim, tensors, tiles, the header's hash
_HEAD = struct.Struct(f"<4sHHII{HASH_BYTES}s")
# bytes of the name, type, dims
_TENSOR = struct.Struct("<BBB")
_MAX_DIMS: Final = 4

MAX_MANIFEST_BYTES: Final = _HEAD.size + MAX_TENSORS * (_TENSOR.size + MAX_TENSOR_NAME_BYTES + 8 * _MAX_DIMS) + MAX_TILES * HASH_BYTES
"""136 MB, that of a model of 600 GB; one of 40 GB has 9 MB."""

# A thread's turn: long enough that handing it out costs nothing beside it (about 50 us).
_TILES_AT_ONCE: Final = 32

# Hashing is bound by the disk or by memory beyond this many threads (1.7 GB/s a core, measured 2026-11).
_MOST_THREADS: Final = 8

# size and modification time (ns) of the file, SHA-256 of the manifest that follows
_ENTRY = struct.Struct(f"<Qq{HASH_BYTES}s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a model's weights are.

    ``header`` is the hash of the file's header (`GgufFile.digest`: metadata, names, types, shapes) and ``hashes`` that of every tile, in the order of ids: all
    SHA-256. ``head_dim`` takes part in where tiles are cut. ``layout`` and ``digest``, which names the model, follow from the rest.

    Raises
    ------
    ModelError
        if the tensors cannot be cut into tiles, or there is not one hash for each tile.
    """

    tensors: tuple[TensorInfo, ...]
    head_dim: int
    header: bytes
    hashes: bytes = field(repr=False)
    layout: Layout = field(init=False, repr=False, compare=False)
    digest: bytes = field(init=False, compare=False)

    def __post_init__(self) -> None:
        layout = Layout(self.tensors, self.head_dim)
        if len(self.hashes) != layout.n_tiles * HASH_BYTES or len(self.header) != HASH_BYTES:
            raise ModelError(f"{len(self.hashes)} bytes of hashes for {layout.n_tiles} tiles; expected {HASH_BYTES} for each, and for the header")
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "digest", hashlib.sha256(self.encode()).digest())

    def is_tile(self, tile_id: int, data: bytes | bytearray | memoryview) -> bool:
        """Whether ``data`` is the tile of this id, which must be one of the model's. Takes about 20 us for 36 KB, without holding the interpreter."""
        return hashlib.sha256(data).digest() == self.hashes[tile_id * HASH_BYTES : (tile_id + 1) * HASH_BYTES]

    def encode(self) -> bytes:
        """The bytes whose SHA-256 is the digest; the layout is in docs/weights.md."""
        parts = [_HEAD.pack(_MAGIC, _VERSION, self.head_dim, len(self.tensors), len(self.hashes) // HASH_BYTES, self.header)]
        for info in self.tensors:
            name = info.name.encode()
            parts.append(_TENSOR.pack(len(name), info.type, len(info.shape)) + name + struct.pack(f"<{len(info.shape)}Q", *info.shape))
        return b"".join((*parts, self.hashes))

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview, digest: bytes | None = None) -> Self:
        """Read a manifest. Allocates little more than ``data`` has, whatever it announces.

        Parameters
        ----------
        data : the encoded manifest.
        digest : of the model that is meant; None takes any.

        Raises
        ------
        RemoteProtocolError
            if the bytes are no manifest, or another model's.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise RemoteProtocolError(f"a manifest of {len(data)} bytes; expected at most {MAX_MANIFEST_BYTES}")
        if digest is not None and (found := hashlib.sha256(data).digest()) != digest:
            raise RemoteProtocolError(f"the manifest of model {found.hex()[:12]} came; expected that of {digest.hex()[:12]}")
        view = memoryview(data)
        try:
            magic, version, head_dim, n_tensors, n_tiles, header = _HEAD.unpack_from(view)
            if (magic, version) != (_MAGIC, _VERSION):
                raise RemoteProtocolError(f"a manifest starts with {magic!r}, version {version}; expected {_MAGIC!r}, version {_VERSION}")
            if n_tiles > MAX_TILES or n_tensors > MAX_TENSORS:
                raise RemoteProtocolError(f"a manifest of {n_tensors} tensors and {n_tiles} tiles; expected at most {MAX_TENSORS} and {MAX_TILES}")
            tensors, start = _read_tensors(view, n_tensors)
            if len(view) - start != n_tiles * HASH_BYTES:
                raise RemoteProtocolError(f"a manifest has {len(view) - start} bytes for the hashes of {n_tiles} tiles; expected {n_tiles * HASH_BYTES}")
            return cls(tensors=tensors, head_dim=head_dim, header=header, hashes=bytes(view[start:]))
        except (struct.error, UnicodeDecodeError, ValueError, ModelError) as error:
            raise RemoteProtocolError(f"bytes that are no manifest: {error}") from error


def _read_tensors(view: memoryview, count: int) -> tuple[tuple[TensorInfo, ...], int]:
    """The tensors, and where the hashes begin."""
    position = _HEAD.size
    tensors = []
    for _ in range(count):
        name_bytes, number, n_dims = _TENSOR.unpack_from(view, position)
        if not 1 <= n_dims <= _MAX_DIMS or name_bytes >= MAX_TENSOR_NAME_BYTES:
            raise RemoteProtocolError(
                f"a tensor of {n_dims} dims with a name of {name_bytes} bytes; expected 1 to {_MAX_DIMS}, and less than {MAX_TENSOR_NAME_BYTES}"
            )
        start = position + _TENSOR.size
        position = start + name_bytes + 8 * n_dims
        name = bytes(view[start : start + name_bytes]).decode()
        tensors.append(TensorInfo(name=name, type=TensorType(number), shape=struct.unpack_from(f"<{n_dims}Q", view, start + name_bytes)))
    return tuple(tensors), position


def tile_bytes(file: GgufFile, tile: Tile) -> memoryview:
    """A tile's bytes, row by row: a view of the file, or a copy where it is a stripe.

    Raises
    ------
    ModelError
        if the file has no such tensor.
    """
    whole = file.read(tile.name)
    kind, width = whole.info.type, whole.info.shape[-1]
    row_bytes = kind.row_bytes(width)
    view = memoryview(whole.data)[tile.rows[0] * row_bytes : tile.rows[1] * row_bytes]
    if tile.columns == (0, width):
        return view
    rows = np.frombuffer(view, dtype=np.uint8).reshape(-1, row_bytes)
    return np.ascontiguousarray(rows[:, kind.row_bytes(tile.columns[0]) : kind.row_bytes(tile.columns[1])]).reshape(-1).data


def make_manifest(file: GgufFile, head_dim: int, report: Callable[[int], None] = lambda done: None, threads: int = 0) -> Manifest:
    """Read the whole file and hash its tiles.

    Parameters
    ----------
    file : an open model.
    head_dim : elements of one of its attention heads.
    report : is given the bytes hashed so far, in this thread, now and then; what it raises ends the work.
    threads : that hash; 0 is one for each core, up to 8.

    Raises
    ------
    ModelError
        if the tensors cannot be cut into tiles.
    """
    layout = Layout(file.tensors.values(), head_dim)
    hashes: list[bytes] = []
    done = 0
    with ThreadPoolExecutor(threads or min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="yoke-hash") as pool:
        for grid in layout.grids.values():
            hashes += _in_order(pool, partial(_hashes, file, grid), range(0, grid.n_tiles, _TILES_AT_ONCE))
            file.release(grid.info.name)
            done += grid.info.n_bytes
            report(done)
    return Manifest(tensors=tuple(file.tensors.values()), head_dim=head_dim, header=bytes.fromhex(file.digest), hashes=b"".join(hashes))


def _hashes(file: GgufFile, grid: Grid, start: int) -> bytes:
    """The hashes of some tiles of a tensor, from its tile number ``start`` on."""
    ids = range(grid.first + start, grid.first + min(grid.n_tiles, start + _TILES_AT_ONCE))
    return b"".join(hashlib.sha256(tile_bytes(file, grid.tile(tile_id))).digest() for tile_id in ids)


def _in_order(pool: ThreadPoolExecutor, work: Callable[[int], bytes], starts: Sequence[int]) -> list[bytes]:
    """The results of ``work``, also where the caller is interrupted: then what has not begun is dropped."""
    waiting = [pool.submit(work, start) for start in starts]
    try:
        return [job.result() for job in waiting]
    finally:
        for job in waiting:
            job.cancel()


def manifest_of(file: GgufFile, head_dim: int, directory: Path, report: Callable[[int], None] = lambda done: None, threads: int = 0) -> Manifest:
    """The manifest of a model file: the one kept in ``directory`` if the file has the same path, size and modification time as then, else a new one.

    Parameters
    ----------
    directory : where manifests are kept; made if it is not there.
    file, head_dim, report, threads : as for :func:`make_manifest`.

    Raises
    ------
    ModelError
        if the file cannot be cut into tiles, or changed while it was read.
    SettingError
        if ``directory`` cannot be written.
    """
    path = file.path.resolve()
    entry = directory / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.manifest"
    before = _stat(path)
    kept = _kept(entry, before)
    if kept is not None and kept.header.hex() == file.digest and kept.head_dim == head_dim:
        return kept
    manifest = make_manifest(file, head_dim, report, threads)
    if _stat(path) != before:
        raise ModelError(f"{path} changed while it was read; start again when it is complete")
    encoded = manifest.encode()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(entry, _ENTRY.pack(*before, manifest.digest) + encoded)
    except OSError as error:
        raise SettingError(f"cannot keep the manifest of {path} in {directory}: {error}; choose another state directory or make room") from error
    return manifest


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read any more: {error}") from error
    return found.st_size, found.st_mtime_ns


def _kept(entry: Path, stat: tuple[int, int]) -> Manifest | None:
    """What was kept of a file with this size and modification time, if it is there and whole."""
    try:
        if entry.stat().st_size > _ENTRY.size + MAX_MANIFEST_BYTES:
            return None
        data = entry.read_bytes()
        *of, digest = _ENTRY.unpack_from(data)
        return Manifest.decode(memoryview(data)[_ENTRY.size :], digest) if tuple(of) == stat else None
    except (OSError, struct.error, RemoteProtocolError):
        return None  # it is a copy of what can be made again


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file at once, readable by its owner alone: whoever reads it finds the old or the new one, whole, also after a crash.

    Raises
    ------
    OSError
        if it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
