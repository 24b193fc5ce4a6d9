"""Small random models against transformers, through the converter: the same tokens give the same logits, whole and token by token."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoke.backends.ggml.backend import GgmlBackend
from yoke.backends.ops import Backend
from yoke.backends.reference import ReferenceBackend
from yoke.core.frame import Batch, Output
from yoke.core.request import Sampling
from yoke.testing.inprocess import grid, open_split, read_spec, text_batch
from yoke.testing.models import tiny_vocabulary
from yoke.weights.convert import convert

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

N_TOKENS, N_BLOCKS, LENGTH, WINDOW = 400, 3, 48, 16
TOLERANCE = 1e-3  # standard deviations of the logits; measured 2026-11: at most 1e-5
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
    "mistral, window": ("MistralConfig", {"sliding_window": WINDOW}),
    "mistral, no window": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 4}),
}
BACKENDS: dict[str, type[Any]] = {"ggml": GgmlBackend, "reference": ReferenceBackend}
TOKENS = tuple(int(token) for token in np.random.default_rng(11).integers(2, N_TOKENS, LENGTH))


def write_model(directory: Path, config_class: str, changes: dict[str, Any]) -> Any:
    """A random float32 model, saved with a tokenizer as transformers does it."""
    options = {
        "vocab_size": N_TOKENS, "hidden_size": 64, "num_hidden_layers": N_BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, config_class)(**{**options, **changes})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases start as ones and zeros, which would hide a mix-up.
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(directory)
    vocabulary = tiny_vocabulary(N_TOKENS)
    content = {
        "added_tokens": [{"id": i, "content": vocabulary.tokens[i], "special": True} for i in (0, 1)],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary.tokens)}, "merges": list(vocabulary.merges)},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return model


@pytest.fixture(params=CASES, scope="module")
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, np.ndarray]]:
    """The GGUF file, and the logits [tokens, vocabulary] that transformers computes."""
    directory = tmp_path_factory.mktemp("huggingface")
    model = write_model(directory, *CASES[request.param])
    target = directory / "model.gguf"
    convert(directory, target, "F32", lambda _what, _share: None)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    yield target, logits
    gc.collect()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = BACKENDS[request.param]()
    return made


def in_steps(first: int) -> list[Batch]:
    """The text as a prompt of ``first`` tokens and then one token a step, in cells that run backwards."""
    spans = [(0, first), *((i, i + 1) for i in range(first, LENGTH))]
    return [
        Batch(
            tokens=TOKENS[start:stop],
            slots=(2,) * (stop - start),
            positions=tuple(range(start, stop)),
            cells=tuple(range(127 - start, 127 - stop, -1)),
            outputs=tuple(Output(row=row, sampling=Sampling()) for row in range(stop - start)),
        )
        for start, stop in spans
    ]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    difference = float(np.abs(found - expected).max() / expected.std())
    print(f"largest difference {difference:.2e} standard deviations")
    assert found.shape == expected.shape
    assert difference <= TOLERANCE


def test_logits_are_those_of_transformers(converted: tuple[Path, np.ndarray], backend: Backend) -> None:
    path, expected = converted
    with open_split(path, grid(read_spec(path), 1, 1), backend, n_cells=128) as model:
        assert_close(model.logits(text_batch(TOKENS)), expected)


def test_token_by_token_gives_the_same_logits(converted: tuple[Path, np.ndarray], backend: Backend) -> None:
    path, expected = converted
    with open_split(path, grid(read_spec(path), 1, 1), backend, n_cells=128) as model:
        assert_close(np.concatenate([model.logits(batch) for batch in in_steps(20)]), expected)


def test_split_over_stages_and_ranks_gives_the_same_logits(converted: tuple[Path, np.ndarray]) -> None:
    path, expected = converted
    with open_split(path, grid(read_spec(path), 2, 3, (2, 1, 2)), GgmlBackend(threads=1), n_cells=128) as model:
        assert_close(np.concatenate([model.logits(batch) for batch in in_steps(20)]), expected)


def test_the_window_is_smaller_than_the_text_and_matters(tmp_path: Path) -> None:
    with torch.no_grad():
        found = {}
        for window in (WINDOW, None):
            directory = tmp_path / str(window)
            directory.mkdir()
            found[window] = write_model(directory, "MistralConfig", {"sliding_window": window})(torch.tensor([TOKENS])).logits[0].numpy()
    difference = np.abs(found[WINDOW] - found[None]).max(axis=1)
    assert difference[:WINDOW].max() < 1e-3
    assert difference[WINDOW:].max() > 0.1
