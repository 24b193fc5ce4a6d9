"""The scheduler's laws, held against any order of arrivals, commits, ends and shortages."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from yoke.core.errors import InvariantError
from yoke.core.request import Sampling
from yoke.run.scheduler import Limits, Scheduler, Step
from yoke.run.session import NO_SLOT, Session


def session(name: str, n_prompt: int, max_tokens: int = 4) -> Session:
    return Session(id=name, tokens=list(range(n_prompt)), n_prompt=n_prompt, max_tokens=max_tokens, sampling=Sampling())


class SchedulerLaws(RuleBasedStateMachine):
    """Plays the stages: it keeps the cache that the batches describe, and checks each batch against it."""

    @initialize(data=st.data(), n_cells=st.integers(1, 12), chunk=st.integers(1, 6), max_sessions=st.integers(1, 4), depth=st.integers(1, 4))
    def begin(self, data: st.DataObject, n_cells: int, chunk: int, max_sessions: int, depth: int) -> None:
        self.limits = Limits(n_cells=n_cells, chunk=chunk, max_sessions=max_sessions, depth=depth)
        self.scheduler = Scheduler(self.limits)
        self.flight: deque[Step] = deque()
        self.sessions: list[Session] = []
        self.by_slot: dict[int, list[int]] = {}  # what the stages believe: the tokens of each slot, in order of position
        self.cells: dict[int, int] = {}  # and whose each cell is
        self.drawn = 1000

    @rule(n_prompt=st.integers(1, 8), max_tokens=st.integers(1, 5))
    def add(self, n_prompt: int, max_tokens: int) -> None:
        room = self.limits.n_cells  # intake and settings see to it that a session alone always fits
        n_prompt = min(n_prompt, room)
        max_tokens = min(max_tokens, room - n_prompt + 1)
        new = session(f"s{len(self.sessions)}", n_prompt, max_tokens)
        self.sessions.append(new)
        self.scheduler.add(new)

    @rule()
    def schedule(self) -> None:
        could = self.scheduler.can_schedule
        waiting = [s for s in self.sessions if not s.is_over and s.is_decoding and s.slot != NO_SLOT and s.n_pending and not s.awaits_draw]
        step = self.scheduler.schedule()
        assert could or step is None
        if step is None:
            alive = [s for s in self.sessions if not s.is_over]
            assert self.flight or not alive, "nothing is in flight, sessions wait, and nothing is scheduled: they would wait for ever"
            return
        assert len(self.flight) < self.limits.depth
        self.check(step)
        decoding = [s for s in waiting if s.slot != NO_SLOT]
        if decoding:
            in_batch = set(zip(step.batch.slots, step.batch.positions, strict=True))
            assert any((s.slot, s.n_sent - 1) in in_batch for s in decoding), "a prompt pushed every decoding session out"
        self.flight.append(step)

    def check(self, step: Step) -> None:
        batch = step.batch
        assert 0 < len(batch.tokens) <= self.limits.chunk
        assert len(set(batch.freed_slots)) == len(batch.freed_slots)
        for slot in batch.freed_slots:
            self.by_slot.pop(slot, None)
            self.cells = {cell: owner for cell, owner in self.cells.items() if owner != slot}
        for token, slot, position, cell in zip(batch.tokens, batch.slots, batch.positions, batch.cells, strict=True):
            assert cell < self.limits.n_cells
            assert slot < self.limits.max_sessions
            assert cell not in self.cells, f"cell {cell} is slot {self.cells[cell]}'s"
            self.cells[cell] = slot
            known = self.by_slot.setdefault(slot, [])
            assert position == len(known), "a position was left out, sent twice, or a slot was used again without being freed"
            known.append(token)
        owners = {s.slot: s for s in self.sessions if s.slot != NO_SLOT and not s.is_over}
        for slot in set(batch.slots):
            assert self.by_slot[slot] == owners[slot].tokens[: owners[slot].n_sent]
        outputs = [batch.slots[output.row] for output in batch.outputs]
        assert outputs == [s.slot for s in step.drawing]
        for s in step.drawing:
            assert self.by_slot[s.slot] == s.tokens, "a token is drawn before all tokens were sent"

    @precondition(lambda self: self.flight)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        step = self.flight.popleft()
        tokens = [self.drawn + i for i in range(len(step.drawing))]
        self.drawn += len(tokens)
        before = {s.id: (list(s.tokens), s.is_over) for s in step.drawing}
        committed = self.scheduler.commit(step.number, tokens)
        assert [(s, t) for s, t in zip(step.drawing, tokens, strict=True) if not before[s.id][1]] == committed
        for s, token in committed:
            assert s.tokens == [*before[s.id][0], token]
            if s.n_drawn >= s.max_tokens:
                self.scheduler.finish(s)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.sessions))
        self.scheduler.finish(chosen)
        self.scheduler.finish(chosen)

    @invariant()
    def cells_and_slots_are_held_once(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        alive = [s for s in self.sessions if not s.is_over]
        held = [cell for s in alive for cell in s.cells]
        assert len(set(held)) == len(held)
        assert len(held) + self.scheduler.n_free_cells == self.limits.n_cells
        slots = [s.slot for s in alive if s.slot != NO_SLOT]
        assert len(set(slots)) == len(slots) == self.scheduler.n_running
        assert len(alive) == self.scheduler.n_running + self.scheduler.n_queued
        assert self.scheduler.n_in_flight == len(self.flight) <= self.limits.depth
        for s in alive:
            assert len(s.cells) == s.n_sent

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10_000):  # every session that is left ends with all its tokens, preempted or not
            if all(s.is_over for s in self.sessions):
                break
            while self.scheduler.can_schedule and (step := self.scheduler.schedule()) is not None:
                self.check(step)
                self.flight.append(step)
            step = self.flight.popleft()
            for s, _ in self.scheduler.commit(step.number, range(len(step.drawing))):
                if s.n_drawn >= s.max_tokens:
                    self.scheduler.finish(s)
        assert all(s.is_over for s in self.sessions)
        assert self.scheduler.n_free_cells == self.limits.n_cells
        assert (self.scheduler.n_running, self.scheduler.n_queued) == (0, 0)


TestSchedulerLaws = SchedulerLaws.TestCase
TestSchedulerLaws.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def limits(**changes: int) -> Limits:
    return Limits(**({"n_cells": 16, "chunk": 8, "max_sessions": 4, "depth": 1} | changes))


@pytest.mark.parametrize("name", ["n_cells", "chunk", "max_sessions", "depth"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(InvariantError, match="out of range"):
        limits(**{name: 0})
    with pytest.raises(InvariantError, match="out of range"):
        limits(max_sessions=1025)


def test_long_prompt_is_read_in_chunks_and_draws_once_at_its_end() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(session("a", 11))
    first = scheduler.schedule()
    assert first is not None
    assert (first.batch.positions, first.batch.outputs) == (tuple(range(8)), ())
    scheduler.commit(first.number, ())
    second = scheduler.schedule()
    assert second is not None
    assert (second.batch.positions, [o.row for o in second.batch.outputs]) == ((8, 9, 10), [2])


def test_decoding_goes_first_and_prompts_fill_the_rest_of_the_step() -> None:
    scheduler = Scheduler(limits(n_cells=64))
    old, new = session("old", 2), session("new", 20)
    scheduler.add(old)
    step = scheduler.schedule()
    assert step is not None
    scheduler.commit(step.number, [7])
    scheduler.add(new)
    step = scheduler.schedule()
    assert step is not None
    assert step.batch.slots == (old.slot,) + (new.slot,) * 7
    assert step.batch.tokens[0] == 7


def test_decoding_sessions_are_spread_over_the_steps_in_flight() -> None:
    scheduler = Scheduler(limits(depth=2, n_cells=64))
    sessions = [session(f"s{i}", 1) for i in range(4)]
    for s in sessions:
        scheduler.add(s)
    step = scheduler.schedule()
    assert step is not None
    scheduler.commit(step.number, [1, 2, 3, 4])
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert sorted(first.batch.slots + second.batch.slots) == [0, 1, 2, 3]
    assert len(first.batch.tokens) == len(second.batch.tokens) == 2
    assert scheduler.schedule() is None
    assert scheduler.n_in_flight == 2


def test_freed_slot_is_announced_once_and_before_it_is_used_again() -> None:
    scheduler = Scheduler(limits(max_sessions=1))
    first, second = session("a", 2), session("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step is not None
    scheduler.finish(first)
    scheduler.commit(step.number, [5])
    assert first.tokens == [0, 1]
    following = scheduler.schedule()
    assert following is not None
    assert (following.batch.freed_slots, following.batch.slots) == ((0,), (0, 0))
    scheduler.commit(following.number, [5])
    last = scheduler.schedule()
    assert last is not None
    assert last.batch.freed_slots == ()


def test_youngest_gives_its_cells_back_and_is_computed_again() -> None:
    scheduler = Scheduler(limits(n_cells=6))
    old, young = session("old", 3, 4), session("young", 3, 4)
    scheduler.add(old)
    scheduler.add(young)
    step = scheduler.schedule()
    assert step is not None
    assert scheduler.n_free_cells == 0
    scheduler.commit(step.number, [50, 60])
    step = scheduler.schedule()
    assert step is not None
    assert (step.batch.slots, step.batch.freed_slots) == ((old.slot,), (1,))
    assert (young.slot, young.n_sent, young.cells, young.tokens) == (NO_SLOT, 0, [], [0, 1, 2, 60])
    scheduler.commit(step.number, [51])
    scheduler.finish(old)
    step = scheduler.schedule()
    assert step is not None
    assert step.batch.tokens == (0, 1, 2, 60)
    assert scheduler.commit(step.number, [61]) == [(young, 61)]


def test_session_that_gets_no_cell_keeps_nobody_from_its_turn() -> None:
    """With two steps in flight each takes one of two decoding sessions. The young one has waited longer and no cell is free: it must not be the only one asked."""
    scheduler = Scheduler(limits(n_cells=4, depth=2))
    old, young = session("old", 2), session("young", 2)
    scheduler.add(old)
    scheduler.add(young)
    step = scheduler.schedule()
    assert step is not None
    scheduler.commit(step.number, [50, 60])
    old.last_step, young.last_step = 9, 8
    step = scheduler.schedule()
    assert step is not None, "nothing is in flight, so nothing would ever come"
    assert step.drawing == (old,)


def test_foreign_step_and_wrong_number_of_tokens_are_refused() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(session("a", 2))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(InvariantError, match=r"step 9 came back but is not in flight; in flight are \[0\]"):
        scheduler.commit(9, [])
    with pytest.raises(ValueError, match="zip"):
        scheduler.commit(step.number, [1, 2])


def test_draining_ends_all_sessions_and_frees_everything() -> None:
    scheduler = Scheduler(limits(max_sessions=1, depth=2))
    sessions = [session("a", 3), session("b", 3)]
    for s in sessions:
        scheduler.add(s)
    assert scheduler.schedule() is not None
    assert scheduler.drain() == tuple(sessions)
    assert all(s.is_over for s in sessions)
    assert (scheduler.n_free_cells, scheduler.n_running, scheduler.n_queued, scheduler.n_in_flight) == (16, 0, 0, 0)
    assert not scheduler.can_schedule
