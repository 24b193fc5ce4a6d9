"""``yoke serve``: the HTTP API over a model on this machine and those that join it."""

import asyncio
import contextlib
import os
import secrets
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from yoke.api.gate import is_loopback
from yoke.api.server import bind_http, check_host, create_app, serve_http, url_of
from yoke.cli import options
from yoke.cli.opening import loaded_cluster, run_until_signal
from yoke.cli.qr import qr_text
from yoke.cli.render import errors
from yoke.cli.server import ADMIN_KEY_BYTES, left_word
from yoke.core.errors import SettingError
from yoke.core.settings import Settings
from yoke.net.discovery import announced
from yoke.node.clusterfile import ClusterFile, read_cluster
from yoke.node.config import machine_name, state_directory
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout

INVITE_USES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Ways of joining that are shown beside the invite."""

    qr: bool
    code: bool


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", help="Serve MODEL over the OpenAI API, on all machines that join.")(serve)


def serve(
    model: options.Model,
    host: Annotated[str | None, typer.Option(help="Where the HTTP API listens; other than loopback needs --api-key.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API; 0 is any.", show_default=False)] = None,
    api_key: Annotated[str | None, typer.Option(help="The key that HTTP clients must send.", show_default=False)] = None,
    cluster_host: Annotated[str | None, typer.Option(help="This machine's address for those that join; lets them.", show_default=False)] = None,
    cluster_port: Annotated[int | None, typer.Option(help="Port where machines join; 0 is any.", show_default=False)] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Let no other machine join.")] = False,
    qr: Annotated[bool, typer.Option("--qr", help="Show the invite as a QR code too.")] = False,
    code: Annotated[bool, typer.Option("--code", help="Show six digits for one machine on the same network: it runs `yoke join` alone.")] = False,
    cluster: Annotated[Path | None, typer.Option("--cluster", metavar="FILE", help="Serve by the plan by hand in this file.", show_default=False)] = None,
    nodes: options.Nodes = 1,
    local_nodes: options.LocalNodes = 1,
    stages: options.Stages = None,
    ranks: options.Ranks = None,
    shares: options.Shares = None,
    context: options.Context = None,
    cells: options.Cells = None,
    chunk: options.Chunk = None,
    threads: options.Threads = None,
    device: options.Device = None,
    cache_type: options.CacheType = None,
    wire_type: options.WireType = None,
    chat_template: options.ChatTemplate = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of each part that spare machines hold ready.", show_default=False)] = None,
    patience_s: Annotated[float | None, typer.Option(help="Seconds that answers wait for a machine to come back.", show_default=False)] = None,
    state_dir: options.StateDir = None,
) -> None:
    """Serve a model."""
    settings = options.settings(
        host=host, port=port, api_key=api_key, cluster_host=cluster_host, cluster_port=cluster_port, context=context, cells=cells, chunk=chunk,
        threads=threads, device=device, cache_type=cache_type, wire_type=wire_type, chat_template=chat_template, replicas=replicas,
        patience_s=patience_s, state_dir=state_dir,
    )  # fmt: skip
    by_hand = _by_hand(cluster) if cluster is not None else None
    if by_hand is not None:
        if stages is not None or ranks is not None or shares is not None or local_nodes > 1:
            raise typer.BadParameter("--cluster has the plan by hand; --stages, --ranks, --shares and --local-nodes make another: give one or the other")
        nodes = max(nodes, len(by_hand.planned))
        settings = replace(settings, cluster_host=settings.cluster_host or by_hand.addresses.get(by_hand.nodes[0].id, ""))
    if alone and nodes > local_nodes:
        raise typer.BadParameter(f"--alone lets no other machine join, but {nodes} nodes are to be waited for; leave one or the other away")
    is_open = not alone
    grid = options.share_numbers(shares)
    layout = Layout(local_nodes=local_nodes, nodes=nodes, is_open=is_open, stages=stages, ranks=ranks, shares=grid, by_hand=by_hand)
    run_until_signal(_serve(model, settings, layout, Shown(qr=qr, code=code)))


def _by_hand(path: Path) -> ClusterFile:
    """A file with a plan.

    Raises
    ------
    SettingError
        if it has none.
    """
    found = read_cluster(path)
    if found.layout is None:
        raise SettingError(f"{path} has no plan by hand; add one under `plan:` (docs/planner.md), or leave --cluster away: machines that join are measured")
    return found


async def _serve(path: Path, settings: Settings, layout: Layout, shown: Shown) -> None:
    check_host(settings.host, has_key=bool(settings.api_key))
    with contextlib.closing(await bind_http(settings.host, settings.port)) as bound:  # a port that is taken is told now, not after loading
        await _serve_at(bound, path, settings, layout, shown)


async def _serve_at(bound: socket.socket, path: Path, settings: Settings, layout: Layout, shown: Shown) -> None:
    """The API answers, and the cluster is found, from when others may join: `yoke nodes` makes invites and codes while machines are waited for."""
    front: asyncio.Task[None] | None = None

    def opened(cluster: Coordinator) -> None:
        nonlocal front
        front = asyncio.create_task(_front(bound, cluster, settings, is_open=layout.is_open))
        _invite(cluster, layout, shown)

    try:
        async with loaded_cluster(path, settings, layout, on_ready=opened):
            typer.echo(f"serving {path.stem} at {url_of(settings.host, bound)}")
            if front is not None:
                await front
    finally:
        if front is not None:
            front.cancel()
            await asyncio.gather(front, return_exceptions=True)


async def _front(bound: socket.socket, cluster: Coordinator, settings: Settings, *, is_open: bool) -> None:
    admin_key = secrets.token_urlsafe(ADMIN_KEY_BYTES)
    app = create_app(cluster, key=settings.api_key or None, admin_key=admin_key)
    async with contextlib.AsyncExitStack() as stack:
        if is_open and not all(map(is_loopback, (door := cluster.door).hosts)):
            await stack.enter_async_context(announced(door.node, machine_name(), door.hosts, door.port, note=_log))
        place = state_directory(settings, os.environ)
        await serve_http(app, host=settings.host, bound=bound, ready=lambda url: stack.enter_context(left_word(place, url, admin_key)))


def _log(text: str) -> None:
    errors.print(text, highlight=False)


def _invite(cluster: Coordinator, layout: Layout, shown: Shown) -> None:
    """Tell how others join, and who does."""
    cluster.tell.note = _log
    cluster.tell.joined = lambda node: errors.print(f"{node.name} joined with {node.device.description}", highlight=False)
    if layout.is_open:
        invite = cluster.door.invite(INVITE_USES, label="yoke serve").encode()
        errors.print(f"on each other machine, run (good for a day and {INVITE_USES} machines):", highlight=False)
        typer.echo(f"yoke join {invite}")
        if shown.qr:
            errors.print(qr_text(invite))
        if shown.code:
            errors.print(f"or on one machine of this network: yoke join, and the code {cluster.door.open_code()}", highlight=False)
        if layout.by_hand is not None and len(layout.by_hand.planned) > 1:
            errors.print(f"waiting for {', '.join(layout.by_hand.planned[1:])}, whom the plan by hand names", highlight=False)
        elif layout.nodes > layout.local_nodes:
            errors.print(f"waiting until {layout.nodes} nodes are there", highlight=False)
