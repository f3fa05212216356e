"""A mixture of experts: every token goes through the few that the router finds best for it.

Tokens are sorted by expert, so that each expert that has any is one matrix product over all of
them. Which ones share a product changes no bit (``Ops.linear``); what is done here besides is
elementwise, or sorts or normalises a token's own row; and a token's experts are added in the order
of their rank, best first, in float32, rounded once. Of equally good experts the lower one counts as
better.

Shape letters as in ``ops.py``; E experts, K experts of a token, M = N * K places: a token in one of
its experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pdserve.model.architecture import Experts
from pdserve.model.ops import FeedForward, Mixture, Ops


def mixed(
    x_NC: Tensor,
    weights: Mixture,
    experts: Experts,
    ops: Ops,
    dense: Callable[[Tensor, FeedForward], Tensor],
) -> Tensor:
    """[N, C]: the layer's output. ``dense`` computes one expert's."""
    share_NK, expert_NK = _routed(ops.linear(x_NC, weights.router), experts)
    place_M = torch.argsort(expert_NK.flatten(), stable=True)
    rows_MC = x_NC[place_M // experts.per_token]
    counts = torch.bincount(expert_NK.flatten(), minlength=experts.count).tolist()
    outs_MC = torch.empty_like(rows_MC)
    first = 0
    for expert, count in zip(weights.experts, counts, strict=True):
        if count:
            outs_MC[place_M[first : first + count]] = dense(rows_MC[first : first + count], expert)
        first += count
    outs_NKC = outs_MC.view(*expert_NK.shape, -1).float() * share_NK[:, :, None]
    return _in_order(outs_NKC).to(x_NC.dtype)


def _routed(logits_NE: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """(share, expert) of each token's best experts, [N, K], best first; shares in float32."""
    share_NE = logits_NE.float().softmax(dim=-1)
    # Sorted, since topk promises nothing about which of two equal ones it takes.
    share_NE, expert_NE = share_NE.sort(dim=-1, descending=True, stable=True)
    share_NK = share_NE[:, : experts.per_token]
    if experts.normalised:
        share_NK = share_NK / _in_order(share_NK)[:, None]
    return share_NK, expert_NE[:, : experts.per_token]


def _in_order(parts_NKX: Tensor) -> Tensor:
    """The sum over K, one after the other: torch's own may depend on the number of rows."""
    total = parts_NKX[:, 0]
    for rank in range(1, parts_NKX.shape[1]):
        total = total + parts_NKX[:, rank]
    return total
