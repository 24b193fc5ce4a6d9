"""Whatever comes in, the answer is a plain sentence, and nothing else is disturbed."""

import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import ssl
import struct
import subprocess
import sys
import threading
from dataclasses import replace

import psutil
import pytest

from yoke.core.node import Device, Rate
from yoke.net.identity import Identity
from yoke.net.invite import Invite
from yoke.node import messages as say
from yoke.node.admission import knock
from yoke.node.notes import ErrorNote

pytestmark = pytest.mark.processes


def patched(source, target, old, new):
    """A copy of a model file with some bytes replaced, once."""
    data = source.read_bytes()
    assert data.count(old) == 1
    target.write_bytes(data.replace(old, new))
    return target


def text_field(text):
    return struct.pack("<Q", len(text)) + text


def truncated(source, target):
    target.write_bytes(source.read_bytes()[:-1000])
    return target


def cut_in_the_header(source, target):
    target.write_bytes(source.read_bytes()[:500])
    return target


def foreign(_source, target):
    target.write_bytes(b"PK\x03\x04" + bytes(1000))
    return target


def empty(_source, target):
    target.touch()
    return target


def of_unknown_architecture(source, target):
    return patched(source, target, text_field(b"llama"), text_field(b"zebra"))


def without_a_tensor(source, target):
    return patched(source, target, text_field(b"blk.0.attn_q.weight"), text_field(b"blk.0.attn_z.weight"))


def of_a_wrong_shape(source, target):
    name = text_field(b"blk.0.attn_k.weight")
    return patched(source, target, name + struct.pack("<IQQ", 2, 64, 32), name + struct.pack("<IQQ", 2, 32, 64))


def missing(_source, target):
    return target


def a_directory(_source, target):
    target.mkdir()
    return target


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "cut short"),
        (cut_in_the_header, "cut short|ends|bytes"),
        (foreign, "expected b'GGUF'"),
        (empty, "GGUF|empty"),
        (of_unknown_architecture, "architecture 'zebra'"),
        (without_a_tensor, "blk.0.attn_q.weight"),
        (of_a_wrong_shape, "blk.0.attn_k.weight"),
        (missing, "does not exist"),
        (a_directory, "is a directory.*yoke convert"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_model_file_is_named_with_its_fault(yoke, endless, make, words):
    path = make(endless, yoke.home / "bad.gguf")
    running = yoke.run("run", path, "-p", "a", code=2)
    assert running.err.startswith("error: ")
    assert len(running.err.splitlines()) == 1
    assert re.search(words, running.err), running.err
    assert running.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "temperature is nan; expected"),
        (["--top-p", "5"], "top_p is 5.0; expected"),
        (["-n", "0"], "max_tokens is 0; expected at least 1"),
        (["--context", "999999"], "at most 8192 tokens"),
        (["--cells", "1"], "expected at least the context"),
        (["--shares", "a:b"], "numbers with colons"),
        (["--stages", "20"], "take 20 nodes; there are 1"),
        (["--backend", "abacus"], "expected one of ggml, reference"),
        (["--threads", "-4"], "expected a whole number"),
        (["--no-such-flag"], "No such option"),
        (["-p", b"\xff\xfe"], "is not UTF-8"),
        (["-p", ""], "the prompt is empty"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_refused_with_exit_code_2(yoke, endless, arguments, words):
    arguments = [os.fsdecode(argument) for argument in arguments]
    assert words in yoke.run("run", endless, "-p", "abc", *arguments, code=2).err


def test_a_prompt_that_is_no_text_is_refused(yoke, endless, tmp_path):
    (tmp_path / "noise").write_bytes(b"ab\xff")
    with (tmp_path / "noise").open() as noise:
        assert "byte 2 is 0xff, which is not UTF-8" in yoke.run("run", endless, "-p", "-", code=2, stdin=noise).err


def test_a_prompt_longer_than_the_context_is_refused(yoke, kjv):
    assert "the context holds 1024" in yoke.run("run", kjv, "-p", "word " * 2000, code=2).err


@pytest.mark.parametrize("how", [{"env": {"YOKE_MEMORY_SHARE": "0.01", "YOKE_CELLS": "16000000"}}, {}], ids=["little memory", "many cells"])
def test_a_model_that_is_too_big_says_how_many_bytes_are_missing(yoke, kjv, how):
    error = yoke.run("run", kjv, "-p", "a", *([] if how else ["--cells", 16000000]), code=2, **how).err
    needed, offered, lacking = (
        float(found[1]) * {"MB": 1e-3, "GB": 1.0}[found[2]]
        for pattern in (r"needs ([\d.]+) (\wB) for", r"offer ([\d.]+) (\wB)", r"([\d.]+) (\wB) are missing")
        for found in (re.search(pattern, error),)
    )
    assert lacking == pytest.approx(needed - offered, abs=0.02)
    assert lacking > 0


def test_a_device_that_is_not_there_is_named(yoke, endless):
    assert "device 'warp' is not there; this build offers CPU" in yoke.run("run", endless, "-p", "a", "--device", "warp", code=2).err


def test_the_api_is_not_opened_to_other_machines_without_a_key(yoke, endless):
    error = yoke.run("serve", endless, "--host", "0.0.0.0", "--port", 0, code=2).err
    assert "can be reached by other machines, and the API has no key" in error


def test_a_port_that_is_taken_is_named(yoke, endless):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in yoke.run("serve", endless, "--port", port, code=2).err
        assert (
            f"127.0.0.1 port {port}" in yoke.run("serve", endless, "--port", 0, "--nodes", 2, "--cluster-host", "127.0.0.1", "--cluster-port", port, code=2).err
        )


def test_status_of_what_is_no_server_says_so(yoke):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        thread = threading.Thread(target=lambda: _answer_once(silent, b"220 mail ready\r\n"))
        thread.start()
        assert "is `yoke serve` running there?" in yoke.run("status", "--url", f"http://127.0.0.1:{port}", code=3).err
        thread.join(10)
    for url, words in [(f"http://127.0.0.1:{port}", "Connection refused"), ("http://127.0.0.1:x", "no answer from"), ("mail:x", "is not an address")]:
        assert words in yoke.run("status", "--url", url, code=3).err


def _answer_once(listener, data):
    connection, _ = listener.accept()
    with connection:
        connection.sendall(data)


# Converting


def test_convert_of_what_is_no_model_says_what_is_missing(yoke, repository, tmp_path):
    assert "config.json" in yoke.run("convert", tmp_path, yoke.home / "x.gguf", code=2).err
    source = repository / "models" / "kjv-9m"
    assert "type 'ZZ' is unknown; known are F32" in yoke.run("convert", source, yoke.home / "x.gguf", "--type", "zz", code=2).err
    assert "No such file or directory" in yoke.run("convert", source, yoke.home / "none" / "x.gguf", code=2).err
    assert "is not a plain file" in yoke.run("convert", source, yoke.home, code=2).err
    assert not list(yoke.home.rglob("*.gguf"))


@pytest.fixture
def full_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kind", ["f32", "q4_k_m"])
def test_convert_to_a_full_disk_says_so_and_leaves_nothing(yoke, repository, full_disk, kind):
    error = yoke.run("convert", repository / "models" / "kjv-9m", full_disk / "x.gguf", "--type", kind, code=2).err
    assert "cannot be written" in error
    assert "free some space" in error
    assert list(full_disk.iterdir()) == []


# Over HTTP


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -5}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 1e300}, 400, "temperature"),
        ({"top_p": 7}, 400, "top_p"),
        ({"top_k": -3}, 400, "top_k"),
        ({"min_p": 2}, 400, "min_p"),
        ({"seed": 2**80}, 400, "seed"),
        ({"n": 3}, 400, "n is not supported"),
        ({"stop": [""]}, 400, "stop"),
        ({"model": "none"}, 404, "model 'none' is not loaded"),
        ({"prompt": "word " * 3000}, 400, "the context holds 1024"),
        ({"prompt": [4095, 9_999_999]}, 400, "outside 0..4095"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_request_is_refused_by_name_and_disturbs_nothing(pool, body, status, words):
    with pool.http() as client:
        answer = client.post("/v1/completions", json={"prompt": "abc", **body})
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    pool.wait_idle()


NO_JSON_OBJECTS = [b"", b"{", b"null", b"[1]", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"prompt":"a","prompt":']


@pytest.mark.parametrize("body", NO_JSON_OBJECTS, ids=lambda body: repr(body[:12]))
def test_a_body_that_is_no_json_object_is_refused(pool, body):
    with pool.http() as client:
        answer = client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_a_hundred_megabytes_is_refused(pool):
    server = psutil.Process(pool.pid)
    before = server.memory_info().rss
    with pool.http() as client:
        answer = client.post("/v1/completions", content=b"x" * 100_000_000)
    assert answer.status_code == 413
    assert server.memory_info().rss - before < 64_000_000


def test_no_bad_neighbour_changes_the_text_of_a_stream(pool):
    with pool.stream("In the beginning", n=400) as lines:
        quiet = texts_of(lines)
    seen = []
    with pool.stream("In the beginning", n=400) as lines:
        reader = threading.Thread(target=lambda: seen.extend(lines))
        reader.start()
        with pool.http() as client:
            for _ in range(3):
                assert client.post("/v1/completions", json={"prompt": "a " * 9000}).status_code == 400
                assert client.post("/v1/completions", content=b"{").status_code == 400
                assert client.get("/nowhere").status_code == 404
                with pool.stream("And it came to pass", n=900):
                    pass  # a client that leaves at once
                for port in listening(pool.yoke):
                    throw(port, secrets.token_bytes(4096))
        reader.join(60)
    assert texts_of(seen) == quiet
    pool.wait_idle()


def texts_of(lines):
    """The text of a stream's events, in order, and that it ended as it should."""
    lines = list(lines)
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]


# At the ports where machines join and exchange data


def listening(yoke):
    """Every port that a process of the command listens on."""
    ports = set()
    for process in yoke.processes():
        with contextlib.suppress(psutil.Error):
            ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return ports


def throw(port, data):
    """Connect, send, and read what comes back until the other side closes."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.fixture
def waiting(yoke, kjv):
    """A server that waits for a node, with its ports open, and its invite; ``http`` is the port of its API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = yoke.start("serve", kjv, "--port", port, "--nodes", 2, "--stages", 2, "--cluster-host", "127.0.0.1")
    server.http = port
    return server, Invite.decode(server.wait_for(r"yoke join (\S+)")[1])


def check_still_works(server, invite, make_yoke, kjv):
    """The awaited node comes, and the model is served."""
    member = make_yoke("guest").start("join", invite.encode())
    server.wait_for(r"serving \S+ at (http://\S+)")
    assert "Traceback" not in server.err
    assert server.stop() == 130
    assert member.wait(10) == 0


def test_noise_at_the_ports_keeps_nobody_out(yoke, make_yoke, waiting, kjv):
    server, invite = waiting
    ports = listening(yoke) - {server.http}
    assert invite.port in ports
    assert len(ports) == 2
    held = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(4)]
    for port in ports:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(100_000), b"\x16\x03\x01\xff\xff" + bytes(1000)):
            assert len(throw(port, data)) < 100, "a stranger is told nothing but a TLS alert"
    check_still_works(server, invite, make_yoke, kjv)
    for connection in held:
        connection.close()


def test_a_stranger_with_a_key_of_its_own_is_not_let_in_at_the_data_port(yoke, make_yoke, waiting, kjv, tmp_path):
    server, invite = waiting
    (port,) = listening(yoke) - {invite.port, server.http}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(Identity.load_or_create(tmp_path / "stranger").pem_path)
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(bytes(1000))
        received = connection.recv(100)
    assert received == b""
    check_still_works(server, invite, make_yoke, kjv)


def test_wrong_invites_are_refused_with_a_plain_sentence(make_yoke, waiting, kjv):
    server, invite = waiting
    guest = make_yoke("stranger")
    text = invite.encode()
    mistyped = text[:-5] + ("a" if text[-5] != "a" else "b") + text[-4:]
    assert "mistyped or cut off" in guest.run("join", mistyped, code=2).err
    assert "mistyped or cut off" in guest.run("join", text[:40], code=2).err
    assert "is not an invite" in guest.run("join", "hello", code=2).err
    assert "the invite is not valid" in guest.run("join", replace(invite, secret=bytes(10)).encode(), code=3).err
    assert "another node than the invite's answers" in guest.run("join", replace(invite, node_id="ab" * 32).encode(), code=3).err
    assert server.process.poll() is None
    check_still_works(server, invite, make_yoke, kjv)
    assert "no answer from the coordinator" in guest.run("join", text, code=3).err


def ready(identity, name="liar"):
    rates = (Rate(weight_type="F32", threads=1, matvec_bytes_per_s=1e9, matmul_flop_per_s=1e10),)  # nothing is left to ask
    device = Device(name="CPU", description="none", backend="ggml", free_bytes=10**9, matvec_bytes_per_s=1e9, threads=1, rates=rates)
    message = say.Ready(
        id=identity.id, name=name, certificate=identity.certificate_der, port=1, device=device, devices=(device,), backend_version="0", yoke_version="0"
    )
    return say.encode(message)


LIES = {
    "a size that it does not have": struct.pack("<I", 0xFFFFFFFF),
    "no message": struct.pack("<I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
    "an answer in the engine's name": say.encode(say.Answer(id="r", error=ErrorNote(kind="NodeError", message="no"))),
    "tokens in the engine's name": say.encode(say.Accepted(id="r", prompt=(1,))),
    "half a message": struct.pack("<I", 4_000_000) + b"x",
    "an answer nobody asked for": say.encode(say.Status()) + say.encode(say.Loaded(version=7)),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_invited_liar_is_dropped_and_nobody_else_notices(liars_server, tmp_path, lie):
    server, invite = liars_server
    identity = Identity.load_or_create(tmp_path / "liar")

    async def tell():
        reader, writer = await knock(invite, identity)
        try:
            writer.write(ready(identity) + LIES[lie])
            await writer.drain()
            async with asyncio.timeout(10):
                return b"" if lie.startswith("an answer") else await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    assert len(asyncio.run(tell())) < 10_000
    assert server.complete("In the beginning", 8) != ""
    assert "liar" not in [node["name"] for node in server.status()["nodes"]]
    assert "Traceback" not in server.err


@pytest.fixture(scope="module")
def liars_server(tmp_path_factory, yoke_in, kjv, pool):
    with yoke_in(tmp_path_factory.mktemp("liars") / "home") as command:
        server = command.start("serve", kjv, "--port", 0, "--cluster-host", "127.0.0.1", kind=type(pool)).ready()
        yield server, Invite.decode(re.search(r"yoke join (\S+)", server.out)[1])
        assert server.stop() == 130
