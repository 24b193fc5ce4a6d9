"""Machines with a network between them: each is a Linux network namespace, and a switch in user space shapes what passes between them."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from yoke.testing.namespaces import NetworkUnavailable, network
from yoke.testing.shape import WIRED

PEER = Path(__file__).with_name("peer.py")


class Peer:
    """A process on a machine that does with sockets what it is told; see peer.py. It ends with the network."""

    def __init__(self, net, machine):
        self.process = net.start(machine, [sys.executable, PEER, net.addresses[machine]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def begin(self, function, *arguments):
        self.process.stdin.write(json.dumps([function, *arguments]) + "\n")
        self.process.stdin.flush()

    def end(self):
        line = self.process.stdout.readline()
        assert line, f"the peer ended with exit code {self.process.wait()}"
        return json.loads(line)

    def ask(self, function, *arguments):
        self.begin(function, *arguments)
        return self.end()


@pytest.fixture
def make_network():
    """Networks that are gone after the test; skips where none can be made."""
    with contextlib.ExitStack() as stack:

        def make(machines, profile=WIRED, **options):
            try:
                return stack.enter_context(network(machines, profile, **options))
            except NetworkUnavailable as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture
def machines(make_network):
    """Three machines on cables."""
    return make_network(["hall", "attic", "cellar"])


@pytest.fixture
def make_peer(make_network):
    """Peers on machines of a network; depends on the networks, so that they end after these."""
    with contextlib.ExitStack() as stack:

        def make(net, machine):
            peer = Peer(net, machine)
            stack.callback(peer.process.communicate)
            stack.callback(peer.process.kill)  # it may be waiting for what will not come
            assert peer.ask("listen") is None
            return peer

        yield make


@pytest.fixture
def make_pair(make_peer):
    """Two peers of a network with a TCP connection between them: who connected, and who accepted.

    So they know each other's hardware addresses: while a system asks for one, it has room for a few hundred packets only.
    """

    def make(net, first, second, address=None):
        one, other = make_peer(net, first), make_peer(net, second)
        other.begin("accept")
        assert not one.ask("connect", address or net.addresses[second])
        other.end()
        return one, other

    return make
