"""Handing out weights: a manifest made, half a shard fetched over TLS on loopback, a second start, loading from the store and from the file, and overheads.

The giver is a process of its own, and so is who fetches; each is pinned to its own processor where the system can. The raw rate is that of the same channel
without manifest, hashes or disk. Cases run in turn; medians are printed.

usage: python benchmarks/weights.py [--rounds 5] [--directory DIR]
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from workload import model_1b

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Program, ShardShape
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.models.decoder import decoder
from yoke.models.shards import shard_cuts
from yoke.net.channel import Channel, send_message
from yoke.net.codec import Hello, Purpose
from yoke.net.group import SoloGroup
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, TcpChannel, connect
from yoke.node.fetching import StoreSource, Supplier, fetch, wanted_tiles
from yoke.node.loading import FileSource, Source, stream_weights
from yoke.node.model import Model
from yoke.node.porter import Porter
from yoke.node.shelf import FileShelf, serve_pieces
from yoke.planner import grid_plan
from yoke.weights.manifest import Manifest, make_manifest, manifest_of
from yoke.weights.pack import Pack
from yoke.weights.store import Store

MB = 1e6
STEP_BYTES = 1 << 20
RAW_STEPS = 256
_TCP_INFO_BYTES = 136  # linux/tcp.h: tcpi_bytes_received is the u64 at 128


def give(directory: Path, manifest: bytes, pipe: Connection) -> None:
    """The giver's process: weights, and raw bytes for comparison."""
    pin(0)
    attic, member = (Identity.load_or_create(directory / name) for name in ("attic", "cellar"))
    model = Model.open(model_1b())
    shelf = FileShelf(model.file, Manifest.decode(manifest))
    listener = Listener("127.0.0.1", 0, attic, [member.certificate_der])

    def stream(channel: Channel) -> None:
        data = bytes(STEP_BYTES)
        for _ in range(RAW_STEPS):
            channel.send(data)
        channel.receive_into(memoryview(bytearray(1)))

    Porter(listener, {Purpose.WEIGHTS: lambda channel: serve_pieces(channel, {shelf.manifest.digest: shelf}), Purpose.PROBE: stream})
    pipe.send(listener.address)
    pipe.recv()
    listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the store lies; a temporary directory unless given")
    arguments = parser.parse_args()
    model = Model.open(model_1b())
    nodes = [NodeId(f"{index:064x}") for index in range(2)]
    plan = grid_plan(model.spec, nodes, stages=1, ranks=2)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        manifest = report_manifest(model, Path(name), arguments.rounds)
        pin(1)
        with giver(Path(name), manifest.encode()) as opening:
            report_fetching(Path(name), manifest, plan, opening, arguments.rounds)
        report_loading(Path(name), model, manifest, plan, arguments.rounds)


def report_manifest(model: Model, directory: Path, rounds: int) -> Manifest:
    made = [timed(lambda: make_manifest(model.file, model.spec.head_dim)) for _ in range(rounds)]
    manifest = manifest_of(model.file, model.spec.head_dim, directory / "manifests")
    kept = [timed(lambda: manifest_of(model.file, model.spec.head_dim, directory / "manifests")) for _ in range(rounds)]
    n_bytes = model.file.n_bytes
    print(
        f"manifest of {n_bytes / MB:.0f} MB: {middle(made):.2f} s ({n_bytes / MB / middle(made):.0f} MB/s); the one that was kept: {middle(kept) * 1e3:.0f} ms"
    )
    print(f"manifest: {manifest.layout.n_tiles} tiles, {len(manifest.encode())} bytes ({len(manifest.encode()) / n_bytes:.3%} of the file)", flush=True)
    return manifest


def report_fetching(directory: Path, manifest: Manifest, plan: Plan, opening: Callable[[], TcpChannel], rounds: int) -> None:
    cuts = shard_cuts(plan, 0, 1)
    needed = sum(cut_bytes(manifest, cut.name, cut.rows, cut.columns) for cut in cuts)
    ids = wanted_tiles(manifest, cuts)
    rates, raw, again = [], [], []
    received: list[int] = []
    supplier = Supplier(name="attic", open=lambda: Counted(opening(), received.append))
    for number in range(rounds):
        raw.append(RAW_STEPS * STEP_BYTES / MB / timed(partial(receive_raw, opening)))
        with contextlib.closing(Store(directory / f"store{number}", 1 << 40)) as store:
            with store.open(manifest) as pack:
                rates.append(needed / MB / timed(partial(bring, pack, ids, [supplier])))
            again.append(timed(partial(start_again, store, manifest, ids)))
        if number + 1 < rounds:
            remove(directory / f"store{number}")
    place = directory / f"store{rounds - 1}"
    stored = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file()) if sys.platform != "win32" else 0
    print(f"half shard of {needed / MB:.0f} MB in {len(ids)} tiles: {middle(rates):.0f} MB/s; the raw channel: {middle(raw):.0f} MB/s")
    print(f"second start (open the store, find that nothing is missing): {middle(again) * 1e3:.0f} ms, 0 bytes from the network")
    tiles = sum(manifest.layout.tile(tile_id).n_bytes for tile_id in ids)
    print(
        f"beyond the shard's bytes: tiles {tiles / needed - 1:.2%}, received over TCP {max(received, default=0) / needed - 1:.2%} (TLS, heads and what the "
        f"giver has counted in), on the disk {stored / needed - 1:.2%} (index and manifest counted in)",
        flush=True,
    )


def report_loading(directory: Path, model: Model, manifest: Manifest, plan: Plan, rounds: int) -> None:
    backend = GgmlBackend()
    place = next(directory.glob("store*"))
    from_file, from_store = [], []
    with contextlib.closing(Store(place, 1 << 40)) as store, store.open(manifest) as pack:
        for _ in range(rounds):
            from_file.append(timed(partial(load, backend, plan, FileSource(model.file))))
            from_store.append(timed(partial(load, backend, plan, StoreSource(pack))))
    print(f"half shard into memory: from the file {middle(from_file):.2f} s, from the store {middle(from_store):.2f} s")


def load(backend: GgmlBackend, plan: Plan, source: Source) -> None:
    stage, shard = plan.stages[0], plan.stages[0].shards[1]
    shape = ShardShape(
        width=plan.spec.width,
        n_blocks=len(stage.blocks),
        n_kv_heads=len(plan.kv_heads(shard)),
        head_dim=plan.spec.head_dim,
        n_cells=256,
        is_last=True,
        cache_type="f16",
    )
    weights = stream_weights(source, shard_cuts(plan, 0, 1), lambda done: None)
    backend.open(Program(text=decoder(plan, 0, 1), shape=shape, weights=weights, reducer=SoloGroup()), device="CPU", threads=1).close()


class Counted:
    """A channel that says, when it is closed, how many bytes the system has received over it."""

    def __init__(self, channel: TcpChannel, tell: Callable[[int], None]) -> None:
        self._channel, self._tell = channel, tell

    def __getattr__(self, name: str) -> object:
        return getattr(self._channel, name)

    def close(self) -> None:
        """Count, and close."""
        if hasattr(socket, "TCP_INFO"):
            with contextlib.suppress(OSError):  # closed before
                info = self._channel._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
                self._tell(struct.unpack_from("<Q", info, 128)[0])
        self._channel.close()


def bring(pack: Pack, ids: Sequence[int], suppliers: Sequence[Supplier]) -> None:
    fetch(pack, ids, suppliers, lambda done: None, threading.Event())


def start_again(store: Store, manifest: Manifest, ids: Sequence[int]) -> None:
    with store.open(manifest) as pack:
        bring(pack, ids, [])


def receive_raw(opening: Callable[[], TcpChannel]) -> None:
    room = memoryview(bytearray(STEP_BYTES))
    with contextlib.closing(opening()) as channel:
        send_message(channel, Hello(plan_version=0, purpose=Purpose.PROBE, stage=0, rank=0))
        for _ in range(RAW_STEPS):
            channel.receive_into(room)
        channel.send(b"\0")


def cut_bytes(manifest: Manifest, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None) -> int:
    grid = manifest.layout.grid(name)
    (start, stop), (left, right) = grid.area(rows, columns)
    return (stop - start) * grid.info.type.row_bytes(right - left)


@contextlib.contextmanager
def giver(directory: Path, manifest: bytes) -> Iterator[Callable[[], TcpChannel]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=give, args=(directory, manifest, there))
    process.start()
    try:
        address = here.recv()
        attic, member = (Identity.load_or_create(directory / name) for name in ("attic", "cellar"))
        yield partial(connect, address, attic.id, member, [attic.certificate_der], deadline_s=10)
    finally:
        here.send(None)
        process.join()


def pin(processor: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {processor % (os.cpu_count() or 1)})


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()


if __name__ == "__main__":
    main()
