"""Clusters of machines that differ, made on this one: nodes in network namespaces behind a shaped network, each with a chip of a given speed.

Knows how such a cluster is started, asked and ended; knows no cases and no figures that are wanted. Machines are told apart by their speed and keep their state
directories, so a machine's profile is measured once; weights lie in one store that all share, so they move once.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cluster_pace
from cluster_quota import groups, quota

from yoke.testing.namespaces import Network
from yoke.testing.shape import MEGABIT, WIFI, WIRED, Shape

CABLES = {
    "wired": WIRED.cables[0],
    "wifi": WIFI.cables[0],
    "slow": Shape(delay_s=10e-3 / 4, bytes_per_s=20 * MEGABIT),  # between two such machines: round trip 10 ms, 20 Mbit/s
}
MACHINES = ("hall", "attic", "cellar", "study", "shed")
CORE_GB_PER_S = 16.0
"""What one processor of this machine reads: a quota is a share of that."""
CELLS = 256
PROFILE = "profile.json"
PROMPT = 1  # so that every step is a token written
WARM_TOKENS = 3
START_S, ANSWER_S, END_S = 120.0, 600.0, 20.0

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Machine:
    """One node: how many GB of weights its chip reads in a second, and its cable's name."""

    speed: float
    cable: str = "wired"

    def __str__(self) -> str:
        return f"{self.speed:g}{'' if self.cable == 'wired' else ' ' + self.cable}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cluster, the coordinator first, and what of its plan is forced."""

    machines: tuple[Machine, ...]
    stages: int | None = None
    ranks: int | None = None
    shares: str | None = None
    wire_type: str = "float32"

    def __str__(self) -> str:
        forced = [f"{self.stages} x {self.ranks}" if self.stages else "free", *([self.shares] if self.shares else [])]
        forced += [] if self.wire_type == "float32" else [self.wire_type]
        return f"{' + '.join(map(str, self.machines))}: {' '.join(forced)}"

    @property
    def flags(self) -> list[str]:
        """What `yoke serve` is told of the plan."""
        given = (("--stages", self.stages), ("--ranks", self.ranks), ("--shares", self.shares))
        return [word for flag, value in given if value is not None for word in (flag, str(value))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yard:
    """Where clusters are made.

    ``state`` holds the machines' state directories, ``model`` is a GGUF file; ``brake`` is pace or quota; ``tokens`` are written at least, and as many as take
    ``seconds``.
    """

    net: Network
    state: Path
    model: Path
    brake: str
    tokens: int
    seconds: float = 4.0
    most_tokens: int = 128
    known: dict[Case, Figures] = field(default_factory=dict)

    def prepare(self, cases: Iterable[Case]) -> None:
        """Have each machine measure itself, alone, and the store filled, where that has not been done: from then on clusters start within seconds."""
        machines = {name: machine for case in cases for name, machine in zip(names_of(case.machines), case.machines, strict=True)}
        for name, machine in sorted(machines.items()):
            if not (self.state / name / PROFILE).exists():
                print(f"{name} measures itself", file=sys.stderr)
                replace(self, tokens=1, seconds=0.0).measure(Case(machines=(Machine(machine.speed),)), [name])
        if not (self.state / "store").exists():
            names = sorted(machines)[-2:]
            pair = tuple(Machine(machines[name].speed) for name in names)
            self.measure(Case(machines=pair, stages=1, ranks=2, shares="0:1"), names)

    def alone(self, speed: float) -> Figures:
        """What one machine of that speed does, measured once."""
        case = Case(machines=(Machine(speed),))
        if case not in self.known:
            self.known[case] = self.measure(case)
        return self.known[case]

    def measure(self, case: Case, names: Sequence[str] = ()) -> Figures:
        """Start a cluster, have it write, end it: `decode_tokens_per_s`, `predicted_tokens_per_s`, and the status before and after as `/yoke/status` gives it."""
        names = names or names_of(case.machines)
        for place, machine in zip(MACHINES, case.machines, strict=False):
            self.net.reshape(place, CABLES[machine.cable])
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(self._cluster(case, names))
            words = [sys.executable, __file__, url, str(self.tokens), str(self.most_tokens), str(self.seconds)]
            asked = self.net.run(MACHINES[0], words, stdout=subprocess.PIPE, timeout=ANSWER_S)
            if asked.returncode:
                raise SystemExit(f"{case}: the measurement failed; what it said stands above")
            figures: Figures = json.loads(asked.stdout)
        return figures

    @contextlib.contextmanager
    def _cluster(self, case: Case, names: Sequence[str]) -> Iterator[str]:
        """A server and its members; where it answers."""
        room = PROMPT + self.most_tokens
        serve = ["serve", str(self.model), "--port", "0", "--context", str(room), "--cells", str(-(-room // CELLS) * CELLS), "--wire-type", case.wire_type]
        serve += ["--nodes", str(len(case.machines)), "--cluster-host", self.net.addresses[MACHINES[0]], *case.flags]
        said, log = self.state / "out", self.state / "log"
        said.write_text("")
        log.write_text("")
        with contextlib.ExitStack() as stack:
            output, errors = stack.enter_context(said.open("a")), stack.enter_context(log.open("a"))
            processes = [stack.enter_context(self._node(0, case, names, serve, output, errors))]
            invite = line_of(processes, r"yoke join (\S+)", said, log) if len(case.machines) > 1 else ""
            for index in range(1, len(case.machines)):
                join = ["join", invite, "--name", f"node-{index}", "--quiet", "--rejoin-s", "0"]
                processes.append(stack.enter_context(self._node(index, case, names, join, output, errors)))
                if case.shares is not None:  # they are meant in this order
                    line_of(processes, rf"(node-{index}\S*) joined with", log, log)
            yield line_of(processes, r"serving \S+ at (http://\S+)", said, log)

    @contextlib.contextmanager
    def _node(self, index: int, case: Case, names: Sequence[str], words: Sequence[str], output: Any, errors: Any) -> Iterator["subprocess.Popen[str]"]:
        """One node's process, with its brake on; ended politely when the context ends."""
        machine, directory = case.machines[index], self.state / names[index]
        directory.mkdir(exist_ok=True, parents=True, mode=0o700)
        if not (directory / "store").exists():
            (self.state / "store").mkdir(exist_ok=True)
            (directory / "store").symlink_to(self.state / "store")
        # Nodes share this machine's processors: who asks instead of sleeping takes time from the others.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "YOKE_SPIN_US": "0", "YOKE_PROFILE": "quick"}
        prefix: list[str] = []
        with contextlib.ExitStack() as stack:
            if self.brake == "quota":
                prefix = stack.enter_context(quota(groups(), f"yoke-{os.getpid()}-{index}", machine.speed / CORE_GB_PER_S))
            else:
                environment |= cluster_pace.environment(machine.speed * 1e9, self.state / "pace")
            command = [*prefix, sys.executable, "-m", "yoke", *words, "--threads", "1", "--state-dir", str(directory)]
            process = self.net.start(MACHINES[index], command, stdout=output if index == 0 else errors, stderr=errors, env=environment)
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.communicate(timeout=END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()


def names_of(machines: Sequence[Machine]) -> list[str]:
    """Each machine's name among those of its speed: 0.5-0, 0.25-0, 0.25-1, ..."""
    speeds = [machine.speed for machine in machines]
    return [f"{speed:g}-{speeds[:index].count(speed)}" for index, speed in enumerate(speeds)]


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep all processors from sleeping, with loops that make way for everything else.

    A virtual processor that sleeps takes 0.1 ms to wake, which doubled what an exchange took (measured); a machine that computes and its network card do not
    sleep, but a node with a pace does most of the time.
    """
    loop = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); os.sched_setaffinity(0, {%d}); own = os.getppid()\n"
    loop += "while os.getppid() == own: sum(range(100_000))"  # they end with us, however we end
    loops = [subprocess.Popen([sys.executable, "-c", loop % number]) for number in sorted(os.sched_getaffinity(0))]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def line_of(processes: "Sequence[subprocess.Popen[str]]", pattern: str, said: Path, log: Path) -> str:
    """What was said that fits; the end of the benchmark if one of the processes ends before, or nothing fits within `START_S`."""
    stop = time.monotonic() + START_S
    while all(process.poll() is None for process in processes) and time.monotonic() < stop:
        if match := re.search(pattern, said.read_text()):
            return match[1]
        time.sleep(0.05)
    raise SystemExit(f"a node ended, or {START_S:g} s went by, before {pattern!r} was printed:\n{log.read_text()}")


def ask(url: str, tokens: int, most_tokens: int, seconds: float) -> Figures:
    """A short answer to warm up, then one of ``tokens`` and as many as take ``seconds``, at most ``most_tokens``. Runs on the coordinator's machine."""

    def fetch(path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return json.load(answer)

    def written(count: int) -> Any:
        body = {"model": "", "prompt": [7] * PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True, "yoke_timings": True}
        return fetch("/v1/completions", body)["yoke"]

    speed = written(WARM_TOKENS)["decode_tokens_per_s"]
    before = fetch("/yoke/status")
    timings = written(min(most_tokens, max(tokens, round(seconds * speed))))
    after = fetch("/yoke/status")
    return {**timings, "predicted_tokens_per_s": before["predicted_tokens_per_s"], "before": before, "after": after}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
