"""``yoke join``: this machine gives its hardware to a cluster."""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from yoke.cli import options
from yoke.cli.leave import present, until_asked
from yoke.cli.opening import run_until_signal
from yoke.cli.render import errors, measured, waiting
from yoke.core.errors import SettingError
from yoke.core.node import NodeId
from yoke.net.discovery import FIND_S, Found, find
from yoke.net.identity import Identity
from yoke.net.invite import Invite
from yoke.node.config import state_directory
from yoke.node.joining import First, Place, Way, by_code, by_invite
from yoke.node.local import Layout, start_message
from yoke.node.member import Listeners, serve_member
from yoke.node.membership import remembered
from yoke.node.messages import Ready, Start


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("join", help="Give this machine's hardware to a cluster, until Ctrl-C.")(join)


def join(
    invite: Annotated[str | None, typer.Argument(metavar="[INVITE]", help="The line that the first machine printed; without it, see --code.")] = None,
    code: Annotated[
        str | None, typer.Option(metavar="DIGITS", help="The six digits that a machine on this network shows. Without this and INVITE: the last cluster.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What this machine is called in the others' tables.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing unless something is wrong.")] = False,
    threads: options.Threads = None,
    device: options.Device = None,
    backend: options.Backend = None,
    library: Annotated[str | None, typer.Option(help="Where ggml's shared libraries lie.", show_default=False)] = None,
    spin_us: Annotated[int | None, typer.Option(help="How long a receive asks again before it sleeps.", show_default=False)] = None,
    memory_share: Annotated[float | None, typer.Option(help="Share of the free memory that Yoke may take.", show_default=False)] = None,
    profile: Annotated[str | None, typer.Option(help="What is measured first: thorough or quick.", show_default=False)] = None,
    rejoin_s: Annotated[float | None, typer.Option(help="Seconds to look for a cluster that was lost.", show_default=False)] = None,
    state_dir: options.StateDir = None,
) -> None:
    """Join a cluster."""
    settings = options.settings(
        threads=threads,
        device=device,
        backend=backend,
        library=library,
        spin_us=spin_us,
        memory_share=memory_share,
        profile=profile,
        rejoin_s=rejoin_s,
        state_dir=state_dir,
    )
    directory = state_directory(settings, os.environ)
    decoded = Invite.decode(invite) if invite is not None else None
    identity = Identity.load_or_create(directory)
    start = start_message(settings, Layout(is_open=True))
    if name is not None:
        start = replace(start, name=name)
    run_until_signal(_join(_Wanted(decoded, code, directory), identity, start, settings.rejoin_s, is_shown=not quiet))


class _Wanted:
    """How this machine is to come in: with an invite, with a code, or back to where it was."""

    def __init__(self, invite: Invite | None, code: str | None, directory: Path) -> None:
        self.invite, self.code, self.directory = invite, code, directory

    async def first(self, identity: Identity) -> First | None:
        """None goes back to the cluster that is remembered."""
        if self.invite is not None:
            return by_invite(self.invite, identity)
        if self.code is None and remembered(self.directory) is not None:
            return None
        with waiting("looking for a cluster on this network", errors.is_terminal):
            found = await find(FIND_S)
        there = _choose(found)
        code = self.code or typer.prompt(f"{there.title} was found; the six digits that it shows (`yoke nodes invite --code` there)", err=True)
        return by_code(code.replace(" ", ""), there.hosts, there.port, identity)


def _choose(found: tuple[Found, ...]) -> Found:
    if not found:
        raise SettingError("no cluster was found on this network; run `yoke serve MODEL` on the first machine, or give its invite: yoke join INVITE")
    if len(found) == 1:
        return found[0]
    for number, cluster in enumerate(found, 1):
        errors.print(f"{number}: {cluster.title} at {', '.join(cluster.hosts)} port {cluster.port}", highlight=False)
    number = int(typer.prompt("which one", type=int, default=1, err=True))
    if not 1 <= number <= len(found):
        raise SettingError(f"there is no number {number}; expected 1 to {len(found)}")
    return found[number - 1]


async def _look(node: NodeId) -> Place | None:
    """Where a coordinator that is not where it was announces itself now."""
    for there in await find(FIND_S, wanted=node):
        return Place(node=there.id, hosts=there.hosts, port=there.port)
    return None


async def _join(wanted: _Wanted, identity: Identity, start: Start, rejoin_s: float, *, is_shown: bool) -> None:
    way = Way(identity, wanted.directory, await wanted.first(identity), look=_look)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(contextlib.ExitStack())
        measuring = bar.enter_context(measured(is_shown and errors.is_terminal))

        def joined(ready: Ready) -> None:
            bar.close()
            if is_shown:
                errors.print(f"joined as {ready.name} with {ready.device.description} ({ready.device.name}); Ctrl-C leaves", highlight=False)

        def lost(why: str) -> None:
            if is_shown:
                errors.print(f"{why}; trying to come back", highlight=False)

        stack.enter_context(present(wanted.directory))
        member = asyncio.ensure_future(serve_member(way, start, Listeners(measuring=measuring, joined=joined, lost=lost), patience_s=rejoin_s))
        asked = asyncio.ensure_future(until_asked(wanted.directory))
        try:
            await asyncio.wait([member, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not member.done():
                member.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await member
    if is_shown:
        errors.print("the cluster has let this machine go", highlight=False)
