"""Sizes of stored tensors, held to the gguf package's own table."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoke.core.errors import ModelError
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType


@pytest.mark.parametrize("kind", TensorType)
def test_types_are_those_of_gguf(kind: TensorType) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (kind.value, (kind.block, kind.block_bytes)) == (theirs.value, gguf.GGML_QUANT_SIZES[theirs])


@given(st.sampled_from(TensorType), st.integers(1, 40), st.lists(st.integers(1, 9), max_size=3))
def test_bytes_are_whole_blocks_of_every_row(kind: TensorType, n_blocks: int, others: list[int]) -> None:
    info = TensorInfo(name="t", type=kind, shape=(*others, n_blocks * kind.block))
    rows = 1
    for other in others:
        rows *= other
    assert info.n_bytes == rows * n_blocks * kind.block_bytes
    assert StoredTensor(info=info, data=bytes(info.n_bytes)).info is info


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (1, 1, 1, 1, 32)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="expected 1 to 4 positive numbers"):
        TensorInfo(name="t", type=TensorType.F32, shape=shape)


def test_rows_are_whole_blocks() -> None:
    with pytest.raises(ModelError, match="40 elements is not a whole number of Q4_0 blocks of 32"):
        TensorInfo(name="t", type=TensorType.Q4_0, shape=(2, 40))


@pytest.mark.parametrize("n_bytes", [0, 17, 19])
def test_data_must_be_all_there(n_bytes: int) -> None:
    with pytest.raises(ModelError, match=f"takes 18 bytes, but {n_bytes} are there"):
        StoredTensor(info=TensorInfo(name="t", type=TensorType.Q4_0, shape=(32,)), data=bytearray(n_bytes))
