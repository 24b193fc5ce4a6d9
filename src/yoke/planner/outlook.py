"""A plan and all that is predicted and said of it. Values only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.planner.cost import StageTime
from yoke.planner.wish import Goal


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan that was not chosen: its stages' nodes, and its predicted seconds for a token of one stream and of all streams together."""

    stages: tuple[tuple[NodeId, ...], ...]
    seconds_per_token: float
    seconds_per_token_together: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A plan and what is predicted of it.

    Attributes
    ----------
    seconds_per_token : for one stream; seconds_per_token_together : for ``streams`` at once.
    first_token_s : from a prompt of ``prompt_tokens`` to its first token.
    bytes_per_node : memory that each node of the plan needs.
    why : a sentence for each node of the plan; left_out : one for each other node.
    stages : where the time of one token goes; own_s : the rest of it, which is the engine, drawing and the way back.
    best_s : the least seconds found by ``goal``; the plan may take 2 % more, to move less or to need fewer nodes.
    runners_up : the best plans with other stages, the best first.
    moved_bytes : weights that each node has to load, compared with the plan to keep; moving_s : how long that is predicted to take.
    """

    plan: Plan
    seconds_per_token: float
    bytes_per_node: Mapping[NodeId, int]
    why: Mapping[NodeId, str]
    left_out: Mapping[NodeId, str]
    seconds_per_token_together: float
    first_token_s: float
    stages: tuple[StageTime, ...]
    own_s: float
    best_s: float
    goal: Goal = Goal.LATENCY
    streams: int = 1
    prompt_tokens: int = 1
    runners_up: tuple[Alternative, ...] = ()
    moved_bytes: Mapping[NodeId, int] = field(default_factory=dict)
    moving_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Predicted decoding speed of one stream."""
        return _per_s(self.seconds_per_token)

    @property
    def tokens_per_s_together(self) -> float:
        """Predicted decoding speed of all streams together."""
        return _per_s(self.seconds_per_token_together)


def _per_s(seconds: float) -> float:
    return 1.0 / seconds if seconds > 0 else math.inf
