"""What is asked of a plan: room for tokens, a goal, a layout by hand, and the plan that is there already. Knows no machine's speed."""

import math
from dataclasses import dataclass
from enum import StrEnum

from yoke.core.errors import PlacementError
from yoke.core.node import NodeId
from yoke.core.plan import Plan

MAX_TOKENS = 1 << 24
MAX_STREAMS = 1024

NEAR = 0.02
"""Plans within this of the best are as good: measured speeds differ by more from run to run."""


class Goal(StrEnum):
    """What a plan shall be best at."""

    LATENCY = "latency"
    """The least time for each token of one stream."""
    THROUGHPUT = "throughput"
    """The most tokens a second of many streams together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWish:
    """One stage by hand: its nodes in the order of ranks, their relative shares (default: by speed), and how many blocks it holds (default: by speed).

    Raises
    ------
    PlacementError
        if it has no node, or a number is out of bounds.
    """

    nodes: tuple[NodeId, ...]
    shares: tuple[float, ...] | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise PlacementError("a stage by hand names no node; expected at least one")
        if self.shares is not None:
            check_shares(self.shares, len(self.nodes))
        if self.blocks is not None and self.blocks < 1:
            raise PlacementError(f"a stage by hand holds {self.blocks} blocks; expected at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the plan shall offer: cache for ``n_cells`` tokens of ``cache_element_bytes`` numbers, and ``goal``.

    ``stages``, ``ranks`` and ``shares`` force a grid: ``shares`` are relative ones, one a rank, the same in every stage; 0 gives a rank no work.
    ``layout`` forces named nodes into stages instead. ``use_all`` forbids leaving a node out.
    ``streams`` is how many sessions run at once when the goal is throughput; ``prompt_tokens`` read in steps of ``chunk`` are what the time to the
    first token is predicted for. ``keep`` is the plan that is loaded now: of plans that are nearly as good, the one that moves least is chosen.

    Raises
    ------
    PlacementError
        if a number is out of bounds, or two layouts are forced at once.
    """

    n_cells: int
    cache_element_bytes: int = 2
    stages: int | None = None
    ranks: int | None = None
    shares: tuple[float, ...] | None = None
    version: int = 1
    use_all: bool = False
    goal: Goal = Goal.LATENCY
    streams: int = 8
    prompt_tokens: int = 512
    chunk: int = 256
    layout: tuple[StageWish, ...] | None = None
    keep: Plan | None = None

    def __post_init__(self) -> None:
        if self.n_cells < 1 or any(n is not None and n < 1 for n in (self.stages, self.ranks)):
            raise PlacementError(f"a plan needs at least one cell, stage and rank; wished are {self.n_cells}, {self.stages}, {self.ranks}")
        if not (1 <= self.prompt_tokens <= MAX_TOKENS and 1 <= self.chunk <= MAX_TOKENS and 1 <= self.streams <= MAX_STREAMS):
            raise PlacementError(
                f"{self.streams} streams, prompts of {self.prompt_tokens} tokens in steps of {self.chunk}; expected 1 to {MAX_STREAMS} streams and at least 1 token"
            )
        if self.shares is not None:
            check_shares(self.shares, len(self.shares))
        if self.layout is not None and (self.is_grid or self.use_all or not self.layout):
            raise PlacementError("a layout by hand names its stages, and goes with no --stages, --ranks, --shares; give one or the other")

    @property
    def is_grid(self) -> bool:
        """Whether a grid of stages and ranks is given."""
        return self.stages is not None or self.ranks is not None or self.shares is not None

    @property
    def is_forced(self) -> bool:
        """Whether a layout is given, so that there is nothing to choose."""
        return self.is_grid or self.layout is not None


def check_shares(shares: tuple[float, ...], n_ranks: int) -> None:
    """Refuse shares that are not one a rank, or that give nobody work.

    Raises
    ------
    PlacementError
        saying what was found.
    """
    if len(shares) != n_ranks:
        raise PlacementError(f"{len(shares)} shares are given for {n_ranks} ranks; expected one each")
    if not (shares and min(shares) >= 0 and 0 < sum(shares) < math.inf):
        raise PlacementError(f"shares are {shares}; expected numbers of at least 0, one a rank, not all 0")
