"""Ethernet frames as a TAP device with offloads gives them: behind a header that says how the system left them unfinished.

A frame of up to 64 KiB may stand for many packets of one TCP stream, which a real card would cut. Here are their sizes on the wire, and the cutting of
what is left when some of them are lost. Knows layouts of bytes; knows nothing of devices, times or who is where.

Layouts: virtio specification 5.1.6 (virtio_net_hdr, 10 bytes, of this machine's byte order); RFC 791, 8200, 9293.
"""

import struct
from typing import NamedTuple

HEADER_BYTES = 10
ADDRESS_BYTES = 6
# On the wire there are also, for each packet: preamble 8, check sum 4, gap 12; and the frame without its check sum has 60 bytes at least (IEEE 802.3).
WIRE_BYTES, LEAST_BYTES = 24, 60

_HEADER = struct.Struct("=BBHHHH")
_NO_SEGMENTS = 0
_IPV6 = b"\x86\xdd"
_NETWORK = HEADER_BYTES + 14  # where the IP header begins
_FIN, _PUSH, _REDUCED = 0x01, 0x08, 0x80


class Measures(NamedTuple):
    """How many packets a frame stands for, and their bytes on the wire together."""

    packets: int
    wire_bytes: int


def address_of(index: int) -> bytes:
    """The hardware address of the machine with this index: locally administered, so that it is nobody else's."""
    return b"\x02\x00\x00\x00" + index.to_bytes(2, "big")


def destination_of(frame: bytes) -> bytes:
    """The hardware address that a frame is for."""
    return frame[HEADER_BYTES : HEADER_BYTES + ADDRESS_BYTES]


def is_group(address: bytes) -> bool:
    """Whether an address means more than one machine: broadcast and multicast."""
    return bool(address[0] & 1)


def measure(frame: bytes) -> Measures:
    """What a frame is on the wire."""
    if frame[1] == _NO_SEGMENTS:
        return Measures(1, max(LEAST_BYTES, len(frame) - HEADER_BYTES) + WIRE_BYTES)
    _, _, _, segment, start, _ = _HEADER.unpack_from(frame)
    headers = _headers(frame, start)
    payload = len(frame) - HEADER_BYTES - headers
    packets = max(1, -(-payload // segment))
    return Measures(packets, payload + packets * (headers + WIRE_BYTES))


def cut(frame: bytes, kept: range) -> bytes:
    """The part of a frame that stands for the packets ``kept`` of it; the frame must stand for more than one."""
    flags, kind, length, segment, start, offset = _HEADER.unpack_from(frame)
    headers = _headers(frame, start)
    payload = frame[HEADER_BYTES + headers :]
    part = payload[kept.start * segment : kept.stop * segment]
    head = bytearray(frame[: HEADER_BYTES + headers])
    is_one = len(kept) == 1
    _HEADER.pack_into(head, 0, flags, _NO_SEGMENTS if is_one else kind, min(length, headers), 0 if is_one else segment, start, offset)
    tcp = HEADER_BYTES + start
    (sequence,) = struct.unpack_from("!I", head, tcp + 4)
    struct.pack_into("!I", head, tcp + 4, (sequence + kept.start * segment) & 0xFFFFFFFF)
    if kept.stop * segment < len(payload):
        head[tcp + 13] &= ~(_FIN | _PUSH) & 0xFF  # these belong to the last packet
    if kept.start:
        head[tcp + 13] &= ~_REDUCED & 0xFF  # this to the first
    _finish_network(head, kept.start, len(part))
    _finish_checksum(head, start, offset, len(part))
    return bytes(head) + part


def _headers(frame: bytes, start: int) -> int:
    """Bytes of all headers: where TCP's begins, and how long that is. Devices are told to cut all else themselves."""
    return start + (frame[HEADER_BYTES + start + 12] >> 4) * 4


def _finish_network(head: bytearray, first: int, n_payload: int) -> None:
    """Length, number and check sum of the IP header for one part of the payload that begins with packet ``first``."""
    if head[_NETWORK - 2 : _NETWORK] == _IPV6:
        struct.pack_into("!H", head, _NETWORK + 4, len(head) - _NETWORK - 40 + n_payload)
        return
    (number,) = struct.unpack_from("!H", head, _NETWORK + 4)
    struct.pack_into("!HH", head, _NETWORK + 2, len(head) - _NETWORK + n_payload, (number + first) & 0xFFFF)
    struct.pack_into("!H", head, _NETWORK + 10, 0)
    size = (head[_NETWORK] & 0x0F) * 4
    struct.pack_into("!H", head, _NETWORK + 10, ~_sum(head[_NETWORK : _NETWORK + size]) & 0xFFFF)


def _finish_checksum(head: bytearray, start: int, offset: int, n_payload: int) -> None:
    """The unfinished check sum: that of the addresses, the protocol and the length alone."""
    is_v6 = head[_NETWORK - 2 : _NETWORK] == _IPV6
    addresses = head[_NETWORK + 8 : _NETWORK + 40] if is_v6 else head[_NETWORK + 12 : _NETWORK + 20]
    tcp = 6
    length = len(head) - HEADER_BYTES - start + n_payload
    struct.pack_into("!H", head, HEADER_BYTES + start + offset, _sum(addresses + struct.pack("!HH", tcp, length)))


def _sum(data: bytes | bytearray) -> int:
    """The one's complement sum of 16-bit words (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
