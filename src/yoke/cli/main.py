"""The command ``yoke``: its subcommands, and what an error becomes at the edge."""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

import yoke
from yoke.cli.render import errors
from yoke.core.errors import INTERRUPTED, YokeError

COMMANDS = ("run", "chat", "serve", "join", "leave", "nodes", "status", "plan", "doctor", "bench", "convert")

STYLE: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


class Commands(TyperGroup):
    """The subcommands, each in the module of its name, which is read when it is needed: the whole program takes half a second, ``yoke status`` a third of that."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: Any = dict.fromkeys(COMMANDS)  # what is not one of them is compared with these names

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One of them."""
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(**STYLE)
        import_module(f"yoke.cli.{cmd_name}").register(alone)
        return get_group(alone).commands[cmd_name]


app = typer.Typer(cls=Commands, no_args_is_help=True, help="The computers you own, as one machine for language models.", **STYLE)


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
