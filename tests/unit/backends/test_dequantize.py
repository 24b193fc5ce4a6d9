"""The embedding look-up: ggml's own conversion against the reference's."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.reference import ReferenceBackend
from yoke.core.tensor import StoredTensor, TensorInfo, TensorType


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0], ids=lambda kind: kind.name)
def test_ggml_and_the_reference_read_the_same_values(kind: TensorType) -> None:
    values = np.random.default_rng(7).standard_normal((3, 128)).astype(np.float32)
    stored = quantize(values, GGMLQuantizationType(kind.value))
    tensor = StoredTensor(info=TensorInfo(name="rows", type=kind, shape=values.shape), data=np.ascontiguousarray(stored).view(np.uint8).reshape(-1).data)
    ours, theirs = GgmlBackend(threads=1).dequantize(tensor), ReferenceBackend().dequantize(tensor)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == values.shape
    assert np.abs(ours - values).max() < 0.5
