"""A cluster of five nodes is started, stopped, and started again with the same state directories: seconds until it serves, and bytes that are moved and kept.

The nodes are processes in one network namespace of their own, so that its loopback counts their bytes and nobody else's; with --machines each is in a namespace of
its own behind a shaped gigabit network, so that every node's bytes are counted: what the server receives is then the measuring of links alone, since it has the
model's file. The members start when the server lets them join: `yoke join INVITE` the first time, `yoke join` the second. The model is the 1B one of workload.py,
split into five stages.

usage: python benchmarks/second_start.py [--rounds 3] [--machines] [--settings NAME=VALUE...] [--directory DIR]
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kill_house import Told
from workload import model_1b

from yoke.node.profile import FILE_NAME as PROFILE
from yoke.testing.namespaces import Network, network
from yoke.weights.gguf import GgufFile

MEMBERS = ("m1", "m2", "m3", "m4")
MB = 1e6
ASK = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + '/yoke/status', timeout=30).read().decode())"


@dataclass(kw_only=True)
class Start:
    """Seconds from the start of `yoke serve` until members may join, until the last has joined, and until it serves; bytes moved and kept, by node."""

    open_s: float = 0.0
    joined_s: float = 0.0
    serving_s: float = 0.0
    received_bytes: dict[str, int] = field(default_factory=dict)
    kept_bytes: dict[str, int] = field(default_factory=dict)
    shard_bytes: dict[str, int] = field(default_factory=dict)


class Pool:
    """Where the nodes live, and what they leave there."""

    def __init__(self, net: Network, directory: Path, settings: list[str]) -> None:
        self.net, self.directory = net, directory
        self.is_apart = len(net.addresses) > 1
        given = dict(entry.split("=", 1) for entry in settings)
        self.environment = os.environ | {"YOKE_THREADS": "1", "YOKE_SPIN_US": "0", "GGML_NO_BACKTRACE": "1", **given}

    def machine(self, node: str) -> str:
        """The namespace of a node."""
        return node if self.is_apart else "all"

    def begin(self, node: str, *words: str) -> subprocess.Popen[str]:
        """Start a node's process."""
        command = [*self.net.prefix(self.machine(node)), sys.executable, "-m", "yoke", *words, "--state-dir", str(self.directory / node)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment)

    def received(self) -> dict[str, int]:
        """Bytes that have come in so far: over a node's card, or over the loopback that all share."""
        places = {node: (node, "net") for node in ("server", *MEMBERS)} if self.is_apart else {"all": ("all", "lo")}
        return {name: int(self.read(machine, f"/sys/class/net/{card}/statistics/rx_bytes")) for name, (machine, card) in places.items()}

    def read(self, machine: str, path: str) -> str:
        """A file as a machine sees it."""
        return self.net.run(machine, ["cat", path], capture_output=True).stdout

    def kept(self, node: str) -> int:
        """Bytes of all files in a node's state directory, as the disk counts them."""
        return sum(path.stat().st_blocks * 512 for path in (self.directory / node).rglob("*") if path.is_file())

    def start(self, round_number: int) -> Start:
        """Start all nodes, wait until they serve, have them write some tokens, and stop them all."""
        found, before = Start(), self.received()
        host = self.net.addresses["server"] if self.is_apart else "127.0.0.1"
        flags = ["--port", "0", "--nodes", str(len(MEMBERS) + 1), "--stages", str(len(MEMBERS) + 1), "--cluster-host", host]
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            server = self.begin("server", "serve", str(model_1b()), *flags)
            stack.callback(_end, server)
            told = Told(server)
            invite = told.wait_for(r"yoke join (\S+)")
            found.open_s = time.monotonic() - began
            for name in MEMBERS:
                member = self.begin(name, "join", *([invite] if round_number == 0 else []), "--name", name, "--quiet")
                stack.callback(_end, member)
            url = told.wait_for(r"at (http://\S+)")
            found.serving_s = time.monotonic() - began
            found.joined_s = max(at for at, line in told.lines if " joined with " in line) - began
            found.shard_bytes = self.shards(url)
            server.send_signal(signal.SIGINT)
            server.wait(20)
        after = self.received()
        found.received_bytes = {name: after[name] - before[name] for name in after}
        self.share_profile()
        found.kept_bytes = {node: self.kept(node) for node in ("server", *MEMBERS)}
        return found

    def share_profile(self) -> None:
        """Give every member what was measured of the server's chip: it is the same one, and measured by all at once it counts as disturbed, and is not kept."""
        known = self.directory / "server" / PROFILE
        for name in MEMBERS:
            if known.exists() and not (self.directory / name / PROFILE).exists():
                shutil.copy(known, self.directory / name / PROFILE)

    def shards(self, url: str) -> dict[str, int]:
        """Bytes of the tensors that each node has, by its name."""
        asked = self.net.run(self.machine("server"), [sys.executable, "-c", ASK, url], capture_output=True)
        stages = json.loads(asked.stdout)["stages"]
        with GgufFile.open(model_1b()) as file:
            sizes = {name: info.n_bytes for name, info in file.tensors.items()}
        has_head = "output.weight" in sizes
        found = {}
        for stage in stages:
            first, stop = stage["blocks"]
            names = [name for name in sizes if (block := re.match(r"blk\.(\d+)\.", name)) is not None and first <= int(block[1]) < stop]
            if stage["stage"] == len(stages) - 1:
                names += ["output_norm.weight", "output.weight" if has_head else "token_embd.weight"]
            found[stage["node"]] = sum(sizes[name] for name in names)
        return found


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


@contextlib.contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Pool]:
    with network(["server", *MEMBERS] if arguments.machines else ["all"]) as net, tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        yield Pool(net, Path(directory), arguments.settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts after the first")
    parser.add_argument("--machines", action="store_true", help="each node on a machine of its own")
    parser.add_argument("--settings", nargs="*", default=[], help="settings of all nodes, as YOKE_PROFILE=quick")
    parser.add_argument("--directory", help="where the state directories lie; the system's place for temporary files unless given")
    arguments = parser.parse_args()
    model_1b()
    with opened(arguments) as pool:
        starts = []
        for number in range(arguments.rounds + 1):
            starts.append(pool.start(number))
            tell(number, starts[-1])
    again = starts[1:]
    if again:
        print(f"again: serves after {statistics.median(start.serving_s for start in again):.2f} s, median of {len(again)}")
        print(f"again: {max(sum(start.received_bytes.values()) for start in again) / MB:.3f} MB received, at most")


def tell(number: int, start: Start) -> None:
    name = "first start" if number == 0 else f"start {number + 1}"
    parts = f"members may join after {start.open_s:.2f} s, have joined after {start.joined_s:.2f} s, it serves after {start.serving_s:.2f} s"
    print(f"{name}: {parts}; {sum(start.received_bytes.values()) / MB:.3f} MB received in all", flush=True)
    for node, shard_bytes in start.shard_bytes.items():
        label = node if node in start.kept_bytes else "server"
        kept, received = start.kept_bytes[label], start.received_bytes.get(label)
        moved = "" if received is None else f", received {received / MB:.3f} MB ({received / shard_bytes - 1:+.2%})"
        print(f"  {label}: shard {shard_bytes / MB:.3f} MB, on its disk {kept / MB:.3f} MB ({kept / shard_bytes - 1:+.2%}){moved}", flush=True)


if __name__ == "__main__":
    main()
