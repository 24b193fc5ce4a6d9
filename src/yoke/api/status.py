"""``/yoke/status``: the cluster's state as JSON, for ``yoke status`` and for people's own tools. Its fields are documented in docs/api.md."""

from dataclasses import asdict

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from yoke.core.request import Cluster, ClusterStatus


def routes(cluster: Cluster) -> list[Route]:
    """The path over ``cluster``."""

    async def status(_: HttpRequest) -> Response:
        """The state at this moment."""
        return Response(msgspec.json.encode(status_fields(await cluster.status())), media_type="application/json")

    return [Route("/yoke/status", status, methods=["GET"])]


def status_fields(status: ClusterStatus) -> dict[str, object]:
    """A status as plain values; ranges are half-open [start, stop)."""
    plan = status.plan
    names = {node.id: node.name for node in status.nodes}
    nodes = [
        {
            "id": node.id,
            "name": node.name,
            "device": node.device.name,
            "description": node.device.description,
            "threads": node.device.threads,
            "free_bytes": node.device.free_bytes,
            "matvec_bytes_per_s": node.device.matvec_bytes_per_s,
            "notes": list(node.notes),
            "rates": [asdict(rate) for rate in node.device.rates],
        }
        for node in status.nodes
    ]
    stages = []
    if plan is not None:
        for times in status.stages:
            blocks = plan.stages[times.stage].blocks
            stages.append({**asdict(times), "blocks": [blocks.start, blocks.stop]})
    return {
        "model": plan.spec.name if plan is not None else None,
        "plan_version": plan.version if plan is not None else None,
        "running": status.running,
        "queued": status.queued,
        "nodes": nodes,
        "stages": stages,
        "links": [{**asdict(link), "source": names[link.source], "target": names[link.target]} for link in status.links],
        "phase": status.phase,
        "predicted_tokens_per_s": status.predicted_tokens_per_s,
        "news": list(status.news),
    }
