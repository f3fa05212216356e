"""Outcomes for tests, with only what a test is about."""

from collections.abc import Sequence

from bench.peers.mixed_load import Outcome


def outcome(
    kind: str = "chat",
    *,
    ttft_s: float | None = 0.1,
    gaps_s: Sequence[float] = (),
    due_s: float = 0.0,
    prompt_tokens: int = 64,
    ended_s: float = 1.0,
    tokens: int = 64,
    error: str = "",
) -> Outcome:
    return Outcome(kind, due_s, prompt_tokens, ttft_s, gaps_s, ended_s, tokens, error)
