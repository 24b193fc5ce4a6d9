"""Tiny models with random weights, for tests: GGUF files that Yoke and llama.cpp both load. The same seed gives the same file."""

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NotRequired, Required, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from yoke.core.errors import ModelError
from yoke.core.tensor import TensorType
from yoke.weights.names import FAMILIES, OUTPUT, Family
from yoke.weights.quantize import FILE_TYPES, quantize_file
from yoke.weights.vocabulary import TokenKind, Vocabulary, write_vocabulary

_FAMILIES: Final = {
    "llama": FAMILIES["LlamaForCausalLM"],
    "qwen2": FAMILIES["Qwen2ForCausalLM"],
    "qwen3": FAMILIES["Qwen3ForCausalLM"],
}
# What gguf's own quantisers write, each matrix alike; everything else goes through libllama's mixes.
_PURE: Final = {name: TensorType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
LEAST_VOCABULARY: Final = 300

FloatArray = npt.NDArray[np.float32]


class RandomModelOptions(TypedDict):
    """The keywords of :func:`write_random_model`, which are the fields of :class:`RandomModel`."""

    architecture: Required[str]
    n_blocks: Required[int]
    width: Required[int]
    n_heads: Required[int]
    n_kv_heads: Required[int]
    head_dim: Required[int]
    columns: Required[int]
    vocabulary: Required[int]
    context: NotRequired[int]
    type: NotRequired[str]
    tied: NotRequired[bool]
    seed: NotRequired[int]
    window: NotRequired[int | None]
    rope_base: NotRequired[float]
    rope_factors: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModel:
    """The shape of a random model.

    ``architecture`` is llama, qwen2 or qwen3. ``type`` is f32, f16, bf16, q8_0 or q4_0 for all matrices alike, or a mix of libllama's such as q4_k_m.
    ``rope_factors`` adds random divisors of the rotary frequencies (llama only).
    """

    architecture: str
    n_blocks: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    columns: int
    vocabulary: int
    context: int = 256
    type: str = "f32"
    tied: bool = False
    seed: int = 0
    window: int | None = None
    rope_base: float = 10_000.0
    rope_factors: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in _FAMILIES:
            raise ModelError(f"architecture {self.architecture!r} is unknown; known are {', '.join(_FAMILIES)}")
        if self.type not in _PURE and self.type.upper() not in FILE_TYPES:
            raise ModelError(f"type {self.type!r} is unknown; known are {', '.join(_PURE)} and {', '.join(FILE_TYPES)}")
        if self.vocabulary < LEAST_VOCABULARY:
            raise ModelError(f"a vocabulary of {self.vocabulary}; expected at least {LEAST_VOCABULARY}")
        if self.rope_factors and self.architecture != "llama":
            raise ModelError(f"{self.architecture} has no rotary factors; only llama has")

    @property
    def family(self) -> Family:
        """The tensors that this architecture has."""
        return _FAMILIES[self.architecture]

    def sizes(self) -> dict[str, int]:
        """The letters of the tables in names.py."""
        return {
            "V": self.vocabulary,
            "D": self.width,
            "Q": self.n_heads * self.head_dim,
            "K": self.n_kv_heads * self.head_dim,
            "C": self.head_dim,
            "F": self.columns,
        }


def write_random_model(path: Path, **options: Unpack[RandomModelOptions]) -> None:
    """Write a small GGUF file with random weights that llama.cpp loads as well.

    Matrices are normal with variance 1 / fan-in, norms 1 + 0.1 normal, biases 0.1 normal. The vocabulary is byte-level BPE (see :func:`tiny_vocabulary`).

    Parameters
    ----------
    path : the file; replaced if it is there.
    options : fields of :class:`RandomModel`.

    Raises
    ------
    ModelError
        if the architecture or type is unknown, the vocabulary too small, or the rows do not fit the type's blocks.
    """
    model = RandomModel(**options)
    if model.type in _PURE:
        _write(Path(path), model, _PURE[model.type])
        return
    plain = Path(path).with_name(f".{Path(path).name}.plain")
    try:
        _write(plain, model, TensorType.F32)
        quantize_file(plain, Path(path), model.type.upper(), threads=2)
    finally:
        plain.unlink(missing_ok=True)


def tiny_vocabulary(n_tokens: int) -> Vocabulary:
    """A byte-level BPE vocabulary of exactly ``n_tokens``: 0 begins a text, 1 ends it, then the 256 bytes, then merged letters."""
    letters = _byte_letters()
    tokens = ["<|begin|>", "<|endoftext|>", *letters]
    merges = []
    for left, right in itertools.islice(_letter_pairs(), n_tokens - len(tokens)):
        merges.append(f"{left} {right}")
        tokens.append(left + right)
    kinds = (TokenKind.CONTROL, TokenKind.CONTROL) + (TokenKind.NORMAL,) * (len(tokens) - 2)
    return Vocabulary(model="gpt2", pre="gpt-2", tokens=tuple(tokens), kinds=kinds, merges=tuple(merges), begin=0, end=(1,))


def random_tensors(model: RandomModel) -> Iterator[tuple[str, FloatArray]]:
    """Every tensor of the model by its GGUF name, as float32, rows first, in the file's order."""
    rng, sizes = np.random.default_rng(model.seed), model.sizes()
    if model.rope_factors:
        yield "rope_freqs.weight", rng.uniform(1.0, 8.0, model.head_dim // 2).astype(np.float32)
    for rule in model.family.rules:
        if model.tied and rule.source == OUTPUT:
            continue
        shape = tuple(sizes[letter] for letter in rule.shape)
        for i in range(model.n_blocks if "{i}" in rule.target else 1):
            values = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) > 1:
                values /= np.float32(np.sqrt(shape[-1]))
            elif rule.target.endswith(".bias"):
                values *= np.float32(0.1)
            else:
                values = 1 + np.float32(0.1) * values
            yield rule.target.format(i=i), values


def _write(path: Path, model: RandomModel, matrix_type: TensorType) -> None:
    writer = GGUFWriter(path, model.architecture)
    try:
        writer.add_name(f"random {model.architecture}")
        writer.add_vocab_size(model.vocabulary)
        writer.add_context_length(model.context)
        writer.add_embedding_length(model.width)
        writer.add_block_count(model.n_blocks)
        writer.add_feed_forward_length(model.columns)
        writer.add_head_count(model.n_heads)
        writer.add_head_count_kv(model.n_kv_heads)
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(model.head_dim)
        writer.add_rope_freq_base(model.rope_base)
        writer.add_file_type(FILE_TYPES[matrix_type.name])
        writer.add_quantization_version(2)
        if model.window is not None:
            writer.add_sliding_window(model.window)
        write_vocabulary(writer, tiny_vocabulary(model.vocabulary))
        for name, values in random_tensors(model):
            stored = matrix_type if values.ndim > 1 else TensorType.F32
            stored.row_bytes(values.shape[-1])
            kind = GGMLQuantizationType(stored.value)
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _byte_letters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2's encoder.py): printable ones for themselves, the rest from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _letter_pairs() -> Iterator[tuple[str, str]]:
    """Pairs to merge, each made of what is there already: two letters, then a pair and a letter, then two pairs."""
    letters = string.ascii_lowercase
    pairs = [left + right for left, right in itertools.product(letters, repeat=2)]
    yield from itertools.product(letters, letters)
    yield from itertools.product(pairs, letters)
    yield from itertools.product(pairs, pairs)
