"""Pieces of a model over a channel: manifests, headers, who has what, and tiles. Requests go one way, answers the other, in the order of the requests.

Knows digests, tile numbers and bytes; does not know what a tile is, or whether it is right. Follows a hello of purpose ``weights``. Everything announced is
held against a bound before room for it is made. The format is written down in docs/protocol.md.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from yoke.core.errors import InvariantError, RemoteProtocolError
from yoke.net.channel import Channel
from yoke.net.codec import Buffer

DIGEST_BYTES: Final = 32
MAX_IDS: Final = 1024
"""Tiles in one request: its 4 KB fit into any buffer, so that a client may send a request before it has read the answer to the last one."""

# kind, reserved, reserved, ids, the model's digest
_REQUEST = struct.Struct(f"<BBHI{DIGEST_BYTES}s")
# the request's kind, or the tile's id; bytes that follow
_ANSWER = struct.Struct("<II")
REQUEST_BYTES: Final = _REQUEST.size
ANSWER_BYTES: Final = _ANSWER.size

_STEP_BYTES: Final = 1 << 20


class Want(IntEnum):
    """What a request is for."""

    MANIFEST = 1
    """The model's manifest."""
    HAVE = 2
    """Which of its tiles the server has."""
    TILES = 3
    """These tiles."""
    HEADER = 4
    """The header of the model's file."""


_WANTS = {int(want): want for want in Want}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: of the model with this digest, and for tiles, which ones.

    Raises
    ------
    InvariantError
        if the digest has another length than 32 bytes, there are ids where no tiles are wanted, or none or more than `MAX_IDS` where they are.
    """

    want: Want
    model: bytes
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.model) != DIGEST_BYTES:
            raise InvariantError(f"a request for a model with a digest of {len(self.model)} bytes; expected {DIGEST_BYTES}")
        if bool(self.ids) != (self.want is Want.TILES) or len(self.ids) > MAX_IDS:
            raise InvariantError(f"a request for {self.want.name.lower()} with {len(self.ids)} tiles; expected 1 to {MAX_IDS} for tiles, else none")


def encode_request(request: Request) -> bytes:
    """A request on the wire.

    Raises
    ------
    InvariantError
        if an id does not fit its field.
    """
    n = len(request.ids)
    try:
        return _REQUEST.pack(request.want, 0, 0, n, request.model) + struct.pack(f"<{n}I", *request.ids)
    except struct.error as error:
        raise InvariantError(f"a tile's number does not fit its field on the wire: {error}") from error


def read_request_head(data: Buffer) -> tuple[Want, int, bytes]:
    """What the first `REQUEST_BYTES` of a request say: what is wanted, how many ids of 4 bytes follow, and the model.

    Raises
    ------
    RemoteProtocolError
        if the bytes are no request, or announce more than is allowed.
    """
    if len(data) != REQUEST_BYTES:
        raise RemoteProtocolError(f"a request of {len(data)} bytes; expected {REQUEST_BYTES}")
    number, reserved, also_reserved, n_ids, model = _REQUEST.unpack(data)
    want = _WANTS.get(number)
    if want is None or reserved or also_reserved:
        raise RemoteProtocolError(f"a request of kind {number} with reserved bytes {reserved} and {also_reserved}; expected kind 1 to {len(Want)} and 0")
    if bool(n_ids) != (want is Want.TILES) or n_ids > MAX_IDS:
        raise RemoteProtocolError(f"a request for {want.name.lower()} with {n_ids} tiles; expected 1 to {MAX_IDS} for tiles, else none")
    return want, n_ids, model


def read_answer_head(data: Buffer, expected: int, n_bytes: int, *, is_exact: bool) -> int:
    """How many bytes follow the head of an answer: 0 if the server has not what was asked for.

    Parameters
    ----------
    expected : the kind of the request, or the id of the tile, that is answered next.
    n_bytes : that an answer has; or has at most, unless ``is_exact``.

    Raises
    ------
    RemoteProtocolError
        if it is the answer to something else, or has another length.
    """
    if len(data) != ANSWER_BYTES:
        raise RemoteProtocolError(f"an answer's head of {len(data)} bytes; expected {ANSWER_BYTES}")
    number, announced = _ANSWER.unpack(data)
    if number != expected:
        raise RemoteProtocolError(f"an answer about {number} came; expected one about {expected}")
    if announced and (announced > n_bytes or (is_exact and announced != n_bytes)):
        raise RemoteProtocolError(f"an answer of {announced} bytes; expected {'' if is_exact else 'at most '}{n_bytes}, or none")
    return int(announced)


# The client's side.


def ask_whole(channel: Channel, want: Want, model: bytes, most_bytes: int) -> bytes | None:
    """A model's manifest, or its file's header, unchecked; None if the server has it not. Room is made as it comes.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    RemoteProtocolError
        if what came is no answer, or longer than ``most_bytes``.
    """
    channel.send(encode_request(Request(want=want, model=model)))
    left = read_answer_head(_receive(channel, ANSWER_BYTES), want, most_bytes, is_exact=False)
    if not left:
        return None
    data = bytearray()
    while left:
        data += _receive(channel, min(left, _STEP_BYTES))
        left -= min(left, _STEP_BYTES)
    return bytes(data)


def ask_have(channel: Channel, model: bytes, n_tiles: int) -> bytes | None:
    """Which tiles the server has: a bit for each of the model's ``n_tiles``, the lowest of each byte first; None if it does not know this model.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    RemoteProtocolError
        if what came is no answer.
    """
    channel.send(encode_request(Request(want=Want.HAVE, model=model)))
    n_bytes = read_answer_head(_receive(channel, ANSWER_BYTES), Want.HAVE, -(-n_tiles // 8), is_exact=True)
    return bytes(_receive(channel, n_bytes)) if n_bytes else None


def ask_tiles(channel: Channel, model: bytes, ids: Sequence[int]) -> None:
    """Ask for tiles; :func:`receive_tile` then gives one after the other, in this order.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    """
    channel.send(encode_request(Request(want=Want.TILES, model=model, ids=tuple(ids))))


def receive_tile(channel: Channel, tile_id: int, room: memoryview) -> bool:
    """The tile that was asked for next, into ``room``, which is as long as it; False if the server has it not.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    RemoteProtocolError
        if what came is not an answer about this tile, or not as long.
    """
    n_bytes = read_answer_head(_receive(channel, ANSWER_BYTES), tile_id, len(room), is_exact=True)
    if n_bytes:
        channel.receive_into(room)
    return bool(n_bytes)


# The server's side.


def receive_request(channel: Channel) -> Request:
    """The next request.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    RemoteProtocolError
        if what came is no request. The stream cannot be read on after that: close the channel.
    """
    want, n_ids, model = read_request_head(_receive(channel, REQUEST_BYTES))
    ids = struct.unpack(f"<{n_ids}I", _receive(channel, 4 * n_ids)) if n_ids else ()
    return Request(want=want, model=model, ids=ids)


def send_answer(channel: Channel, number: int, data: Buffer | None) -> None:
    """Answer a request of kind ``number``, or for the tile ``number``; None says that it is not here. Long data is not copied.

    Raises
    ------
    NodeGone
        if the connection ended, or the timeout passed.
    """
    if data is None:
        channel.send(_ANSWER.pack(number, 0))
    else:
        channel.send(_ANSWER.pack(number, len(data)), data)


def _receive(channel: Channel, n_bytes: int) -> bytearray:
    data = bytearray(n_bytes)
    channel.receive_into(memoryview(data))
    return data
