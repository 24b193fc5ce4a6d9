"""What is wanted, and the one change that is under way."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto

from yoke.cluster.places import Seating
from yoke.core.errors import YokeError
from yoke.core.node import Node, NodeId

MAX_REASONS = 4
"""So many reasons of a planning are said in words; of further ones only their number."""


class Step(StrEnum):
    """How far a change has come. `CALLING` is a plan that broke: every node of it is asked whether it is there before anything else is decided."""

    PLANNING = auto()
    PREPARING = auto()
    LOADING = auto()
    CALLING = auto()


@dataclass(frozen=True, slots=True)
class Blame:
    """Who said that a neighbour is gone, when nobody is known to be.

    ``error`` is that of a load, None if the node was loaded; ``unloaded`` are those who had not reported then; ``is_early`` says that the plan had hardly begun.
    """

    node: NodeId
    why: str
    is_early: bool
    error: YokeError | None = None
    unloaded: frozenset[NodeId] = frozenset()


@dataclass(slots=True)
class Change:
    """A version on its way.

    ``nodes`` are those that the planner was given, ``seating`` is the plan once it is made, ``waiting`` are the nodes whose report is missing, ``deadline_s`` is
    when they must have reported, ``reasons`` is what the change answers.
    """

    version: int
    step: Step
    reasons: tuple[str, ...]
    nodes: Mapping[NodeId, Node]
    seating: Seating | None = None
    waiting: set[NodeId] = field(default_factory=set)
    deadline_s: float = math.inf
    blame: Blame | None = None

    def expects(self, version: int, *steps: Step) -> bool:
        """Whether a report of that version belongs to one of these steps of this change."""
        return self.version == version and self.step in steps

    def involves(self, node: NodeId) -> bool:
        """Whether this change cannot go on without a node."""
        return node in (self.nodes if self.seating is None else self.seating.seats)


class Agenda:
    """Why a plan is wanted, and from when on; the first reason sets the time, so that those that come soon after share one planning."""

    def __init__(self) -> None:
        self._reasons: list[str] = []
        self._n_reasons = 0
        self.due_s: float | None = None

    def want(self, reason: str, due_s: float) -> None:
        """A plan is wanted, at ``due_s`` or earlier."""
        if reason not in self._reasons:
            self._n_reasons += 1
            self._reasons = [*self._reasons, reason][:MAX_REASONS]
        self.due_s = due_s if self.due_s is None else min(due_s, self.due_s)

    def put_back(self, change: Change, due_s: float) -> None:
        """A change was given up; what it should have answered is still to be answered."""
        for reason in change.reasons:
            self.want(reason, due_s)

    def take(self) -> tuple[str, ...]:
        """All reasons; nothing is wanted any more."""
        more = self._n_reasons - len(self._reasons)
        reasons = (*self._reasons, *((f"{more} more",) if more else ()))
        self._reasons, self._n_reasons, self.due_s = [], 0, None
        return reasons
