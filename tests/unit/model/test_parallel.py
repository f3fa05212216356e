"""A model cut into parts: its answers, its blocks, its bits, and what cannot be cut.

Ranks are threads here, or there is one with all the parts; in processes they are in
``tests/integration/test_tensor_parallel.py``.
"""

import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.config import ModelConfig
from pdserve.engine.leader import load_leader
from pdserve.errors import ConfigError
from pdserve.model import load
from pdserve.model.families.registry import read_architecture
from pdserve.model.load import load_runner, prepare
from pdserve.model.ops import LayersTold
from pdserve.model.parallel.group import in_order
from pdserve.model.parallel.load import load_rank
from pdserve.model.parallel.parts import Split, part_of
from pdserve.model.parallel.pool import PartedPool
from pdserve.model.pool import block_bytes
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.source import ModelFiles
from pdserve.model.torch_ops import TorchOps
from tests.models.small import write_small_model
from tests.models.small_gguf import write_gguf
from tests.unit.model.test_identity import draw_sequences, kv_of, run_in_company

WAIT_S = 10.0
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied, and a vocabulary that does not come out even": {"tied": True, "vocab": 501},
    "qwen2, with biases": {"family": "qwen2"},
    "qwen3, with norms of heads": {"family": "qwen3"},
    "gemma3, with norms of outputs": {"family": "gemma3", "tied": True},
    "mixtral": {"family": "mixtral"},
    "qwen3_moe": {"family": "qwen3_moe", "config": {"mlp_only_layers": [0]}},
}


def config_of(path: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(source=str(path), device="cpu", **{"dtype": "float32", **fields})


def cut(config: ModelConfig, part_count: int, block_count: int = 8) -> ModelRunner:
    """All parts in this process."""
    runner, _ = load_leader(
        config,
        rank_count=1,
        part_count=part_count,
        block_count=block_count,
        pool_bytes=0,
        threads=1,
    )
    return runner


def whole(config: ModelConfig) -> ModelRunner:
    return load_runner(config, block_count=8, pool_bytes=0, threads=1)


def answers(runner: ModelRunner, count: int = 12) -> Tensor:
    """Logits behind a prompt and behind the best tokens that follow it; [count, V]."""
    rows = [runner.step([Run(PROMPT, 0, range(4))])[0]]
    while len(rows) < count:
        best = int(rows[-1].argmax())
        rows.append(runner.step([Run([best], len(PROMPT) + len(rows) - 1, range(4))])[0])
    return torch.stack(rows)


@pytest.mark.parametrize("model", MODELS)
def test_parts_answer_what_the_whole_model_answers(tmp_path: Path, model: str) -> None:
    """Logits to some roundings of float32, and so the same greedy tokens."""
    config = config_of(write_small_model(tmp_path, **MODELS[model]))
    ours_NV, theirs_NV = answers(cut(config, 2)), answers(whole(config))
    assert torch.equal(ours_NV.argmax(-1), theirs_NV.argmax(-1))
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-5, atol=2e-4)


def test_without_our_kernels_it_does_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "cpu_ops", TorchOps)
    config = config_of(write_small_model(tmp_path))
    runner = cut(config, 2)
    assert type(runner.ops) is TorchOps
    torch.testing.assert_close(answers(runner), answers(whole(config)), rtol=1e-5, atol=2e-4)


def test_a_bias_of_what_is_summed_counts_once(tmp_path: Path) -> None:
    path = write_small_model(tmp_path) / "model.safetensors"
    more = {
        f"model.layers.0.{name}.bias": torch.linspace(-1, 1, 64)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    save_file(load_file(path) | more, path)
    config = config_of(tmp_path)
    torch.testing.assert_close(
        answers(cut(config, 2)), answers(whole(config)), rtol=1e-5, atol=2e-4
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_chunks_and_moves_change_no_bit_of_a_cut_model(tmp_path: Path, dtype: str) -> None:
    config = config_of(write_small_model(tmp_path), dtype=dtype)
    chance = random.Random(dtype)
    runners = [cut(config, 2, block_count=64) for _ in range(2)]
    sequences = draw_sequences(runners[0], chance, count=5, longest=100)

    assert run_in_company(runners, sequences, chance) > 1

    for sequence in sequences:
        assert kv_of(runners[sequence.home], sequence.blocks) == sequence.kv


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────


class Meeting:
    """``group.Group`` of ranks that are threads."""

    def __init__(self, rank_count: int) -> None:
        self._barrier = threading.Barrier(rank_count, timeout=WAIT_S)
        self._brought: dict[int, Sequence[Tensor]] = {}

    def everybodys(self, rank: int, parts: Sequence[Tensor]) -> list[Tensor]:
        self._brought[rank] = parts
        self._barrier.wait()
        everybodys = [part for rank in sorted(self._brought) for part in self._brought[rank]]
        self._barrier.wait()
        return everybodys


class OneOf:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self._rank = rank

    def summed(self, parts_NC: Sequence[Tensor]) -> Tensor:
        return in_order(self._meeting.everybodys(self._rank, parts_NC))

    def side_by_side(self, parts_NV: Sequence[Tensor]) -> Tensor:
        return torch.cat(self._meeting.everybodys(self._rank, parts_NV), dim=-1)


class Near:
    """``pool.OtherRank`` without a process between."""

    def __init__(self, pool: PartedPool) -> None:
        self._pool = pool
        self._undone = False

    def put(self, block: int, layers: range) -> None:
        self._pool.put_shares(block, layers)
        self._undone = True

    def take(self, block: int) -> None:
        self._pool.take_shares(block)
        self._undone = True

    def copy(self, source: int, target: int) -> None:
        self._pool.copy_shares(source, target)
        self._undone = True

    def done(self) -> None:
        assert self._undone, "there is nothing to wait for"
        self._undone = False


def ranks_of(config: ModelConfig, part_count: int, rank_count: int) -> list[ModelRunner]:
    """The first has the pool of the whole model."""
    prepared = prepare(config, block_count=8, pool_bytes=0, threads=1)
    meeting = Meeting(rank_count)
    size = block_bytes(prepared.architecture, prepared.block_tokens, prepared.dtype)
    staging = memoryview(bytearray(size))

    def load(rank: int, others: Sequence[ModelRunner] = ()) -> ModelRunner:
        return load_rank(
            prepared,
            Split(part_count, rank_count, rank),
            join=lambda: OneOf(meeting, rank),
            others=[Near(other.pool) for other in others],  # type: ignore[arg-type]
            staging=staging,
        )

    followers = [load(rank) for rank in range(1, rank_count)]
    return [load(0, followers), *followers]


def step_together(
    ranks: Sequence[ModelRunner], runs: Sequence[Run], told: LayersTold | None = None
) -> Tensor:
    followers = [threading.Thread(target=rank.step, args=(runs,)) for rank in ranks[1:]]
    for follower in followers:
        follower.start()
    logits = ranks[0].step(runs, None, told)
    for follower in followers:
        follower.join(WAIT_S)
    return logits


def test_layers_that_the_first_rank_tells_of_are_there_on_all(tmp_path: Path) -> None:
    ranks = ranks_of(config_of(write_small_model(tmp_path, layers=3)), 2, 2)
    pool, seen = ranks[0].pool, list[tuple[int, bytes]]()

    def tell(count: int, done: object) -> None:
        pool.await_layers(done)
        layers = bytearray(count * pool.layer_bytes)
        pool.read_layers(1, 0, count, memoryview(layers))
        seen.append((count, bytes(layers)))

    step_together(ranks, [Run(PROMPT, 0, [1, 2])], LayersTold(1, tell))
    (whole,) = kv_of(ranks[0], [1])
    assert seen == [(count, whole[: count * pool.layer_bytes]) for count in (1, 2, 3)]


@pytest.mark.parametrize(("part_count", "rank_count"), [(2, 2), (4, 2)])
def test_bits_depend_on_the_parts_and_not_on_who_computes_them(
    tmp_path: Path, part_count: int, rank_count: int
) -> None:
    directory = write_small_model(tmp_path, hidden=64, heads=8, kv_heads=4, vocab=501)
    config = config_of(directory)
    alone, ranks = cut(config, part_count), ranks_of(config, part_count, rank_count)
    runs = [Run(PROMPT, 0, [1, 2]), Run(PROMPT[:7], 0, [0])]
    assert torch.equal(step_together(ranks, runs), alone.step(runs))
    assert kv_of(ranks[0], [0, 1, 2]) == kv_of(alone, [0, 1, 2])
    # And on they go from blocks that the other computed.
    for block, content in zip((5, 6), kv_of(alone, [1, 2]), strict=True):
        ranks[0].pool.write_block(block, memoryview(content))
    after = Run([5], len(PROMPT), [5, 6])
    assert torch.equal(step_together(ranks, [after]), alone.step([Run([5], after.start, [1, 2])]))


def test_a_block_of_ranks_is_laid_out_as_that_of_the_whole_model(tmp_path: Path) -> None:
    config = config_of(write_small_model(tmp_path, hidden=64, heads=8, kv_heads=4))
    plain, (first, second) = whole(config), ranks_of(config, 4, 2)
    content = random.Random(7).randbytes(plain.pool.block_bytes)
    for pool in (plain.pool, first.pool):
        pool.write_block(3, memoryview(content))
    first.pool.copy_block(3, 1)
    assert kv_of(first, [1, 3]) == [content, content]
    waited: list[str] = []
    first.pool.await_layers(None)
    first.pool.await_layers(SimpleNamespace(synchronize=lambda: waited.append("for all ranks")))
    assert waited == ["for all ranks"], "the others are asked when theirs are there too"
    layer = bytearray(first.pool.layer_bytes)
    first.pool.read_layers(3, 1, 2, memoryview(layer))
    assert layer == content[first.pool.layer_bytes : 2 * first.pool.layer_bytes]
    # Shares lie part after part, in each rank's own pool of 8 blocks.
    heads = plain.pool.tensor[3].view(torch.int32)
    for part in range(4):
        rank = (first, second)[part // 2]
        share = rank.pool.tensor[3 + 8 * (part % 2)].view(torch.int32)
        assert torch.equal(share, heads[:, :, part : part + 1])


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda pool: pool.read_block(8, memoryview(b"")), "block 8 is not in a pool of 8"),
        (lambda pool: pool.write_block(0, memoryview(b"1")), "has 1 bytes, not"),
        (lambda pool: pool.read_layers(0, 0, 2, memoryview(b"")), "layers 0 to 2 of 1"),
        (lambda pool: pool.copy_block(0, -1), "block -1 is not in a pool of 8"),
        (lambda pool: pool.put_shares(8, range(1)), "block 8 is not in a pool of 8"),
    ],
)
def test_a_parted_pool_refuses_what_is_not_its_own(
    tmp_path: Path, use: Callable[[Any], None], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        use(cut(config_of(write_small_model(tmp_path, layers=1)), 2).pool)


# ── quantised weights ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ffn", [128, 96])  # a part of 96 ends within a group
def test_parts_of_a_quantised_file_give_the_bits_of_parts_in_bfloat16(
    tmp_path: Path, ffn: int
) -> None:
    directory = write_small_model(tmp_path, hidden=64, heads=4, kv_heads=2, ffn=ffn, tied=True)
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, "Q4_1", kinds={"embed_tokens": "Q8_0"})
    file, none = (
        answers(cut(config_of(path, dtype="bfloat16", quantization=kept), 2))
        for kept in ("file", "none")
    )
    assert torch.equal(file, none)


def test_weights_rounded_in_parts_are_those_rounded_whole(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path, hidden=64, heads=4, kv_heads=2, ffn=128)
    config = config_of(directory, dtype="bfloat16", quantization="int4")
    whole_NV, parts_NV = answers(whole(config), 1), answers(cut(config, 2), 1)
    torch.testing.assert_close(parts_NV, whole_NV, rtol=0.05, atol=0.5)
    unrounded = config_of(directory, dtype="bfloat16", quantization="none")
    rounding = (answers(whole(unrounded), 1) - whole_NV).abs().max()
    assert (parts_NV - whole_NV).abs().max() < rounding / 4


def test_rounding_groups_that_a_cut_would_split_is_refused(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path, hidden=64, heads=4, kv_heads=2, ffn=96)
    config = config_of(directory, dtype="bfloat16", quantization="int8")
    with pytest.raises(ConfigError, match=r"down_proj.weight has 48; take file or none"):
        cut(config, 2)


# ── what comes out even ──────────────────────────────────────────────────────────────────────────


def test_a_model_that_does_not_come_out_even_is_refused_with_what_would(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path, hidden=72, heads=9, kv_heads=3, ffn=1536)
    architecture = read_architecture(ModelFiles("small", "safetensors", directory))
    with pytest.raises(ConfigError, match=r"into 2 parts .*kv_head_count is 3; .* can have 1, 3"):
        part_of(architecture, 2)
    part = part_of(architecture, 3)
    assert (part.head_count, part.kv_head_count, part.ffn) == (3, 1, 512)


def test_experts_are_cut_by_their_own_channels(tmp_path: Path) -> None:
    directory = write_small_model(tmp_path, family="qwen3_moe", config={"moe_intermediate_size": 7})
    architecture = read_architecture(ModelFiles("small", "safetensors", directory))
    with pytest.raises(ConfigError, match="its experts' ffn is 7"):
        part_of(architecture, 2)


@pytest.mark.parametrize(
    ("vocab_size", "parts"),
    [(6, [2, 2, 2]), (7, [3, 3, 1]), (8, [3, 3, 2])],
)
def test_parts_cover_the_vocabulary_once_and_in_order(vocab_size: int, parts: list[int]) -> None:
    ranges = [Split(3).tokens_of_vocabulary(vocab_size, part) for part in range(3)]
    assert [token for tokens in ranges for token in tokens] == list(range(vocab_size))
    assert [len(tokens) for tokens in ranges] == parts
