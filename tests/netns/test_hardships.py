"""What machines go through beside cut cables: clocks that are wrong or jump, disks that are full or fill up. Texts are right, and what failed is named."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from yoke.testing.shape import MEGABIT, WIRED

pytestmark = [pytest.mark.netns, pytest.mark.processes]

# Reading a text again in chunks rounds differently in the last digit than writing it did. No draw of this text lies within 8e-6 of a border between two tokens.
PROMPT, SEED, N_TOKENS = "And the LORD said unto", 5, 250
HOUR_S, YEAR_S = 3600, 365 * 86400
STREAM = """
import json, sys, urllib.request as r
prompt, max_tokens, seed = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.8, "seed": seed, "ignore_eos": True, "stream": True}).encode()
for line in r.urlopen(r.Request(sys.argv[1] + "/v1/completions", body), timeout=60):
    print(line.decode().strip(), flush=True)
"""
ASK = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + '/yoke/status', timeout=30).read().decode())"

# A machine's clock cannot be set without setting that of all machines here. So the C library's answers are shifted: Python, OpenSSL and ggml all ask it.
CLOCK = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *shift_s;
__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("CLOCK_SHIFT"), O_RDONLY);
    shift_s = mmap(0, sizeof *shift_s, PROT_READ, MAP_SHARED, file, 0);
    close(file);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    int said = syscall(SYS_clock_gettime, clock, now);
    if (!said && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *shift_s;
    return said;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *kept) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (kept) *kept = fine.tv_sec;
    return fine.tv_sec;
}
"""


class Stream:
    """A streamed completion, asked for on the first machine."""

    def __init__(self, net, url):
        command = [sys.executable, "-c", STREAM, url, PROMPT, str(N_TOKENS), str(SEED)]
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


class Clock:
    """A machine's clock as its programs see it: so many seconds from the right time. They get it by ``settings``."""

    def __init__(self, library, path):
        self.path = path
        self.settings = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(path)}
        self.jump(0)

    def jump(self, shift_s):
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)
        os.pwrite(descriptor, struct.pack("@l", int(shift_s)), 0)
        os.close(descriptor)


@pytest.fixture(scope="session")
def clock_library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) is here, which a clock of one machine alone takes")
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=CLOCK, text=True, check=True)
    return library


@pytest.fixture
def clocks(clock_library, tmp_path):
    """A clock for each machine."""
    return {name: Clock(clock_library, tmp_path / f"{name}.shift") for name in ("hall", "attic", "cellar")}


@pytest.fixture
def net(make_network):
    return make_network(["hall", "attic", "cellar"], WIRED, seed=5)


@pytest.fixture
def serve(net, yoke, make_yoke, kjv):
    """A server in the hall, and members on the machines named, each with settings of its own. Gives the server, its invite, its address and the members."""

    def begin(members, *flags, settings=None):
        settings = settings or {}
        flags = ["--port", 0, "--nodes", len(members) + 1, "--cluster-host", net.addresses["hall"], "--cache-type", "f32", *flags]
        server = yoke.start("serve", kjv, *flags, prefix=net.prefix("hall"), env=settings.get("hall"))
        invite = server.wait_for(r"yoke join (\S+)")[1]
        joined = {name: make_yoke(name).start("join", invite, "--name", name, prefix=net.prefix(name), env=settings.get(name)) for name in members}
        return server, invite, server.wait_for(r"serving \S+ at (http://\S+)", seconds=120)[1], joined

    return begin


@pytest.fixture
def join_on_disk(net, make_yoke, tmp_path):
    """A machine whose state directory is a small disk of its own. Gives the running command, and the disk as it is seen from here."""

    def begin(name, invite, megabytes, **settings):
        disk = tmp_path / f"disk of {name}"
        disk.mkdir()
        mounting = ["sh", "-c", f'mount -t tmpfs -o size={megabytes}m tmpfs "$0" && exec "$@"', str(disk)]
        joined = make_yoke(name).start("join", invite, "--name", name, "--state-dir", disk, prefix=[*net.prefix(name), *mounting], env=settings)
        joined.wait_for(f"joined as {name}", stream="err")
        return joined, Path(f"/proc/{joined.pid}/root{disk}")

    return begin


def status(net, url):
    return json.loads(net.run("hall", [sys.executable, "-c", ASK, url], capture_output=True, timeout=40).stdout)


def names(net, url):
    return {node["name"] for node in status(net, url)["nodes"]}


def server_name(told):
    """The machine that serves: the only one whose name was not chosen here."""
    return next(node["name"] for node in told["nodes"] if node["name"] not in {"attic", "cellar"})


def fill(disk):
    """Leave no room on it."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        while os.statvfs(disk).f_bavail:
            filler.write(bytes(1 << 12))


def test_clocks_that_jump_while_a_text_streams_disturb_nobody(net, serve, clocks):
    server, _, url, _ = serve(["attic", "cellar"], "--stages", 3, settings={name: clock.settings for name, clock in clocks.items()})
    right = Stream(net, url).end()
    stream = Stream(net, url)
    assert stream.is_far.wait(30)
    n_before = len(stream.texts)
    clocks["attic"].jump(5 * HOUR_S)
    clocks["hall"].jump(-7 * HOUR_S)
    clocks["cellar"].jump(YEAR_S)
    assert n_before < N_TOKENS, "the text was written before the clocks jumped"
    assert stream.end() == right
    clocks["hall"].jump(30 * HOUR_S)
    assert Stream(net, url).end() == right
    told = status(net, url)
    assert {"attic", "cellar"} < {node["name"] for node in told["nodes"]}
    assert not told["news"]
    assert server.stop(seconds=30) == 130


def test_machines_whose_clocks_are_wrong_by_years_join_and_compute(net, serve, clocks):
    """Certificates have dates too; invites end by the coordinator's clock."""
    clocks["hall"].jump(-2 * YEAR_S)
    clocks["attic"].jump(30 * YEAR_S)
    clocks["cellar"].jump(-50 * YEAR_S)
    server, _, url, members = serve(["attic", "cellar"], "--stages", 3, settings={name: clock.settings for name, clock in clocks.items()})
    assert len(Stream(net, url).end()) > N_TOKENS
    assert [stage["node"] for stage in status(net, url)["stages"]][1:] in (["attic", "cellar"], ["cellar", "attic"])
    assert server.stop(seconds=30) == 130
    assert [member.wait(10) for member in members.values()] == [0, 0]


def test_when_the_servers_clock_jumps_a_day_old_invites_end_and_members_come_back(net, serve, make_yoke, clocks, wait_until):
    server, invite, url, _ = serve(["attic"], settings={"hall": clocks["hall"].settings})
    clocks["hall"].jump(25 * HOUR_S)
    late = make_yoke("cellar").start("join", invite, "--name", "cellar", prefix=net.prefix("cellar"))
    assert late.wait(30) == 3
    assert "not valid" in late.err
    net.cut("attic")
    wait_until(lambda: "attic" not in names(net, url), "the cut was not noticed", 20)
    net.mend("attic")
    wait_until(lambda: "attic" in names(net, url), "attic did not come back", 30)
    assert server.stop(seconds=30) == 130


@pytest.mark.parametrize(("settings", "words"), [({}, "it may hold"), ({"YOKE_STORE_GB": "1"}, "make room on this disk")], ids=["a share of it", "all of it"])
def test_a_machine_whose_disk_is_too_small_is_named_and_done_without(net, serve, join_on_disk, wait_until, settings, words):
    server, invite, url, members = serve(["cellar"], "--stages", 2)
    right = Stream(net, url).end()
    join_on_disk("attic", invite, 4, **settings)
    wait_until(lambda: "attic" in names(net, url), "attic did not come")
    stream = Stream(net, url)
    assert stream.is_far.wait(30)
    members["cellar"].yoke.kill_all()
    assert stream.end() == right
    told = status(net, url)
    assert [line for line in told["news"] if "attic cannot do its part" in line and words in line], told["news"]
    assert [stage["node"] for stage in told["stages"]] == [server_name(told)]
    assert server.stop(seconds=30) == 130


def test_a_disk_that_fills_up_while_weights_are_fetched_stops_no_text(net, serve, join_on_disk, wait_until):
    server, invite, url, members = serve(["cellar"], "--stages", 2)
    right = Stream(net, url).end()
    _, disk = join_on_disk("attic", invite, 64, YOKE_STORE_GB="1")
    wait_until(lambda: "attic" in names(net, url), "attic did not come")
    net.reshape("attic", replace(WIRED.cables[0], bytes_per_s=16 * MEGABIT))
    stream = Stream(net, url)
    assert stream.is_far.wait(30)
    members["cellar"].yoke.kill_all()
    wait_until(lambda: sum(path.stat().st_size for path in disk.glob("store/*/pack")) > 1e6, "nothing was fetched", 20)
    fill(disk)
    assert stream.end() == right
    told = status(net, url)
    assert [line for line in told["news"] if "attic cannot do its part" in line and "make room on this disk" in line], told["news"]
    assert server.stop(seconds=30) == 130
