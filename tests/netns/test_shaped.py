"""The shaped network keeps its shape, with real sockets: rate, delay, loss, cuts, partitions, spikes; and nothing is left of it."""

import os
import statistics
import subprocess
import sys

import psutil
import pytest

from yoke.core.errors import UserError
from yoke.testing.fabric import Way
from yoke.testing.shape import MEGABIT, MIXED, WIFI, Profile, Shape

pytestmark = pytest.mark.netns

HOLDER = """
import subprocess, sys
from yoke.testing.namespaces import network
with network(["a"]) as net:
    print(net.prefix("a")[-1], net.start("a", ["sleep", "1000"], stdout=subprocess.DEVNULL).pid, flush=True)
    sys.stdin.read()
"""
OPEN = Profile(name="open", cables=(Shape(),))
PACKET, ON_THE_WIRE = 1448, 1538  # bytes of a full packet of a TCP stream, and with all headers, preamble and gap
MARK = 0.25  # seconds after which nothing more is expected to come


def profile(**fields):
    return Profile(name="test", cables=(Shape(**fields),))


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def holder(make_network):
    """Another process with a network and a command on its machine; the name of the namespace, and the command's process."""
    make_network(["a"])  # skips where none can be made
    if os.geteuid():
        pytest.skip("without root, names of namespaces are not seen from outside")
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        namespace, pid = process.stdout.readline().split()
        yield process, namespace, int(pid)
    finally:
        process.kill()
        process.communicate()


def lacks_carrier(net, machine):
    return "NO-CARRIER" in net.run(machine, ["ip", "link", "show", "net"], capture_output=True).stdout


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_a_stream_gets_the_rate(make_network, make_pair, direction):
    net = make_network(["a", "b"], OPEN)
    slow = Shape(bytes_per_s=40 * MEGABIT, queue_s=5.0)  # room for all of it: what is dropped and sent again is no question of the rate
    if direction != "down":
        net.reshape("a", slow, Way.UP)
    if direction != "up":
        net.reshape("b", slow, Way.DOWN)
    one, other = make_pair(net, "a", "b")
    size = 8_000_000
    other.begin("receive_stream", size)
    sent = one.ask("send_stream", size, 1)
    received, seconds = other.end()
    assert received == sent
    assert size / seconds * ON_THE_WIRE / PACKET == pytest.approx(slow.bytes_per_s, rel=0.1)


def test_messages_take_the_delay(make_network, make_pair):
    net = make_network(["a", "b"], profile(delay_s=0.01))
    one, other = make_pair(net, "a", "b")
    other.begin("echo", 20, 100)
    trips = one.ask("ping", 20, 100)
    assert 0.0398 <= min(trips) < 0.06


def test_a_wired_round_trip_is_short(machines, make_pair):
    one, other = make_pair(machines, "hall", "attic")
    other.begin("echo", 200, 64)
    trips = one.ask("ping", 200, 64)
    assert statistics.median(trips) >= 0.15e-3
    assert min(trips) < 2e-3


def test_wifi_loses_packets_and_keeps_their_order(make_network, make_pair):
    net = make_network(["a", "b"], WIFI)
    one, other = make_pair(net, "a", "b")
    other.begin("receive_numbers")
    one.ask("send_numbers", net.addresses["b"], 4000, 200)
    found = other.end()
    counts = net.counts()
    assert found == sorted(found)
    assert 15 <= counts["a"]["lost"] <= 65  # 1 % of 4000, give or take four standard deviations
    assert 2000 < len(found) <= counts["b"]["reached"]


def test_delays_of_a_way_between_two_come_on_top(machines, make_pair, make_peer):
    machines.shape_between("hall", "attic", Shape(delay_s=0.03))
    one, other = make_pair(machines, "hall", "attic")
    third = make_peer(machines, "cellar")
    other.begin("echo", 5, 10)
    assert 0.03 <= min(one.ask("ping", 5, 10)) < 0.05
    other.end()
    third.begin("accept")
    assert not one.ask("connect", machines.addresses["cellar"])
    third.end()
    third.begin("echo", 5, 10)
    assert min(one.ask("ping", 5, 10)) < 0.03


@pytest.mark.parametrize("keeps_order", [True, False])
def test_packets_keep_their_order_unless_they_need_not(make_network, make_pair, keeps_order):
    net = make_network(["a", "b"], OPEN)
    net.reshape("b", Shape(delay_s=0.02, jitter_s=0.02, keeps_order=keeps_order), Way.DOWN)
    one, other = make_pair(net, "a", "b")
    other.begin("receive_numbers", "udp", 100)
    one.ask("send_numbers", net.addresses["b"], 100, 100)
    found = other.end()
    assert (found == sorted(found)) is keeps_order


def test_a_full_queue_drops_what_comes_last(make_network, make_pair, wait_until):
    net = make_network(["a", "b"], profile(bytes_per_s=1 * MEGABIT, queue_s=0.1))
    one, other = make_pair(net, "a", "b")
    other.begin("receive_numbers")
    seconds = one.ask("send_numbers", net.addresses["b"], 100, 1000)
    wait_until(lambda: net.counts()["a"]["sent"] >= 140, "packets are left at the sender")
    # Nothing of the end may have got through either; it is sent again on a way that is clear.
    net.reshape("a", Shape())
    net.reshape("b", Shape())
    one.ask("send_numbers", net.addresses["b"], 0, 1000)
    found = other.end()
    in_time = MEGABIT / (1000 + 66)  # packets a second
    assert found[:10] == list(range(10))
    assert 0.1 * in_time - 1 <= len(found) <= (0.1 + seconds) * in_time + 3
    assert net.counts()["a"]["dropped"] >= 100 - len(found)


@pytest.mark.parametrize("version", [4, 6])
def test_a_stream_survives_loss_on_any_way(make_network, make_pair, version):
    """Frames of 64 KiB are cut where packets of them are lost; the kernel would refuse them if the pieces were not right."""
    net = make_network(["a", "b"], MIXED)
    net.reshape("b", Shape(delay_s=1e-3, loss=0.02), Way.DOWN)
    addresses = net.addresses
    if version == 6:
        addresses = {"a": "fd83::1", "b": "fd83::2"}
        for name, address in addresses.items():
            assert net.run(name, ["ip", "addr", "add", f"{address}/64", "dev", "net", "nodad"]).returncode == 0
    one, other = make_pair(net, "a", "b", addresses["b"])
    size = 3_000_000
    other.begin("receive_stream", size)
    sent = one.ask("send_stream", size, 1)
    received, _ = other.end()
    counts = net.counts()["a"]
    assert received == sent
    assert counts["lost"] == pytest.approx(counts["sent"] * 0.02, rel=0.5)
    assert counts["sent"] < size / PACKET * 1.2, "more was sent again than was lost"


def test_a_stream_goes_on_when_a_cut_cable_is_mended(machines, make_pair):
    one, other = make_pair(machines, "hall", "attic")
    size = 30_000_000
    other.begin("hear", size, MARK)
    one.begin("send_stream", size, 1)
    machines.cut("attic")
    heard = other.end()
    assert heard < size
    assert not lacks_carrier(machines, "attic")
    assert other.ask("hear", size, MARK) == 0
    machines.mend("attic")
    assert other.ask("hear", size - heard, 60.0) == size - heard
    one.end()
    assert machines.counts()["hall"]["stopped"] > 0


def test_a_machine_sees_that_its_cable_was_pulled(machines, make_pair):
    one, other = make_pair(machines, "hall", "attic")
    machines.plug("attic", is_in=False)
    assert lacks_carrier(machines, "attic")
    one.ask("say", 10)
    assert other.ask("hear", 10, MARK) == 0
    machines.plug("attic", is_in=True)
    assert not lacks_carrier(machines, "attic")
    assert other.ask("hear", 10, 60.0) == 10


def test_a_card_that_is_switched_off_reaches_nobody(machines, make_pair):
    one, other = make_pair(machines, "hall", "attic")
    machines.switch_card("attic", is_on=False)
    assert "unreachable" in other.ask("connect", machines.addresses["hall"])
    machines.switch_card("attic", is_on=True)
    one.ask("say", 10)
    assert other.ask("hear", 10, 60.0) == 10


def test_a_partition_parts_and_heals(machines, make_peer):
    hall, attic, cellar = (make_peer(machines, name) for name in machines.addresses)
    machines.part(["hall"], ["attic", "cellar"])
    assert "timed out" in attic.ask("connect", machines.addresses["hall"], MARK)
    assert not attic.ask("connect", machines.addresses["cellar"])
    cellar.ask("accept")
    machines.heal()
    assert not attic.ask("connect", machines.addresses["hall"])
    hall.ask("accept")
    machines.close("hall", "attic")
    assert attic.ask("say", 10) is None
    assert hall.ask("hear", 10, 60.0) == 10, "the way that was not closed is open"
    assert hall.ask("say", 10) is None
    assert attic.ask("hear", 10, MARK) == 0


def test_spikes_hold_everything_up(make_network, make_pair):
    net = make_network(["a", "b"], profile(delay_s=2.5e-3, spikes_per_s=1, spike_s=0.2))
    one, other = make_pair(net, "a", "b")
    other.begin("echo", 150, 10)
    trips = one.ask("ping", 150, 10)
    assert max(trips) > 0.15
    assert statistics.median(trips) < 0.1


def test_what_is_for_all_reaches_all(machines, make_peer):
    hall, *others = (make_peer(machines, name) for name in machines.addresses)
    for peer in others:
        peer.begin("receive_numbers", "group")
        assert peer.end() == "listening"
    hall.ask("send_numbers", "224.0.0.251", 10, 100, 5001)
    assert [peer.end() for peer in others] == [list(range(10))] * 2


def test_a_wrong_command_is_refused_and_harms_nothing(machines):
    with pytest.raises(UserError, match="'roof'"):
        machines.cut("roof")
    with pytest.raises(UserError, match="'roof'"):
        machines.prefix("roof")
    with pytest.raises(UserError, match="no command"):
        machines.command("burn", "hall")
    assert set(machines.counts()) == {"hall", "attic", "cellar"}


@pytest.mark.parametrize(
    ("machine", "why"),
    [("a", "no machine"), ("a=no-such-namespace=10.83.0.1/24", "could not be brought into the namespace 'no-such-namespace'"), ("a=b", "no machine")],
)
def test_a_switch_that_cannot_work_says_why_and_ends(make_network, machine, why):
    net = make_network(["a"])
    ended = net.run("a", [sys.executable, "-m", "yoke.testing.switch", machine], capture_output=True, stdin=subprocess.DEVNULL)
    assert ended.stdout.startswith("error ")
    assert why in ended.stdout
    assert ended.returncode == 2


def test_all_that_ran_on_a_machine_ends_with_the_network(holder, wait_until):
    process, namespace, pid = holder
    assert namespace in namespaces()
    process.communicate()
    assert process.returncode == 0
    assert namespace not in namespaces()
    wait_until(lambda: not psutil.pid_exists(pid), "a command outlives its machine")


def test_what_a_killed_process_left_is_taken_away(holder, make_network, wait_until):
    process, namespace, pid = holder
    (switch,) = (child for child in psutil.Process(process.pid).children() if "yoke.testing.switch" in child.cmdline())
    process.kill()
    process.communicate()
    wait_until(lambda: not switch.is_running(), "the switch outlives who started it")
    assert namespace in namespaces()
    make_network(["a"])
    assert namespace not in namespaces()
    wait_until(lambda: not psutil.pid_exists(pid), "a command outlives its machine")
