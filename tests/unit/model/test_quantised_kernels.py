"""The C++ kernels with quantised weights: the bits that those weights in bfloat16 give."""

import pytest
import torch
from torch import Tensor

from pdserve.model.cpu_ops import CpuOps
from pdserve.model.ops import LinearWeight
from pdserve.model.quantised import (
    Q4_1,
    Q4_WIDE,
    Q8_0,
    Q8_WIDE,
    BlockFormat,
    QuantisedWeight,
    quantised,
    wide_bytes,
    wide_nibbles,
)
from tests.unit.model.conftest import ops_named

FORMATS = [Q4_1, Q8_0, Q4_WIDE, Q8_WIDE]
# A panel has 64 outputs, a register block 6 rows; the last shape has more groups than one step
# fetches ahead, and outputs in one panel only.
SHAPES = [(64, 32), (960, 576), (1, 32), (70, 96), (130, 64), (9, 4096)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 64]


def cpu_ops() -> CpuOps:
    ops = ops_named("cpu")
    assert isinstance(ops, CpuOps)
    if not ops.reads_quantised:
        pytest.skip("needs a CPU that multiplies bfloat16")
    return ops


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def drawn(
    outputs: int, inputs: int, target: BlockFormat, bias_O: Tensor | None = None
) -> QuantisedWeight:
    if target in (Q4_WIDE, Q8_WIDE):
        weight: QuantisedWeight | None = drawn_wide(outputs, inputs, target)
    else:
        weight = quantised(draw(outputs, inputs, scale=inputs**-0.5) + 0.01, target)
    assert weight is not None
    return QuantisedWeight(weight.weight_OC, bias_O, format=target)


def drawn_wide(outputs: int, inputs: int, target: BlockFormat) -> QuantisedWeight:
    """Scales of as many digits as those of Q4_K and Q6_K: float16's, times a whole number."""
    generator = torch.Generator().manual_seed(outputs + inputs)

    def whole(*shape: int, of: int) -> Tensor:
        return torch.randint(0, of, shape, generator=generator)

    def scales(per_row: int) -> Tensor:
        sixteen = draw(outputs, per_row, scale=inputs**-0.5 / 400).half().float()
        return sixteen * whole(outputs, per_row, of=64)

    numbers = whole(outputs, inputs, of=256)
    if target == Q8_WIDE:
        return wide_bytes(scales(inputs // 16) / 16, (numbers - 128).to(torch.int8))
    return wide_nibbles(scales(inputs // 32), scales(inputs // 32), numbers % 16)


def in_bfloat16(weight: QuantisedWeight) -> LinearWeight:
    return LinearWeight(weight.dequantised().bfloat16(), weight.bias_O)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_a_layer_gives_the_bits_of_its_weights_in_bfloat16(
    target: BlockFormat, outputs: int, inputs: int, bias: bool
) -> None:
    ops = cpu_ops()
    bias_O = draw(outputs).bfloat16() if bias else None
    weight = drawn(outputs, inputs, target, bias_O)
    ours, plain = ops.pack(weight), ops.pack(in_bfloat16(weight))
    assert ours.weight_OC.nbytes < plain.weight_OC.nbytes * 0.65
    for rows in ROWS:
        x = draw(rows, inputs + 3).bfloat16()[:, :inputs]  # rows that do not lie end to end
        assert torch.equal(ops.linear(x, ours), ops.linear(x, plain)), rows


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_a_layer_is_what_float64_says_within_its_roundings(
    target: BlockFormat, outputs: int, inputs: int
) -> None:
    """The weights are rounded to 8 bits (2^-9 of each product), every sum of float32 to 24, and
    the result to 8."""
    ops = cpu_ops()
    weight = drawn(outputs, inputs, target)
    x = draw(7, inputs).bfloat16()
    exact = x.double() @ weight.dequantised().double().T
    products = x.double().abs() @ weight.dequantised().double().abs().T
    bound = products * (2**-9 + inputs * 2**-24) * (1 + 2**-8) + exact.abs() * 2**-9
    error = (ops.linear(x, ops.pack(weight)).double() - exact).abs()
    assert (error <= bound).all()
    assert error.max() > 0


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_every_number_with_every_sign_and_size_of_scale_is_unpacked_as_it_is(
    target: BlockFormat,
) -> None:
    """All bytes a block can hold, and scales and minima down to float16's denormals."""
    ops = cpu_ops()
    generator = torch.Generator().manual_seed(3)
    head_bytes = target.block_bytes - 4 * target.bits
    numbers = torch.arange(256).repeat(8, 1).to(torch.uint8)
    numbers = numbers.reshape(-1, target.block_bytes - head_bytes)
    size = torch.logspace(-7.5, 3, numbers.shape[0])[:, None]
    wide = target in (Q4_WIDE, Q8_WIDE)
    heads = torch.randn(numbers.shape[0], head_bytes // (4 if wide else 2), generator=generator)
    heads = (heads * size).half()
    heads = heads.float() * 61 if wide else heads
    blocks = torch.cat((heads.view(torch.uint8), numbers), dim=1)
    weight = QuantisedWeight(blocks, format=target)

    rows = ops.embedded(torch.arange(blocks.shape[0]), ops.pack(weight))

    assert torch.equal(rows, weight.dequantised().bfloat16())


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
@pytest.mark.parametrize("inputs", [64, 1536, 4096])
def test_a_row_does_not_depend_on_its_company_nor_on_threads(
    inputs: int, target: BlockFormat
) -> None:
    ops = cpu_ops()
    weight = ops.pack(drawn(96, inputs, target))
    x = draw(130, inputs).bfloat16()
    full = ops.linear(x, weight)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.linear(x, weight), full)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 64, 129):
            part = ops.linear(x[1 : 1 + rows], weight)
            assert torch.equal(part, full[1 : 1 + rows]), (threads, rows)


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_rows_of_an_embedding_are_its_weights(target: BlockFormat) -> None:
    ops = cpu_ops()
    weight = drawn(200, 96, target)
    packed = ops.pack(weight)
    plain = LinearWeight(weight.dequantised().bfloat16())
    tokens = torch.tensor([199, 0, 63, 64, 64, 127])[::2]  # not end to end either
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(ops.embedded(tokens, packed), ops.embedded(tokens, plain))


@pytest.mark.parametrize(
    "x_NC",
    [
        torch.zeros(2, 32, dtype=torch.bfloat16),
        torch.zeros(64, 2, dtype=torch.bfloat16).T,
        torch.zeros(2, 64),
    ],
)
def test_a_layer_refuses_what_it_would_read_wrongly(x_NC: Tensor) -> None:
    ops = cpu_ops()
    weight = ops.pack(drawn(3, 64, Q4_1))
    with pytest.raises(ValueError, match="do not fit together"):
        ops.linear(x_NC, weight)
