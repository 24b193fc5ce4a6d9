"""Weights from many sources into the store, and out of it: whatever the sources do, what arrives is the model or a named error."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from yoke.core.errors import AdmissionError, ModelError, NodeError, NodeGone, RemoteProtocolError, SettingError
from yoke.core.node import NodeId
from yoke.models.families import model_spec
from yoke.models.shards import Cut, shard_cuts
from yoke.net.channel import Channel, receive_message
from yoke.net.codec import HELLO_LIMITS, Purpose
from yoke.net.memory import memory_pair
from yoke.node.allotment import Pace
from yoke.node.fetching import Fetched, StoreSource, Supplier, fetch, fetch_manifest, wanted_tiles
from yoke.node.loading import FileSource
from yoke.node.shelf import FileShelf, Shelf, StoreShelf, serve_pieces
from yoke.planner import grid_plan
from yoke.testing.models import write_random_model
from yoke.weights.gguf import GgufFile
from yoke.weights.manifest import Manifest, make_manifest
from yoke.weights.pack import Pack
from yoke.weights.store import Store

HEAD_DIM = 16
QUICK = Pace(stall_s=0.05, grace_s=0.2)
PATIENT = Pace(stall_s=1e9, grace_s=1e9, help_s=1e9)
"""Nobody is relieved because this machine is slow: who brings what is then certain."""

NEVER = threading.Event()


@pytest.fixture(scope="module", params=["q4_0", "q4_k_m"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    shape = {"n_blocks": 3, "width": 256, "n_heads": 16, "n_kv_heads": 4, "head_dim": HEAD_DIM, "columns": 1024, "vocabulary": 900}
    write_random_model(path, architecture="qwen2", type=request.param, **shape)  # type: ignore[arg-type]
    with GgufFile.open(path) as file:
        yield file


@pytest.fixture(scope="module")
def manifest(model: GgufFile) -> Manifest:
    return make_manifest(model, HEAD_DIM)


class Attic:
    """Somebody with tiles: opens memory channels and serves each in a thread. ``meddle`` may change the shelf that a connection sees."""

    def __init__(self, shelf: Shelf, meddle: Callable[[Shelf], Shelf] = lambda shelf: shelf) -> None:
        self._shelves: Mapping[bytes, Shelf] = {shelf.manifest.digest: meddle(shelf)}
        self.n_opened = 0
        self.threads: list[threading.Thread] = []

    def open(self) -> Channel:
        self.n_opened += 1
        here, there = memory_pair(NodeId("a" * 64), NodeId("b" * 64))
        thread = threading.Thread(target=self._serve, args=(there,))
        thread.start()
        self.threads.append(thread)
        return here

    def _serve(self, channel: Channel) -> None:
        with contextlib.closing(channel), contextlib.suppress(NodeGone):
            hello = receive_message(channel, HELLO_LIMITS)
            assert getattr(hello, "purpose", None) is Purpose.WEIGHTS
            serve_pieces(channel, self._shelves)


class Meddled:
    """A shelf with another way of reading, or with another bitmap."""

    def __init__(self, shelf: Shelf, read: Callable[[int], memoryview | None] | None = None, ids: Callable[[int], bool] | None = None) -> None:
        self._shelf, self._read, self._has = shelf, read, ids

    @property
    def manifest(self) -> Manifest:
        return self._shelf.manifest

    def bitmap(self) -> bytes:
        if self._has is None:
            return self._shelf.bitmap()
        n_tiles = self.manifest.layout.n_tiles
        return bytes(sum(1 << bit for bit in range(8) if byte * 8 + bit < n_tiles and self._has(byte * 8 + bit)) for byte in range(-(-n_tiles // 8)))

    def read(self, tile_id: int) -> memoryview | None:
        return self._read(tile_id) if self._read is not None else self._shelf.read(tile_id)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    before = set(threading.enumerate())
    with contextlib.closing(Store(tmp_path / "store", 1 << 40)) as store:
        yield store
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before, "a thread outlives its test"


@pytest.fixture
def pack(store: Store, manifest: Manifest) -> Iterator[Pack]:
    with store.open(manifest) as pack:
        yield pack


@pytest.fixture
def file_shelf(model: GgufFile, manifest: Manifest) -> FileShelf:
    return FileShelf(model, manifest)


def bring(pack: Pack, *suppliers: Supplier, ids: list[int] | None = None, report: Callable[[int], None] = lambda done: None, pace: Pace = PATIENT) -> Fetched:
    wanted = ids if ids is not None else list(range(pack.manifest.layout.n_tiles))
    fetched = fetch(pack, wanted, suppliers, report, NEVER, pace)
    assert pack.missing(wanted) == []
    return fetched


def supplier(name: str, attic: Attic, *, is_last_resort: bool = False) -> Supplier:
    return Supplier(name=name, open=attic.open, is_last_resort=is_last_resort)


def size_of(pack: Pack, ids: list[int] | None = None) -> int:
    return sum(map(pack.size, ids if ids is not None else range(pack.manifest.layout.n_tiles)))


def test_a_second_time_nothing_moves_and_nobody_is_asked(pack: Pack, store: Store, file_shelf: FileShelf) -> None:
    attic, told = Attic(file_shelf), []
    fetched = bring(pack, supplier("attic", attic), report=told.append)
    assert fetched == Fetched(by_supplier={"attic": size_of(pack)}, wasted_bytes=0, faults={})
    assert told == sorted(told)
    assert told[-1] == size_of(pack)
    assert attic.n_opened == 1
    pack.close()
    with store.open(pack.manifest) as again:
        assert bring(again, supplier("attic", attic), report=told.append) == Fetched(by_supplier={}, wasted_bytes=0, faults={})
        assert told[-1] == size_of(again)
    assert attic.n_opened == 1


def test_only_the_tiles_of_a_shard_are_asked_for(pack: Pack, file_shelf: FileShelf) -> None:
    asked: set[int] = set()
    attic = Attic(file_shelf, lambda shelf: Meddled(shelf, lambda tile_id: asked.add(tile_id) or shelf.read(tile_id)))
    ids = list(range(3, 90, 7))
    assert bring(pack, supplier("attic", attic), ids=ids).by_supplier == {"attic": size_of(pack, ids)}
    assert asked == set(ids)
    assert pack.n_bytes == size_of(pack, ids)


def test_many_sources_bring_a_part_each(pack: Pack, file_shelf: FileShelf) -> None:
    """Each has what another lacks, so all must bring something; the one of last resort only what nobody else has."""
    attics = {
        f"attic {rest}": Attic(file_shelf, lambda shelf, rest=rest: Meddled(shelf, ids=lambda tile_id: tile_id % 4 == rest))  # type: ignore[misc]
        for rest in range(3)
    }
    suppliers = [supplier(name, attic) for name, attic in attics.items()]
    fetched = bring(pack, supplier("coordinator", Attic(file_shelf), is_last_resort=True), *suppliers)
    expected = {f"attic {rest}": size_of(pack, list(range(rest, pack.manifest.layout.n_tiles, 4))) for rest in range(3)}
    assert {name: n for name, n in fetched.by_supplier.items() if name != "coordinator"} == expected
    assert fetched.by_supplier["coordinator"] == size_of(pack) - sum(expected.values())
    assert not fetched.faults


def test_from_store_to_store(pack: Pack, file_shelf: FileShelf, manifest: Manifest, tmp_path: Path) -> None:
    bring(pack, supplier("attic", Attic(file_shelf)))
    with contextlib.closing(Store(tmp_path / "other", 1 << 40)) as store, store.open(manifest) as other:
        bring(other, supplier("cellar", Attic(StoreShelf(pack))))
        assert other.verify() == ()


def test_who_sends_something_wrong_is_named_and_not_asked_again(pack: Pack, file_shelf: FileShelf) -> None:
    reads: list[int] = []

    def lie(tile_id: int) -> memoryview:
        reads.append(tile_id)
        data = bytearray(file_shelf.read(tile_id) or b"")
        if tile_id >= 3:
            data[-1] ^= 1
        return memoryview(data)

    liar = Attic(file_shelf, lambda shelf: Meddled(shelf, lie, ids=lambda tile_id: tile_id < 40))
    fetched = bring(pack, supplier("attic", liar), supplier("cellar", Attic(file_shelf), is_last_resort=True))
    assert fetched.faults == {"attic": f"tile 3 is not what the manifest of model {pack.manifest.digest.hex()[:12]} says: its hash is another"}
    assert liar.n_opened == 1
    assert pack.verify() == ()
    assert fetched.by_supplier["attic"] == size_of(pack, [0, 1, 2])


def test_who_goes_in_the_middle_is_replaced_by_the_others(pack: Pack, file_shelf: FileShelf) -> None:
    def die(tile_id: int) -> memoryview | None:
        if tile_id == 5:
            raise NodeGone("the plug was pulled")
        return file_shelf.read(tile_id)

    dying = Attic(file_shelf, lambda shelf: Meddled(shelf, die, ids=lambda tile_id: tile_id < 40))
    fetched = bring(pack, supplier("attic", dying), supplier("cellar", Attic(file_shelf), is_last_resort=True))
    assert "attic" in fetched.faults
    assert dying.n_opened >= 2, "it was tried again, since it had been good for something"
    assert fetched.by_supplier["cellar"] >= size_of(pack) - size_of(pack, list(range(40)))
    assert pack.verify() == ()


def test_a_connection_that_ends_now_and_then_is_opened_again(pack: Pack, file_shelf: FileShelf) -> None:
    reads = 0

    def cut(tile_id: int) -> memoryview | None:
        nonlocal reads
        reads += 1
        if reads % 50 == 0:
            raise NodeGone("cut")
        return file_shelf.read(tile_id)

    attic = Attic(file_shelf, lambda shelf: Meddled(shelf, cut))
    assert not bring(pack, supplier("attic", attic)).faults
    assert attic.n_opened > 1


def test_a_source_that_hangs_holds_nothing_up(pack: Pack, file_shelf: FileShelf) -> None:
    go_on = threading.Event()

    def hang(tile_id: int) -> memoryview | None:
        if tile_id % 2:
            go_on.wait(20)
        return file_shelf.read(tile_id)

    hanging = Attic(file_shelf, lambda shelf: Meddled(shelf, hang))
    try:
        fetched = bring(pack, supplier("attic", hanging), supplier("cellar", Attic(file_shelf)), pace=QUICK)
    finally:
        go_on.set()
    assert fetched.by_supplier["cellar"] > 0
    assert sum(fetched.by_supplier.values()) == size_of(pack) + fetched.wasted_bytes


def test_the_last_resort_steps_in_for_one_that_hangs(pack: Pack, file_shelf: FileShelf) -> None:
    go_on = threading.Event()
    hanging = Attic(file_shelf, lambda shelf: Meddled(shelf, lambda tile_id: shelf.read(tile_id) if go_on.wait(20) else None))
    try:
        fetched = bring(pack, supplier("attic", hanging), supplier("coordinator", Attic(file_shelf), is_last_resort=True), pace=QUICK)
    finally:
        go_on.set()
    assert fetched.by_supplier == {"attic": 0, "coordinator": size_of(pack)}


def refuse(error: Exception) -> Callable[[], Channel]:
    def open_channel() -> Channel:
        raise error

    return open_channel


def test_when_nobody_has_the_rest_everybody_is_named_and_what_came_is_kept(pack: Pack, file_shelf: FileShelf, model: GgufFile, tmp_path: Path) -> None:
    other_path = tmp_path / "other.gguf"
    write_random_model(other_path, architecture="llama", n_blocks=1, width=32, n_heads=2, n_kv_heads=2, head_dim=16, columns=32, vocabulary=300)
    with GgufFile.open(other_path) as other_file:
        other = Attic(FileShelf(other_file, make_manifest(other_file, HEAD_DIM)))
        suppliers = (
            supplier("attic", Attic(file_shelf, lambda shelf: Meddled(shelf, ids=lambda tile_id: tile_id < 20))),
            Supplier(name="cellar", open=refuse(NodeGone("cannot reach node c0ffee at cellar port 1 in 5 s"))),
            Supplier(name="kitchen", open=refuse(AdmissionError("an unknown node answers"))),
            supplier("hall", other),
        )
        with pytest.raises(NodeError) as caught:
            bring(pack, *suppliers)
        n_tiles = pack.manifest.layout.n_tiles
        for told in (
            f"{n_tiles - 20} of {n_tiles} tiles",
            f"the first of them of {pack.manifest.layout.tile(20).name}",
            "attic: does not have what is missing",
            "cellar: cannot reach node c0ffee",
            "kitchen: an unknown node answers",
            "hall: does not have this model",
        ):
            assert told in str(caught.value)
        assert pack.missing(range(n_tiles)) == list(range(20, n_tiles))
        assert bring(pack, supplier("attic", Attic(file_shelf))).by_supplier == {"attic": size_of(pack) - size_of(pack, list(range(20)))}


def test_nobody_to_ask_is_an_error_that_says_so(pack: Pack) -> None:
    with pytest.raises(NodeError, match="there was nobody to ask"):
        bring(pack)


def test_fetching_is_stopped_while_a_source_hangs(pack: Pack, file_shelf: FileShelf, wait_until: Callable[..., object]) -> None:
    go_on, stop = threading.Event(), threading.Event()

    def hang(tile_id: int) -> memoryview | None:
        if tile_id == 10:
            wait_until(lambda: not pack.missing(range(10)), "ten tiles are there")
            stop.set()
            go_on.wait(20)
        return file_shelf.read(tile_id)

    hanging = Attic(file_shelf, lambda shelf: Meddled(shelf, hang))
    try:
        with pytest.raises(NodeGone, match="stopped"):
            fetch(pack, range(pack.manifest.layout.n_tiles), [supplier("attic", hanging)], lambda done: None, stop, QUICK)
    finally:
        go_on.set()
    assert pack.missing(range(10)) == []


def test_what_report_raises_ends_the_fetching(pack: Pack, file_shelf: FileShelf) -> None:
    def report(done: int) -> None:
        raise NodeGone(f"stood down after {done} bytes")

    with pytest.raises(NodeGone, match="stood down after"):
        bring(pack, supplier("attic", Attic(file_shelf)), report=report)


def test_a_store_without_room_is_the_error_and_not_the_sources_fault(
    pack: Pack, store: Store, file_shelf: FileShelf, wait_until: Callable[..., object]
) -> None:
    attic = Attic(file_shelf)
    store.limit_bytes = store.n_bytes + 100_000
    with pytest.raises(SettingError, match="raise its limit"):
        bring(pack, supplier("attic", attic))
    assert attic.n_opened == 0, "it is noticed before anything is fetched"
    store.limit_bytes = 1 << 40

    def shrink(tile_id: int) -> memoryview | None:
        if tile_id == 10:
            wait_until(lambda: not pack.missing(range(10)), "ten tiles are there")
            store.limit_bytes = 0  # somebody else fills the store meanwhile
        return file_shelf.read(tile_id)

    with pytest.raises(SettingError, match="raise its limit"):
        bring(pack, supplier("attic", Attic(file_shelf, lambda shelf: Meddled(shelf, shrink))))
    assert pack.missing(range(10)) == []


def test_the_manifest_comes_from_whoever_has_it(manifest: Manifest, file_shelf: FileShelf) -> None:
    forged = dataclasses.replace(manifest, header=bytes(32))

    class Forger(Meddled):
        @property
        def manifest(self) -> Manifest:
            return forged

    forger = Attic(file_shelf)
    forger._shelves = {manifest.digest: Forger(file_shelf)}
    unreachable = Supplier(name="cellar", open=refuse(NodeGone("cannot reach it")))
    with pytest.raises(NodeError, match=f"(?s)manifest of model {manifest.digest.hex()[:12]}: cellar: cannot reach it; attic: the manifest of model"):
        fetch_manifest(manifest.digest, [unreachable, supplier("attic", forger)])
    assert fetch_manifest(manifest.digest, [unreachable, supplier("attic", forger), supplier("coordinator", Attic(file_shelf))]) == manifest
    with pytest.raises(NodeError, match="coordinator: does not have this model"):
        fetch_manifest(bytes(32), [supplier("coordinator", Attic(file_shelf))])


def test_slices_from_the_store_are_those_of_the_file(pack: Pack, model: GgufFile, file_shelf: FileShelf) -> None:
    """For every place of several plans, even and uneven, when the store has the tiles of that place alone."""
    spec = model_spec("m", model.metadata, model.tensors)
    source, from_file = StoreSource(pack), FileSource(model)
    for stages, shares in ((1, (1.0,)), (2, (1.0, 3.0)), (1, (2.0, 1.0, 1.0, 4.0)), (3, (1.0, 1.0, 1.0))):
        nodes = [NodeId(f"{index:064x}") for index in range(stages * len(shares))]
        plan = grid_plan(spec, nodes, stages=stages, ranks=len(shares), shares=shares)
        for stage, rank, _ in plan.places():
            cuts = shard_cuts(plan, stage, rank)
            bring(pack, supplier("attic", Attic(file_shelf)), ids=wanted_tiles(pack.manifest, cuts))
            for cut in cuts:
                ours, theirs = source.read(cut), from_file.read(cut)
                assert (ours.info, bytes(ours.data)) == (theirs.info, bytes(theirs.data)), cut
                source.release(cut)
                assert bytes(source.read(cut).data) == bytes(theirs.data), "released pages come back"


@pytest.mark.parametrize(
    "cut", [Cut(name="blk.1.ffn_down.weight", rows=(3, 77), columns=(256, 768)), Cut(name="token_embd.weight", rows=(31, 65), columns=(0, 256))]
)
def test_slices_off_the_edges_of_tiles_are_those_of_the_file(pack: Pack, model: GgufFile, file_shelf: FileShelf, cut: Cut) -> None:
    ids = wanted_tiles(pack.manifest, [cut])
    bring(pack, supplier("attic", Attic(file_shelf)), ids=ids)
    assert pack.n_bytes == size_of(pack, ids)
    assert bytes(StoreSource(pack).read(cut).data) == bytes(model.read(cut.name, cut.rows, cut.columns).data)


def test_a_slice_that_was_not_fetched_is_an_error(pack: Pack) -> None:
    with pytest.raises(NodeError, match=r"not in this node's store.*fetch it first"):
        StoreSource(pack).read(Cut(name="output_norm.weight"))
    with pytest.raises(ModelError, match="no tensor 'w'"):
        StoreSource(pack).read(Cut(name="w"))


def test_a_server_answers_what_breaks_no_rule_and_ends_on_what_does(file_shelf: FileShelf) -> None:
    n_tiles = file_shelf.manifest.layout.n_tiles
    assert [file_shelf.read(tile_id) for tile_id in (-1, n_tiles, 2**32 - 1)] == [None] * 3
    assert sum(byte.bit_count() for byte in file_shelf.bitmap()) == n_tiles
    here, there = memory_pair(NodeId("a" * 64), NodeId("b" * 64))
    with contextlib.closing(here), contextlib.closing(there):
        here.send(bytes(40))
        with pytest.raises(RemoteProtocolError, match="kind 0"):
            serve_pieces(there, {})


def test_a_manifest_of_another_file_makes_no_shelf(model: GgufFile, manifest: Manifest) -> None:
    with pytest.raises(ModelError, match="is not the file of model"):
        FileShelf(model, dataclasses.replace(manifest, header=bytes(32)))
