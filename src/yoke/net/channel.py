"""What every channel promises, and whole messages over it. Knows the wire format; does not know what carries the bytes."""

from typing import Protocol

from yoke.core.node import NodeId
from yoke.net.codec import HEADER_BYTES, Buffer, Limits, Message, decode, encode, read_header


class Channel(Protocol):
    """An ordered, reliable, bounded stream of bytes to one authenticated peer. Blocking.

    One thread may send while another receives. Whatever ends the connection ends the channel: every call from then on raises `NodeGone`. What the peer had
    sent before it closed can still be received.
    """

    @property
    def peer(self) -> NodeId:
        """Who is at the other end."""

    def send(self, *buffers: Buffer) -> None:
        """Send the concatenation of ``buffers``. Waits while the peer does not read; does not keep the buffers.

        Raises
        ------
        NodeGone
            if the connection ended, or the timeout passed.
        """

    def receive_into(self, view: memoryview) -> None:
        """Fill ``view`` (contiguous, writable) with the next bytes from the peer, exactly.

        Raises
        ------
        NodeGone
            if the connection ended before that, or the timeout passed.
        """

    def await_bytes(self) -> bool:
        """Wait until there is something to receive, or the connection has ended: True. False if `nudge` was called since the last call of this.

        For the thread that receives.
        """

    def nudge(self) -> None:
        """Let `await_bytes` return, now or at its next call. From any thread; does nothing on an ended channel."""

    def set_timeout(self, seconds: float | None) -> None:
        """Let later calls wait at most ``seconds`` each; None means for ever. A call that waited too long ends the channel."""

    def close(self) -> None:
        """End the channel, from any thread; calls that wait in other threads raise `NodeGone`. Closing twice does nothing."""


def send_message(channel: Channel, message: Message) -> None:
    """Send one message.

    Raises
    ------
    NodeGone
        if the connection ended.
    InvariantError
        if the message cannot be encoded.
    """
    channel.send(*encode(message))


def receive_message(channel: Channel, limits: Limits) -> Message:
    """Receive one message. Room for the body is made only after the header kept ``limits``; a frame's hidden state is a view of that room.

    Raises
    ------
    NodeGone
        if the connection ended.
    RemoteProtocolError
        if the peer sent what the protocol or ``limits`` forbid. The stream cannot be read on after that: close the channel.
    """
    head = bytearray(HEADER_BYTES)
    channel.receive_into(memoryview(head))
    header = read_header(head, limits)
    body = bytearray(header.body_bytes)
    if body:
        channel.receive_into(memoryview(body))
    return decode(header, body)
