"""A node or a worker dies while a stream runs: the stream ends with an error that names the node, later requests are told, and the server stays up."""

import json
import re
import threading
import time

import pytest

pytestmark = pytest.mark.processes


def nodes_of(yoke, server):
    """The local node processes by name, each with its worker; this machine's own is called by the server's first node."""
    found = {}
    for process in yoke.processes():
        line = process.cmdline()
        if "join" in line:
            found[line[line.index("--name") + 1]] = process
    return found


def worker_of(yoke, parent):
    return next(process for process in yoke.processes() if process.ppid() == parent and "yoke.node.worker" in process.cmdline())


def check_told(server, name, lines, begun_s):
    """The stream's last event names the node, and so does everything after it."""
    error = json.loads(lines[-1])["error"]
    assert error["message"].startswith(f"{name} is gone")
    assert error["code"] == "unavailable"
    assert time.monotonic() - begun_s < 10
    with server.http() as client:
        for _ in range(2):
            answer = client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4})
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == error["message"]
        assert client.get("/health").status_code == 503
        assert client.get("/yoke/status").json()["model"] is None
        assert client.get("/v1/models").status_code == 200
    assert server.process.poll() is None
    assert "Traceback" not in server.err


@pytest.mark.parametrize(("victim", "stage"), [("worker", 0), ("worker", 1), ("worker", 2), ("node", 1), ("node", 2)])
def test_a_stream_ends_with_the_name_of_the_node_that_died(yoke, endless, victim, stage):
    server = yoke.serve(endless, "--local-nodes", 3, "--stages", 3)
    name = server.status()["stages"][stage]["node"]
    node = nodes_of(yoke, server).get(name)
    process = worker_of(yoke, server.pid if node is None else node.pid) if victim == "worker" else node
    seen = []
    with server.stream() as lines:
        reader = threading.Thread(target=lambda: seen.extend(lines))
        reader.start()
        begun_s = time.monotonic()
        process.kill()
        reader.join(10)
        assert not reader.is_alive()
    check_told(server, name, seen, begun_s)
    assert re.search(r"no model is being served", yoke.run("status", "--url", server.url).out)
    assert server.stop() == 130
    assert yoke.leftovers() == []


def test_a_run_ends_with_the_name_of_the_node_that_died(yoke, endless, wait_until):
    running = yoke.start("run", endless, "-p", "abc", "-n", 8000, "--ignore-eos", "--local-nodes", 3)
    wait_until(lambda: len(running.out) > 20, running.story, 30)
    name, node = nodes_of(yoke, running).popitem()
    node.kill()
    assert running.wait(10) == 3
    assert f"error: {name} is gone" in running.err
    yoke.wait_gone()
    assert yoke.leftovers() == []


def test_a_node_that_dies_while_it_loads_ends_the_command(yoke, kjv, wait_until):
    running = yoke.start("serve", kjv, "--port", 0, "--local-nodes", 2)
    node = wait_until(lambda: nodes_of(yoke, running), "no local node was started")
    node.popitem()[1].kill()
    assert running.wait(20) == 3
    assert re.search("is gone|a local node ended before it had joined", running.err)
    yoke.wait_gone()
    assert yoke.leftovers() == []
