"""``yoke plan``: which node would hold what, and what would change with machines that one does not have, or without one that one has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from yoke.cli import options
from yoke.cli.opening import run_until_signal
from yoke.cli.render import errors, measured, output, plan_json, plan_table, size
from yoke.core.errors import PlacementError, SettingError
from yoke.core.node import Node, NodeId
from yoke.core.settings import Settings
from yoke.core.spec import ModelSpec
from yoke.node.clusterfile import ClusterFile, NewMachine, read_cluster, read_machine
from yoke.node.local import Layout, open_coordinator, sizes, wish_of
from yoke.node.model import Model
from yoke.planner import Goal, Outlook, Wish, make_plan


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan", help="Show which node would hold which part of MODEL, and how fast.")(plan)


def plan(
    model: options.Model,
    as_json: options.Json = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show where a token's time goes, and the next best plans.")] = False,
    goal: options.For = Goal.LATENCY,
    cluster: options.Cluster = None,
    add: options.Add = None,
    without: options.Without = None,
    prompt_tokens: options.PromptTokens = 512,
    streams: options.Streams = 8,
    local_nodes: options.LocalNodes = 1,
    stages: options.Stages = None,
    ranks: options.Ranks = None,
    shares: options.Shares = None,
    context: options.Context = None,
    cells: options.Cells = None,
    threads: options.Threads = None,
    device: options.Device = None,
    cache_type: options.CacheType = None,
    state_dir: options.StateDir = None,
) -> None:
    """Show a plan."""
    settings = options.settings(context=context, cells=cells, threads=threads, device=device, cache_type=cache_type, state_dir=state_dir)
    if cluster is not None and local_nodes > 1:
        raise typer.BadParameter("--cluster names the nodes; --local-nodes starts some: give one or the other")
    changes = Changes(added=tuple(read_machine(text) for text in add or ()), removed=tuple(without or ()))
    opened = Model.open(model)
    opened.file.close()
    _, n_cells = sizes(settings, opened)
    given = options.share_numbers(shares)
    layout = Layout(local_nodes=local_nodes, stages=stages, ranks=ranks, shares=given, weight_type=opened.spec.weight_type)
    wish = replace(wish_of(settings, layout, n_cells), goal=goal, prompt_tokens=prompt_tokens, streams=streams, chunk=settings.chunk)
    there = read_cluster(cluster) if cluster is not None else _measured(settings, layout)
    before, after, nodes = _planned(opened.spec, there, changes, wish)
    if as_json:
        typer.echo(json.dumps(_json(after, before, changes, nodes)))
    else:
        _print(after, before, changes, nodes)
        _print_explained(after, nodes) if explain else None


@dataclass(frozen=True, slots=True)
class Changes:
    """Machines that are thought of, and names of those that are thought away."""

    added: tuple[NewMachine, ...]
    removed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)

    def made_to(self, there: ClusterFile) -> ClusterFile:
        """The cluster with them. A layout by hand was for the machines that were there, so it goes.

        Raises
        ------
        SettingError
            if a name is not there, is taken, or is the coordinator's.
        """
        names = [node.name for node in there.nodes]
        for name in self.removed:
            if name not in names[1:]:
                why = "is the coordinator: it has the file and the engine" if name == names[0] else f"is not there; there are {', '.join(names)}"
                raise SettingError(f"--without {name}: {name} {why}")
        nodes = [node for node in there.nodes if node.name not in self.removed]
        left = {node.id for node in nodes}
        links = [link for link in there.links if {link.source, link.target} <= left]
        for new in self.added:
            if new.node.name in {node.name for node in nodes}:
                raise SettingError(f"--add {new.node.name}: there is a node of this name already; give it another")
            links += new.links(nodes, there.costs)
            nodes.append(new.node)
        return replace(there, nodes=tuple(nodes), links=tuple(links), layout=None)

    def __str__(self) -> str:
        return ", ".join([*(f"with {new.node.name}" for new in self.added), *(f"without {name}" for name in self.removed)])


def _measured(settings: Settings, layout: Layout) -> ClusterFile:
    """The machine that this runs on, and its local nodes."""
    found: list[ClusterFile] = []

    async def measure() -> None:
        """Start them, and ask."""
        with measured(errors.is_terminal) as bar:
            async with open_coordinator(settings, layout, measuring=bar) as coordinator:
                status = await coordinator.status()
                found.append(ClusterFile(nodes=status.nodes, links=status.links))

    run_until_signal(measure())
    return found[0]


def _planned(spec: ModelSpec, there: ClusterFile, changes: Changes, wish: Wish) -> tuple[Outlook | None, Outlook, Mapping[NodeId, Node]]:
    """The plan before the changes, if there are any and one fits; the plan after; and all nodes of both."""
    wish = replace(wish, layout=None if wish.is_grid else there.layout, use_all=wish.use_all and there.layout is None and not changes)
    before: Outlook | None = None
    nodes = {node.id: node for node in there.nodes}
    if changes:
        try:
            before = _outlook(spec, there, wish)
        except PlacementError as error:
            errors.print(f"without the change: {error}", highlight=False, soft_wrap=True)
        there = changes.made_to(there)
        wish = replace(wish, layout=None, keep=before.plan if before is not None else None)
    return before, _outlook(spec, there, wish), nodes | {node.id: node for node in there.nodes}


def _outlook(spec: ModelSpec, there: ClusterFile, wish: Wish) -> Outlook:
    return make_plan(spec, there.nodes, there.links, wish, there.costs)


def _print(after: Outlook, before: Outlook | None, changes: Changes, nodes: Mapping[NodeId, Node]) -> None:
    output.print(plan_table(after, nodes))
    for node, sentence in {**after.why, **after.left_out}.items():
        offer = f", of {size(nodes[node].device.free_bytes)} that it offers" if node in after.why else ""
        notes = "".join(f" ({note})" for note in nodes[node].notes)
        output.print(f"{sentence}{offer}{notes}", highlight=False, soft_wrap=True, markup=False)
    together = f"{after.tokens_per_s_together:.1f} tokens/s for {after.streams} streams together"
    output.print(
        f"predicted: {together}; the first token of a prompt of {after.prompt_tokens} comes after {after.first_token_s:.2f} s", highlight=False, soft_wrap=True
    )
    if changes:
        output.print(_difference(after, before, changes), highlight=False, soft_wrap=True)


def _difference(after: Outlook, before: Outlook | None, changes: Changes) -> str:
    if before is None:
        return f"{changes}: nothing fits -> {after.tokens_per_s:.1f} tokens/s"
    told = []
    for what, old, new in (
        ("tokens/s for one stream", before.tokens_per_s, after.tokens_per_s),
        ("together", before.tokens_per_s_together, after.tokens_per_s_together),
    ):
        told.append(f"{old:.1f} -> {new:.1f} {what} ({100 * (new / old - 1):+.0f} %)")
    moved = sum(after.moved_bytes.values())
    return f"{changes}: {', '.join(told)}; " + (f"{size(moved)} of weights move, in about {after.moving_s:.1f} s" if moved else "nothing moves")


def _print_explained(outlook: Outlook, nodes: Mapping[NodeId, Node]) -> None:
    """Where a token's time goes, and what else was thought of."""
    table = Table(title="one token of one stream", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "nodes", "blocks", "compute", "exchange", "way there"):
        table.add_column(name, justify="left" if name == "nodes" else "right")
    for index, (stage, time) in enumerate(zip(outlook.plan.stages, outlook.stages, strict=True)):
        names = " + ".join(nodes[shard.node].name for shard in stage.shards)
        spent = [f"{1e3 * seconds:.2f} ms" for seconds in (time.compute_s, time.exchange_s, time.boundary_s)]
        table.add_row(str(index), names, str(stage.blocks), *spent)
    output.print(table)
    output.print(
        f"engine, drawing and the way back: {1e3 * outlook.own_s:.2f} ms; in all {1e3 * outlook.seconds_per_token:.2f} ms", highlight=False, soft_wrap=True
    )
    for other in outlook.runners_up:
        speeds = f"{1 / other.seconds_per_token:.1f} tokens/s for one stream, {1 / other.seconds_per_token_together:.1f} together"
        output.print(f"instead: {_told(other.stages, nodes)}: {speeds}", highlight=False, soft_wrap=True)


def _told(stages: Sequence[Sequence[NodeId]], nodes: Mapping[NodeId, Node]) -> str:
    """Stages from first to last, and their ranks, by name."""
    return " > ".join(" + ".join(nodes[node].name for node in group) for group in stages)


def _json(after: Outlook, before: Outlook | None, changes: Changes, nodes: Mapping[NodeId, Node]) -> dict[str, object]:
    runners_up = [
        {
            "stages": [[nodes[node].name for node in group] for group in other.stages],
            "predicted_tokens_per_s": 1 / other.seconds_per_token,
            "predicted_together_tokens_per_s": 1 / other.seconds_per_token_together,
        }
        for other in after.runners_up
    ]
    stages = [{"compute_s": time.compute_s, "exchange_s": time.exchange_s, "boundary_s": time.boundary_s} for time in after.stages]
    change = {
        "before_tokens_per_s": before.tokens_per_s if before is not None else None,
        "before_together_tokens_per_s": before.tokens_per_s_together if before is not None else None,
        "moved_bytes": {nodes[node].name: n_bytes for node, n_bytes in after.moved_bytes.items()},
        "moving_s": after.moving_s,
    }
    return {
        **plan_json(after, nodes),
        "goal": str(after.goal),
        "streams": after.streams,
        "predicted_together_tokens_per_s": after.tokens_per_s_together,
        "prompt_tokens": after.prompt_tokens,
        "predicted_first_token_s": after.first_token_s,
        "stages": stages,
        "own_s": after.own_s,
        "why": {nodes[node].name: sentence for node, sentence in after.why.items()},
        "runners_up": runners_up,
        "change": change if changes else None,
    }
