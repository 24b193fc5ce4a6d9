"""The doctor as a command: what it prints, what it calls bad, and with which exit code."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_group

from yoke.cli.main import app
from yoke.core.node import NodeId
from yoke.net.invite import Invite

pytestmark = pytest.mark.processes

MANUAL = Path(__file__).resolve().parents[2] / "docs"


def diagnosis(running):
    return json.loads(running.out)


def found(running, subject):
    """Levels and sentences of a subject."""
    return [(each["level"], each["sentence"]) for each in diagnosis(running)["findings"] if each["subject"] == subject]


def invite_to(port, host="127.0.0.1", key="a"):
    return Invite(node_id=NodeId(key * 64), hosts=(host,), port=port, secret=bytes(10)).encode()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def section():
    """The part of docs/cli.md about this command."""
    text = (MANUAL / "cli.md").read_text(encoding="utf-8")
    return text.split("## `yoke doctor`", 1)[1].split("\n## ", 1)[0]


def test_a_machine_that_is_well_gets_a_line_for_each_thing_and_code_0(yoke):
    running = yoke.run("doctor", env={"YOKE_PORT": "0"})
    lines = running.out.splitlines()
    assert all(re.match(r"(ok  |warn)  \w+: \S", line) for line in lines)
    subjects = {line.split()[1].rstrip(":") for line in lines}
    assert {"python", "packages", "ggml", "cores", "load", "memory", "state", "disk", "link", "port"} <= subjects
    assert not (yoke.home / "data").exists(), "looking made something"


def test_json_has_every_documented_field(yoke):
    answer = diagnosis(yoke.run("doctor", "--json"))
    assert set(answer) == set(re.findall(r"^\| `(\w+)` \|", section(), re.MULTILINE))
    assert answer["ok"] is True
    assert all(set(each) == {"level", "subject", "sentence", "remedy"} for each in answer["findings"])
    assert set(answer["facts"]) == {"software", "processor", "room", "network", "battery", "virtual_machine"}


def test_every_flag_and_every_subject_is_in_the_manual():
    for parameter in get_group(app).get_command(None, "doctor").params:
        assert parameter.help
        assert f"`{parameter.opts[0]}`" in section()
    page = (MANUAL / "doctor.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    text = (MANUAL.parent / "src" / "yoke" / "node" / "health.py").read_text(encoding="utf-8")
    assert named == set(re.findall(r'_(?:ok|warn|bad)\(\s*"(\w+)"', text))


def test_a_wrong_invite_is_a_wrong_flag(yoke):
    assert "this is not an invite" in yoke.run("doctor", "--invite", "hello", code=2).err


def test_a_coordinator_that_is_not_there_is_bad(yoke):
    running = yoke.run("doctor", "--json", "--invite", invite_to(closed_port()), code=3)
    assert diagnosis(running)["ok"] is False
    ((level, sentence),) = found(running, "coordinator")
    assert (level, sentence.startswith("nothing listens at 127.0.0.1")) == ("bad", True)
    assert "secret" not in running.out


def test_a_library_that_is_no_library_is_bad(yoke):
    (yoke.home / "libraries").mkdir()
    running = yoke.run("doctor", "--json", env={"YOKE_LIBRARY": str(yoke.home / "libraries")}, code=3)
    ((level, sentence),) = found(running, "ggml")
    assert level == "bad"
    assert "is not in" in sentence


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="making such a library takes a C compiler")
def test_a_library_for_another_processor_ends_itself_but_not_the_doctor(yoke):
    libraries = yoke.home / "libraries"
    libraries.mkdir()
    source = "__attribute__((constructor)) static void begin(void) { __builtin_trap(); }"
    for name in ("libggml-base.so", "libggml.so"):
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(libraries / name)], input=source.encode(), check=True)
    running = yoke.run("doctor", "--json", env={"YOKE_LIBRARY": str(libraries)}, code=3)
    ((level, sentence),) = found(running, "ggml")
    assert level == "bad"
    assert "built for another processor" in sentence


@pytest.mark.skipif(os.name != "posix", reason="files have modes on POSIX alone")
def test_a_key_that_others_may_read_is_bad(yoke, tmp_path):
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "node.pem").write_text("")
    (state / "node.pem").chmod(0o644)
    (state / "profile.json").write_text("{")
    running = yoke.run("doctor", "--json", "--state-dir", state, code=3)
    assert found(running, "state") == [("bad", f"others may read this node's key in {state}")]
    ((level, sentence),) = found(running, "profile")
    assert (level, "profile.json" in sentence) == ("warn", True)


def test_a_running_server_is_found_and_its_door_tried(yoke, kjv):
    port = closed_port()
    server = yoke.serve(kjv, "--cluster-port", port, "--cluster-host", "127.0.0.1")
    api_port = server.url.rsplit(":", 1)[1]
    here = yoke.run("doctor", "--json", env={"YOKE_PORT": api_port, "YOKE_CLUSTER_PORT": str(port)})
    assert found(here, "port") == [("ok", f"a server answers at port {api_port} at 127.0.0.1")]
    ((level, sentence),) = found(here, "coordinator")
    assert "with the right key" in sentence, (level, sentence)
    ((_, clock),) = found(here, "clock")
    assert "agrees with that of the coordinator" in clock
    elsewhere = yoke.run("doctor", "--json", "--invite", invite_to(port, key="b"), code=3)
    assert "another node answers" in found(elsewhere, "coordinator")[0][1]
    assert server.stop() == 130
