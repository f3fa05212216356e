"""Every error that can reach a user, as one tree.

    PdserveError
    ├── ConfigError            a setting cannot be used          startup stops, exit code 2
    ├── RequestError           this request cannot be served     client's fault, never retried
    │   ├── InvalidField       a field has a wrong type or value
    │   ├── PromptTooLong
    │   ├── UnknownModel
    │   ├── UnknownRequest
    │   ├── ConstraintFailed   its grammar took too much to follow, or cannot be compiled
    │   └── Cancelled          the client said so
    ├── AccessError            not for whoever asks
    │   ├── Unauthorized       no key, or none that is known
    │   └── Forbidden          the key does not reach so far
    ├── CapacityError          not now                           retry after ``retry_after_ms``
    │   ├── QueueFull
    │   ├── RateLimited        the key or the tenant asks too often
    │   └── OutOfBlocks
    ├── DeadlineExceeded       the client's own deadline passed
    ├── GatewayLeaving         the gateway ends                  another one answers
    ├── WorkerLost             a worker died more often than we retry
    ├── PoisonRequest          workers die of this request         never retried
    ├── StepFailed             a forward pass raised               its requests are tried again
    ├── AdapterMissing         a worker has other adapters than the gateway
    ├── RankLost               a process of a split worker died  the worker ends and is restarted
    ├── StoreError             the KV store let us down          fall back to recomputing
    │   ├── BlockMissing
    │   ├── ChecksumMismatch
    │   ├── CodecMismatch      blocks are written otherwise than their reader expects
    │   ├── TicketGone
    │   ├── AccessDenied       a token that does not allow it
    │   ├── StaleEpoch         whoever speaks has been replaced
    │   └── StoreUnavailable
    ├── WireError              the other side sent what it must not, or went away
    │   ├── FrameError         a frame breaks the protocol or a limit
    │   │   └── MessageTooLarge  it was not sent, and the connection lives on
    │   └── Disconnected       the peer is gone
    └── IllegalTransition      a bug in this project             crash the owner, keep the trace

A *caller's* mistake inside the project (a negative count, a tensor of the wrong shape) is none
of these: it is an ``assert`` or a ``ValueError``, and nobody catches it.

``kind`` is the word for an error on the wire and in metrics. What HTTP and gRPC make of a kind is
in ``STATUS``, the one table; borders look up, they do not decide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar


class PdserveError(Exception):
    kind: ClassVar[str] = "internal"
    field: str | None = None
    """The request field at fault, in the client's spelling; None where no field is."""
    retry_after_ms: int | None = None
    """When trying again makes sense; None where it does not."""


class ConfigError(PdserveError):
    kind = "config"


class RequestError(PdserveError):
    kind = "invalid_request"


class InvalidField(RequestError):
    kind = "invalid_field"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class ConflictingFields(InvalidField):
    """Each field is as it must be, but not beside the others."""

    kind = "conflicting_fields"


class UnusableValue(InvalidField):
    """Of the right type and size, and yet nothing can be done with it: a schema that nothing
    follows, a text that should hold JSON."""

    kind = "unusable_value"


class PromptTooLong(RequestError):
    kind = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, limit_tokens: int, *, field: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {limit_tokens} tokens, but the prompt has "
            f"{prompt_tokens} and needs room for at least one more; shorten it by at least "
            f"{prompt_tokens + 1 - limit_tokens}"
        )
        self.field = field
        self.prompt_tokens = prompt_tokens
        self.limit_tokens = limit_tokens


class UnknownModel(RequestError):
    kind = "model_not_found"

    def __init__(self, model: str, *known: str) -> None:
        serves = ", ".join(map(repr, known))
        super().__init__(f"The model {model!r} does not exist; this cluster serves {serves}")
        self.field = "model"


class UnknownRequest(RequestError):
    kind = "unknown_request"


class ConstraintFailed(RequestError):
    kind = "constraint_failed"


class Cancelled(RequestError):
    kind = "cancelled"


class AccessError(PdserveError):
    kind = "access"


class Unauthorized(AccessError):
    kind = "invalid_api_key"


class Forbidden(AccessError):
    kind = "permission_denied"


class CapacityError(PdserveError):
    kind = "capacity"

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class QueueFull(CapacityError):
    kind = "queue_full"


class RateLimited(CapacityError):
    kind = "rate_limit_exceeded"


class OutOfBlocks(CapacityError):
    kind = "out_of_blocks"

    def __init__(self, wanted: int, free: int, *, retry_after_ms: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} free", retry_after_ms=retry_after_ms)
        self.wanted = wanted
        self.free = free


class DeadlineExceeded(PdserveError):
    kind = "deadline_exceeded"


class GatewayLeaving(PdserveError):
    kind = "gateway_leaving"

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class WorkerLost(PdserveError):
    kind = "worker_lost"


class PoisonRequest(PdserveError):
    """The worker that computed this request died, and so did the next one, at the same place."""

    kind = "poison_request"
    request: str = ""

    def __init__(self, request: str, deaths: int) -> None:
        super().__init__(
            f"{deaths} workers died one after the other while they computed request {request}, "
            "none of them any further than the one before; it is not tried again. Do not resend "
            "it; report its id to the operator, whose logs name those workers"
        )
        self.request = request


class StepFailed(PdserveError):
    kind = "step_failed"


class AdapterMissing(PdserveError):
    kind = "adapter_missing"

    def __init__(self, worker: str, model: str, digest: str) -> None:
        super().__init__(
            f"{worker} has not loaded the adapter {model!r} with the files that the gateway read "
            f"(digest {digest}); give every host the same files, and restart the workers"
        )
        self.field = "model"


class RankLost(PdserveError):
    kind = "rank_lost"


class StoreError(PdserveError):
    kind = "store"


class BlockMissing(StoreError):
    kind = "block_missing"


class ChecksumMismatch(StoreError):
    kind = "checksum_mismatch"


class CodecMismatch(StoreError):
    kind = "codec_mismatch"


class TicketGone(StoreError):
    kind = "ticket_gone"


class AccessDenied(StoreError):
    kind = "access_denied"


class StaleEpoch(StoreError):
    kind = "stale_epoch"


class StoreUnavailable(StoreError):
    kind = "store_unavailable"


class WireError(PdserveError):
    kind = "wire"


class FrameError(WireError):
    kind = "frame"


class MessageTooLarge(FrameError):
    kind = "message_too_large"


class Disconnected(WireError):
    kind = "disconnected"


class IllegalTransition(PdserveError):
    kind = "illegal_transition"


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error looks at the borders."""

    http: int
    openai_type: str
    grpc: str  # a name of grpc.StatusCode


_INVALID = Status(400, "invalid_request_error", "INVALID_ARGUMENT")
_BUSY = Status(503, "server_error", "RESOURCE_EXHAUSTED")
_QUOTA = Status(429, "rate_limit_error", "RESOURCE_EXHAUSTED")
_INTERNAL = Status(500, "server_error", "INTERNAL")
_UNAVAILABLE = Status(503, "server_error", "UNAVAILABLE")

STATUS: Mapping[type[PdserveError], Status] = MappingProxyType(
    {
        PdserveError: _INTERNAL,
        ConfigError: _INTERNAL,
        RequestError: _INVALID,
        UnknownModel: Status(404, "invalid_request_error", "NOT_FOUND"),
        UnknownRequest: Status(404, "invalid_request_error", "NOT_FOUND"),
        Cancelled: Status(499, "cancelled", "CANCELLED"),
        AccessError: Status(403, "permission_error", "PERMISSION_DENIED"),
        Unauthorized: Status(401, "authentication_error", "UNAUTHENTICATED"),
        CapacityError: _BUSY,
        RateLimited: _QUOTA,
        DeadlineExceeded: Status(504, "timeout_error", "DEADLINE_EXCEEDED"),
        GatewayLeaving: _UNAVAILABLE,
        WorkerLost: _UNAVAILABLE,
        PoisonRequest: _INTERNAL,
        StepFailed: _UNAVAILABLE,
        AdapterMissing: _UNAVAILABLE,
        RankLost: _UNAVAILABLE,
        StoreError: _UNAVAILABLE,
        WireError: _UNAVAILABLE,
        MessageTooLarge: Status(413, "invalid_request_error", "INVALID_ARGUMENT"),
    }
)


NOT_AGAIN = (DeadlineExceeded, PoisonRequest)
"""Clients that would try these again by their status are told not to."""

RETRY_AFTER_MS_MAX = 120_000
"""OpenAI's clients do not obey a hint beyond that; they give up."""


def status_of(error: PdserveError) -> Status:
    """The entry of ``STATUS`` for the nearest class of ``error``."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as it travels in a message."""

    kind: str
    message: str
    field: str | None = None
    retry_after_ms: int | None = None

    @staticmethod
    def of(error: PdserveError) -> "ErrorInfo":
        return ErrorInfo(error.kind, str(error), error.field, error.retry_after_ms)

    def to_error(self) -> PdserveError:
        """The error again, of its own class; an unknown kind becomes a plain ``PdserveError``."""
        cls = _BY_KIND.get(self.kind, PdserveError)
        error = cls.__new__(cls)  # the message is complete: no constructor composes it again
        Exception.__init__(error, self.message)
        error.field = self.field
        error.retry_after_ms = self.retry_after_ms
        return error


def _subclasses(cls: type[PdserveError]) -> Iterator[type[PdserveError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


_BY_KIND = {cls.kind: cls for cls in _subclasses(PdserveError)}
