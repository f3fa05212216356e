"""Decode steps as recorded graphs: a step of one token per run is one launch instead of hundreds.

A GPU works through a decode step's kernels faster than Python launches them one by one. A recorded
graph is launched as a whole, but it is rigid: the same shapes, the same launch grids, the same
addresses. So a step is rounded up to a *bucket*, of rows and of context, and has a recorded graph
for each that it ever needed; there are at most as many graphs as pairs of buckets. Its inputs are
copied to where the graph reads them.

What rounding up changes, and what not:

* Rows that only pad a batch are sequences of one token in the pool's scratch block, which nobody
  reads. All write the same there. No row sees another (``ops.Ops``).
* The bucket of context sets the grid of attention, for as many splits as its longest context has;
  those past a row's own context leave at once. Splits stand at absolute positions and are joined in
  order (``kernels.attention``), so a larger grid computes the same bits.
* Matrix products have as many rows as the bucket. Where a product's bits depend on that number, as
  they may with cuBLAS, they differ from those of the unpadded step, as they would in another batch.

``Recorder`` is all that knows CUDA. With one that merely calls what it was given, everything else
here runs anywhere.

Shape letters as in ``ops.py``; R rows of the bucket.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.ops import BatchLayout

if TYPE_CHECKING:
    from pdserve.model.pool import KvPool
    from pdserve.model.runner import Run

SMALL_ROWS = (1, 2, 4)
ROWS_STEP = 8
"""Between the larger buckets: a step pads at most seven rows."""

CONTEXT_BUCKET_MIN = 512
"""One split, for which attention needs one kernel instead of two (``kernels.attention``)."""

CONTEXT_BUCKET_RATIO = 4
"""Programs past a row's context take about a microsecond for some thousands of them, so a bucket
may be a few times too large."""

Hidden = tuple[Tensor, Tensor]
"""The last layer's output and the residual, [R, C] each."""

Work = Callable[[], Hidden]


class Recorder(Protocol):
    def record(self, work: Work) -> Work:
        """Something that does what ``work`` does, on the same inputs at the same addresses. What it
        returns is valid until anything recorded runs again."""
        ...


class CudaRecorder:
    """Graphs of one device, all in one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        # Once before: what compiles, loads or allocates for good may not do so while recording.
        current = torch.cuda.current_stream(self._device)
        aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: the mover's thread goes on copying blocks.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            hidden = work()

        def replay() -> Hidden:
            graph.replay()
            return hidden

        return replay


def row_buckets(rows_max: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, …, ``rows_max``."""
    assert rows_max > 0
    smaller = (*SMALL_ROWS, *range(ROWS_STEP, rows_max, ROWS_STEP))
    return (*takewhile(lambda rows: rows < rows_max, smaller), rows_max)


def context_buckets(context_tokens: int) -> tuple[int, ...]:
    """512, 2,048, 8,192, …, ``context_tokens``."""
    assert context_tokens > 0
    buckets, bucket = [], CONTEXT_BUCKET_MIN
    while bucket < context_tokens:
        buckets.append(bucket)
        bucket *= CONTEXT_BUCKET_RATIO
    return (*buckets, context_tokens)


def bucket_for(count: int, buckets: Sequence[int]) -> int:
    """The smallest that holds ``count``; the last of ``buckets`` must."""
    assert 0 < count <= buckets[-1], f"{count} of at most {buckets[-1]}"
    return next(bucket for bucket in buckets if count <= bucket)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where the graphs of one bucket of rows read what a step is about."""

    tokens_positions_slots_3R: Tensor  # int64
    contexts_R: Tensor  # int32
    tables_RB: Tensor  # int32; columns past a row's context hold anything
    starts_R1: Tensor  # int32: one token each


class DecodeGraphs:
    def __init__(
        self,
        compute: Callable[[Tensor, BatchLayout], Hidden],
        recorder: Recorder,
        pool: "KvPool",
        *,
        context_tokens: int,
        rows_max: int,
    ) -> None:
        """``compute`` takes tokens [R] through embedding and layers, and reads nothing back from
        the device. ``pool`` must have a scratch block."""
        self.replays = 0
        self._compute = compute
        self._recorder = recorder
        self._device = pool.tensor.device
        self._block_tokens = pool.block_tokens
        self._scratch = pool.scratch_block
        self._row_buckets = row_buckets(rows_max)
        self._context_buckets = context_buckets(context_tokens)
        self._columns = -(-context_tokens // pool.block_tokens)
        self._inputs: dict[int, _Inputs] = {}
        self._recorded: dict[tuple[int, int], Work] = {}

    def takes(self, runs: Sequence["Run"]) -> bool:
        """Whether a step of these is one of those that are recorded."""
        few = len(runs) <= self._row_buckets[-1]
        # An adapter's rows are not part of a graph's inputs.
        return few and all(len(run.tokens) == 1 and not run.adapter for run in runs)

    def step(self, runs: Sequence["Run"], tokens_R: Tensor | None = None) -> Hidden:
        """What ``compute`` gives for ``runs``, which must be as ``takes`` says; valid until the
        next call. ``tokens_R``, on the device, stands for the runs' own tokens.

        Raises:
            ConfigError: the step could not be recorded.
        """
        rows = bucket_for(len(runs), self._row_buckets)
        context = bucket_for(1 + max(run.start for run in runs), self._context_buckets)
        inputs = self._inputs_of(rows)
        self._fill(inputs, runs, tokens_R)
        work = self._recorded.get((rows, context))
        if work is None:
            work = self._recorded[rows, context] = self._record(inputs, context)
        hidden_RC, residual_RC = work()
        self.replays += 1
        return hidden_RC[: len(runs)], residual_RC[: len(runs)]

    def _inputs_of(self, rows: int) -> _Inputs:
        if rows not in self._inputs:

            def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=self._device)

            self._inputs[rows] = _Inputs(
                tokens_positions_slots_3R=zeros(3, rows, dtype=torch.int64),
                contexts_R=zeros(rows),
                tables_RB=zeros(rows, self._columns),
                starts_R1=torch.arange(rows + 1, dtype=torch.int32, device=self._device),
            )
        return self._inputs[rows]

    def _fill(self, inputs: _Inputs, runs: Sequence["Run"], tokens_R: Tensor | None) -> None:
        """Every row is written, those that pad too: they may have been real a step ago."""
        rows, block_tokens = len(inputs.contexts_R), self._block_tokens
        columns = max(run.start for run in runs) // block_tokens + 1
        numbers_3R = self._host(3, rows, dtype=torch.int64)
        contexts_R = self._host(rows)
        tables_RB = self._host(rows, columns)
        numbers, contexts, tables = (t.numpy() for t in (numbers_3R, contexts_R, tables_RB))
        numbers[:2], numbers[2] = 0, self._scratch * block_tokens
        contexts[:], tables[:] = 1, self._scratch
        for row, run in enumerate(runs):
            blocks = run.blocks[: run.start // block_tokens + 1]
            slot = blocks[-1] * block_tokens + run.start % block_tokens
            numbers[:, row] = run.tokens[0], run.start, slot
            contexts[row] = run.start + 1
            tables[row, : len(blocks)] = blocks
        inputs.tokens_positions_slots_3R.copy_(numbers_3R, non_blocking=True)
        inputs.contexts_R.copy_(contexts_R, non_blocking=True)
        # In two pieces: what crosses the bus must be one stretch of memory.
        inputs.tables_RB[:, :columns] = tables_RB.to(self._device, non_blocking=True)
        if tokens_R is not None:
            inputs.tokens_positions_slots_3R[0, : len(runs)] = tokens_R

    def _host(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Pinned where there is a GPU, and then not given out again while a copy reads it: torch's
        allocator sees to that."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")

    def _record(self, inputs: _Inputs, context: int) -> Work:
        tokens_R, positions_R, slots_R = inputs.tokens_positions_slots_3R.unbind()
        batch = BatchLayout(
            positions_N=positions_R,
            slots_N=slots_R,
            starts_R1=inputs.starts_R1,
            tables_RB=inputs.tables_RB,
            contexts_R=inputs.contexts_R,
            longest_run=1,
            longest_context=context,
        )
        try:
            return self._recorder.record(lambda: self._compute(tokens_R, batch))
        except RuntimeError as error:
            raise ConfigError(
                f"a decode step of {len(tokens_R)} rows could not be recorded as a CUDA graph: "
                f"{error}; set model.cuda_graphs to off, or leave the GPU more memory"
            ) from error
