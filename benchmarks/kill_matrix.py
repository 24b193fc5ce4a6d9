"""What a stream survives: machines are killed, stopped and cut off while a text is written, and every text is compared with the one that nobody disturbed.

Each run draws its victims, the way they go and the moment from its seed: any stage or rank, one or two; kill -9 or SIGSTOP of worker or node process, or, with
--network, the cut of a machine's cable; while the prompt is read or tokens are written, two at once, or the second while the loss of the first is being planned,
loaded or replayed, as `/yoke/status` tells. Layouts: stages, ranks, grid; `tight`, where one machine alone has no room for the model, so that a named error is a
right end too; `spare` and `copy`, where a third machine is idle or holds a copy of the second stage (--replicas 1), and that stage's machine is the victim.
The server is the same for all runs of a layout; machines that are gone come back before the next run.

usage: python benchmarks/kill_matrix.py [--runs 200] [--seed 1] [--layouts stages,ranks,grid] [--network] [--json FILE]
       python benchmarks/kill_matrix.py --report FILE...
"""

import argparse
import contextlib
import json
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from kill_house import HANG_S, N_TOKENS, House, Layout, Stream, Watch, layouts, opened

from yoke.testing.namespaces import network
from yoke.weights.convert import convert

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("kill worker", "kill node", "stop worker", "stop node")
CUT = "cut cable"
ALONE = ("prompt", "decode")
TOGETHER = ("at once", "planning", "loading", "replay")
PAIRS = ("spare", "copy")
RIGHT, NAMED = "right text", "named error"


@dataclass(kw_only=True)
class Run:
    """One run's lot, and what came of it.

    ``is_hit`` says that the second victim was struck in the phase that was wanted. The pause is the longest gap between two tokens; of it, ``noticing_s`` passed
    until the loss was noticed, and ``replay_s`` from the moment when the next plan served (both None where the server's log does not say).
    """

    seed: int
    layout: str
    victims: list[str]
    way: str
    moment: str
    outcome: str = ""
    error: str = ""
    is_hit: bool = True
    took_over: bool = False
    pause_s: float = 0.0
    noticing_s: float | None = None
    replay_s: float | None = None
    total_s: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether it ended as it may."""
        return self.outcome == RIGHT or (self.outcome == NAMED and self.layout == "tight")


def draw(seed: int, layout: str, house: House) -> Run:
    chance = random.Random(f"{seed} {layout}")
    names = ["server", *house.members]
    if layout in PAIRS:
        second = next(stage["node"] for stage in house.status()["stages"] if stage["stage"] == 1)
        victims, way = [second if second in names else "server"], chance.choice(("kill worker", "kill node"))
    else:
        victims = chance.sample(names, 1 if len(names) < 3 or chance.random() < 0.5 else 2)
        way = CUT if house.net is not None else chance.choice(WAYS)
    if "server" in victims and "node" in way:  # the machine that the client speaks to: its worker is another matter than its HTTP server
        way = way.replace("node", "worker")
    moment = "decode" if layout in PAIRS else chance.choice(ALONE if len(victims) == 1 else TOGETHER)
    return Run(seed=seed, layout=layout, victims=victims, way=way, moment=moment)


def striker(run: Run, house: House) -> Callable[[str], None]:
    """What makes a machine go. Processes are looked up now: then it is quick."""
    action, kind = run.way.split()
    if action == "cut":
        assert house.net is not None
        return house.net.cut
    targets, number = house.processes(), signal.SIGKILL if action == "kill" else signal.SIGSTOP

    def strike(name: str) -> None:
        """Kill or stop it, if it is there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            targets[name][kind].send_signal(number)

    return strike


def carry_out(run: Run, house: House, right: str) -> None:
    chance = random.Random(run.seed)
    stopped = house.processes()
    strike = striker(run, house)
    began = time.monotonic()
    stream = Stream(house)
    if run.moment == "prompt":
        time.sleep(chance.uniform(0.0, 0.05))
    else:
        stream.wait_for(chance.randint(1, N_TOKENS - 40))
    watch = Watch(house, stream) if run.moment in TOGETHER[1:] else None
    strike(run.victims[0])
    if watch is not None:
        run.is_hit = watch.wait_for(run.moment)
    for name in run.victims[1:]:
        strike(name)
    stream.thread.join(HANG_S)
    if watch is not None:
        watch.end()
    run.total_s = time.monotonic() - began
    judge(run, stream, right)
    measure(run, stream, house)
    for processes in stopped.values():
        for process in processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def judge(run: Run, stream: Stream, right: str) -> None:
    """What came of it."""
    text, run.error = "".join(stream.texts), stream.error
    if stream.thread.is_alive():
        run.outcome = "hangs"
    elif stream.error:
        run.outcome = NAMED if stream.is_named and right.startswith(text) else "unnamed error"
    else:
        run.outcome = RIGHT if text == right else "wrong text"


def measure(run: Run, stream: Stream, house: House) -> None:
    """How long the pause was, and what it consists of."""
    before, after = stream.longest_gap()
    run.pause_s = after - before
    noticed = house.told.moment(r"answers? pauses? until|is gone", before)
    serving = house.told.moment(r"go on by plan", before)
    if len(run.victims) == 1 and noticed is not None and serving is not None and noticed <= serving <= after:
        run.noticing_s, run.replay_s = noticed - before, after - serving
    run.took_over = house.told.moment(r"until \S+ takes over", before) is not None


@contextlib.contextmanager
def open_house(layout: Layout, model: Path, *, with_network: bool) -> Iterator[House]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yoke-matrix-")))
        names = ["server", *(f"m{i}" for i in range(1, layout.n_members + 1))]
        net = stack.enter_context(network(names)) if with_network else None
        yield stack.enter_context(opened(model, layout, directory, net))


def run_all(house: House, layout: str, seeds: Sequence[int]) -> Iterator[Run]:
    first = Stream(house)
    first.thread.join(HANG_S)
    right = "".join(first.texts)
    if first.error or first.thread.is_alive():
        raise RuntimeError(f"the undisturbed stream failed: {first.error or 'it hangs'}")
    for seed in seeds:
        house.until_whole()
        run = draw(seed, layout, house)
        carry_out(run, house, right)
        hit = run.moment if run.is_hit else f"{run.moment}, missed"
        head = f"{time.strftime('%H:%M:%S')} {layout} {seed}: {run.way} of {', '.join(run.victims)} ({hit})"
        print(f"{head}: {run.outcome}, pause {run.pause_s:.2f} s {run.error}", flush=True)
        if not run.is_right:
            print("\n".join(line for at, line in house.told.lines if at > time.monotonic() - run.total_s - 1), flush=True)
        yield run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", default="stages,ranks,grid")
    parser.add_argument("--network", action="store_true", help="machines in network namespaces; what goes is their cables")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, nargs="+", help="print the tables of earlier runs")
    arguments = parser.parse_args()
    if arguments.report:
        report([Run(**run) for path in arguments.report for run in json.loads(path.read_text())])
        return
    names, known, runs = arguments.layouts.split(","), layouts(), list[Run]()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "kjv.gguf"
        convert(ROOT / "models" / "kjv-9m", model, "F32", lambda _stage, _share: None)
        for place, name in enumerate(names):
            n_runs = arguments.runs // len(names) + (place < arguments.runs % len(names))
            seeds = range(arguments.seed * 10_000, arguments.seed * 10_000 + n_runs)
            with open_house(known[name], model, with_network=arguments.network) as house:
                for run in run_all(house, name, seeds):
                    runs.append(run)
                    if arguments.json:  # after each: what has been measured stays, whatever happens
                        arguments.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))
    report(runs)


def report(runs: list[Run]) -> None:
    """The tables, in Markdown."""
    print("\n| way | runs | right text | named error | other | median pause | longest pause |\n|---|--:|--:|--:|--:|--:|--:|")
    for way in dict.fromkeys(run.way for run in runs):
        row(way, [run for run in runs if run.way == way])
    row("kill -9, all", [run for run in runs if run.way.startswith("kill")])
    print("\n| moment | runs | right text | named error | other | median pause | longest pause |\n|---|--:|--:|--:|--:|--:|--:|")
    for moment in (*ALONE, *TOGETHER):
        row(moment, [run for run in runs if run.moment == moment and run.is_hit])
        row(f"{moment}, over before it was seen", [run for run in runs if run.moment == moment and not run.is_hit])
    print("\n| layout | runs | right text | named error | other | median pause | longest pause |\n|---|--:|--:|--:|--:|--:|--:|")
    for layout in dict.fromkeys(run.layout for run in runs):
        row(layout, [run for run in runs if run.layout == layout])
    shares([run for run in runs if run.way.startswith("kill") and run.replay_s is not None])
    print(f"\n{sum(run.is_right for run in runs)} of {len(runs)} runs ended as they may")


def row(name: str, runs: list[Run]) -> None:
    if runs:
        count, pauses = Counter(run.outcome for run in runs), [run.pause_s for run in runs if run.outcome == RIGHT] or [0.0]
        others = len(runs) - count[RIGHT] - count[NAMED]
        print(f"| {name} | {len(runs)} | {count[RIGHT]} | {count[NAMED]} | {others} | {statistics.median(pauses):.2f} s | {max(pauses):.2f} s |")


def shares(runs: list[Run]) -> None:
    """What the pauses after a kill -9 of one machine consist of."""
    kinds = {
        "a copy takes over": [run for run in runs if run.took_over],
        "reloaded, members only": [run for run in runs if not run.took_over and "server" not in run.victims],
        "reloaded, the server's own worker": [run for run in runs if not run.took_over and "server" in run.victims],
    }
    print("\n| kill -9 of one | runs | median pause | until noticed | until served | replay | longest pause |\n|---|--:|--:|--:|--:|--:|--:|")
    for name, some in kinds.items():
        if some:
            noticing, replay = (statistics.median(value or 0.0 for value in values) for values in ([r.noticing_s for r in some], [r.replay_s for r in some]))
            making = statistics.median(run.pause_s - (run.noticing_s or 0.0) - (run.replay_s or 0.0) for run in some)
            pause, longest = statistics.median(run.pause_s for run in some), max(run.pause_s for run in some)
            print(f"| {name} | {len(some)} | {pause:.2f} s | {noticing:.2f} s | {making:.2f} s | {replay:.2f} s | {longest:.2f} s |")


if __name__ == "__main__":
    main()
