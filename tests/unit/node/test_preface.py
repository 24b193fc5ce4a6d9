"""What the engine needs where the model's file is not: fetched, checked, kept, and the same as in the file."""

import contextlib
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from yoke.core.errors import ModelError, NodeError, NodeGone
from yoke.core.node import NodeId
from yoke.models.shards import EMBEDDING
from yoke.net.channel import Channel, receive_message
from yoke.net.codec import HELLO_LIMITS
from yoke.net.memory import memory_pair
from yoke.node.fetching import StoreSource, Supplier, fetch, fetch_header
from yoke.node.preface import store_preface
from yoke.node.shelf import FileShelf, Shelf, StoreShelf, serve_pieces
from yoke.testing.models import write_random_model
from yoke.weights.gguf import ArrayInfo, GgufFile
from yoke.weights.gguf_header import without_tensors
from yoke.weights.manifest import Manifest, make_manifest
from yoke.weights.store import Store
from yoke.weights.tokenizer import Tokenizer

HEAD_DIM = 16
NEVER = threading.Event()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    shape = {"n_blocks": 2, "width": 256, "n_heads": 16, "n_kv_heads": 4, "head_dim": HEAD_DIM, "columns": 512, "vocabulary": 900}
    write_random_model(path, architecture="llama", type="q4_0", **shape)  # type: ignore[arg-type]
    with GgufFile.open(path) as file:
        yield file


@pytest.fixture(scope="module")
def manifest(model: GgufFile) -> Manifest:
    return make_manifest(model, HEAD_DIM)


@pytest.fixture(scope="module")
def file_shelf(model: GgufFile, manifest: Manifest) -> FileShelf:
    return FileShelf(model, manifest)


def supplier(name: str, shelf: Shelf) -> Supplier:
    """Somebody who gives from a shelf, over memory channels."""

    def serve(channel: Channel) -> None:
        with contextlib.closing(channel), contextlib.suppress(NodeGone):
            receive_message(channel, HELLO_LIMITS)
            serve_pieces(channel, {shelf.manifest.digest: shelf})

    def connect() -> Channel:
        here, there = memory_pair(NodeId("a" * 64), NodeId("b" * 64))
        threading.Thread(target=serve, args=(there,), daemon=True).start()
        return here

    return Supplier(name=name, open=connect)


@pytest.fixture
def stored(tmp_path: Path, file_shelf: FileShelf, manifest: Manifest) -> Iterator[tuple[Store, StoreSource]]:
    """A store with the whole model's tiles, and slices from there."""
    with contextlib.closing(Store(tmp_path / "store", 1 << 30)) as store, store.open(manifest) as pack:
        fetch(pack, range(manifest.layout.n_tiles), [supplier("hall", file_shelf)], lambda done: None, NEVER)
        yield store, StoreSource(pack)


def test_metadata_and_rows_are_those_of_the_file(stored: tuple[Store, StoreSource], model: GgufFile, file_shelf: FileShelf) -> None:
    (store, source), manifest, suppliers, ids = stored, file_shelf.manifest, [supplier("hall", file_shelf)], [0, 899, 3, 3]
    with contextlib.closing(store_preface(store, manifest, source, suppliers)) as preface:
        assert {key: len(value) if isinstance(value, ArrayInfo) else value for key, value in preface.metadata.items()} == {
            key: len(value) if isinstance(value, ArrayInfo) else value for key, value in model.metadata.items()
        }
        assert preface.stored_rows(EMBEDDING, ids) == model.stored_rows(EMBEDDING, ids)
        with pytest.raises(ModelError):
            preface.stored_rows(EMBEDDING, [900])
        with pytest.raises(ModelError, match="no_such"):
            preface.stored_rows("no_such", [0])
    with Tokenizer.load(preface.path) as here, Tokenizer.load(model.path) as there:
        text = "naïve 漢字 of the ox"
        assert here.encode(text, add_special=True, parse_special=False) == there.encode(text, add_special=True, parse_special=False)


def test_a_vocabulary_is_kept_and_had_again_where_it_is_broken(stored: tuple[Store, StoreSource], file_shelf: FileShelf) -> None:
    (store, source), manifest, suppliers = stored, file_shelf.manifest, [supplier("hall", file_shelf)]
    before = store.n_bytes
    store_preface(store, manifest, source, suppliers).close()
    with contextlib.closing(store_preface(store, manifest, source, [])) as again:  # nobody is asked
        size = again.path.stat().st_size
    assert store.n_bytes == before + size, "it counts"
    again.path.write_bytes(b"GGUF")
    with pytest.raises(NodeError, match="there was nobody to ask"):
        store_preface(store, manifest, source, [])
    store_preface(store, manifest, source, suppliers).close()
    assert again.path.stat().st_size == size


def test_a_header_is_taken_from_nobody_but_who_has_the_right_one(stored: tuple[Store, StoreSource], model: GgufFile, file_shelf: FileShelf) -> None:
    class Liar(FileShelf):
        @property
        def header(self) -> bytes:
            return super().header[:-1] + b"\x07"

    (_, source), manifest = stored, file_shelf.manifest
    liar, lender = supplier("liar", Liar(model, manifest)), supplier("lender", StoreShelf(source._pack))
    with pytest.raises(NodeError, match=r"nobody gave the header of model .*liar: gave a header that is not the model's; lender: does not have this model"):
        fetch_header(manifest, [liar, lender])
    header = fetch_header(manifest, [liar, lender, supplier("hall", file_shelf)])
    assert header == model.header[8:]
    assert struct.unpack_from("<Q", without_tensors(memoryview(header), "m"), 8) == (0,)
