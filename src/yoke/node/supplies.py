"""What a worker needs and gives of models' weights: its store, what it can give others, and where it gets what it lacks."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from yoke.core.errors import InvariantError
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.models.shards import EMBEDDING, Cut, shard_cuts
from yoke.net.channel import Channel
from yoke.node.fetching import StoreSource, Supplier, fetch, fetch_manifest, wanted_tiles
from yoke.node.preface import StorePreface, store_preface
from yoke.node.shelf import FileShelf, Shelf, StoreShelf, serve_pieces
from yoke.weights.gguf import GgufFile
from yoke.weights.manifest import manifest_of
from yoke.weights.pack import Pack
from yoke.weights.store import Store

Connect = Callable[[NodeId], Channel]
"""Opens a channel to another node, within a deadline of its own."""


class Supplies:
    """A worker's weights on disk.

    Parameters
    ----------
    directory : this node's own; the store and the manifests of files lie below it.
    limit_bytes : what the store may take.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory, self._limit_bytes = directory, limit_bytes
        self._turn = threading.Lock()
        self._store: Store | None = None
        self._packs: dict[bytes, Pack] = {}
        self._shelves: dict[bytes, Shelf] = {}

    def serve(self, channel: Channel) -> None:
        """Give pieces to another node until it hangs up."""
        serve_pieces(channel, self._shelves)

    def offer(self, path: Path, head_dim: int) -> None:
        """Let others fetch from a model's file, which stays open from now on.

        Raises
        ------
        ModelError
            if it is no model file, or changes while it is read.
        """
        file = GgufFile.open(path)
        manifest = manifest_of(file, head_dim, manifests(self._directory))
        if manifest.digest in self._shelves:
            file.close()
        else:
            self._shelves[manifest.digest] = FileShelf(file, manifest)

    def bring(
        self, plan: Plan, place: tuple[int, int], digest: bytes, suppliers: Sequence[Supplier], report: Callable[[int], None], stop: threading.Event
    ) -> StoreSource:
        """Have all tiles of a place in the store, those of the embedding too where the engine is, and offer them to others.

        Parameters
        ----------
        digest : of the model's manifest.
        report : is given the bytes that are here so far.
        stop : ends it when set.

        Raises
        ------
        NodeError
            if nobody gave some of them, or the disk is full.
        """
        with self._turn:
            pack = self._packs.get(digest) or self._open(digest, suppliers)
        cuts = (*shard_cuts(plan, *place), *((Cut(name=EMBEDDING),) if place == (0, 0) else ()))
        fetch(pack, wanted_tiles(pack.manifest, cuts), suppliers, report, stop)
        return StoreSource(pack)

    def preface(self, digest: bytes, source: StoreSource, suppliers: Sequence[Supplier]) -> StorePreface:
        """What the engine needs beside the tiles that were brought.

        Raises
        ------
        NodeError
            if nobody gave it.
        """
        store, pack = self._store, self._packs.get(digest)
        if store is None or pack is None:
            raise InvariantError("a preface is wanted of a model of which nothing was brought")
        return store_preface(store, pack.manifest, source, suppliers)

    def _open(self, digest: bytes, suppliers: Sequence[Supplier]) -> Pack:
        if self._store is None:
            self._store = Store(self._directory / "store", self._limit_bytes)
        manifest = self._store.manifest(digest) or fetch_manifest(digest, suppliers)
        pack = self._packs[digest] = self._store.open(manifest)
        self._shelves[digest] = StoreShelf(pack)
        return pack


def manifests(directory: Path) -> Path:
    """Where a node keeps the manifests of its model files."""
    return directory / "manifests"
