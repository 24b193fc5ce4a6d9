"""Bringing the tiles of a shard into this node's store, from everybody who has some, and reading slices of tensors from there.

A thread for each source asks for tiles, receives them and puts them into the store, which checks them. Who is asked for what is decided in
`yoke.node.allotment`. What has come stays, so that a second attempt asks only for the rest, and a second start for nothing.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from yoke.core.errors import NodeError, NodeGone, RemoteProtocolError
from yoke.core.tensor import StoredTensor, TensorInfo
from yoke.models.shards import Cut
from yoke.net.channel import Channel, send_message
from yoke.net.codec import Hello, Purpose
from yoke.net.pieces import Want, ask_have, ask_tiles, ask_whole, receive_tile
from yoke.node.allotment import Allotment, Pace
from yoke.weights.gguf import header_digest
from yoke.weights.gguf_header import MAX_HEADER_BYTES
from yoke.weights.manifest import MAX_MANIFEST_BYTES, Manifest
from yoke.weights.pack import Pack
from yoke.weights.tiles import MOST_TILE_BYTES, Grid, Range

PieceT = TypeVar("PieceT")

ANSWER_S = 30.0
"""How long a source may take for one tile, or for the manifest's next part; then it counts as gone."""

LOOK_S = 0.1
"""How often the caller is told of progress, and those who wait look whether there is something for them."""

FRUITLESS = 2
"""Connections in a row that ended before they brought a tile: then a source is not asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Supplier:
    """Somebody who may have tiles.

    ``name`` is for people, and another for each. ``open`` makes a new connection whenever it is called, without a hello, within a deadline of its own.
    ``is_last_resort`` is for the coordinator: it is asked for what nobody else has, or when the others are too slow.
    """

    name: str
    open: Callable[[], Channel]
    is_last_resort: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What was brought: bytes of tiles by the name of who brought them, bytes that came twice, and what was wrong with whom."""

    by_supplier: Mapping[str, int]
    wasted_bytes: int
    faults: Mapping[str, str]


def wanted_tiles(manifest: Manifest, cuts: Iterable[Cut]) -> list[int]:
    """The tiles that hold these slices, ascending.

    Raises
    ------
    ModelError
        if the model has no such tensor or slice.
    """
    return sorted({tile_id for cut in cuts for tile_id in manifest.layout.grid(cut.name).cover(cut.rows, cut.columns)})


def fetch_manifest(digest: bytes, suppliers: Sequence[Supplier]) -> Manifest:
    """The manifest of the model with this digest, from the first of ``suppliers`` who has it.

    Raises
    ------
    NodeError
        if nobody has it: what each of them said.
    """
    return _fetch_whole(Want.MANIFEST, digest, MAX_MANIFEST_BYTES, suppliers, lambda data: Manifest.decode(data, digest))


def fetch_header(manifest: Manifest, suppliers: Sequence[Supplier]) -> bytes:
    """The header of the model's file, without the size in front, from the last resort among ``suppliers``, or else the first who has it.

    Raises
    ------
    NodeError
        if nobody has the right one: what each of them said.
    """

    def checked(data: bytes) -> bytes:
        if header_digest(data) != manifest.header:
            raise RemoteProtocolError("gave a header that is not the model's")
        return data[8:]

    whoever = [supplier for supplier in suppliers if supplier.is_last_resort] or suppliers  # the coordinator has the file
    return _fetch_whole(Want.HEADER, manifest.digest, MAX_HEADER_BYTES, whoever, checked)


def _fetch_whole(want: Want, digest: bytes, most_bytes: int, suppliers: Sequence[Supplier], checked: Callable[[bytes], PieceT]) -> PieceT:
    faults: dict[str, str] = {}
    for supplier in suppliers:
        try:
            with _greeted(supplier.open()) as channel:
                data = ask_whole(channel, want, digest, most_bytes)
                if data is not None:
                    return checked(data)
                faults[supplier.name] = "does not have this model"
        except NodeError as error:
            faults[supplier.name] = str(error)
    raise NodeError(f"nobody gave the {want.name.lower()} of model {digest.hex()[:12]}: {_told(faults) or 'there was nobody to ask'}")


def fetch(
    pack: Pack, ids: Sequence[int], suppliers: Sequence[Supplier], report: Callable[[int], None], stop: threading.Event, pace: Pace | None = None
) -> Fetched:
    """Bring tiles into ``pack`` that are not there yet, and have the disk write them. Opens no connection if all are there.

    Parameters
    ----------
    pack : where they go; it has the model's manifest, and checks them.
    ids : of the tiles.
    suppliers : whom to ask, a thread each. Those still connecting when all is here go away by themselves.
    report : is given the bytes of ``ids`` that are here, in this thread, about every `LOOK_S`; what it raises ends the fetching.
    stop : ends it when set.
    pace : when others help out.

    Returns
    -------
    Who brought how much, and who is at fault; a supplier at fault was not asked again.

    Raises
    ------
    NodeGone
        if it was stopped.
    NodeError
        if tiles are missing that nobody gave (which, and what each supplier said), or the disk is full or fails.
    SettingError
        if the store may hold no more.
    """
    missing = pack.missing(ids)
    total = sum(map(pack.size, ids))
    sizes = {tile_id: pack.size(tile_id) for tile_id in missing}
    if not missing:
        report(total)
        return Fetched(by_supplier={}, wasted_bytes=0, faults={})
    pack.make_room(missing)
    errand = _Errand(pack, sizes, suppliers, pace)
    errand.run(lambda left_bytes: report(total - left_bytes), stop)
    pack.sync()
    return errand.outcome()


class _Errand:
    """One call of `fetch`: its threads and what they share, under ``_changed``."""

    def __init__(self, pack: Pack, sizes: Mapping[int, int], suppliers: Sequence[Supplier], pace: Pace | None) -> None:
        self._pack, self._sizes, self._suppliers = pack, sizes, suppliers
        self._changed = threading.Condition()
        self._allotment = Allotment(sizes, tuple(supplier.is_last_resort for supplier in suppliers), time.monotonic(), pace)
        self._faults: dict[str, str] = {}
        self._channels: dict[int, Channel] = {}
        self._left_bytes = sum(sizes.values())
        self._is_over = not suppliers

    def run(self, report: Callable[[int], None], stop: threading.Event) -> None:
        """Bring the tiles; ``report`` is given the bytes that are still missing."""
        pool = ThreadPoolExecutor(max_workers=max(1, len(self._suppliers)), thread_name_prefix="yoke-fetch")
        jobs = [pool.submit(self._bring, place) for place in range(len(self._suppliers))]
        for job in jobs:
            job.add_done_callback(self._look)
        try:
            while not self._is_over:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_over, LOOK_S)
                report(self._left_bytes)
                if stop.is_set():
                    raise NodeGone("stopped while fetching weights")
        finally:
            self._end(jobs)
            pool.shutdown(wait=False)
        for job in jobs:
            if job.done():
                job.result()  # raises what is nobody's fault: the store has no room, or its disk failed
        if self._left_bytes:
            raise NodeError(self._lament())

    def outcome(self) -> Fetched:
        """Who did what."""
        brought = {supplier.name: self._allotment.done_bytes(place) for place, supplier in enumerate(self._suppliers)}
        return Fetched(by_supplier=brought, wasted_bytes=self._allotment.wasted_bytes, faults=dict(self._faults))

    def _look(self, job: "Future[None]") -> None:
        """A thread has ended; if that was not foreseen, all do."""
        with self._changed:
            self._is_over = self._is_over or self._allotment.is_over or job.exception() is not None
            self._changed.notify_all()

    def _end(self, jobs: Sequence["Future[None]"]) -> None:
        """Close what is open, and wait for the threads behind it; who is still connecting finds out by itself."""
        with self._changed:
            self._is_over = True
            channels = dict(self._channels)
            self._changed.notify_all()
        for channel in channels.values():
            channel.close()
        wait([jobs[place] for place in channels])

    def _bring(self, place: int) -> None:
        """One supplier's thread: connect and bring tiles, and again if the connection ended after it was good for something."""
        supplier, fruitless = self._suppliers[place], 0
        while not self._is_over:
            before = self._allotment.done_bytes(place)
            try:
                channel = supplier.open()
            except NodeError as error:
                self._forsake(place, error, is_final=True)
                return
            try:
                with self._enlisted(place, channel), _greeted(channel):
                    self._draw(place, channel)
            except NodeGone as error:
                fruitless = fruitless + 1 if self._allotment.done_bytes(place) == before else 0
                self._forsake(place, error, is_final=fruitless == FRUITLESS)
                if fruitless == FRUITLESS:
                    return
            except RemoteProtocolError as error:
                self._forsake(place, error, is_final=True)
                return

    def _draw(self, place: int, channel: Channel) -> None:
        """Bring tiles over one connection until all is over."""
        pack, asked = self._pack, deque[int]()
        bitmap = ask_have(channel, pack.manifest.digest, pack.manifest.layout.n_tiles)
        if bitmap is None:
            raise RemoteProtocolError("does not have this model")
        with self._changed:
            self._allotment.offer(place, bitmap)
            self._settle()
        room = memoryview(bytearray(MOST_TILE_BYTES))
        while not self._is_over:
            with self._changed:
                ids = self._allotment.take(place, time.monotonic())
                if not ids and not asked:
                    self._changed.wait(LOOK_S)
                    continue
            if ids:
                ask_tiles(channel, pack.manifest.digest, ids)
                asked.extend(ids)
            tile_id = asked.popleft()
            data = room[: self._sizes[tile_id]]
            is_there = receive_tile(channel, tile_id, data)
            if is_there:
                pack.add(tile_id, data)
            with self._changed:
                if not is_there:
                    self._allotment.lacks(place, tile_id)
                elif self._allotment.arrived(place, tile_id, time.monotonic()):
                    self._left_bytes -= len(data)
                self._settle()

    def _forsake(self, place: int, error: NodeError, *, is_final: bool) -> None:
        """A supplier's connection is gone; for good, if that ``is_final``."""
        with self._changed:
            if not self._is_over:
                self._allotment.drop(place, is_coming_back=not is_final)
                if is_final:
                    self._faults[self._suppliers[place].name] = str(error)
                self._settle()

    def _settle(self) -> None:
        if self._allotment.is_over:
            self._is_over = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def _enlisted(self, place: int, channel: Channel) -> Iterator[None]:
        """Let `_end` close the channel as long as it is used."""
        with self._changed:
            if self._is_over:
                channel.close()
            self._channels[place] = channel
        try:
            yield
        finally:
            with self._changed:
                del self._channels[place]

    def _lament(self) -> str:
        missing = sorted(self._allotment.left)
        first = self._pack.manifest.layout.tile(missing[0]).name
        faults = {supplier.name: self._faults.get(supplier.name, "does not have what is missing") for supplier in self._suppliers}
        return (
            f"{len(missing)} of {len(self._sizes)} tiles ({self._left_bytes} bytes) of model {self._pack.manifest.digest.hex()[:12]} are missing, the first of "
            f"them of {first}: {_told(faults) or 'there was nobody to ask'}. What came is kept; start again when somebody has the rest"
        )


class StoreSource:
    """Slices of tensors from tiles in the store: a `yoke.node.loading.Source`. Holds one slice at a time, the one that it gives."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    def read(self, cut: Cut) -> StoredTensor:
        """The slice: a view of the store where its tiles lie there in order, else put together from them.

        Raises
        ------
        ModelError
            if the model has no such tensor or slice.
        NodeError
            if a tile of it is not in the store.
        """
        grid = self._pack.manifest.layout.grid(cut.name)
        kind, shape = grid.info.type, grid.info.shape
        (start, stop), (left, right) = grid.area(cut.rows, cut.columns)
        ids = grid.cover(cut.rows, cut.columns)
        if missing := [tile_id for tile_id in ids if not self._pack.holds(tile_id)]:
            raise NodeError(f"{len(missing)} tiles of {cut.name!r} are not in this node's store; expected the whole slice: fetch it first")
        n_first = (stop - start) * shape[0] // grid.n_rows
        part = TensorInfo(name=cut.name, type=kind, shape=(n_first, *shape[1:-1], right - left) if len(shape) > 1 else (right - left,))
        if (left, right) == (0, shape[-1]) and grid.n_stripes == 1 and (run := self._pack.read_run(ids)) is not None:
            row_bytes, first = kind.row_bytes(right), grid.tile(ids[0]).rows[0]
            return StoredTensor(info=part, data=run[(start - first) * row_bytes : (stop - first) * row_bytes])
        return StoredTensor(info=part, data=self._gathered(grid, ids, (start, stop), (left, right)))

    def _gathered(self, grid: Grid, ids: Sequence[int], rows: Range, columns: Range) -> memoryview:
        """The part of an area that each tile has, put where it belongs."""
        row_bytes = grid.info.type.row_bytes
        whole = np.empty((rows[1] - rows[0], row_bytes(columns[1] - columns[0])), dtype=np.uint8)
        for tile_id in ids:
            tile, data = grid.tile(tile_id), self._pack.read(tile_id)
            if data is None:
                raise NodeError(f"tile {tile_id} of {tile.name!r} has gone from this node's store; fetch it again")
            low, high = max(rows[0], tile.rows[0]), min(rows[1], tile.rows[1])
            near, far = max(columns[0], tile.columns[0]), min(columns[1], tile.columns[1])
            held = np.frombuffer(data, dtype=np.uint8).reshape(tile.rows[1] - tile.rows[0], -1)[low - tile.rows[0] : high - tile.rows[0]]
            target = whole[low - rows[0] : high - rows[0], row_bytes(near - columns[0]) : row_bytes(far - columns[0])]
            target[:] = held[:, row_bytes(near - tile.columns[0]) : row_bytes(far - tile.columns[0])]
        return whole.reshape(-1).data

    def release(self, cut: Cut) -> None:
        """Give the pages of its tiles back."""
        self._pack.release(self._pack.manifest.layout.grid(cut.name).cover(cut.rows, cut.columns))


@contextlib.contextmanager
def _greeted(channel: Channel) -> Iterator[Channel]:
    """A connection whose hello is said; closed at the end."""
    with contextlib.closing(channel):
        channel.set_timeout(ANSWER_S)
        send_message(channel, Hello(plan_version=0, purpose=Purpose.WEIGHTS, stage=0, rank=0))
        yield channel


def _told(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in faults.items())
