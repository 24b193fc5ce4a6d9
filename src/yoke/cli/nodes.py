"""``yoke nodes``: who is in the cluster; inviting and removing machines. Talks to the server that runs on this machine."""

import os
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from yoke.cli import options
from yoke.cli.qr import qr_text
from yoke.cli.render import errors, output, size
from yoke.cli.server import Client, Place, find
from yoke.core.errors import SettingError
from yoke.node.config import state_directory

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Url = Annotated[str | None, typer.Option(help="The server's address; default is the one that runs on this machine.", show_default=False)]
ApiKey = Annotated[str | None, typer.Option(help="The server's key, if it has one.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the command and its parts."""
    group = typer.Typer(help="Show who is in the cluster; invite and remove machines.", invoke_without_command=True)
    group.callback()(show)
    group.command("invite", help="Print a new invite.")(invite)
    group.command("remove", help="Put the machine NAME out, at once and for good.")(remove)
    app.add_typer(group, name="nodes")


def client(url: str | None, api_key: str | None, state_dir: str | None) -> Client:
    """The server of this machine, or the one at ``url``."""
    settings = options.settings(api_key=api_key, state_dir=state_dir)
    found = find(state_directory(settings, os.environ))
    if url is not None:
        found = Place(url.rstrip("/"), found.admin_key if found is not None and found.url == url.rstrip("/") else "")
    return Client(place=found or Place(f"http://{settings.host}:{settings.port}"), api_key=settings.api_key)


def show(context: typer.Context, url: Url = None, api_key: ApiKey = None, state_dir: options.StateDir = None) -> None:
    """A table of the machines."""
    context.obj = (url, api_key, state_dir)
    if context.invoked_subcommand is not None:
        return
    status = client(url, api_key, state_dir).ask("GET", "/yoke/status")
    places: dict[str, str] = {stage["node"]: f"stage {stage['stage']}, rank {stage['rank']}" for stage in status["stages"]}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("node", "device", "offers", "streams", "place", "notes"):
        table.add_column(name)
    for node in status["nodes"]:
        place = places.get(node["name"], "spare")
        table.add_row(node["name"], node["description"], size(node["free_bytes"]), f"{size(node['matvec_bytes_per_s'])}/s", place, "; ".join(node["notes"]))
    output.print(table)


def invite(
    context: typer.Context,
    uses: Annotated[int, typer.Option(min=1, max=1000, help="How many machines may use it.")] = 1,
    code: Annotated[bool, typer.Option("--code", help="Show six digits instead, for one machine on the same network.")] = False,
    qr: Annotated[bool, typer.Option("--qr", help="Show it as a QR code too.")] = False,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it is good for: 30m, 12h, 7d.")] = "24h",
) -> None:
    """A new invite."""
    server = client(*context.obj)
    if code:
        typer.echo(f"on the other machine, run `yoke join` and type the code {server.ask('POST', '/yoke/code')['code']}; it is good for ten minutes")
        return
    answer = server.ask("POST", "/yoke/invites", {"uses": uses, "valid_s": seconds(expires)})
    errors.print("on each other machine, run:", highlight=False)
    typer.echo(f"yoke join {answer['invite']}")
    if qr:
        errors.print(qr_text(str(answer["invite"])))


def remove(context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="What `yoke nodes` calls it.")]) -> None:
    """Put a machine out."""
    client(*context.obj).ask("DELETE", f"/yoke/nodes/{name}")
    output.print(f"{name} is removed; it needs a new invite to come back", highlight=False)


def seconds(text: str) -> float:
    """``12h`` in seconds.

    Raises
    ------
    SettingError
        if it is no number with a unit.
    """
    try:
        return float(text[:-1]) * UNITS_S[text[-1:]]
    except (ValueError, KeyError):
        raise SettingError(f"{text!r} is no length of time; expected a number and s, m, h or d, such as 30m or 12h") from None
