"""Where a shard's weights come from when it is loaded: the model file if this machine has it, else what is in its store."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from yoke.core.tensor import StoredTensor
from yoke.models.shards import Cut
from yoke.weights.gguf import GgufFile


class Source(Protocol):
    """Gives slices of a model's tensors."""

    def read(self, cut: Cut) -> StoredTensor:
        """One slice."""

    def release(self, cut: Cut) -> None:
        """The slice is where it belongs; its bytes here are not needed any more."""


class FileSource:
    """Slices of a mapped file. Pages that were read are given back, so that loading never holds the weights twice."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def read(self, cut: Cut) -> StoredTensor:
        """A view of the file, or a copy where columns are cut."""
        return self._file.read(cut.name, cut.rows, cut.columns)

    def release(self, cut: Cut) -> None:
        """Give the pages back."""
        self._file.release(cut.name)


def stream_weights(source: Source, cuts: Iterable[Cut], report: Callable[[int], None]) -> Iterator[StoredTensor]:
    """Slices one by one; each is released when the next is asked for. ``report`` gets the bytes delivered so far."""
    done = 0
    for cut in cuts:
        tensor = source.read(cut)
        done += tensor.info.n_bytes
        yield tensor
        del tensor
        source.release(cut)
        report(done)
