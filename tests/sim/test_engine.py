"""The token loop against stages that answer late: every request ends in the right text or in a named error, and everything is free afterwards.

The stages are real enough to be wronged: they keep the cache that the batches describe and draw the next token from what it holds, so a token that was
left out, sent twice or put into another session's cells changes the text.
"""

import codecs
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from yoke.core.errors import ModelError, NodeGone, RemoteProtocolError, RequestError, YokeError
from yoke.core.frame import Drawn
from yoke.core.request import Event, Finished, FinishReason, Piece, Sampling, Started
from yoke.run.engine import Cancel, Engine, Item, Stop
from yoke.run.intake import Submission
from yoke.run.scheduler import Limits, Scheduler, Step

END = 0
PIECES = (b"", b"a", b"b", b"c", b" ", b"ab", "é".encode(), "🐂".encode()[:2], "🐂".encode()[2:], b"bc")


class Letters:
    """Ten tokens; the first one ends an answer."""

    n_tokens = len(PIECES)

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raise NotImplementedError

    def piece(self, token: int) -> bytes:
        if not 0 <= token < len(PIECES):
            raise ModelError(f"token {token} is outside the vocabulary of {len(PIECES)}")
        return PIECES[token]

    def is_end(self, token: int) -> bool:
        return token == END


def next_token(tokens: tuple[int, ...]) -> int:
    """The model: any function of all tokens. One answer in about fifteen tokens ends."""
    mixed = 17
    for token in tokens:
        mixed = (mixed * 31 + token + 7) % 1_000_003
    return 0 if mixed % 15 == 0 else 1 + mixed % (len(PIECES) - 1)


@dataclass
class Stages:
    """A pipeline whose steps are computed in order and delivered when the test says so."""

    cells: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # cell: slot, position, token
    late: "deque[Drawn]" = field(default_factory=deque)
    n_steps: int = 0
    fail_at: int = -1
    nudged: threading.Event = field(default_factory=threading.Event)

    def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
        self.n_steps += 1
        if self.n_steps == self.fail_at:
            raise NodeGone("attic-pc is gone")
        batch = step.batch
        self.cells = {cell: entry for cell, entry in self.cells.items() if entry[0] not in batch.freed_slots}
        self.cells |= {cell: entry for cell, *entry in zip(batch.cells, batch.slots, batch.positions, batch.tokens, strict=True)}  # type: ignore[misc]
        drawn = tuple(self._draw(batch.slots[output.row], batch.positions[output.row]) for output in batch.outputs)
        self.late.append(Drawn(plan_version=1, step=step.number, tokens=drawn))

    def wait(self, deliver: Callable[[Drawn], None]) -> None:
        assert self.nudged.wait(10), "nobody nudged"
        self.nudged.clear()

    def nudge(self) -> None:
        self.nudged.set()

    def _draw(self, slot: int, position: int) -> int:
        seen = sorted((entry[1], entry[2]) for entry in self.cells.values() if entry[0] == slot and entry[1] <= position)
        assert [p for p, _ in seen] == list(range(position + 1)), "the cache of a session has a gap or a double"
        return next_token(tuple(token for _, token in seen))


class Now:
    """Time that the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def epoch(self) -> float:
        return self.now


def right_answer(submission: Submission) -> tuple[str, FinishReason, int]:
    """What the model says, the slow way: one token after the other, all by itself."""
    tokens, data = list(submission.tokens), b""
    for n_drawn in range(1, submission.max_tokens + 1):
        token = next_token(tuple(tokens))
        tokens.append(token)
        if token == END and not submission.ignore_eos:
            return data.decode(errors="replace"), FinishReason.STOP, n_drawn
        data += PIECES[token]
        text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)  # an incomplete character waits
        ends = sorted((text.find(s) + len(s), text.find(s)) for s in submission.stop if s in text)
        if ends:
            return text[: ends[0][1]], FinishReason.STOP, n_drawn
    return data.decode(errors="replace"), FinishReason.LENGTH, submission.max_tokens


class House:
    """An engine, its stages, and what every asker has heard. Driven step by step: nothing runs by itself."""

    def __init__(self, seed: int, *, n_cells: int, chunk: int, max_sessions: int, depth: int) -> None:
        self.chance = random.Random(seed)
        self.limits = Limits(n_cells=n_cells, chunk=chunk, max_sessions=max_sessions, depth=depth)
        self.stages, self.clock = Stages(), Now()
        self.scheduler = Scheduler(self.limits)
        self.heard: dict[str, list[Event | YokeError]] = {}
        self.engine = Engine(self.scheduler, self.stages, Letters(), lambda id_, event: self.heard.setdefault(id_, []).append(event), self.clock)

    def submission(self, name: str) -> Submission:
        n_prompt = self.chance.randint(1, self.limits.n_cells - 1)
        room = self.limits.n_cells - n_prompt
        stop = tuple("".join(self.chance.choices("abc é", k=self.chance.randint(1, 3))) for _ in range(self.chance.choice((0, 0, 1, 3))))
        return Submission(
            id=name,
            tokens=tuple(self.chance.randrange(1, len(PIECES)) for _ in range(n_prompt)),
            max_tokens=self.chance.randint(1, room),
            sampling=Sampling(),
            stop=stop,
            ignore_eos=self.chance.random() < 0.3,
            submitted_at_s=self.clock.now,
        )

    def turn(self) -> None:
        """One round of the loop in `Engine.run`, without waiting."""
        self.clock.now += 0.001
        step = self.scheduler.schedule()
        if step is not None:
            self.engine._step(step)
        self.engine._take()

    def deliver(self, n: int = 1) -> None:
        for _ in range(min(n, len(self.stages.late))):
            self.engine.post(self.stages.late.popleft())

    def turn_until_lost(self, chance: random.Random) -> None:
        while True:
            self.turn()
            self.deliver(chance.randint(0, 2))

    def finish(self) -> None:
        """Deliver and turn until nobody waits."""
        for _ in range(20_000):
            if not self.engine._answers:
                break
            self.deliver()
            self.turn()
        else:
            pytest.fail("an answer never ended")
        self.deliver(len(self.stages.late))
        self.turn()

    def check_free(self) -> None:
        assert (self.scheduler.n_free_cells, self.scheduler.n_running, self.scheduler.n_queued) == (self.limits.n_cells, 0, 0)
        assert len(self.scheduler._free_slots) == self.limits.max_sessions
        assert not self.engine._answers

    def text(self, name: str) -> str:
        return "".join(event.text for event in self.heard[name] if isinstance(event, Piece))

    def check_story(self, submission: Submission) -> None:
        """One `Started`, the right text token by token, one `Finished` with times that make sense."""
        events = self.heard[submission.id]
        text, reason, n_drawn = right_answer(submission)
        assert events[0] == Started(prompt_tokens=len(submission.tokens))
        assert all(isinstance(event, Piece) and len(event.tokens) == 1 for event in events[1:-1])
        assert len(events) == n_drawn + 2
        end = events[-1]
        assert isinstance(end, Finished)
        assert (self.text(submission.id), end.reason, end.prompt_tokens, end.completion_tokens) == (text, reason, len(submission.tokens), n_drawn)
        assert min(end.queue_s, end.prefill_s, end.decode_s) >= 0


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("block", range(5))
def test_every_answer_is_the_right_one_whatever_comes_between(depth: int, block: int) -> None:
    for seed in range(block * 8, block * 8 + 8):
        chance = random.Random(f"{seed} {depth}")
        house = House(seed, n_cells=chance.choice((6, 12, 40)), chunk=chance.choice((1, 3, 8)), max_sessions=chance.choice((1, 3, 8)), depth=depth)
        sent: dict[str, Submission] = {}
        cancelled: set[str] = set()
        for turn in range(120):
            if turn < 60 and chance.random() < 0.25:
                submission = house.submission(f"r{turn}")
                sent[submission.id] = submission
                house.engine.post(submission)
            if sent and chance.random() < 0.03:
                name = chance.choice(list(sent))
                cancelled.add(name)
                house.engine.post(Cancel(name))
            if chance.random() < 0.6:
                house.deliver(chance.randint(1, 3))
            house.turn()
        house.finish()
        house.check_free()
        for name, submission in sent.items():
            ended = any(isinstance(event, Finished) for event in house.heard[name])
            if name not in cancelled or ended:
                house.check_story(submission)
            else:  # what was said until then is the beginning of the right text
                assert right_answer(submission)[0].startswith(house.text(name)), f"seed {seed}, depth {depth}, request {name}"


@pytest.mark.parametrize("depth", [1, 3])
def test_preemption_changes_no_text(depth: int) -> None:
    house = House(1, n_cells=20, chunk=4, max_sessions=6, depth=depth)
    sent = [Submission(id=f"r{i}", tokens=(1 + i,) * 6, max_tokens=14, sampling=Sampling(), stop=(), ignore_eos=True, submitted_at_s=0.0) for i in range(6)]
    for submission in sent:
        house.engine.post(submission)
    n_tokens = 0
    start = house.stages.start

    def count(step: Step, deliver: Callable[[Drawn], None]) -> None:
        nonlocal n_tokens
        n_tokens += len(step.batch.tokens)
        start(step, deliver)

    house.stages.start = count  # type: ignore[method-assign]
    house.turn()
    house.finish()
    house.check_free()
    for submission in sent:
        house.check_story(submission)
    assert n_tokens > 6 * 19, "nothing was computed again: this scenario tests nothing"


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_answers_go_on_in_another_engine_after_a_loss(seed: int, depth: int) -> None:
    """The tokens are the session: whoever heard them lets another engine write the rest, as if nothing had happened."""
    chance = random.Random(f"{seed} {depth}")
    house = House(seed, n_cells=40, chunk=4, max_sessions=3, depth=depth)
    house.stages.fail_at = chance.randint(1, 30)
    sent = [house.submission(f"r{i}") for i in range(5)]
    for submission in sent:
        house.engine.post(submission)
    with pytest.raises(NodeGone):
        house.turn_until_lost(chance)
    assert not any(isinstance(event, YokeError) for events in house.heard.values() for event in events), "a loss is no answer's end"
    other = House(seed, n_cells=40, chunk=4, max_sessions=3, depth=depth)
    other.heard = house.heard
    is_whole = {name: isinstance(events[-1], Finished) for name, events in house.heard.items()}
    for submission in sent:
        heard = house.heard.get(submission.id, [])
        if not is_whole.get(submission.id):
            drawn = tuple(token for event in heard if isinstance(event, Piece) for token in event.tokens)
            other.engine.post(replace(submission, drawn=drawn, is_resumed=bool(heard)))
    other.turn()
    other.finish()
    for submission in sent:
        other.check_story(submission)
    other.check_free()


def test_answer_whose_end_alone_was_lost_ends_at_once() -> None:
    house = House(2, n_cells=20, chunk=4, max_sessions=2, depth=1)
    submission = house.submission("r")
    house.engine.post(submission)
    house.turn()
    house.finish()
    drawn = tuple(token for event in house.heard["r"] if isinstance(event, Piece) for token in event.tokens)
    again = House(2, n_cells=20, chunk=4, max_sessions=2, depth=1)
    again.engine.post(replace(submission, drawn=drawn, is_resumed=True))
    again.turn()
    (end,) = again.heard["r"]
    assert isinstance(end, Finished)
    assert (end.completion_tokens, end.prompt_tokens) == (len(drawn), len(submission.tokens))
    assert end.reason is right_answer(submission)[1]
    again.check_free()


@pytest.mark.parametrize(
    ("step", "tokens"),
    [(0, ()), (0, (1, 2)), (7, (1,)), (0, (len(PIECES),)), (0, (-1,))],
    ids=["too few", "too many", "foreign step", "no token", "negative token"],
)
def test_last_stage_that_lies_ends_the_engine_as_its_fault(step: int, tokens: tuple[int, ...]) -> None:
    house = House(4, n_cells=8, chunk=8, max_sessions=1, depth=1)
    house.engine.post(Submission(id="r", tokens=(1, 2), max_tokens=3, sampling=Sampling(), stop=(), ignore_eos=True, submitted_at_s=0.0))
    house.turn()
    house.turn()
    house.engine.post(Drawn(plan_version=1, step=step, tokens=tokens))
    with pytest.raises(RemoteProtocolError):
        house.turn()


def test_second_request_of_the_same_id_is_refused_and_leaks_nothing() -> None:
    house = House(5, n_cells=8, chunk=8, max_sessions=2, depth=1)
    request = Submission(id="r", tokens=(1, 2), max_tokens=3, sampling=Sampling(), stop=(), ignore_eos=True, submitted_at_s=0.0)
    house.engine.post(request)
    house.engine.post(request)
    house.turn()
    house.finish()
    assert sum(isinstance(event, RequestError) for event in house.heard["r"]) == 1
    assert sum(isinstance(event, Finished) for event in house.heard["r"]) == 1
    house.check_free()


def test_cancelling_what_is_unknown_or_over_disturbs_nobody() -> None:
    house = House(6, n_cells=12, chunk=8, max_sessions=2, depth=1)
    submission = house.submission("r")
    for item in (Cancel("nobody"), submission):
        house.engine.post(item)
    house.turn()
    house.finish()
    house.engine.post(Cancel("r"))
    house.turn()
    house.check_story(submission)
    house.check_free()


def test_times_are_those_of_the_clock() -> None:
    house = House(7, n_cells=12, chunk=2, max_sessions=1, depth=1)
    house.engine.post(Submission(id="r", tokens=(1, 2, 3), max_tokens=2, sampling=Sampling(), stop=(), ignore_eos=True, submitted_at_s=0.0))
    house.clock.now = 1.0
    house.engine._take()
    for moment in (2.0, 3.0, 5.0, 9.0):
        house.clock.now = moment
        house.deliver()
        house.engine._take()
        step = house.scheduler.schedule()
        if step is not None:
            house.engine._step(step)
    end = house.heard["r"][-1]
    assert isinstance(end, Finished)
    assert (end.queue_s, end.prefill_s, end.decode_s) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_loop_in_its_own_thread_answers_many_askers_and_stops(depth: int) -> None:
    """`Engine.run` itself: results come from another thread, as from the result channel's reader."""
    chance = random.Random(8)
    house = House(8, n_cells=24, chunk=5, max_sessions=3, depth=depth)
    sent = [house.submission(f"r{i}") for i in range(12)]
    is_over = threading.Event()
    arrived: deque[Drawn] = deque()
    ready = threading.Semaphore(0)

    def emit(name: str, event: Event | YokeError) -> None:
        house.heard.setdefault(name, []).append(event)
        if sum(any(isinstance(e, Finished) for e in events) for events in list(house.heard.values())) == len(sent):
            is_over.set()

    class Late:
        def start(self, step: Step, deliver: Callable[[Drawn], None]) -> None:
            house.stages.start(step, deliver)
            arrived.append(house.stages.late.popleft())
            ready.release()

        wait, nudge = house.stages.wait, house.stages.nudge

    engine = Engine(house.scheduler, Late(), Letters(), emit, house.clock)

    def read() -> None:
        while ready.acquire(timeout=10) and not is_over.is_set():
            engine.post(arrived.popleft())

    threads = [threading.Thread(target=engine.run), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    items: list[Item] = list(sent)
    chance.shuffle(items)
    for item in items:
        engine.post(item)
    assert is_over.wait(10)
    engine.post(Stop())
    ready.release()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    house.engine = engine
    for submission in sent:
        house.check_story(submission)
    house.check_free()


def test_idle_loop_sleeps_while_steps_are_in_flight() -> None:
    """Asking the scheduler again and again for what it cannot give would take the core that computes."""
    house = House(9, n_cells=1, chunk=1, max_sessions=2, depth=2)
    for name in ("a", "b"):
        house.engine.post(Submission(id=name, tokens=(1,), max_tokens=1, sampling=Sampling(), stop=(), ignore_eos=True, submitted_at_s=0.0))
    asked, blocked = 0, threading.Event()
    schedule = house.scheduler.schedule

    def counted() -> Step | None:
        nonlocal asked
        asked += 1
        if asked >= 4:  # to open, to start, to find nothing, and once more for the nudges so far
            blocked.set()
        return schedule()

    house.scheduler.schedule = counted  # type: ignore[method-assign]
    thread = threading.Thread(target=house.engine.run)
    thread.start()
    assert blocked.wait(5)
    blocked.clear()
    assert not blocked.wait(0.03), "the loop turns although nothing came"
    house.engine.post(Stop())
    thread.join(5)
    assert not thread.is_alive()
