"""The index of a pack: which tile lies where in it, as records that are only ever added to. Knows the index's file; the pack's is its owner's business.

A tile's offset is the sum of the sizes before it, so a record is a tile's id and a check, and a record that was not written whole ends the index. The layout
is in docs/weights.md.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from yoke.weights.manifest import DIGEST_BYTES

_VERSION: Final = 1
# magic, version, reserved, the model's digest
_HEAD = struct.Struct(f"<8sII{DIGEST_BYTES}s")
# bytes of the pack that are known to be on the disk, and the check of that number; behind the index's head
_SYNCED = struct.Struct("<QI4x")
# a tile's id, and a check of it and its place in the index
_RECORD = struct.Struct("<II")
_VOID: Final = 1 << 31
"""Added to an id: the tile was found broken; its bytes in the pack count for nothing."""

HEAD_BYTES: Final = _HEAD.size
RECORD_BYTES: Final = _RECORD.size
_RECORDS_START: Final = HEAD_BYTES + _SYNCED.size


class PackIndex:
    """What lies where in a pack. ``offsets`` has the place of every tile in the pack, -1 for one that is not there; ``end`` is where the next one goes;
    ``n_bytes`` is what the tiles that are there have; ``synced`` is how far the pack is known to be on the disk.

    Parameters
    ----------
    file : the index, which it owns from now on.
    sizes : bytes of every tile, by id.
    digest : of the model.

    Its methods are for a holder of the store's lock, and raise `OSError` if the disk fails.
    """

    def __init__(self, file: FileIO, sizes: "array[int]", digest: bytes) -> None:
        self._file, self._sizes, self._digest = file, sizes, digest
        self.synced = 0
        self._start()

    def _start(self) -> None:
        self.offsets: array[int] = array("q", [-1]) * len(self._sizes)
        self.end, self.n_bytes, self._n_records = HEAD_BYTES, 0, 0

    @property
    def n_file_bytes(self) -> int:
        """Up to where the index's file is understood."""
        return _RECORDS_START + RECORD_BYTES * self._n_records

    def close(self) -> None:
        """Close its file, and know of nothing any more."""
        self._file.close()
        self._start()

    def is_of(self, digest: bytes) -> bool:
        """Whether the file is an index of this model."""
        return read_at(self._file, 0, HEAD_BYTES) == head(b"YOKEindx", digest)

    def begin_anew(self) -> None:
        """Empty the file."""
        self._file.truncate(0)
        write_at(self._file, 0, head(b"YOKEindx", self._digest))
        self._start()
        self.mark(0)

    def read(self, pack_bytes: int, stop: int | None = None) -> bool:
        """Take in the records that are new, as far as the pack of ``pack_bytes`` reaches, and up to the tile at ``stop``; whether those are all."""
        data = read_at(self._file, 0, _RECORDS_START)[HEAD_BYTES:]
        n_synced, check = _SYNCED.unpack(data) if len(data) == _SYNCED.size else (0, 0)
        # A pack that is shorter than what was known to be on the disk is not that pack any more: then nothing is known of it.
        self.synced = n_synced if check == _check(n_synced, 0) and n_synced <= pack_bytes else 0
        start = self.n_file_bytes
        data = read_at(self._file, start, max(0, os.fstat(self._file.fileno()).st_size - start))
        for number, check in _RECORD.iter_unpack(data[: len(data) // RECORD_BYTES * RECORD_BYTES]):
            tile_id, is_void = number & ~_VOID, bool(number & _VOID)
            if check != _check(number, self._n_records) or tile_id >= len(self._sizes) or (self.offsets[tile_id] >= 0) != is_void:
                return False
            if not is_void and (self.end + self._sizes[tile_id] > pack_bytes or self.end == stop):
                return False
            self._count(tile_id, is_void)
        return True

    def is_behind(self) -> bool:
        """Whether others have added records."""
        return os.fstat(self._file.fileno()).st_size > self.n_file_bytes

    def add(self, tile_id: int, *, is_void: bool = False) -> None:
        """Write down that a tile lies at the end of the pack, or that the one which is there is broken."""
        number = tile_id | (_VOID if is_void else 0)
        write_at(self._file, self.n_file_bytes, _RECORD.pack(number, _check(number, self._n_records)))
        self._count(tile_id, is_void)

    def mark(self, synced: int) -> None:
        """Write down how far the pack is on the disk."""
        self.synced = synced
        write_at(self._file, HEAD_BYTES, _SYNCED.pack(synced, _check(synced, 0)))

    def cut(self, stop: int | None, pack_bytes: int) -> None:
        """Forget the tile at ``stop`` and all that came later, and what stands in the file beyond what is understood."""
        if stop is not None:
            self._start()
            self.read(pack_bytes, stop)
        self._file.truncate(self.n_file_bytes)
        if self.synced > self.end:
            self.mark(self.end)

    def held(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """The tiles that are there and end behind ``start``, as offset and id, in the order of the pack."""
        yield from sorted((offset, tile_id) for tile_id, offset in enumerate(self.offsets) if offset >= 0 and offset + self._sizes[tile_id] > start)

    def _count(self, tile_id: int, is_void: bool) -> None:
        self._n_records += 1
        if is_void:
            self.offsets[tile_id] = -1
            self.n_bytes -= self._sizes[tile_id]
        else:
            start = self.end
            self.end = start + self._sizes[tile_id]
            self.offsets[tile_id] = start  # last: whoever reads the pack meanwhile maps it up to the end
            self.n_bytes += self._sizes[tile_id]


def head(magic: bytes, digest: bytes) -> bytes:
    """What a pack and an index begin with."""
    return _HEAD.pack(magic, _VERSION, 0, digest)


def open_file(path: Path) -> FileIO:
    """A file to read and write, made if it is not there, for its owner alone.

    Raises
    ------
    OSError
        if it cannot be opened.
    """
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600), "r+")


def read_at(file: FileIO, position: int, n_bytes: int) -> bytes:
    """At most so many bytes: fewer where the file ends."""
    file.seek(position)
    parts = []
    while n_bytes and (part := file.read(n_bytes)):
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


def write_at(file: FileIO, position: int, data: bytes | bytearray | memoryview) -> None:
    """All of ``data``."""
    file.seek(position)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _check(number: int, place: int) -> int:
    return zlib.crc32(struct.pack("<QQ", number, place))
