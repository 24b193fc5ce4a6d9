"""``yoke status``: what a running server says of itself, over HTTP."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from yoke.cli import options
from yoke.cli.render import output, size
from yoke.core.errors import NodeError

TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 1 << 22


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status", help="Show nodes, plan and where the time goes of the server that runs here.")(status)


def status(
    as_json: options.Json = False,
    url: Annotated[str | None, typer.Option(help="The server's address; default is this machine's own.", show_default=False)] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key, if it has one.", show_default=False)] = None,
) -> None:
    """Show a server's state."""
    settings = options.settings(api_key=api_key)
    answer = _ask(f"{url or f'http://{settings.host}:{settings.port}'}/yoke/status", settings.api_key)
    if as_json:
        typer.echo(json.dumps(answer))
        return
    output.print(f"{len(answer['nodes'])} node(s), {answer['running']} session(s) running, {answer['queued']} waiting", highlight=False)
    if answer.get("model") is None:
        output.print("no model is being served: none is loaded, or a node that is needed is gone", highlight=False)
    for table in _tables(answer):
        output.print(table)


def _tables(status: dict[str, Any]) -> Iterator[Table]:
    """Nodes, and where each worker's time went."""
    nodes = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("node", "device", "offers", "streams"):
        nodes.add_column(name)
    for node in status["nodes"]:
        nodes.add_row(node["name"], node["device"], size(node["free_bytes"]), f"{size(node['matvec_bytes_per_s'])}/s")
    yield nodes
    times = Table(title="where the time went", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "rank", "node", "blocks", "steps", "tokens", "compute", "sums", "wire", "waiting"):
        times.add_column(name, justify="right")
    for stage in status["stages"]:
        spent = [f"{stage[name]:.1f} s" for name in ("compute_s", "collective_s", "wire_s", "waiting_s")]
        start, stop = stage["blocks"]
        times.add_row(str(stage["stage"]), str(stage["rank"]), stage["node"], f"{start}..{stop - 1}", str(stage["steps"]), str(stage["tokens"]), *spent)
    yield times


def _ask(url: str, key: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise NodeError(f"{url!r} is not an address; expected http://HOST:PORT")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310 - the scheme was checked
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            answer = json.loads(response.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        hint = "give the server's key with --api-key" if error.code == 401 else "is that `yoke serve`?"
        raise NodeError(f"{url} answered {error.code} {error.reason}; {hint}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NodeError(f"no answer from {url}: {cause}; is `yoke serve` running there?") from error
    if not isinstance(answer, dict) or not {"nodes", "stages", "running", "queued"} <= answer.keys():
        raise NodeError(f"{url} answered something else than a status; is that `yoke serve`?")
    return answer
