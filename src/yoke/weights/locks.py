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
        return self._take(is_shared=False)

    def share(self) -> bool:
        """Take it beside others, if nobody owns it: whether that worked. An owner becomes a sharer; others may come in between."""
        return self._take(is_shared=True)

    def close(self) -> None:
        """Let it go, and give the descriptor back. Closing twice does nothing."""
        if self._descriptor >= 0:
            self.release()
            os.close(self._descriptor)
            self._descriptor = -1

    if sys.platform == "win32":

        def release(self) -> None:
            """Let it go."""
            start, length = self._held
            if length:
                os.lseek(self._descriptor, start, os.SEEK_SET)
                msvcrt.locking(self._descriptor, msvcrt.LK_UNLCK, length)
                self._held = (0, 0)

        def _take(self, *, is_shared: bool) -> bool:
            self.release()
            spans = [(_FIRST_BYTE + place, 1) for place in range(_SHARERS)] if is_shared else [(_FIRST_BYTE, _SHARERS)]
            for span in spans:
                os.lseek(self._descriptor, span[0], os.SEEK_SET)
                try:
                    msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, span[1])
                except PermissionError:
                    continue
                self._held = span
                return True
            return False

    else:

        def release(self) -> None:
            """Let it go."""
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

        def _take(self, *, is_shared: bool) -> bool:
            try:
                fcntl.flock(self._descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
