"""Whom a caller's address is counted as. How strangers are heard and displaced is tested over real sockets, in tests/contract/test_channels.py."""

import pytest

from yoke.net.strangers import source


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("no address", "no address", True),
    ],
)
def test_one_machines_addresses_are_one_source(one, other, are_same):
    assert (source(one) == source(other)) is are_same
