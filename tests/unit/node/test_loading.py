"""Weights from a coordinator, slice by slice, and what happens when it lies."""

import dataclasses
import itertools
import queue
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import NodeGone, RemoteProtocolError
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType
from yoke.models.shards import Cut
from yoke.node.loading import CoordinatorSource, stream_weights
from yoke.node.messages import Fetch, Part

CUT = Cut(name="w", rows=(2, 5))
INFO = TensorInfo(name="w", type=TensorType.F32, shape=(3, 4))
DATA = bytes(range(48))


def read(parts: Sequence[Part | None], cut: Cut = CUT) -> tuple[StoredTensor, list[Fetch]]:
    waiting: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
    for part in parts:
        waiting.put(part)
    asked: list[Fetch] = []
    tensor = CoordinatorSource(asked.append, waiting).read(cut)
    assert waiting.empty()
    return tensor, asked


def part(data: bytes, *, is_last: bool = False, info: TensorInfo = INFO) -> Part:
    return Part(info=info, data=data, is_last=is_last)


@given(edges=st.lists(st.integers(0, 48), max_size=6).map(sorted))
def test_slice_is_the_same_in_however_many_parts_it_comes(edges: list[int]) -> None:
    edges = [0, *edges, 48]
    parts = [part(DATA[a:b], is_last=i == len(edges) - 2) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    tensor, asked = read(parts)
    assert (tensor.info, bytes(tensor.data)) == (INFO, DATA)
    assert asked == [Fetch(name="w", rows=(2, 5))]


@pytest.mark.parametrize("cut", [Cut(name="w"), Cut(name="w", columns=(8, 12)), Cut(name="w", rows=(7, 10))])
def test_any_cut_of_that_size_is_taken(cut: Cut) -> None:
    assert bytes(read([part(DATA, is_last=True)], cut)[0].data) == DATA


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([part(DATA + b"x", is_last=True)], "do not fit together"),
        ([part(DATA), part(b"x", is_last=True)], "do not fit together"),
        ([part(DATA[:40], is_last=True)], "sent 40 of 48 bytes"),
        ([part(b"", is_last=True)], "sent 0 of 48 bytes"),
        ([part(DATA[:8]), part(DATA[8:], is_last=True, info=dataclasses.replace(INFO, shape=(4, 3)))], "do not fit together"),
        ([part(DATA, is_last=True, info=dataclasses.replace(INFO, name="v"))], "offers 'v'"),
        ([part(DATA, is_last=True, info=dataclasses.replace(INFO, shape=(4, 3)))], r"offers 'w' of shape \(4, 3\)"),
        ([part(b"", info=dataclasses.replace(INFO, shape=(3, 2**40)))], "expected at most"),
    ],
)
def test_parts_that_are_not_the_slice_are_the_coordinators_fault(parts: list[Part], told: str) -> None:
    with pytest.raises(RemoteProtocolError, match=told):
        read(parts)


@pytest.mark.parametrize("before", [[], [part(DATA[:8])]])
def test_coordinator_that_goes_in_between_is_gone(before: list[Part]) -> None:
    with pytest.raises(NodeGone, match="gone before 'w' had arrived"):
        read([*before, None])


def test_slices_are_released_when_the_next_is_asked_for() -> None:
    story: list[str] = []

    class Told:
        def read(self, cut: Cut) -> StoredTensor:
            story.append(f"read {cut.name}")
            return StoredTensor(info=dataclasses.replace(INFO, name=cut.name), data=DATA)

        def release(self, cut: Cut) -> None:
            story.append(f"release {cut.name}")

    stream = stream_weights(Told(), [Cut(name="a"), Cut(name="b")], lambda done: story.append(f"{done} bytes"))
    assert [tensor.info.name for tensor in stream] == ["a", "b"]
    assert story == ["read a", "release a", "48 bytes", "read b", "release b", "96 bytes"]
