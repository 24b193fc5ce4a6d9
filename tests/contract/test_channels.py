import contextlib
import os
import select
import socket
import ssl
import sys
import threading
import time

import pytest

from yoke.core.errors import AdmissionError, NodeGone, RemoteProtocolError, SettingError
from yoke.core.node import NodeId
from yoke.net.channel import receive_message
from yoke.net.codec import HELLO_LIMITS, Hello, Limits, Purpose, encode
from yoke.net.identity import Identity, client_context
from yoke.net.memory import memory_pair
from yoke.net.tcp import MAX_HANDSHAKES, Listener, connect
from yoke.testing.checks import check_channel


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def nodes(tmp_path):
    return [Identity.load_or_create(tmp_path / name) for name in ("attic", "kitchen", "stranger")]


@pytest.fixture
def listener(nodes):
    attic, kitchen, _ = nodes
    with contextlib.closing(Listener("127.0.0.1", 0, attic, [kitchen.certificate_der])) as listener:
        yield listener


def pair(listener, nodes, **options):
    attic, kitchen, _ = nodes
    here = connect(listener.address, attic.id, kitchen, [attic.certificate_der], deadline_s=5, **options)
    there = listener.accept(5)
    assert there is not None
    return here, there


def wait_for_refusals(listener, n):
    deadline = time.monotonic() + 5
    while listener.refused < n and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listener.refused == n


def has_ended(connection):
    """Whether the other side has closed a connection over which nothing was said."""
    ready, _, _ = select.select([connection], [], [], 0)
    return bool(ready) and not connection.recv(1)


def test_memory_channel_keeps_the_contract():
    check_channel(lambda: memory_pair(NodeId("a" * 64), NodeId("b" * 64)))


@pytest.mark.parametrize("spin_s", [0.0, 0.0001])
def test_tcp_channel_keeps_the_contract(listener, nodes, spin_s):
    check_channel(lambda: pair(listener, nodes, spin_s=spin_s))


@pytest.mark.parametrize("spin_s", [0.0, 1e-4])
def test_a_ring_that_is_left_from_an_earlier_nudge_is_no_message(listener, nodes, spin_s):
    """A nudge is marked before it rings, so that whoever waits may notice the mark first: the ring then comes in the next wait."""
    here, there = pair(listener, nodes, spin_s=spin_s)
    with contextlib.closing(here), contextlib.closing(there):
        here.nudge()
        assert not here.await_bytes()
        here._alarm.ring()
        woken = []
        waiting = threading.Thread(target=lambda: woken.append(here.await_bytes()))
        waiting.start()
        waiting.join(0.3)
        assert not woken, "there is nothing to receive"
        here.nudge()
        waiting.join(10)
        assert woken == [False]
        there.send(b"x")
        assert here.await_bytes()


def test_each_end_knows_the_other_by_its_key(listener, nodes):
    here, there = pair(listener, nodes)
    with contextlib.closing(here), contextlib.closing(there):
        assert (here.peer, there.peer) == (nodes[0].id, nodes[1].id)


def test_stranger_is_refused_before_a_frame_is_read(listener, nodes):
    attic, _, stranger = nodes
    with pytest.raises(NodeGone, match="cannot reach node"):
        connect(listener.address, attic.id, stranger, [attic.certificate_der], deadline_s=0.04)
    wait_for_refusals(listener, 1)
    assert listener.accept(0) is None


def test_stranger_who_writes_without_waiting_is_refused(listener, nodes):
    attic, _, stranger = nodes
    context = client_context(stranger, [attic.certificate_der])
    with socket.create_connection(listener.address) as plain, context.wrap_socket(plain) as secured, contextlib.suppress(OSError):
        secured.sendall(encode(Hello(plan_version=1, purpose=Purpose.PIPE, stage=0, rank=0))[0])
        secured.recv(1)
    wait_for_refusals(listener, 1)
    assert listener.accept(0) is None


def test_caller_without_certificate_is_refused(listener):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(listener.address) as plain, context.wrap_socket(plain) as secured, pytest.raises((ssl.SSLError, ConnectionError)):
        secured.recv(1)
    wait_for_refusals(listener, 1)
    assert listener.accept(0) is None


def test_random_bytes_at_the_port_are_dropped_and_members_still_come_in(listener, nodes):
    for n in range(3):
        with socket.create_connection(listener.address) as plain, contextlib.suppress(OSError):
            plain.sendall(os.urandom(1000))
            plain.recv(100)
        wait_for_refusals(listener, n + 1)
    for end in pair(listener, nodes):
        end.close()


def test_silent_strangers_do_not_hold_members_up(listener, nodes):
    strangers = [socket.create_connection(listener.address) for _ in range(MAX_HANDSHAKES - 1)]
    try:
        started = time.monotonic()
        for end in pair(listener, nodes):
            end.close()
        assert time.monotonic() - started < 2
    finally:
        for stranger in strangers:
            stranger.close()


def test_when_all_places_are_taken_the_one_who_dawdles_longest_makes_room_for_a_member(listener, nodes):
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(listener.address)) for _ in range(MAX_HANDSHAKES)]
        for end in pair(listener, nodes):
            end.close()
        wait_for_refusals(listener, 1)
        assert has_ended(strangers[0])
        assert not any(map(has_ended, strangers[1:]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has all of 127.0.0.0/8 on its loopback")
def test_many_callers_of_one_address_do_not_displace_the_slow_one_of_another(listener, nodes):
    attic, kitchen, _ = nodes
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.create_connection(listener.address))
        for _ in range(3 * MAX_HANDSHAKES):
            stack.enter_context(socket.create_connection(listener.address, source_address=("127.0.0.2", 0)))
        wait_for_refusals(listener, 2 * MAX_HANDSHAKES + 1)
        assert sum(thread.name == "yoke-handshake" for thread in threading.enumerate()) == MAX_HANDSHAKES
        secured = stack.enter_context(client_context(kitchen, [attic.certificate_der]).wrap_socket(slow))
        assert secured.recv(1) == b"\x06"
        with contextlib.closing(listener.accept(5)) as channel:
            assert channel.peer == kitchen.id


def test_new_member_is_let_in_after_the_list_changed(listener, nodes):
    attic, _, stranger = nodes
    listener.set_members([stranger.certificate_der])
    channel = connect(listener.address, attic.id, stranger, [attic.certificate_der], deadline_s=5)
    accepted = listener.accept(5)
    with contextlib.closing(channel), contextlib.closing(accepted):
        assert accepted.peer == stranger.id
    with pytest.raises(NodeGone):
        connect(listener.address, attic.id, nodes[1], [attic.certificate_der], deadline_s=0.04)


def test_another_member_at_the_address_is_not_taken_for_the_expected_one(listener, nodes):
    attic, kitchen, stranger = nodes
    with pytest.raises(AdmissionError, match="expected node"):
        connect(listener.address, stranger.id, kitchen, [attic.certificate_der, stranger.certificate_der], deadline_s=5)


def test_unknown_node_at_the_address_is_refused_at_once(listener, nodes):
    _, kitchen, stranger = nodes
    with pytest.raises(AdmissionError, match="an unknown node answers"):
        connect(listener.address, stranger.id, kitchen, [stranger.certificate_der], deadline_s=5)


def test_connect_waits_for_a_listener_that_is_still_starting(nodes):
    attic, kitchen, _ = nodes
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = place.getsockname()
    started = []
    timer = threading.Timer(0.2, lambda: started.append(Listener(*address, attic, [kitchen.certificate_der])))
    timer.start()
    channel = connect(address, attic.id, kitchen, [attic.certificate_der], deadline_s=5)
    timer.join()
    channel.close()
    started[0].close()


def test_connect_gives_up_at_its_deadline(nodes):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(NodeGone, match="cannot reach node"):
            connect(silent.getsockname(), nodes[0].id, nodes[1], [nodes[0].certificate_der], deadline_s=0.2)
        assert time.monotonic() - started < 2


def test_frame_that_lies_about_its_size_is_refused_by_its_header(listener, nodes):
    here, there = pair(listener, nodes)
    with contextlib.closing(here), contextlib.closing(there):
        head = bytearray(encode(Hello(plan_version=1, purpose=Purpose.PIPE, stage=0, rank=0))[0][:40])
        head[20:24] = b"\xff\xff\xff\xff"
        here.send(head)
        with pytest.raises(RemoteProtocolError, match="4294967295"):
            receive_message(there, HELLO_LIMITS)


def test_half_a_frame_ends_with_node_gone(listener, nodes):
    here, there = pair(listener, nodes)
    with contextlib.closing(there):
        here.send(encode(Hello(plan_version=1, purpose=Purpose.PIPE, stage=0, rank=0))[0][:50])
        here.close()
        with pytest.raises(NodeGone, match=nodes[1].id[:12]):
            receive_message(there, Limits(max_tokens=1, width=0, max_outputs=1, max_body_bytes=100))


def test_closed_listener_stops_accepting_and_closes_channels_nobody_took(listener, nodes):
    attic, kitchen, _ = nodes
    channel = connect(listener.address, attic.id, kitchen, [attic.certificate_der], deadline_s=5)
    listener.close()
    with contextlib.closing(channel), pytest.raises(NodeGone):
        channel.receive_into(memoryview(bytearray(1)))
    for _ in range(2):
        with pytest.raises(NodeGone, match="stopped listening"):
            listener.accept(1)


def test_port_in_use_is_a_setting_error(listener, nodes):
    with pytest.raises(SettingError, match="cannot listen"):
        Listener(*listener.address, nodes[0], [])
