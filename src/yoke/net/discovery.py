"""Finding each other on the same network by multicast DNS: a coordinator says where it answers, a newcomer looks who does.

Whoever is on the network can announce anything: what is found is a hint where to knock, and no more. Who answers there proves its key (`yoke.node.admission`).
Works without the internet. Does not notice that a machine is gone: an announcement outlives a process that was killed.

`zeroconf` is imported where it is used: that takes 0.1 s, and most commands neither announce nor look.
"""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yoke.core.errors import NodeError, UserError
from yoke.core.node import NodeId
from yoke.net.invite import DOOR_VERSION, MAX_HOSTS, check_place

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

SERVICE = "_yoke._tcp.local."
MAX_FOUND = 32
MAX_TITLE_CHARS = 40
FIND_S = 2.0
"""How long a newcomer looks: answers on a bridge came 47 to 168 ms after the question (measured, zeroconf 0.154); Wi-Fi loses some, and the question is repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A cluster that somebody announced. Nothing of this is proved. ``protocol`` is the version that it speaks at its door (`DOOR_VERSION`)."""

    id: NodeId
    title: str
    hosts: tuple[str, ...]
    port: int
    protocol: int

    def __post_init__(self) -> None:
        check_place(self.id, self.hosts, self.port)


@contextlib.asynccontextmanager
async def announced(
    node: NodeId, title: str, hosts: tuple[str, ...], port: int, *, note: Callable[[str], None], interfaces: Sequence[str] | None = None
) -> AsyncIterator[asyncio.Event]:
    """Announce a cluster for as long as the block runs. Does not hold it up: asking whether the name is free takes 1.65 s (measured).

    Parameters
    ----------
    title : what people call the cluster.
    hosts, port : where it answers; of the hosts only addresses are announced.
    note : told, in a sentence, if announcing does not work here. Nothing else depends on it.
    interfaces : addresses of the network interfaces to use; None is all.

    Yields
    ------
    An event that is set once the announcement is out, or has failed.
    """
    is_settled = asyncio.Event()
    task = asyncio.create_task(_announce((node, title, hosts, port), interfaces, note, is_settled))
    try:
        yield is_settled
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def find(seconds: float = FIND_S, *, wanted: NodeId | None = None, interfaces: Sequence[str] | None = None) -> tuple[Found, ...]:
    """The clusters that are announced on this machine's networks, by title; at most `MAX_FOUND`.

    Parameters
    ----------
    seconds : how long to look.
    wanted : a cluster to look for: it is returned as soon as it is found, and no other.
    interfaces : addresses of the network interfaces to use; None is all.

    Raises
    ------
    NodeError
        if this machine cannot look: it has no network, or none that lets it ask all others.
    """
    from zeroconf import Error, ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

    found: dict[str, Found] = {}
    is_there = asyncio.Event()
    names: asyncio.Queue[str] = asyncio.Queue(maxsize=4 * MAX_FOUND)  # what is announced beyond that is not looked at

    def changed(zeroconf: "Zeroconf", service_type: str, name: str, state_change: ServiceStateChange) -> None:
        """Somebody announces something."""
        if state_change is not ServiceStateChange.Removed:
            with contextlib.suppress(asyncio.QueueFull):
                names.put_nowait(name)

    async def resolve(zeroconf: "Zeroconf") -> None:
        """Ask after one name at a time, so that noise costs time and not room."""
        while True:
            name = await names.get()
            with contextlib.suppress(Error):  # a name that cannot be one
                info = AsyncServiceInfo(SERVICE, name)
                cluster = _read(info) if await info.async_request(zeroconf, min(seconds, 1.0) * 1000) else None
                if cluster is not None and (wanted is None or cluster.id == wanted) and len(found) < MAX_FOUND:
                    found[name] = cluster
                    if wanted is not None:
                        is_there.set()

    try:
        async with _zeroconf(interfaces) as zeroconf, AsyncServiceBrowser(zeroconf, SERVICE, handlers=[changed]):
            resolvers = [asyncio.create_task(resolve(zeroconf)) for _ in range(4)]
            try:
                async with asyncio.timeout(seconds):
                    await is_there.wait()
            except TimeoutError:
                pass
            finally:
                for resolver in resolvers:
                    resolver.cancel()
                await asyncio.gather(*resolvers, return_exceptions=True)
    except (Error, OSError, RuntimeError) as error:
        raise NodeError(f"cannot look for other machines on this network: {error}; join with an invite instead") from error
    return tuple(sorted(found.values(), key=lambda cluster: (cluster.title, cluster.id)))


async def _announce(
    cluster: tuple[NodeId, str, tuple[str, ...], int], interfaces: Sequence[str] | None, note: Callable[[str], None], is_settled: asyncio.Event
) -> None:
    from zeroconf import Error

    try:
        async with _zeroconf(interfaces) as zeroconf:
            await (await zeroconf.async_register_service(_service(*cluster), allow_name_change=True))
            is_settled.set()
            await asyncio.Event().wait()  # until cancelled; closing then takes the announcement back
    except (Error, OSError, RuntimeError) as error:
        note(f"this machine cannot be found by others on its network: {error}; let them join with an invite")
    finally:
        is_settled.set()


@contextlib.asynccontextmanager
async def _zeroconf(interfaces: Sequence[str] | None) -> AsyncIterator["Zeroconf"]:
    from zeroconf import InterfaceChoice
    from zeroconf.asyncio import AsyncZeroconf

    opened = AsyncZeroconf(interfaces=InterfaceChoice.All if interfaces is None else list(interfaces))
    try:
        yield opened.zeroconf
    finally:
        await opened.async_close()


def _service(node: NodeId, title: str, hosts: tuple[str, ...], port: int) -> "ServiceInfo":
    from zeroconf import ServiceInfo

    addresses = []
    for host in hosts:
        with contextlib.suppress(ValueError):
            addresses.append(str(ipaddress.ip_address(host)))
    return ServiceInfo(
        SERVICE,
        f"{node[:32]}.{SERVICE}",
        port=port,
        properties={"id": node, "protocol": str(DOOR_VERSION), "title": title[:MAX_TITLE_CHARS]},
        server=f"yoke-{node[:32]}.local.",
        parsed_addresses=addresses,
    )


def _read(info: "ServiceInfo") -> Found | None:
    """What an announcement says, if it can be true."""
    properties = info.properties
    try:
        return Found(
            id=NodeId(_text(properties, "id")),
            title=_printable(_text(properties, "title")),
            hosts=tuple(address.partition("%")[0] for address in info.parsed_addresses()[:MAX_HOSTS]),
            port=info.port or 0,
            protocol=int(_text(properties, "protocol")[:4]),
        )
    except (UserError, ValueError):
        return None


def _text(properties: Mapping[bytes, bytes | None], name: str) -> str:
    return (properties.get(name.encode()) or b"").decode()


def _printable(text: str) -> str:
    """A title fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_TITLE_CHARS] or "unnamed"
