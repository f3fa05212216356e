"""One step of the model: a packed batch of token runs in, logits out, KV written on the way.

A *run* is a stretch of one sequence's tokens whose KV does not exist yet, while the KV of
everything before ``start`` lies in the run's blocks. A whole prompt, a chunk of one and one decoded
token differ in length only, and may share a step. Nothing of a run stays here between steps: the
pool has the KV, the caller the rest.

The logits of a token and the KV it leaves depend on the tokens before it and the weights alone, to
the bit, whatever shares the step; ``tests/unit/model/test_identity.py`` holds every path to it.

Shape letters as in ``ops.py``; V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.model.architecture import Architecture
from pdserve.model.graphs import DecodeGraphs, Recorder
from pdserve.model.ops import AdaptedRows, Adapter, BatchLayout, LayersTold, Ops, Stack
from pdserve.model.pool import KvPool, Pool
from pdserve.model.rope import Rope, rope_table
from pdserve.model.weights import Weights

IntArray = np.ndarray[Any, np.dtype[Any]]

READ_LOGITS_BYTES = 64 << 20
"""Of logits that exist at once where those of many tokens are read."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Looks at what the model makes of each token of a run, within the step. Nothing of it is kept,
    so what is looked at is as large as the reader makes it. On a GPU its operations are queued with
    the step's own."""

    hidden: Callable[[Tensor], None] | None = None
    """Called with [n, C], the last layer's normalised hidden states of the run's tokens."""

    logits: Callable[[Tensor], None] | None = None
    """Called with [m, V], float32, of the next m tokens of the run, until all had their turn."""


@dataclass(frozen=True, slots=True)
class Run:
    tokens: Sequence[int]
    start: int
    """Absolute position of ``tokens[0]``; everything before it has KV in ``blocks``."""

    blocks: Sequence[int]
    """Of the sequence from its beginning, at least up to the last token of this run."""

    wants_logits: bool = True
    """Of the last token; and where that is a draft, of all drafts and of the token before them."""

    draft_count: int = 0
    """How many of the last tokens are drafts: guesses, to be held against these logits."""

    adapter: str = ""
    """The digest of the adapter whose sequence this is; "": the base model's."""

    reader: Reader | None = None

    @property
    def logits_count(self) -> int:
        """Rows of logits that it gets from the step."""
        return 1 + self.draft_count if self.wants_logits else 0


class ModelRunner:
    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        ops: Ops,
        pool: Pool,
        adapters: Mapping[str, Adapter] = MappingProxyType({}),
        *,
        layers: Stack | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        before: Callable[[Sequence[Run]], None] | None = None,
        recorder: Recorder | None = None,
        recorded_rows_max: int = 64,
    ) -> None:
        """``adapters``: by their digests. ``layers`` and ``head`` are other than those of
        ``weights`` where a model is split (``parallel``); ``before`` hears of every step that will
        be computed. With a ``recorder``, which takes a ``KvPool``, steps of at most so many runs of
        one token each are recorded once and then replayed: see ``graphs``."""
        self.adapters = adapters
        self.architecture = architecture
        self.pool = pool
        self.ops = ops
        self.weights = weights
        self._device = weights.norm_C.device
        self._layers = layers or ops.stacked(weights.layers, architecture)
        self._head = head or partial(ops.linear, weight=weights.head)
        self._before = before
        self._embedding_scale = torch.tensor(
            architecture.embedding_scale, dtype=weights.norm_C.dtype, device=self._device
        )
        ropes = {kind.rope for kind in architecture.layers}
        tables = {rope: self._table_of(rope) for rope in ropes}
        self._ropes_LPD = [tables[kind.rope] for kind in architecture.layers]
        self._graphs: DecodeGraphs | None = None
        if recorder is not None:
            assert isinstance(pool, KvPool), "a split model's steps are not recorded"
            self._graphs = DecodeGraphs(
                self._through_layers,
                recorder,
                pool,
                context_tokens=architecture.context_tokens,
                rows_max=recorded_rows_max,
            )

    def calls(self) -> Mapping[str, int]:
        """How often each operation was asked for; a replayed graph counts as one of its own."""
        replayed = {} if self._graphs is None else {"graph": self._graphs.replays}
        return {**self.ops.calls(), **replayed}

    @torch.inference_mode()
    def step(
        self,
        runs: Sequence[Run],
        drawn_R: Tensor | None = None,
        told: LayersTold | None = None,
    ) -> Tensor:
        """Compute all tokens of ``runs`` and write their keys and values into the pool.

        Args:
            drawn_R: int64, on the model's device: the token of each run, in place of those in
                ``runs``, all of one token. So the host need not know what it asks for.
            told: hears how far it is. A recorded step tells nothing.

        Returns:
            [R', V] float32 on the model's device: for each run ``logits_count`` rows, those of its
            last tokens, in order.

        Raises:
            ValueError: a run is empty, leaves the context, has too few blocks or an unknown
                adapter; or one block is written by two runs. Nothing was computed.
        """
        self._check(runs)
        assert drawn_R is None or all(len(run.tokens) == 1 for run in runs), "a token each"
        assert drawn_R is None or self._before is None, "others cannot know what was drawn here"
        if self._before is not None:
            self._before(runs)
        order = sorted(range(len(runs)), key=lambda index: runs[index].adapter)
        if self._graphs is not None and self._graphs.takes(runs):
            x_NC, residual_NC = self._graphs.step(runs, drawn_R)
        else:
            packed = [runs[index] for index in order]  # so that an adapter's rows adjoin
            if drawn_R is None:
                tokens = np.concatenate([np.asarray(run.tokens, dtype=np.int64) for run in packed])
                tokens_N = self._on_device(tokens)
            else:
                is_packed = order == list(range(len(runs)))
                tokens_N = drawn_R if is_packed else drawn_R[self._on_device(np.array(order))]
            x_NC, residual_NC = self._through_layers(tokens_N, self._layout(packed), told)
        ends = np.empty(len(runs), dtype=np.int64)
        ends[order] = np.cumsum([len(runs[index].tokens) for index in order])
        for run, end in zip(runs, ends.tolist(), strict=True):
            if run.reader is not None:
                first = end - len(run.tokens)
                self._read(x_NC[first:end], residual_NC[first:end], run.reader)
        return self._logits(x_NC, residual_NC, runs, ends)

    def _through_layers(
        self, tokens_N: Tensor, batch: BatchLayout, told: LayersTold | None = None
    ) -> tuple[Tensor, Tensor]:
        embedded_NC = self.ops.embedded(tokens_N, self.weights.embedding)
        if self.architecture.embedding_scale != 1:
            embedded_NC *= self._embedding_scale
        return self._layers(embedded_NC, batch, self._ropes_LPD, self.pool.tensor, told)

    def _read(self, x_NC: Tensor, residual_NC: Tensor, reader: Reader) -> None:
        hidden_NC, _ = self.ops.add_rms_norm(
            x_NC, residual_NC, self.weights.norm_C, self.architecture.norm_eps
        )
        if reader.hidden is not None:
            reader.hidden(hidden_NC)
        if reader.logits is not None:
            # As many in each rank of a split model, whose heads work together.
            rows = max(1, READ_LOGITS_BYTES // (4 * self.architecture.vocab_size))
            for part_MC in torch.split(hidden_NC, rows):
                reader.logits(self._head(part_MC).float())

    def _logits(
        self, x_NC: Tensor, residual_NC: Tensor, runs: Sequence[Run], ends: IntArray
    ) -> Tensor:
        """``ends``: behind which row of the batch each of ``runs`` ends."""
        wanted = np.array(
            [
                row
                for end, run in zip(ends, runs, strict=True)
                for row in range(end - run.logits_count, end)
            ],
            dtype=np.int64,
        )
        if not wanted.size:
            return torch.empty((0, self.architecture.vocab_size), device=self._device)
        if not np.array_equal(wanted, np.arange(x_NC.shape[0])):
            rows = self._on_device(wanted)
            x_NC, residual_NC = x_NC[rows], residual_NC[rows]
        x_NC, _ = self.ops.add_rms_norm(
            x_NC, residual_NC, self.weights.norm_C, self.architecture.norm_eps
        )
        return self._head(x_NC).float()

    def _layout(self, runs: Sequence[Run]) -> BatchLayout:
        block_tokens = self.pool.block_tokens
        lengths_R = np.array([len(run.tokens) for run in runs])
        firsts_R = np.array([run.start for run in runs])
        starts_R1 = np.concatenate(([0], np.cumsum(lengths_R)))
        contexts_R = firsts_R + lengths_R
        tables_RB = np.zeros((len(runs), max(len(run.blocks) for run in runs)), dtype=np.int32)
        for row, run in enumerate(runs):
            tables_RB[row, : len(run.blocks)] = run.blocks
        run_N = np.repeat(np.arange(len(runs)), lengths_R)
        positions_N = np.arange(starts_R1[-1]) - starts_R1[run_N] + firsts_R[run_N]
        blocks_N = tables_RB[run_N, positions_N // block_tokens].astype(np.int64)
        return BatchLayout(
            positions_N=self._on_device(positions_N),
            slots_N=self._on_device(blocks_N * block_tokens + positions_N % block_tokens),
            starts_R1=self._on_device(starts_R1.astype(np.int32)),
            tables_RB=self._on_device(tables_RB),
            contexts_R=self._on_device(contexts_R.astype(np.int32)),
            longest_run=int(lengths_R.max()),
            longest_context=int(contexts_R.max()),
            adapted=tuple(self._adapted(runs, starts_R1.tolist())),
        )

    def _adapted(self, runs: Sequence[Run], starts: Sequence[int]) -> Iterator[AdaptedRows]:
        """``runs`` are in the order of their adapters."""
        for digest, group in groupby(range(len(runs)), key=lambda index: runs[index].adapter):
            if digest:
                members = list(group)
                first, end = starts[members[0]], starts[members[-1] + 1]
                yield AdaptedRows(first, end, self.adapters[digest])

    def _check(self, runs: Sequence[Run]) -> None:
        if not runs:
            raise ValueError("a step needs at least one run")
        limit, block_tokens = self.architecture.context_tokens, self.pool.block_tokens
        for run in runs:
            end = run.start + len(run.tokens)
            if not run.tokens or run.start < 0 or end > limit:
                raise ValueError(
                    f"a run covers positions {run.start} to {end}, must be a part of the "
                    f"{limit} that the model has"
                )
            if not 0 <= run.draft_count < len(run.tokens):
                raise ValueError(
                    f"{run.draft_count} of a run's {len(run.tokens)} tokens are drafts; a draft "
                    "follows a token that is none"
                )
            if len(run.blocks) * block_tokens < end:
                raise ValueError(
                    f"a run up to position {end} has {len(run.blocks)} blocks of {block_tokens}"
                )
            if not 0 <= min(run.blocks) <= max(run.blocks) < self.pool.block_count:
                raise ValueError(f"blocks {run.blocks} are not all in 0..{self.pool.block_count}")
            if not 0 <= min(run.tokens) <= max(run.tokens) < self.architecture.vocab_size:
                raise ValueError(f"a token is outside 0..{self.architecture.vocab_size}")
            if run.adapter and run.adapter not in self.adapters:
                raise ValueError(f"a run has the adapter {run.adapter}, which is not loaded")

    def _table_of(self, rope: Rope) -> Tensor:
        shape = self.architecture
        table = rope_table(rope, shape.head_dim, shape.context_tokens)
        return torch.from_numpy(table).to(self._device)

    def _on_device(self, array: IntArray) -> Tensor:
        host = torch.from_numpy(array)
        if self._device.type == "cuda":
            host = host.pin_memory()  # from other memory the copy would wait for the steps before
        return host.to(self._device, non_blocking=True)
