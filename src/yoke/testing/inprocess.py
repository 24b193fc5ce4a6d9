"""A split model in one process: every shard of a plan with a thread of its own, and memory channels where machines would have sockets.

Stages, groups, pipeline and engine are the ones that real workers run; only process, network and loading from afar are left out. For tests and experiments:
all shards share one machine, so nothing gets faster by being split.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NotRequired, Self, TypedDict, Unpack

import numpy as np

from yoke.backends.ops import Backend, CacheType, Executor, Floats, Program, ShardShape
from yoke.core.clock import SystemClock
from yoke.core.errors import InvariantError, NodeError, NodeGone, YokeError
from yoke.core.frame import MAX_BATCH_TOKENS, Batch, Drawn, Output
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.core.request import Event, Finished, Piece, Sampling
from yoke.core.spec import ModelSpec
from yoke.core.tensor import StoredTensor
from yoke.models.decoder import decoder
from yoke.models.families import model_spec
from yoke.models.shards import shard_cuts
from yoke.net.channel import Channel
from yoke.net.codec import Limits
from yoke.net.group import ChannelGroup, Group, SoloGroup, WireType
from yoke.net.memory import memory_pair
from yoke.planner import grid_plan
from yoke.run.engine import Engine, Stop
from yoke.run.intake import Submission
from yoke.run.pipeline import Pipeline, Ways, serve_stage
from yoke.run.scheduler import Limits as SchedulerLimits
from yoke.run.scheduler import Scheduler, Step
from yoke.run.stage import StageRunner
from yoke.weights.gguf import GgufFile

GREEDY = Sampling()
EMBEDDING = "token_embd.weight"
Place = tuple[int, int]


class SplitOptions(TypedDict):
    """How a split model runs: cells of cache, their type, how ranks' contributions travel, and the threads of each shard."""

    n_cells: int
    cache_type: NotRequired[CacheType]
    wire: NotRequired[WireType]
    threads: NotRequired[int]


def grid(spec: ModelSpec, stages: int, ranks: int, shares: Sequence[float] | None = None, version: int = 1) -> Plan:
    """A plan of ``stages`` x ``ranks`` over invented nodes; ``shares`` are the ranks' relative ones, even if None. More ranks than heads leave some of them empty.

    Raises
    ------
    PlacementError
        if there are more stages than blocks, or not one share for each rank.
    """
    nodes = [NodeId(f"{index:064x}") for index in range(1, stages * ranks + 1)]
    return grid_plan(spec, nodes, stages=stages, ranks=ranks, shares=shares, version=version)


def read_spec(path: Path) -> ModelSpec:
    """What the GGUF file at ``path`` holds.

    Raises
    ------
    ModelError
        if it is no model that Yoke knows.
    """
    with GgufFile.open(path) as file:
        return model_spec(path.stem, file.metadata, file.tensors)


def text_batch(tokens: Sequence[int]) -> Batch:
    """All of a text in one step: slot 0, cells from 0, and the logits of every row."""
    n = len(tokens)
    outputs = tuple(Output(row=row, sampling=GREEDY) for row in range(n))
    return Batch(tokens=tuple(tokens), slots=(0,) * n, positions=tuple(range(n)), cells=tuple(range(n)), outputs=outputs)


def open_split(path: Path, plan: Plan, backend: Backend, **options: Unpack[SplitOptions]) -> "SplitModel":
    """Load every shard of ``plan`` from the GGUF file at ``path``, and start a thread for each but the first.

    Raises
    ------
    ModelError
        if the file cannot be read or lacks a tensor.
    BackendError
        if a device has no room.
    """
    return SplitModel(path, plan, backend, **options)


@dataclass(slots=True)
class _Wires:
    """One place's channels, as in ``yoke.node.wiring``."""

    inlet: Channel | None = None
    outlets: list[Channel] = field(default_factory=list)
    mates: list[Channel] = field(default_factory=list)
    group: dict[int, Channel] = field(default_factory=dict)

    def close(self) -> None:
        for channel in (self.inlet, *self.outlets, *self.mates, *self.group.values()):
            if channel is not None:
                channel.close()


class _Listening:
    """An executor whose latest result can be read: the only way to logits, which no frame carries."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.latest: Floats = np.empty((0, 0), dtype=np.float32)

    def compute(self, hidden: Floats, batch: Batch) -> Floats:
        self.latest = self._executor.compute(hidden, batch)
        return self.latest

    def clear(self) -> None:
        self._executor.clear()

    def close(self) -> None:
        self._executor.close()


class _NoText:
    """The vocabulary of an engine that is asked for tokens alone."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raise InvariantError("a split model takes tokens, not text")

    def piece(self, token: int) -> bytes:
        return b""

    def is_end(self, token: int) -> bool:
        return False


class SplitModel:
    """A model whose shards are threads of this process. Use it as a context manager or call `close`; one thread at a time.

    Parameters
    ----------
    path : the GGUF file.
    plan : what is split how; the devices that it names are the backend's.
    options : ``n_cells`` and, if wished, ``cache_type`` (f32), ``wire`` (float32) and ``threads`` of each shard (1).
    """

    def __init__(self, path: Path, plan: Plan, backend: Backend, **options: Unpack[SplitOptions]) -> None:
        self.plan = plan
        self._backend, self._options = backend, options
        self._errors: list[YokeError] = []
        self._threads: list[threading.Thread] = []
        self._used_slots: set[int] = set()
        self._to_free: tuple[int, ...] = ()
        self._steps = itertools.count()
        self._wires, self._result = _connect(plan)
        self._logits: dict[int, _Listening] = {}
        with ExitStack() as undo:
            self._file = undo.enter_context(GgufFile.open(path))
            runners = {}
            for stage, rank, _ in plan.places():
                runners[stage, rank] = self._load(stage, rank)
                undo.callback(runners[stage, rank].close)
            undo.pop_all()
        self._start(runners)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all threads and free all shards. Calling it twice is allowed."""
        for wires in self._wires.values():
            wires.close()
        if self._result is not None:
            self._result.close()
        for thread in self._threads:
            thread.join()
        self._pipeline.close()
        self._file.close()

    def logits(self, batch: Batch) -> Floats:
        """Compute one step and give the logits of its outputs, float32 [outputs, vocabulary]. The caller decides about slots and cells, across calls too.

        Raises
        ------
        InvariantError
            if the batch has no outputs.
        YokeError
            if a shard failed.
        """
        if not batch.outputs:
            raise InvariantError("the batch has no outputs; expected at least one row whose logits are wanted")
        arrived: list[Drawn] = []
        try:
            self.start(Step(number=next(self._steps), batch=batch, drawing=()), arrived.append)
            while not arrived:
                self.wait(arrived.append)
        except NodeGone as error:
            raise self._cause(error) from error
        # Rank 0 has drawn, so every other rank with logits has sent them to it.
        shards = self.plan.stages[-1].shards
        return np.concatenate([self._logits[rank].latest for rank, shard in enumerate(shards) if shard.vocabulary], axis=1)

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling = GREEDY, chunk: int = 256) -> list[list[int]]:
        """Continue all prompts at once, each in a session of its own, through the engine; ends of text do not end an answer.

        Parameters
        ----------
        prompts : token ids.
        max_tokens : of each answer.
        sampling : for all of them.
        chunk : tokens in one step at most.

        Raises
        ------
        YokeError
            if a shard failed.
        """
        limits = SchedulerLimits(n_cells=self._options["n_cells"], chunk=chunk, max_sessions=len(prompts), depth=len(self.plan.stages))
        answers: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        open_answers = set(answers)

        def emit(request_id: str, event: Event | YokeError) -> None:
            if isinstance(event, Piece):
                answers[request_id] += event.tokens
            elif isinstance(event, Finished):
                open_answers.discard(request_id)
                if not open_answers:
                    engine.post(Stop())

        engine = Engine(Scheduler(limits), self, _NoText(self.plan.spec.vocabulary), emit, SystemClock())
        self._to_free = tuple(self._used_slots)
        for request_id, prompt in zip(answers, prompts, strict=True):
            engine.post(_submission(request_id, prompt, max_tokens, sampling))
        try:
            engine.run()
        except NodeError as error:
            raise self._cause(error) from error
        self._to_free = tuple(self._used_slots)
        return list(answers.values())

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        """Start one step, as `yoke.run.pipeline.Pipeline.start`; the first after `generate` also frees what that left in the cache."""
        self._used_slots |= set(step.batch.slots)
        if self._to_free:
            freed = tuple(dict.fromkeys((*self._to_free, *step.batch.freed_slots)))
            step = replace(step, batch=replace(step.batch, freed_slots=freed))
            self._to_free = ()
        self._pipeline.start(step, deliver)

    def wait(self, deliver: Callable[[Drawn], None]) -> None:
        """Wait for drawn tokens, as `yoke.run.pipeline.Pipeline.wait`."""
        self._pipeline.wait(deliver)

    def nudge(self) -> None:
        """Let `wait` return."""
        self._pipeline.nudge()

    def _load(self, stage_index: int, rank: int) -> StageRunner:
        plan, options = self.plan, self._options
        stage = plan.stages[stage_index]
        shard, is_last = stage.shards[rank], stage_index == len(plan.stages) - 1
        channels = self._wires[stage_index, rank].group
        group: Group = ChannelGroup(rank, channels, options.get("wire", WireType.FLOAT32)) if channels else SoloGroup()
        shape = ShardShape(
            width=plan.spec.width,
            n_blocks=len(stage.blocks),
            n_kv_heads=len(plan.kv_heads(shard)),
            head_dim=plan.spec.head_dim,
            n_cells=options["n_cells"],
            is_last=is_last,
            cache_type=options.get("cache_type", "f32"),
        )
        program = Program(text=decoder(plan, stage_index, rank), shape=shape, weights=self._weights(stage_index, rank), reducer=group)
        executor = _Listening(self._backend.open(program, device=shard.device, threads=options.get("threads", 1)))
        if is_last:
            self._logits[rank] = executor
        return StageRunner(plan, stage_index, rank, executor, group)

    def _weights(self, stage_index: int, rank: int) -> Iterator[StoredTensor]:
        for cut in shard_cuts(self.plan, stage_index, rank):
            yield self._file.read(cut.name, cut.rows, cut.columns)

    def _embed(self, tokens: Sequence[int]) -> Floats:
        return self._backend.dequantize(self._file.stored_rows(EMBEDDING, tokens))

    def _start(self, runners: dict[Place, StageRunner]) -> None:
        first = self._wires[0, 0]
        ways = Ways(mates=first.mates, following=first.outlets, result=self._result, limits=self._limits())
        self._pipeline = Pipeline(runners.pop((0, 0)), self.plan.version, self._embed, ways)
        for place, runner in runners.items():
            self._threads.append(threading.Thread(target=self._serve, args=(runner, self._wires[place]), name=f"yoke-shard-{place[0]}-{place[1]}"))
        for thread in self._threads:
            thread.start()

    def _serve(self, runner: StageRunner, wires: _Wires) -> None:
        """A shard's life; whatever ends it ends its channels, so that nobody waits for it."""
        try:
            if wires.inlet is None:
                raise InvariantError(f"stage {runner.stage_index}, rank {runner.rank} has no inlet")
            serve_stage(runner, wires.inlet, wires.outlets, self._limits(), self.plan.version)
        except NodeGone:
            pass
        except YokeError as error:
            self._errors.append(error)
        finally:
            wires.close()
            runner.close()

    def _limits(self) -> Limits:
        n_tokens, width = min(MAX_BATCH_TOKENS, self._options["n_cells"]), self.plan.spec.width
        return Limits(max_tokens=n_tokens, width=width, max_outputs=n_tokens, max_body_bytes=n_tokens * (4 * width + 128) + 65536)

    def _cause(self, error: YokeError) -> YokeError:
        """The failure behind a connection that ended."""
        return self._errors[0] if self._errors else error


def _submission(request_id: str, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> Submission:
    return Submission(id=request_id, tokens=tuple(prompt), max_tokens=max_tokens, sampling=sampling, stop=(), ignore_eos=True, submitted_at_s=0.0)


def _connect(plan: Plan) -> tuple[dict[Place, _Wires], Channel | None]:
    """Everybody's channels, and the engine's end of the one that brings drawn tokens; None if the only stage draws them."""
    wires = {(stage, rank): _Wires() for stage, rank, _ in plan.places()}
    owners = {(stage, rank): shard.node for stage, rank, shard in plan.places()}
    for (stage, rank), here in wires.items():
        for lower in range(rank):
            here.group[lower], wires[stage, lower].group[rank] = memory_pair(owners[stage, rank], owners[stage, lower])
        # Frames come from rank 0 of the stage before; in the first stage, from the engine's rank.
        source = (max(0, stage - 1), 0)
        if source == (stage, rank):
            continue
        outgoing, here.inlet = memory_pair(owners[source], owners[stage, rank])
        (wires[source].outlets if source[0] < stage else wires[source].mates).append(outgoing)
    last = (len(plan.stages) - 1, 0)
    if last == (0, 0):
        return wires, None
    outgoing, result = memory_pair(owners[last], owners[0, 0])
    wires[last].outlets.append(outgoing)
    return wires, result
