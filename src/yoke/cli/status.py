"""``yoke status``: what a running server says of itself, once or again and again."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from yoke.cli import options
from yoke.cli.nodes import ApiKey, Url, client
from yoke.cli.render import output, size
from yoke.core.errors import NodeError
from yoke.core.node import Device, Link, Node, NodeId, Rate
from yoke.node.clusterfile import write_cluster

REFRESH_S = 1.0
NEWS_SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status", help="Show nodes, links, plan and where the time goes.")(status)


def status(
    as_json: options.Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it, until Ctrl-C.")] = False,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write machines and links as a file for `yoke plan --cluster`.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    state_dir: options.StateDir = None,
) -> None:
    """Show a server's state."""
    server = client(url, api_key, state_dir)

    def ask() -> dict[str, Any]:
        answer = server.ask("GET", "/yoke/status")
        if not {"nodes", "stages", "running", "queued"} <= answer.keys():
            raise NodeError(f"{server.place.url} answered something else than a status; is that `yoke serve`?")
        return answer

    answer = ask()
    if export is not None:
        write_cluster(export, *_machines(answer))
        output.print(f"wrote {export}", highlight=False)
    elif as_json:
        typer.echo(json.dumps(answer))
    elif not watch:
        output.print(_picture(answer, None))
    else:
        _watch(ask, answer)


def _machines(status: dict[str, Any]) -> tuple[list[Node], list[Link]]:
    """Machines and links as the planner takes them, speeds as the server gives them."""
    nodes = [
        Node(
            id=NodeId(node["id"]),
            name=node["name"],
            device=Device(
                name=node["device"],
                description=node["description"],
                backend="",
                free_bytes=node["free_bytes"],
                matvec_bytes_per_s=node["matvec_bytes_per_s"],
                threads=node["threads"],
                rates=tuple(Rate(**rate) for rate in node["rates"]),
            ),
            measured_at=time.time(),
        )
        for node in status["nodes"]
    ]
    ids = {node.name: node.id for node in nodes}
    return nodes, [Link(**{**link, "source": ids[link["source"]], "target": ids[link["target"]]}) for link in status["links"]]


def _watch(ask: Any, answer: dict[str, Any]) -> None:
    with Live(_picture(answer, None), console=output, screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_S)
            before, answer = answer, ask()
            live.update(_picture(answer, before), refresh=True)


def _picture(status: dict[str, Any], before: dict[str, Any] | None) -> Group:
    """Everything on one screen; with what was a moment ago, speeds are of the time between."""
    predicted = status.get("predicted_tokens_per_s")
    head = f"{status.get('phase') or 'running'}: {len(status['nodes'])} node(s), {status['running']} session(s) running, {status['queued']} waiting"
    if status.get("model") is None:
        head += "; no model is being served: none is loaded, or a node that is needed is gone"
    else:
        head += f"; {status['model']}, plan {status['plan_version']}"
        head += f", predicted {predicted:.1f} tokens/s for one stream" if predicted else ""
    news = [Text(f"- {line}") for line in status.get("news", ())[-NEWS_SHOWN:]]
    return Group(Text(head), *_tables(status, before), *news)


def _tables(status: dict[str, Any], before: dict[str, Any] | None) -> Iterator[Table]:
    """Nodes, links, and where each worker's time went."""
    nodes = _table("", "node", "device", "offers", "streams", "notes")
    for node in status["nodes"]:
        nodes.add_row(node["name"], node["device"], size(node["free_bytes"]), f"{size(node['matvec_bytes_per_s'])}/s", "; ".join(node.get("notes", ())))
    yield nodes
    if status.get("links"):
        links = _table("links", "from", "to", "round trip", "bandwidth")
        for link in status["links"]:
            links.add_row(link["source"], link["target"], f"{1e3 * link['rtt_s']:.2f} ms", f"{size(link['bandwidth_bytes_per_s'])}/s")
        yield links
    times = _table("where the time went", "place", "node", "blocks", "tokens", "tokens/s", "compute", "sums", "wire", "waiting")
    for index, stage in enumerate(status["stages"]):
        old = before["stages"][index] if before is not None and index < len(before["stages"]) else None
        is_same = old is not None and (old["node"], before is not None and before["plan_version"]) == (stage["node"], status["plan_version"])
        since = {name: stage[name] - (old[name] if old is not None and is_same else 0) for name in _CLOCKS}
        spent = sum(since[name] for name in _CLOCKS[1:])
        shares = [f"{since[name]:.1f} s {since[name] / spent:4.0%}" if spent > 0 else "-" for name in _CLOCKS[1:]]
        speed = f"{since['tokens'] / REFRESH_S:.1f}" if is_same else "-"
        start, stop = stage["blocks"]
        times.add_row(f"{stage['stage']}.{stage['rank']}", stage["node"], f"{start}..{stop - 1}", str(stage["tokens"]), speed, *shares)
    yield times


_CLOCKS = ("tokens", "compute_s", "collective_s", "wire_s", "waiting_s")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column)
    return table
