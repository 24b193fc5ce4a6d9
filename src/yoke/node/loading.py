"""Where a worker's weights come from: the model file if this machine has it, else its coordinator, slice by slice."""

import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.tensor import StoredTensor, TensorInfo
from yoke.models.shards import Cut
from yoke.node.messages import Fetch, Part
from yoke.weights.gguf import GgufFile

MAX_SLICE_BYTES = 1 << 36


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


class CoordinatorSource:
    """Slices asked for over the control connection, one at a time. ``parts`` is where the answers arrive; None there means that the connection ended."""

    def __init__(self, ask: Callable[[Fetch], None], parts: "queue.SimpleQueue[Part | None]") -> None:
        self._ask, self._parts = ask, parts

    def read(self, cut: Cut) -> StoredTensor:
        """The slice, complete.

        Raises
        ------
        NodeGone
            if the coordinator is gone.
        RemoteProtocolError
            if what it sends is not the slice.
        """
        self._ask(Fetch(name=cut.name, rows=cut.rows, columns=cut.columns))
        part = self._next(cut)
        info = part.info
        if not _is_of(info, cut):
            raise RemoteProtocolError(f"the coordinator offers {info.name!r} of shape {info.shape} for {cut.name!r}, rows {cut.rows}, columns {cut.columns}")
        if info.n_bytes > MAX_SLICE_BYTES:
            raise RemoteProtocolError(f"the coordinator offers {info.n_bytes} bytes for {cut.name!r}; expected at most {MAX_SLICE_BYTES}")
        data = bytearray(info.n_bytes)
        filled = 0
        while True:
            if part.info != info or filled + len(part.data) > len(data):
                raise RemoteProtocolError(f"the coordinator's parts of {cut.name!r} do not fit together")
            data[filled : filled + len(part.data)] = part.data
            filled += len(part.data)
            if part.is_last:
                break
            part = self._next(cut)
        if filled != len(data):
            raise RemoteProtocolError(f"the coordinator sent {filled} of {len(data)} bytes of {cut.name!r}")
        return StoredTensor(info=info, data=data)

    def release(self, cut: Cut) -> None:
        """Nothing is kept."""

    def _next(self, cut: Cut) -> Part:
        part = self._parts.get()
        if part is None:
            raise NodeGone(f"the coordinator was gone before {cut.name!r} had arrived")
        return part


def _is_of(info: TensorInfo, cut: Cut) -> bool:
    """Whether a slice has the name and the sizes that were asked for."""
    sizes = ((info.shape[0], cut.rows), (info.shape[-1], cut.columns))
    return info.name == cut.name and all(span is None or size == span[1] - span[0] for size, span in sizes)


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
