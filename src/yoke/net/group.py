"""Collectives: what the ranks of one stage do together. Knows arrays and channels; does not know what is summed.

All ranks make the same calls, in the same order, with arrays of the same length: nothing on the wire says which call a byte belongs to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from yoke.core.errors import InvariantError
from yoke.net.channel import Channel

Float32 = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]

CHUNK_BYTES = 1 << 16
"""What a rank sends to each peer before it reads from any.

Why no group can deadlock, although every rank sends before it receives: let k be the lowest chunk number that any rank is at. If such a rank waits to send
chunk k to a peer, that peer is at chunk k or later, so it has read everything up to chunk k - 1: at most one chunk, this one, lies between them. A
connection's buffers hold more than that (`yoke.net.tcp` asks for 1 MiB each way, of which Linux grants 416 KiB by default; a memory channel holds 1 MiB), so
no send at k waits for ever. If it waits to receive chunk k from a peer, that peer has sent it, or is itself at k and sending, which ends. So the lowest rank
always advances.
"""

_BLOCK = 32
_BLOCK_TYPE = np.dtype([("scale", "<f2"), ("values", "i1", (_BLOCK,))])
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


class WireType(StrEnum):
    """How contributions travel. All but float32 round: then a rank's own contribution is rounded as well, and all ranks still get the same bits."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    """Half the bytes; values beyond 65504 are clipped to it."""
    Q8_0 = "q8_0"
    """About a quarter of the bytes: blocks of 32 values, a float16 scale and 32 int8 each."""


class Group(Protocol):
    """Ranks that make the same collective calls in the same order. One of size one does nothing."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def rank(self) -> int:
        """Which of them this is, counted from 0."""

    @property
    def collective_s(self) -> float:
        """Seconds spent in `all_reduce` and `gather` so far, waiting for peers included."""

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all peers so far, encryption not counted."""

    def all_reduce(self, view: Float32) -> None:
        """Replace ``view`` (float32, one dim, contiguous; the same length on all ranks) by its sum over all ranks, the same bits on every rank.

        Raises
        ------
        NodeGone
            if a rank is gone; ``view`` is then of no use. Close the group, so that the others need not wait for this rank.
        """

    def gather(self, view: Float32, lengths: tuple[int, ...]) -> list[Float32] | None:
        """Rank 0 gets everybody's ``view`` in rank order, others None. ``lengths``, the same on all ranks, has one entry a rank; 0 is allowed.

        The arrays are valid until the next call of the group.

        Raises
        ------
        NodeGone
            if a rank is gone.
        """

    def close(self) -> None:
        """Close the channels to all peers; they get `NodeGone`."""


class SoloGroup:
    """The group of one rank: every sum is there already."""

    size = 1
    rank = 0
    collective_s = 0.0
    bytes_sent = 0

    def all_reduce(self, view: Float32) -> None:
        """Leave ``view`` as it is."""

    def gather(self, view: Float32, lengths: tuple[int, ...]) -> list[Float32] | None:
        """``view`` alone."""
        _check_lengths(view, lengths, 1, 0)
        return [view]

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """What an all-reduce of one length needs: for each rank, where its contribution arrives as bytes, and as the wire's elements. None for this rank itself."""

    wire_bytes: int
    chunks: tuple[tuple[int, int], ...]
    arrivals: tuple[tuple[Channel, memoryview], ...]
    contributions: tuple[npt.NDArray[Any] | None, ...]


class ChannelGroup:
    """A group over one channel to every other rank: each sends its whole contribution to all others, and sums what it got in rank order.

    That takes one trip of the network, which is what counts at the sizes of decoding (some KiB) and for the few ranks that a stage has.

    Parameters
    ----------
    rank : this rank.
    channels : the channels to all other ranks, by rank; the group owns them.
    wire : how contributions travel, the same on all ranks.
    """

    def __init__(self, rank: int, channels: Mapping[int, Channel], wire: WireType = WireType.FLOAT32) -> None:
        size = len(channels) + 1
        if set(channels) | {rank} != set(range(size)) or rank in channels:
            raise InvariantError(f"rank {rank} has channels to ranks {sorted(channels)}; expected every rank from 0 to {size - 1} but its own")
        self._rank = rank
        self._size = size
        self._channels = dict(sorted(channels.items()))
        self._peers = tuple(self._channels.values())
        self._wire = wire
        self._exchanges: dict[int, _Exchange] = {}
        self._room: dict[int, Raw] = {peer: np.empty(0, np.uint8) for peer in self._channels}
        self._collective_s = 0.0
        self._bytes_sent = 0

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._size

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return self._rank

    @property
    def collective_s(self) -> float:
        """Seconds spent in `all_reduce` and `gather` so far, waiting for peers included."""
        return self._collective_s

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to all peers so far, encryption not counted."""
        return self._bytes_sent

    def all_reduce(self, view: Float32) -> None:
        """Replace ``view`` (float32, one dim, contiguous) by its sum over all ranks, the same bits on every rank.

        Raises
        ------
        NodeGone
            if a rank is gone; ``view`` is then of no use. Close the group, so that the others need not wait for this rank.
        """
        started = perf_counter()
        _check(view)
        if not view.size:
            return
        exchange = self._exchanges.get(view.size) or self._prepare(view.size)
        outgoing = _pack(view, self._wire)
        for start, stop in exchange.chunks:
            part = outgoing[start:stop]
            for channel in self._peers:
                channel.send(part)
            for channel, arrival in exchange.arrivals:
                channel.receive_into(arrival[start:stop])
        self._sum(view, exchange)
        self._bytes_sent += exchange.wire_bytes * len(self._peers)
        self._collective_s += perf_counter() - started

    def gather(self, view: Float32, lengths: tuple[int, ...]) -> list[Float32] | None:
        """Rank 0 gets everybody's ``view`` in rank order, others None; always as float32, whatever the wire type.

        Raises
        ------
        NodeGone
            if a rank is gone.
        """
        started = perf_counter()
        _check_lengths(view, lengths, self._size, self._rank)
        gathered: list[Float32] | None = None
        if self._rank:
            if view.size:
                self._channels[0].send(view.data.cast("B"))
                self._bytes_sent += view.nbytes
        else:
            gathered = [view]
            for peer, channel in self._channels.items():
                room = self._reserve(peer, 4 * lengths[peer])
                if lengths[peer]:
                    channel.receive_into(room.data)
                gathered.append(room.view("<f4"))
        self._collective_s += perf_counter() - started
        return gathered

    def close(self) -> None:
        """Close the channels to all peers; they get `NodeGone`."""
        for channel in self._peers:
            channel.close()

    def _prepare(self, n: int) -> _Exchange:
        wire_bytes = _wire_bytes(n, self._wire)
        rooms = {peer: self._reserve(peer, wire_bytes) for peer in self._channels}
        exchange = _Exchange(
            wire_bytes=wire_bytes,
            chunks=tuple((start, min(wire_bytes, start + CHUNK_BYTES)) for start in range(0, wire_bytes, CHUNK_BYTES)),
            arrivals=tuple((channel, rooms[peer].data) for peer, channel in self._channels.items()),
            contributions=tuple(rooms[rank].view(_ELEMENTS[self._wire]) if rank in rooms else None for rank in range(self._size)),
        )
        self._exchanges[n] = exchange
        return exchange

    def _reserve(self, peer: int, n_bytes: int) -> Raw:
        """Room for what ``peer`` sends. All lengths share it, so that a group keeps no more than its longest call needed."""
        if self._room[peer].size < n_bytes:
            self._room[peer] = np.empty(n_bytes, np.uint8)
            self._exchanges.clear()  # they point into the old room
        return self._room[peer][:n_bytes]

    def _sum(self, view: Float32, exchange: _Exchange) -> None:
        """Add up in rank order: floating-point sums depend on it, and all ranks must get the same bits."""
        total: npt.NDArray[Any] = view
        other = exchange.contributions[1 - self._rank] if self._size == 2 and self._wire is WireType.FLOAT32 else None
        if other is not None:  # the sum of two numbers is the same in either order
            np.add(view, other, out=view)
            return
        for rank, contribution in enumerate(exchange.contributions):
            term = view if contribution is None else _unpack(contribution, view.size, self._wire)
            if not rank:
                total = term
                continue
            # Until this rank's own contribution has been added, ``view`` still holds it: sum in the first rank's room, or in a fresh one if that is not float32.
            target = view if rank >= self._rank else total if total.dtype == np.float32 else np.empty_like(view)
            np.add(total, term, out=target, dtype=np.float32)  # else two float16 terms would be added in float16
            total = target


_ELEMENTS: dict[WireType, npt.DTypeLike] = {WireType.FLOAT32: "<f4", WireType.FLOAT16: "<f2", WireType.Q8_0: _BLOCK_TYPE}


def _wire_bytes(n: int, wire: WireType) -> int:
    match wire:
        case WireType.FLOAT32:
            return 4 * n
        case WireType.FLOAT16:
            return 2 * n
        case WireType.Q8_0:
            return -(-n // _BLOCK) * _BLOCK_TYPE.itemsize


def _pack(view: Float32, wire: WireType) -> memoryview:
    """The bytes that ``view`` travels as. Lossy types also round ``view`` itself, as its receivers will see it."""
    match wire:
        case WireType.FLOAT32:
            return view.data.cast("B")
        case WireType.FLOAT16:
            halves = np.clip(view, -_MAX_FLOAT16, _MAX_FLOAT16).astype("<f2")
            view[:] = halves
            return halves.view(np.uint8).data
        case WireType.Q8_0:
            blocks = _quantise(view)
            view[:] = _unpack(blocks, view.size, wire)
            return blocks.view(np.uint8).data


def _unpack(elements: npt.NDArray[Any], n: int, wire: WireType) -> npt.NDArray[Any]:
    """``n`` numbers that can be added to float32."""
    if wire is WireType.Q8_0:
        values: Float32 = elements["values"] * elements["scale"].astype(np.float32)[:, None]
        return values.reshape(-1)[:n]
    return elements


def _quantise(view: Float32) -> npt.NDArray[Any]:
    """Blocks of 32 values as int8 times a float16 scale. A block with a NaN becomes all NaN; an infinity becomes the largest value that a block can hold."""
    blocks = np.zeros(-(-view.size // _BLOCK), _BLOCK_TYPE)
    padded = np.zeros(blocks.size * _BLOCK, np.float32)
    padded[: view.size] = view
    rows = padded.reshape(-1, _BLOCK)
    scales = np.minimum(np.abs(rows).max(axis=1) / np.float32(127), np.float32(_MAX_FLOAT16)).astype("<f2")
    blocks["scale"] = scales
    divisors = scales.astype(np.float32)
    divisors[divisors == 0] = 1  # values too small for a float16 scale become 0, whatever they are divided by
    with np.errstate(invalid="ignore"):
        blocks["values"] = np.clip(np.rint(rows / divisors[:, None]), -127, 127).astype(np.int8)
    return blocks


def _check(view: Float32) -> None:
    if view.dtype != np.float32 or view.ndim != 1 or not view.flags.c_contiguous:
        raise InvariantError(f"a collective over {view.dtype} {view.shape}; expected a contiguous float32 array of one dim")


def _check_lengths(view: Float32, lengths: tuple[int, ...], size: int, rank: int) -> None:
    _check(view)
    if len(lengths) != size or min(lengths) < 0 or view.size != lengths[rank]:
        raise InvariantError(f"rank {rank} of {size} gathers {view.size} values, but the lengths are {lengths}")
