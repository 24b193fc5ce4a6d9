"""A cluster over machines that have nothing in common but a network."""

import json
import sys

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.processes]

PROMPT = "And the LORD said unto"
ASK = "import sys, urllib.request as r; print(r.urlopen(r.Request(sys.argv[1], sys.argv[2].encode() or None), timeout=30).read().decode())"


@pytest.fixture
def cluster(machines, yoke, make_yoke, kjv):
    """A server in the hall, one stage on each of three machines; the other two do not have the model's file. Yields how to ask it, the server and the members."""
    server = yoke.start("serve", kjv, "--port", 0, "--nodes", 3, "--stages", 3, "--cluster-host", machines.addresses["hall"], prefix=machines.prefix("hall"))
    invite = server.wait_for(r"yoke join (\S+)")[1]
    members = {}
    for machine in ("attic", "cellar"):
        members[machine] = make_yoke(machine).start("join", invite, "--name", machine, prefix=machines.prefix(machine))
        members[machine].wait_for(f"joined as {machine}", stream="err")
    url = server.wait_for(r"serving \S+ at (http://\S+)")[1]

    def ask(path, body=None):
        data = "" if body is None else json.dumps(body)
        asked = machines.run("hall", [sys.executable, "-c", ASK, url + path, data], capture_output=True, timeout=40)
        assert asked.returncode == 0, asked.stderr.decode() + server.story()
        return json.loads(asked.stdout)

    return ask, server, members


def test_three_machines_write_what_one_writes(cluster, make_yoke, kjv):
    ask, server, members = cluster
    answer = ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 32, "temperature": 0})
    alone = make_yoke("alone").run("run", kjv, "-p", PROMPT, "-n", 32, "--json")
    assert answer["choices"][0]["text"] == json.loads(alone.out)["text"]
    assert {"attic", "cellar"} < {stage["node"] for stage in ask("/yoke/status")["stages"]}
    for member in members.values():
        assert not list(member.yoke.home.rglob("*.gguf"))
    assert server.stop() == 130
    assert [member.wait(10) for member in members.values()] == [0, 0]


def test_the_others_go_on_without_a_machine_that_died(cluster, wait_until):
    ask, server, members = cluster
    body = {"prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    before = ask("/v1/completions", body)["choices"][0]["text"]
    for process in members["cellar"].yoke.processes():
        process.kill()
    wait_until(lambda: "cellar" not in {node["name"] for node in ask("/yoke/status")["nodes"]}, "the loss was not noticed")
    assert ask("/v1/completions", body)["choices"][0]["text"] == before
    assert server.stop() == 130
    assert members["attic"].wait(10) == 0
