"""Answers that are made of prompts alone, whole and in one piece: embeddings, scores, decisions.

Each is an ASGI response that does all its work when it is sent: reads the body, asks prefill
workers while it listens whether its client is still there, and tells what came back, or what went
wrong. What differs is in ``ask`` and ``answer``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdserve.cluster.gateway.calls import Call, Session
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.gateway.parameters import Limits, Parameters, service_class_of, tenant_of
from pdserve.cluster.http.access import tenant_in
from pdserve.cluster.http.asking import ending_of, limits_of
from pdserve.cluster.http.bodies import read_object
from pdserve.cluster.http.errors import error_response, error_status
from pdserve.cluster.http.generation import until_gone
from pdserve.cluster.http.hints import retries_of
from pdserve.cluster.http.metrics import DISCONNECTED, FrontMetrics, Meter
from pdserve.cluster.tracing import continued
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError
from pdserve.messages import Timing


class Sent(Protocol):
    """Of every body."""

    user: str | None
    service_tier: str | None


@dataclass(frozen=True, slots=True)
class Ask:
    """A body, and what goes with it."""

    session: Session  # of the model that it names
    config: GatewayConfig
    tree: Mapping[str, Any]
    headers: Mapping[str, str]
    tenant: str | None  # whose key was sent; None where none is needed

    @property
    def limits(self) -> Limits:
        return limits_of(self.session, self.config)

    def shared(self, body: Sent, adapter: str | None) -> dict[str, Any]:
        """What all calls of a request that has come now have in common, as ``Call`` names it.

        Raises:
            InvalidField: ``service_tier`` is none.
        """
        return {
            "tenant": tenant_of(body.user) if self.tenant is None else self.tenant,
            "service_class": service_class_of(Parameters(service_tier=body.service_tier)),
            "deadline_unix_ms": ending_of(self.headers, self.config, stream=False),
            "model": self.session.model_name,
            "adapter": adapter,
            "retries": retries_of(self.headers),
        }


class Wanted(Protocol):
    @property
    def calls(self) -> Sequence[Call]: ...


WantedType = TypeVar("WantedType", bound=Wanted)


class PromptAnswer(Response, Generic[WantedType]):
    operation: ClassVar[str]  # in metrics

    def __init__(self, models: Models, config: GatewayConfig, metrics: FrontMetrics) -> None:
        super().__init__()
        self._models = models
        self._config = config
        self._metrics = metrics

    async def ask(self, asked: Ask) -> WantedType:
        """What a body wants.

        Raises:
            PdserveError: naming what of it cannot be.
        """
        raise NotImplementedError

    async def answer(self, session: Session, wanted: WantedType, meter: Meter) -> bytes:
        """The JSON that answers it."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.follow("http", self.operation) as meter:
            try:
                request = Request(scope, receive)
                tree = await read_object(request, self._config.body_bytes_max)
                session, config = self._models.asked(tree)
                asked = Ask(session, config, tree, request.headers, tenant_in(scope))
                wanted = await self.ask(asked)
                meter.calls = wanted.calls

                async def tell() -> None:
                    data = await self.answer(session, wanted, meter)
                    await Response(data, 200, None, "application/json")(scope, receive, send)

                with continued(request.headers):
                    stayed = await until_gone(receive, tell())
                meter.status = "200" if stayed else DISCONNECTED
            except ClientDisconnect:
                meter.status = DISCONNECTED
            except (PdserveError, HTTPException) as error:
                meter.status = str(error_status(error))
                await error_response(error)(scope, receive, send)


def note_usage(meter: Meter, timings: Sequence[Timing | None]) -> None:
    """What the meter's calls took, by how they ended."""
    meter.prompt_tokens = sum(len(call.prompt) for call in meter.calls)
    meter.cached_tokens = sum(timing.cached_tokens for timing in timings if timing)


def usage_of(meter: Meter) -> dict[str, Any]:
    """In OpenAI's words, of what generates nothing."""
    return {
        "prompt_tokens": meter.prompt_tokens,
        "total_tokens": meter.prompt_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": meter.cached_tokens},
    }
