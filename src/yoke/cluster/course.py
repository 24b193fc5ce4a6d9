"""The way from one plan to the next: wanted, planned, prepared, loaded, served, and given up wherever somebody is lost. Knows who is there from the roster; does
not know how it is found out.

Every method takes what has happened and appends to ``out`` what follows from it. What is urgent (nothing serves) goes straight from planning to loading; what is
voluntary is weighed, prepared while the old plan serves, and then loaded.
"""

from collections.abc import Collection, Mapping
from typing import assert_never

from yoke.cluster import messages as m
from yoke.cluster.change import Agenda, Blame, Change, Step
from yoke.cluster.members import Roster
from yoke.cluster.places import Seating
from yoke.cluster.policy import Policy
from yoke.cluster.standbys import Standbys, successors
from yoke.core.errors import InvariantError, NodeError, NodeGone, PlacementError, YokeError
from yoke.core.node import NodeId
from yoke.core.plan import Plan
from yoke.planner import Wish

Report = m.Prepared | m.Loaded | m.LoadFailed | m.Broken


class Course:
    """What serves, what is on its way, and what is wanted. ``now`` is monotonic seconds; it and ``out`` are set before each call."""

    def __init__(self, policy: Policy, roster: Roster, wish: Wish) -> None:
        self.policy, self.roster = policy, roster
        self.now = 0.0
        self.out: list[m.Command] = []
        self.served: Seating | None = None
        self.change: Change | None = None
        self.standbys = Standbys(policy.replicas, wish)
        self.version = 0
        self.late = 0
        self._agenda = Agenda()
        self._served_since_s = 0.0
        self._idle_since_s: float | None = None
        self._has_failed = False
        self._loss = ""
        self._trouble = ""

    @property
    def working(self) -> Seating | None:
        """The plan that serves or is being loaded, or that broke and whose roll is called; None if there is none."""
        if self.served is not None:
            return self.served
        return self.change.seating if self.change is not None and self.change.step in (Step.LOADING, Step.CALLING) else None

    def want(self, reason: str, due_s: float) -> None:
        """A plan is wanted, from ``due_s`` on."""
        self._agenda.want(reason, due_s)

    def advance(self) -> None:
        """Ask for the plan that is wanted, if it is time, nothing else is under way and the coordinator is there."""
        if self.served is None and self.change is None:
            for node in self.roster.leavers():  # nothing works, so nobody is needed
                self._release(node)
        due_s = self._agenda.due_s
        if self.change is not None or due_s is None or self.now < due_s:
            return
        nodes = self.roster.candidates(self.now)
        if not nodes:
            return
        self.version += 1
        self.change = Change(self.version, Step.PLANNING, self._agenda.take(), {node.id: node for node in nodes})
        self.out.append(m.MakePlan(version=self.version, nodes=nodes, reason="; ".join(self.change.reasons)))

    def bury(self, gone: Mapping[NodeId, str]) -> None:
        """Members are gone, each with the sentence that says so: who is left starts over, if it matters to the plan that works or to the change under way."""
        working, change = self.working, self.change
        was_standby = any(self.standbys.get(node) is not None for node in gone)
        for node in gone:
            self.standbys.discard(node)
        hit = [node for node in gone if working is not None and node in working.seats]
        if working is not None and hit:
            self._loss = self._trouble = "; ".join(gone[node] for node in hit)
            for node in hit:
                if self._is_early(node):
                    self.roster.trials.stumbled(node, self.now)
            heirs = successors(working, hit, self.roster.spares(working, self.now))
            self._say(f"{self._loss}; answers pause until {f'{self.roster.names(heirs.values())} takes over' if heirs else 'the model is placed again'}")
            self._halt()
            self._begin(self._loss) if heirs is None else self._replace(working, heirs)
        elif change is not None and any(
            change.involves(node) or node == self.roster.own for node in gone
        ):  # the coordinator's worker gives the others the file
            why = "; ".join(gone.values())
            if self.served is None:
                self._loss = self._trouble = why
                self._halt()
            self._drop_change(self.now)
            self._begin(why)
        elif was_standby:
            self._order_standbys()

    def leave(self, node: NodeId) -> None:
        """A member wants to go: at once if no plan needs it, else as soon as another plan serves."""
        self.standbys.discard(node)
        if node == self.roster.own:
            self._release(node, f"{self.roster.name(node)} is the coordinator: its leaving stops the model")
            return
        if self.change is not None and self.change.involves(node):
            if self.change.step in (Step.LOADING, Step.CALLING):
                return  # it is seen to when the plan serves, or is given up
            self._drop_change(self.now)
        if self.served is None or node not in self.served.seats:
            self._release(node)
        elif self.change is None:
            self.want(f"{self.roster.name(node)} leaves", self.now)
        self.advance()

    def hear(self, node: NodeId) -> None:
        """A member is there: it has answered, if the roll is being called."""
        change = self.change
        if change is None or change.step is not Step.CALLING:
            return
        change.waiting.discard(node)
        if not change.waiting and change.blame is not None:
            self._end_call(change.blame, change.seating)

    def planned(self, answer: m.PlanMade | m.PlanFailed) -> None:
        """The planner has answered.

        Raises
        ------
        InvariantError
            if the plan is of another version, or of nodes that it was not asked for.
        """
        change = self.change
        if change is None or not change.expects(answer.version, Step.PLANNING):
            self.late += 1
            return
        if isinstance(answer, m.PlanFailed):
            self._refuse(change, answer.error)
            return
        plan = answer.plan
        seating = Seating.of(plan, answer.seconds_per_token, change.nodes)
        if plan.version != answer.version:
            raise InvariantError(f"plan {plan.version} came as the answer to {answer.version}; expected that version")
        if self.served is None:
            self._load(seating, change.reasons)
        else:
            self._judge(change, self.served, seating, answer)

    def report(self, report: Report) -> None:
        """A node says how far it is with a plan; what it says of another version is late."""
        change, node, version = self.change, report.id, report.version
        is_of_change = change is not None and change.version == version and change.involves(node) and node in self.roster
        if change is not None and is_of_change and self._report_on(change, report):
            return
        standing = self.standbys.get(node)
        match report:
            case m.Broken(why=why) if self.served is not None and self.served.plan.version == version and node in self.served.seats:
                self._call_roll(self.served, Blame(node, why, self._is_young))
            case m.Loaded() if standing is not None and standing.version == version:
                self.standbys.ready(node)
                self.roster.members[node].holds = standing.place
            case m.LoadFailed(error=error) if standing is not None and standing.version == version and not standing.is_ready:
                self._fail_standby(node, str(error))
            case m.Prepared() | m.Loaded() | m.LoadFailed() | m.Broken():
                self.late += 1
            case _:
                assert_never(report)

    def tick(self) -> None:
        """Time has passed: what is overdue has failed, and who has rested may be tried again."""
        change = self.change
        if change is not None and self.now >= change.deadline_s:
            engine = {change.seating.engine} if change.seating is not None and change.step is Step.LOADING else set()
            late = change.waiting - engine or change.waiting  # without the others the engine cannot be ready either
            deed = "fetched its part" if change.step is Step.PREPARING else "loaded its part"
            names = self.roster.names(sorted(late))
            self._blame(late, NodeError(f"{names} has not {deed} of plan {change.version} within {self.policy.load_s:g} s; look at its disk and its network"))
        for node in self.standbys.overdue(self.now):
            self._fail_standby(node, f"its copy was not ready within {self.policy.load_s:g} s")
        for node in self.roster.trials.over(self.now):
            if node in self.roster:
                self.want(f"{self.roster.name(node)} may be tried again", self.now)
        self.advance()

    def mind_patience(self) -> None:
        """Streams end when no plan has been found for long, and none is being looked for now. A plan that fits, and is being loaded, is worth waiting for."""
        if self.served is not None or (self.change is not None and self.change.step is Step.LOADING):
            self._idle_since_s = None
            return
        if self._idle_since_s is None:
            self._idle_since_s = self.now
        if self.change is None and not self._has_failed and self.now - self._idle_since_s >= self.policy.patience_s:
            cause = self._trouble or "There is nothing to plan with"
            self._fail_streams(NodeError(f"{cause}. Nothing could serve the model for {self.policy.patience_s:g} s; bring a machine back, or add one"))

    def _say(self, text: str) -> None:
        self.out.append(m.Note(text=text))

    @property
    def _is_young(self) -> bool:
        """Whether the plan that serves has not yet shown that it holds."""
        return self.now - self._served_since_s < self.policy.young_s

    def _is_early(self, node: NodeId) -> bool:
        """Whether a node of the working plan goes before it has done its part for a while."""
        change = self.change
        if self.served is not None or change is None:
            return self._is_young
        if change.blame is not None:
            return change.blame.is_early and (change.blame.error is None or node in change.blame.unloaded)
        return node in change.waiting

    def _begin(self, reason: str) -> None:
        self.want(reason, self.now)
        self.advance()

    def _drop_change(self, due_s: float) -> None:
        """Give the change up; what it should have answered is wanted again, at ``due_s``."""
        if self.change is not None:
            self._agenda.put_back(self.change, due_s)
        self.change = None
        for node in self._leavers_served():
            self.want(f"{self.roster.name(node)} leaves", due_s)

    def _halt(self) -> None:
        """Stop what serves or loads, in all its nodes that are there; the streams pause even if none of them is."""
        served, change = self.served, self.change
        stopped = served if served is not None else change.seating if change is not None and change.step is Step.LOADING else None
        if stopped is not None:
            self.out.append(m.StandDown(version=stopped.plan.version, ids=self.roster.living(stopped.seats)))
        if served is not None and not self._is_young:
            self.roster.trials.forget(served.seats)
        self.served = None
        self._drop_change(self.now)

    def _leavers_served(self) -> list[NodeId]:
        return [node for node in self.roster.leavers() if self.served is not None and node in self.served.seats]

    def _release(self, node: NodeId, why: str = "") -> None:
        if why:
            self._say(why)
        self.roster.members[node].is_released = True
        self.out.append(m.Release(id=node))

    def _refuse(self, change: Change, error: YokeError) -> None:
        """No plan fits: what serves goes on; who wanted to leave goes."""
        self.change = None
        leavers = self._leavers_served()
        for node in leavers:
            self._release(node, f"no plan without {self.roster.name(node)} fits ({error}): its leaving stops the model")
        if self.served is None:
            self._trouble = "; ".join(text for text in (self._loss, str(error)) if text)
            self._say(f"nothing can serve the model: {error}")
        elif not leavers:
            self._say(f"{'; '.join(change.reasons)}: no other plan fits ({error}), so the one that serves stays")
        if not isinstance(error, PlacementError):  # the planner itself fell over: the same question may have an answer later
            self.want(f"the planner failed ({error})", self.now + self.policy.retry_s)
        self._order_standbys()

    def _judge(self, change: Change, served: Seating, seating: Seating, made: m.PlanMade) -> None:
        """Whether a plan that nobody is forced to take replaces the one that serves."""
        why, leavers = "; ".join(change.reasons), self._leavers_served()
        if seating.plan.stages == served.plan.stages:
            self._say(f"{why}: the plan that serves is still the best, {1e3 * seating.seconds_per_token:.1f} ms a token")
            self.served = Seating.of(served.plan, seating.seconds_per_token, seating.nodes)
            self.change = None
            self._order_standbys()
            return
        weighing = self.policy.weigh(served.seconds_with(self.roster.nodes(served.seats)), seating.seconds_per_token, made.moving_s)
        asked = _machines if made.is_by_hand else _grid
        is_wished = made.is_wished and asked(seating.plan) != asked(served.plan)
        is_made = weighing.is_worth_it or bool(leavers) or is_wished
        self._say(f"{why}: {weighing.text}: the plan {'changes' if is_made else 'stays'}")
        if not is_made:
            self.change = None
            self._order_standbys()
            return
        change.seating, change.step = seating, Step.PREPARING
        change.waiting, change.deadline_s = set(seating.seats), self.now + self.policy.load_s
        self.out.append(m.Prepare(version=change.version, plan=seating.plan))

    def _report_on(self, change: Change, report: Report) -> bool:
        """What a node of the change says of it; False if that does not belong to its step."""
        match report:
            case m.Prepared(id=node) if change.step is Step.PREPARING:
                change.waiting.discard(node)
                if not change.waiting and change.seating is not None:
                    self.change = None
                    self._halt()
                    self._load(change.seating, change.reasons)
            case m.Loaded(id=node) if change.step is Step.LOADING and change.seating is not None:
                change.waiting.discard(node)
                self.roster.members[node].holds = change.seating.place(node)
                if not change.waiting:
                    self._serve(change.seating)
            case m.LoadFailed(id=node, error=error) if change.step is Step.LOADING and isinstance(error, NodeGone) and change.seating is not None:
                self._call_roll(change.seating, Blame(node, str(error), True, error, frozenset(change.waiting - {node})))
            case m.LoadFailed(id=node, error=error) if change.step in (Step.PREPARING, Step.LOADING):
                self._blame({node}, error)
            case m.Broken(id=node, why=why) if change.step is Step.LOADING and change.seating is not None:
                self._call_roll(change.seating, Blame(node, why, True))
            case m.LoadFailed() | m.Broken() if change.step is Step.CALLING:
                pass  # another one noticed the same
            case _:
                return False
        return True

    def _load(self, seating: Seating, reasons: tuple[str, ...]) -> None:
        plan = seating.plan
        busy = self.standbys.in_the_way(plan)
        if busy:
            self.out.append(m.StandDown(version=max(standing.version for standing in busy.values()), ids=tuple(busy)))
        for node in seating.seats:
            member = self.roster.members[node]
            if member.holds is not None and member.holds != seating.place(node):
                member.holds = None
        self.change = Change(plan.version, Step.LOADING, reasons, {}, seating, set(seating.seats), self.now + self.policy.load_s)
        self.out.append(m.Load(version=plan.version, plan=plan))

    def _replace(self, working: Seating, heirs: Mapping[NodeId, NodeId]) -> None:
        """Load the same plan with spares, which have their shards loaded already, in the places of the dead."""
        self.version += 1
        self.want(f"{self.roster.names(heirs.values())} took over", self.now + self.policy.settle_s)
        self._load(working.with_others({dead: self.roster.members[heir].node for dead, heir in heirs.items()}, self.version), ())

    def _serve(self, seating: Seating) -> None:
        self.served, self.change, self._served_since_s = seating, None, self.now
        self._has_failed, self._loss, self._trouble = False, "", ""
        self.out.append(m.Serve(version=seating.plan.version))
        for node in self.roster.leavers():
            if node in seating.seats:
                self.want(f"{self.roster.name(node)} leaves", self.now)
            else:
                self._release(node)
        self._order_standbys()

    def _order_standbys(self) -> None:
        if self.served is None or self.change is not None or not self.policy.replicas:
            return
        spares = self.roster.spares(self.served, self.now)
        for node, (stage, rank) in self.standbys.settle(self.served, spares, self.now + self.policy.load_s).items():
            self.out.append(m.Standby(version=self.served.plan.version, plan=self.served.plan, stage=stage, rank=rank, id=node))

    def _fail_standby(self, node: NodeId, why: str) -> None:
        wait_s = self.roster.trials.failed(node, self.now)
        self.standbys.discard(node)
        self._say(f"{self.roster.name(node)} cannot hold a copy ({why}); it is asked again in {wait_s:g} s")
        self._order_standbys()

    def _call_roll(self, broken: Seating, blame: Blame) -> None:
        """A plan broke, and nobody is known to be gone: ask each of its nodes whether it is there; by then whoever is not has been noticed."""
        self._say(f"{blame.why}: every machine of the plan is asked whether it is there")
        self._halt()
        there = self.roster.living(broken.seats)
        self.change = Change(broken.plan.version, Step.CALLING, (), {}, broken, set(there), blame=blame)
        self.out.extend(m.Ping(id=node) for node in there)

    def _end_call(self, blame: Blame, broken: Seating | None) -> None:
        """All are there: so it is the link between two of them, or the one that spoke up."""
        self.change = None
        if blame.error is not None:
            # The engine is the last to be ready; and the coordinator, which reads its own file, waits for all others.
            is_patient = blame.node == self.roster.own or (broken is not None and blame.node == broken.engine)
            self._blame(blame.unloaded if is_patient and blame.unloaded else {blame.node}, blame.error)
            return
        if blame.is_early:
            self.roster.trials.stumbled(blame.node, self.now)
        self._begin(blame.why)

    def _blame(self, nodes: Collection[NodeId], error: YokeError) -> None:
        """A change cannot be carried out because of these nodes: it is given up, and they are left out of plans for a while."""
        is_own, is_serving = self.roster.own in nodes, self.served is not None
        wait_s = max(self.roster.trials.failed(node, self.now, is_barred=not (is_own and is_serving)) for node in nodes)
        why = f"{self.roster.names(sorted(nodes))} cannot do its part ({error})"
        self._say(f"{why}; it is {'tried again' if is_own else 'left out of plans until it is tried again'} in {wait_s:g} s")
        if is_serving:
            self._drop_change(self.now + wait_s if is_own else self.now)
            for node in self._leavers_served() if is_own else ():
                self._release(node, f"no plan without {self.roster.name(node)} can be made ready: its leaving stops the model")
        else:
            self._halt()
            self._trouble = str(error)
            if is_own:
                self._fail_streams(error)
        self.want(why, self.now + wait_s if is_own else self.now)
        self.advance()

    def _fail_streams(self, error: YokeError) -> None:
        self._has_failed = True
        self.out.append(m.FailStreams(error=error))


def _machines(plan: Plan) -> tuple[object, ...]:
    """Who is in each stage, in the order of ranks: what a person has written down."""
    return tuple(tuple(shard.node for shard in stage.shards) for stage in plan.stages)


def _grid(plan: Plan) -> tuple[object, ...]:
    """How many ranks each stage has: what a person may have wished for."""
    return tuple(len(stage.shards) for stage in plan.stages)
