"""The token loop: schedule, step, commit. It runs in the worker of stage 0, rank 0, and does nothing else in that thread."""

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from yoke.core.clock import Clock
from yoke.core.errors import InvariantError, ModelError, NodeError, RemoteProtocolError, RequestError, YokeError
from yoke.core.frame import Drawn
from yoke.core.request import Event, Finished, FinishReason, Piece, Started
from yoke.run.answer import AnswerText
from yoke.run.intake import Submission, Vocabulary
from yoke.run.scheduler import Scheduler, Step
from yoke.run.session import Session

Emit = Callable[[str, Event | YokeError], None]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The asker of a request is gone."""

    id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The engine shall end."""


Item = Submission | Cancel | Drawn | NodeError | Stop


class StepPipeline(Protocol):
    """What the engine needs of the stages."""

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        """Compute a step, here or further on; its tokens come back through ``deliver``."""


@dataclass(slots=True)
class _Answer:
    """An answer under way, with the moments that its timings are made of, in seconds."""

    session: Session
    submission: Submission
    text: AnswerText
    scheduled_at_s: float | None = None
    first_at_s: float | None = None
    last_at_s: float = 0.0


@dataclass(slots=True)
class Engine:
    """One model's sessions. Everything from outside comes through `post`, from any thread; everything to the outside goes through ``emit``."""

    scheduler: Scheduler
    pipeline: StepPipeline
    vocabulary: Vocabulary
    emit: Emit
    clock: Clock
    _inbox: "queue.SimpleQueue[Item]" = field(default_factory=queue.SimpleQueue)
    _answers: dict[str, _Answer] = field(default_factory=dict)
    _failure: NodeError | None = None
    _is_open: bool = True

    def post(self, item: Item) -> None:
        """Hand something to the loop: a submission, a cancellation, drawn tokens, a failure, or the order to stop."""
        self._inbox.put(item)

    def run(self) -> None:
        """Until told to stop: schedule, step, commit."""
        while self._is_open:
            step = self.scheduler.schedule()
            if step is not None:
                self._step(step)
            self._take(wait=step is None or not self.scheduler.can_schedule)

    def _step(self, step: Step) -> None:
        now = self.clock.monotonic()
        for answer in self._answers.values():
            if answer.scheduled_at_s is None and answer.session.n_sent:
                answer.scheduled_at_s = now
        try:
            self.pipeline.start(step, self.post)
        except NodeError as error:
            self._fail(error)

    def _take(self, *, wait: bool) -> None:
        """Handle everything in the inbox; wait for the first of it if there is nothing to compute."""
        while True:
            try:
                item = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            match item:
                case Drawn():
                    self._commit(item)
                case Submission():
                    self._open(item)
                case Cancel():
                    self._cancel(item.id)
                case NodeError():
                    self._fail(item)
                case Stop():
                    self._is_open = False
                    self._fail(NodeError("the engine was stopped"))
                    return

    def _open(self, submission: Submission) -> None:
        if self._failure is not None:
            self.emit(submission.id, self._failure)
            return
        if submission.id in self._answers:
            self.emit(submission.id, RequestError(f"a request with the id {submission.id!r} is being answered already", field="id"))
            return
        session = Session(
            id=submission.id,
            tokens=list(submission.tokens),
            n_prompt=len(submission.tokens),
            max_tokens=submission.max_tokens,
            sampling=submission.sampling,
        )
        self._answers[submission.id] = _Answer(session, submission, AnswerText(submission.stop))
        self.scheduler.add(session)
        self.emit(submission.id, Started(prompt_tokens=session.n_prompt))

    def _cancel(self, request_id: str) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self.scheduler.finish(answer.session)

    def _commit(self, drawn: Drawn) -> None:
        if self._failure is not None:
            return
        try:
            committed = self.scheduler.commit(drawn.step, drawn.tokens)
        except (ValueError, InvariantError) as error:  # the last stage is another process: its mistakes are not ours
            self._fail(RemoteProtocolError(f"step {drawn.step} came back with {len(drawn.tokens)} tokens, not one for each output: {error}"))
            return
        now = self.clock.monotonic()
        try:
            for session, token in committed:
                self._extend(self._answers[session.id], token, now)
        except ModelError as error:
            self._fail(RemoteProtocolError(f"step {drawn.step} came back with what is no token of this model: {error}"))

    def _extend(self, answer: _Answer, token: int, now: float) -> None:
        """Add a drawn token to its answer, and end the answer if the model, a stop string or the length says so."""
        if answer.first_at_s is None:
            answer.first_at_s = now
        answer.last_at_s = now
        submission, session = answer.submission, answer.session
        is_end = self.vocabulary.is_end(token) and not submission.ignore_eos
        text = "" if is_end else answer.text.feed(self.vocabulary.piece(token))
        reason: FinishReason | None = None
        if is_end or answer.text.is_stopped:
            reason = FinishReason.STOP
        elif session.n_drawn >= session.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += answer.text.finish()
        self.emit(session.id, Piece(text=text, tokens=(token,), sampled_at_s=now))
        if reason is not None:
            self._close(answer, reason)

    def _close(self, answer: _Answer, reason: FinishReason) -> None:
        session, submitted_at = answer.session, answer.submission.submitted_at_s
        self.scheduler.finish(session)
        del self._answers[session.id]
        scheduled_at = answer.scheduled_at_s if answer.scheduled_at_s is not None else submitted_at
        first_at = answer.first_at_s if answer.first_at_s is not None else scheduled_at
        self.emit(
            session.id,
            Finished(
                reason=reason,
                prompt_tokens=session.n_prompt,
                completion_tokens=session.n_drawn,
                queue_s=scheduled_at - submitted_at,
                prefill_s=first_at - scheduled_at,
                decode_s=answer.last_at_s - first_at,
            ),
        )

    def _fail(self, error: NodeError) -> None:
        """End every answer with the named error; later submissions get it at once."""
        if self._failure is None:
            self._failure = error
        self.scheduler.drain()
        for request_id in self._answers:
            self.emit(request_id, error)
        self._answers.clear()
