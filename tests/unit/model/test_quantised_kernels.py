"""The C++ kernels with quantised weights: the bits that those weights in bfloat16 give."""

import pytest
import torch
from torch import Tensor

from pdserve.model.cpu_ops import CpuOps
from pdserve.model.ops import LinearWeight
from pdserve.model.quantised import Q4_1, Q8_0, BlockFormat, QuantisedWeight, quantised
from tests.unit.model.conftest import ops_named

FORMATS = [Q4_1, Q8_0]
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
    weight = quantised(draw(outputs, inputs, scale=inputs**-0.5) + 0.01, target)
    assert weight is not None
    return QuantisedWeight(weight.weight_OC, bias_O, format=target)


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
    assert ours.weight_OC.nbytes < plain.weight_OC.nbytes * 0.6
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
    head_bytes = target.block_bytes - (16 if target is Q4_1 else 32)
    numbers = torch.arange(256).repeat(8, 1).to(torch.uint8)
    numbers = numbers.reshape(-1, target.block_bytes - head_bytes)
    size = torch.logspace(-7.5, 3, numbers.shape[0])[:, None]
    heads = torch.randn(numbers.shape[0], head_bytes // 2, generator=generator) * size
    blocks = torch.cat((heads.half().view(torch.uint8), numbers), dim=1)
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
