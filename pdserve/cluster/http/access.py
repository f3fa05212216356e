"""The door of the HTTP front: where there are keys, every path but the health checks and the
console's files needs one."""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pdserve.cluster.access import Doorkeeper, secret_of
from pdserve.cluster.http import console
from pdserve.cluster.http.errors import error_response
from pdserve.errors import PdserveError

OPEN_PATHS = console.PATHS | {"/health", "/ping", "/v2/health/live", "/v2/health/ready"}
ADMIN_PATHS = "/cluster/"


class Access:
    """ASGI middleware; the tenant of who was let in is ``tenant_in(scope)``."""

    def __init__(self, app: ASGIApp, *, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                key = self._doorkeeper.admit(
                    secret_of(Headers(scope=scope)),
                    admin=scope["path"].startswith(ADMIN_PATHS),
                    counts=scope["method"] == "POST",
                )
            except PdserveError as error:
                await error_response(error)(scope, receive, send)
                return
            if key is not None:
                scope.setdefault("state", {})["tenant"] = key.tenant
        await self._app(scope, receive, send)


def tenant_in(scope: Scope) -> str | None:
    """Whose key was sent; None where none is needed."""
    state: Mapping[str, str] = scope.get("state", {})
    return state.get("tenant")
