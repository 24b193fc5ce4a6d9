"""``yoke leave``: the ``yoke join`` that runs on this machine hands over, and ends.

The two meet in the state directory: a file says which process has joined, another that it is asked to go. That works alike on every system.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import typer

from yoke.cli import options
from yoke.cli.render import errors, waiting
from yoke.core.errors import NodeError, SettingError
from yoke.node.config import state_directory
from yoke.node.member import LEAVE_S

HERE, ASKED = "joined.pid", "leave"
LOOK_S = 0.2


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("leave", help="Let the cluster manage without this machine, then go.")(leave)


def leave(state_dir: options.StateDir = None) -> None:
    """Leave the cluster."""
    directory = state_directory(options.settings(state_dir=state_dir), os.environ)
    process = joined_process(directory)
    if process is None:
        raise SettingError("this machine has joined no cluster: no `yoke join` runs with this state directory")
    (directory / ASKED).touch()
    with waiting("the cluster makes do without this machine", errors.is_terminal):
        stop = time.monotonic() + LEAVE_S + 10
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > stop:
                raise NodeError(f"process {process.pid} was asked to leave, but still runs; end it with Ctrl-C")
            time.sleep(LOOK_S)
    errors.print("left", highlight=False)


def joined_process(directory: Path) -> psutil.Process | None:
    """The process that has joined from this state directory, if it still runs."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        pid, begun = (directory / HERE).read_text().split()
        process = psutil.Process(int(pid))
        if f"{process.create_time():.2f}" == begun:
            return process
    return None


@contextlib.contextmanager
def present(directory: Path) -> Iterator[None]:
    """Leave word that this process has joined.

    Raises
    ------
    SettingError
        if the directory cannot be written.
    """
    own = psutil.Process()
    try:
        (directory / ASKED).unlink(missing_ok=True)
        (directory / HERE).write_text(f"{own.pid} {own.create_time():.2f}")
    except OSError as error:
        raise SettingError(f"cannot write to {directory}: {error}") from error
    try:
        yield
    finally:
        for name in (HERE, ASKED):
            with contextlib.suppress(OSError):
                (directory / name).unlink(missing_ok=True)


async def until_asked(directory: Path) -> None:
    """Wait until somebody wants this machine to leave."""
    while True:
        if (directory / ASKED).exists():
            return
        await asyncio.sleep(LOOK_S)
