"""What the kill matrix strikes at: a server and its members as processes, on loopback or on machines of a shaped network, and a streamed answer of theirs."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from yoke.testing.namespaces import Network

PROMPT = "In the beginning God created the heaven and the earth. " * 8
N_TOKENS = 160
HANG_S = 30.0
WHOLE_S = 90.0
SETTLED_S = 2.2
"""A plan that has served for 2 s counts as one that holds, and by then a copy of a part is loaded."""

LOOK_S = 0.003
RELAY = """
import asyncio, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
async def meet(reader, writer):
    inward, outward = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, outward), pump(inward, writer))
async def main():
    async with await asyncio.start_unix_server(meet, sys.argv[1]) as server:
        print("ready", flush=True)
        await server.serve_forever()
asyncio.run(main())
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Machines beside the server's, places of the plan, flags of `yoke serve`, and settings that all machines have."""

    n_members: int
    n_places: int
    flags: tuple[str, ...]
    settings: Mapping[str, str] = field(default_factory=dict)


def tight() -> Layout:
    """Two machines that have room for the model and its cache together, and neither of them alone; answers wait 2 s for one that is gone."""
    free = psutil.virtual_memory().available
    share = max(0.01, 3e8 / free)
    room = share * free - 128 * 2**20  # what the planner counts for a worker
    cells = int((1.35 * room - 45e6) / 10240) // 256 * 256  # the model's weights, and bytes of a cell in float32
    return Layout(n_members=1, n_places=2, flags=("--cells", str(cells)), settings={"YOKE_MEMORY_SHARE": str(share), "YOKE_PATIENCE_S": "2"})


def layouts() -> dict[str, Layout]:
    """All of them, by name."""
    spare = Layout(n_members=2, n_places=2, flags=("--stages", "2"))
    return {
        "stages": Layout(n_members=2, n_places=3, flags=("--stages", "3")),
        "ranks": Layout(n_members=2, n_places=3, flags=("--ranks", "3")),
        "grid": Layout(n_members=3, n_places=4, flags=("--stages", "2", "--ranks", "2")),
        "spare": spare,
        "copy": Layout(n_members=2, n_places=2, flags=(*spare.flags, "--replicas", "1")),
        "tight": tight(),
    }


class Told:
    """What a process has printed, line by line, with the moment at which it came (monotonic seconds)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[tuple[float, str]] = []
        self._process, self._changed, self._is_over = process, threading.Condition(), False
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, pattern: str) -> str:
        """The first match, now or later."""
        stop, seen = time.monotonic() + WHOLE_S, 0
        with self._changed:
            while True:
                for _, line in self.lines[seen:]:
                    if (found := re.search(pattern, line)) is not None:
                        return found[1]
                seen = len(self.lines)
                if self._is_over or not self._changed.wait(stop - time.monotonic()):
                    raise RuntimeError(f"{pattern!r} was not printed: {self.lines[-20:]}")

    def moment(self, pattern: str, since_s: float) -> float | None:
        """When such a line first came after a moment."""
        return next((at for at, line in list(self.lines) if at >= since_s and re.search(pattern, line)), None)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip()))
                self._changed.notify_all()
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class House:
    """A server and its members, each in a directory of its own; with a network, each on a machine of its own."""

    def __init__(self, model: Path, layout: Layout, directory: Path, net: Network | None) -> None:
        self.model, self.layout, self.directory, self.net = model, layout, directory, net
        self.members: dict[str, subprocess.Popen[str]] = {}
        self.relay: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []
        self.environment = os.environ | {"YOKE_PROFILE": "quick", "YOKE_THREADS": "1", "GGML_NO_BACKTRACE": "1", "YOKE_SPIN_US": "0", **layout.settings}

    def open(self) -> None:
        """Start everything, and wait until it serves."""
        layout, net = self.layout, self.net
        host = "127.0.0.1" if net is None else net.addresses["server"]
        flags = ["--port", "0", "--nodes", str(layout.n_members + 1), "--cluster-host", host, "--cache-type", "f32", *layout.flags]
        self.server = self.start("server", "serve", str(self.model), *flags, stdout=subprocess.PIPE)
        self.told = Told(self.server)
        self.invite = self.told.wait_for(r"yoke join (\S+)")
        self.members |= {name: self.join(name) for name in (f"m{i}" for i in range(1, layout.n_members + 1))}
        self.port = int(self.told.wait_for(r"at http://[^:]+:(\d+)"))
        if net is not None:  # the server answers only on its own machine, and sockets with a name in the file system are the same on all
            self.relay = net.start("server", [sys.executable, "-c", RELAY, self.directory / "relay", str(self.port)], stdout=subprocess.PIPE)
            self._started.append(self.relay)
            assert self.relay.stdout is not None
            assert self.relay.stdout.readline() == "ready\n"

    def start(self, machine: str, *words: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        """A `yoke` process with a state directory of its own."""
        prefix = [] if self.net is None else self.net.prefix(machine)
        command = [*prefix, sys.executable, "-m", "yoke", *words, "--state-dir", str(self.directory / machine)]
        with (self.directory / f"{machine}.err").open("a") as file:
            errors = file if stdout == subprocess.DEVNULL else subprocess.STDOUT
            self._started.append(subprocess.Popen(command, stdout=stdout, stderr=errors, text=True, env=self.environment))
        return self._started[-1]

    def join(self, name: str) -> subprocess.Popen[str]:
        """One more machine."""
        return self.start(name, "join", self.invite, "--name", name, "--quiet")

    def connection(self) -> http.client.HTTPConnection:
        """A way to ask the server."""
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        if self.relay is not None:
            made.sock = socket.socket(socket.AF_UNIX)
            made.sock.settimeout(HANG_S)
            made.sock.connect(str(self.directory / "relay"))
        return made

    def status(self) -> dict[str, Any]:
        """What the server says of itself."""
        with contextlib.closing(self.connection()) as connection:
            connection.request("GET", "/yoke/status")
            found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found

    def until_whole(self) -> None:
        """Wait until every machine is back, and a plan with all places has served for a while."""
        if self.net is not None:
            self.net.mend("server", *self.members)
        stop, since = time.monotonic() + WHOLE_S, time.monotonic()
        while time.monotonic() < stop:
            for name, process in list(self.members.items()):
                if process.poll() is not None:
                    self.members[name] = self.join(name)
            status = self.status()
            if (len(status["nodes"]), status["phase"], len(status["stages"])) != (self.layout.n_members + 1, "serving", self.layout.n_places):
                since = time.monotonic()
            elif time.monotonic() - since > SETTLED_S:
                return
            time.sleep(0.1)
        raise RuntimeError(f"the machines did not come back: {self.status()}")

    def processes(self) -> dict[str, dict[str, psutil.Process]]:
        """Node and worker process by the name of the machine."""
        found = {}
        for name, process in {"server": self.server, **self.members}.items():
            node = psutil.Process(process.pid)
            workers = [child for child in node.children() if "yoke.node.worker" in " ".join(child.cmdline())]
            found[name] = {"node": node, "worker": workers[0]}
        return found

    def end(self) -> None:
        """End all processes."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


class Stream:
    """One streamed completion, read in a thread."""

    def __init__(self, house: House) -> None:
        self.texts: list[str] = []
        self.times = [time.monotonic()]
        self.error = ""
        self.is_named = False
        self._body = json.dumps({"prompt": PROMPT, "max_tokens": N_TOKENS, "temperature": 0.8, "seed": 11, "ignore_eos": True, "stream": True})
        self._connection = house.connection()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            self._connection.request("POST", "/v1/completions", self._body)
            for line in self._connection.getresponse():
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    self.error = event["error"]["message"]
                    self.is_named = not self.error.startswith("the server failed")
                    return
                self.texts.append(event["choices"][0]["text"])
                self.times.append(time.monotonic())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = f"the connection failed: {error}"

    def wait_for(self, n_tokens: int) -> None:
        """Wait until so many tokens have come, or the stream has ended."""
        while len(self.texts) < n_tokens and self.thread.is_alive():
            time.sleep(0.001)

    def longest_gap(self) -> tuple[float, float]:
        """The moments (monotonic seconds) of the two tokens in a row that lie furthest apart; of a stream that was never answered, its beginning twice."""
        return max(zip(self.times, self.times[1:], strict=False), key=lambda pair: pair[1] - pair[0], default=(self.times[0], self.times[0]))


class Watch:
    """Asks for the status again and again, in a thread, to strike in a certain phase."""

    def __init__(self, house: House, stream: Stream) -> None:
        self._house, self._stream = house, stream
        self._seen: list[tuple[str, int]] = []
        self._is_over = False
        self._version = int(house.status()["plan_version"])
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(2)]  # one may wait for a machine that does not answer
        for thread in self._threads:
            thread.start()

    def wait_for(self, moment: str) -> bool:
        """Wait for "planning", "loading", or "replay" (the next plan serves, and no token has come by it). False if it was over before it was seen."""
        looked, n_tokens = 0, len(self._stream.texts)
        stop = time.monotonic() + HANG_S
        while time.monotonic() < stop and self._stream.thread.is_alive():
            for phase, version in self._seen[looked:]:
                looked += 1
                if phase == moment:
                    return True
                if phase.startswith("serving") and version > self._version:
                    return moment == "replay" and len(self._stream.texts) == n_tokens
                if not phase.startswith("serving"):
                    n_tokens = len(self._stream.texts)
            time.sleep(LOOK_S)
        return False

    def end(self) -> None:
        """Ask no more."""
        self._is_over = True
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # the stream's end says whether the server is gone
            while not self._is_over:
                status = self._house.status()
                self._seen.append((status["phase"], status["plan_version"] or 0))
                time.sleep(LOOK_S)


@contextlib.contextmanager
def opened(model: Path, layout: Layout, directory: Path, net: Network | None) -> Iterator[House]:
    """A house that serves; its processes end with the block."""
    house = House(model, layout, directory, net)
    try:
        house.open()
        yield house
    finally:
        house.end()
