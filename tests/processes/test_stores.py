"""Several processes in one store: they add at the same time, and die while they add."""

import contextlib
import hashlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from yoke.core.tensor import TensorInfo, TensorType
from yoke.weights.manifest import Manifest
from yoke.weights.pack_index import HEAD_BYTES, RECORD_BYTES
from yoke.weights.store import Store

pytestmark = pytest.mark.processes


def tiles_of(n_tiles: int) -> list[bytes]:
    return [random.Random(index).randbytes(4096) for index in range(n_tiles)]


def manifest_of(tiles: list[bytes]) -> Manifest:
    info = TensorInfo(name="output.weight", type=TensorType.F32, shape=(32 * len(tiles), 32))
    return Manifest(tensors=(info,), head_dim=64, header=bytes(32), hashes=b"".join(hashlib.sha256(tile).digest() for tile in tiles))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "store", 1 << 40)) as store:
        yield store


ADDER = """
import sys
from pathlib import Path
from yoke.weights.manifest import Manifest
from yoke.weights.store import Store
directory, tiles, step = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
store = Store(directory / "store", 1 << 40)
with store.open(Manifest.decode((directory / "manifest").read_bytes())) as pack:
    ids = range(pack.manifest.layout.n_tiles)
    print("ready", flush=True)
    sys.stdin.readline()
    for tile_id in ids if step > 0 else reversed(ids):
        tile = pack.manifest.layout.tile(tile_id)
        start = tile.rows[0] * 128
        pack.add(tile_id, tiles[start : start + tile.n_bytes])
    print("done", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def adder(directory: Path, step: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", ADDER, str(directory), str(directory / "tiles"), str(step)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_that_add_the_same_at_the_same_time_do_it_once(store: Store, tmp_path: Path) -> None:
    tiles = tiles_of(400)
    (tmp_path / "tiles").write_bytes(b"".join(tiles))
    (tmp_path / "manifest").write_bytes(manifest_of(tiles).encode())
    with adder(tmp_path, 1) as one, adder(tmp_path, -1) as other:
        for process in (one, other):
            tell(process)
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
        for process in (one, other):
            tell(process)
        assert (one.wait(), other.wait()) == (0, 0)
    with store.open(manifest_of(tiles)) as pack:
        assert pack.missing(range(400)) == []
        assert pack.verify() == ()
    assert (store.directory / pack.manifest.digest.hex() / "pack").stat().st_size == HEAD_BYTES + sum(map(len, tiles)), "no tile is there twice"


def test_a_process_killed_while_it_adds_leaves_what_it_added(store: Store, tmp_path: Path) -> None:
    tiles = tiles_of(4000)
    (tmp_path / "tiles").write_bytes(b"".join(tiles))
    (tmp_path / "manifest").write_bytes(manifest_of(tiles).encode())
    index = store.directory / manifest_of(tiles).digest.hex() / "index"
    with adder(tmp_path, 1) as process:
        before = index.stat().st_size
        tell(process)
        while index.stat().st_size < before + 50 * RECORD_BYTES:
            pass
    with store.open(manifest_of(tiles)) as pack:
        n_held = 4000 - len(pack.missing(range(4000)))
        assert n_held >= 50
        assert pack.verify() == ()
        for tile_id in pack.missing(range(4000)):
            pack.add(tile_id, tiles[tile_id])
        assert pack.verify() == ()
