"""Flags that several commands share, made from the table of settings, and what they resolve to."""

import os
from pathlib import Path
from typing import Annotated

import typer

from yoke.core.errors import RequestError
from yoke.core.settings import Settings
from yoke.node.config import read_settings
from yoke.planner import Goal

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A GGUF file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
LocalNodes = Annotated[int, typer.Option("--local-nodes", min=1, max=64, help="Split the model over this many node processes on this machine.")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, max=64, help="Wait until this many nodes are there, this one and local ones counted.")]
Stages = Annotated[int | None, typer.Option("--stages", min=1, help="Force this many pipeline stages.")]
Ranks = Annotated[int | None, typer.Option("--ranks", min=1, help="Force this many tensor-parallel ranks in each stage.")]
Shares = Annotated[str | None, typer.Option("--shares", metavar="A:B:...", help="Relative shares of the ranks, such as 4:2:1; default is by measured speed.")]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of room for one session, prompt and answer.", show_default=False)]
Cells = Annotated[int | None, typer.Option("--cells", help="Tokens of cache for all sessions together.", show_default=False)]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Prompt tokens computed in one step.", show_default=False)]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="Compute threads of each node; default is one for each core.", show_default=False)]
Device = Annotated[str | None, typer.Option("--device", help="The chip to compute on; default is the fastest.", show_default=False)]
Backend = Annotated[str | None, typer.Option("--backend", help="What computes: ggml or reference.", show_default=False)]
CacheType = Annotated[str | None, typer.Option("--cache-type", help="Numbers in the cache: f16 or f32.", show_default=False)]
WireType = Annotated[str | None, typer.Option("--wire-type", help="Numbers that ranks exchange: float32, float16 or q8_0.", show_default=False)]
StateDir = Annotated[str | None, typer.Option("--state-dir", help="Where this node keeps its key.", show_default=False)]
Cluster = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="Plan for the machines in this file instead of measuring this one.", show_default=False)
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        "--add", metavar="NAME:...", help="With a further machine, such as 'desktop: 16 GB, 40 GB/s'; may be given several times.", show_default=False
    ),
]
Without = Annotated[list[str] | None, typer.Option("--without", metavar="NAME", help="Without this machine; may be given several times.", show_default=False)]
For = Annotated[Goal, typer.Option("--for", help="The least time for one stream's tokens, or the most tokens of many streams together.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, max=1 << 24, help="Length of the prompt whose first token is predicted.")]
Streams = Annotated[int, typer.Option("--streams", min=1, max=1024, help="Sessions at once, for what is predicted of many streams.")]
ChatTemplate = Annotated[str | None, typer.Option("--chat-template", help="A Jinja file to use instead of the model's own.", show_default=False)]


def settings(**flags: object) -> Settings:
    """Flags that were given, then environment, yoke.yaml and defaults.

    Raises
    ------
    SettingError
        if a value is wrong.
    """
    return read_settings({name: value for name, value in flags.items() if value is not None}, os.environ)


def checked_text(data: bytes) -> str:
    """Bytes from a command line or a pipe as text.

    Raises
    ------
    RequestError
        if they are no UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not text: byte {error.start} is {data[error.start]:#04x}, which is not UTF-8", field="prompt") from None


def share_numbers(shares: str | None) -> tuple[float, ...] | None:
    """``4:2:1`` as numbers.

    Raises
    ------
    typer.BadParameter
        if it is anything else.
    """
    if shares is None:
        return None
    try:
        return tuple(float(part) for part in shares.split(":"))
    except ValueError:
        raise typer.BadParameter(f"{shares!r} is not numbers with colons between them, such as 4:2:1") from None
