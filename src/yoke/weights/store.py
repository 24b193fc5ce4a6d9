"""The weights that a node keeps for the next time: packs of tiles below one directory, together within a limit. What was not used for longest makes way.

Several processes may share the directory. Whoever changes something in it holds its lock, for some microseconds; whoever uses a model holds that model's, so
that it is not taken away.
"""

import contextlib
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from yoke.core.errors import NodeError, RemoteProtocolError, SettingError
from yoke.weights.locks import FileLock
from yoke.weights.manifest import DIGEST_BYTES, MAX_MANIFEST_BYTES, Manifest, write_whole
from yoke.weights.pack import Pack
from yoke.weights.pack_index import open_file

LOCK_S: Final = 30.0
"""How long a process waits for the directory's lock: others hold it for microseconds, or while they remove a model."""

_LOCK, _LEDGER, _USE, _MANIFEST = "lock", "ledger", "use", "manifest"
_SUM = struct.Struct("<Q")


class Store:
    """Models' tiles below ``directory``, at most ``limit_bytes`` of files in all.

    Safe from several threads and processes. Close it after its packs.

    Raises
    ------
    SettingError
        if the directory cannot be made or locked.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        self._threads = threading.Lock()
        with self._keeping():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(directory / _LOCK)
            self._ledger = open_file(directory / _LEDGER)

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r}, limit_bytes={self.limit_bytes})"

    def close(self) -> None:
        """Give its descriptors back."""
        self._ledger.close()
        self._lock.close()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files in the store."""
        with self.held():
            return self._tally()

    def digests(self) -> tuple[bytes, ...]:
        """The models of which something is here, the one used last first."""
        with self.held():
            return tuple(bytes.fromhex(place.name) for place in reversed(self._places()) if (place / _MANIFEST).exists())

    def manifest(self, digest: bytes) -> Manifest | None:
        """The manifest of a model of which something is here, or None."""
        with self.held():
            return self._manifest(self.directory / digest.hex(), digest)

    def open(self, manifest: Manifest) -> Pack:
        """The tiles of a model that are here; with none, if it is new. Close the pack when it is not needed any more.

        Raises
        ------
        SettingError
            if the store may hold no more, or its directory cannot be written.
        NodeError
            if the disk is full or fails, or what lies there is damaged while another process uses it.
        """
        place = self.directory / manifest.digest.hex()
        with self._keeping(), self.held():
            place.mkdir(exist_ok=True, mode=0o700)
            use = FileLock(place / _USE)
            try:
                is_alone = use.own()
                if not is_alone and not use.share():
                    raise NodeError(f"another process is removing {place}; start again")
                os.utime(place / _USE)
                if self._manifest(place, manifest.digest) is None:
                    self._write_ledger(self._tally())
                    encoded = manifest.encode()
                    self.take(len(encoded))
                    write_whole(place / _MANIFEST, encoded)
                pack = Pack(place, manifest, self, use, is_alone=is_alone)
                use.share()
            except BaseException:
                use.close()
                raise
            self._write_ledger(self._tally())
            return pack

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock of the directory, among threads and processes.

        Raises
        ------
        NodeError
            if another process does not let it go in `LOCK_S`.
        """
        with self._threads:
            deadline = time.monotonic() + LOCK_S
            pause_s = 1e-5
            while not self._lock.own():
                if time.monotonic() >= deadline:
                    raise NodeError(f"another process has held {self.directory} for {LOCK_S:g} s; end it, or choose another state directory")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1e-2)
            try:
                yield
            finally:
                self._lock.release()

    def take(self, n_bytes: int) -> None:
        """Count bytes that are about to be written; models that nobody uses make way. For a holder of the lock.

        Raises
        ------
        SettingError
            if they are more than the store may hold.
        """
        total = self._read_ledger() + n_bytes
        if total > self.limit_bytes:
            total = self._make_way(n_bytes)
        self._write_ledger(total)

    def give_back(self, n_bytes: int) -> None:
        """Count bytes that were not written after all. For a holder of the lock."""
        self._write_ledger(max(0, self._read_ledger() - n_bytes))

    def require(self, n_bytes: int) -> None:
        """Make sure that so many bytes can be written.

        Raises
        ------
        SettingError
            if they are more than the store may hold beside the models in use.
        NodeError
            if the disk has not so many.
        """
        with self._keeping(), self.held():
            total = self._tally()
            if total + n_bytes > self.limit_bytes:
                total = self._make_way(n_bytes) - n_bytes
            self._write_ledger(total)
            free = shutil.disk_usage(self.directory).free
        if free < n_bytes:
            raise NodeError(f"{n_bytes} bytes of weights are to be kept in {self.directory}, but {free} are free; make room on this disk")

    def keep(self, path: Path, data: bytes) -> None:
        """Write a small file beside a model's tiles, whole or not at all; it goes when they go.

        Raises
        ------
        SettingError
            if the store may hold no more, or the file cannot be written.
        """
        with self._keeping(), self.held():
            self.take(len(data))
            write_whole(path, data)

    # What follows is for a holder of the lock.

    def _make_way(self, n_bytes: int) -> int:
        """Remove models that nobody uses, the one unused for longest first, until ``n_bytes`` fit; what the store then holds with them."""
        total = self._tally() + n_bytes
        for place in self._places():
            if total <= self.limit_bytes:
                break
            self._remove(place)
            total = self._tally() + n_bytes
        if total > self.limit_bytes:
            raise SettingError(
                f"{n_bytes} bytes more would make {total} in {self.directory}, of which models in use take the rest; it may hold {self.limit_bytes}: raise its limit"
            )
        return total

    def _remove(self, place: Path) -> None:
        use = FileLock(place / _USE)
        try:
            if not use.own():
                return
            (place / _MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no model
            for path in place.iterdir():
                if path.name != _USE:
                    path.unlink()
        finally:
            use.close()
        shutil.rmtree(place)

    def _places(self) -> list[Path]:
        """The models' directories, the one unused for longest first."""
        found = [path for path in self.directory.iterdir() if _is_digest(path.name)]
        return sorted(found, key=lambda place: ((place / _USE).stat().st_mtime_ns if (place / _USE).exists() else 0, place.name))

    def _manifest(self, place: Path, digest: bytes) -> Manifest | None:
        path = place / _MANIFEST
        try:
            if path.stat().st_size <= MAX_MANIFEST_BYTES:
                return Manifest.decode(path.read_bytes(), digest)
        except (FileNotFoundError, RemoteProtocolError):
            pass  # not there, or broken on the disk: it can be had again
        return None

    def _tally(self) -> int:
        return sum(path.stat().st_size for place in self._places() for path in place.iterdir())

    def _read_ledger(self) -> int:
        self._ledger.seek(0)
        data = self._ledger.read(_SUM.size)
        return int(_SUM.unpack(data)[0]) if len(data) == _SUM.size else self._tally()

    def _write_ledger(self, total: int) -> None:
        """Remember what the files have together: counting them for every tile would take longer than writing it."""
        self._ledger.seek(0)
        self._ledger.write(_SUM.pack(total))

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SettingError(f"cannot keep weights in {self.directory}: {error}; choose another state directory, or make room") from error


def _is_digest(name: str) -> bool:
    return len(name) == 2 * DIGEST_BYTES and all(letter in "0123456789abcdef" for letter in name)
