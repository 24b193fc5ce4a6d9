"""Random models: libllama takes every one of them, and the seed decides the bytes."""

from pathlib import Path
from typing import Any

import pytest

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.testing.models import write_random_model
from yoke.weights.gguf import GgufFile
from yoke.weights.tokenizer import libllama, library_error

SHAPE: dict[str, Any] = {
    "n_blocks": 2, "width": 256, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32, "columns": 256, "vocabulary": 300,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
def test_libllama_loads_it(tmp_path: Path, architecture: str, type_name: str) -> None:
    path = tmp_path / "model.gguf"
    write_random_model(path, architecture=architecture, type=type_name, tied=True, rope_factors=architecture == "llama", **SHAPE)
    library = libllama()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert model, library_error()
    library.llama_model_free(model)


def test_options_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random_model(path, architecture="llama", type="q8_0", window=32, rope_base=500.0, context=64, **SHAPE)
    with GgufFile.open(path) as file:
        assert file.metadata["llama.attention.sliding_window"] == 32
        assert file.metadata["llama.rope.freq_base"] == 500.0
        assert file.metadata["llama.context_length"] == 64
        assert file.tensors["output.weight"].type is TensorType.Q8_0
        assert file.tensors["output_norm.weight"].type is TensorType.F32
        assert file.array("tokenizer.ggml.tokens")[:2] == ["<|begin|>", "<|endoftext|>"]


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, architecture="qwen3", seed=seed, **SHAPE)
    contents = [(tmp_path / name).read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "ox"}, "'ox' is unknown; known are llama, qwen2, qwen3"),
        ({"type": "q3_x"}, "'q3_x' is unknown"),
        ({"vocabulary": 299}, "at least 300"),
        ({"architecture": "qwen2", "rope_factors": True}, "no rotary factors"),
        ({"type": "q4_0", "columns": 40}, "whole number of Q4_0 blocks"),
    ],
)
def test_impossible_models_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_random_model(tmp_path / "model.gguf", **{"architecture": "llama", **SHAPE, **changes})
