"""How long the all-reduces of one token take: processes on loopback, TLS on, one core each.

python benchmarks/collectives.py --payload-bytes 8192 --exchanges 32
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from yoke.net.group import ChannelGroup, WireType
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, connect


def measure(group: ChannelGroup, options: argparse.Namespace) -> list[float]:
    """Milliseconds a token, one entry a repeat."""
    view = np.zeros(options.payload_bytes // 4, np.float32)
    found = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        for _ in range(options.tokens * options.exchanges):
            group.all_reduce(view)
        found.append((time.perf_counter() - started) * 1000 / options.tokens)
    return found[1:]  # the first one warms up


def work(rank: int, directory: Path, options: argparse.Namespace, spin_s: float, pipe: Connection) -> None:
    if hasattr(os, "sched_setaffinity") and not options.unpinned:
        os.sched_setaffinity(0, {rank})
    nodes = [Identity.load_or_create(directory / str(number)) for number in range(2)]
    members = [node.certificate_der for node in nodes]
    if rank:
        host, port = pipe.recv()
        channel = connect((host, port), nodes[0].id, nodes[1], members, deadline_s=10, spin_s=spin_s)
        group = ChannelGroup(1, {0: channel}, options.wire)
        measure(group, options)
    else:
        listener = Listener("127.0.0.1", 0, nodes[0], members, spin_s=spin_s)
        pipe.send(listener.address)
        accepted = listener.accept(10)
        if accepted is None:
            sys.exit("the other process did not connect")
        listener.close()
        group = ChannelGroup(0, {1: accepted}, options.wire)
        pipe.send(measure(group, options))
        pipe.recv()
    group.close()


def run(options: argparse.Namespace, spin_s: float) -> list[float]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        for number in range(2):
            Identity.load_or_create(Path(directory) / str(number))
        ends = [context.Pipe() for _ in range(2)]
        workers = [context.Process(target=work, args=(rank, Path(directory), options, spin_s, ends[rank][1])) for rank in range(2)]
        for worker in workers:
            worker.start()
        ends[1][0].send(ends[0][0].recv())
        found: list[float] = ends[0][0].recv()
        ends[0][0].send("done")
        for worker in workers:
            worker.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payload-bytes", type=int, default=8192, help="bytes of float32 that each rank contributes")
    parser.add_argument("--exchanges", type=int, default=32, help="all-reduces per token")
    parser.add_argument("--tokens", type=int, default=50, help="tokens per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wire", type=WireType, default=WireType.FLOAT32, choices=list(WireType))
    parser.add_argument("--spin-us", type=float, nargs="+", default=[0, 50], help="how long a receive asks before it sleeps")
    parser.add_argument("--unpinned", action="store_true", help="let the system choose the cores")
    options = parser.parse_args()
    for spin_us in options.spin_us:
        found = run(options, spin_us / 1e6)
        each = statistics.median(found) * 1000 / options.exchanges
        print(
            f"spin {spin_us:g} us: {statistics.median(found):.2f} ms per token (from {min(found):.2f} to {max(found):.2f}), {each:.0f} us per exchange; "
            f"{options.exchanges} exchanges of {options.payload_bytes} bytes as {options.wire}"
        )


if __name__ == "__main__":
    main()
