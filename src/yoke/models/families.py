"""From a GGUF's metadata to a :class:`ModelSpec`. A family is a row of data; the decoder's text reads only the spec."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from yoke.core.errors import ModelError
from yoke.core.spec import ModelSpec, Rope, RopeStyle
from yoke.core.tensor import TensorInfo

NumberT = TypeVar("NumberT", int, float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What one ``general.architecture`` adds to the plain decoder. ``names`` are the models that people know it by."""

    names: str
    rope_style: RopeStyle
    has_qkv_bias: bool = False
    has_qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(names="Llama 2 and 3, Mistral, SmolLM", rope_style=RopeStyle.INTERLEAVED),
    "qwen2": Family(names="Qwen 2 and 2.5", rope_style=RopeStyle.HALVES, has_qkv_bias=True),
    "qwen3": Family(names="Qwen 3 dense", rope_style=RopeStyle.HALVES, has_qk_norm=True),
}


def model_spec(name: str, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Everything about a model that planning, loading and running need.

    Raises
    ------
    ModelError
        if the architecture is unknown, a needed entry is missing or of the wrong kind, or a tensor is missing or has an unexpected shape.
    """
    keys = _Keys(name, metadata)
    architecture = keys.text("general.architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        known = "; ".join(f"{key} ({entry.names})" for key, entry in FAMILIES.items())
        raise ModelError(f"{name}: architecture {architecture!r} is not supported; known are {known}")
    keys.prefix = architecture
    n_experts = keys.number("expert_count", int, 0)
    if n_experts:
        raise ModelError(f"{name}: a mixture of {n_experts} experts is not supported yet; expected a dense model")
    width, n_heads = keys.number("embedding_length", int), keys.number("attention.head_count", int)
    head_dim = keys.number("attention.key_length", int, width // max(1, n_heads))
    if keys.number("attention.value_length", int, head_dim) != head_dim:
        raise ModelError(f"{name}: keys and values have different sizes; expected both to be {head_dim}")
    n_blocks = keys.number("block_count", int)
    if n_blocks > len(tensors):  # before anything is made for each block: the number is the file's
        raise ModelError(f"{name}: {n_blocks} blocks are announced, but there are {len(tensors)} tensors; the file is incomplete or broken")
    spec = ModelSpec(
        name=name,
        architecture=architecture,
        n_blocks=n_blocks,
        width=width,
        n_heads=n_heads,
        n_kv_heads=keys.number("attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        columns=keys.number("feed_forward_length", int),
        vocabulary=_shape(name, tensors, "token_embd.weight")[0],
        context=keys.number("context_length", int),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon", float),
        rope=_rope(keys, family, head_dim, "rope_freqs.weight" in tensors),
        window=keys.number("attention.sliding_window", int, 0) or None,
        has_qkv_bias=family.has_qkv_bias,
        has_qk_norm=family.has_qk_norm,
        tied="output.weight" not in tensors,
        head_block=_largest_block(tensors, "attn_output.weight"),
        column_block=_largest_block(tensors, "ffn_down.weight"),
        embedding_bytes=tensors["token_embd.weight"].n_bytes,
        head_bytes=tensors.get("output.weight", tensors["token_embd.weight"]).n_bytes,
        attention_bytes=_sublayer_bytes(tensors, n_blocks, "attn_"),
        feed_forward_bytes=_sublayer_bytes(tensors, n_blocks, "ffn_"),
        weight_type=_commonest_type(tensors),
    )
    check_tensors(spec, tensors)
    return spec


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape (rows first) of every tensor that a model must have."""
    attended, cached = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (spec.vocabulary, spec.width), "output_norm.weight": (spec.width,)}
    if not spec.tied:
        expected["output.weight"] = (spec.vocabulary, spec.width)
    if spec.rope.has_factors:
        expected["rope_freqs.weight"] = (spec.rope.dims // 2,)
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (spec.width,),
        "attn_q.weight": (attended, spec.width),
        "attn_k.weight": (cached, spec.width),
        "attn_v.weight": (cached, spec.width),
        "attn_output.weight": (spec.width, attended),
        "ffn_norm.weight": (spec.width,),
        "ffn_gate.weight": (spec.columns, spec.width),
        "ffn_up.weight": (spec.columns, spec.width),
        "ffn_down.weight": (spec.width, spec.columns),
    }
    if spec.has_qkv_bias:
        block |= {"attn_q.bias": (attended,), "attn_k.bias": (cached,), "attn_v.bias": (cached,)}
    if spec.has_qk_norm:
        block |= {"attn_q_norm.weight": (spec.head_dim,), "attn_k_norm.weight": (spec.head_dim,)}
    return expected | {f"blk.{index}.{name}": shape for index in range(spec.n_blocks) for name, shape in block.items()}


def check_tensors(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
    """Hold a file's tensors to the spec.

    Raises
    ------
    ModelError
        naming the first tensor that is missing, has another shape, or would change the model's meaning and is not understood.
    """
    expected = expected_tensors(spec)
    for name, shape in expected.items():
        found = _shape(spec.name, tensors, name)
        if found != shape:
            raise ModelError(f"{spec.name}: tensor {name!r} has shape {found}; expected {shape} from the file's own metadata")
    if foreign := [name for name in tensors if name not in expected]:
        raise ModelError(f"{spec.name}: {len(foreign)} tensors such as {foreign[0]!r} do not belong to architecture {spec.architecture!r} as it is known here")


class _Keys:
    """Typed look-ups in a file's metadata."""

    def __init__(self, name: str, metadata: Mapping[str, object]) -> None:
        self._name, self._metadata, self.prefix = name, metadata, ""

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        if not isinstance(value, str):
            raise ModelError(f"{self._name}: metadata {key!r} is {value!r}; expected a text. Is this a model file?")
        return value

    def number(self, key: str, kind: type[NumberT], default: NumberT | None = None) -> NumberT:
        full = f"{self.prefix}.{key}"
        value = self._metadata.get(full, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
            raise ModelError(f"{self._name}: metadata {full!r} is {value!r}; expected one number")
        return kind(value)

    def get(self, key: str) -> object:
        return self._metadata.get(f"{self.prefix}.{key}")


def _rope(keys: _Keys, family: Family, head_dim: int, has_factors: bool) -> Rope:
    scaling = keys.get("rope.scaling.type")
    if scaling not in (None, "none", "linear"):
        raise ModelError(f"rotary scaling {scaling!r} is not supported; known are none, linear and the factors of Llama 3")
    factor = keys.number("rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0
    return Rope(
        style=family.rope_style,
        dims=keys.number("rope.dimension_count", int, head_dim),
        base=keys.number("rope.freq_base", float, 10_000.0),
        scale=1.0 / factor if factor else 1.0,
        has_factors=has_factors,
    )


def _shape(name: str, tensors: Mapping[str, TensorInfo], tensor: str) -> tuple[int, ...]:
    if tensor not in tensors:
        raise ModelError(f"{name}: tensor {tensor!r} is missing; the file is incomplete or of another architecture")
    return tensors[tensor].shape


def _largest_block(tensors: Mapping[str, TensorInfo], suffix: str) -> int:
    """Types may be mixed in a file; their blocks are 1, 32 or 256, so the largest is a multiple of all."""
    return max((info.type.block for name, info in tensors.items() if name.endswith(suffix)), default=1)


def _sublayer_bytes(tensors: Mapping[str, TensorInfo], n_blocks: int, kind: str) -> tuple[int, ...]:
    sizes = [0] * n_blocks
    for name, info in tensors.items():
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) < n_blocks and parts[2].startswith(kind):
            sizes[int(parts[1])] += info.n_bytes
    return tuple(sizes)


def _commonest_type(tensors: Mapping[str, TensorInfo]) -> str:
    """The type that most of the blocks' bytes have."""
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        if name.startswith("blk."):
            sizes[info.type.name] = sizes.get(info.type.name, 0) + info.n_bytes
    return max(sizes, key=lambda name: sizes[name], default="")
