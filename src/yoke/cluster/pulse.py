"""Who has been heard lately: whom to ask, whom to suspect, whom to give up. Knows silence, not what a member is for.

All members stand in two queues, by when they were last heard and by when they were last asked, so that only those at the front are looked at. Silence is counted
in the time that this side listened: when nothing at all was handled for `STALL_S` (the process was stopped, the machine slept), the members are not to blame.
"""

import math
from collections import OrderedDict

from yoke.cluster.messages import TICK_S
from yoke.cluster.policy import Policy
from yoke.core.node import NodeId

STALL_S = 5 * TICK_S
"""Ticks come every `TICK_S`. A longer pause than this between two events is this side's own."""


class Pulse:
    """The members' signs of life. Every call takes O(1), but for `silent` and `asks`, which take O(number of those they return, and of suspects)."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heard: OrderedDict[NodeId, float] = OrderedDict()
        self._asked: OrderedDict[NodeId, float] = OrderedDict()
        self._suspects: set[NodeId] = set()
        self._now_s: float | None = None
        self._deaf_s = 0.0
        self._last_round_s = -math.inf

    def listen(self, now: float) -> None:
        """Something is about to be handled: notice if this side has slept."""
        if self._now_s is not None and now - self._now_s > STALL_S:
            self._deaf_s += now - self._now_s - TICK_S
        self._now_s = now

    def add(self, node: NodeId, now: float) -> None:
        """A member is there."""
        self._heard[node] = self._asked[node] = now - self._deaf_s
        self._heard.move_to_end(node)

    def discard(self, node: NodeId) -> None:
        """A member is gone."""
        self._heard.pop(node, None)
        self._asked.pop(node, None)
        self._suspects.discard(node)

    def heard(self, node: NodeId, now: float) -> bool:
        """A member gave a sign of life; the answer is whether it was suspected."""
        self._heard[node] = now - self._deaf_s
        self._heard.move_to_end(node)
        was_suspect = node in self._suspects
        self._suspects.discard(node)
        return was_suspect

    def silent_s(self, node: NodeId, now: float) -> float:
        """Seconds since a member was last heard."""
        return max(0.0, now - self._deaf_s - self._heard[node])

    def is_suspect(self, node: NodeId) -> bool:
        """Whether a member has been silent for longer than usual."""
        return node in self._suspects

    def silent(self, now: float) -> tuple[dict[NodeId, float], dict[NodeId, float]]:
        """The members that are to be given up, and those that are suspected from now on, each with its silence in seconds."""
        n_members = len(self._heard)
        suspect_s, dead_s = self._policy.suspect_after_s(n_members), self._policy.dead_after_s(n_members)
        dead: dict[NodeId, float] = {}
        suspects: dict[NodeId, float] = {}
        for node, at in self._heard.items():
            silent_s = now - self._deaf_s - at
            if silent_s < suspect_s:
                break
            if silent_s >= dead_s:
                dead[node] = silent_s
            elif node not in self._suspects:
                suspects[node] = silent_s
        self._suspects.update(suspects)
        return dead, suspects

    def asks(self, now: float) -> list[NodeId]:
        """The members to ask now: those whose turn it is, never so many at once that a second's pings would come in one tick."""
        period_s, clock = self._policy.period_s(len(self._asked)), now - self._deaf_s
        room = len(self._asked) * min(1.0, (now - self._last_round_s) / period_s)
        self._last_round_s = now
        due: list[NodeId] = []
        for node, at in self._asked.items():
            if clock - at < period_s or len(due) >= room:
                break
            due.append(node)
        for node in due:
            self._asked[node] = clock
            self._asked.move_to_end(node)
        return due
