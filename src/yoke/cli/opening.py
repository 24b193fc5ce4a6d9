"""What every command that runs a model does first: open the cluster, wait for its nodes, plan, load."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path

from yoke.cli.render import errors, loading, measured, plan_table
from yoke.core.settings import Settings
from yoke.node.coordinator import Coordinator
from yoke.node.local import Layout, load_settings, open_coordinator, sizes, wish_of
from yoke.node.model import Model


def run_until_signal(work: Coroutine[None, None, None]) -> None:
    """Run ``work``; Ctrl-C, a polite request to end (SIGTERM) and a closed terminal (SIGHUP) cancel it, so that whatever it started is ended too."""

    async def cancellable() -> None:
        """``work`` in a task that the signal can cancel."""
        task = asyncio.current_task()
        for name in ("SIGTERM", "SIGHUP"):
            with contextlib.suppress(NotImplementedError, AttributeError):  # Windows has no such signals
                asyncio.get_running_loop().add_signal_handler(getattr(signal, name), lambda: task.cancel() if task is not None else None)
        await work

    try:
        asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.asynccontextmanager
async def loaded_cluster(
    path: Path, settings: Settings, layout: Layout, *, is_shown: bool = True, on_ready: Callable[[Coordinator], None] = lambda _: None
) -> AsyncIterator[Coordinator]:
    """A coordinator whose model is loaded on all nodes of its plan.

    Raises
    ------
    YokeError
        if the model cannot be read, fits nowhere, or a node fails.
    """
    model = Model.open(path)
    try:
        context, cells = sizes(settings, model)
        options = load_settings(settings, context, cells)
        is_terminal = is_shown and errors.is_terminal
        async with contextlib.AsyncExitStack() as stack:
            spinner = stack.enter_context(contextlib.ExitStack())
            bar = spinner.enter_context(measured(is_terminal))
            layout = replace(layout, weight_type=model.spec.weight_type)
            coordinator = await stack.enter_async_context(open_coordinator(settings, layout, on_ready, bar))
            spinner.close()
            with loading(is_terminal) as report:
                coordinator.tell.progress = report
                outlook = await coordinator.load(model, wish_of(settings, layout, cells), options, layout.by_hand)
            if is_shown and len(outlook.bytes_per_node) > 1:
                errors.print(plan_table(outlook, {node.id: node for node in coordinator.nodes}))
            for sentence in outlook.left_out.values() if is_shown else ():
                errors.print(sentence, highlight=False)
            yield coordinator
    finally:
        model.file.close()
