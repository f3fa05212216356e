"""The door of the HTTP front: where there are keys, every path but the health checks and the
console's files needs one.

What changes the cluster (anything but a look below ``/cluster/``) is told to the audit log with its
outcome, keys or none. A browser sends such a request on behalf of a page of ours only: the key goes
into a header, there is no cookie that a browser would add of itself, and a page of somebody else's
is known by its ``origin``.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.cluster.gateway.access import Doorkeeper, Key, secret_of
from pdserve.cluster.http import console
from pdserve.cluster.http.errors import error_response
from pdserve.errors import Forbidden, PdserveError

OPEN_PATHS = console.PATHS | {"/health", "/ping", "/v2/health/live", "/v2/health/ready"}
ADMIN_PATHS = "/cluster/"
LOOKS = frozenset({"GET", "HEAD"})

_AUDITED = "audited"


class Access:
    """ASGI middleware; the tenant of who was let in is ``tenant_in(scope)``."""

    def __init__(self, app: ASGIApp, *, doorkeeper: Doorkeeper) -> None:
        self._app = app
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        admin, looks = scope["path"].startswith(ADMIN_PATHS), scope["method"] in LOOKS
        if not (admin or self._doorkeeper.asks_for_keys):
            await self._app(scope, receive, send)
            return
        headers, asked = Headers(scope=scope), _asked(scope)
        try:
            if admin and not looks:
                self._check_origin(headers, asked)
            key = self._doorkeeper.admit(
                secret_of(headers), admin=admin, counts=scope["method"] == "POST", asked=asked
            )
        except PdserveError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if key is not None:
            scope.setdefault("state", {})["tenant"] = key.tenant
        if admin and not looks:
            await self._act(key, asked, scope, receive, send)
            return
        if admin and key is not None:
            self._doorkeeper.audit.look(key=key.name, tenant=key.tenant, **asked)
        await self._app(scope, receive, send)

    def _check_origin(self, headers: Headers, asked: Mapping[str, str]) -> None:
        """
        Raises:
            Forbidden: a browser asks for a page that did not come from here.
        """
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            self._doorkeeper.audit.refusal(why="another site's page", origin=origin, **asked)
            raise Forbidden("A page of another site may not change this cluster")

    async def _act(
        self, key: Key | None, asked: Mapping[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        details: dict[str, str] = {}
        scope.setdefault("state", {})[_AUDITED] = details
        status = 500  # where a bug ends it before it answers

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        finally:
            self._doorkeeper.audit.action(
                key=None if key is None else key.name,
                tenant=None if key is None else key.tenant,
                status=status,
                **asked,
                **details,
            )


def note_for_audit(scope: Scope, details: Mapping[str, str]) -> None:
    """What the audit log is to say of this action besides who asked for which path."""
    scope.get("state", {}).get(_AUDITED, {}).update(details)


def tenant_in(scope: Scope) -> str | None:
    """Whose key was sent; None where none is needed."""
    state: Mapping[str, str] = scope.get("state", {})
    return state.get("tenant")


def owner_in(scope: Scope) -> str:
    """Of what is kept for who asks; empty where there are no keys, and all is everybody's."""
    return tenant_in(scope) or ""


def _asked(scope: Scope) -> dict[str, str]:
    client = scope.get("client")
    return {
        "client": client[0] if client else "",
        "method": scope["method"],
        "path": scope["path"],
    }
