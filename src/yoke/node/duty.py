"""One plan's work on a worker: channels to the neighbours, then the stage's or the engine's loop, until somebody stops it or a neighbour is lost."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yoke.backends.ops import Backend, Floats
from yoke.core.clock import Clock
from yoke.core.errors import InvariantError, NodeGone
from yoke.core.request import StageTimes
from yoke.models.shards import EMBEDDING
from yoke.net.codec import Limits
from yoke.net.group import ChannelGroup, Group, SoloGroup
from yoke.net.identity import Identity
from yoke.node import messages as say
from yoke.node.holding import Holding
from yoke.node.porter import Porter
from yoke.node.preface import Preface
from yoke.node.wiring import Wires, wire
from yoke.run.chat import ChatTemplate
from yoke.run.engine import Engine, Stop
from yoke.run.intake import Intake
from yoke.run.pipeline import Pipeline, Ways, serve_stage
from yoke.run.scheduler import Limits as SchedulerLimits
from yoke.run.scheduler import Scheduler
from yoke.run.stage import StageRunner
from yoke.weights.tokenizer import Tokenizer

Send = Callable[[say.FromWorker], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A worker's own: who it is, what computes, where its neighbours come in, whom it reports to."""

    identity: Identity
    backend: Backend
    porter: Porter
    spin_s: float
    send: Send
    clock: Clock
    tokenizers: dict[Path, Tokenizer]


class Duty:
    """What one order to load leads to. `stop` may be called from any thread, everything else is the main thread's."""

    def __init__(self, load: say.Load, post: Post) -> None:
        self.load, self._post = load, post
        self.stopped = threading.Event()
        self.engine: Engine | None = None
        self.intake: Intake | None = None
        self.runner: StageRunner | None = None
        self._wires = Wires()

    def stop(self) -> None:
        """End the work: channels close, so that whoever waits in one is told; an engine that waits for requests is told too."""
        self.stopped.set()
        self._wires.close()
        if self.engine is not None:
            self.engine.post(Stop())

    def close(self) -> None:
        """Let the neighbours know that it is over."""
        self._wires.close()

    def connect(self, holding: Holding) -> None:
        """Wire the place's channels, and let the executor sum over them.

        Raises
        ------
        NodeGone
            if a neighbour does not come, or somebody stops the work.
        """
        load, post = self.load, self._post
        if len(load.peers) > 1:
            self._wires = wire(load, post.porter, post.identity, post.spin_s, self.stopped)
            if self.stopped.is_set():  # between the last channel and now
                raise NodeGone("stood down while connecting")
        group: Group = ChannelGroup(load.rank, self._wires.group, load.wire_type) if self._wires.group else SoloGroup()
        holding.reducer.all_reduce = group.all_reduce
        self.runner = StageRunner(load.plan, load.stage, load.rank, holding.executor, group)

    def serve(self, holding: Holding) -> None:
        """Say that all is loaded, and compute what comes. Returns when it was told to stop.

        Raises
        ------
        NodeError
            if a neighbour is gone, or the device failed.
        """
        load, runner, wires = self.load, self.runner, self._wires
        if runner is None:
            raise InvariantError("a plan is served before its channels stand")
        width = load.plan.spec.width
        limits = Limits(max_tokens=load.chunk, width=width, max_outputs=load.chunk, max_body_bytes=load.chunk * (4 * width + 128) + 65536)
        if load.is_engine:
            ways = Ways(mates=wires.mates, following=wires.following, result=wires.result, limits=limits)
            self._serve_engine(runner, ways, holding)
            return
        if wires.inlet is None:
            raise InvariantError(f"stage {load.stage}, rank {load.rank} was wired without an inlet")
        self._post.send(say.Loaded(version=load.plan.version))
        outlets = [wires.result] if wires.result is not None else wires.following
        serve_stage(runner, wires.inlet, outlets, limits, load.plan.version)

    def times(self, name: str) -> StageTimes | None:
        """Where the time went so far, under this node's ``name``."""
        runner = self.runner
        if runner is None:
            return None
        clocks = runner.clocks
        return StageTimes(
            stage=runner.stage_index,
            rank=runner.rank,
            node=name,
            steps=clocks.steps,
            tokens=clocks.tokens,
            compute_s=clocks.compute_s,
            collective_s=runner.group.collective_s,
            wire_s=clocks.wire_s,
            waiting_s=clocks.waiting_s,
            late=clocks.late,
        )

    def _serve_engine(self, runner: StageRunner, ways: Ways, holding: Holding) -> None:
        """The engine's worker: sessions and token loop."""
        load, post, preface = self.load, self._post, holding.preface
        if preface is None:
            raise InvariantError("the engine's worker has no vocabulary")

        def embed(tokens: Sequence[int]) -> Floats:
            return post.backend.dequantize(preface.stored_rows(EMBEDDING, tokens))

        tokenizer = post.tokenizers.get(preface.path) or post.tokenizers.setdefault(preface.path, Tokenizer.load(preface.path))
        template = chat_template(preface, tokenizer, load.chat_template)
        self.intake = Intake(load.plan.spec, tokenizer, template, load.context)
        depth = len(load.plan.stages)
        scheduler = Scheduler(SchedulerLimits(n_cells=load.n_cells, chunk=load.chunk, max_sessions=load.max_sessions, depth=depth))
        pipeline = Pipeline(runner, load.plan.version, embed, ways)
        self.engine = Engine(scheduler, pipeline, tokenizer, lambda request_id, event: post.send(say.event_answer(request_id, event)), post.clock)
        if self.stopped.is_set():
            return
        post.send(say.Loaded(version=load.plan.version, has_chat_template=template is not None))
        self.engine.run()


def chat_template(preface: Preface, tokenizer: Tokenizer, override: str | None) -> ChatTemplate | None:
    """The model's own template, or the one that the user gave instead."""
    source = override if override is not None else preface.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return None
    bos, eos = (tokenizer.piece(token).decode(errors="replace") if token is not None else "" for token in (tokenizer.bos, tokenizer.eos))
    return ChatTemplate(source, bos=bos, eos=eos)
