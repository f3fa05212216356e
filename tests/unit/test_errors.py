"""The error tree: every class has a kind of its own, a status, and a way through a message."""

from collections.abc import Iterator

import pytest

from pdserve.errors import (
    STATUS,
    BlockMissing,
    Cancelled,
    CapacityError,
    ConfigError,
    DeadlineExceeded,
    ErrorInfo,
    FrameError,
    IllegalTransition,
    InvalidField,
    OutOfBlocks,
    PdserveError,
    PoisonRequest,
    PromptTooLong,
    QueueFull,
    RateLimited,
    RequestError,
    UnknownModel,
    UnknownRequest,
    WorkerLost,
    status_of,
)


def subclasses(cls: type[PdserveError]) -> Iterator[type[PdserveError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from subclasses(subclass)


CLASSES = sorted(
    (cls for cls in subclasses(PdserveError) if cls.__module__ == "pdserve.errors"),
    key=lambda cls: cls.__name__,
)


def bare(cls: type[PdserveError]) -> PdserveError:
    """An instance without its constructor, which some classes want arguments for."""
    error = cls.__new__(cls)
    Exception.__init__(error, "what happened")
    return error


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_has_a_status(cls: type[PdserveError]) -> None:
    status = status_of(bare(cls))
    assert 400 <= status.http < 600
    assert status.grpc.isupper()
    assert status.openai_type


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_comes_through_a_message_as_itself(cls: type[PdserveError]) -> None:
    error = bare(cls)
    error.field = "stop"
    error.retry_after_ms = 70
    back = ErrorInfo.of(error).to_error()
    assert type(back) is cls
    assert (str(back), back.field, back.retry_after_ms) == ("what happened", "stop", 70)


def test_every_class_has_a_kind_of_its_own() -> None:
    kinds = [cls.kind for cls in CLASSES]
    assert len(set(kinds)) == len(kinds)


def test_an_unknown_kind_becomes_a_plain_error() -> None:
    back = ErrorInfo("from_a_later_release", "hello").to_error()
    assert type(back) is PdserveError
    assert str(back) == "hello"


@pytest.mark.parametrize(
    ("error", "http", "grpc"),
    [
        (InvalidField("top_p", "is 2, must be in (0, 1]"), 400, "INVALID_ARGUMENT"),
        (PromptTooLong(9000, 8192), 400, "INVALID_ARGUMENT"),
        (UnknownModel("gpt", "smollm2"), 404, "NOT_FOUND"),
        (UnknownRequest("r-1"), 404, "NOT_FOUND"),
        (Cancelled("by the client"), 499, "CANCELLED"),
        (QueueFull("1024 requests wait", retry_after_ms=50), 503, "RESOURCE_EXHAUSTED"),
        (RateLimited("too often", retry_after_ms=50), 429, "RESOURCE_EXHAUSTED"),
        (PoisonRequest("cmpl-1", 2), 500, "INTERNAL"),
        (OutOfBlocks(4, 2, retry_after_ms=50), 503, "RESOURCE_EXHAUSTED"),
        (DeadlineExceeded("600 s passed"), 504, "DEADLINE_EXCEEDED"),
        (WorkerLost("5 workers died"), 503, "UNAVAILABLE"),
        (BlockMissing("k"), 503, "UNAVAILABLE"),
        (FrameError("x"), 503, "UNAVAILABLE"),
        (IllegalTransition("x"), 500, "INTERNAL"),
        (ConfigError("x"), 500, "INTERNAL"),
    ],
)
def test_what_the_borders_make_of_it(error: PdserveError, http: int, grpc: str) -> None:
    assert (status_of(error).http, status_of(error).grpc) == (http, grpc)


def test_only_what_may_pass_says_when_to_come_back() -> None:
    for cls in CLASSES:
        assert (status_of(bare(cls)).grpc == "RESOURCE_EXHAUSTED") == issubclass(cls, CapacityError)
        assert (status_of(bare(cls)).http == 429) == issubclass(cls, RateLimited)
    assert QueueFull("full", retry_after_ms=50).retry_after_ms == 50
    assert InvalidField("n", "is 0").retry_after_ms is None


def test_messages_carry_values_limit_and_way_out() -> None:
    error = PromptTooLong(9000, 8192)
    # 8192 tokens hold 8191 of a prompt and one that is generated.
    assert "8192 tokens" in str(error)
    assert "9000" in str(error)
    assert "shorten it by at least 809" in str(error)
    assert error.field == "messages"
    assert str(OutOfBlocks(4, 2, retry_after_ms=50)) == "4 blocks wanted, 2 free"
    assert str(InvalidField("n", "is 0, must be positive")) == "n: is 0, must be positive"


def test_the_table_names_the_classes_that_a_client_may_retry_never() -> None:
    clients_fault = [cls for cls in STATUS if issubclass(cls, RequestError)]
    assert all(400 <= STATUS[cls].http < 500 for cls in clients_fault)
