"""``yoke convert``: a Hugging Face directory to a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from yoke.cli.render import errors, size
from yoke.core.errors import ModelError
from yoke.weights.convert import convert as convert_model


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("convert", help="Convert the Hugging Face directory HF_DIR to the GGUF file OUT.")(convert)


def convert(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A directory with config.json, safetensors and tokenizer.json.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to write.")],
    kind: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q4_0, q4_k_m, ...: how weights are stored.")] = "q8_0",
) -> None:
    """Convert a model."""
    if target.exists() and not target.is_file():
        raise ModelError(f"{target} is not a plain file; expected the name of a GGUF file to write")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        tasks = {}

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        convert_model(source, target, kind.upper(), report)
    errors.print(f"wrote {target} ({size(target.stat().st_size)})", highlight=False)
