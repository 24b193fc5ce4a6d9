"""What crosses a stage boundary: one step's batch with every decision that a shard needs, and the residual stream.

Legend of shapes: T tokens of the batch, D the model's width.
"""

from dataclasses import dataclass

from yoke.core.errors import InvariantError
from yoke.core.request import Sampling

MAX_BATCH_TOKENS = 4096
MAX_SLOTS = 1024
MAX_CELLS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A row of the batch whose next token is wanted, and how to draw it."""

    row: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The tokens of one step. All four tuples have one entry a token.

    ``slots`` name the session, ``positions`` the index in it, ``cells`` where its keys and values go in the cache. ``freed_slots`` lose all their cells before the
    step. A batch without ``outputs`` only fills the cache.
    """

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    cells: tuple[int, ...]
    outputs: tuple[Output, ...] = ()
    freed_slots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if not 0 < n <= MAX_BATCH_TOKENS:
            raise InvariantError(f"a batch of {n} tokens; expected 1 to {MAX_BATCH_TOKENS}")
        if not (len(self.slots) == len(self.positions) == len(self.cells) == n):
            raise InvariantError(f"batch of {n} tokens has {len(self.slots)} slots, {len(self.positions)} positions, {len(self.cells)} cells")
        if min(self.tokens) < 0 or min(self.positions) < 0:
            raise InvariantError("a token id or a position is negative")
        if min(self.slots) < 0 or max(self.slots) >= MAX_SLOTS or any(not 0 <= s < MAX_SLOTS for s in self.freed_slots):
            raise InvariantError(f"a session slot is outside 0..{MAX_SLOTS - 1}")
        if min(self.cells) < 0 or max(self.cells) >= MAX_CELLS or len(set(self.cells)) != n:
            raise InvariantError(f"cache cells must be distinct and within 0..{MAX_CELLS - 1}")
        if any(not 0 <= o.row < n for o in self.outputs):
            raise InvariantError(f"an output row is outside the batch of {n} tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One step on its way to a stage. ``hidden`` is the residual stream [T, D], float32, row by row, little-endian."""

    plan_version: int
    step: int
    batch: Batch
    hidden: bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The last stage's answer to one step: one token for each of the batch's outputs, in their order."""

    plan_version: int
    step: int
    tokens: tuple[int, ...]
