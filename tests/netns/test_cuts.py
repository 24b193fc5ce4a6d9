"""A cable is pulled while a text streams over a shaped network: the text goes on, and over a bad one nobody is missed by mistake."""

import json
import subprocess
import sys
import threading

import pytest

from yoke.testing.shape import WIFI, WIRED

pytestmark = [pytest.mark.netns, pytest.mark.processes]

PROMPT = "And the LORD said unto"
N_TOKENS = 250
STREAM = """
import json, sys, urllib.request as r
body = json.dumps({"prompt": sys.argv[2], "max_tokens": int(sys.argv[3]), "temperature": 0.8, "seed": 5, "ignore_eos": True, "stream": True}).encode()
for line in r.urlopen(r.Request(sys.argv[1] + "/v1/completions", body), timeout=60):
    print(line.decode().strip(), flush=True)
"""
ASK = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + '/yoke/status', timeout=30).read().decode())"


class Stream:
    """A streamed completion, asked for on the first machine."""

    def __init__(self, net, url):
        command = [sys.executable, "-c", STREAM, url, PROMPT, str(N_TOKENS)]
        self.process = net.start("hall", command, stdout=subprocess.PIPE)
        self.texts, self.error = [], None
        self.is_far = threading.Event()
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        for line in self.process.stdout:
            data = line.strip().removeprefix("data: ")
            if data and data != "[DONE]":
                event = json.loads(data)
                self.error = event.get("error", self.error)
                self.texts += [choice["text"] for choice in event.get("choices", ())]
            if len(self.texts) >= 20:
                self.is_far.set()

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive(), f"hangs after {len(self.texts)} tokens"
        self.process.communicate()
        assert self.error is None
        return "".join(self.texts)


@pytest.fixture
def served(make_network, yoke, make_yoke, kjv):
    """Three machines, a stage each, over a network of the given profile."""

    def serve(profile):
        net = make_network(["hall", "attic", "cellar"], profile, seed=5)
        flags = ["--port", 0, "--nodes", 3, "--stages", 3, "--cluster-host", net.addresses["hall"], "--cache-type", "f32"]
        server = yoke.start("serve", kjv, *flags, prefix=net.prefix("hall"))
        invite = server.wait_for(r"yoke join (\S+)")[1]
        for machine in ("attic", "cellar"):
            make_yoke(machine).start("join", invite, "--name", machine, prefix=net.prefix(machine))
        return net, server, server.wait_for(r"serving \S+ at (http://\S+)", seconds=120)[1]

    return serve


def status(net, url):
    return json.loads(net.run("hall", [sys.executable, "-c", ASK, url], capture_output=True, timeout=40).stdout)


def test_a_cable_that_is_pulled_stops_no_text(served, wait_until):
    net, server, url = served(WIRED)
    right = Stream(net, url).end()
    stream = Stream(net, url)
    assert stream.is_far.wait(30)
    net.cut("attic")
    assert stream.end() == right
    assert "attic" not in {node["name"] for node in status(net, url)["nodes"]}
    net.mend("attic")
    wait_until(lambda: "attic" in {node["name"] for node in status(net, url)["nodes"]}, "attic did not come back", 30)
    assert server.stop(seconds=30) == 130


def test_a_bad_radio_is_no_death(served):
    """3 ms, as much jitter, and one packet in a hundred lost: slow, but everybody is there to the end."""
    net, server, url = served(WIFI)
    assert len(Stream(net, url).end()) > N_TOKENS
    told = status(net, url)
    assert {node["name"] for node in told["nodes"]} >= {"attic", "cellar"}
    assert not [line for line in told["news"] if "is gone" in line]
    assert server.stop(seconds=30) == 130
