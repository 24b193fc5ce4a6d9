"""What a stream survives: machines are killed and stopped while a text is written, and every text is compared with the one that nobody disturbed.

Each run draws its victims, the way they go and the moment from its seed: any stage or rank, one or two at once; kill -9 or SIGSTOP of worker or node process;
while the prompt is read, while tokens are written, and again while the loss of the first is being made good.
The server is the same for all runs of a layout; machines that are gone come back before the next run.

usage: python benchmarks/kill_matrix.py [--runs 200] [--seed 1] [--layouts stages,ranks] [--json FILE]
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from yoke.weights.convert import convert

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "In the beginning God created the heaven and the earth. " * 8
N_TOKENS = 160
HANG_S = 30.0
LAYOUTS = {"stages": ["--stages", "3"], "ranks": ["--ranks", "3"], "grid": ["--stages", "2", "--ranks", "2"]}
WAYS = ("kill worker", "kill node", "stop worker", "stop node")


@dataclass
class Run:
    """One run's lot, and what came of it."""

    seed: int
    layout: str
    victims: list[str]
    way: str
    moment: str
    outcome: str = ""
    pause_s: float = 0.0
    total_s: float = 0.0
    texts: list[str] = field(default_factory=list)


class House:
    """A server and its members, each in a directory of its own."""

    def __init__(self, model: Path, layout: str, directory: Path) -> None:
        self.n_members = 3 if layout == "grid" else 2
        self.directory = directory
        self.environment = os.environ | {"YOKE_PROFILE": "quick", "YOKE_THREADS": "1", "GGML_NO_BACKTRACE": "1", "YOKE_SPIN_US": "0"}
        flags = ["--port", "0", "--nodes", str(self.n_members + 1), "--cluster-host", "127.0.0.1", "--cache-type", "f32", *LAYOUTS[layout]]
        self.server = self.start("serve", str(model), *flags, state="server")
        self.log: list[str] = []
        self.invite = self.read_until(r"yoke join (\S+)")
        self.members = {name: self.join(name) for name in (f"m{i}" for i in range(1, self.n_members + 1))}
        self.port = int(self.read_until(r"at http://[^:]+:(\d+)"))

    def start(self, *words: str, state: str) -> subprocess.Popen[str]:
        """A `yoke` process with a state directory of its own."""
        command = [sys.executable, "-m", "yoke", *words, "--state-dir", str(self.directory / state)]
        with (self.directory / f"{state}.err").open("a") as errors:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self.environment)

    def join(self, name: str) -> subprocess.Popen[str]:
        """One more machine."""
        return self.start("join", self.invite, "--name", name, "--quiet", state=name)

    def read_until(self, pattern: str) -> str:
        """Wait for a line of the server, and take what it tells."""
        assert self.server.stdout is not None
        for line in self.server.stdout:
            if (found := re.search(pattern, line)) is not None:
                return found[1]
        raise RuntimeError(f"the server ended: {(self.directory / 'server.err').read_text()[-2000:]}")

    def status(self) -> dict[str, object]:
        """What the server says of itself."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_S)
        connection.request("GET", "/yoke/status")
        return json.loads(connection.getresponse().read())

    def until_whole(self) -> None:
        """Wait until every machine is back and a plan uses them all."""
        stop = time.monotonic() + 60
        while time.monotonic() < stop:
            for name, process in list(self.members.items()):
                if process.poll() is not None:
                    self.members[name] = self.start("join", self.invite, "--name", name, "--quiet", state=name)
            status = self.status()
            if len(status["nodes"]) == self.n_members + 1 and status["phase"] == "serving" and len(status["stages"]) == self.n_members + 1:  # type: ignore[arg-type]
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
        for process in (*self.members.values(), self.server):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in (*self.members.values(), self.server):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


class Stream:
    """One streamed completion, read in a thread."""

    def __init__(self, port: int) -> None:
        self.texts: list[str] = []
        self.times = [time.monotonic()]
        self.error = ""
        self._body = json.dumps({"prompt": PROMPT, "max_tokens": N_TOKENS, "temperature": 0.8, "seed": 11, "ignore_eos": True, "stream": True})
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_S)
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
                    return
                self.texts.append(event["choices"][0]["text"])
                self.times.append(time.monotonic())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = f"the connection failed: {error}"

    def wait_for(self, n_tokens: int) -> None:
        """Wait until so many tokens have come, or the stream has ended."""
        while len(self.texts) < n_tokens and self.thread.is_alive():
            time.sleep(0.001)

    @property
    def pause_s(self) -> float:
        """The longest gap between two tokens, in seconds."""
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False)) if len(self.times) > 1 else 0.0


def draw(seed: int, layout: str, house: House) -> Run:
    chance = random.Random(f"{seed} {layout}")
    names = ["server", *house.members]
    victims = chance.sample(names, 1 if chance.random() < 0.7 else 2)
    way = chance.choice(WAYS)
    if "server" in victims and "node" in way:  # the machine that the client speaks to: its worker is another matter than its HTTP server
        way = way.replace("node", "worker")
    return Run(seed, layout, victims, way, chance.choice(("prompt", "decode", "decode", "again", "again")))


def carry_out(run: Run, house: House, right: str) -> None:
    chance = random.Random(run.seed)
    targets = house.processes()
    began = time.monotonic()
    stream = Stream(house.port)
    if run.moment == "prompt":
        time.sleep(chance.uniform(0.0, 0.05))
    else:
        stream.wait_for(chance.randint(1, N_TOKENS - 40))
    action, kind = run.way.split()
    chosen = [targets[name][kind] for name in run.victims]
    for index, process in enumerate(chosen):
        if index and run.moment == "again":  # while the loss of the first is planned, loaded and replayed
            time.sleep(chance.uniform(0.0, 0.8))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    stream.thread.join(HANG_S)
    run.total_s, run.pause_s = time.monotonic() - began, stream.pause_s
    text = "".join(stream.texts)
    if stream.thread.is_alive():
        run.outcome = "hangs"
    elif stream.error:
        run.outcome = f"error: {stream.error}"
    else:
        run.outcome = "right text" if text == right else "wrong text"
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def open_house(layout: str, model: Path) -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="yoke-matrix-") as directory:
        house = House(model, layout, Path(directory))
        try:
            yield house
        finally:
            house.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", default="stages,ranks,grid")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    layouts = arguments.layouts.split(",")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "kjv.gguf"
        convert(ROOT / "models" / "kjv-9m", model, "F32", lambda _stage, _share: None)
        for place, layout in enumerate(layouts):
            with open_house(layout, model) as house:
                first = Stream(house.port)
                first.thread.join(HANG_S)
                right = "".join(first.texts)
                for index in range(arguments.runs // len(layouts) + (place < arguments.runs % len(layouts))):
                    run = draw(arguments.seed * 10_000 + index, layout, house)
                    carry_out(run, house, right)
                    runs.append(run)
                    print(f"{layout} {run.seed}: {run.way} of {', '.join(run.victims)} ({run.moment}): {run.outcome}, pause {run.pause_s:.2f} s", flush=True)
                    house.until_whole()
    report(runs)
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(run) for run in runs], indent=1))


def report(runs: list[Run]) -> None:
    print()
    for layout in dict.fromkeys(run.layout for run in runs):
        for way in WAYS:
            for moment in ("prompt", "decode", "again"):
                some = [run for run in runs if (run.layout, run.way, run.moment) == (layout, way, moment)]
                if some:
                    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in Counter(run.outcome for run in some).items())
                    print(f"{layout:7} {way:12} {moment:7} {outcomes}; pause median {statistics.median(run.pause_s for run in some):.2f} s")
    print(f"{sum(run.outcome == 'right text' for run in runs)} of {len(runs)} runs ended in the right text")


if __name__ == "__main__":
    main()
