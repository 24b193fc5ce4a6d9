"""The QR code as it stands in the terminal is the code of the invite, module by module."""

import pytest
import segno

from yoke.cli.qr import qr_lines, qr_text
from yoke.core.node import NodeId
from yoke.net.invite import Invite

LIGHT = {" ": (False, False), "▀": (True, False), "▄": (False, True), "█": (True, True)}


def an_invite(*hosts):
    return Invite(node_id=NodeId("ab" * 32), hosts=hosts, port=4433, secret=bytes(range(10)))


def modules(lines):
    """Dark modules of what a terminal shows, row by row, without the quiet zone."""
    rows = [[not LIGHT[c][half] for c in line] for line in lines for half in (0, 1)]
    assert {len(row) for row in rows} == {len(lines[0])}
    n = len(lines[0]) - 8
    assert not any(any(row) for row in (*rows[:4], *rows[4 + n : 8 + n])), "four light rows above and below"
    assert not any(any(row[:4]) or any(row[-4:]) for row in rows[: 8 + n]), "and as many columns on each side"
    return [row[4:-4] for row in rows[4 : 4 + n]]


@pytest.mark.parametrize(
    "hosts", [("192.168.1.20",), ("192.168.1.20", "10.0.0.5", "fd00::1"), ("attic.example", "fd00::1", *(f"10.0.0.{n}" for n in range(6)))]
)
def test_code_in_the_terminal_is_the_invite_in_capitals(hosts):
    invite = an_invite(*hosts)
    text = invite.encode().upper()
    assert Invite.decode(text) == invite
    code = segno.make_qr(text, error="l", boost_error=False)
    assert code.mode == "alphanumeric", "the mode that needs the fewest modules"
    assert modules(qr_lines(invite.encode())) == [[bool(module) for module in row] for row in code.matrix]


def test_code_fits_a_terminal_of_80_columns_and_24_lines():
    lines = qr_lines(an_invite("192.168.1.20").encode())
    assert (len(lines[0]), len(lines)) == (41, 21)


def test_colours_are_set_so_that_a_light_terminal_shows_the_same():
    text = qr_text("hello")
    assert text.plain.split("\n") == qr_lines("hello")
    assert str(text.style) == "white on black"
