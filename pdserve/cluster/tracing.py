"""OpenTelemetry: a span per choice, with the router's decisions as its events.

Off unless the environment variable ``OTEL_TRACES_EXPORTER`` names an exporter, as it does for every
program with OpenTelemetry: ``console``, which comes with its SDK, or ``otlp`` and others, which are
packages of their own. Where somebody else has set a tracer provider in this process, that one is
used. A span belongs to the trace of the client's ``traceparent`` (W3C), if it sends one.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import Any

from opentelemetry import context, propagate, trace
from opentelemetry.trace import ProxyTracerProvider, Status, StatusCode, Tracer

from pdserve.errors import ConfigError
from pdserve.messages import Decision

EXPORTER = "OTEL_TRACES_EXPORTER"
NS_PER_US = 1000

_tracer: Tracer | None = None


def start_tracing() -> None:
    """Once per process, before the first request.

    Raises:
        ConfigError: the exporter that the environment names is not installed.
    """
    global _tracer  # noqa: PLW0603  (the provider is the process's as well)
    if isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        name = os.environ.get(EXPORTER, "none")
        if name == "none":
            return
        _provide(name)
    _tracer = trace.get_tracer("pdserve")


def _provide(name: str) -> None:
    found = [*importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)]
    if not found:
        raise ConfigError(
            f"{EXPORTER} is {name!r}, for which no exporter is installed; pip install "
            "opentelemetry-exporter-otlp for otlp, or set console or none"
        )
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get("OTEL_SERVICE_NAME", "pdserve")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(found[0].load()()))  # a bounded queue
    trace.set_tracer_provider(provider)


def is_tracing() -> bool:
    return _tracer is not None


@contextlib.contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """What is asked within belongs to the trace that the client's headers name."""
    if _tracer is None:
        yield
        return
    token = context.attach(propagate.extract(headers))
    try:
        yield
    finally:
        context.detach(token)


def tell_choice(
    said: Mapping[str, Any], decisions: tuple[Decision, ...], began_unix_ns: int
) -> None:
    """A choice that has ended just now; ``said`` is what the log would say of it."""
    if _tracer is None:
        return
    plain = {key: value for key, value in said.items() if isinstance(value, str | int | float)}
    span = _tracer.start_span(
        "pdserve.choice",
        start_time=began_unix_ns,
        attributes={f"pdserve.{key}": value for key, value in plain.items()},
    )
    for decision in decisions:
        span.add_event(decision.reason, _attributes(decision), decision.at_unix_us * NS_PER_US)
    if "error" in said:
        span.set_status(Status(StatusCode.ERROR, said["message"]))
    span.end()


def _attributes(decision: Decision) -> dict[str, str | int]:
    return {
        "pdserve.waited_us": decision.waited_us,
        "pdserve.level": decision.level,
        "pdserve.work_us": decision.work_us,
        "pdserve.cached_tokens": decision.cached_tokens,
        "pdserve.prefill_worker": decision.prefill or "",
        "pdserve.decode_worker": decision.decode or "",
        "pdserve.price_us": decision.price_us,
    }
