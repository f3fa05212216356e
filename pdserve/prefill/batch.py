"""What one prefill step computes: chunks of the prompts at hand, under a token budget. Pure.

The first prompt gets what it wants up to the budget; what is left goes to the next, so that short
prompts share a step. Those that are done in it do not wait for a part of a longer one. A chunk that
does not finish its prompt ends at a block's border: only full blocks can be pushed, found again and
resumed from.

A token deep in its prompt costs more than the first, since it attends to all before it. Where
streams wait for the step, a chunk there is as much shorter, so that steps are equally long.
"""

ATTENTION_RATE = 0.67
"""How fast attention is, per multiplication, relative to linear layers; of the CPU kernels, with
768 tokens before a chunk of 64. Only the evenness of steps depends on it."""


def chunk_tokens(remaining_tokens: int, budget_tokens: int, block_tokens: int) -> int:
    """How many tokens of a prompt that starts at a block's border to compute now; perhaps 0."""
    assert remaining_tokens > 0
    if remaining_tokens <= budget_tokens:
        return remaining_tokens
    return budget_tokens // block_tokens * block_tokens


def double_cost_tokens(attention_like_linear_tokens: int) -> int:
    """With so many before it, a token takes twice as long as a prompt's first.
    ``attention_like_linear_tokens``: see ``Architecture``."""
    return max(1, round(attention_like_linear_tokens * ATTENTION_RATE))


def equal_work_tokens(budget_tokens: int, start: int, double_tokens: int, block_tokens: int) -> int:
    """How many tokens from ``start`` on take as long as ``budget_tokens`` from the beginning on, in
    whole blocks, at least one. ``double_tokens``: see ``double_cost_tokens``."""
    tokens = budget_tokens / (1 + start / double_tokens)
    return max(1, round(tokens / block_tokens)) * block_tokens


def shares_us(elapsed_us: int, chunks: tuple[int, ...]) -> tuple[int, ...]:
    """A step's time split by tokens, so that the shares of a step add up to it."""
    total = sum(chunks)
    done, shares = 0, []
    for chunk in chunks:
        shares.append(elapsed_us * (done + chunk) // total - elapsed_us * done // total)
        done += chunk
    return tuple(shares)
