"""What a split gains over a network of cables: one node against ranks and stages, one thread a node, over loopback and over a shaped LAN (1 Gbit/s, 0.2 ms).

Every node is a process in a network namespace, pinned to its own processor while there are enough; a switch in user space shapes what passes between them
(docs/testing-networks.md). The cases run in turn, so that ratios hold when the machine's speed drifts; medians are printed. The floor is what a token would take
with no cost but computing and the network: compute + exchanges x (half a round trip + bytes / rate + 0.1 ms). Computing is that of the same layout over
loopback in the same round, where it was measured: over the LAN, the switch takes its share of the processors too, which is no cost of a real network. What that
share costs is seen from the second ratio, whose floor has the computing of the same run.

usage: python benchmarks/lan.py [--rounds 5] [--decode 128] [--wire-type float32] [--cases "one node,two ranks"] [--links loopback,lan]
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from workload import median_of, median_ratio, model_1b

from yoke.core.spec import ModelSpec
from yoke.node.model import Model
from yoke.testing.namespaces import Network, network
from yoke.testing.shape import WIRED

MACHINES = ("hall", "attic", "cellar")
PROMPT = 1  # so that every step is a token written
CELLS = 256
OVERHEAD_S = 0.1e-3  # of one exchange: what sockets, encryption and waking take where nothing delays
CABLE = WIRED.cables[0]
ROUND_TRIP_S = 4 * CABLE.delay_s
PAYLOAD, HEADERS = 1448, 90  # bytes of a packet of a TCP stream, and what it has besides on the wire
FRAME, TOKENS = 200, 100  # bytes of a frame's own header, and of the message with drawn tokens: about
ELEMENT_BYTES = {"float32": 4.0, "float16": 2.0, "q8_0": 34 / 32}

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout over nodes; ``over_lan`` puts each on a machine of its own, else all are on one."""

    name: str
    stages: int
    ranks: int
    over_lan: bool

    @property
    def nodes(self) -> int:
        """How many it takes."""
        return self.stages * self.ranks

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name}, {'LAN' if self.over_lan else 'loopback'}"


LAYOUTS = (("one node", 1, 1), ("two ranks", 1, 2), ("two stages", 2, 1), ("three ranks", 1, 3))


def main() -> None:
    if sys.argv[1:2] == ["--ask"]:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=128, help="tokens to write")
    parser.add_argument("--wire-type", choices=ELEMENT_BYTES, default="float32")
    parser.add_argument("--spin-us", type=int, default=100, help="how long a receive asks before it sleeps; 0 where there are more nodes than processors")
    parser.add_argument("--switch-spin-us", type=float, default=0, help="the same for the switch, before a packet is due")
    parser.add_argument("--cases", default=",".join(name for name, _, _ in LAYOUTS))
    parser.add_argument("--links", default="loopback,lan")
    options = parser.parse_args()
    names, links = options.cases.split(","), options.links.split(",")
    cases = [
        Case(name=name, stages=stages, ranks=ranks, over_lan=over_lan)
        for over_lan in (False, True)
        for name, stages, ranks in LAYOUTS
        if name in names and ("lan" if over_lan else "loopback") in links and not (over_lan and stages * ranks == 1)
    ]
    with network(MACHINES, WIRED, spin_us=options.switch_spin_us, is_realtime=True) as net:
        rounds = [{case: run_case(net, case, options) for case in cases} for _ in range(options.rounds)]
    for case in cases:
        report(case, rounds, options.wire_type)


def run_case(net: Network, case: Case, options: argparse.Namespace) -> Result:
    """Start a cluster, warm it up with one answer, measure a second."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        url = stack.enter_context(cluster(net, case, options, Path(directory)))
        switch = switch_process()
        before_s = sum(switch.cpu_times()[:2])
        asked = net.run("hall", [sys.executable, __file__, "--ask", url, str(options.decode)], stdout=subprocess.PIPE, timeout=600)
        if asked.returncode:
            raise SystemExit(f"{case.label}: the measurement failed; what it said stands above")
        result: Result = json.loads(asked.stdout)
        return {**result, "switch_s": sum(switch.cpu_times()[:2]) - before_s}


def switch_process() -> psutil.Process:
    """The process that forwards packets, to tell what it takes from the others."""
    return next(child for child in psutil.Process().children() if "yoke.testing.switch" in child.cmdline())


@contextlib.contextmanager
def cluster(net: Network, case: Case, options: argparse.Namespace, directory: Path) -> Iterator[str]:
    """A server and its members; where it answers."""
    is_crowded = case.nodes > (os.cpu_count() or 1)
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "YOKE_SPIN_US": str(0 if is_crowded else options.spin_us)}
    serve = [sys.executable, "-m", "yoke", "serve", str(model_1b()), "--threads", "1", "--port", "0", "--context", str(PROMPT + options.decode)]
    serve += ["--cells", str(-(-(PROMPT + options.decode) // CELLS) * CELLS), "--wire-type", options.wire_type, "--state-dir", str(directory / "0")]
    if case.nodes > 1:
        address = net.addresses["hall"] if case.over_lan else "127.0.0.1"
        serve += ["--nodes", str(case.nodes), "--stages", str(case.stages), "--ranks", str(case.ranks), "--cluster-host", address]
        serve += ["--shares", ":".join("1" * case.ranks)] if case.ranks > 1 else []
    said, log = directory / "out", directory / "log"
    with contextlib.ExitStack() as stack:
        output, errors = stack.enter_context(said.open("a")), stack.enter_context(log.open("a"))
        server = stack.enter_context(ending(net.start("hall", serve, stdout=output, stderr=errors, env=environment)))
        processes = [server]
        invite = line_of(processes, r"yoke join (\S+)", said, log) if case.nodes > 1 else ""
        for index in range(1, case.nodes):
            join = [*pinned(index), sys.executable, "-m", "yoke", "join", invite, "--threads", "1", "--name", f"node-{index}", "--quiet"]
            machine = MACHINES[index] if case.over_lan else "hall"
            member = net.start(machine, [*join, "--state-dir", str(directory / str(index))], stdout=subprocess.DEVNULL, stderr=errors, env=environment)
            processes.append(stack.enter_context(ending(member)))
        url = line_of(processes, r"serving \S+ at (http://\S+)", said, log)
        pin_worker(server.pid)
        yield url


def pinned(index: int) -> list[str]:
    """The words before a command that keep it on the processor of the node with this index."""
    return ["taskset", "-c", str(index % (os.cpu_count() or 1))]


def pin_worker(pid: int) -> None:
    """The server's worker to the first processor; the process that serves HTTP goes where there is room."""
    for child in psutil.Process(pid).children(recursive=True):
        if "yoke.node.worker" in child.cmdline():
            for thread in child.threads():
                os.sched_setaffinity(thread.id, {0})


@contextlib.contextmanager
def ending(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """End a process politely when the context does."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def line_of(processes: "Sequence[subprocess.Popen[str]]", pattern: str, said: Path, log: Path) -> str:
    """What was said that fits; the end of the benchmark if one of the processes ends before."""
    while all(process.poll() is None for process in processes):
        if match := re.search(pattern, said.read_text()):
            return match[1]
        time.sleep(0.05)
    raise SystemExit(f"a node ended before {pattern!r} was printed:\n{log.read_text()}")


def ask(url: str, tokens: int) -> Result:
    """Two answers, one after the other: speed of the second, and what each worker did meanwhile. Runs on the server's machine."""

    def fetch(path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    body = {"model": "", "prompt": [7] * PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "yoke_timings": True}
    fetch("/v1/completions", body)
    before = fetch("/yoke/status")["stages"]
    timings = fetch("/v1/completions", body)["yoke"]
    after = fetch("/yoke/status")["stages"]
    names = ("steps", "compute_s", "collective_s", "wire_s", "waiting_s")
    workers = [{name: new[name] - old[name] for name in names} for old, new in zip(before, after, strict=True)]
    return {"decode_tokens_per_s": timings["decode_tokens_per_s"], "workers": workers, "decode_s": timings["decode_s"]}


def spec_1b() -> ModelSpec:
    """What the model is."""
    model = Model.open(model_1b())
    model.file.close()
    return model.spec


def sums_bytes(case: Case, wire_type: str) -> float:
    """Bytes that one rank sends for a token's sums."""
    spec = spec_1b()
    return 2 * spec.n_blocks * (case.ranks - 1) * spec.width * ELEMENT_BYTES[wire_type]


def floor_s(case: Case, compute_s: float, wire_type: str) -> float:
    """Seconds of a token if only computing and the network took time."""
    spec = spec_1b()

    def trip_s(payload: float) -> float:
        return ROUND_TRIP_S / 2 + (payload + -(-payload // PAYLOAD) * HEADERS) / CABLE.bytes_per_s + OVERHEAD_S

    others = case.ranks - 1
    # In each half of a block every rank sends its sum to all others at once; at the end all send their likeliest token to the first.
    sums_s = 2 * spec.n_blocks * trip_s(others * spec.width * ELEMENT_BYTES[wire_type]) + trip_s(8) if others else 0.0
    stages_s = (case.stages - 1) * trip_s(FRAME + 4 * spec.width) + trip_s(TOKENS) if case.stages > 1 else 0.0
    return compute_s + sums_s + stages_s


def computing_s(case: Case, result: Result) -> float:
    """Seconds of computing a token: stages one after the other, the slowest of each one's ranks."""
    each = [worker["compute_s"] / max(1, worker["steps"]) for worker in result["workers"]]
    return sum(max(each[start : start + case.ranks]) for start in range(0, case.nodes, case.ranks))


def report(case: Case, rounds: Sequence[Mapping[Case, Result]], wire_type: str) -> None:
    """Medians of a case; its gain over one node, and its time over the floor, each by rounds."""
    results = [results[case] for results in rounds]
    base = next((other for other in rounds[0] if other.nodes == 1), case)
    near = replace(case, over_lan=False) if replace(case, over_lan=False) in rounds[0] else case

    def middle(figure: Callable[[Result], float]) -> float:
        return statistics.median(figure(result) for result in results)

    def per_token(name: str) -> float:
        return middle(lambda result: max(worker[name] / max(1, worker["steps"]) for worker in result["workers"])) * 1e3

    name = "decode_tokens_per_s"
    text = f"{case.label}: {median_of(results, name):.1f} tokens/s"
    if base.nodes == 1:
        text += f" ({median_ratio(results, [each[base] for each in rounds], name):.2f}x)"
    text += f"; a token: computing {middle(lambda result: computing_s(case, result)) * 1e3:.2f} ms"
    if case.nodes > 1:
        text += f", collectives {per_token('collective_s'):.2f} ms ({sums_bytes(case, wire_type) / 1e3:.0f} KB a rank), sending {per_token('wire_s'):.2f} ms"
    if case.over_lan:
        floors, own_floors = ([floor_s(case, computing_s(case, each[of]), wire_type) for each in rounds] for of in (near, case))
        ratio, own_ratio = (statistics.median(1 / result[name] / floor for result, floor in zip(results, each, strict=True)) for each in (floors, own_floors))
        core = middle(lambda result: result["switch_s"] / 2 / result["decode_s"])  # two answers were written
        text += f"; floor {statistics.median(floors) * 1e3:.2f} ms, ratio {ratio:.3f} ({own_ratio:.3f} with computing as it was beside the switch)"
        text += f", {median_ratio(results, [each[near] for each in rounds], name):.2f} of loopback; the switch took {core:.0%} of a core"
    if case.nodes > (os.cpu_count() or 1):
        text += f" ({case.nodes} nodes on {os.cpu_count()} processors)"
    print(text, flush=True)


if __name__ == "__main__":
    main()
