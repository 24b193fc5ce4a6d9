"""Which tokens go into the next step. Pure: no clock, no socket, no tensor; the same calls give the same batches.

Continuous batching: decode tokens first, one for each session that has its last token back, then prompt chunks in order of arrival, up to ``chunk`` tokens. With
several stages, several batches are in flight; each takes its fair part of the decoding sessions, so that no stage idles. When cells run out, the session that came
last gives its cells back and is computed again later: the text does not change, only its time.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from yoke.core.errors import InvariantError
from yoke.core.frame import MAX_SLOTS, Batch, Output
from yoke.run.session import NO_SLOT, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``n_cells`` of cache in all, ``chunk`` tokens in a step, ``max_sessions`` at once, ``depth`` batches in flight (one for each stage)."""

    n_cells: int
    chunk: int
    max_sessions: int
    depth: int

    def __post_init__(self) -> None:
        if min(self.n_cells, self.chunk, self.max_sessions, self.depth) < 1 or self.max_sessions > MAX_SLOTS:
            raise InvariantError(f"scheduler limits are out of range: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A numbered batch; ``drawing`` are the sessions of its outputs, in their order."""

    number: int
    batch: Batch
    drawing: tuple[Session, ...]


class Scheduler:
    """Bookkeeper of sessions, slots and cells."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queued: deque[Session] = deque()
        self._running: list[Session] = []
        self._free_cells = list(range(limits.n_cells))
        self._free_slots = list(range(limits.max_sessions))
        self._freed: list[int] = []
        self._in_flight: dict[int, Step] = {}
        self._next_step = 0

    @property
    def n_running(self) -> int:
        """Sessions that hold a slot."""
        return len(self._running)

    @property
    def n_queued(self) -> int:
        """Sessions that wait for a slot."""
        return len(self._queued)

    @property
    def n_free_cells(self) -> int:
        """Cells of the cache that no session holds."""
        return len(self._free_cells)

    @property
    def n_in_flight(self) -> int:
        """Steps that have not come back."""
        return len(self._in_flight)

    @property
    def can_schedule(self) -> bool:
        """Whether `schedule` may find work before anything else happens."""
        if len(self._in_flight) >= self._limits.depth:
            return False
        return any(s.n_pending for s in self._running) or bool(self._queued and self._free_slots)

    def add(self, session: Session) -> None:
        """Queue a session."""
        self._queued.append(session)

    def finish(self, session: Session) -> None:
        """End a session, for whatever reason, and free its slot and cells at once. Harmless when called twice."""
        if session.is_over:
            return
        session.is_over = True
        if session in self._queued:
            self._queued.remove(session)
        else:
            self._release(session)

    def drain(self) -> tuple[Session, ...]:
        """End every session and forget the steps in flight; the sessions that were alive."""
        alive = (*self._running, *self._queued)
        for session in alive:
            self.finish(session)
        self._in_flight.clear()
        return alive

    def schedule(self) -> Step | None:
        """The next step, or None if nothing can be computed now."""
        if len(self._in_flight) >= self._limits.depth:
            return None
        self._admit()
        chosen = self._choose()
        if not chosen:
            return None
        step = self._step(chosen)
        self._in_flight[step.number] = step
        return step

    def commit(self, number: int, tokens: Iterable[int]) -> list[tuple[Session, int]]:
        """Take the tokens that a step drew; those of sessions that are over are dropped.

        Raises
        ------
        InvariantError
            if the step is not in flight, or brings another number of tokens than it has outputs.
        """
        step = self._in_flight.pop(number, None)
        if step is None:
            raise InvariantError(f"step {number} came back but is not in flight; in flight are {sorted(self._in_flight)}")
        drawn = list(zip(step.drawing, tokens, strict=True))
        for session, token in drawn:
            session.awaits_draw = False
            if not session.is_over:
                session.tokens.append(token)
        return [(session, token) for session, token in drawn if not session.is_over]

    def _admit(self) -> None:
        """Give slots to waiting sessions, oldest first, while there is at least one cell for each."""
        while self._queued and self._free_slots and len(self._free_cells) > len(self._running):
            session = self._queued.popleft()
            session.slot = heapq.heappop(self._free_slots)
            self._running.append(session)

    def _choose(self) -> list[tuple[Session, int]]:
        """Sessions of the next batch with their counts of tokens; every count has its cells."""
        budget = self._limits.chunk
        decoding = [s for s in self._running if s.is_decoding]
        share = -(-len(decoding) // self._limits.depth)
        ready = sorted((s for s in decoding if s.n_pending and not s.awaits_draw), key=lambda s: s.last_step)
        chosen: list[tuple[Session, int]] = []
        for session in ready:
            if len(chosen) == min(share, self._limits.chunk):
                break
            if session.slot != NO_SLOT and self._take_cells(session, 1):  # an earlier one may have pushed it out; one without a cell keeps nobody's place
                chosen.append((session, 1))
                budget -= 1
        for session in [s for s in self._running if s.n_pending and not s.is_decoding]:
            count = min(budget, session.n_pending)
            if count and session.slot != NO_SLOT and (taken := self._take_cells(session, count)):
                chosen.append((session, taken))
                budget -= taken
        return [(session, count) for session, count in chosen if session.slot != NO_SLOT]

    def _take_cells(self, session: Session, count: int) -> int:
        """Up to ``count`` cells for a session. Only when there is none at all does a younger session give up its own."""
        while not self._free_cells:
            younger = [s for s in self._running[self._running.index(session) + 1 :] if s.cells and not s.awaits_draw]
            if not younger:
                return 0
            self._preempt(younger[-1])
        taken = min(count, len(self._free_cells))
        session.cells += [heapq.heappop(self._free_cells) for _ in range(taken)]
        return taken

    def _preempt(self, session: Session) -> None:
        """Put a session back at the head of the queue; its tokens stay, so nothing but time is lost."""
        self._release(session)
        session.slot, session.n_sent = NO_SLOT, 0
        self._queued.appendleft(session)

    def _release(self, session: Session) -> None:
        self._running.remove(session)
        for cell in session.cells:
            heapq.heappush(self._free_cells, cell)
        heapq.heappush(self._free_slots, session.slot)
        self._freed.append(session.slot)
        session.cells = []

    def _step(self, chosen: list[tuple[Session, int]]) -> Step:
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        outputs: list[Output] = []
        drawing: list[Session] = []
        for session, count in chosen:
            start, stop = session.n_sent, session.n_sent + count
            tokens += session.tokens[start:stop]
            slots += [session.slot] * count
            positions += range(start, stop)
            cells += session.cells[start:stop]
            session.n_sent, session.last_step = stop, self._next_step
            if not session.n_pending:
                session.awaits_draw = True
                outputs.append(Output(row=len(tokens) - 1, sampling=session.sampling))
                drawing.append(session)
        batch = Batch(
            tokens=tuple(tokens),
            slots=tuple(slots),
            positions=tuple(positions),
            cells=tuple(cells),
            outputs=tuple(outputs),
            freed_slots=tuple(dict.fromkeys(self._freed)),
        )
        self._freed.clear()
        self._next_step += 1
        return Step(number=self._next_step - 1, batch=batch, drawing=tuple(drawing))
