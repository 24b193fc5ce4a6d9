"""The plan: which node holds which part of a model. A gap, an overlap or a misaligned cut cannot be constructed.

A plan is stages x ranks. Stages cut the blocks; within a stage, ranks cut heads, feed-forward columns, experts and vocabulary, each in shares of their own.
A rank's query heads are either whole key/value groups or a part of one group: then that key/value head is replicated among the ranks that share it. A share may be
empty.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yoke.core.errors import InvariantError
from yoke.core.node import NodeId
from yoke.core.spec import ModelSpec


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A half-open range ``start..stop`` of indices; empty when both are equal."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise InvariantError(f"span {self.start}..{self.stop} runs backwards or below zero")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}..{self.stop - 1}" if self else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank of one stage holds: query ``heads``, feed-forward ``columns``, ``vocabulary`` rows of the output matrix, and ``experts``."""

    node: NodeId
    device: str
    heads: Span
    columns: Span
    vocabulary: Span
    experts: Span = Span(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous range of blocks, and the ranks that compute it together."""

    blocks: Span
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise InvariantError(f"a stage holds no block: {self.blocks}")
        if not self.shards:
            raise InvariantError(f"stage of blocks {self.blocks} has no rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The versioned, immutable assignment of a model to nodes.

    Raises
    ------
    InvariantError
        if a block, head, column, expert or vocabulary row belongs to no rank or to two; if a cut falls inside a quantisation block; if a rank's heads straddle
        key/value groups unevenly; if one node appears twice.
    """

    version: int
    spec: ModelSpec
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if self.version < 1:
            raise InvariantError(f"plan version {self.version}; versions count from 1")
        _check_cover("blocks", [stage.blocks for stage in self.stages], self.spec.n_blocks)
        for index, stage in enumerate(self.stages):
            self._check_stage(index, stage)
        nodes = [shard.node for stage in self.stages for shard in stage.shards]
        if len(set(nodes)) != len(nodes):
            raise InvariantError("a node holds two shards of one plan; a node holds one")

    def _check_stage(self, index: int, stage: Stage) -> None:
        spec, shards, where = self.spec, stage.shards, f"stage {index}: "
        _check_cover(where + "heads", [s.heads for s in shards], spec.n_heads)
        _check_cover(where + "columns", [s.columns for s in shards], spec.columns)
        _check_cover(where + "experts", [s.experts for s in shards], spec.n_experts)
        rows = spec.vocabulary if index == len(self.stages) - 1 else 0
        _check_cover(where + "vocabulary", [s.vocabulary for s in shards], rows)
        for shard in shards:
            heads = shard.heads
            if not (spec.is_head_cut(heads.start) and spec.is_head_cut(heads.stop)):
                raise InvariantError(f"{where}heads {heads} of dim {spec.head_dim} cut a quantisation block of {spec.head_block}")
            if shard.columns.start % spec.column_block or shard.columns.stop % spec.column_block:
                raise InvariantError(f"{where}columns {shard.columns} cut a quantisation block of {spec.column_block}")
            if not is_head_share(spec, heads.start, heads.stop):
                raise InvariantError(f"{where}heads {heads} are neither whole key/value groups of {spec.group} nor a part of one")

    def places(self) -> Iterator[tuple[int, int, Shard]]:
        """Every shard with its stage index and rank, in the order of stages and ranks."""
        for stage_index, stage in enumerate(self.stages):
            for rank, shard in enumerate(stage.shards):
                yield stage_index, rank, shard

    def kv_heads(self, shard: Shard) -> Span:
        """The key/value heads that ``shard`` caches; a head shared with a neighbouring rank is in both."""
        return Span(*self.spec.kv_heads_of(shard.heads.start, shard.heads.stop))

    def shard_bytes(self, stage_index: int, rank: int) -> int:
        """Bytes of weights that one rank loads; sizes of partial tensors are in proportion to the share, norms are rounded in.

        Of attention's four matrices two follow the query heads, and two the key/value heads, of which ranks that share one hold a copy each.
        """
        spec, stage = self.spec, self.stages[stage_index]
        shard = stage.shards[rank]
        blocks = slice(stage.blocks.start, stage.blocks.stop)
        n_held = len(shard.heads) + len(self.kv_heads(shard))
        total = sum(spec.attention_bytes[blocks]) * n_held // (spec.n_heads + spec.n_kv_heads)
        total += sum(spec.feed_forward_bytes[blocks]) * len(shard.columns) // spec.columns
        total += spec.head_bytes * len(shard.vocabulary) // spec.vocabulary
        return total + (spec.embedding_bytes if (stage_index, rank) == (0, 0) else 0)

    def cache_bytes(self, stage_index: int, rank: int, n_cells: int, element_bytes: int = 2) -> int:
        """Bytes of key/value cache for ``n_cells`` tokens on one rank."""
        stage = self.stages[stage_index]
        n_kv_heads = len(self.kv_heads(stage.shards[rank]))
        return len(stage.blocks) * n_cells * self.spec.cache_bytes_per_cell(n_kv_heads, element_bytes)


def is_head_share(spec: ModelSpec, start: int, stop: int) -> bool:
    """Whether one rank may hold query heads ``start..stop``: whole key/value groups, a part of one group, or none."""
    whole = start % spec.group == 0 and stop % spec.group == 0
    return whole or start == stop or start // spec.group == (stop - 1) // spec.group


def _check_cover(what: str, spans: Sequence[Span], total: int) -> None:
    expected = 0
    for span in spans:
        if span.start != expected:
            kind = "gap" if span.start > expected else "overlap"
            raise InvariantError(f"{what}: {kind} at {min(expected, span.start)}: a share is {span.start}..{span.stop}, expected to start at {expected}")
        expected = span.stop
    if expected != total:
        raise InvariantError(f"{what}: shares end at {expected}, expected {total}")


def whole_model(spec: ModelSpec, node: NodeId, device: str, version: int = 1) -> Plan:
    """The plan that puts all of a model on one node."""
    shard = Shard(
        node=node,
        device=device,
        heads=Span(0, spec.n_heads),
        columns=Span(0, spec.columns),
        vocabulary=Span(0, spec.vocabulary),
        experts=Span(0, spec.n_experts),
    )
    return Plan(version=version, spec=spec, stages=(Stage(blocks=Span(0, spec.n_blocks), shards=(shard,)),))
