"""Locks on files, between processes: many share one, or one owner has it alone. A lock ends with its process, however that ends.

Advisory: they bind only those who ask. Knows what each system has for it; does not know what is protected.
"""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Windows locks bytes, each for one holder alone: a sharer takes any one of these, an owner takes all. They lie far behind what the files hold.
_FIRST_BYTE = 1 << 30
_SHARERS = 64


class FileLock:
    """A lock on one file, which is made if it is not there. Nothing is locked at first.

    Two locks on one file exclude each other within one process too. Not for several threads at once.

    Raises
    ------
    OSError
        if the file cannot be opened; from the methods, if its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._held = (0, 0)

    def own(self) -> bool:
        """Take it alone, if nobody else has it: whether that worked."""
        if sys.platform == "win32":
            return self._take(_FIRST_BYTE, _SHARERS)
        return self._flock(fcntl.LOCK_EX)

    def share(self) -> bool:
        """Take it beside others, if nobody owns it: whether that worked. An owner becomes a sharer; then others may come in between."""
        if sys.platform == "win32":
            self.release()
            return any(self._take(_FIRST_BYTE + place, 1) for place in range(_SHARERS))
        return self._flock(fcntl.LOCK_SH)

    def release(self) -> None:
        """Let it go."""
        if sys.platform == "win32":
            start, length = self._held
            if length:
                os.lseek(self._descriptor, start, os.SEEK_SET)
                msvcrt.locking(self._descriptor, msvcrt.LK_UNLCK, length)
                self._held = (0, 0)
        else:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let it go, and give the descriptor back. Closing twice does nothing."""
        if self._descriptor >= 0:
            self.release()
            os.close(self._descriptor)
            self._descriptor = -1

    if sys.platform == "win32":

        def _take(self, start: int, length: int) -> bool:
            os.lseek(self._descriptor, start, os.SEEK_SET)
            try:
                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, length)
            except PermissionError:
                return False
            self._held = (start, length)
            return True

    else:

        def _flock(self, kind: int) -> bool:
            try:
                fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
