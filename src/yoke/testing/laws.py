"""What must hold of every cluster state, whatever happens: watched from outside, event by event and command by command. Knows messages; does not look inside."""

from collections.abc import Iterable

from yoke.cluster import messages as m
from yoke.core.errors import InvariantError
from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan


class Laws:
    """The laws of `yoke.cluster.state`. Tell it each event before it is handled, and all commands after.

    Raises
    ------
    InvariantError
        from every method, with the law that was broken and the last things that happened.
    """

    def __init__(self, n_remembered: int = 40) -> None:
        self._n_remembered = n_remembered
        self._story: list[str] = []
        self._alive: set[NodeId] = set()
        self._leaving: set[NodeId] = set()
        self._own: NodeId | None = None
        self._last_version = 0
        self._asked: int | None = None
        self._made: dict[int, Plan] = {}
        self._loading: Plan | None = None
        self._loaded: set[NodeId] = set()
        self._working: set[NodeId] = set()
        self._working_version = 0
        self.serving: Plan | None = None

    def handling(self, event: m.Event, now: float) -> None:
        """An event is about to be handled."""
        if not isinstance(event, m.Tick | m.Heard | m.Measured):
            self._tell(f"{now:8.2f}  {_short(event)}")
        match event:
            case m.Joined(node=node):
                self._forget(node.id)
                self._alive.add(node.id)
                self._own = node.id if event.is_coordinator else self._own
            case m.Lost(id=node):
                self._forget(node)
            case m.Leaving(id=node) if node in self._alive:
                self._leaving.add(node)
            case m.PlanMade(version=version, plan=plan) if version == self._asked:
                self._made[version] = plan
            case m.Loaded(version=version, id=node) if self._loading is not None and version == self._loading.version:
                self._loaded.add(node)

    def carrying_out(self, commands: Iterable[m.Command], now: float) -> None:
        """Commands have been given; all of them are looked at in their order."""
        for command in commands:
            if not isinstance(command, m.Ping):
                self._tell(f"{now:8.2f}      {_short(command)}")
            self._check(command)

    def _check(self, command: m.Command) -> None:
        match command:
            case m.Drop(id=node):
                self._must(node in self._alive, f"{node[:8]} is dropped twice, or was never there")
                self._forget(node)
            case m.Ping(id=node) | m.Suspect(id=node) | m.Trust(id=node) | m.Release(id=node) | m.Standby(id=node):
                self._must(node in self._alive, f"a command to {node[:8]}, which is dead")
                if isinstance(command, m.Standby):
                    self._must(self.serving == command.plan, "a copy is ordered of a plan that does not serve")
                if isinstance(command, m.Release):
                    self._must(node in self._leaving, f"{node[:8]} is released, but never asked")
            case m.MakePlan(version=version, nodes=nodes):
                self._new_version(version)
                self._must(bool(nodes) and nodes[0].id == self._own, "the coordinator is not the first node of a plan")
                self._must({node.id for node in nodes} <= self._alive - self._leaving, "a plan is wanted with nodes that are dead or leave")
                self._asked = version
            case m.Prepare(plan=plan):
                self._must(self.serving is not None and self._made.get(plan.version) == plan, "a plan is prepared that was not made, or while nothing serves")
            case m.StandDown(version=version, ids=ids):
                self._must(set(ids) <= self._alive, "a dead node is stood down")
                if version >= self._working_version:
                    self._working -= set(ids)
                    self.serving = self._loading = None
            case m.Load(version=version, plan=plan):
                self._load(version, plan)
            case m.Serve(version=version):
                self._must(self._loading is not None and self._loading.version == version, f"{version} is served, but is not being loaded")
                if self._loading is not None:
                    missing = {shard.node for _, _, shard in self._loading.places()} - self._loaded
                    self._must(not missing, f"{version} is served, but {len(missing)} of its nodes are not loaded")
                self.serving, self._loading = self._loading, None

    def _load(self, version: int, plan: Plan) -> None:
        nodes = {shard.node for _, _, shard in plan.places()}
        self._must(plan.version == version, f"plan {plan.version} is loaded as version {version}")
        self._must(nodes <= self._alive, "a plan is loaded on dead nodes")
        self._must(not self._working & self._alive, "a plan is loaded while nodes still work for the one before")
        if self._made.get(version) != plan:  # a plan that the planner did not make: the last one with nodes replaced
            self._new_version(version)
            self._made[version] = plan
        self._loading, self._loaded = plan, set()
        self._working, self._working_version = nodes, version

    def _new_version(self, version: int) -> None:
        self._must(version == self._last_version + 1, f"version {version} follows {self._last_version}")
        self._last_version = version

    def _forget(self, node: NodeId) -> None:
        self._alive.discard(node)
        self._leaving.discard(node)
        self._loaded.discard(node)
        self._working.discard(node)

    def _must(self, holds: bool, law: str) -> None:
        if not holds:
            raise InvariantError(f"{law}\n{self.story()}")

    def _tell(self, line: str) -> None:
        self._story.append(line)
        del self._story[: -self._n_remembered]

    def story(self) -> str:
        """The last things that happened, one a line."""
        return "\n".join(self._story)


def _short(message: m.Event | m.Command) -> str:
    """A message in one line: what it is, then those of its fields that a reader needs, whoever they belong to."""
    parts = [type(message).__name__]
    for name in ("version", "id", "node", "ids", "nodes", "plan", "stage", "rank", "reason", "why", "text", "error"):
        value = getattr(message, name, None)
        if isinstance(value, Plan):
            parts.append(" | ".join(" + ".join(shard.node[-4:] for shard in stage.shards) for stage in value.stages))
        elif isinstance(value, tuple):
            parts.append(",".join(part.id[-4:] if isinstance(part, Node) else part[-4:] for part in value[:8]))
        elif value is not None:
            parts.append(value.name if isinstance(value, Node) else str(value)[-4:] if name == "id" else str(value))
    return " ".join(parts)
