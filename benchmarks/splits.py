"""What a split gains: one node against two ranks and two stages, one thread a node, each node pinned to its own processor, over TLS on loopback.

The cases run in turn, so that ratios hold when the machine's speed drifts; medians are printed.

usage: python benchmarks/splits.py [--rounds 5] [--sessions 1,2,4] [--spin-us 100] [--wire-type float32]
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
from workload import model_1b

from yoke.cli.bench import Workload, measure
from yoke.node.config import read_settings
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout, load_settings, open_coordinator, wish_of
from yoke.node.model import Model

Result = dict[str, Any]
CASES = (("one node", 1, 1), ("two ranks", 1, 2), ("two stages", 2, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sessions", default="1,2,4")
    parser.add_argument("--prompt", type=int, default=4)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--spin-us", default="100")
    parser.add_argument("--wire-type", default="float32")
    parser.add_argument("--cases", default="one node,two ranks,two stages")
    arguments = parser.parse_args()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    for n_sessions in map(int, arguments.sessions.split(",")):
        work = Workload(prompt_tokens=arguments.prompt, decode_tokens=arguments.decode, sessions=n_sessions, runs=1)
        cases = [case for case in CASES if case[0] in arguments.cases]
        rounds = [{name: asyncio.run(run_case(stages, ranks, work, arguments)) for name, stages, ranks in cases} for _ in range(arguments.rounds)]
        for name, _, _ in cases:
            report(name, [(results[name], results[cases[0][0]]) for results in rounds], n_sessions)


async def run_case(stages: int, ranks: int, work: Workload, arguments: argparse.Namespace) -> Result:
    path = model_1b()
    cells = -(-work.sessions * (work.prompt_tokens + work.decode_tokens) // 256) * 256
    with tempfile.TemporaryDirectory() as directory:
        flags = {"threads": 1, "context": work.prompt_tokens + work.decode_tokens, "cells": cells, "state_dir": directory}
        settings = read_settings({**flags, "spin_us": arguments.spin_us, "wire_type": arguments.wire_type}, {}, Path(directory))
        layout = Layout(nodes=stages * ranks, is_open=True, stages=stages, ranks=ranks, shares=(1.0,) * ranks)
        model = Model.open(path)
        async with contextlib.AsyncExitStack() as stack:
            started: list[Coordinator] = []
            joining = asyncio.ensure_future(stack.enter_async_context(open_coordinator(settings, layout, started.append)))
            while not started:
                await asyncio.sleep(0.05)
                if joining.done():
                    await joining
            for index in range(1, stages * ranks):
                await stack.enter_async_context(pinned_node(started[0], index, f"{directory}/{index}", arguments.spin_us))
            cluster = await joining
            pin_own_worker()
            await cluster.load(model, wish_of(settings, layout, cells), load_settings(settings, settings.context, cells))
            return await measure(cluster, work)


def pin_own_worker() -> None:
    """The first node's worker to the first processor; the other nodes are pinned as they are started, and this process goes where there is room."""
    if hasattr(os, "sched_setaffinity"):
        for child in psutil.Process().children():
            if "yoke.node.worker" in child.cmdline():
                for thread in child.threads():
                    os.sched_setaffinity(thread.id, {0})


@contextlib.asynccontextmanager
async def pinned_node(cluster: Coordinator, index: int, directory: str, spin_us: str) -> AsyncIterator[None]:
    prefix = ["taskset", "-c", str(index % (os.cpu_count() or 1))] if sys.platform == "linux" else []
    flags = ["--threads", "1", "--state-dir", directory, "--name", f"node-{index}", "--quiet", "--spin-us", spin_us]
    process = await asyncio.create_subprocess_exec(*prefix, sys.executable, "-m", "yoke", "join", cluster.standing_invite.encode(), *flags)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


def report(name: str, pairs: list[tuple[Result, Result]], n_sessions: int) -> None:
    """Medians of a case, and of its ratios to the first case of the same round."""

    def middle(figure: Callable[[Result], float]) -> float:
        return statistics.median(figure(result) for result, _ in pairs)

    def gain(figure: str) -> float:
        return statistics.median(result[figure] / base[figure] for result, base in pairs)

    def per_token(result: Result, clock: str) -> float:
        return max(stage[clock] / max(1, stage["tokens"]) for stage in result["stages"]) * 1e3

    print(
        f"{n_sessions} session(s), {name}: decode {middle(lambda r: r['decode_tokens_per_s']):.1f} tokens/s ({gain('decode_tokens_per_s'):.2f}x), "
        f"prefill {middle(lambda r: r['prefill_tokens_per_s']):.1f} ({gain('prefill_tokens_per_s'):.2f}x); "
        f"a token: collectives {middle(lambda r: per_token(r, 'collective_s')):.2f} ms, sending {middle(lambda r: per_token(r, 'wire_s')):.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
