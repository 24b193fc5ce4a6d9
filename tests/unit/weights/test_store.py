"""The store keeps what was checked, within its limit, whatever dies beside it."""

import contextlib
import hashlib
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yoke.core.errors import NodeError, RemoteProtocolError, SettingError
from yoke.core.tensor import TensorInfo, TensorType
from yoke.weights.locks import FileLock
from yoke.weights.manifest import Manifest
from yoke.weights.pack import SYNC_BYTES, Pack
from yoke.weights.pack_index import HEAD_BYTES, RECORD_BYTES
from yoke.weights.store import Store

PLENTY = 1 << 40
N_TILES = 12
IS_POSIX = sys.platform != "win32"
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tiles_of(seed: int, n_tiles: int = N_TILES, columns: int = 32) -> list[bytes]:
    """Tiles of 32 rows; the last has fewer."""
    rng = random.Random(seed)
    return [rng.randbytes((32 if index < n_tiles - 1 else 5) * 4 * columns) for index in range(n_tiles)]


def manifest_of(tiles: list[bytes]) -> Manifest:
    columns = len(tiles[0]) // 128
    info = TensorInfo(name="output.weight", type=TensorType.F32, shape=(sum(map(len, tiles)) // (4 * columns), columns))
    return Manifest(tensors=(info,), head_dim=64, header=bytes(32), hashes=b"".join(hashlib.sha256(tile).digest() for tile in tiles))


TILES = tiles_of(0)
MANIFEST = manifest_of(TILES)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with contextlib.closing(Store(tmp_path / "store", PLENTY)) as store:
        yield store


def place_of(store: Store, manifest: Manifest = MANIFEST) -> Path:
    return store.directory / manifest.digest.hex()


def held(pack: Pack) -> set[int]:
    """The tiles that are there, each checked bit for bit."""
    ids = {tile_id for tile_id in range(N_TILES) if pack.holds(tile_id)}
    assert all(bytes(pack.read(tile_id) or b"") == TILES[tile_id] for tile_id in ids)
    assert pack.bitmap() == bytes(sum(1 << (tile_id & 7) for tile_id in ids if tile_id >> 3 == byte) for byte in range(-(-N_TILES // 8)))
    assert pack.missing(range(N_TILES)) == [tile_id for tile_id in range(N_TILES) if tile_id not in ids]
    assert pack.n_bytes == sum(len(TILES[tile_id]) for tile_id in ids)
    return ids


def fill(store: Store, seed: int, n_tiles: int = N_TILES) -> Manifest:
    """A whole model in the store."""
    tiles = tiles_of(seed, n_tiles)
    with store.open(manifest_of(tiles)) as pack:
        for tile_id, tile in enumerate(tiles):
            pack.add(tile_id, tile)
        return pack.manifest


def test_what_was_added_is_there_the_next_time(store: Store) -> None:
    with store.open(MANIFEST) as pack:
        assert held(pack) == set()
        assert [pack.add(tile_id, TILES[tile_id]) for tile_id in (3, 0, 11, 3)] == [True, True, True, False]
        assert held(pack) == {0, 3, 11}
    with store.open(MANIFEST) as pack:
        assert held(pack) == {0, 3, 11}
        pack.add(5, memoryview(bytearray(TILES[5])))
        assert held(pack) == {0, 3, 5, 11}
    assert store.digests() == (MANIFEST.digest,)
    assert store.manifest(MANIFEST.digest) == MANIFEST
    assert store.manifest(bytes(32)) is None


@pytest.mark.parametrize(("tile_id", "data"), [(0, TILES[1]), (0, TILES[0][:-1]), (0, b""), (N_TILES, TILES[0]), (-1, TILES[-1]), (0, TILES[0][:-1] + b"x")])
def test_what_is_not_the_tile_is_refused(store: Store, tile_id: int, data: bytes) -> None:
    with store.open(MANIFEST) as pack:
        with pytest.raises(RemoteProtocolError, match=f"tile {tile_id} is not"):
            pack.add(tile_id, data)
        assert held(pack) == set()
        assert pack.read(tile_id) is None


def test_views_outlive_the_pack_that_gave_them_and_a_closed_pack_holds_nothing(store: Store) -> None:
    with store.open(MANIFEST) as pack:
        pack.add(0, TILES[0])
        first = pack.read(0)
        pack.add(1, TILES[1])
        second = pack.read(1)
        pack.release([0, 1, 7])
    pack.close()
    assert (bytes(first or b""), bytes(second or b"")) == (TILES[0], TILES[1])
    assert not pack.holds(0)
    assert pack.read(0) is None
    assert set(pack.bitmap()) == {0}


def test_two_who_have_a_pack_open_see_what_the_other_adds(store: Store, tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "store", PLENTY)) as other, store.open(MANIFEST) as here, other.open(MANIFEST) as there:
        here.add(4, TILES[4])
        assert not there.add(4, TILES[4])
        there.add(5, TILES[5])
        assert here.missing(range(N_TILES)) == [tile_id for tile_id in range(N_TILES) if tile_id not in (4, 5)]
        assert held(here) == held(there) == {4, 5}


@pytest.fixture(scope="module")
def unsynced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as a power cut finds it: eight tiles added, of which the first three are known to be on the disk."""
    directory = tmp_path_factory.mktemp("power") / "store"
    with contextlib.closing(Store(directory, PLENTY)) as store, store.open(MANIFEST) as pack:
        for tile_id in range(8):
            pack.add(tile_id, TILES[tile_id])
            if tile_id == 2:
                pack.sync()
        shutil.copytree(directory, directory.with_name("cut"))
    return directory.with_name("cut")


@SLOW
@given(name=st.sampled_from(["pack", "index"]), share=st.floats(0, 1), garbage=st.binary(max_size=64))
def test_a_torn_tail_is_cut_off_and_the_rest_is_kept(unsynced: Path, name: str, share: float, garbage: bytes) -> None:
    with copied(unsynced) as store:
        path = place_of(store) / name
        whole = path.read_bytes()
        least = HEAD_BYTES + sum(map(len, TILES[:3])) if name == "pack" else 0  # the pack's beginning is known to be on the disk
        path.write_bytes(whole[: least + int((len(whole) - least) * share)] + garbage)
        with store.open(MANIFEST) as pack:
            ids = held(pack)
            assert ids == set(range(len(ids))), "a prefix of what was added"
            assert share < 1 or len(ids) == 8
        refill(store)


def test_a_pack_shorter_than_what_was_on_the_disk_is_checked_from_its_beginning(unsynced: Path) -> None:
    with copied(unsynced) as store:
        path = place_of(store) / "pack"
        path.write_bytes(path.read_bytes()[: HEAD_BYTES + len(TILES[0]) + len(TILES[1]) - 1] + b"\x00")
        with store.open(MANIFEST) as pack:
            assert held(pack) == {0}
        refill(store)


@SLOW
@given(name=st.sampled_from(["pack", "index"]), data=st.data())
def test_bytes_that_a_power_cut_left_wrong_are_not_believed(unsynced: Path, name: str, data: st.DataObject) -> None:
    with copied(unsynced) as store:
        path = place_of(store) / name
        damaged = bytearray(path.read_bytes())
        start = HEAD_BYTES + sum(map(len, TILES[:3])) if name == "pack" else 0  # the pack's beginning is known to be on the disk
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(start, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
        with store.open(MANIFEST) as pack:
            held(pack)
        refill(store)


def test_tiles_that_lie_one_behind_the_other_are_read_as_one(store: Store) -> None:
    with store.open(MANIFEST) as pack:
        for tile_id in (4, 5, 6, 2, 11, 3):
            pack.add(tile_id, TILES[tile_id])
        assert bytes(pack.read_run([4, 5, 6]) or b"") == b"".join(TILES[4:7])
        assert bytes(pack.read_run([6, 2, 11]) or b"") == TILES[6] + TILES[2] + TILES[11]
        assert pack.read_run([2, 3]) is None, "there is another between them"
        assert pack.read_run([5, 4]) is None
        assert pack.read_run([6, 7]) is None
        assert pack.read_run([7, 8]) is None


@contextlib.contextmanager
def copied(directory: Path) -> Iterator[Store]:
    target = directory.with_name("copy")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    with contextlib.closing(Store(target, PLENTY)) as store:
        yield store


def refill(store: Store) -> None:
    with store.open(MANIFEST) as pack:
        for tile_id in pack.missing(range(N_TILES)):
            assert pack.add(tile_id, TILES[tile_id])
        assert pack.verify() == ()
        assert held(pack) == set(range(N_TILES))


@pytest.mark.parametrize("name", ["pack", "index", "manifest"])
def test_a_file_that_is_lost_or_another_models_is_made_anew(store: Store, name: str) -> None:
    other = fill(store, 1)
    fill(store, 0)
    (place_of(store) / name).unlink()
    refill(store)
    shutil.copy(place_of(store, other) / name, place_of(store) / name)
    assert (store.manifest(MANIFEST.digest) is None) == (name == "manifest")
    refill(store)


def test_verifying_finds_what_the_disk_has_spoilt_and_forgets_it(store: Store) -> None:
    fill(store, 0)
    path = place_of(store) / "pack"
    spoilt = bytearray(path.read_bytes())
    for tile_id in (2, 9):
        spoilt[HEAD_BYTES + sum(map(len, TILES[:tile_id])) + 7] ^= 4
    path.write_bytes(spoilt)
    told: list[int] = []
    with store.open(MANIFEST) as pack:
        assert pack.verify(told.append) == (2, 9)
        assert told[-1] == sum(map(len, TILES))
        assert pack.missing(range(N_TILES)) == [2, 9]
    with store.open(MANIFEST) as pack:
        assert pack.missing(range(N_TILES)) == [2, 9]
    refill(store)
    with store.open(MANIFEST) as pack:
        assert held(pack) == set(range(N_TILES))


def test_damage_is_not_repaired_under_somebody_elses_hands(store: Store, tmp_path: Path) -> None:
    fill(store, 0)
    index = place_of(store) / "index"
    with contextlib.closing(Store(tmp_path / "store", PLENTY)) as other, store.open(MANIFEST) as pack:
        damaged = bytearray(index.read_bytes())
        damaged[-1] ^= 1
        index.write_bytes(damaged)
        with pytest.raises(NodeError, match="another process uses it"):
            other.open(MANIFEST)
        assert held(pack) == set(range(N_TILES))


def test_disk_and_store_have_little_more_than_the_tiles(store: Store) -> None:
    tiles = tiles_of(2, 500, columns=288)  # 36 KB each, as in a model of width 2048 in Q4_0
    with store.open(manifest_of(tiles)) as pack:
        for tile_id, tile in enumerate(tiles):
            pack.add(tile_id, tile)
    n_bytes = sum(map(len, tiles))
    assert store.n_bytes <= 1.005 * n_bytes
    if IS_POSIX:
        assert sum(512 * path.stat().st_blocks for path in place_of(store, pack.manifest).iterdir()) <= 1.02 * n_bytes


def test_the_model_unused_for_longest_makes_way(store: Store) -> None:
    models = [fill(store, seed) for seed in (1, 2, 3)]
    for age, manifest in enumerate(reversed(models)):
        os.utime(place_of(store, manifest) / "use", ns=(10**9 * (9 - age), 10**9 * (9 - age)))
    with store.open(models[0]):
        pass
    assert store.digests() == (models[0].digest, models[2].digest, models[1].digest)
    store.limit_bytes = store.n_bytes + 10
    newest = fill(store, 4)
    assert set(store.digests()) == {newest.digest, models[0].digest, models[2].digest}
    assert store.n_bytes <= store.limit_bytes


def test_a_model_that_is_open_stays_whoever_has_it_open(store: Store, tmp_path: Path) -> None:
    first, second = fill(store, 1), fill(store, 2)
    store.limit_bytes = store.n_bytes + 100
    with contextlib.closing(Store(tmp_path / "store", PLENTY)) as other, other.open(first), store.open(second):
        with pytest.raises(SettingError, match="raise its limit"):
            fill(store, 0)
        assert {first.digest, second.digest} <= set(store.digests())
    fill(store, 0)
    assert set(store.digests()) == {MANIFEST.digest, second.digest} or set(store.digests()) == {MANIFEST.digest, first.digest}


def test_a_store_that_is_full_says_so_and_loses_nothing(store: Store) -> None:
    with store.open(MANIFEST) as pack:
        store.limit_bytes = store.n_bytes + sum(map(len, TILES[:5])) + 5 * RECORD_BYTES
        for tile_id in range(5):
            pack.add(tile_id, TILES[tile_id])
        assert store.n_bytes == store.limit_bytes
        with pytest.raises(SettingError, match=f"it may hold {store.limit_bytes}"):
            pack.add(5, TILES[5])
        with pytest.raises(SettingError, match="it may hold"):
            pack.make_room(range(N_TILES))
        pack.make_room(range(5))
        assert held(pack) == set(range(5))
        store.limit_bytes = PLENTY
        pack.make_room(range(N_TILES))
        pack.add(5, TILES[5])
    with store.open(MANIFEST) as pack:
        assert held(pack) == set(range(6))


def test_more_than_the_disk_has_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "store", 1 << 62)) as store, pytest.raises(NodeError, match=rf"{1 << 61} bytes .* but \d+ are free"):
        store.require(1 << 61)


@pytest.mark.skipif(not IS_POSIX, reason="only POSIX can limit a process's files")
@pytest.mark.parametrize("name", ["pack", "index"])
def test_a_disk_that_is_full_is_named_and_nothing_is_lost(store: Store, name: str) -> None:
    import resource

    with store.open(MANIFEST) as pack:
        for tile_id in range(3):
            pack.add(tile_id, TILES[tile_id])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        path = place_of(store) / name
        # For the index a limit alone will not do, since the pack is always longer: it is put behind a name that has no room at all.
        with restricted(path, resource.RLIMIT_FSIZE) if name == "pack" else full_device(pack):
            with pytest.raises(NodeError, match=rf"no room for {len(TILES[3]) + RECORD_BYTES} more bytes .* \d+ are free"):
                pack.add(3, TILES[3])
            assert held(pack) == {0, 1, 2}
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
        assert store.n_bytes == sum(path.stat().st_size for path in place_of(store).iterdir())
        pack.add(3, TILES[3])
        assert held(pack) == {0, 1, 2, 3}
    with store.open(MANIFEST) as pack:
        assert held(pack) == {0, 1, 2, 3}
        assert pack.verify() == ()


@contextlib.contextmanager
def restricted(path: Path, kind: int) -> Iterator[None]:
    """No file may grow to more than a part of a tile beyond what this one has."""
    import resource

    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (path.stat().st_size + 100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def full_device(pack: Pack) -> Iterator[None]:
    """The index is on a device that has no room."""
    index = pack._index._file.fileno()
    kept = os.dup(index)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, index)
    try:
        yield
    finally:
        os.dup2(kept, index)
        os.close(kept)
        os.close(full)


def test_the_disk_is_made_to_write_now_and_then(store: Store) -> None:
    tiles = tiles_of(3, SYNC_BYTES // (512 << 10) + 2, columns=4096)
    with store.open(manifest_of(tiles)) as pack:
        for tile_id, tile in enumerate(tiles):
            pack.add(tile_id, tile)
        path = place_of(store, pack.manifest)
        synced = (path / "index").read_bytes()[HEAD_BYTES : HEAD_BYTES + 8]
        assert SYNC_BYTES <= int.from_bytes(synced, "little") < (path / "pack").stat().st_size


def test_files_are_for_their_owner_alone(store: Store) -> None:
    fill(store, 0)
    if IS_POSIX:
        modes = {path.name: path.stat().st_mode & 0o777 for path in (store.directory, *store.directory.iterdir(), *place_of(store).iterdir())}
        assert set(modes.values()) == {0o600, 0o700}
        assert {name for name, mode in modes.items() if mode == 0o700} == {"store", MANIFEST.digest.hex()}


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a directory should be")
    with pytest.raises(SettingError, match="cannot keep weights in"):
        Store(tmp_path / "store", PLENTY)


def test_what_was_half_removed_is_no_model_and_goes_first(store: Store) -> None:
    whole, half = fill(store, 1), fill(store, 2)
    (place_of(store, half) / "manifest").unlink()
    (place_of(store, half) / "use").unlink()
    assert store.digests() == (whole.digest,)
    store.limit_bytes = store.n_bytes + 2000
    fill(store, 0)
    assert not place_of(store, half).exists()
    assert set(store.digests()) == {whole.digest, MANIFEST.digest}


def test_a_lock_is_shared_or_owned(tmp_path: Path) -> None:
    locks = [FileLock(tmp_path / "lock") for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.callback(lock.close)
        first, second, third = locks
        assert first.share()
        assert second.share()
        assert not third.own()
        second.release()
        assert first.own()
        assert not second.share()
        assert first.share(), "an owner becomes a sharer"
        assert second.share()
        first.close()
        second.close()
        assert third.own()


def test_a_lock_that_is_not_let_go_is_an_error(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yoke.weights.store.LOCK_S", 0.0)
    with contextlib.closing(Store(tmp_path / "store", PLENTY)) as other, other.held(), pytest.raises(NodeError, match="another process has held"):
        store.digests()
