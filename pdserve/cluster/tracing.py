"""OpenTelemetry: one trace per client call, across gateway, router, prefill, store and decode.

    pdserve.request                     the gateway: from the call's body to its last byte
    └── pdserve.choice                  one per choice; the router's decisions are its events
        ├── pdserve.router.wait         one per decision
        ├── pdserve.prefill
        ├── pdserve.store.handoff       from the first token until decode has the blocks
        └── pdserve.decode

The gateway tells all of it when a choice has ended, from the times that router and workers measured
and that travel with the request (``messages.Timing``): nobody else exports anything, and no message
is larger for it. A request that was preempted or parked has several waits, and each has its own
span; its stretches of prefill are told as one, as long as all of them together.

Off unless the environment variable ``OTEL_TRACES_EXPORTER`` names an exporter, as it does for every
program with OpenTelemetry: ``console``, which comes with its SDK, or ``otlp`` and others, which are
packages of their own. Where somebody else has set a tracer provider in this process, that one is
used. A span belongs to the trace of the client's ``traceparent`` (W3C), if it sends one.
"""

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry import context, propagate, trace
from opentelemetry.trace import ProxyTracerProvider, SpanKind, Status, StatusCode, Tracer

from pdserve.errors import ConfigError
from pdserve.messages import Decision, Timing

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
        with _tracer.start_as_current_span("pdserve.request", kind=SpanKind.SERVER):
            yield
    finally:
        context.detach(token)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of a choice's life. Wall time in nanoseconds."""

    name: str
    began_ns: int
    ended_ns: int
    worker: str = ""


def stages_of(timing: Timing, began_ns: int, ended_ns: int) -> list[Stage]:
    """Where a choice was, in the order of the flow.

    All lies within its life, whatever other hosts' clocks said: instants outside are moved to its
    ends. Without decisions (a router of another version) the wait began with the call.
    """

    def stage(name: str, first_ns: int, last_ns: int, worker: str | None = "") -> Stage:
        first_ns = min(max(first_ns, began_ns), ended_ns)
        return Stage(name, first_ns, min(max(last_ns, first_ns), ended_ns), worker or "")

    waits = [
        (decision.at_unix_us * NS_PER_US, decision.waited_us * NS_PER_US)
        for decision in timing.decisions
    ] or [(began_ns + timing.queued_us * NS_PER_US, timing.queued_us * NS_PER_US)]
    stages = [stage("pdserve.router.wait", at_ns - waited_ns, at_ns) for at_ns, waited_ns in waits]
    dispatched_ns = waits[0][0]
    first_token_ns = dispatched_ns + timing.prefill_us * NS_PER_US
    adopted_ns = first_token_ns + timing.handoff_us * NS_PER_US
    stages.append(stage("pdserve.prefill", dispatched_ns, first_token_ns, timing.prefill))
    if timing.handoff_us:
        stages.append(stage("pdserve.store.handoff", first_token_ns, adopted_ns, timing.decode))
    stages.append(stage("pdserve.decode", adopted_ns, ended_ns, timing.decode))
    return stages


def tell_choice(said: Mapping[str, Any], timing: Timing | None, began_unix_ns: int) -> None:
    """A choice that has ended just now.

    Args:
        said: what the log would say of it.
        timing: where its time went; None where it ended before anybody measured.
    """
    if _tracer is None:
        return
    ended_unix_ns = time.time_ns()
    plain = {key: value for key, value in said.items() if isinstance(value, str | int | float)}
    span = _tracer.start_span(
        "pdserve.choice",
        start_time=began_unix_ns,
        attributes={f"pdserve.{key}": value for key, value in plain.items()},
    )
    for decision in timing.decisions if timing is not None else ():
        span.add_event(decision.reason, _attributes(decision), decision.at_unix_us * NS_PER_US)
    inside = trace.set_span_in_context(span)
    stages = stages_of(timing, began_unix_ns, ended_unix_ns) if timing is not None else ()
    for stage in stages:
        attributes = {"pdserve.worker": stage.worker} if stage.worker else {}
        part = _tracer.start_span(
            stage.name, inside, attributes=attributes, start_time=stage.began_ns
        )
        part.end(stage.ended_ns)
    if "error" in said:
        span.set_status(Status(StatusCode.ERROR, said["message"]))
    span.end(ended_unix_ns)


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
