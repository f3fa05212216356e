"""A mixture of experts against its definition, token by token."""

import torch
from torch import Tensor

from pdserve.model.architecture import Experts
from pdserve.model.mixture import mixed
from pdserve.model.ops import FeedForward, LinearWeight, Mixture
from pdserve.model.torch_ops import TorchOps

CHANNELS = 16


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(router_EC: Tensor) -> Mixture:
    experts = tuple(
        FeedForward(
            gate_up=LinearWeight(draw(2 * CHANNELS, CHANNELS, seed=index)),
            down=LinearWeight(draw(CHANNELS, CHANNELS, seed=100 + index)),
        )
        for index in range(router_EC.shape[0])
    )
    return Mixture(LinearWeight(router_EC), experts)


def computed(x_NC: Tensor, weights: Mixture, experts: Experts) -> tuple[Tensor, list[int]]:
    """The output, and how many tokens each call of an expert had."""
    ops, calls = TorchOps(), []

    def dense(rows_MC: Tensor, expert: FeedForward) -> Tensor:
        calls.append(rows_MC.shape[0])
        return ops.linear(ops.silu_mul(ops.linear(rows_MC, expert.gate_up)), expert.down)

    return mixed(x_NC, weights, experts, ops, dense), calls


def experts_of(count: int, per_token: int, *, normalised: bool = True) -> Experts:
    return Experts(count=count, per_token=per_token, ffn=CHANNELS, normalised=normalised)


def by_definition(x_C: Tensor, weights: Mixture, experts: Experts) -> Tensor:
    shares = (weights.router.weight_OC @ x_C).softmax(0)
    chosen = shares.argsort(descending=True, stable=True)[: experts.per_token].tolist()
    total = sum(shares[index] for index in chosen) if experts.normalised else 1.0
    out_C = torch.zeros(CHANNELS)
    for index in chosen:
        gate_F, up_F = (weights.experts[index].gate_up.weight_OC @ x_C).chunk(2)
        hidden_F = torch.nn.functional.silu(gate_F) * up_F
        out_C += shares[index] / total * (weights.experts[index].down.weight_OC @ hidden_F)
    return out_C


def test_every_token_gets_its_best_experts_by_their_shares() -> None:
    weights, x_NC = weights_of(draw(5, CHANNELS)), draw(9, CHANNELS, seed=1)
    for normalised in (False, True):
        experts = experts_of(5, 3, normalised=normalised)
        out_NC, calls = computed(x_NC, weights, experts)
        expected_NC = torch.stack([by_definition(x_C, weights, experts) for x_C in x_NC])
        torch.testing.assert_close(out_NC, expected_NC, rtol=1e-4, atol=1e-4)
        assert sum(calls) == 9 * 3


def test_of_equally_good_experts_the_lower_ones_are_taken() -> None:
    """All four are equal: two tokens, and both of them in experts 0 and 1 alone."""
    experts = experts_of(4, 2)
    weights, x_NC = weights_of(torch.zeros(4, CHANNELS)), draw(2, CHANNELS, seed=1)
    out_NC, calls = computed(x_NC, weights, experts)
    assert calls == [2, 2]
    torch.testing.assert_close(out_NC[0], by_definition(x_NC[0], weights, experts))


def test_a_token_has_the_same_bits_alone_and_among_others() -> None:
    experts = experts_of(8, 3)
    weights, x_NC = weights_of(draw(8, CHANNELS)), draw(70, CHANNELS, seed=1)
    together_NC, _ = computed(x_NC, weights, experts)
    for first, count in ((0, 1), (17, 1), (3, 20), (69, 1)):
        part_NC, _ = computed(x_NC[first : first + count], weights, experts)
        assert torch.equal(part_NC, together_NC[first : first + count])
