"""One shard at work: frame in, frame or drawn tokens out. It knows neither its neighbours nor where frames come from."""

import time
from dataclasses import dataclass

import numpy as np

from yoke.backends.ops import Executor, Floats
from yoke.core.frame import Drawn, Frame
from yoke.core.plan import Plan
from yoke.net.group import Group
from yoke.run.sampling import draw


@dataclass(slots=True)
class Clocks:
    """Where a worker's time went, in seconds; what `StageTimes` reports. ``late`` messages were of an older plan and dropped.

    ``single_s`` is the computing of the ``single_steps`` that had one token: their mean tells whether this machine has become slower.
    """

    steps: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    wire_s: float = 0.0
    waiting_s: float = 0.0
    late: int = 0
    single_steps: int = 0
    single_s: float = 0.0


class StageRunner:
    """A loaded shard of ``plan``. Every rank of a stage runs the same frames in the same order, or their collectives would not meet."""

    def __init__(self, plan: Plan, stage_index: int, rank: int, executor: Executor, group: Group) -> None:
        stage = plan.stages[stage_index]
        self.stage_index, self.rank = stage_index, rank
        self.clocks = Clocks()
        self.group = group
        self._plan, self._executor = plan, executor
        self._is_last = stage_index == len(plan.stages) - 1
        self._row_lengths = tuple(len(shard.vocabulary) for shard in stage.shards)

    def step(self, frame: Frame) -> Frame | Drawn:
        """Compute one step. In the last stage, only rank 0's answer holds the drawn tokens; elsewhere the ranks' answers are equal."""
        batch = frame.batch
        hidden = np.frombuffer(frame.hidden, dtype="<f4").reshape(len(batch.tokens), -1)
        started, collective = time.perf_counter(), self.group.collective_s
        result = self._executor.compute(hidden, batch)
        tokens = self._draw(frame, result) if self._is_last else ()
        self.clocks.steps += 1
        self.clocks.tokens += len(batch.tokens)
        compute_s = time.perf_counter() - started - (self.group.collective_s - collective)
        self.clocks.compute_s += compute_s
        if len(batch.tokens) == 1:
            self.clocks.single_steps += 1
            self.clocks.single_s += compute_s
        if self._is_last:
            return Drawn(plan_version=frame.plan_version, step=frame.step, tokens=tokens)
        return Frame(plan_version=frame.plan_version, step=frame.step, batch=batch, hidden=result.data.cast("B"))

    def close(self) -> None:
        """Free the device's memory and leave the group."""
        self._executor.close()
        self.group.close()

    def _draw(self, frame: Frame, result: Floats) -> tuple[int, ...]:
        outputs, batch = frame.batch.outputs, frame.batch
        if not outputs:
            return ()
        if self.group.size > 1 and all(output.sampling.temperature == 0.0 for output in outputs):
            return self._likeliest(result, len(outputs))
        logits = self._whole_rows(result, len(outputs))
        if logits is None:
            return ()
        return tuple(draw(row, output.sampling, batch.positions[output.row]) for row, output in zip(logits, outputs, strict=True))

    def _likeliest(self, part: Floats, n_rows: int) -> tuple[int, ...]:
        """Greedy tokens, at rank 0: every rank sends only its best row by row, since whole rows would take longer on the wire than a block's sums."""
        best = np.full((n_rows, 2), -np.inf, dtype=np.float32)  # logit, and row of the vocabulary as its bits
        if self._row_lengths[self.rank]:
            columns = part.argmax(axis=1)
            best[:, 0] = part[np.arange(n_rows), columns]
            best[:, 1] = (columns + sum(self._row_lengths[: self.rank])).astype(np.int32).view(np.float32)
        parts = self.group.gather(best.reshape(-1), (best.size,) * self.group.size)
        if parts is None:
            return ()
        gathered = np.stack([values.reshape(n_rows, 2) for values in parts])
        winners = gathered[:, :, 0].argmax(axis=0)  # of equals the first, as in the whole row
        chosen = np.ascontiguousarray(gathered[winners, np.arange(n_rows), 1])
        return tuple(chosen.view(np.int32).tolist())

    def _whole_rows(self, part: Floats, n_rows: int) -> Floats | None:
        """All of each row's logits [rows, vocabulary], at rank 0: every rank holds a share of the columns."""
        if self.group.size == 1:
            return part
        own = np.ascontiguousarray(part).reshape(-1) if self._row_lengths[self.rank] else np.empty(0, dtype=np.float32)
        parts = self.group.gather(own, tuple(n_rows * length for length in self._row_lengths))
        if parts is None:
            return None
        return np.concatenate([values.reshape(n_rows, -1) for values in parts if values.size], axis=1)
