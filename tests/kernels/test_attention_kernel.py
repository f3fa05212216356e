"""Paged attention against its reference, and each row against itself in other company."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.model.kernels import attention
from pdserve.model.kernels.attention import paged_attention, paged_attention_reference
from tests.kernels.support import DEVICE, DTYPES, assert_near, randn


@dataclass(frozen=True)
class Case:
    """A batch and the pool it looks into. ``lengths[r]`` tokens of run r, ``contexts[r]`` seen."""

    q_NHD: torch.Tensor
    pool_P2GTD: torch.Tensor
    tables_RB: torch.Tensor
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    window: int | None = None

    def arguments(self) -> tuple[Any, ...]:
        starts = [sum(self.lengths[:r]) for r in range(len(self.lengths) + 1)]
        return (
            self.q_NHD,
            torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            self.tables_RB,
            torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE),
            self.pool_P2GTD,
            self.q_NHD.shape[2] ** -0.5,
        )

    def attend(self, *, deterministic: bool = True) -> torch.Tensor:
        return paged_attention(
            *self.arguments(),
            longest_run=max(self.lengths),
            longest_context=max(self.contexts),
            window=self.window,
            deterministic=deterministic,
        )

    def reference(self) -> torch.Tensor:
        return paged_attention_reference(*self.arguments(), window=self.window)

    def part(self, run: int, first: int, length: int) -> "Case":
        """``length`` tokens of one run, from its token ``first`` on, as a batch of their own."""
        start = sum(self.lengths[:run]) + first
        hidden = self.lengths[run] - first - length
        return replace(
            self,
            q_NHD=self.q_NHD[start : start + length],
            tables_RB=self.tables_RB[run : run + 1],
            lengths=(length,),
            contexts=(self.contexts[run] - hidden,),
        )


def case(
    runs: Sequence[tuple[int, int]],
    *,
    H: int = 4,
    G: int = 2,
    D: int = 16,
    T: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    window: int | None = None,
) -> Case:
    """Runs of (length, context). Whatever no run has written is NaN; queries and the pool are views
    with gaps."""
    generator = torch.Generator().manual_seed(seed)
    block_counts = [-(-context // T) for _, context in runs]
    P, B = sum(block_counts) + 1, max(block_counts)
    blocks = torch.randperm(P, generator=generator).int()
    pool_P2GTD = randn(P, 2, 2, G, T, D, dtype=dtype, seed=seed + 1)[:, 1]
    tables_RB = torch.zeros(len(runs), B, dtype=torch.int32)
    taken = 0
    for r, ((_, context), block_count) in enumerate(zip(runs, block_counts, strict=True)):
        tables_RB[r, :block_count] = blocks[taken : taken + block_count]
        taken += block_count
        if context % T:
            pool_P2GTD[int(tables_RB[r, block_count - 1]), :, :, context % T :] = math.nan
    pool_P2GTD[int(blocks[-1])] = math.nan
    N = sum(length for length, _ in runs)
    return Case(
        q_NHD=randn(N, H + 3, D, dtype=dtype, seed=seed + 2)[:, :H],
        pool_P2GTD=pool_P2GTD,
        tables_RB=tables_RB.to(DEVICE),
        lengths=tuple(length for length, _ in runs),
        contexts=tuple(context for _, context in runs),
        window=window,
    )


RUNS = {
    "one token of one": [(1, 1)],
    "a whole prompt": [(37, 37)],
    "exactly one tile of tokens": [(32, 32)],
    "one token more": [(33, 33)],
    "a chunk after a cached prefix": [(5, 70)],
    "decoded tokens, one split": [(1, 20), (1, 512), (1, 33)],
    "decoded tokens, several splits": [(1, 513), (1, 1024), (1, 3), (1, 512)],
    "a chunk over a split's border": [(9, 516)],
    "all kinds together": [(1, 40), (20, 20), (3, 530), (1, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_it_equals_the_reference(runs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    batch = case(runs, dtype=dtype)
    assert_near(batch.attend(), batch.reference())


@pytest.mark.parametrize("window", [1, 5, 32, 40, 600])
@pytest.mark.parametrize(
    "runs", [RUNS["decoded tokens, several splits"], RUNS["all kinds together"]], ids=len
)
def test_a_window_hides_what_the_reference_hides(runs: list[tuple[int, int]], window: int) -> None:
    batch = case(runs, window=window)
    assert_near(batch.attend(), batch.reference())
    assert_near(batch.attend(deterministic=False), batch.reference())


@pytest.mark.parametrize("run", [(1, 600), (3, 600)])
def test_what_lies_before_every_window_is_not_read(run: tuple[int, int]) -> None:
    """It may be NaN: a block that nobody can see any more may come to hold anything."""
    batch = case([run], window=40)
    clean_NHD = batch.attend()
    first_seen = run[1] - run[0] - 40 + 1
    for position in range(first_seen):
        block = int(batch.tables_RB[0, position // 16])
        batch.pool_P2GTD[block, :, :, position % 16] = math.nan
    assert torch.equal(batch.attend(), clean_NHD)


def test_a_window_as_long_as_the_context_changes_no_bit() -> None:
    batch = case([(20, 20), (3, 530), (1, 600)], dtype=torch.bfloat16)
    assert torch.equal(replace(batch, window=600).attend(), batch.attend())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("H", "G", "D", "T"),
    [
        (9, 3, 64, 16),  # SmolLM2
        (4, 4, 128, 16),  # every head has keys of its own
        (4, 1, 256, 16),  # Gemma 3
        (33, 1, 16, 16),  # one head more than a tile has rows
        (2, 1, 32, 5),  # blocks that no tile is a multiple of
        (2, 1, 16, 64),  # blocks larger than a tile
    ],
)
def test_heads_and_blocks_may_have_any_size(
    H: int, G: int, D: int, T: int, dtype: torch.dtype
) -> None:
    batch = case([(3, 40), (1, 41)], H=H, G=G, D=D, T=T, dtype=dtype)
    assert_near(batch.attend(), batch.reference())


@pytest.mark.parametrize("D", [64, 128])
def test_the_larger_tiles_of_prefill_equal_the_reference(D: int) -> None:
    batch = case([(40, 70), (1, 5)], D=D, dtype=torch.bfloat16)
    assert_near(batch.attend(deterministic=False), batch.reference())


def test_one_head_of_more_rows_than_a_tile_decodes_over_several_splits() -> None:
    batch = case([(1, 600), (1, 30)], H=33, G=1)
    assert_near(batch.attend(), batch.reference())


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("window", [None, 2, 511])
@pytest.mark.parametrize("D", [16, pytest.param(128, marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_decoded_chunked_and_in_company(
    D: int, window: int | None, dtype: torch.dtype
) -> None:
    """Goal: no bit depends on the batch, on chunk borders, or on prefill or decode.

    Method: tokens 508 to 513 of a context, which lie in two splits: in company with other runs, in
    one chunk, in chunks of 2, and alone, where the last two take decode's split path. Windows
    begin, for some of the tokens, in the second split; or in the first tile.
    """
    batch = case([(20, 20), (6, 514), (1, 600)], H=3, G=1, D=D, dtype=dtype, window=window)
    together_NHD = batch.attend()
    expected_NHD = together_NHD[20:26]
    for length in (6, 2, 1):
        for first in range(0, 6, length):
            chunk_NHD = batch.part(1, first, length).attend()
            assert torch.equal(chunk_NHD, expected_NHD[first : first + length]), (first, length)
    assert torch.equal(batch.part(2, 0, 1).attend(), together_NHD[26:])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 60)), min_size=1, max_size=4),
    heads_per_group=st.sampled_from([1, 3, 4]),
    T=st.sampled_from([4, 16]),
    seed=st.integers(0, 1000),
    window=st.none() | st.integers(1, 80),
)
def test_any_row_alone_equals_itself_in_any_batch(
    runs: list[tuple[int, int]], heads_per_group: int, T: int, seed: int, window: int | None
) -> None:
    batch = case(
        [(length, length + prefix) for length, prefix in runs],
        H=heads_per_group,
        G=1,
        T=T,
        dtype=torch.bfloat16,
        seed=seed,
        window=window,
    )
    together_NHD = batch.attend()
    assert_near(together_NHD, batch.reference())
    for run, length in enumerate(batch.lengths):
        last = sum(batch.lengths[: run + 1]) - 1
        alone_NHD = batch.part(run, length - 1, 1).attend()
        assert torch.equal(alone_NHD[0], together_NHD[last]), f"run {run}"


def test_a_looser_bound_on_lengths_changes_no_bit() -> None:
    batch = case([(1, 520), (1, 30)], dtype=torch.bfloat16)
    loose = paged_attention(*batch.arguments(), longest_run=1, longest_context=528)
    assert torch.equal(loose, batch.attend())
    loose = paged_attention(*batch.arguments(), longest_run=40, longest_context=520)
    assert torch.equal(loose, batch.attend())


def test_large_scores_do_not_overflow() -> None:
    batch = case([(3, 40)], dtype=torch.float16)
    batch = replace(batch, q_NHD=batch.q_NHD * 100)
    assert_near(batch.attend(), batch.reference())


def test_an_empty_batch_gives_an_empty_answer() -> None:
    batch = case([(1, 1)])
    nothing = replace(
        batch, q_NHD=batch.q_NHD[:0], tables_RB=batch.tables_RB[:0], lengths=(), contexts=()
    )
    out_NHD = paged_attention(*nothing.arguments(), longest_run=0, longest_context=0)
    assert out_NHD.shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (0, torch.zeros(1, 64), r"\[N, H, D\]"),
        (1, torch.zeros(3, dtype=torch.int32), r"\[R \+ 1\]"),
        (3, torch.zeros(2, dtype=torch.int32), r"contexts \[R\]"),
        (4, torch.zeros(2, 2, 2, 16, 32), "D must agree"),
        (4, torch.zeros(2, 2, 3, 16, 16), "multiple of G"),
        (4, torch.zeros(2, 2, 2, 16, 16).half(), "float16"),
        (2, torch.zeros(1, 1, dtype=torch.int64), "tables must be int32"),
        (0, torch.zeros(1, 4, 32)[:, :, ::2], "channels must be contiguous"),
        (3, torch.zeros(1, dtype=torch.int32, device="meta"), "one device"),
        (5, 0.0, "scale must be positive"),
    ],
)
def test_what_does_not_fit_together_is_refused(index: int, value: object, said: str) -> None:
    arguments: list[Any] = [
        value.cpu() if isinstance(value, torch.Tensor) else value
        for value in case([(1, 1)]).arguments()
    ]
    arguments[index] = value
    with pytest.raises(ValueError, match=said):
        paged_attention(*arguments, longest_run=1, longest_context=1)


def test_a_head_dim_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="16, 32, 64, 128 or 256, got 24"):
        case([(1, 1)], D=24).attend()


def test_a_window_that_sees_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be positive or None, got 0"):
        case([(1, 1)], window=0).attend()


@pytest.mark.parametrize(("longest_run", "longest_context"), [(2, 1), (1, 17), (-1, 1)])
def test_lengths_beyond_the_block_table_are_refused(longest_run: int, longest_context: int) -> None:
    with pytest.raises(ValueError, match="longest_run"):
        paged_attention(
            *case([(1, 1)]).arguments(), longest_run=longest_run, longest_context=longest_context
        )


def test_decode_and_prefill_share_their_tiles_unless_told_otherwise() -> None:
    for dtype in DTYPES:
        for D, windowed in itertools.product((64, 128, 256), (False, True)):
            shared = attention.prefill_tiles(dtype, D, deterministic=True, windowed=windowed)
            assert shared == attention.decode_tiles(dtype, D, windowed=windowed)
            assert attention.SPLIT_TOKENS % shared.tokens == 0
