"""Opening a cluster for a command: this machine's coordinator, and node processes beside it when asked for.

Local nodes are real ones: own process, own key, joined through the invite over sockets. When the coordinator ends they end, since their connection does.
"""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from yoke.backends.ggml.backend import physical_cores
from yoke.cluster.state import Policy
from yoke.core.errors import ModelError, NodeGone, SettingError
from yoke.core.settings import Settings
from yoke.net.addresses import local_addresses
from yoke.net.group import WireType
from yoke.net.identity import Identity
from yoke.node import messages as say
from yoke.node.clusterfile import ClusterFile
from yoke.node.conduct import LoadSettings
from yoke.node.config import machine_name, state_directory
from yoke.node.coordinator import Coordinator
from yoke.node.model import Model
from yoke.node.profile import Tell, silent
from yoke.planner import Wish
from yoke.run.chat import ChatTemplate

JOIN_S = 60.0
END_S = 4.0  # longer than a node gives its own worker
MAX_DEFAULT_CONTEXT = 8192
MAX_DEFAULT_CELLS = 16384
MAX_STORE_BYTES = 200 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many nodes to start here and to wait for, and what the plan shall look like.

    ``is_open`` lets other machines join; ``weight_type`` is what speeds are measured with, empty the commonest; ``by_hand`` has the plan that a person wrote.
    """

    local_nodes: int = 1
    nodes: int = 1
    is_open: bool = False
    weight_type: str = ""
    stages: int | None = None
    ranks: int | None = None
    shares: tuple[float, ...] | None = None
    by_hand: ClusterFile | None = None


@contextlib.asynccontextmanager
async def open_coordinator(
    settings: Settings, layout: Layout, on_ready: Callable[[Coordinator], None] = lambda _: None, measuring: Tell = silent
) -> AsyncIterator[Coordinator]:
    """A coordinator with all its nodes there; ``on_ready`` is called as soon as others may join.

    Raises
    ------
    YokeError
        if this machine's worker cannot start, or a local node does not come.
    """
    identity = Identity.load_or_create(state_directory(settings, os.environ))
    port = settings.cluster_port if layout.is_open or layout.local_nodes > 1 else None
    policy = Policy(patience_s=settings.patience_s, replicas=settings.replicas)
    coordinator = Coordinator(identity, start_message(settings, layout), port=port, policy=policy)
    coordinator.tell.measuring = measuring
    async with coordinator:
        on_ready(coordinator)
        async with _local_nodes(coordinator, settings, layout):
            await coordinator.wait_for(max(layout.nodes, layout.local_nodes), layout.by_hand.are_there if layout.by_hand is not None else lambda _: True)
            yield coordinator


def start_message(settings: Settings, layout: Layout) -> say.Start:
    """What a worker of this machine is told first; nodes that share a machine share its cores and memory. Others reach it only if the cluster is open."""
    n_local_nodes = layout.local_nodes
    directory = state_directory(settings, os.environ)
    threads = settings.threads or max(1, physical_cores() // n_local_nodes)
    has_own_cores = threads * n_local_nodes <= physical_cores()  # asking again and again takes time from whoever needs the same core
    return say.Start(
        state_dir=str(directory),
        name=machine_name(),
        host=settings.cluster_host or (local_addresses(1)[0] if layout.is_open else "127.0.0.1"),
        backend=settings.backend,
        library=settings.library,
        device=settings.device,
        threads=threads,
        spin_s=settings.spin_us / 1e6 if has_own_cores else 0.0,
        memory_share=settings.memory_share / n_local_nodes,
        weight_type=layout.weight_type,
        is_thorough=settings.profile == "thorough" and n_local_nodes == 1 and layout.is_open,
        store_bytes=int(settings.store_gb * 1e9) or _spare_disk(directory),
    )


def _spare_disk(directory: Path) -> int:
    """Half of the free bytes of the disk that a directory lies on, or will lie on, and at most `MAX_STORE_BYTES`."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return min(MAX_STORE_BYTES, shutil.disk_usage(existing).free // 2)


def sizes(settings: Settings, model: Model) -> tuple[int, int]:
    """Context and cells of a model: what the settings say, or what the model offers within reason.

    Raises
    ------
    SettingError
        if the context is longer than the model's, or than the cache.
    """
    context = settings.context or min(model.spec.context, MAX_DEFAULT_CONTEXT)
    if context > model.spec.context:
        raise SettingError(f"context is {context}; {model.spec.name} was made for at most {model.spec.context} tokens")
    wanted = settings.cells or max(context, min(4 * context, MAX_DEFAULT_CELLS))
    cells = -(-wanted // 256) * 256
    if cells < context:
        raise SettingError(f"cells is {settings.cells}; expected at least the context of {context} tokens")
    return context, cells


def wish_of(settings: Settings, layout: Layout, cells: int) -> Wish:
    """The planner's input from settings and layout. Nodes that were started for the purpose are all used."""
    return Wish(
        n_cells=cells,
        cache_element_bytes=2 if settings.cache_type == "f16" else 4,
        stages=layout.stages,
        ranks=layout.ranks,
        shares=layout.shares,
        chunk=min(settings.chunk, cells),
        use_all=layout.local_nodes > 1 and layout.stages is None and layout.ranks is None,
    )


def load_settings(settings: Settings, context: int, cells: int) -> LoadSettings:
    """How the plan is to run.

    Raises
    ------
    SettingError
        if the chat template's file cannot be read, or is no template.
    """
    template = None
    if settings.chat_template:
        try:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
            ChatTemplate(template, bos="", eos="")  # what is wrong with it is told here, wherever the engine will be
        except (OSError, UnicodeDecodeError, ModelError) as error:
            raise SettingError(f"chat_template {settings.chat_template!r} cannot be used: {error}") from error
    return LoadSettings(
        n_cells=cells,
        chunk=min(settings.chunk, cells),
        max_sessions=settings.max_sessions,
        context=context,
        cache_type="f16" if settings.cache_type == "f16" else "f32",
        wire_type=WireType(settings.wire_type),
        chat_template=template,
    )


@contextlib.asynccontextmanager
async def _local_nodes(coordinator: Coordinator, settings: Settings, layout: Layout) -> AsyncIterator[None]:
    """The other node processes of this machine, joined; they end with the block."""
    n_nodes = layout.local_nodes
    if n_nodes == 1:
        yield
        return
    start = start_message(settings, layout)
    flags = [
        "--threads",
        str(start.threads),
        "--memory-share",
        str(start.memory_share),
        "--backend",
        settings.backend,
        "--spin-us",
        str(round(start.spin_s * 1e6)),
        "--rejoin-s",
        "0",
        "--profile",
        "quick",
    ]
    flags += ["--library", settings.library] if settings.library else []
    with tempfile.TemporaryDirectory(prefix="yoke-nodes-") as directory:
        nodes: list[asyncio.subprocess.Process] = []
        try:
            invite = coordinator.door.invite(uses=n_nodes - 1, valid_s=JOIN_S, is_lasting=False).encode()
            for index in range(1, n_nodes):
                place = ["--state-dir", str(Path(directory) / f"node-{index}"), "--name", f"{machine_name()}-{index}", "--quiet"]
                command = [sys.executable, "-m", "yoke", "join", invite, *place, *flags]
                # In a session of their own: Ctrl-C in the terminal is for this process alone, which then ends them.
                nodes.append(await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True))
            await _all_joined(coordinator, nodes, n_nodes)
            yield
        finally:
            coordinator.wind_down()
            await asyncio.gather(*(_end(node) for node in nodes))


async def _end(node: asyncio.subprocess.Process) -> None:
    """Ask a node process to end, and kill it if it does not."""
    with contextlib.suppress(ProcessLookupError):
        node.terminate()
    try:
        async with asyncio.timeout(END_S):
            await node.wait()
    except TimeoutError:
        node.kill()
        await node.wait()


async def _all_joined(coordinator: Coordinator, nodes: list[asyncio.subprocess.Process], n_nodes: int) -> None:
    joined = asyncio.ensure_future(coordinator.wait_for(n_nodes))
    ended = [asyncio.ensure_future(node.wait()) for node in nodes]
    try:
        done, _ = await asyncio.wait([joined, *ended], timeout=JOIN_S, return_when=asyncio.FIRST_COMPLETED)
        if joined not in done:
            raise NodeGone(f"a local node {'ended' if done else 'did not come'} before it had joined; run `yoke join` by hand to see why")
    finally:
        for task in (joined, *ended):
            task.cancel()
        await asyncio.gather(joined, *ended, return_exceptions=True)
