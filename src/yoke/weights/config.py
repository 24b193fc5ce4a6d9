"""A Hugging Face ``config.json`` as the numbers that a GGUF header needs. Knows no tensor and no file but that one.

Source: the configuration classes of transformers; both the old form (``rope_theta``, ``rope_scaling``) and the new (``rope_parameters``) are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from yoke.core.errors import ModelError
from yoke.weights.names import FAMILIES, Family
from yoke.weights.safetensors import read_json

# No dense model comes near; it keeps products of sizes and loops over blocks sane.
_MAX_SIZE: Final = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """The shape of a model as its Hugging Face directory gives it.

    ``rope_factors`` are what Llama 3's scaling divides the frequencies by, float32 [head_dim / 2]; ``rope_scale`` divides positions (linear scaling).
    ``end_tokens`` are the token ids that end a text, from the generation and model configuration, in that order.
    """

    name: str
    family: Family
    n_blocks: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    columns: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope_base: float
    rope_scale: float
    rope_factors: npt.NDArray[np.float32] | None
    window: int | None
    tied: bool | None
    begin_token: int | None
    end_tokens: tuple[int, ...]

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


def read_config(directory: Path) -> SourceConfig:
    """Read ``config.json`` and, if it is there, ``generation_config.json``.

    Raises
    ------
    ModelError
        if the architecture is unknown, an entry is missing or out of bounds, or the model needs something that is not supported: biases in a Llama, layers that
        differ in their window, a rotary scaling other than linear and llama3.
    """
    where = str(directory / "config.json")
    config = read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    family = _family(config, where)
    _refuse(config, where)
    width, n_heads = _size(config, "hidden_size", where), _size(config, "num_attention_heads", where)
    head_dim = _size(config, "head_dim", where) if config.get("head_dim") is not None else width // n_heads
    n_blocks = _size(config, "num_hidden_layers", where)
    rope = _rope(config, where)
    return SourceConfig(
        name=directory.resolve().name,
        family=family,
        n_blocks=n_blocks,
        width=width,
        n_heads=n_heads,
        n_kv_heads=_size(config, "num_key_value_heads", where) if config.get("num_key_value_heads") is not None else n_heads,
        head_dim=head_dim,
        columns=_size(config, "intermediate_size", where),
        vocabulary=_size(config, "vocab_size", where),
        context=_size(config, "max_position_embeddings", where),
        norm_epsilon=_number(config, "rms_norm_eps", where, 1e-6),
        rope_base=_number(rope, "rope_theta", where, 10_000.0),
        rope_scale=_number(rope, "factor", where) if rope["rope_type"] == "linear" else 1.0,
        rope_factors=_llama3_factors(rope, head_dim, where) if rope["rope_type"] == "llama3" else None,
        window=_window(config, family, n_blocks, where),
        tied=config.get("tie_word_embeddings"),
        begin_token=next(iter(_tokens(config.get("bos_token_id"))), None),
        end_tokens=tuple(dict.fromkeys([*_tokens(generation.get("eos_token_id")), *_tokens(config.get("eos_token_id"))])),
    )


def _family(config: Mapping[str, Any], where: str) -> Family:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(f"{where}: architecture is {name!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _refuse(config: Mapping[str, Any], where: str) -> None:
    unsupported = {"attention_bias": (None, False), "mlp_bias": (None, False), "hidden_act": (None, "silu"), "partial_rotary_factor": (None, 1.0)}
    for key, allowed in unsupported.items():
        if config.get(key) not in allowed:
            raise ModelError(f"{where}: {key} is {config[key]!r}; only {allowed[1]!r} is supported")
    if config.get("quantization_config") is not None:
        raise ModelError(f"{where}: the weights are quantised already; take the model's unquantised weights")


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_SIZE:
        raise ModelError(f"{where}: {key} is {value!r}; expected a whole number from 1 to {_MAX_SIZE}")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ModelError(f"{where}: {key} is {value!r}; expected a positive number")
    return float(value)


def _tokens(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int) and token >= 0]


def _rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings in the new form: ``rope_type``, ``rope_theta`` and what the type needs."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise ModelError(f"{where}: {key} is {value!r}; expected an object")
        rope.update(value or {})
    rope.setdefault("rope_theta", config.get("rope_theta"))
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ModelError(f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelError(f"{where}: rotary scaling is {rope['rope_type']!r}; supported are default, linear and llama3")
    return rope


def _llama3_factors(rope: Mapping[str, Any], head_dim: int, where: str) -> npt.NDArray[np.float32]:
    """What divides each frequency (Llama 3.1's model code, ``apply_scaling``): short waves stay, long ones are stretched, those between are blended."""
    base, factor = _number(rope, "rope_theta", where, 10_000.0), _number(rope, "factor", where)
    low, high = _number(rope, "low_freq_factor", where), _number(rope, "high_freq_factor", where)
    old_context = _number(rope, "original_max_position_embeddings", where)
    if not low < high:
        raise ModelError(f"{where}: low_freq_factor {low} must be below high_freq_factor {high}")
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((old_context / wavelengths - low) / (high - low), 0.0, 1.0)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _window(config: Mapping[str, Any], family: Family, n_blocks: int, where: str) -> int | None:
    """The sliding window of all layers, or None. Layers that differ are refused: a GGUF of these architectures has one window for all."""
    if not family.has_window or config.get("sliding_window") is None or (family.window_flag and not config.get(family.window_flag)):
        return None
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
        total = len(kinds)
    else:
        # Qwen's older form: the first max_window_layers attend to everything.
        full = config.get("max_window_layers", n_blocks) if family.window_flag else 0
        sliding, total = max(0, n_blocks - (full if isinstance(full, int) else 0)), n_blocks
    if sliding not in (0, total):
        raise ModelError(f"{where}: {sliding} of {total} layers have a sliding window; only all or none are supported")
    return _size(config, "sliding_window", where) if sliding else None
