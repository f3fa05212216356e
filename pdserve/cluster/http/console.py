"""The console's files. They hold no figures, so they are open; what they ask for is not."""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

PAGE = "/console"

_TYPES = {
    "console.css": "text/css; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "figures.js": "text/javascript; charset=utf-8",
}

PATHS = frozenset({PAGE, *(f"{PAGE}/{name}" for name in _TYPES)})

_HEADERS = {
    # Nothing from elsewhere, nowhere to send things to, and in nobody's frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_console(app: FastAPI) -> None:
    _add_file(app, PAGE, "index.html", "text/html; charset=utf-8")
    for name, media_type in _TYPES.items():
        _add_file(app, f"{PAGE}/{name}", name, media_type)


def _add_file(app: FastAPI, path: str, name: str, media_type: str) -> None:
    content = files("pdserve.cluster.console").joinpath(name).read_bytes()

    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)
