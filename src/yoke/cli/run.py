"""``yoke run``: one prompt, streamed, with timings at the end."""

import json
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from yoke.cli import options
from yoke.cli.opening import loaded_cluster, run_until_signal
from yoke.cli.render import errors
from yoke.core.errors import RequestError
from yoke.core.request import Finished, Piece, Request, Sampling
from yoke.core.settings import Settings
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run", help="Continue a prompt with MODEL and print the text as it comes.")(run)


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Write at most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among this many likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens that reach this probability together.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this times the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text; default is a new one each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on when the model says that it is done.")] = False,
    as_json: options.Json = False,
    local_nodes: options.LocalNodes = 1,
    stages: options.Stages = None,
    ranks: options.Ranks = None,
    shares: options.Shares = None,
    context: options.Context = None,
    cells: options.Cells = None,
    chunk: options.Chunk = None,
    threads: options.Threads = None,
    device: options.Device = None,
    backend: options.Backend = None,
    cache_type: options.CacheType = None,
    wire_type: options.WireType = None,
    state_dir: options.StateDir = None,
) -> None:
    """Continue a prompt."""
    settings = options.settings(
        context=context,
        cells=cells,
        chunk=chunk,
        threads=threads,
        device=device,
        backend=backend,
        cache_type=cache_type,
        wire_type=wire_type,
        state_dir=state_dir,
    )
    layout = Layout(local_nodes=local_nodes, stages=stages, ranks=ranks, shares=options.share_numbers(shares))
    text = options.checked_text(sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape"))
    if not text:
        raise RequestError("the prompt is empty; expected some text after -p", field="prompt")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=secrets.randbits(32) if seed is None else seed)
    request = Request(
        id=secrets.token_hex(8), model=model.stem, text=text, max_tokens=max_tokens, sampling=sampling, stop=tuple(stop or ()), ignore_eos=ignore_eos
    )
    run_until_signal(_answer(model, settings, layout, request, as_json))


async def _answer(path: Path, settings: Settings, layout: Layout, request: Request, as_json: bool) -> None:
    async with loaded_cluster(path, settings, layout, is_shown=not as_json) as cluster:
        pieces, finished = await _stream(cluster, request, is_shown=not as_json)
    if as_json:
        typer.echo(json.dumps(answer_json(request, pieces, finished), ensure_ascii=False))
        return
    errors.print(
        f"\n[{finished.prompt_tokens} prompt tokens at {finished.prefill_tokens_per_s:.1f}/s, {finished.completion_tokens} written at "
        f"{finished.decode_tokens_per_s:.1f}/s, ended by {finished.reason}]",
        markup=False,
        highlight=False,
        style="dim",
    )


async def _stream(cluster: Coordinator, request: Request, *, is_shown: bool) -> tuple[list[Piece], Finished]:
    pieces: list[Piece] = []
    async for event in cluster.generate(request):
        if isinstance(event, Piece):
            pieces.append(event)
            if is_shown:
                typer.echo(event.text, nl=False)
        elif isinstance(event, Finished):
            return pieces, event
    raise RequestError("the answer ended without a finish; this is a fault in Yoke")


def answer_json(request: Request, pieces: list[Piece], finished: Finished) -> dict[str, object]:
    """The fields of ``yoke run --json``, documented in docs/cli.md."""
    return {
        "model": request.model,
        "text": "".join(piece.text for piece in pieces),
        "tokens": [token for piece in pieces for token in piece.tokens],
        "finish_reason": str(finished.reason),
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "seed": request.sampling.seed,
        "queue_s": finished.queue_s,
        "prefill_s": finished.prefill_s,
        "decode_s": finished.decode_s,
        "prefill_tokens_per_s": finished.prefill_tokens_per_s,
        "decode_tokens_per_s": finished.decode_tokens_per_s,
    }
