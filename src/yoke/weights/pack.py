"""One model's tiles on disk: a pack that only grows, and an index that says what lies where in it. Tiles are checked when they come, and trusted from then on.

Several processes may have a pack open and add to it: every addition happens under the store's lock, after reading what the others have added. A process may
die anywhere: what it left unfinished is overwritten, or cut off when the pack is next opened.
"""

import contextlib
import errno
import mmap
import os
import shutil
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from yoke.core.errors import NodeError, RemoteProtocolError
from yoke.weights.locks import FileLock
from yoke.weights.manifest import Manifest
from yoke.weights.pack_index import HEAD_BYTES, RECORD_BYTES, PackIndex, head, open_file, read_at, write_at

SYNC_BYTES: Final = 64 << 20
"""After so many new bytes the disk is made to write them: what is checked again after a power cut, and what one can cost."""

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Room(Protocol):
    """The store, as a pack sees it."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """The store's lock, among threads and processes."""

    def take(self, n_bytes: int) -> None:
        """Count bytes that are about to be written. For a holder of the lock.

        Raises
        ------
        SettingError
            if they are more than the store may hold.
        """

    def give_back(self, n_bytes: int) -> None:
        """Count bytes that were not written after all. For a holder of the lock."""

    def require(self, n_bytes: int) -> None:
        """Make sure that so many bytes can be written.

        Raises
        ------
        SettingError
            if they are more than the store may hold.
        NodeError
            if the disk has not so many.
        """


class Pack:
    """The tiles of one model that are here. `yoke.weights.store.Store.open` makes it; use it as a context manager or call :meth:`close`.

    Safe from several threads; do not add to it while it is closed. ``is_alone`` says that no other process has it open: only then it may be repaired.

    Raises
    ------
    NodeError
        if the disk fails, or the index is damaged while another process uses it.
    """

    def __init__(self, directory: Path, manifest: Manifest, room: Room, use: FileLock, *, is_alone: bool) -> None:
        self.manifest = manifest
        self._directory, self._room, self._use = directory, room, use
        self._sizes = array("I", chain.from_iterable(grid.sizes() for grid in manifest.layout.grids.values()))
        self._mapping: mmap.mmap | None = None
        self._mapped = memoryview(b"")
        self._map_lock, self._syncing = threading.Lock(), threading.Lock()
        with self._failing("open"):
            self._file = open_file(directory / "pack")
            try:
                self._index = PackIndex(open_file(directory / "index"), self._sizes, manifest.digest)
            except BaseException:
                self._file.close()
                raise
            try:
                self._begin(is_alone)
            except BaseException:
                self._close_files()
                raise

    def __repr__(self) -> str:
        return f"Pack({self.manifest.digest.hex()[:12]}: {self.n_bytes} of {self.manifest.layout.n_bytes} bytes)"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def n_bytes(self) -> int:
        """Bytes of tiles that are here."""
        return self._index.n_bytes

    def holds(self, tile_id: int) -> bool:
        """Whether a tile is here; False too for what is no tile of this model."""
        return 0 <= tile_id < len(self._sizes) and self._index.offsets[tile_id] >= 0

    def size(self, tile_id: int) -> int:
        """The bytes of a tile of this model, here or not."""
        return self._sizes[tile_id]

    def missing(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids`` that are not here, also not from another process.

        Raises
        ------
        NodeError
            if the disk fails, or another process has damaged the index.
        """
        self._refresh()
        return [tile_id for tile_id in ids if not self.holds(tile_id)]

    def bitmap(self) -> bytes:
        """One bit for each tile of the model, the lowest bit of each byte first: whether it is here.

        Raises
        ------
        NodeError
            if the disk fails, or another process has damaged the index.
        """
        self._refresh()
        bits = bytearray(-(-len(self._sizes) // 8))
        for tile_id, offset in enumerate(self._index.offsets):
            if offset >= 0:
                bits[tile_id >> 3] |= 1 << (tile_id & 7)
        return bytes(bits)

    def make_room(self, ids: Iterable[int]) -> None:
        """Make sure that these tiles can be added, before they are fetched: other models that nobody uses make way.

        Raises
        ------
        SettingError
            if they are more than the store may hold.
        NodeError
            if the disk has not so many bytes.
        """
        self._room.require(sum(self._sizes[tile_id] + RECORD_BYTES for tile_id in self.missing(ids)))

    def add(self, tile_id: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep a tile; False if it is here already.

        Raises
        ------
        RemoteProtocolError
            if ``data`` is not the tile that the manifest means.
        SettingError
            if the store may hold no more.
        NodeError
            if the disk is full or fails. What was here before stays.
        """
        if not 0 <= tile_id < len(self._sizes) or len(data) != self._sizes[tile_id] or not self.manifest.is_tile(tile_id, data):
            raise RemoteProtocolError(f"tile {tile_id} is not what the manifest of model {self.manifest.digest.hex()[:12]} says: its hash is another")
        with self._failing("write"), self._room.held():
            self._catch_up()
            if self.holds(tile_id):
                return False
            self._append(tile_id, data)
        if self._index.end - self._index.synced >= SYNC_BYTES and self._syncing.acquire(blocking=False):
            try:
                self.sync()
            finally:
                self._syncing.release()
        return True

    def read(self, tile_id: int) -> memoryview | None:
        """A tile's bytes, a view of the mapped pack that stays valid; None if it is not here."""
        return self.read_run((tile_id,))

    def read_run(self, ids: Sequence[int]) -> memoryview | None:
        """The bytes of several tiles, one behind the other, if they lie so in the pack: as they do when one source brought them in this order."""
        start = stop = self._index.offsets[ids[0]] if self.holds(ids[0]) else -1
        for tile_id in ids:
            if start < 0 or not self.holds(tile_id) or self._index.offsets[tile_id] != stop:
                return None
            stop += self._sizes[tile_id]
        mapped = self._mapped if stop <= len(self._mapped) else self._map(stop)
        return mapped[start:stop] if mapped is not None else None

    def release(self, ids: Iterable[int]) -> None:
        """Tell the system that these tiles' pages are not needed in memory for now, where it can be told. Reading them again still works."""
        spans = [(start, start + self._sizes[tile_id]) for tile_id in ids if (start := self._index.offsets[tile_id]) >= 0]
        with self._map_lock:
            if self._mapping is not None and spans and hasattr(self._mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
                # Pages of other tiles in between come back when they are read.
                start = min(spans)[0] // mmap.PAGESIZE * mmap.PAGESIZE
                stop = min(max(spans)[1], len(self._mapping))
                if start < stop:
                    self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def sync(self) -> None:
        """Have the disk write what was added, so that a power cut costs nothing of it.

        Raises
        ------
        NodeError
            if the disk fails.
        """
        end = self._index.end
        with self._failing("write"):
            os.fsync(self._file.fileno())
            with self._room.held():
                self._catch_up()
                self._index.mark(max(end, self._index.synced))

    def verify(self, report: Callable[[int], None] = lambda done: None) -> tuple[int, ...]:
        """Check every tile again, and forget those that are broken, so that they can be added anew: their ids.

        ``report`` is given the bytes checked so far.

        Raises
        ------
        NodeError
            if the disk fails.
        """
        self._refresh()
        done, broken = 0, []
        for _, tile_id in self._index.held():
            data = self.read(tile_id)
            if data is None or not self.manifest.is_tile(tile_id, data):
                broken.append(tile_id)
            done += self._sizes[tile_id]
            report(done)
        with self._failing("write"), self._room.held():
            self._catch_up()
            for tile_id in filter(self.holds, broken):
                self._room.take(RECORD_BYTES)
                self._index.add(tile_id, is_void=True)
        return tuple(broken)

    def close(self) -> None:
        """Have the disk write what was added, and let the pack go: from now on it holds nothing. Views that :meth:`read` gave stay valid. Closing twice does
        nothing.

        Raises
        ------
        NodeError
            if the disk fails.
        """
        if self._file.closed:
            return
        try:
            if self._index.synced < self._index.end:
                self.sync()
        finally:
            self._close_files()

    # What follows is for a holder of the store's lock.

    def _begin(self, is_alone: bool) -> None:
        """Read the index, and bring the files into order if nobody else uses them."""
        expected = head(b"YOKEpack", self.manifest.digest)
        if is_alone and not (self._index.is_of(self.manifest.digest) and read_at(self._file, 0, HEAD_BYTES) == expected):
            self._file.truncate(0)
            write_at(self._file, 0, expected)
            self._index.begin_anew()
        n_bytes = os.fstat(self._file.fileno()).st_size
        is_whole = self._index.read(n_bytes)
        if is_alone:
            self._index.cut(self._first_broken(), n_bytes)
            self._file.truncate(self._index.end)
        elif not is_whole:
            raise self._damaged()

    def _first_broken(self) -> int | None:
        """Where the first broken tile lies, of those that a power cut may have taken: from there on nothing is believed."""
        for offset, tile_id in self._index.held(self._index.synced):
            if not self.manifest.is_tile(tile_id, read_at(self._file, offset, self._sizes[tile_id])):
                return offset
        return None

    def _catch_up(self) -> None:
        """Learn what other processes have added."""
        if self._index.is_behind() and not self._index.read(os.fstat(self._file.fileno()).st_size):
            raise self._damaged()

    def _refresh(self) -> None:
        with self._failing("read"), self._room.held():
            if not self._file.closed:
                self._catch_up()

    def _append(self, tile_id: int, data: bytes | bytearray | memoryview) -> None:
        n_bytes = len(data) + RECORD_BYTES
        self._room.take(n_bytes)
        end = self._index.end
        try:
            write_at(self._file, end, data)
            self._index.add(tile_id)
        except OSError as error:
            with contextlib.suppress(OSError):  # what stays behind is overwritten
                self._index.cut(None, end)
                self._file.truncate(end)
            self._room.give_back(n_bytes)
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(self._directory).free
            raise NodeError(
                f"no room for {n_bytes} more bytes of model {self.manifest.digest.hex()[:12]} in {self._directory}: {free} are free; "
                "make room on this disk, or choose another state directory"
            ) from error

    # What follows needs no lock.

    def _map(self, stop: int) -> memoryview | None:
        with self._map_lock:
            if self._file.closed:
                return None
            if stop > len(self._mapped):
                # The earlier mapping lives on in the views that were given out.
                self._mapping = mmap.mmap(self._file.fileno(), self._index.end, access=mmap.ACCESS_READ)
                self._mapped = memoryview(self._mapping)
            return self._mapped

    def _close_files(self) -> None:
        with self._map_lock:
            self._mapped, self._mapping = memoryview(b""), None
            self._file.close()
        self._index.close()
        self._use.close()

    def _damaged(self) -> NodeError:
        return NodeError(f"the index in {self._directory} is damaged, and another process uses it; end that one and start again")

    @contextlib.contextmanager
    def _failing(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NodeError(f"cannot {verb} the weights in {self._directory}: {error}") from error
