"""Tokens drawn by the kernels: those of the reference, and those of the host, to the last one."""

import json
import math
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch

from pdserve.messages import Sampling
from pdserve.model import sampler
from pdserve.model.kernels.sampling import drawn_tokens, drawn_tokens_reference
from pdserve.model.philox import UNIFORM_BITS, uniform_bits
from pdserve.model.sampler import SamplerRow, sample, sample_on_device
from pdserve.model.whole_weights import (
    WEIGHT_BITS,
    host_weights,
    portable_weights,
    power_factor,
)
from tests.kernels.support import DEVICE, randn
from tests.kernels.test_compile_all import python

LAST = (1 << UNIFORM_BITS) - 1  # the largest random number


def settings(
    *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, bits: int
) -> list[float]:
    least = math.ceil(min_p * 2**WEIGHT_BITS)
    return [power_factor(temperature), top_k, top_p, least, bits]


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)


def check(logits_RV: torch.Tensor, settings_RS: torch.Tensor) -> list[int]:
    """The tokens, after they were held against the reference's."""
    tokens_R = drawn_tokens(logits_RV, settings_RS)
    assert torch.equal(tokens_R, drawn_tokens_reference(logits_RV, settings_RS))
    return tokens_R.tolist()


@pytest.mark.parametrize(
    ("V", "top_k"),
    [(1, 0), (2048, 5), (2050, 2049)],  # exactly a tile; more, and more kept than have a bound
)
def test_it_equals_the_reference(V: int, top_k: int) -> None:
    wide = randn(4, V + 3, dtype=torch.float32, seed=V) * 3
    bits = [uniform_bits(V, 0, index) for index in range(4)]
    check(
        wide[:, 1 : V + 1],  # rows apart, and not aligned
        table(
            settings(temperature=0.7, bits=bits[0]),
            settings(top_k=top_k, top_p=0.8, bits=bits[1]),
            settings(top_p=0.9, min_p=0.01, bits=bits[2]),
            settings(temperature=2.0, min_p=0.2, bits=bits[3]),
        ),
    )


def test_of_equals_the_lowest_ids_are_kept() -> None:
    """Of 600 equal tokens, over the border of a tile, 520 are kept: the last one is number 519."""
    logits_RV = torch.zeros(3, 600, device=DEVICE)
    logits_RV[1] = -0.0
    logits_RV[1, 530:] = 0.0  # equal to -0
    rows = (
        settings(top_k=520, bits=LAST),
        settings(top_k=520, bits=LAST),
        settings(top_p=519.5 / 600, bits=LAST),
    )
    assert check(logits_RV, table(*rows)) == [519, 519, 519]


def test_filters_come_one_after_another() -> None:
    """Weights 4, 4, 2, 2: three are left, of 10. Of those two make 7.9, but not 9.48, which were as
    much of all; three make 9, of which the last is less than 0.9 of the heaviest."""
    logits_RV = torch.tensor([4.0, 4.0, 2.0, 2.0], device=DEVICE).log().expand(3, 4)
    rows = (
        settings(top_k=3, bits=LAST),
        settings(top_k=3, top_p=0.79, bits=LAST),
        settings(top_k=3, top_p=0.9, min_p=0.9, bits=LAST),
    )
    assert check(logits_RV, table(*rows)) == [2, 1, 1]


def test_extreme_logits_and_temperatures() -> None:
    logits_RV = torch.tensor([[-math.inf, 1e30, -1e30, 1e30, 0.0]], device=DEVICE).repeat(4, 1)
    rows = (
        settings(bits=LAST),
        settings(temperature=1e-5, top_k=4, bits=LAST),
        settings(temperature=100.0, top_p=0.5, bits=LAST),  # the first of two equals is enough
        settings(top_k=1, bits=LAST),
    )
    assert check(logits_RV, table(*rows)) == [3, 3, 1, 1]


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_a_model_that_failed_draws_nothing(strange: float) -> None:
    logits_RV = torch.tensor([[1.0, strange], [1.0, 2.0]], device=DEVICE)
    tokens_R = drawn_tokens(logits_RV, table(settings(bits=0), settings(bits=LAST)))
    assert tokens_R.tolist() == [-1, 1]
    drawn = SamplerRow(Sampling(), seed=1, choice=0, index=0, tokens=(), prompt_tokens=0)
    with pytest.raises(AssertionError, match="row 0 has no best logit: the model failed"):
        sample_on_device(logits_RV, [drawn, drawn], drawn_tokens)


def test_a_row_draws_alone_what_it_draws_in_company_and_no_rows_draw_nothing() -> None:
    logits_RV = randn(2, 700, dtype=torch.float32)
    settings_RS = table(settings(top_p=0.9, bits=LAST // 3), settings(top_k=9, bits=LAST // 7))
    together = drawn_tokens(logits_RV, settings_RS)
    assert torch.equal(drawn_tokens(logits_RV[1:], settings_RS[1:]), together[1:])
    assert drawn_tokens(logits_RV[:0], settings_RS[:0]).tolist() == []


def test_the_sampler_gets_from_the_device_what_the_host_draws_with_the_same_weights() -> None:
    """A row that wants logprobs is drawn on the host, and gets the token that it gets without."""
    logits_RV = randn(4, 1001, dtype=torch.float32, seed=3) * 2
    ways = (
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=1.3, top_k=40, min_p=0.02),
        Sampling(temperature=0.0),
        Sampling(),
    )
    rows = [
        SamplerRow(way, seed=7, choice=0, index=index, tokens=(1, 2), prompt_tokens=1)
        for index, way in enumerate(ways)
    ]
    told = [replace(row, sampling=replace(row.sampling, logprobs=0)) for row in rows]
    on_device = [token.token for token in sample_on_device(logits_RV, rows, drawn_tokens)]
    on_host = [token.token for token in sample_on_device(logits_RV, told, drawn_tokens)]
    assert on_device == on_host
    assert on_device == [token.token for token in sample(logits_RV.cpu(), rows)]


def test_a_row_that_moves_to_the_host_is_drawn_with_the_weights_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a random number that falls on another token under NumPy's exponential."""
    logits_RV = randn(1, 300, dtype=torch.float32)
    logits_V = logits_RV[0].cpu().numpy()
    borders = []
    for weights_V in (portable_weights(logits_V, 0.7), host_weights(logits_V, 0.7)):
        sums_V = np.cumsum(weights_V)
        borders.append([(int(part) << UNIFORM_BITS) // int(sums_V[-1]) for part in sums_V[:-1]])
    between = [(ours + theirs) // 2 for ours, theirs in zip(*borders, strict=True)]
    chosen = max(range(299), key=lambda token: abs(borders[0][token] - borders[1][token]))
    monkeypatch.setattr(sampler, "uniform_bits", lambda *_: between[chosen])

    row = SamplerRow(Sampling(temperature=0.7), 1, 0, 0, (), 0)
    told = replace(row, sampling=Sampling(temperature=0.7, logprobs=0))
    (drawn,) = sample_on_device(logits_RV, [row], drawn_tokens)
    (moved,) = sample_on_device(logits_RV, [told], drawn_tokens)
    (other,) = sample(logits_RV.cpu(), [row])
    assert moved.token == drawn.token != other.token


def test_portable_weights_are_the_exponential() -> None:
    logits_V = np.linspace(-40, 5, 4000, dtype=np.float32)
    weights_V = portable_weights(logits_V, 0.8)
    exact_V = np.exp((logits_V.astype(np.float64) - 5) / 0.8) * 2**WEIGHT_BITS
    assert weights_V[-1] == 1 << WEIGHT_BITS
    assert np.all(np.diff(weights_V) >= 0)
    heavy_V = exact_V > 2**20
    np.testing.assert_allclose(weights_V[heavy_V], exact_V[heavy_V], rtol=4e-6)


@pytest.mark.parametrize(
    ("logits_RV", "settings_RS", "said"),
    [
        (torch.zeros(3), table(settings(bits=0)), r"\[R, V\]"),
        (torch.zeros(1, 0), table(settings(bits=0)), "0 < V"),
        (torch.zeros(1, 4).half(), table(settings(bits=0)), "float16"),
        (torch.zeros(1, 8)[:, ::2], table(settings(bits=0)), "contiguous rows"),
        (torch.zeros(2, 4), table(settings(bits=0)), r"\[2, 5\]"),
        (torch.zeros(1, 4), table(settings(bits=0)).float(), "float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    logits_RV: torch.Tensor, settings_RS: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        drawn_tokens(logits_RV.to(DEVICE), settings_RS)


@pytest.mark.slow
def test_no_multiplication_is_fused_with_an_addition_in_machine_code() -> None:
    """What the interpreter shows of equal weights carries over to GPUs."""
    script = """
        import json, re
        from pdserve.model.kernels import sampling
        from pdserve.model.kernels.compile_all import compile_kernel

        found = []
        for configuration in sampling.configurations():
            code = compile_kernel(configuration, 90).asm["ptx"]
            fused, products = (re.findall(name, code) for name in (r"fma\\.", r"mul\\.rn\\.f32"))
            found.append((len(fused), len(products)))
        print(json.dumps(found))
    """
    ended = python("-c", textwrap.dedent(script))
    assert ended.returncode == 0, ended.stderr
    for fused, products in json.loads(ended.stdout):
        assert products, "no multiplication was found; has the form of the code changed?"
        assert fused == 0


@pytest.mark.gpu
def test_a_gpu_draws_what_the_host_draws_with_the_same_weights() -> None:
    """Goal: no token hangs on where it is drawn.

    Method: 64 rows of a large vocabulary with every mixture of filters; the reference computes with
    NumPy.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    logits_RV = (randn(64, 128_256, dtype=torch.float32, seed=1) * 3).cuda()
    mixtures = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.95, 0.0), (40, 0.9, 0.0), (0, 0.9, 0.05)]
    rows = [
        settings(
            temperature=0.5 + row / 64, top_k=k, top_p=p, min_p=m, bits=uniform_bits(row, 0, 0)
        )
        for row in range(64)
        for k, p, m in mixtures[row % len(mixtures) :][:1]
    ]
    check(logits_RV, table(*rows))
