"""How messages of the control plane lie on a stream: a length (4 bytes, little-endian) and that many bytes. Does not know what is in them."""

import asyncio
import struct
from typing import BinaryIO

from yoke.core.errors import InvariantError, NodeGone, RemoteProtocolError

MAX_MESSAGE_BYTES = 16 * 1024 * 1024

READ_BYTES = 1 << 18

_LENGTH = struct.Struct("<I")


def framed(body: bytes) -> bytes:
    """A message with its length in front.

    Raises
    ------
    InvariantError
        if it is longer than `MAX_MESSAGE_BYTES`.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise InvariantError(f"a message of {len(body)} bytes; expected at most {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


def read_body(stream: BinaryIO) -> bytes | None:
    """The next message's bytes from a blocking stream; None at its end.

    Raises
    ------
    RemoteProtocolError
        if the message is too long, or the stream ends inside it.
    """
    head = stream.read(_LENGTH.size)
    if not head:
        return None
    body = stream.read(_checked_length(head))
    if len(body) != _LENGTH.unpack(head)[0]:
        raise RemoteProtocolError("the control stream ended inside a message")
    return body


class Bodies:
    """The messages of an asyncio stream. Reads as much as is there at once: a token's message is small, and each wait costs more than it."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream, self._buffer = stream, bytearray()

    async def next(self) -> bytes:
        """The next message's bytes.

        Raises
        ------
        NodeGone
            if the stream ended.
        RemoteProtocolError
            if the message is too long.
        """
        buffer = self._buffer
        while True:
            if len(buffer) >= _LENGTH.size:
                end = _LENGTH.size + _checked_length(buffer[: _LENGTH.size])
                if len(buffer) >= end:
                    body = bytes(buffer[_LENGTH.size : end])
                    del buffer[:end]
                    return body
            try:
                data = await self._stream.read(READ_BYTES)
            except OSError as error:
                raise NodeGone(f"the control connection ended: {error}") from error
            if not data:
                raise NodeGone("the control connection ended")
            buffer += data


def _checked_length(head: bytes | bytearray) -> int:
    if len(head) != _LENGTH.size:
        raise RemoteProtocolError("the control stream ended inside a message")
    (length,) = _LENGTH.unpack(head)
    if length > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a control message claims {length} bytes; expected at most {MAX_MESSAGE_BYTES}")
    return int(length)
