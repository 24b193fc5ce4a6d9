"""Slices on their way from a source into a device."""

from yoke.core.tensor import StoredTensor, TensorInfo, TensorType
from yoke.models.shards import Cut
from yoke.node.loading import stream_weights


def test_slices_are_released_when_the_next_is_asked_for() -> None:
    story: list[str] = []

    class Told:
        def read(self, cut: Cut) -> StoredTensor:
            story.append(f"read {cut.name}")
            return StoredTensor(info=TensorInfo(name=cut.name, type=TensorType.F32, shape=(3, 4)), data=bytes(48))

        def release(self, cut: Cut) -> None:
            story.append(f"release {cut.name}")

    stream = stream_weights(Told(), [Cut(name="a"), Cut(name="b")], lambda done: story.append(f"{done} bytes"))
    assert [tensor.info.name for tensor in stream] == ["a", "b"]
    assert story == ["read a", "release a", "48 bytes", "read b", "release b", "96 bytes"]
