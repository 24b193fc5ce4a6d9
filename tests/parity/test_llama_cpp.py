"""Against llama.cpp itself, on the same files: the trained model writes the same text, and random models have the same logits.

llama.cpp runs with one thread and the cache type that Yoke runs with. Over a float16 cache it uses flash attention, as Yoke does: then both call the same kernels,
and measured on x86-64 (2026-11) not a bit differs. Over a float32 cache its flash attention would round keys and values to float16, so it goes without.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from yoke.backends.ggml.backend import GgmlBackend
from yoke.core.frame import Batch
from yoke.testing.inprocess import grid, open_split, read_spec, text_batch
from yoke.testing.models import write_random_model
from yoke.weights.convert import convert
from yoke.weights.tokenizer import Tokenizer, libllama

KJV = Path(__file__).parents[2] / "models" / "kjv-9m"
needs_kjv = pytest.mark.skipif(not (KJV / "model.safetensors").is_file(), reason="models/kjv-9m is not there")

N_CELLS, N_WRITTEN = 512, 64
F32_TYPE, F16_TYPE = 0, 1  # ggml.h, enum ggml_type
FLASH_ATTENTION = {"f32": 0, "f16": 1}  # llama.h, LLAMA_FLASH_ATTN_TYPE_DISABLED and _ENABLED
PROMPTS = (
    "In the beginning ", "And the LORD said unto Moses, ", "Blessed are the ", "Now it came to pass in the days of ", "Thou shalt not ", "The words of the ",
    "And Jesus answered and said unto them, ", "Praise ye the LORD. ", "These are the sons of ", "O ", "Wherefore, my beloved brethren, ",
    "And the king of Babylon took the vessels of the house of the LORD, and ",
)  # fmt: skip
# In standard deviations of the logits.
TOLERANCE = {"f32": 1e-3, "f16": 2e-2, "bf16": 2e-2, "q8_0": 2e-2, "q4_0": 2e-2, "q4_k_m": 2e-2}


class LlamaCpp:
    """A model in llama.cpp, one thread, through the low-level API."""

    def __init__(self, path: Path, cache_type: str) -> None:
        self._library = libllama()
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = self._library.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model
        options = self._library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = N_CELLS, N_CELLS, N_CELLS
        options.n_threads, options.n_threads_batch = 1, 1
        options.flash_attn_type = FLASH_ATTENTION[cache_type]
        options.type_k = options.type_v = F16_TYPE if cache_type == "f16" else F32_TYPE
        self._context = self._library.llama_init_from_model(self._model, options)
        assert self._context
        self.n_vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def forget(self) -> None:
        """Empty the cache."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Add tokens to the one sequence; the logits of all of them."""
        library, n = self._library, len(tokens)
        start = library.llama_memory_seq_pos_max(library.llama_get_memory(self._context), 0) + 1
        batch = library.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for row, token in enumerate(tokens):
                batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = token, start + row, 1, 0, 1
            assert library.llama_decode(self._context, batch) == 0
            pointer = ctypes.cast(library.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
            return np.array(np.ctypeslib.as_array(pointer, (n, self.n_vocabulary)))
        finally:
            library.llama_batch_free(batch)

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The most likely continuation, token by token."""
        self.forget()
        written: list[int] = []
        logits = self.logits(prompt)
        while len(written) < max_tokens:
            written.append(int(np.argmax(logits[-1])))
            logits = self.logits(written[-1:])
        return written


@pytest.fixture(scope="session")
def kjv(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The trained model's file in a given type, converted when it is first asked for."""
    directory = tmp_path_factory.mktemp("kjv")

    def file(type_name: str) -> Path:
        path = directory / f"{type_name}.gguf"
        if not path.exists():
            convert(KJV, path, type_name, lambda _what, _share: None)
        return path

    return file


@pytest.fixture(scope="module")
def ggml() -> GgmlBackend:
    return GgmlBackend(threads=1)


def cache_for(type_name: str) -> Any:
    return "f32" if type_name.upper() == "F32" else "f16"


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    difference = float(np.abs(found - expected).max() / expected.std())
    print(f"largest difference {difference:.2e} standard deviations")
    assert difference <= tolerance


@needs_kjv
@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_trained_model_writes_what_llama_cpp_writes(kjv: Callable[[str], Path], ggml: GgmlBackend, type_name: str) -> None:
    path, cache_type = kjv(type_name), cache_for(type_name)
    with Tokenizer.load(path) as tokenizer:
        prompts = [tokenizer.encode(text, True, False) for text in PROMPTS]
    with LlamaCpp(path, cache_type) as rival:
        expected = [rival.greedy(prompt, N_WRITTEN) for prompt in prompts]
    with open_split(path, grid(read_spec(path), 1, 1), ggml, n_cells=N_CELLS, cache_type=cache_type) as model:
        found = [model.generate([prompt], N_WRITTEN)[0] for prompt in prompts]
    assert found == expected
    assert len({tuple(answer) for answer in found}) == len(PROMPTS)


@needs_kjv
@pytest.mark.parametrize("type_name", ["F32", "Q4_K_M"])
def test_trained_model_reads_a_long_text_as_llama_cpp_does(kjv: Callable[[str], Path], ggml: GgmlBackend, type_name: str) -> None:
    path, cache_type = kjv(type_name), cache_for(type_name)
    with Tokenizer.load(path) as tokenizer:
        tokens = tokenizer.encode((KJV / "heldout.txt").read_text(encoding="utf-8")[:4000], True, False)[:N_CELLS]
    assert len(tokens) == N_CELLS
    with LlamaCpp(path, cache_type) as rival:
        expected = rival.logits(tokens)
    with open_split(path, grid(read_spec(path), 1, 1), ggml, n_cells=N_CELLS, cache_type=cache_type) as model:
        assert_close(model.logits(text_batch(tokens)), expected, TOLERANCE[type_name.lower()])


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "n_heads": 8, "n_kv_heads": 2, "head_dim": 32},
    "llama, tied, rope factors": {"architecture": "llama", "n_heads": 4, "n_kv_heads": 4, "head_dim": 64, "tied": True, "rope_factors": True},
    "qwen2": {"architecture": "qwen2", "n_heads": 4, "n_kv_heads": 1, "head_dim": 64, "rope_base": 1_000_000.0},
    "qwen3": {"architecture": "qwen3", "n_heads": 6, "n_kv_heads": 3, "head_dim": 128, "tied": True},
}


@pytest.mark.parametrize("type_name", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_random_model_has_the_logits_of_llama_cpp(tmp_path: Path, ggml: GgmlBackend, name: str, type_name: str) -> None:
    path, cache_type = tmp_path / "model.gguf", cache_for(type_name)
    write_random_model(path, n_blocks=3, width=256, columns=512, vocabulary=512, type=type_name, seed=4, **MODELS[name])
    tokens = [int(token) for token in np.random.default_rng(8).integers(0, 512, 70)]
    with LlamaCpp(path, cache_type) as rival:
        expected = np.concatenate([rival.logits(tokens[:60]), *(rival.logits([token]) for token in tokens[60:])])
    with open_split(path, grid(read_spec(path), 1, 1), ggml, n_cells=N_CELLS, cache_type=cache_type) as model:
        prompt = text_batch(tokens[:60])
        batches = [prompt, *(Batch(tokens=(tokens[i],), slots=(0,), positions=(i,), cells=(i,), outputs=prompt.outputs[:1]) for i in range(60, 70))]
        found = np.concatenate([model.logits(batch) for batch in batches])
    assert_close(found, expected, TOLERANCE[type_name])
