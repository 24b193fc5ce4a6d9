"""``/yoke/nodes`` and ``/yoke/invites``: who is in the cluster, and who may come. For ``yoke nodes``; documented in docs/api.md.

Other programs of this machine may ask the API questions; changing the cluster takes the key that ``yoke serve`` leaves in its own directory.
"""

import hmac

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from yoke.core.errors import RequestError
from yoke.core.request import Cluster

ADMIN_HEADER = "x-yoke-admin"
MAX_BODY_BYTES = 4096
MAX_USES = 1000
MAX_VALID_S = 366 * 86400.0


class InviteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many machines may use an invite, and for how many seconds."""

    uses: int = 1
    valid_s: float = 86400.0


def routes(cluster: Cluster, admin_key: str | None) -> list[Route]:
    """The paths over ``cluster``; without an ``admin_key`` nothing can be changed."""

    def check(request: HttpRequest) -> None:
        given = request.headers.get(ADMIN_HEADER, "")
        if admin_key is None or not hmac.compare_digest(given.encode(), admin_key.encode()):
            raise RequestError(f"changing the cluster takes its key in the header {ADMIN_HEADER}; `yoke nodes` on the first machine has it", status=403)

    async def invite(request: HttpRequest) -> Response:
        """A new invite."""
        check(request)
        body = await _body(request)
        return _json({"invite": await cluster.invite(body.uses, body.valid_s)})

    async def code(request: HttpRequest) -> Response:
        """A new six-digit code."""
        check(request)
        return _json({"code": await cluster.open_code()})

    async def remove(request: HttpRequest) -> Response:
        """Put a machine out."""
        check(request)
        await cluster.remove(request.path_params["name"])
        return _json({"removed": request.path_params["name"]})

    return [
        Route("/yoke/invites", invite, methods=["POST"]),
        Route("/yoke/code", code, methods=["POST"]),
        Route("/yoke/nodes/{name}", remove, methods=["DELETE"]),
    ]


async def _body(request: HttpRequest) -> InviteBody:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise RequestError(f"a body of more than {MAX_BODY_BYTES} bytes; expected a small JSON object", status=413)
    try:
        body = msgspec.json.decode(data or b"{}", type=InviteBody)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what is expected: {error}") from error
    if not (1 <= body.uses <= MAX_USES and 1 <= body.valid_s <= MAX_VALID_S):
        raise RequestError(f"an invite for {body.uses} machines and {body.valid_s} s; expected 1 to {MAX_USES} machines and 1 s to a year")
    return body


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
