"""Frames that stand for many packets: their size on the wire, and that their pieces are the packets that a card would have sent."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoke.testing.ethernet import address_of, cut, destination_of, is_group, measure

FIN, PUSH, ACK, REDUCED = 0x01, 0x08, 0x10, 0x80
ALL = FIN | PUSH | ACK | REDUCED
TIMES = b"\x01\x01\x08\x0a" + bytes(8)  # TCP's option for time stamps: 12 bytes, as Linux sends it


def words_sum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def network_header(version, payload_bytes, number):
    if version == 6:
        return struct.pack("!IHBB", 6 << 28, payload_bytes, 6, 64) + bytes(range(32))
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + payload_bytes, number, 0x4000, 64, 6, 0) + bytes(range(8))
    return head[:10] + struct.pack("!H", ~words_sum(head) & 0xFFFF) + head[12:]


def pseudo_sum(network, version, length):
    return words_sum((network[8:40] if version == 6 else network[12:20]) + struct.pack("!HH", 6, length))


def stream_frame(payload, segment, *, version=4, sequence=0, number=0, options=TIMES):
    """A frame as the system gives it to a device that cuts streams itself."""
    length = 20 + len(options) + len(payload)
    network = network_header(version, length, number)
    start = 14 + len(network)
    tcp = struct.pack("!HHIIBBHHH", 5000, 6000, sequence, 7, (5 + len(options) // 4) << 4, ALL, 500, pseudo_sum(network, version, length), 0) + options
    kind = (1 if version == 4 else 4) | 0x80
    return (
        struct.pack("=BBHHHH", 1, kind, start + len(tcp), segment, start, 16)
        + address_of(1)
        + address_of(0)
        + (b"\x08\x00" if version == 4 else b"\x86\xdd")
        + network
        + tcp
        + payload
    )


def packets_of(frame):
    """What a card makes of a frame, by its headers alone: (sequence, number, flags, payload) of each packet; fails if a header is wrong."""
    flags, kind, length, segment, start, offset = struct.unpack_from("=BBHHHH", frame)
    ethernet = frame[10:]
    version = 4 if ethernet[12:14] == b"\x08\x00" else 6
    network = ethernet[14:start]
    tcp_bytes = (ethernet[start + 12] >> 4) * 4
    payload = ethernet[start + tcp_bytes :]
    assert (flags, offset, length) == (1, 16, start + tcp_bytes)
    assert struct.unpack_from("!H", ethernet, start + 16)[0] == pseudo_sum(network, version, tcp_bytes + len(payload))
    if version == 4:
        assert words_sum(network) == 0xFFFF
        assert struct.unpack_from("!H", network, 2)[0] == len(ethernet) - 14
    else:
        assert struct.unpack_from("!H", network, 4)[0] == len(ethernet) - 54
    if not kind:
        assert not segment
    size = segment or len(payload)
    assert kind or len(payload) <= size
    (sequence,) = struct.unpack_from("!I", ethernet, start + 4)
    number = struct.unpack_from("!H", network, 4)[0] if version == 4 else 0
    count = -(-len(payload) // size)
    found = []
    for index in range(count):
        mask = ALL & ~(0 if index == count - 1 else FIN | PUSH) & ~(REDUCED if index else 0)
        numbered = (number + index) & 0xFFFF if version == 4 else 0
        found.append(((sequence + index * size) & 0xFFFFFFFF, numbered, ethernet[start + 13] & mask, payload[index * size : (index + 1) * size]))
    return found


@settings(deadline=None)
@given(
    n_payload=st.integers(2, 6000),
    segment=st.integers(1, 3000),
    version=st.sampled_from([4, 6]),
    sequence=st.integers(0, 2**32 - 1),
    number=st.integers(0, 2**16 - 1),
    options=st.sampled_from([b"", TIMES]),
    data=st.data(),
)
def test_pieces_are_the_packets_that_were_not_lost(n_payload, segment, version, sequence, number, options, data):
    segment = max(min(segment, n_payload - 1), -(-n_payload // 44))
    payload = bytes(index % 251 for index in range(n_payload))
    frame = stream_frame(payload, segment, version=version, sequence=sequence, number=number, options=options)
    wanted = packets_of(frame)
    count, _ = measure(frame)
    assert count == len(wanted)
    lost = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1), label="lost"))
    kept = [range(low + 1, high) for low, high in pairwise([-1, *lost, count]) if low + 1 < high]
    pieces = [cut(frame, each) for each in kept]
    assert [packet for piece in pieces for packet in packets_of(piece)] == [packet for index, packet in enumerate(wanted) if index not in lost]
    assert sum(measure(piece).packets for piece in pieces) == count - len(lost)


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_has_the_size_of_the_packets_that_it_stands_for(version):
    headers = 14 + (20 if version == 4 else 40) + 32
    full = 1500 - headers + 14
    frame = stream_frame(bytes(3 * full + 1), full, version=version)
    assert measure(frame) == (4, 3 * (1514 + 24) + headers + 1 + 24)


def test_a_small_frame_is_filled_up():
    assert measure(bytes(10) + bytes(42)) == (1, 60 + 24)
    assert measure(bytes(10) + bytes(61)) == (1, 61 + 24)


def test_addresses_name_one_machine_or_many():
    assert len({address_of(index) for index in range(250)}) == 250
    assert not any(is_group(address_of(index)) for index in range(250))
    assert is_group(b"\xff" * 6)
    assert is_group(bytes.fromhex("01005e0000fb"))
    assert destination_of(stream_frame(b"ab", 1)) == address_of(1)
