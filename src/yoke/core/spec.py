"""What a model is: everything about an architecture that planning, loading and running need, and nothing about machines."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from yoke.core.errors import ModelError


class RopeStyle(StrEnum):
    """Which pairs of a head's dims rotary embedding turns: neighbours (0, 1), or halves (0, C/2)."""

    INTERLEAVED = "interleaved"
    HALVES = "halves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864).

    ``dims`` is how many of a head's dims are turned. ``has_factors`` says that the file holds a tensor that divides the frequencies (Llama 3's scaling);
    ``scale`` multiplies positions (linear scaling, 1.0 when there is none).
    """

    style: RopeStyle
    dims: int
    base: float = 10_000.0
    scale: float = 1.0
    has_factors: bool = False

    def __post_init__(self) -> None:
        if self.dims <= 0 or self.dims % 2:
            raise ModelError(f"rotary embedding turns {self.dims} dims; expected a positive even number")
        if not (0 < self.base < math.inf and 0 < self.scale < math.inf):
            raise ModelError(f"rotary base {self.base} and scale {self.scale} must be positive and finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer's shape.

    Counts are ``n_*``; ``width`` is the residual stream's size, ``columns`` the feed-forward's. ``head_block`` and ``column_block`` are the quantisation blocks
    (in elements: 1, 32 or 256) of the attention output and feed-forward output matrices: both are split along columns, so a cut must fall on a block's edge.
    ``embedding_bytes`` and ``head_bytes`` are the sizes of the token embedding and of the output matrix; ``attention_bytes`` and ``feed_forward_bytes`` those of
    each block's sublayers, one entry a block: bytes as stored. ``weight_type`` is the type (``Q4_0``, ...) that most of those bytes have.
    """

    name: str
    architecture: str
    n_blocks: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    columns: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope: Rope
    window: int | None = None
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    tied: bool = False
    n_experts: int = 0
    head_block: int = 1
    column_block: int = 1
    embedding_bytes: int = 0
    head_bytes: int = 0
    attention_bytes: tuple[int, ...] = field(default=())
    feed_forward_bytes: tuple[int, ...] = field(default=())
    weight_type: str = ""

    def __post_init__(self) -> None:
        for name in ("n_blocks", "width", "n_heads", "n_kv_heads", "head_dim", "columns", "vocabulary", "context", "head_block", "column_block"):
            if getattr(self, name) <= 0:
                raise ModelError(f"{self.name}: {name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.norm_epsilon < math.inf:
            raise ModelError(f"{self.name}: norm_epsilon is {self.norm_epsilon}; expected a number of at least 0")
        if self.window is not None and self.window < 1:
            raise ModelError(f"{self.name}: the attention window is {self.window} tokens; expected at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"{self.name}: {self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.rope.dims > self.head_dim:
            raise ModelError(f"{self.name}: rotary embedding turns {self.rope.dims} dims of a head that has {self.head_dim}")
        if (self.n_heads * self.head_dim) % self.head_block or self.columns % self.column_block:
            raise ModelError(f"{self.name}: {self.n_heads} heads of {self.head_dim} and {self.columns} columns are not whole quantisation blocks")
        for sizes in (self.attention_bytes, self.feed_forward_bytes):
            if sizes and len(sizes) != self.n_blocks:
                raise ModelError(f"{self.name}: {len(sizes)} block sizes for {self.n_blocks} blocks")

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    def is_head_cut(self, head: int) -> bool:
        """Whether attention may be cut before query head ``head``: only on the edge of a quantisation block."""
        return (head * self.head_dim) % self.head_block == 0

    def kv_heads_of(self, start: int, stop: int) -> tuple[int, int]:
        """The half-open range of key/value heads that query heads ``start..stop`` attend with."""
        return (start // self.group, -(-stop // self.group)) if stop > start else (0, 0)

    def cache_bytes_per_cell(self, n_kv_heads: int, element_bytes: int = 2) -> int:
        """Bytes that one token takes in one block's cache on a rank that holds ``n_kv_heads``."""
        return 2 * n_kv_heads * self.head_dim * element_bytes
