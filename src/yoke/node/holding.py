"""What a worker holds: one shard of one model, loaded on its device. It outlives plans: a new plan that wants the same shard finds it loaded."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from yoke.backends.ops import Backend, CacheType, Executor, Floats, Program, ShardShape
from yoke.core.errors import NodeGone
from yoke.core.plan import Span
from yoke.models.decoder import decoder
from yoke.models.shards import shard_cuts
from yoke.net.group import SoloGroup
from yoke.node.loading import Source, stream_weights
from yoke.node.messages import Load
from yoke.node.preface import Preface


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What two plans must agree on for one loaded shard to serve both."""

    model: bytes
    blocks: Span
    heads: Span
    columns: Span
    experts: Span
    vocabulary: Span
    is_shared: bool
    is_last: bool
    n_cells: int
    cache_type: CacheType
    device: str

    @classmethod
    def of(cls, load: Load) -> Self:
        """Of a place in a plan."""
        stage = load.plan.stages[load.stage]
        shard = stage.shards[load.rank]
        return cls(
            model=load.model,
            blocks=stage.blocks,
            heads=shard.heads,
            columns=shard.columns,
            experts=shard.experts,
            vocabulary=shard.vocabulary,
            is_shared=len(stage.shards) > 1,
            is_last=load.stage == len(load.plan.stages) - 1,
            n_cells=load.n_cells,
            cache_type=load.cache_type,
            device=shard.device,
        )


class Reducer:
    """What an executor sums with. It is given at loading, when the channels of its group do not stand yet, and changed with each plan."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.all_reduce: Callable[[Floats], None] = SoloGroup().all_reduce


class Holding:
    """A loaded shard, and the model's preface where the engine may be."""

    def __init__(self, shape: Shape, executor: Executor, reducer: Reducer, preface: Preface | None) -> None:
        self.shape, self.executor, self.reducer, self.preface = shape, executor, reducer, preface

    @classmethod
    def load(cls, load: Load, backend: Backend, threads: int, source: Source, report: Callable[[int], None], preface: Preface | None) -> Self:
        """Read a place's slices into the device.

        Parameters
        ----------
        source : where they are.
        report : is given the bytes loaded so far; what it raises ends the loading.
        preface : the model's; closed if loading fails, and else with the holding.

        Raises
        ------
        YokeError
            if the file is broken, the source fails, or the device has no room.
        """
        plan, stage = load.plan, load.plan.stages[load.stage]
        shard = stage.shards[load.rank]
        shape = ShardShape(
            width=plan.spec.width,
            n_blocks=len(stage.blocks),
            n_kv_heads=len(plan.kv_heads(shard)),
            head_dim=plan.spec.head_dim,
            n_cells=load.n_cells,
            is_last=load.stage == len(plan.stages) - 1,
            cache_type=load.cache_type,
        )
        reducer = Reducer(len(stage.shards))
        weights = stream_weights(source, shard_cuts(plan, load.stage, load.rank), report)
        program = Program(text=decoder(plan, load.stage, load.rank), shape=shape, weights=weights, reducer=reducer)
        try:
            return cls(Shape.of(load), backend.open(program, device=shard.device, threads=threads), reducer, preface)
        except BaseException:
            if preface is not None:
                preface.close()
            raise

    def close(self) -> None:
        """Free the device's memory."""
        self.executor.close()
        if self.preface is not None:
            self.preface.close()


def unless(stopped: threading.Event, report: Callable[[int], None]) -> Callable[[int], None]:
    """``report``, until somebody stops the loading: then it raises `NodeGone`."""

    def checked(done: int) -> None:
        if stopped.is_set():
            raise NodeGone("stood down while loading")
        report(done)

    return checked
