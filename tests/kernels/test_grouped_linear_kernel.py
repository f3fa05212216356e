"""Linear layers of 4 and 8 bits: against their reference, and the weights that they came from."""

import itertools
import json
import textwrap

import pytest
import torch

from pdserve.model.grouped_weights import GroupedWeight, grouped, multiplied, unpacked_rows
from pdserve.model.kernels.grouped_linear import (
    TILES,
    grouped_linear,
    grouped_linear_reference,
)
from pdserve.model.ops import LinearWeight
from pdserve.model.quantised import (
    Q4_1,
    Q8_0,
    BlockFormat,
    QuantisedWeight,
    quantised,
    wide_nibbles,
)
from pdserve.model.triton_ops import TritonOps
from tests.kernels.support import DEVICE, assert_near, randn
from tests.kernels.test_compile_all import python

FORMATS = [Q4_1, Q8_0]


def drawn(outputs: int, C: int, target: BlockFormat, *, bias: bool = False) -> QuantisedWeight:
    weight = quantised(
        randn(outputs, C, dtype=torch.float32, seed=outputs).cpu() * C**-0.5 + 0.01, target
    )
    assert weight is not None
    bias_O = randn(outputs, dtype=torch.bfloat16, seed=1) if bias else None
    return QuantisedWeight(weight.weight_OC, bias_O, format=target)


def on_device(weight: QuantisedWeight) -> GroupedWeight:
    return grouped(weight, torch.device(DEVICE))


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("N", "outputs", "C"),
    [
        (1, 32, 64),  # one tile, one step
        (16, 33, 96),  # one output more; the last step has half of its channels
        (17, 1, 32),  # one row more than the small tiles have
        (3, 65, 160),
        (65, 40, 64),  # the large tiles, where they are allowed
        (0, 8, 32),  # nothing to do
    ],
)
def test_it_equals_the_reference(N: int, outputs: int, C: int, target: BlockFormat) -> None:
    weight = on_device(drawn(outputs, C, target, bias=N % 2 == 1))
    x_NC = randn(N, C + 5, dtype=torch.bfloat16)[:, :C]
    given = (x_NC, weight.weight_OC, weight.scales_GO, weight.bias_O)
    expected_NO = grouped_linear_reference(*given, bits=weight.bits, group=32)
    assert_near(multiplied(x_NC, weight, deterministic=N <= 64), expected_NO)


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_packed_weights_are_those_of_the_file_to_the_bit(target: BlockFormat) -> None:
    """Whatever a block may hold; an odd number of groups too."""
    generator = torch.Generator().manual_seed(5)
    blocks_OB = torch.randint(256, (9, 3 * target.block_bytes), generator=generator).byte()
    scales = torch.randn(9, 3, 2, generator=generator).half().view(torch.uint8).view(9, 3, 4)
    scale_bytes = target.block_bytes - (16 if target == Q4_1 else 32)
    blocks_OB.view(9, 3, -1)[..., :scale_bytes] = scales[..., :scale_bytes]
    weight = QuantisedWeight(blocks_OB, format=target)
    outputs_N = torch.tensor([8, 0, 3, 3], device=DEVICE)
    expected_OC = weight.dequantised().bfloat16().to(DEVICE)
    assert torch.equal(unpacked_rows(on_device(weight), outputs_N), expected_OC[outputs_N])
    assert unpacked_rows(on_device(weight), outputs_N[:0]).shape == (0, 96)


def test_groups_may_be_of_several_panels() -> None:
    generator = torch.Generator().manual_seed(2)
    packed_SOH = (
        torch.randint(256, (4, 6, 32), generator=generator).byte().to(DEVICE)
    )  # 256 channels
    pairs_GO = torch.randn(2, 6, 2, generator=generator).half().view(torch.int32)[..., 0]
    x_NC = randn(2, 256, dtype=torch.float16)
    given = (x_NC, packed_SOH, pairs_GO.contiguous().to(DEVICE), None)
    assert_near(
        grouped_linear(*given, bits=4, group=128),
        grouped_linear_reference(*given, bits=4, group=128),
    )


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: target.name)
def test_a_row_has_the_same_bits_alone_and_in_any_company(target: BlockFormat) -> None:
    weight = on_device(drawn(40, 96, target))
    x_NC = randn(50, 96, dtype=torch.bfloat16)
    together_NO = multiplied(x_NC, weight, deterministic=True)
    for first, last in ((0, 1), (49, 50), (10, 26), (20, 50)):
        alone_NO = multiplied(x_NC[first:last], weight, deterministic=True)
        assert torch.equal(alone_NO, together_NO[first:last]), f"rows {first} to {last}"


@pytest.mark.parametrize(("target", "bound"), [(Q4_1, 0.09), (Q8_0, 0.01)], ids=["4", "8"])
def test_the_error_is_that_of_rounding_the_weights(target: BlockFormat, bound: float) -> None:
    """Root mean square, against normal weights that nobody rounded, as a part of the result's. With
    4 bits, 15 steps between the least and the greatest of 32: 4.1 standard deviations / 15 /
    sqrt(12), which is 0.079 of one. With 8 bits 0.0055 likewise, and as much again from bfloat16 in
    the interpreter, which cuts off where a GPU rounds."""
    weight_OC = randn(32, 256, dtype=torch.float32, seed=3).cpu()
    weight = quantised(weight_OC, target)
    assert weight is not None
    x_NC = randn(16, 256, dtype=torch.bfloat16)
    exact_NO = x_NC.double().cpu() @ weight_OC.double().T
    ours_NO = multiplied(x_NC, on_device(weight), deterministic=True).double().cpu()
    assert 0.3 * bound < (ours_NO - exact_NO).std() / exact_NO.std() < bound


def test_few_rows_take_small_tiles_and_large_ones_are_not_deterministic() -> None:
    assert TILES.of(16, deterministic=False) == TILES.few
    assert TILES.of(17, deterministic=False) == TILES.of(64, deterministic=False) == TILES.many
    assert TILES.of(65, deterministic=False) == TILES.large
    assert TILES.of(10_000, deterministic=True) == TILES.many


@pytest.mark.slow
@pytest.mark.parametrize(("module", "count"), [("grouped_linear", 12), ("fp8_linear", 6)])
def test_tiles_for_few_and_many_rows_run_the_same_matrix_instructions(
    module: str, count: int
) -> None:
    """Goal: what the interpreter shows of equal bits carries over to GPUs."""
    script = """
        import json, re
        from pdserve.model.kernels import MODULE
        from pdserve.model.kernels.compile_all import compile_kernel

        found = []
        for configuration in MODULE.configurations():
            shared = "few" in configuration.name or "many" in configuration.name
            for capability in (80, 90, 100) if shared else ():
                code = compile_kernel(configuration, capability).asm["ttgir"]
                names = dict(re.findall(r"^(#\\w+) = (.*)$", code, re.MULTILINE))
                products = re.findall(r"tt\\.dot .* -> tensor<\\w+, (#\\w+)>", code)
                shapes = [re.search(r"versionMajor.*", names[name])[0] for name in products]
                case = configuration.name.replace("few", "").replace("many", "")
                dtype = str(configuration.arguments["out_ptr"])
                found.append((case, dtype, capability, sorted(set(shapes))))
        print(json.dumps(found))
    """
    ended = python("-c", textwrap.dedent(script).replace("MODULE", module))
    assert ended.returncode == 0, ended.stderr
    ways: dict[tuple[str, str, int], list[list[str]]] = {}
    for case, dtype, capability, shapes in json.loads(ended.stdout):
        assert shapes, "no matrix product was found; has the form of the compiler's code changed?"
        ways.setdefault((case, dtype, capability), []).append(shapes)
    assert len(ways) == count
    for few, many in ways.values():
        assert few == many


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "4 or 8"),
        ({"group": 48}, "multiple of 32"),
        ({"x_NC": torch.zeros(2, 64)}, "float32"),
        ({"x_NC": torch.zeros(2, 64).half().T}, "contiguous rows"),
        ({"x_NC": torch.zeros(2, 65).half()}, r"\[2, O, 32\]"),
        ({"packed_SOH": torch.zeros(1, 5, 32)}, "uint8"),
        ({"scales_GO": torch.zeros(1, 5, dtype=torch.int32)}, r"\[2, 5\]"),
        ({"bias_O": torch.zeros(5)}, r"bias must be contiguous \[5\] torch.float16"),
        ({"scales_GO": torch.zeros(2, 5, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], said: str) -> None:
    given = {
        "x_NC": torch.zeros(2, 64).half(),
        "packed_SOH": torch.zeros(1, 5, 32).byte(),
        "scales_GO": torch.zeros(2, 5, dtype=torch.int32),
        "bias_O": None,
        "bits": 4,
        "group": 32,
    }
    with pytest.raises(ValueError, match=said):
        grouped_linear(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_any_number_of_rows_gives_the_reference_and_a_row_its_own_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for target, dtype in itertools.product(FORMATS, (torch.bfloat16, torch.float16)):
        weight = on_device(drawn(1000, 1056, target))
        x_NC = randn(300, 1056, dtype=dtype)
        given = (x_NC, weight.weight_OC, weight.scales_GO, None)
        expected_NO = grouped_linear_reference(*given, bits=weight.bits, group=32)
        together_NO = multiplied(x_NC, weight, deterministic=True)
        assert_near(together_NO, expected_NO)
        assert_near(multiplied(x_NC, weight, deterministic=False), expected_NO)
        for rows in (1, 16, 17, 64):
            alone_NO = multiplied(x_NC[:rows], weight, deterministic=True)
            assert torch.equal(alone_NO, together_NO[:rows]), rows


def test_formats_with_wide_scales_become_bfloat16() -> None:
    """A step has no room for scales of 32 bits; the weights are those of the file all the same."""
    scales_OG = randn(6, 2, dtype=torch.float32, seed=3).cpu()
    weight = wide_nibbles(scales_OG, -scales_OG, torch.arange(64).repeat(6, 1) % 16)
    packed = TritonOps(device=torch.device(DEVICE)).pack(weight)
    assert type(packed) is LinearWeight
    assert packed.weight_OC.device.type == torch.device(DEVICE).type
    assert torch.equal(packed.weight_OC.cpu(), weight.dequantised().bfloat16())
