"""What the engine needs of a model beside its shard: metadata and vocabulary, and rows of the token embedding. From the model's file, or from this node's store."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from yoke.core.errors import ModelError
from yoke.core.tensor import StoredTensor, TensorInfo
from yoke.models.shards import Cut
from yoke.node.fetching import StoreSource, Supplier, fetch_header
from yoke.weights.gguf import GgufFile, MetadataValue
from yoke.weights.gguf_header import without_tensors
from yoke.weights.manifest import Manifest
from yoke.weights.store import Store

VOCABULARY = "vocabulary.gguf"


class Preface(Protocol):
    """The model's file, or what stands in for it."""

    @property
    def path(self) -> Path:
        """A GGUF file with the vocabulary."""

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        """The file's."""

    def stored_rows(self, name: str, ids: Sequence[int]) -> StoredTensor:
        """Rows of a matrix as they are stored."""

    def close(self) -> None:
        """It is not needed any more."""


class StorePreface:
    """A preface where the model's file is not: metadata in a small file without tensors, rows from tiles in the store."""

    def __init__(self, file: GgufFile, source: StoreSource) -> None:
        self._file, self._source = file, source

    @property
    def path(self) -> Path:
        """The small file."""
        return self._file.path

    @property
    def metadata(self) -> Mapping[str, MetadataValue]:
        """The model's."""
        return self._file.metadata

    def stored_rows(self, name: str, ids: Sequence[int]) -> StoredTensor:
        """Rows of a matrix as they are stored, in any order, with repetitions, at least one.

        Raises
        ------
        ModelError
            if there is no such matrix or row.
        NodeError
            if a row is not in the store.
        """
        rows = [self._source.read(Cut(name=name, rows=(row, row + 1))) for row in ids]
        info = TensorInfo(name=name, type=rows[0].info.type, shape=(len(rows), rows[0].info.shape[-1]))
        return StoredTensor(info=info, data=b"".join(bytes(row.data) for row in rows))

    def close(self) -> None:
        """Close the small file."""
        self._file.close()


def store_preface(store: Store, manifest: Manifest, source: StoreSource, suppliers: Sequence[Supplier]) -> StorePreface:
    """The preface of a model whose tiles are in the store; its vocabulary is fetched if it is not there.

    Raises
    ------
    NodeError
        if nobody gave it.
    SettingError
        if the store has no room for it.
    """
    path = store.directory / manifest.digest.hex() / VOCABULARY
    with contextlib.suppress(ModelError):  # not there, or broken on the disk: it can be had again
        return StorePreface(GgufFile.open(path), source)
    data = without_tensors(memoryview(fetch_header(manifest, suppliers)), "the model's header")
    store.keep(path, data)
    return StorePreface(GgufFile.open(path), source)
