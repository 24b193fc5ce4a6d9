"""``yoke plan`` as a process: with this machine's own worker, and with what it would be with others."""

import json
import re

import pytest

pytestmark = pytest.mark.processes


def test_this_machine_is_measured_and_others_are_thought_of(yoke, kjv):
    running = yoke.run("plan", kjv, "--add", "giant: 64 GB, 2000 GB/s, 0.1 ms, 10 Gbit/s", "--explain")
    assert re.search(r"with giant: [\d.]+ -> [\d.]+ tokens/s for one stream", running.out)
    assert "giant" in running.out
    assert "instead: " in running.out


def test_local_nodes_are_all_there_and_used(yoke, kjv):
    plan = json.loads(yoke.run("plan", kjv, "--local-nodes", 2, "--json", "--for", "throughput").out)
    assert len(plan["shards"]) == 2
    assert plan["left_out"] == {}
    assert plan["goal"] == "throughput"


def test_wrong_file_is_refused_with_its_line(yoke, kjv):
    (yoke.home / "cluster.yaml").write_text("nodes:\n  - name: a\n    memory: lots\n    speed: 1 GB/s\n")
    running = yoke.run("plan", kjv, "--cluster", "cluster.yaml", code=2)
    assert "cluster.yaml, line 3: nodes[0].memory is 'lots': expected an amount of memory such as 16 GB" in running.err
    assert running.out == ""


def test_file_starts_no_process(yoke, kjv):
    (yoke.home / "cluster.yaml").write_text("nodes: [{name: a, memory: 1 GB, speed: 1 GB/s}]")
    running = yoke.run("plan", kjv, "--cluster", "cluster.yaml", "--json", env={"YOKE_LIBRARY": "/nowhere"})
    assert json.loads(running.out)["shards"][0]["node"] == "a"
    assert not list(yoke.home.rglob("*key*")), "nothing is kept"
