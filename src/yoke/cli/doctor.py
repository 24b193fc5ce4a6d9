"""``yoke doctor``: what is wrong with this machine, or with its way to a coordinator, and what to do about it."""

import json
import os
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from yoke.cli import options
from yoke.cli.render import errors, output, waiting
from yoke.net.invite import Invite
from yoke.node.config import state_directory
from yoke.node.examination import examine
from yoke.node.health import Finding, Level, findings, is_well

UNWELL = 3
_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.BAD: "red"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor", help="Find out what is wrong here or with the cluster, and what to do.")(doctor)


def doctor(
    as_json: options.Json = False,
    invite: Annotated[str | None, typer.Option(help="Look at the way to the coordinator that this invite names, too.", show_default=False)] = None,
    state_dir: options.StateDir = None,
) -> None:
    """Examine this machine."""
    settings = options.settings(state_dir=state_dir)
    invited = Invite.decode(invite) if invite is not None else None
    with waiting("looking at this machine", errors.is_terminal):
        facts = examine(settings, state_directory(settings, os.environ), invited)
    found = findings(facts)
    if as_json:
        typer.echo(json.dumps({"ok": is_well(found), "findings": msgspec.to_builtins(found), "facts": msgspec.to_builtins(facts, order="deterministic")}))
    else:
        for finding in found:
            output.print(_line(finding), soft_wrap=True)
    if not is_well(found):
        raise typer.Exit(UNWELL)


def _line(finding: Finding) -> Text:
    line = Text.assemble((f"{finding.level:<4}", _STYLES[finding.level]), f"  {finding.subject}: {finding.sentence}")
    return line.append(f". {finding.remedy[:1].upper()}{finding.remedy[1:]}" if finding.remedy else "")
