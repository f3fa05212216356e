"""What the tests of the kernels share."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TOLERANCE = {
    # The interpreter cuts float32 off where a GPU rounds, so one unit in the last place, not half:
    # 2**-7 for the weights of a sum and as much for the sum itself.
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,  # likewise, with 2**-10
    torch.float32: 1e-5,  # about a thousand terms, 2**-24 each, added in another order
}


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shapes and dtypes, values within the dtype's tolerance."""
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
