"""What a node can give of a model: all of it where the file is, else what its store has. And how it gives that to whoever asks."""

import threading
from collections.abc import Mapping
from typing import Protocol, assert_never

from yoke.core.errors import ModelError
from yoke.net.channel import Channel
from yoke.net.pieces import Want, receive_request, send_answer
from yoke.weights.gguf import GgufFile
from yoke.weights.manifest import Manifest, tile_bytes
from yoke.weights.pack import Pack

RECENT = 4
"""Tensors whose pages a shelf leaves in memory: clients that are at different ones do not take them from each other."""

QUIET_S = 60.0
"""How long a connection may bring no request, or take no answer, before it is closed: a client that still needs something opens another."""


class Shelf(Protocol):
    """Some or all tiles of one model. For several threads at once."""

    @property
    def manifest(self) -> Manifest:
        """The model's."""

    @property
    def header(self) -> bytes | None:
        """`GgufFile.header` of the model's file, or None if it is not here."""

    def bitmap(self) -> bytes:
        """One bit for each tile, the lowest bit of each byte first: whether it is here."""

    def read(self, tile_id: int) -> memoryview | None:
        """A tile's bytes, or None if it is not here."""


class FileShelf:
    """All tiles of a model whose file is here. The file must stay open as long as the shelf is used.

    Raises
    ------
    ModelError
        if the manifest is another file's.
    """

    def __init__(self, file: GgufFile, manifest: Manifest) -> None:
        if manifest.header.hex() != file.digest:
            raise ModelError(f"{file.path} is not the file of model {manifest.digest.hex()[:12]}; make its manifest anew")
        self._file, self._manifest, self._header = file, manifest, file.header  # once, however many ask
        self._turn = threading.Lock()
        self._recent: list[str] = []

    @property
    def manifest(self) -> Manifest:
        """The model's."""
        return self._manifest

    @property
    def header(self) -> bytes:
        """The file's."""
        return self._header

    def bitmap(self) -> bytes:
        """All ones, as far as there are tiles."""
        n_bytes, rest = divmod(self._manifest.layout.n_tiles, 8)
        return b"\xff" * n_bytes + (bytes([(1 << rest) - 1]) if rest else b"")

    def read(self, tile_id: int) -> memoryview | None:
        """A tile's bytes: a view of the file, or a copy where it is a stripe. None for what is no tile.

        Pages are given back when some other tensors were asked for, so that a node that gives a model does not come to hold it in memory.
        """
        if not 0 <= tile_id < self._manifest.layout.n_tiles:
            return None
        tile = self._manifest.layout.tile(tile_id)
        with self._turn:
            recent = [*(name for name in self._recent if name != tile.name), tile.name]
            old, self._recent = recent[:-RECENT], recent[-RECENT:]
        for name in old:
            self._file.release(name)
        return tile_bytes(self._file, tile)


class StoreShelf:
    """The tiles of a model that are in the store; none any more once the pack is closed."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack

    @property
    def manifest(self) -> Manifest:
        """The model's."""
        return self._pack.manifest

    @property
    def header(self) -> None:
        """Not kept here: a vocabulary is asked for by one node alone."""

    def bitmap(self) -> bytes:
        """What is here now."""
        return self._pack.bitmap()

    def read(self, tile_id: int) -> memoryview | None:
        """A view of the pack, or None."""
        return self._pack.read(tile_id)


def serve_pieces(channel: Channel, shelves: Mapping[bytes, Shelf]) -> None:
    """Answer requests for pieces until the client is gone. Follows the hello; does not close the channel.

    Parameters
    ----------
    shelves : by the digest of the model; looked at with every request, so that it may change meanwhile.

    Raises
    ------
    NodeGone
        when the connection ends, which is how this always ends unless the client breaks a rule.
    RemoteProtocolError
        if it sends what is no request.
    """
    channel.set_timeout(QUIET_S)
    while True:
        request = receive_request(channel)
        shelf = shelves.get(request.model)
        match request.want:
            case Want.MANIFEST:
                send_answer(channel, Want.MANIFEST, shelf.manifest.encode() if shelf is not None else None)
            case Want.HEADER:
                send_answer(channel, Want.HEADER, shelf.header if shelf is not None else None)
            case Want.HAVE:
                send_answer(channel, Want.HAVE, shelf.bitmap() if shelf is not None else None)
            case Want.TILES:
                for tile_id in request.ids:
                    send_answer(channel, tile_id, shelf.read(tile_id) if shelf is not None else None)
            case _:
                assert_never(request.want)
