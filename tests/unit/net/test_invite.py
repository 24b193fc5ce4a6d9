import base64
import binascii
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import UserError
from yoke.core.node import NodeId
from yoke.net.invite import Invite

invites = st.builds(
    Invite,
    node_id=st.binary(min_size=32, max_size=32).map(lambda key: NodeId(key.hex())),
    host=st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-zäöü0-9.-]{1,60}", fullmatch=True)),
    port=st.integers(1, 65535),
    secret=st.binary(min_size=10, max_size=10),
)
EXAMPLE = Invite(node_id=NodeId("ab" * 32), host="192.168.1.20", port=4433, secret=bytes(range(10)))


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
    for candidate in (text, "yoke1-" + text):
        with pytest.raises(UserError):
            Invite.decode(candidate)


def test_example_is_short_enough_to_paste_and_plain():
    text = EXAMPLE.encode()
    assert text.startswith("yoke1-")
    assert len(text) < 110
    assert text == text.lower()
    assert text.removeprefix("yoke1-").isalnum()


def forged(version=1, host=b"host"):
    data = struct.pack("<B32sH10s", version, bytes(32), 1, bytes(10)) + host
    data += struct.pack("<H", binascii.crc_hqx(data, 0xFFFF))
    return "yoke1-" + base64.b32encode(data).decode().rstrip("=").lower()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (forged(version=2), "version 2, this program knows 1"),
        (forged(host=b"\xff\xff"), "mistyped"),
        (forged(host=b"two words"), "without spaces"),
        (forged(host=b""), "mistyped"),
        ("yoke1-" + "a" * 10_000, "cut off"),
        ("https://example.org", "starts with yoke1-"),
    ],
)
def test_refusal_says_what_is_wrong(text, match):
    with pytest.raises(UserError, match=match):
        Invite.decode(text)


@pytest.mark.parametrize(
    "changes", [{"node_id": "xyz"}, {"host": ""}, {"host": "a b"}, {"host": "h" * 256}, {"port": 0}, {"port": 65536}, {"secret": b"short"}]
)
def test_invite_outside_its_bounds_cannot_be_built(changes):
    values = {"node_id": EXAMPLE.node_id, "host": EXAMPLE.host, "port": EXAMPLE.port, "secret": EXAMPLE.secret}
    with pytest.raises(UserError):
        Invite(**(values | changes))
