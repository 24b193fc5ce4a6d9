"""Where no network can be made, what is missing is said, before anything has been made."""

import os
import shutil
import sys

import pytest

from yoke.core.errors import UserError
from yoke.testing import namespaces
from yoke.testing.namespaces import NetworkUnavailable, network


@pytest.fixture
def system(monkeypatch):
    """A system as the test says: what it is, who we are, which commands there are, whether the device may be opened. Anything that is started fails the test."""

    def be(*, platform="linux", user=0, commands=("ip", "unshare", "nsenter"), has_device=True):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in commands else None)
        monkeypatch.setattr(os, "access", lambda *_: has_device)
        monkeypatch.setattr(namespaces.subprocess, "Popen", lambda command, **_: pytest.fail(f"{command} was started"))

    return be


@pytest.mark.parametrize(
    ("what", "missing"),
    [
        ({"platform": "darwin"}, "need Linux; this is darwin"),
        ({"platform": "win32"}, "need Linux; this is win32"),
        ({"commands": ()}, "the command ip"),
        ({"user": 1000, "commands": ("ip", "nsenter")}, "the command unshare"),
        ({"user": 1000, "commands": ("ip", "unshare")}, "the command nsenter"),
        ({"user": 1000, "has_device": False}, "/dev/net/tun cannot be read and written"),
        ({"has_device": False}, "/dev/net/tun cannot be read and written"),
    ],
)
def test_what_is_missing_is_named(system, what, missing):
    system(**what)
    with pytest.raises(NetworkUnavailable, match=missing), network(["a"]):
        pytest.fail("a network was made")


@pytest.mark.parametrize(
    ("machines", "why"),
    [
        ([], "expected 1 to 250"),
        (["a"] * 2, "a name of its own"),
        ([f"m{index}" for index in range(251)], "expected 1 to 250"),
        ([""], "expected letters"),
        (["with space"], "expected letters"),
        (["with,comma"], "expected letters"),
        (["with/slash"], "expected letters"),
    ],
)
def test_machines_that_cannot_be_are_refused(system, machines, why):
    """And not skipped, as what only this system cannot do."""
    system()
    with pytest.raises(UserError, match=why) as caught, network(machines):
        pytest.fail("a network was made")
    assert not isinstance(caught.value, NetworkUnavailable)
