"""Rates of the devices that are here, in haste: what is asked for comes back, in possible numbers, and what is impossible is named."""

import numpy as np
import pytest

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ggml.measuring import BURSTS, probe_weights, turns
from yoke.backends.ops import ATTENTION
from yoke.backends.reference import ReferenceBackend
from yoke.core.errors import BackendError
from yoke.core.tensor import TensorType


@pytest.fixture(scope="module")
def backend():
    return GgmlBackend(threads=1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "F16", "F32", ATTENTION])
def test_a_rate_is_of_what_was_asked_for(backend, kind):
    (rate,) = backend.measure("CPU", kind, (1,), 0.0)
    assert (rate.weight_type, rate.threads) == (kind, 1)
    assert 1e7 < rate.matvec_bytes_per_s < 1e13
    assert 1e7 < rate.matmul_flop_per_s < 1e15


@pytest.mark.parametrize("kind", [kind for kind in TensorType if kind is not TensorType.I32], ids=lambda kind: kind.name)
def test_weights_to_measure_with_are_finite_and_differ(backend, kind):
    """Equal weights would stream faster than real ones; infinite ones or none to speak of, at another speed."""
    (matrix,) = [tensor for tensor in probe_weights(1, kind, ("k",)) if tensor.info.type is kind and len(tensor.info.shape) == 2]
    values = np.abs(backend.dequantize(matrix))
    assert np.isfinite(values).all()
    assert len(np.unique(values)) > 100
    assert np.median(values) > 1e-20


def test_numbers_of_threads_take_turns():
    assert list(turns((4, 1, 2), stop=1.0, now=lambda: 0.0)) == [4, 1, 2] * BURSTS


def test_when_time_is_up_only_the_first_number_of_threads_is_measured(backend):
    assert list(turns((4, 1, 2), stop=1.0, now=lambda: 1.0)) == [4]
    clock = iter([0.0, 0.5] + [1.0] * 10)
    assert list(turns((4, 1, 2), stop=1.0, now=lambda: next(clock))) == [4, 1]
    assert [rate.threads for rate in backend.measure("CPU", "Q4_0", (1, 2, 3), 0.0)] == [1]


@pytest.mark.parametrize("asked", [("CPU7", "Q4_0", (1,)), ("CPU", "Q9_9", (1,)), ("CPU", "Q4_0", ()), ("CPU", "Q4_0", (0,))])
def test_what_cannot_be_measured_is_named(backend, asked):
    with pytest.raises(BackendError, match="cannot measure"):
        backend.measure(*asked, 0.0)


def test_chips_are_listed_without_measuring(backend):
    chips = backend.chips()
    assert [chip.name for chip in chips if chip.is_host] == ["CPU"]
    assert all(chip.threads == 1 and chip.free_bytes > 0 for chip in chips)


def test_the_library_says_what_its_code_makes_use_of(backend):
    assert all(feature.isupper() or "_" in feature or feature.isalnum() for feature in backend.features)


def test_the_reference_gives_its_nominal_rate_for_everything():
    reference = ReferenceBackend()
    (chip,) = reference.chips()
    (rate,) = reference.measure(chip.name, "Q4_K", (1,), 0.0)
    assert rate.matvec_bytes_per_s == reference.devices()[0].matvec_bytes_per_s
