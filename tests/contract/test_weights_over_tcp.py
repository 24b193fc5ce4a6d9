"""Weights over real connections: through the door of a worker, with TLS, from several nodes at once."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from yoke.core.errors import NodeError
from yoke.net.channel import Channel
from yoke.net.codec import Purpose
from yoke.net.identity import Identity
from yoke.net.tcp import Listener, connect
from yoke.node.allotment import Pace
from yoke.node.fetching import Supplier, fetch, fetch_manifest
from yoke.node.porter import Porter
from yoke.node.shelf import FileShelf, Shelf, StoreShelf, serve_pieces
from yoke.testing.models import write_random_model
from yoke.weights.gguf import GgufFile
from yoke.weights.manifest import Manifest, make_manifest
from yoke.weights.pack import Pack
from yoke.weights.store import Store

NEVER = threading.Event()
PATIENT = Pace(stall_s=1e9, grace_s=1e9, help_s=1e9)


class Home:
    """A node that gives what is on its shelves to the members it knows."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self.identity = Identity.load_or_create(directory)
        self.shelves: dict[bytes, Shelf] = {}
        self.served: list[Channel] = []
        self.listener = Listener("127.0.0.1", 0, self.identity, [])
        stack.callback(self.listener.close)
        stack.callback(lambda: [channel.close() for channel in self.served])
        Porter(self.listener, {Purpose.WEIGHTS: self.serve})

    def serve(self, channel: Channel) -> None:
        self.served.append(channel)
        serve_pieces(channel, self.shelves)

    def supplier(self, name: str, who: "Home", *, is_last_resort: bool = False) -> Supplier:
        members = [self.identity.certificate_der]
        opening = partial(connect, self.listener.address, self.identity.id, who.identity, members, deadline_s=1)
        return Supplier(name=name, open=opening, is_last_resort=is_last_resort)


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[list[Home]]:
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        homes = [Home(tmp_path / name, stack) for name in ("coordinator", "attic", "cellar")]
        for home in homes:
            home.listener.set_members([other.identity.certificate_der for other in homes if other is not home])
        yield homes
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    write_random_model(path, architecture="llama", n_blocks=4, width=256, n_heads=8, n_kv_heads=4, head_dim=32, columns=1024, vocabulary=2000)
    with GgufFile.open(path) as file:
        yield file


@pytest.fixture(scope="module")
def manifest(model: GgufFile) -> Manifest:
    return make_manifest(model, 32)


@pytest.fixture
def packs(tmp_path: Path, manifest: Manifest) -> Iterator[tuple[Pack, Pack]]:
    with (
        contextlib.closing(Store(tmp_path / "one", 1 << 40)) as one,
        contextlib.closing(Store(tmp_path / "other", 1 << 40)) as other,
        one.open(manifest) as attic,
        other.open(manifest) as cellar,
    ):
        yield attic, cellar


def test_a_node_fetches_from_another_and_the_rest_from_the_coordinator(
    homes: list[Home], model: GgufFile, manifest: Manifest, packs: tuple[Pack, Pack]
) -> None:
    coordinator, attic, cellar = homes
    coordinator.shelves[manifest.digest] = FileShelf(model, manifest)
    half, everything = range(manifest.layout.n_tiles // 2), range(manifest.layout.n_tiles)
    last = coordinator.supplier("coordinator", attic, is_last_resort=True)
    assert fetch_manifest(manifest.digest, [last]) == manifest
    fetch(packs[0], half, [last], lambda done: None, NEVER, PATIENT)
    attic.shelves[manifest.digest] = StoreShelf(packs[0])

    suppliers = [coordinator.supplier("coordinator", cellar, is_last_resort=True), attic.supplier("attic", cellar)]
    fetched = fetch(packs[1], everything, suppliers, lambda done: None, NEVER, PATIENT)
    assert fetched.by_supplier == {"attic": packs[0].n_bytes, "coordinator": manifest.layout.n_bytes - packs[0].n_bytes}
    assert not fetched.faults
    assert packs[1].verify() == ()


def test_a_node_that_dies_while_it_gives_is_replaced(homes: list[Home], model: GgufFile, manifest: Manifest, packs: tuple[Pack, Pack]) -> None:
    coordinator, attic, cellar = homes
    everything = range(manifest.layout.n_tiles)

    class Dying(FileShelf):
        def read(self, tile_id: int) -> memoryview | None:
            if tile_id >= manifest.layout.n_tiles // 2:
                attic.listener.set_members([])
                for channel in attic.served:
                    channel.close()
            return super().read(tile_id)

    attic.shelves[manifest.digest] = Dying(model, manifest)
    coordinator.shelves[manifest.digest] = FileShelf(model, manifest)
    suppliers = [coordinator.supplier("coordinator", cellar, is_last_resort=True), attic.supplier("attic", cellar)]
    fetched = fetch(packs[1], everything, suppliers, lambda done: None, NEVER, PATIENT)
    assert list(fetched.faults) == ["attic"]
    assert "cannot reach node" in fetched.faults["attic"]
    assert sum(fetched.by_supplier.values()) == manifest.layout.n_bytes
    assert fetched.by_supplier["attic"] > 0
    assert packs[1].verify() == ()


def test_who_is_no_member_gets_nothing(homes: list[Home], model: GgufFile, manifest: Manifest, packs: tuple[Pack, Pack]) -> None:
    coordinator, attic, _ = homes
    coordinator.shelves[manifest.digest] = FileShelf(model, manifest)
    coordinator.listener.set_members([])
    connecting = partial(
        connect, coordinator.listener.address, coordinator.identity.id, attic.identity, [coordinator.identity.certificate_der], deadline_s=0.05
    )
    with pytest.raises(NodeError, match="coordinator: cannot reach node"):
        fetch(packs[0], range(3), [Supplier(name="coordinator", open=connecting)], lambda done: None, NEVER, PATIENT)
    assert packs[0].n_bytes == 0
