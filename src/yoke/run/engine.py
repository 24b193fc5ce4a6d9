"""The token loop: schedule, step, commit. It runs in the worker of stage 0, rank 0, and does nothing else in that thread."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from yoke.core.clock import Clock
from yoke.core.errors import InvariantError, ModelError, RemoteProtocolError, RequestError, YokeError
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


Item = Submission | Cancel | Drawn | Stop


class StepPipeline(Protocol):
    """What the engine needs of the stages. Each call raises `NodeError` if one of them is gone."""

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        """Compute a step, here or further on; its tokens come back through ``deliver``, now or in `wait`."""

    def wait(self, deliver: Callable[[Drawn], None]) -> None:
        """Wait for drawn tokens, or for `nudge`."""

    def nudge(self) -> None:
        """Let `wait` return, now or at its next call. From any thread."""


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
    _inbox: "deque[Item]" = field(default_factory=deque)
    _answers: dict[str, _Answer] = field(default_factory=dict)
    _is_open: bool = True

    def post(self, item: Item) -> None:
        """Hand something to the loop: a submission, a cancellation, or the order to stop. From any thread."""
        self._inbox.append(item)
        self.pipeline.nudge()

    def run(self) -> None:
        """Until told to stop: schedule, step, commit.

        Raises
        ------
        NodeError
            if a stage is gone or sent nonsense. The answers under way are not ended: whoever knows their tokens can resume them in another engine.
        """
        while self._is_open:
            step = self.scheduler.schedule()
            if step is not None:
                self._step(step)
            elif not self._inbox:
                self.pipeline.wait(self._inbox.append)
            self._take()

    def _step(self, step: Step) -> None:
        now = self.clock.monotonic()
        for answer in self._answers.values():
            if answer.scheduled_at_s is None and answer.session.n_sent:
                answer.scheduled_at_s = now
        self.pipeline.start(step, self._inbox.append)

    def _take(self) -> None:
        """Handle everything in the inbox."""
        while self._inbox:
            match self._inbox.popleft():
                case Drawn() as drawn:
                    self._commit(drawn)
                case Submission() as submission:
                    self._open(submission)
                case Cancel(id=request_id):
                    self._cancel(request_id)
                case Stop():
                    self._is_open = False

    def _open(self, submission: Submission) -> None:
        if submission.id in self._answers:
            self.emit(submission.id, RequestError(f"a request with the id {submission.id!r} is being answered already", field="id"))
            return
        session = Session(
            id=submission.id,
            tokens=[*submission.tokens, *submission.drawn],
            n_prompt=len(submission.tokens),
            max_tokens=submission.max_tokens,
            sampling=submission.sampling,
        )
        answer = self._answers[submission.id] = _Answer(session, submission, AnswerText(submission.stop))
        self.scheduler.add(session)
        if not submission.is_resumed:
            self.emit(submission.id, Started(prompt_tokens=session.n_prompt))
        if submission.drawn:
            self._catch_up(answer)

    def _catch_up(self, answer: _Answer) -> None:
        """Bring the text of a resumed answer to where it was; if only its end was lost, end it now."""
        drawn = answer.submission.drawn
        answer.scheduled_at_s = answer.first_at_s = answer.last_at_s = self.clock.monotonic()
        for token in drawn[:-1]:
            answer.text.feed(self.vocabulary.piece(token))
        _, reason = self._read(answer, drawn[-1])
        if reason is not None:
            self._close(answer, reason)

    def _cancel(self, request_id: str) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self.scheduler.finish(answer.session)

    def _commit(self, drawn: Drawn) -> None:
        try:
            committed = self.scheduler.commit(drawn.step, drawn.tokens)
        except (ValueError, InvariantError) as error:  # the last stage is another process: its mistakes are not ours
            raise RemoteProtocolError(f"step {drawn.step} came back with {len(drawn.tokens)} tokens, not one for each output: {error}") from error
        now = self.clock.monotonic()
        try:
            for session, token in committed:
                self._extend(self._answers[session.id], token, now)
        except ModelError as error:
            raise RemoteProtocolError(f"step {drawn.step} came back with what is no token of this model: {error}") from error

    def _extend(self, answer: _Answer, token: int, now: float) -> None:
        """Tell the asker of a drawn token, and end the answer if it was the last."""
        if answer.first_at_s is None:
            answer.first_at_s = now
        answer.last_at_s = now
        text, reason = self._read(answer, token)
        self.emit(answer.session.id, Piece(text=text, tokens=(token,), sampled_at_s=now))
        if reason is not None:
            self._close(answer, reason)

    def _read(self, answer: _Answer, token: int) -> tuple[str, FinishReason | None]:
        """What the session's newest token adds to the text, and why the answer ends with it: the model, a stop string or the length says so."""
        is_end = self.vocabulary.is_end(token) and not answer.submission.ignore_eos
        text = "" if is_end else answer.text.feed(self.vocabulary.piece(token))
        if is_end or answer.text.is_stopped:
            return text + answer.text.finish(), FinishReason.STOP
        if answer.session.n_drawn >= answer.session.max_tokens:
            return text + answer.text.finish(), FinishReason.LENGTH
        return text, None

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
