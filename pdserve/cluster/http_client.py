"""The few HTTP calls that our own commands make, on the standard library."""

import http.client
import json
import os
from collections.abc import Generator
from typing import Any
from urllib.parse import quote, urlsplit

from pdserve.errors import ConfigError, PdserveError
from pdserve.wire.tls import public_context

TIMEOUT_S = 600.0

KEY_VARIABLE = "PDSERVE_API_KEY"
"""Where our commands look for a key, if the gateway wants one."""


def get_json(url: str, path: str, *, timeout_s: float = 5.0) -> Any:
    """
    Raises:
        ConfigError: nothing listens at ``url``.
        PdserveError: the server refused.
    """
    return json.loads(get_text(url, path, timeout_s=timeout_s))


def get_text(url: str, path: str, *, timeout_s: float = 5.0, bytes_max: int = 16 << 20) -> str:
    """The answer's body, at most its first ``bytes_max``; errors as of ``get_json``."""
    connection = _connect(url, timeout_s)
    try:
        connection.request("GET", path, headers=_key())
        response = connection.getresponse()
        body = response.read(bytes_max).decode(errors="replace")
    except OSError as error:
        raise _nobody(url, error) from error
    finally:
        connection.close()
    if response.status != 200:
        raise PdserveError(_refusal(body))
    return body


def of_model(path: str, model: str | None) -> str:
    """``path``, asked of one model's router where there are several."""
    return path if model is None else f"{path}?model={quote(model, safe='')}"


def post_json(url: str, path: str, body: dict[str, Any]) -> Any:
    """The answer's body. Raises PdserveError where the server refused."""
    connection = _connect(url, TIMEOUT_S)
    try:
        headers = {"content-type": "application/json", **_key()}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except OSError as error:
        raise _nobody(url, error) from error
    finally:
        connection.close()
    if response.status != 200:
        raise PdserveError(_message(answer))
    return answer


def post_events(url: str, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """The server-sent events of a streamed answer, decoded, up to ``[DONE]``.

    Raises:
        PdserveError: the server refused, or broke the stream off with an error.
    """
    connection = _connect(url, TIMEOUT_S)
    try:
        connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json", **_key()}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise PdserveError(_message(json.loads(response.read())))
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise PdserveError(_message(event))
                yield event
    except OSError as error:
        raise _nobody(url, error) from error
    finally:
        connection.close()


def _connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ConfigError(f"url is {url!r}, must look like http://127.0.0.1:8000")
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=timeout_s, context=public_context()
        )
    return http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)


def _key() -> dict[str, str]:
    key = os.environ.get(KEY_VARIABLE)
    return {} if key is None else {"authorization": f"Bearer {key}"}


def _nobody(url: str, error: OSError) -> ConfigError:
    return ConfigError(f"nothing answers at {url} ({error}); is `pdserve serve` running there?")


def _refusal(text: str) -> str:
    """What an answer says that ought to be an error of ours, and may be a proxy's page."""
    try:
        return _message(json.loads(text))
    except (ValueError, AttributeError):
        return text[:500]


def _message(body: dict[str, Any]) -> str:
    return str(body.get("error", {}).get("message", body))
