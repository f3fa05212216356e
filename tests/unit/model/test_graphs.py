"""Recorded decode steps: buckets, padding, the same bits; and what is asked of CUDA."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model import graphs, load
from pdserve.model.families.registry import read_architecture
from pdserve.model.graphs import (
    CudaRecorder,
    DecodeGraphs,
    Hidden,
    Work,
    bucket_for,
    context_buckets,
    row_buckets,
)
from pdserve.model.ops import BatchLayout
from pdserve.model.pool import KvPool
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.source import ModelFiles
from tests.models.small import Family, write_small_model
from tests.unit.model.conftest import RunnerOf

ROWS_MAX = 12
BLOCKS_EACH = 3
CONTEXT_TOKENS = 600


class Caller:
    """Records nothing: what is replayed is called again."""

    def __init__(self) -> None:
        self.recorded: list[Work] = []

    def record(self, work: Work) -> Work:
        self.recorded.append(work)
        return work


class Broken:
    def record(self, work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def recorder() -> Caller:
    return Caller()


@pytest.fixture
def both(tmp_path: Path, runner_of: RunnerOf, recorder: Caller) -> tuple[ModelRunner, ModelRunner]:
    """The same model, its decode steps recorded, and not."""
    path = write_small_model(tmp_path, context_tokens=CONTEXT_TOKENS)
    count = ROWS_MAX * BLOCKS_EACH
    recorded = runner_of(
        path, block_count=count, recorder=recorder, recorded_rows_max=ROWS_MAX, kernels="torch"
    )
    return recorded, runner_of(path, block_count=count, kernels="torch")


def decoded(*starts: int, token: int = 7) -> list[Run]:
    """One token of each sequence, each in blocks of its own."""
    return [
        Run([token + row], start, range(row * BLOCKS_EACH, (row + 1) * BLOCKS_EACH))
        for row, start in enumerate(starts)
    ]


@pytest.mark.parametrize(
    ("rows_max", "buckets"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (20, (1, 2, 4, 8, 16, 20))],
)
def test_buckets_of_rows_end_with_the_largest_step(rows_max: int, buckets: tuple[int, ...]) -> None:
    assert row_buckets(rows_max) == buckets
    for rows in range(1, rows_max + 1):
        assert rows <= bucket_for(rows, buckets) < rows + graphs.ROWS_STEP


@pytest.mark.parametrize(
    ("context_tokens", "buckets"),
    [(1, (1,)), (512, (512,)), (513, (512, 513)), (8192, (512, 2048, 8192))],
)
def test_buckets_of_context_end_with_the_models(
    context_tokens: int, buckets: tuple[int, ...]
) -> None:
    assert context_buckets(context_tokens) == buckets


def test_any_steps_give_the_bits_of_the_plain_ones_and_touch_no_other_block(
    both: tuple[ModelRunner, ModelRunner], recorder: Caller
) -> None:
    """Rows come and go in random order, so that what padded a step is real in the next."""
    recorded, plain = both
    chance = random.Random(5)
    lengths = [0] * ROWS_MAX
    steps = 0
    for _ in range(20):
        rows = chance.sample(range(ROWS_MAX), chance.randint(1, ROWS_MAX))
        runs = [
            Run(
                [chance.randrange(512)],
                lengths[row],
                range(row * BLOCKS_EACH, (row + 1) * BLOCKS_EACH),
            )
            for row in rows
        ]
        assert torch.equal(recorded.step(runs), plain.step(runs))
        assert torch.equal(recorded.pool.tensor[:-1], plain.pool.tensor)
        steps += 1
        for row in rows:
            lengths[row] += 1
    assert recorded.calls()["graph"] == steps
    assert isinstance(recorded.pool, KvPool)
    assert recorded.pool.tensor[recorded.pool.scratch_block].any()
    assert len(recorder.recorded) <= len(row_buckets(ROWS_MAX))


def test_a_bucket_is_recorded_once_and_shared_by_all_it_holds(
    both: tuple[ModelRunner, ModelRunner], recorder: Caller
) -> None:
    recorded, _ = both
    for starts in ((0,), (1,), (0, 0, 0), (1, 1, 1, 1), (0,) * 5, (1,) * 8):
        recorded.step(decoded(*starts))
    assert len(recorder.recorded) == 3  # of 1, 4 and 8 rows


def test_a_longer_context_has_a_graph_of_its_own(tmp_path: Path, runner_of: RunnerOf) -> None:
    recorder = Caller()
    path = write_small_model(tmp_path, context_tokens=CONTEXT_TOKENS)
    blocks = range(-(-CONTEXT_TOKENS // 16))
    runner = runner_of(path, block_count=len(blocks), recorder=recorder, kernels="torch")
    plain = runner_of(path, block_count=len(blocks), kernels="torch")
    for start in (511, 512, 599):
        run = Run([7], start, blocks)
        assert torch.equal(runner.step([run]), plain.step([run]))
    assert len(recorder.recorded) == 2


def test_what_is_no_step_of_single_tokens_goes_around(
    both: tuple[ModelRunner, ModelRunner], recorder: Caller
) -> None:
    recorded, plain = both
    for runs in (
        [Run([1, 2, 3], 0, [0])],
        [Run([1, 2], 3, [0], draft_count=1)],
        [Run([1], 5, [0]), Run([1, 2], 0, [1])],
        [*decoded(*[0] * ROWS_MAX), Run([1], 0, [2])],
    ):
        assert torch.equal(recorded.step(runs), plain.step(runs))
    assert not recorder.recorded


def test_a_graph_is_launched_for_its_bucket_and_rows_that_pad_it_are_in_the_scratch_block() -> None:
    seen: list[tuple[torch.Tensor, BatchLayout]] = []

    def compute(tokens_R: torch.Tensor, batch: BatchLayout) -> Hidden:
        seen.append((tokens_R, batch))
        return tokens_R[:, None], tokens_R[:, None]

    pool: Any = SimpleNamespace(tensor=torch.zeros(1), block_tokens=16, scratch_block=90)
    made = DecodeGraphs(compute, Caller(), pool, context_tokens=600, rows_max=8)
    for starts, longest in (((17, 511, 3), 512), ((512, 16, 5), 600)):
        hidden_RC, _ = made.step([Run([row + 7], at, range(50)) for row, at in enumerate(starts)])
        tokens_R, batch = seen.pop()
        assert hidden_RC.tolist() == [[7], [8], [9]]
        assert tokens_R.tolist() == [7, 8, 9, 0]
        assert batch.positions_N.tolist() == [*starts, 0]
        assert batch.slots_N.tolist() == [*starts, 90 * 16]  # block i of each is block i
        assert batch.contexts_R.tolist() == [*(at + 1 for at in starts), 1]
        assert batch.starts_R1.tolist() == [0, 1, 2, 3, 4]
        assert batch.tables_RB[3, 0] == 90
        assert (batch.longest_run, batch.longest_context) == (1, longest)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_tokens_on_the_device_stand_for_those_of_the_runs(
    both: tuple[ModelRunner, ModelRunner], is_recorded: bool
) -> None:
    runner, plain = both if is_recorded else reversed(both)
    told = decoded(0, 0, 0, token=100)
    untold = decoded(0, 0, 0, token=0)
    assert torch.equal(runner.step(untold, torch.tensor([100, 101, 102])), plain.step(told))


def test_a_step_that_cannot_be_recorded_says_what_to_do(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    runner = runner_of(write_small_model(tmp_path), recorder=Broken())
    with pytest.raises(ConfigError, match=r"of 2 rows.*is capturing; set model.cuda_graphs to off"):
        runner.step(decoded(0, 0))


def test_there_are_no_more_graphs_than_buckets(
    both: tuple[ModelRunner, ModelRunner], recorder: Caller
) -> None:
    for rows in range(1, ROWS_MAX + 1):
        both[0].step(decoded(*[0] * rows))
    assert len(recorder.recorded) == len(row_buckets(ROWS_MAX))


@pytest.mark.parametrize(
    ("family", "cuda_graphs", "device", "records"),
    [
        ("llama", "auto", "cuda", True),
        ("llama", "off", "cuda", False),
        ("llama", "auto", "cpu", False),
        ("qwen3_moe", "auto", "cuda", False),
    ],
)
def test_who_records(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: Family,
    cuda_graphs: Any,
    device: str,
    records: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    files = ModelFiles("small", "safetensors", write_small_model(tmp_path, family=family))
    config = ModelConfig(cuda_graphs=cuda_graphs)
    made = load.recorder_of(config, read_architecture(files), torch.device(device))
    assert (made is not None) is records


# ── CUDA, pretended ──────────────────────────────────────────────────────────────────────────────


class PretendedCuda:
    """Writes down what is asked of ``torch.cuda``, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.memories: set[object] = set()

    def graph_pool_handle(self) -> object:
        return (0, 1)

    def current_stream(self, device: torch.device) -> Any:
        return self.stream("current")

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return self.stream("aside")

    def stream(self, name: Any) -> Any:
        if not isinstance(name, str):
            return self._noted("aside", "back")
        note = self.asked.append
        return SimpleNamespace(
            name=name, wait_stream=lambda other: note(f"{name} waits for {other.name}")
        )

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.asked.append("replay"))

    def graph(self, graph: object, *, pool: object, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        self.memories.add(pool)
        return self._noted("recording", "recorded")

    @contextlib.contextmanager
    def _noted(self, begin: str, end: str) -> Iterator[None]:
        self.asked.append(begin)
        yield
        self.asked.append(end)


def test_a_graph_is_recorded_after_one_run_aside_and_replayed_without_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = PretendedCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    recorder = CudaRecorder(torch.device("cuda", 0))
    hidden = (torch.zeros(1), torch.ones(1))

    def work() -> Hidden:
        cuda.asked.append("work")
        return hidden

    replays = [recorder.record(work) for _ in range(2)]
    once = [
        "aside waits for current",
        *("aside", "work", "back"),
        "current waits for aside",
        *("recording", "work", "recorded"),
    ]
    assert cuda.asked == once * 2
    assert replays[0]() is hidden
    assert cuda.asked[-1] == "replay"
    assert len(cuda.memories) == 1, "one pool of memory for all"
