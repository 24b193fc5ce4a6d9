"""What a person sees: tables, progress, sizes with units. Text of models goes to standard output, everything else to standard error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from yoke.core.node import Node, NodeId
from yoke.core.plan import Plan, Span
from yoke.planner import Outlook

errors = Console(stderr=True)
output = Console()


def size(n_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"


def plan_table(outlook: Outlook, nodes: Mapping[NodeId, Node]) -> Table:
    """Who holds what, narrow enough for a terminal of 80 columns."""
    plan = outlook.plan
    title = f"{plan.spec.name}: {len(plan.stages)} stage(s), plan {plan.version}, predicted {outlook.tokens_per_s:.1f} tokens/s for one stream"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("place", "node", "device", "blocks", "heads", "kv", "columns", "words", "weights"):
        table.add_column(name, justify="left" if name in {"node", "device"} else "right", no_wrap=True)
    for stage, rank, shard in plan.places():
        spans = (plan.stages[stage].blocks, shard.heads, plan.kv_heads(shard), shard.columns, shard.vocabulary)
        weights = size(plan.shard_bytes(stage, rank))
        table.add_row(f"{stage}.{rank}", nodes[shard.node].name, shard.device, *map(str, spans), weights)
    return table


def plan_json(outlook: Outlook, nodes: Mapping[NodeId, Node]) -> dict[str, object]:
    """The same for machines; ranges are half-open [start, stop)."""
    plan: Plan = outlook.plan
    shards = [
        {
            "stage": stage,
            "rank": rank,
            "node": nodes[shard.node].name,
            "node_id": shard.node,
            "device": shard.device,
            "blocks": _pair(plan.stages[stage].blocks),
            "heads": _pair(shard.heads),
            "kv_heads": _pair(plan.kv_heads(shard)),
            "columns": _pair(shard.columns),
            "vocabulary": _pair(shard.vocabulary),
            "weights_bytes": plan.shard_bytes(stage, rank),
            "memory_bytes": outlook.bytes_per_node[shard.node],
        }
        for stage, rank, shard in plan.places()
    ]
    return {
        "model": plan.spec.name,
        "version": plan.version,
        "predicted_tokens_per_s": outlook.tokens_per_s,
        "shards": shards,
        "left_out": {nodes[node].name: sentence for node, sentence in outlook.left_out.items()},
    }


def _pair(span: Span) -> list[int]:
    return [span.start, span.stop]


@contextmanager
def loading(is_shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars for loading weights, one a node, gone when done. Yields what to call with (node, bytes so far, bytes in all)."""
    columns = (TextColumn("loading"), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not is_shown) as progress:
        tasks: dict[str, TaskID] = {}

        def report(node: str, done: int, total: int) -> None:
            if node not in tasks:
                tasks[node] = progress.add_task(node, total=total)
            progress.update(tasks[node], completed=done)

        yield report


@contextmanager
def measured(is_shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A progress bar for measuring this machine, gone when done. Yields what to call with (what, share of all that is done)."""
    columns = (TextColumn("measuring this machine"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda what, share: progress.update(task, description=what, completed=share)


@contextmanager
def waiting(text: str, is_shown: bool) -> Iterator[None]:
    """A spinner with words while something that may take over a second happens."""
    if not is_shown:
        yield
        return
    with errors.status(text):
        yield
