"""The command ``yoke``: its subcommands, and what an error becomes at the edge."""

import sys
from typing import Annotated

import typer

import yoke
from yoke.cli import bench, chat, convert, doctor, join, leave, nodes, plan, run, serve, status
from yoke.cli.render import errors
from yoke.core.errors import INTERRUPTED, YokeError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="The computers you own, as one machine for language models.",
)
for module in (run, chat, serve, join, leave, nodes, status, plan, doctor, bench, convert):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"yoke {yoke.__version__}")
        raise typer.Exit


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """The computers you own, as one machine for language models."""


def main() -> None:
    """Run a command; its error's class decides the exit code."""
    try:
        app()
    except YokeError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("stopped")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        sys.exit(INTERRUPTED)
