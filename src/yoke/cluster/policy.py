"""The figures that decide, and what follows from them: how often to ask, when a machine counts as dead, and whether a change is worth its price."""

from dataclasses import dataclass, fields

from yoke.core.errors import UserError

MAX_PINGS_PER_S = 256
"""All members together: what a home router and one Python process carry without anybody noticing."""

DEAD_PERIODS = 6
"""So many pings in a row must go unanswered before a machine counts as dead, however large the cluster is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a cluster is kept. A name's ending is its unit; ``gain`` and ``drift`` are shares of 1, ``replicas`` is copies of each place.

    ping_s : how often each member is asked for a sign of life; with many members less often, see `period_s`.
    suspect_s, dead_s : silence after which a member is suspected, and dropped; with many members longer, see `dead_after_s`.
    patience_s : how long streams wait for a machine when what is left cannot hold the model.
    gain, horizon_s : a voluntary change must make a token cheaper by at least ``gain``, and save more in ``horizon_s`` than loading takes.
    drift, drift_s : a measured speed that is off by ``drift`` for ``drift_s`` is worth another plan.
    replicas : copies of every place that spares hold ready.
    settle_s : newcomers within this time share one planning.
    load_s : a load that has not ended by then is a failure of those who have not reported.
    retry_s : a node whose load failed is left out of plans for so long; twice as long each further time.
    young_s : a plan that has served for less has not shown yet that its nodes can hold it.

    Raises
    ------
    UserError
        if a value is negative, or silence would be suspected later than it is death.
    """

    ping_s: float = 0.25
    suspect_s: float = 1.0
    dead_s: float = 2.5
    patience_s: float = 60.0
    gain: float = 0.05
    horizon_s: float = 60.0
    drift: float = 0.25
    drift_s: float = 5.0
    replicas: int = 0
    settle_s: float = 0.5
    load_s: float = 600.0
    retry_s: float = 10.0
    young_s: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise UserError(f"the cluster's {field.name} is {getattr(self, field.name)}; expected at least 0")
        if not (0 < self.ping_s < self.suspect_s <= self.dead_s and min(self.retry_s, self.drift) > 0):
            raise UserError(
                f"the cluster's ping_s {self.ping_s}, suspect_s {self.suspect_s}, dead_s {self.dead_s}, retry_s {self.retry_s} and drift {self.drift} "
                "do not agree; expected 0 < ping_s < suspect_s <= dead_s, and retry_s and drift above 0"
            )

    def period_s(self, n_members: int) -> float:
        """Seconds between two pings of one member, so that all together stay within `MAX_PINGS_PER_S`."""
        return max(self.ping_s, n_members / MAX_PINGS_PER_S)

    def dead_after_s(self, n_members: int) -> float:
        """Seconds of silence after which a member is dead: at least `DEAD_PERIODS` pings."""
        return max(self.dead_s, DEAD_PERIODS * self.period_s(n_members))

    def suspect_after_s(self, n_members: int) -> float:
        """Seconds of silence after which a member is suspected; the same part of `dead_after_s` in every cluster."""
        return self.dead_after_s(n_members) * self.suspect_s / self.dead_s

    def weigh(self, now_s: float, then_s: float, moving_s: float) -> "Weighing":
        """Hold a plan's gain against its cost: seconds per token as it is and as it would be, and seconds of loading."""
        share = 1 - then_s / now_s if now_s > 0 else 0.0
        saved_s = share * self.horizon_s
        text = f"a token would take {1e3 * then_s:.1f} ms instead of {1e3 * now_s:.1f} ms"
        if share > 0:
            text += f" ({share:.0%} less, wanted {self.gain:.0%}), which saves {saved_s:.1f} s in {self.horizon_s:g} s and costs {moving_s:.1f} s of loading"
        return Weighing(is_worth_it=share >= self.gain and saved_s > moving_s, text=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """Whether a change is worth its price, and the figures in words."""

    is_worth_it: bool
    text: str
