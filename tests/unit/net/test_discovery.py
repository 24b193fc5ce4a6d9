"""Announcing and finding by multicast DNS, on the loopback device."""

import asyncio
import secrets
import socket

import pytest
from zeroconf import ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

from yoke.core.errors import NodeError
from yoke.core.node import NodeId
from yoke.net.addresses import local_addresses
from yoke.net.discovery import SERVICE, announced, find
from yoke.net.invite import DOOR_VERSION, MAX_HOSTS

LOOPBACK = ["127.0.0.1"]
ATTIC, CELLAR, NOBODY = (NodeId(secrets.token_hex(32)) for _ in range(3))
"""Other clusters may be announced on this machine at the same time; these are of this run alone."""


def has_multicast():
    """Whether this machine's loopback device carries it; a container's may not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            probe.sendto(b"", ("224.0.0.251", 5353))
        except OSError:
            return False
    return True


needs_multicast = pytest.mark.skipif(not has_multicast(), reason="the loopback device does not carry multicast here")


def fail(text):
    raise AssertionError(text)


async def find_ours(n_clusters, is_ours):
    """What is found of what this test announced, once it is so many: a busy machine may need several looks."""
    while len(found := tuple(filter(is_ours, await find(1.5, interfaces=LOOPBACK)))) < n_clusters:
        pass
    return found


@needs_multicast
def test_announced_clusters_are_found_with_all_that_is_needed_to_knock_and_gone_when_they_end():
    async def scene():
        async with (
            announced(ATTIC, "attic", ("192.168.1.20", "fd00::1", "attic.example"), 4433, note=fail, interfaces=LOOPBACK) as is_out,
            announced(CELLAR, "cellar\x1b[31m", ("10.0.0.5",), 4434, note=fail, interfaces=LOOPBACK) as is_out_too,
        ):
            await is_out.wait()
            await is_out_too.wait()
            both = await find(5.0, wanted=CELLAR, interfaces=LOOPBACK) + await find(5.0, wanted=ATTIC, interfaces=LOOPBACK)
            everybody = await find_ours(2, lambda found: found.id in {ATTIC, CELLAR})
        nobody = await find_ours(0, lambda found: found.id in {ATTIC, CELLAR})
        return both, everybody, nobody

    (cellar, attic), everybody, nobody = asyncio.run(scene())
    assert (attic.id, attic.title, attic.hosts, attic.port, attic.protocol) == (ATTIC, "attic", ("192.168.1.20", "fd00::1"), 4433, DOOR_VERSION)
    assert (cellar.id, cellar.title, cellar.hosts, cellar.port) == (CELLAR, "cellar?[31m", ("10.0.0.5",), 4434)
    assert everybody == (attic, cellar)
    assert nobody == ()


@needs_multicast
def test_announcing_holds_nothing_up():
    """The name is asked for during 1.65 s; the block begins before, and may end before."""

    async def scene():
        async with announced(ATTIC, "attic", ("10.0.0.5",), 4433, note=fail, interfaces=LOOPBACK) as is_out:
            return is_out.is_set()

    assert not asyncio.run(scene())


@needs_multicast
def test_announcements_that_cannot_be_true_are_left_out():
    good = {"id": ATTIC, "protocol": "2", "title": "attic"}
    lies = [
        good | {"id": "../../etc"},
        good | {"id": ATTIC.upper()},
        good | {"protocol": "two"},
        good | {"title": b"\xff\xfe"},
        {},
        good | {"id": CELLAR, "title": "t" * 200},
    ]

    async def scene():
        liar = AsyncZeroconf(interfaces=LOOPBACK)
        try:
            infos = [
                ServiceInfo(SERVICE, f"lie-{index}.{SERVICE}", port=9, properties=lie, server=f"lie-{index}.local.", parsed_addresses=["10.0.0.9"])
                for index, lie in enumerate(lies)
            ]
            await asyncio.gather(*[await liar.async_register_service(info, cooperating_responders=True) for info in infos])
            return await find_ours(1, lambda found: "10.0.0.9" in found.hosts)
        finally:
            await liar.async_close()

    assert [(found.id, found.title) for found in asyncio.run(scene())] == [(CELLAR, "t" * 40)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zeroconf leaves the socket of a failed start to the collector
def test_machine_without_such_a_network_says_so_and_nothing_else_happens():
    """No interface has this address: the sockets cannot be made."""
    notes = []

    async def scene():
        async with announced(ATTIC, "attic", ("10.0.0.5",), 4433, note=notes.append, interfaces=["203.0.113.77"]) as is_settled:
            await is_settled.wait()
        with pytest.raises(NodeError, match=r"cannot look for other machines on this network: .*; join with an invite instead"):
            await find(1.0, interfaces=["203.0.113.77"])

    asyncio.run(scene())
    assert len(notes) == 1
    assert "cannot be found by others on its network" in notes[0]


@needs_multicast
def test_looking_for_nobody_ends_with_nobody():
    assert asyncio.run(find(0.5, wanted=NOBODY, interfaces=LOOPBACK)) == ()


def test_local_addresses_are_ones_that_others_can_use():
    addresses = local_addresses(MAX_HOSTS)
    assert 0 < len(addresses) <= MAX_HOSTS
    assert len(set(addresses)) == len(addresses)
    assert not any(address.startswith(("fe80", "169.254", "0.", "::")) or "%" in address for address in addresses)
    assert addresses == ("127.0.0.1",) or "127.0.0.1" not in addresses
    assert local_addresses(1) == addresses[:1]
