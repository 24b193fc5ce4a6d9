import base64
import binascii
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import UserError
from yoke.core.node import NodeId
from yoke.net.invite import MAX_HOSTS, Invite

hosts = st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-zäöü0-9.-]{1,60}", fullmatch=True))
invites = st.builds(
    Invite,
    node_id=st.binary(min_size=32, max_size=32).map(lambda key: NodeId(key.hex())),
    hosts=st.lists(hosts, min_size=1, max_size=MAX_HOSTS).map(tuple),
    port=st.integers(1, 65535),
    secret=st.binary(min_size=10, max_size=10),
)
EXAMPLE = Invite(node_id=NodeId("ab" * 32), hosts=("192.168.1.20",), port=4433, secret=bytes(range(10)))


@given(invites)
def test_invite_comes_back_as_it_was_written(invite):
    text = invite.encode()
    assert Invite.decode(text) == invite
    assert Invite.decode(f"  {text.upper()}\n") == invite


@given(invites, st.data())
def test_single_wrong_character_is_noticed(invite, data):
    text = invite.encode()
    place = data.draw(st.integers(0, len(text) - 1))
    wrong = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda c: c != text[place]))
    with pytest.raises(UserError):
        Invite.decode(text[:place] + wrong + text[place + 1 :])


@given(invites, st.data())
def test_cut_off_invite_is_noticed(invite, data):
    text = invite.encode()
    with pytest.raises(UserError):
        Invite.decode(text[: data.draw(st.integers(0, len(text) - 1))])


@given(st.text(max_size=300))
def test_foreign_text_is_refused(text):
    for candidate in (text, "yoke2-" + text):
        with pytest.raises(UserError):
            Invite.decode(candidate)


@given(st.integers(0, 255), st.binary(max_size=80))
def test_bytes_that_are_no_hosts_are_refused_though_the_checksum_fits(n_hosts, tail):
    """What is read at all is something that can be built, and says the same when it is written again."""
    try:
        invite = Invite.decode(forged(n_hosts=n_hosts, hosts=tail))
    except UserError:
        return
    assert Invite.decode(invite.encode()) == invite


def test_example_is_short_enough_to_paste_and_plain():
    text = EXAMPLE.encode()
    assert text.startswith("yoke2-")
    assert len(text) < 100
    assert text == text.lower()
    assert text.removeprefix("yoke2-").isalnum()


def test_several_hosts_keep_their_order_and_are_told_apart_once():
    invite = replace(EXAMPLE, hosts=("10.0.0.5", "fd00:0::1", "attic", "10.0.0.5", "fd00::1"))
    assert invite.hosts == ("10.0.0.5", "fd00::1", "attic")
    assert Invite.decode(invite.encode()).hosts == invite.hosts


def test_further_addresses_cost_few_characters():
    assert len(replace(EXAMPLE, hosts=("192.168.1.20", "10.0.0.5")).encode()) - len(EXAMPLE.encode()) == 8


@pytest.mark.parametrize("line", ["yoke join {}", "  YOKE JOIN {}\n", "yoke   join\t{}"])
def test_whole_line_that_the_other_machine_printed_is_read_too(line):
    assert Invite.decode(line.format(EXAMPLE.encode())) == EXAMPLE


def forged(version=2, n_hosts=1, hosts=b"\x00\x04host", prefix="yoke2-"):
    data = struct.pack("<B32sH10sB", version, bytes(32), 1, bytes(10), n_hosts) + hosts
    data += struct.pack("<H", binascii.crc_hqx(data, 0xFFFF))
    return prefix + base64.b32encode(data).decode().rstrip("=").lower()


def test_what_is_forged_here_is_else_right():
    assert Invite.decode(forged()).hosts == ("host",)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (forged(version=3), "version 3, this program knows 2"),
        (forged(version=1, prefix="yoke1-"), "version 1, this program knows 2; install the same version"),
        (forged(hosts=b"\x00\x02\xff\xff"), "mistyped"),
        (forged(hosts=b"\x00\x09two words"), "without spaces"),
        (forged(hosts=b"\x00\x0cfe80::1%eth0"), "without spaces or a zone"),
        (forged(hosts=b"\x00\x00"), "without spaces"),
        (forged(hosts=b"\x00\x05host"), "mistyped"),
        (forged(hosts=b"\x04\x01\x02\x03"), "mistyped"),
        (forged(hosts=b"\x06" + bytes(15)), "mistyped"),
        (forged(hosts=b"\x05" + bytes(16)), "mistyped"),
        (forged(hosts=b"\x04\x01\x02\x03\x04\x00"), "mistyped"),
        (forged(n_hosts=2), "mistyped"),
        (forged(n_hosts=0, hosts=b""), "mistyped"),
        (forged(n_hosts=9, hosts=b"".join(bytes((4, 1, 1, 1, index)) for index in range(9))), "9 hosts; expected 1 to 8"),
        ("yoke2-" + "a" * 10_000, "cut off"),
        ("https://example.org", "starts with yoke2-"),
    ],
)
def test_refusal_says_what_is_wrong(text, match):
    with pytest.raises(UserError, match=match):
        Invite.decode(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"node_id": "xyz"},
        {"hosts": ()},
        {"hosts": ("a b",)},
        {"hosts": ("h" * 256,)},
        {"hosts": ("fe80::1%eth0",)},
        {"hosts": tuple(f"h{index}" for index in range(9))},
        {"port": 0},
        {"port": 65536},
        {"secret": b"short"},
    ],
)
def test_invite_outside_its_bounds_cannot_be_built(changes):
    values = {"node_id": EXAMPLE.node_id, "hosts": EXAMPLE.hosts, "port": EXAMPLE.port, "secret": EXAMPLE.secret}
    with pytest.raises(UserError):
        Invite(**(values | changes))
