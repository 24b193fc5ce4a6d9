"""``yoke join``: this machine gives its hardware to a cluster."""

import contextlib
import os
from typing import Annotated

import typer
from msgspec.structs import replace

from yoke.cli import options
from yoke.cli.opening import run_until_signal
from yoke.cli.render import errors, waiting
from yoke.net.identity import Identity
from yoke.net.invite import Invite
from yoke.node.admission import knock
from yoke.node.config import state_directory
from yoke.node.local import start_message
from yoke.node.member import Listeners, serve_member
from yoke.node.messages import Ready, Start


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("join", help="Give this machine's hardware to the cluster of INVITE, until Ctrl-C.")(join)


def join(
    invite: Annotated[str, typer.Argument(metavar="INVITE", help="The line that the first machine printed.")],
    name: Annotated[str | None, typer.Option(help="What this machine is called in the others' tables.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing unless something is wrong.")] = False,
    threads: options.Threads = None,
    device: options.Device = None,
    backend: options.Backend = None,
    library: Annotated[str | None, typer.Option(help="Where ggml's shared libraries lie.", show_default=False)] = None,
    spin_us: Annotated[int | None, typer.Option(help="How long a receive asks again before it sleeps.", show_default=False)] = None,
    memory_share: Annotated[float | None, typer.Option(help="Share of the free memory that Yoke may take.", show_default=False)] = None,
    rejoin_s: Annotated[float | None, typer.Option(help="Seconds to look for a cluster that was lost.", show_default=False)] = None,
    state_dir: options.StateDir = None,
) -> None:
    """Join a cluster."""
    decoded = Invite.decode(invite)
    settings = options.settings(
        threads=threads, device=device, backend=backend, library=library, spin_us=spin_us, memory_share=memory_share, rejoin_s=rejoin_s, state_dir=state_dir
    )
    identity = Identity.load_or_create(state_directory(settings, os.environ))
    start = start_message(settings)
    if name is not None:
        start = replace(start, name=name)
    run_until_signal(_join(decoded, identity, start, settings.rejoin_s, is_shown=not quiet))


async def _join(invite: Invite, identity: Identity, start: Start, rejoin_s: float, *, is_shown: bool) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(waiting("joining and measuring this machine", is_shown and errors.is_terminal))

        def joined(ready: Ready) -> None:
            stack.close()
            if is_shown:
                errors.print(f"joined as {ready.name} with {ready.device.description} ({ready.device.name}); Ctrl-C leaves", highlight=False)

        def lost(why: str) -> None:
            errors.print(f"{why}; trying to come back", highlight=False)

        await serve_member(lambda: knock(invite, identity), start, Listeners(joined=joined, lost=lost), patience_s=rejoin_s)
    if is_shown:
        errors.print("the cluster has let this machine go", highlight=False)
