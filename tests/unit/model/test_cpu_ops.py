"""The C++ kernels against the torch path, on the shapes that break kernels."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.model import cpu_ops
from pdserve.model.cpu import library
from pdserve.model.ops import BatchLayout, LinearWeight
from pdserve.model.torch_ops import TorchOps
from tests.unit.model.conftest import ops_named

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Both round a float32 result once; the float32 results differ by the order of their sums.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CHANNELS = [1, 15, 16, 17, 64, 576]


def close(ours: Tensor, reference: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def layout(runs: list[tuple[int, int]], block_tokens: int, blocks: list[list[int]]) -> BatchLayout:
    """Of runs (start, length) whose blocks are given."""
    tables = torch.zeros(len(runs), max(map(len, blocks)), dtype=torch.int32)
    positions, slots = [], []
    for row, ((start, length), table) in enumerate(zip(runs, blocks, strict=True)):
        tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        for position in range(start, start + length):
            positions.append(position)
            slots.append(table[position // block_tokens] * block_tokens + position % block_tokens)
    ends = torch.tensor([0] + [length for _, length in runs]).cumsum(0)
    return BatchLayout(
        positions_N=torch.tensor(positions),
        slots_N=torch.tensor(slots),
        starts_R1=ends.int(),
        tables_RB=tables,
        contexts_R=torch.tensor([start + length for start, length in runs], dtype=torch.int32),
        longest_run=max(length for _, length in runs),
        longest_context=max(start + length for start, length in runs),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_norms_equal_the_reference(channels: int, dtype: torch.dtype) -> None:
    ours, reference = ops_named("cpu"), TorchOps()
    x, residual = draw(5, channels, dtype=dtype), draw(5, channels, dtype=dtype, scale=3)
    weight = draw(channels, dtype=dtype)
    close(ours.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for got, wanted in zip(
        ours.add_rms_norm(x, residual, weight, 1e-5),
        reference.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_gates_equal_the_reference_far_from_zero_too(
    name: str, channels: int, dtype: torch.dtype
) -> None:
    gate_up = draw(4, 2 * channels, dtype=dtype, scale=30)
    ours, reference = (getattr(ops, name)(gate_up) for ops in (ops_named("cpu"), TorchOps()))
    close(ours, reference)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_gelu_is_that_of_torch(name: str) -> None:
    gate = torch.linspace(-12, 12, 1001)
    exact = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    ours = ops_named(name).gelu_mul(torch.stack((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(ours[:, 0].double(), exact, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_numbers_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """A norm with weight 0 is a way to pass every bit pattern through load and store: x + 0."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    x = x[~x.isnan()].to(dtype).reshape(1, -1)
    third = torch.full_like(x, 1 / 3)
    for other in (torch.zeros_like(x), third):
        _, total = ops_named("cpu").add_rms_norm(x, other, torch.zeros_like(x[0]), 1e-5)
        assert torch.equal(total, (x.float() + other.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 128])
def test_rotary_and_cache_equal_the_reference_and_touch_nothing_else(
    head_dim: int, dtype: torch.dtype
) -> None:
    heads, kv_heads, block_tokens, layers = 4, 2, 5, 3
    batch = layout([(0, 7), (11, 1)], block_tokens, [[6, 2], [4, 3, 0]])
    qkv = draw(8, heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)  # rows apart, as when fused
    rope = draw(32, head_dim, dtype=torch.float32)
    pools = [draw(7, layers, 2, kv_heads, block_tokens, head_dim, dtype=dtype) for _ in range(2)]
    turned = [
        ops.rope_and_cache(q, k, v, rope, batch, pool, 1)
        for ops, pool in zip((ops_named("cpu"), TorchOps()), pools, strict=True)
    ]
    close(turned[0], turned[1])
    close(pools[0], pools[1])
    before = draw(7, layers, 2, kv_heads, block_tokens, head_dim, dtype=dtype)
    assert torch.equal(pools[0][:, [0, 2]], before[:, [0, 2]])  # the other layers
    assert torch.equal(pools[0][[1, 5]], before[[1, 5]])  # the other blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 30, 64, 65])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "runs"),
    [
        (4, 2, 16, [(0, 1)]),  # one token, itself alone
        (4, 2, 64, [(63, 1), (64, 1), (65, 1)]),  # around the end of a tile
        (9, 3, 64, [(0, 64), (0, 65), (10, 100)]),  # a tile, one more, a chunk
        (4, 4, 128, [(0, 97)]),  # no groups; more queries than a task takes
        (7, 1, 24, [(0, 40), (130, 3)]),  # odd sizes
    ],
)
def test_attention_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    runs: list[tuple[int, int]],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    block_tokens = 16
    free = iter(torch.randperm(64, generator=torch.Generator().manual_seed(7)).tolist())
    blocks = [
        [next(free) for _ in range(-(-(start + length) // block_tokens))] for start, length in runs
    ]
    batch = layout(runs, block_tokens, blocks)
    q = draw(len(batch.positions_N), heads, head_dim, dtype=dtype)
    pool = draw(64, 2, 2, kv_heads, block_tokens, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    ours = ops_named("cpu").attention(q, batch, pool, 1, scale, window)
    close(ours, TorchOps().attention(q, batch, pool, 1, scale, window))
    close(ours, sdpa(q, batch, runs, pool[:, 1], blocks, scale, window))


def sdpa(
    q_NHD: Tensor,
    batch: BatchLayout,
    runs: list[tuple[int, int]],
    pool_P2GTD: Tensor,
    blocks: list[list[int]],
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's own attention in float32, run by run."""
    outs = []
    for row, ((start, length), table) in enumerate(zip(runs, blocks, strict=True)):
        begin = int(batch.starts_R1[row])
        kv = pool_P2GTD[table].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : start + length]
        before = torch.arange(start, start + length)[:, None] - torch.arange(start + length)
        seen = (before >= 0) & (before < (window or start + length))
        q = q_NHD[begin : begin + length].float().transpose(0, 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], kv[:1], kv[1:], attn_mask=seen, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).to(q_NHD.dtype)


def test_a_token_after_the_query_cannot_be_seen_even_as_nan() -> None:
    """KV behind the context is never read: a freed block may hold anything."""
    batch = layout([(3, 1)], 16, [[0]])
    pool = draw(1, 1, 2, 1, 16, 16, dtype=torch.float32)
    q = draw(1, 1, 16, dtype=torch.float32)
    clean = ops_named("cpu").attention(q, batch, pool, 0, 1.0)
    pool[:, :, :, :, 4:] = torch.nan
    assert torch.equal(ops_named("cpu").attention(q, batch, pool, 0, 1.0), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_before_every_window_is_not_read(dtype: torch.dtype) -> None:
    batch = layout([(100, 3)], 16, [list(range(7))])
    pool = draw(7, 1, 2, 1, 16, 24, dtype=dtype)
    q = draw(3, 2, 24, dtype=dtype)
    clean = ops_named("cpu").attention(q, batch, pool, 0, 1.0, 20)
    for position in range(100 - 20 + 1):
        pool[position // 16, :, :, :, position % 16] = torch.nan
    assert torch.equal(ops_named("cpu").attention(q, batch, pool, 0, 1.0, 20), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_is_not_hidden(dtype: torch.dtype) -> None:
    """A query that attends to NaN gets NaN, its neighbour before that position does not."""
    batch = layout([(0, 8)], 16, [[0]])
    pool = draw(1, 1, 2, 1, 16, 16, dtype=dtype)
    pool[0, 0, 0, 0, 5] = torch.nan  # the key of position 5
    out = ops_named("cpu").attention(draw(8, 1, 16, dtype=dtype), batch, pool, 0, 1.0)
    assert out[:5].isfinite().all()
    assert out[5:].isnan().all()


@pytest.mark.parametrize("outputs", [960, 576])
def test_a_packed_bfloat16_layer_equals_the_plain_one(outputs: int) -> None:
    ops = TorchOps()
    weight = LinearWeight(draw(outputs, 1536, dtype=torch.bfloat16, scale=0.05))
    packed = ops.pack(weight)
    if not packed.packed:
        pytest.skip("needs a CPU on which oneDNN has bfloat16")
    for rows in (2, 3, 16, 65):
        x = draw(rows, 1536, dtype=torch.bfloat16)
        assert torch.equal(ops.linear(x, packed), torch.nn.functional.linear(x, weight.weight_OC))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 2), (960, 576), (1, 1), (70, 37), (9, 4096)])
def test_bfloat16_layers_are_what_float64_says_rounded(
    outputs: int, inputs: int, bias: bool
) -> None:
    ops = ops_named("cpu")
    weight = draw(outputs, inputs, dtype=torch.bfloat16, scale=inputs**-0.5)
    bias_O = draw(outputs, dtype=torch.bfloat16) if bias else None
    packed = ops.pack(LinearWeight(weight, bias_O))
    for rows in (1, 5, 6, 7, 64):
        whole = draw(rows, inputs + 3, dtype=torch.bfloat16)
        x = whole[:, :inputs]  # rows that do not lie end to end
        exact = x.double() @ weight.double().T
        if bias_O is not None:
            exact += bias_O.double()
        # Half a unit in the last place of 8 bits, and float32's sums.
        torch.testing.assert_close(ops.linear(x, packed).double(), exact, rtol=2**-8, atol=2e-6)


def test_a_bfloat16_layer_keeps_what_is_not_finite_to_its_row_and_output() -> None:
    ops = ops_named("cpu")
    weight = draw(80, 48, dtype=torch.bfloat16)
    x = draw(8, 48, dtype=torch.bfloat16)
    clean = ops.linear(x, ops.pack(LinearWeight(weight)))
    x[3, 47] = torch.inf
    weight[77, 0] = torch.nan
    out = ops.linear(x, ops.pack(LinearWeight(weight)))
    assert out[:, 77].isnan().all()
    assert not out[3].isfinite().any()
    out[3], out[:, 77] = clean[3], clean[:, 77]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("name", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 1536, 4096])
def test_a_row_of_a_linear_layer_does_not_depend_on_its_company(
    inputs: int, dtype: torch.dtype, name: str
) -> None:
    ops = ops_named(name)
    weight = ops.pack(LinearWeight(draw(96, inputs, dtype=dtype, scale=0.05)))
    x = draw(130, inputs, dtype=dtype)
    full = ops.linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 8, 15, 16, 17, 64, 129):
        assert torch.equal(ops.linear(x[1 : 1 + rows], weight), full[1 : 1 + rows]), rows


def test_calls_are_counted() -> None:
    ops = ops_named("cpu")
    ops.rms_norm(draw(1, 4, dtype=torch.float32), draw(4, dtype=torch.float32), 1e-5)
    assert ops.calls() == {"rms_norm": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ops: ops.rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5),
        lambda ops: ops.rms_norm(torch.zeros(2, 4), torch.zeros(4, dtype=torch.bfloat16), 1e-5),
        lambda ops: ops.rms_norm(torch.zeros(4, 2).T, torch.zeros(4), 1e-5),
        lambda ops: ops.silu_mul(torch.zeros(2, 5)),
        lambda ops: ops.add_rms_norm(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(4), 1e-5),
    ],
)
def test_tensors_that_a_kernel_would_read_wrongly_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        wrong(ops_named("cpu"))


@pytest.mark.parametrize(
    "x_NC",
    [
        torch.zeros(2, 5, dtype=torch.bfloat16),
        torch.zeros(4, 2, dtype=torch.bfloat16).T,
        torch.zeros(2, 4),
    ],
)
def test_a_bfloat16_layer_refuses_what_it_would_read_wrongly(x_NC: Tensor) -> None:
    ops = ops_named("cpu")
    weight = ops.pack(LinearWeight(torch.zeros(3, 4, dtype=torch.bfloat16)))
    if ops.multiplies != "bfloat16 pairs":
        pytest.skip("needs a CPU that multiplies bfloat16")
    with pytest.raises(ValueError, match="do not fit together"):
        ops.linear(x_NC, weight)


def test_without_a_compiler_the_torch_path_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr(cpu_ops, "load_library", library.load_library.__wrapped__)
    assert type(cpu_ops.cpu_ops()) is TorchOps
    assert "install g++" in caplog.text


def test_only_one_openmp_runtime_is_in_the_process() -> None:
    ops_named("cpu")
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (40, 1), (41, 3), (500, 3)])
def test_little_work_wakes_no_sleeping_thread(
    monkeypatch: pytest.MonkeyPatch, rows: int, expected: int, dtype: torch.dtype
) -> None:
    """1024 x 576 products of 40 rows and of 41 lie on either side of the bound."""
    used: list[int] = []
    plain, ours = TorchOps.linear, cpu_ops.CpuOps._call

    def noting(self: TorchOps, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        used.append(torch.get_num_threads())
        return plain(self, x_NC, weight)

    def noting_too(self: cpu_ops.CpuOps, *arguments: Any, threads: int) -> None:
        used.append(threads)
        ours(self, *arguments, threads=threads)

    monkeypatch.setattr(TorchOps, "linear", noting)
    monkeypatch.setattr(cpu_ops.CpuOps, "_call", noting_too)
    compiled = library.load_library()
    if compiled is None:
        pytest.skip("needs g++ for the C++ kernels")
    sleeping = cpu_ops.CpuOps(compiled, threads_sleep=True)
    weight = sleeping.pack(LinearWeight(draw(1024, 576, dtype=dtype)))
    x = draw(rows, 576, dtype=dtype)
    torch.set_num_threads(3)

    result = sleeping.linear(x, weight)

    assert (used, torch.get_num_threads()) == ([expected], 3)
    assert torch.equal(result, cpu_ops.CpuOps(compiled).linear(x, weight))
    assert used == [expected, 3], "threads that spin are all used"


@pytest.mark.parametrize(("policy", "sleeps"), [("passive", True), ("ACTIVE", False), ("", False)])
def test_openmp_says_whether_threads_sleep(
    monkeypatch: pytest.MonkeyPatch, policy: str, sleeps: bool
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    ops = cpu_ops.cpu_ops()
    if not isinstance(ops, cpu_ops.CpuOps):
        pytest.skip("needs g++ for the C++ kernels")
    assert ops.threads_sleep is sleeps


def _affinities(threads: int) -> list[set[int]]:
    """Of the calling thread, after ``bind_threads``, and of those that came with its team."""
    found: list[set[int]] = []

    def bound() -> None:
        before = set(os.listdir("/proc/self/task"))
        torch.set_num_threads(threads)
        cpu_ops.bind_threads()
        own = str(threading.get_native_id())
        team = {own, *(set(os.listdir("/proc/self/task")) - before)}
        found.extend(os.sched_getaffinity(int(task)) for task in sorted(team))

    passing = threading.Thread(target=bound)  # nobody else is to be bound to a core
    passing.start()
    passing.join()
    return found


@pytest.mark.skipif(library.load_library() is None, reason="no compiler")
def test_each_thread_of_a_team_is_bound_to_a_core_of_its_own() -> None:
    cores = os.sched_getaffinity(0)
    assert sorted(map(sorted, _affinities(len(cores)))) == sorted([core] for core in cores)


@pytest.mark.skipif(library.load_library() is None, reason="no compiler")
def test_with_fewer_threads_than_cores_nobody_is_bound() -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        assert all(own == cores for own in _affinities(len(cores) - 1))
