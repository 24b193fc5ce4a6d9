"""Machines with a network between them: each is a Linux network namespace, and all that connects them is a bridge on the first one."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.processes]

PROMPT = "And the LORD said unto"
ADDRESSES = {"hall": "10.83.0.1", "attic": "10.83.0.2", "cellar": "10.83.0.3"}
ASK = "import sys, urllib.request as r; print(r.urlopen(r.Request(sys.argv[1], sys.argv[2].encode() or None), timeout=30).read().decode())"


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def machines():
    """Names of namespaces by what the machine is called."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux, root and the command ip")
    names = {machine: f"yoke-{os.getpid()}-{machine}" for machine in ADDRESSES}
    try:
        hall = names["hall"]
        for name in names.values():
            if (made := ip("netns", "add", name, check=False)).returncode:
                pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hall, "link", "add", "bridge", "type", "bridge")
        ip("-n", hall, "addr", "add", f"{ADDRESSES['hall']}/24", "dev", "bridge")
        ip("-n", hall, "link", "set", "bridge", "up")
        for machine in ("attic", "cellar"):
            ip("link", "add", machine, "netns", hall, "type", "veth", "peer", "name", "net", "netns", names[machine])
            ip("-n", hall, "link", "set", machine, "master", "bridge", "up")
            ip("-n", names[machine], "addr", "add", f"{ADDRESSES[machine]}/24", "dev", "net")
            ip("-n", names[machine], "link", "set", "net", "up")
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name, check=False)


@pytest.fixture
def cluster(machines, yoke, make_yoke, kjv):
    """A server in the hall, one stage on each of three machines; the other two do not have the model's file. Yields how to ask it, the server and the members."""
    server = yoke.start(
        "serve", kjv, "--port", 0, "--nodes", 3, "--stages", 3, "--cluster-host", ADDRESSES["hall"], prefix=["ip", "netns", "exec", machines["hall"]]
    )
    invite = server.wait_for(r"yoke join (\S+)")[1]
    members = {}
    for machine in ("attic", "cellar"):
        members[machine] = make_yoke(machine).start("join", invite, "--name", machine, prefix=["ip", "netns", "exec", machines[machine]])
        members[machine].wait_for(f"joined as {machine}", stream="err")
    url = server.wait_for(r"serving \S+ at (http://\S+)")[1]

    def ask(path, body=None):
        data = "" if body is None else json.dumps(body)
        command = ["ip", "netns", "exec", machines["hall"], sys.executable, "-c", ASK, url + path, data]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False)
        return json.loads(asked.stdout) if asked.returncode == 0 else asked.stderr

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
    assert [member.wait(10) for member in members.values()] == [3, 3]


def test_a_machine_that_dies_is_named(cluster, wait_until):
    ask, server, members = cluster
    for process in members["cellar"].yoke.processes():
        process.kill()
    wait_until(lambda: "503" in str(ask("/health")), "the loss was not noticed")
    assert server.process.poll() is None
    assert server.stop() == 130
    assert members["attic"].wait(10) == 3
