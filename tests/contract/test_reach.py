"""Calling coordinators and looking at ports, on loopback: whoever answers, refuses, stays silent or is somebody else is told apart."""

import contextlib
import socket
import ssl
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from yoke.net.identity import Identity, admission_server_context
from yoke.node import reach
from yoke.node.reach import Outcome, PortUse, addresses_of, call, call_all, clock_skew, interface_towards, port_use, within

HERE = "127.0.0.1"


@pytest.fixture
def nodes(tmp_path):
    return [Identity.load_or_create(tmp_path / name) for name in ("attic", "kitchen")]


@contextlib.contextmanager
def listening(serve):
    """A listener whose every connection ``serve`` has; yields its port."""
    with socket.create_server((HERE, 0)) as door:
        over = threading.Event()

        def accept():
            with contextlib.suppress(OSError):
                while not over.is_set():
                    connection, _ = door.accept()
                    with connection, contextlib.suppress(OSError):
                        serve(connection, over)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield door.getsockname()[1]
        finally:
            over.set()
            with contextlib.suppress(OSError), socket.create_connection((HERE, door.getsockname()[1]), 1):
                pass
            thread.join(5)


@contextlib.contextmanager
def coordinator(identity):
    """A door as a coordinator has it: TLS, then a few bytes to whoever knocks."""
    context = admission_server_context(identity)

    def serve(connection, over):
        with contextlib.suppress(ssl.SSLError), context.wrap_socket(connection, server_side=True) as secured:
            secured.sendall(bytes(33))

    with listening(serve) as port:
        yield port


@contextlib.contextmanager
def http_server(body=b'{"status": "ok"}', ahead_s=0.0, status=200):
    """An HTTP server whose clock is ahead of ours."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(status)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Say nothing."""

    with HTTPServer((HERE, 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(5)


def free_port():
    with socket.create_server((HERE, 0)) as door:
        return door.getsockname()[1]


def test_a_coordinator_with_the_right_key_is_reached(nodes):
    with coordinator(nodes[0]) as port:
        made = call(HERE, port, nodes[0].id)
    assert (made.outcome, made.host, made.port) == (Outcome.REACHED, HERE, port)
    assert 0 < made.seconds < reach.REACH_S


def test_another_key_is_noticed(nodes):
    with coordinator(nodes[0]) as port:
        made = call(HERE, port, nodes[1].id)
    assert (made.outcome, made.detail) == (Outcome.ANOTHER_KEY, nodes[0].id)


def test_a_port_where_nobody_listens_refuses(nodes):
    assert call(HERE, free_port(), nodes[0].id).outcome is Outcome.REFUSED


def test_who_speaks_something_else_is_no_coordinator(nodes):
    with listening(lambda connection, over: connection.sendall(b"220 mail.example ready\r\n")) as port:
        assert call(HERE, port, nodes[0].id).outcome is Outcome.NOT_YOKE


def test_who_hangs_up_at_once_is_no_coordinator(nodes):
    with listening(lambda connection, over: None) as port:
        assert call(HERE, port, nodes[0].id).outcome is Outcome.NOT_YOKE


def test_who_never_says_anything_is_silent(nodes, monkeypatch):
    monkeypatch.setattr(reach, "REACH_S", 0.1)
    with listening(lambda connection, over: over.wait(5)) as port:
        assert call(HERE, port, nodes[0].id).outcome is Outcome.SILENT


@pytest.mark.parametrize("name", ["no-such-machine.invalid", "a" * 300, "a..b"])
def test_a_name_that_nobody_knows_leads_nowhere(nodes, name):
    assert call(name, 7000, nodes[0].id).outcome is Outcome.NO_SUCH_NAME


def test_all_addresses_are_called_and_the_clock_is_asked_of_one_that_answers(nodes):
    with coordinator(nodes[0]) as port, http_server(ahead_s=-120.0) as api_port:
        refused, reached = call_all(("127.0.0.2", HERE), port, nodes[0].id, api_port)
    assert (refused.outcome, refused.skew_s) == (Outcome.REFUSED, None)
    assert reached.outcome is Outcome.REACHED
    assert reached.skew_s == pytest.approx(-120.0, abs=5.0)


def test_a_clock_that_is_right_is_right_to_seconds():
    with http_server() as port:
        assert clock_skew(HERE, port) == pytest.approx(0.0, abs=5.0)


def test_without_a_date_nothing_is_said_of_a_clock():
    assert clock_skew(HERE, free_port()) is None
    with listening(lambda connection, over: connection.sendall(b"HTTP/1.1 200 OK\r\nDate: yesterday\r\n\r\n{}")) as port:
        assert clock_skew(HERE, port) is None


def test_ports_are_told_apart_by_who_has_them():
    assert port_use(HERE, 0) is PortUse.FREE
    with http_server() as port:
        assert port_use(HERE, port) is PortUse.YOKE
    with http_server(body=b'{"error": {"message": "no model"}}', status=503) as port:
        assert port_use(HERE, port) is PortUse.YOKE
    with http_server(body=b"<html>") as port:
        assert port_use(HERE, port) is PortUse.OTHER
    with listening(lambda connection, over: connection.sendall(b"220 mail.example ready\r\n")) as port:
        assert port_use(HERE, port) is PortUse.OTHER
    assert port_use("192.0.2.1", 8080) is PortUse.NOT_HERE
    assert port_use("no-such-machine.invalid", 8080) is PortUse.NOT_HERE


def test_names_lead_to_addresses_or_nowhere():
    assert addresses_of("127.0.0.1") == ("127.0.0.1",)
    assert addresses_of("no-such-machine.invalid") == ()


def test_the_way_to_this_machine_is_no_radio():
    interface = interface_towards(HERE)
    assert interface is not None
    assert not interface.is_wireless
    assert interface_towards("no-such-machine.invalid") is None


def test_what_does_not_end_in_time_is_left_behind():
    over = threading.Event()
    try:
        assert within([lambda: 1, lambda: over.wait(20), lambda: 3], 0.2) == [1, None, 3]
    finally:
        over.set()
