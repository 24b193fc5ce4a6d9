"""``yoke plan``: which node would hold what."""

import json
from pathlib import Path

import typer

from yoke.cli import options
from yoke.cli.opening import run_until_signal
from yoke.cli.render import errors, output, plan_json, plan_table, size, waiting
from yoke.core.settings import Settings
from yoke.node.local import Layout, open_coordinator, sizes, wish_of
from yoke.node.model import Model
from yoke.planner import make_plan


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan", help="Show which node would hold which part of MODEL, and what is predicted of it.")(plan)


def plan(
    model: options.Model,
    as_json: options.Json = False,
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
    layout = Layout(local_nodes=local_nodes, stages=stages, ranks=ranks, shares=options.share_numbers(shares))
    run_until_signal(_plan(model, settings, layout, as_json))


async def _plan(path: Path, settings: Settings, layout: Layout, as_json: bool) -> None:
    model = Model.open(path)
    _, cells = sizes(settings, model)
    with waiting("starting nodes and measuring them", errors.is_terminal):
        async with open_coordinator(settings, layout) as coordinator:
            nodes = {node.id: node for node in coordinator.nodes}
    outlook = make_plan(model.spec, tuple(nodes.values()), (), wish_of(settings, layout, cells))
    model.file.close()
    if as_json:
        typer.echo(json.dumps(plan_json(outlook, nodes)))
        return
    output.print(plan_table(outlook, nodes))
    for node, sentence in {**outlook.why, **outlook.left_out}.items():
        output.print(f"{sentence}, of {size(nodes[node].device.free_bytes)} that it offers", highlight=False)
