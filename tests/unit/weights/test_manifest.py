"""A manifest says what a model's weights are, to the bit; what is no manifest is refused before it costs anything."""

import contextlib
import hashlib
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import ModelError, RemoteProtocolError, SettingError
from yoke.core.tensor import TensorInfo, TensorType
from yoke.testing.models import write_random_model
from yoke.weights.gguf import GgufFile
from yoke.weights.manifest import MAX_MANIFEST_BYTES, Manifest, make_manifest, manifest_of, tile_bytes

HEAD_DIM = 16
TENSORS = (
    TensorInfo(name="token_embd.weight", type=TensorType.Q4_0, shape=(300, 64)),
    TensorInfo(name="blk.0.attn_norm.weight", type=TensorType.F32, shape=(64,)),
    TensorInfo(name="blk.0.ffn_down.weight", type=TensorType.Q4_K, shape=(64, 512)),
    TensorInfo(name="stack", type=TensorType.F32, shape=(2, 3, 8)),
)
SMALL = Manifest(tensors=TENSORS, head_dim=HEAD_DIM, header=bytes(range(32)), hashes=bytes(range(7)) * 32)


def write_model(path: Path, **changes: object) -> Path:
    shape: dict[str, object] = {"n_blocks": 2, "width": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": HEAD_DIM, "columns": 512, "vocabulary": 300}
    write_random_model(path, architecture="llama", **{**shape, **changes})  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module", params=["f32", "q4_0"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    with GgufFile.open(write_model(tmp_path_factory.mktemp("model") / "m.gguf", type=request.param)) as opened:
        yield opened


def test_every_tiles_hash_is_that_of_its_bytes(file: GgufFile) -> None:
    manifest = make_manifest(file, HEAD_DIM)
    assert manifest.layout.n_bytes == sum(info.n_bytes for info in file.tensors.values())
    for tile_id in range(manifest.layout.n_tiles):
        tile = manifest.layout.tile(tile_id)
        data = tile_bytes(file, tile)
        expected = file.read(tile.name, None if len(file.tensors[tile.name].shape) == 1 else tile.rows, tile.columns)
        assert bytes(data) == bytes(expected.data)
        assert manifest.is_tile(tile_id, data)
        damaged = bytearray(data)
        damaged[-1] ^= 1
        assert not manifest.is_tile(tile_id, damaged)


def test_threads_change_nothing_and_progress_is_told(file: GgufFile) -> None:
    told: list[int] = []
    manifests = {make_manifest(file, HEAD_DIM, told.append, threads=threads) for threads in (1, 3)}
    assert len(manifests) == 1
    assert told[: len(told) // 2] == sorted(told[: len(told) // 2])
    assert told[-1] == manifests.pop().layout.n_bytes


def test_what_the_caller_of_progress_raises_ends_the_work(file: GgufFile) -> None:
    def stop(done: int) -> None:
        raise InterruptedError(done)

    with pytest.raises(InterruptedError):
        make_manifest(file, HEAD_DIM, stop)


def test_one_bit_of_the_weights_or_of_the_metadata_makes_another_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    digests = set()
    for place in (None, len(data) - 1, data.index(b"random llama")):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        with GgufFile.open(path) as file:
            digests.add(make_manifest(file, HEAD_DIM).digest)
    assert len(digests) == 3


def test_a_manifest_comes_back_as_it_was_sent(file: GgufFile) -> None:
    manifest = make_manifest(file, HEAD_DIM)
    again = Manifest.decode(manifest.encode(), manifest.digest)
    assert (again, again.digest) == (manifest, manifest.digest)
    assert again.layout.n_tiles == manifest.layout.n_tiles
    assert manifest.digest == hashlib.sha256(manifest.encode()).digest()


def test_the_layout_is_the_documented_one() -> None:
    head = struct.pack("<4sHHII32s", b"YKMF", 1, HEAD_DIM, 4, 7, bytes(range(32)))
    tensor = struct.pack("<BBB", 17, 2, 2) + b"token_embd.weight" + struct.pack("<QQ", 300, 64)
    assert SMALL.encode().startswith(head + tensor)
    assert SMALL.encode().endswith(SMALL.hashes)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Manifest.decode(data)


@given(st.data())
def test_a_damaged_manifest_is_refused_by_its_digest_and_else_is_a_manifest_or_an_error(data: st.DataObject) -> None:
    damaged = bytearray(SMALL.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255).filter(lambda value, place=place: value != damaged[place]))
    if damaged != SMALL.encode():
        with pytest.raises(RemoteProtocolError, match="expected that of"):
            Manifest.decode(damaged, SMALL.digest)
    with contextlib.suppress(RemoteProtocolError):
        assert Manifest.decode(damaged).encode() == damaged


@given(st.integers(0, len(SMALL.encode()) - 1), st.booleans())
def test_a_manifest_of_another_length_is_refused(length: int, is_longer: bool) -> None:
    with pytest.raises(RemoteProtocolError):
        Manifest.decode(SMALL.encode() + bytes(1 + length) if is_longer else SMALL.encode()[:length])


@pytest.mark.parametrize(
    ("n_tensors", "n_tiles", "tensor"),
    [
        (2**32 - 1, 7, b""),
        (4, 2**32 - 1, b""),
        (1, 4, struct.pack("<BBB", 1, 0, 4) + b"x" + struct.pack("<4Q", *(2**64 - 1,) * 4)),
        (1, 4, struct.pack("<BBB", 1, 0, 1) + b"x" + struct.pack("<Q", 2**63)),
        (1, 4, struct.pack("<BBB", 1, 0, 2) + b"x" + struct.pack("<QQ", 2**40, 2**20)),
        (1, 4, struct.pack("<BBB", 1, 0, 200) + b"x" + bytes(1600)),
        (1, 4, struct.pack("<BBB", 1, 99, 1) + b"x" + struct.pack("<Q", 1)),
        (1, 4, struct.pack("<BBB", 1, 0, 1) + b"\xff" + struct.pack("<Q", 1)),
    ],
)
def test_what_a_manifest_announces_costs_nothing_until_it_is_there(n_tensors: int, n_tiles: int, tensor: bytes) -> None:
    data = struct.pack("<4sHHII32s", b"YKMF", 1, 16, n_tensors, n_tiles, bytes(32)) + tensor + bytes(128)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            Manifest.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(RemoteProtocolError, match="at most"):
        Manifest.decode(bytes(MAX_MANIFEST_BYTES + 1))


def test_hashes_must_be_one_for_each_tile() -> None:
    with pytest.raises(ModelError, match="hashes"):
        Manifest(tensors=TENSORS, head_dim=HEAD_DIM, header=bytes(32), hashes=bytes(32))


def count_reading(file: GgufFile, directory: Path) -> tuple[Manifest, bool]:
    """The manifest, and whether the file was read for it."""
    told: list[int] = []
    return manifest_of(file, HEAD_DIM, directory, told.append), bool(told)


def test_a_manifest_is_made_once_for_each_state_of_a_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    with GgufFile.open(path) as file:
        first = count_reading(file, tmp_path / "state")
        assert count_reading(file, tmp_path / "state") == (first[0], False)
        os.utime(path, ns=(1, 1))
        assert count_reading(file, tmp_path / "state") == (first[0], True)
        assert manifest_of(file, HEAD_DIM * 2, tmp_path / "state").head_dim == HEAD_DIM * 2
    (entry,) = (tmp_path / "state").iterdir()
    write_model(path, seed=1)
    os.utime(path, ns=(1, 1))  # a file that looks like the one before: its header may tell
    with GgufFile.open(path) as file:
        manifest_of(file, HEAD_DIM, tmp_path / "state")
    assert list((tmp_path / "state").iterdir()) == [entry], "one entry a path, and no draft is left"
    if sys.platform != "win32":
        assert entry.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:60] + b"x" + data[61:], lambda _: b"", lambda data: data + b"x"])
def test_a_kept_manifest_that_is_broken_is_made_again(tmp_path: Path, damage: object) -> None:
    with GgufFile.open(write_model(tmp_path / "m.gguf")) as file:
        first = manifest_of(file, HEAD_DIM, tmp_path / "state")
        (entry,) = (tmp_path / "state").iterdir()
        entry.write_bytes(damage(entry.read_bytes()))  # type: ignore[operator]
        assert count_reading(file, tmp_path / "state") == (first, True)
        assert count_reading(file, tmp_path / "state") == (first, False)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    with GgufFile.open(path) as file, pytest.raises(ModelError, match="changed while"):
        manifest_of(file, HEAD_DIM, tmp_path / "state", lambda done: os.utime(path, ns=(done, done)))
    assert not (tmp_path / "state").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a directory should be")
    with GgufFile.open(write_model(tmp_path / "m.gguf")) as file, pytest.raises(SettingError, match="cannot keep the manifest"):
        manifest_of(file, HEAD_DIM, tmp_path / "state")
