"""``yoke bench``: prefill and decode speed of a model as it would be served, and where the time goes."""

import asyncio
import json
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from yoke.cli import options
from yoke.cli.opening import loaded_cluster, run_until_signal
from yoke.cli.render import output
from yoke.core.errors import InvariantError
from yoke.core.request import Finished, Request, Sampling, StageTimes
from yoke.core.settings import Settings
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", help="Measure how fast MODEL reads prompts and writes tokens.")(bench)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """``sessions`` at once, each with a prompt of ``prompt_tokens`` and an answer of ``decode_tokens``, measured ``runs`` times after one warm-up."""

    prompt_tokens: int
    decode_tokens: int
    sessions: int
    runs: int


def bench(
    model: options.Model,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    decode_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 128,
    sessions: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Measured runs, after one to warm up; medians are printed.")] = 5,
    as_json: options.Json = False,
    local_nodes: options.LocalNodes = 1,
    stages: options.Stages = None,
    ranks: options.Ranks = None,
    shares: options.Shares = None,
    threads: options.Threads = None,
    device: options.Device = None,
    wire_type: options.WireType = None,
    state_dir: options.StateDir = None,
) -> None:
    """Measure a model."""
    cells = -(-sessions * (prompt_tokens + decode_tokens) // 256) * 256
    context = prompt_tokens + decode_tokens
    settings = options.settings(context=context, cells=cells, threads=threads, device=device, wire_type=wire_type, state_dir=state_dir)
    layout = Layout(local_nodes=local_nodes, stages=stages, ranks=ranks, shares=options.share_numbers(shares))
    work = Workload(prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, sessions=sessions, runs=runs)
    run_until_signal(_bench(model, settings, layout, work, as_json))


async def _bench(path: Path, settings: Settings, layout: Layout, work: Workload, as_json: bool) -> None:
    async with loaded_cluster(path, settings, layout, is_shown=not as_json) as cluster:
        result = {"model": path.stem, **await measure(cluster, work)}
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(result)


async def measure(cluster: Coordinator, work: Workload) -> dict[str, object]:
    """Run a workload: medians of its speeds, and what each worker did meanwhile. The fields of ``yoke bench --json``, documented in docs/cli.md."""
    await _round(cluster, work)
    before = (await cluster.status()).stages
    rounds = [await _round(cluster, work) for _ in range(work.runs)]
    after = (await cluster.status()).stages
    return {
        **asdict(work),
        "prefill_tokens_per_s": statistics.median(prefill for prefill, _ in rounds),
        "decode_tokens_per_s": statistics.median(decode for _, decode in rounds),
        "stages": [_difference(old, new) for old, new in zip(before, after, strict=True)],
    }


async def _round(cluster: Coordinator, work: Workload) -> tuple[float, float]:
    """Tokens a second over all sessions: reading prompts, and writing after each session's first token."""
    finished = await asyncio.gather(*(_finish(cluster, work, index) for index in range(work.sessions)))
    prefill = work.sessions * work.prompt_tokens / max(f.queue_s + f.prefill_s for f in finished)
    decode = sum(f.completion_tokens - 1 for f in finished) / max(f.decode_s for f in finished)
    return prefill, decode


async def _finish(cluster: Coordinator, work: Workload, index: int) -> Finished:
    vocabulary = cluster.models()[0].vocabulary
    tokens = tuple((7 * position + 13 * index) % (vocabulary - 3) + 3 for position in range(work.prompt_tokens))
    request = Request(
        id=secrets.token_hex(8), model=cluster.models()[0].name, tokens=tokens, max_tokens=work.decode_tokens, sampling=Sampling(), ignore_eos=True
    )
    async for event in cluster.generate(request):
        if isinstance(event, Finished):
            return event
    raise InvariantError("an answer ended without a finish")


def _difference(old: StageTimes, new: StageTimes) -> dict[str, object]:
    """What a worker did between two looks."""
    numbers = {name: getattr(new, name) - getattr(old, name) for name in ("steps", "tokens", "compute_s", "collective_s", "wire_s", "waiting_s")}
    return {"stage": new.stage, "rank": new.rank, "node": new.node, **numbers}


def _print(result: dict[str, object]) -> None:
    output.print(
        f"{result['model']}: prompt of {result['prompt_tokens']} read at {result['prefill_tokens_per_s']:.1f} tokens/s, "
        f"{result['decode_tokens']} tokens written at {result['decode_tokens_per_s']:.1f} tokens/s, {result['sessions']} session(s), median of {result['runs']}",
        highlight=False,
    )
    table = Table(title="where the time went, in seconds", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ("stage", "rank", "node", "steps", "tokens", "compute_s", "collective_s", "wire_s", "waiting_s")
    for name in names:
        table.add_column(name.removesuffix("_s"), justify="right")
    stages = result["stages"]
    if isinstance(stages, Sequence):
        for stage in stages:
            table.add_row(*(f"{stage[name]:.2f}" if isinstance(stage[name], float) else str(stage[name]) for name in names))
    output.print(table)
