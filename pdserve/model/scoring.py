"""How likely given tokens were: log-probability, rank and the best of each row of logits.

On a CPU by the sampler's own arithmetic, so that a token that was drawn and is then scored as part
of a prompt gets the same number, to the bit. On a GPU all rows at once where they are, and only the
scores come back: the same values up to float32's last place, and of equal logits at the end of the
best any may be named.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pdserve.model.sampler import logprob_of
from pdserve.prompt_tasks import PromptScore


def scores_of(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[PromptScore]:
    """The score of ``tokens[i]`` under row i of ``logits_NV``, float32 on any device."""
    assert logits_NV.dtype == torch.float32, logits_NV.dtype
    assert len(logits_NV) == len(tokens), f"{len(logits_NV)} rows for {len(tokens)} tokens"
    if logits_NV.device.type == "cpu":
        return _on_host(logits_NV, tokens, top)
    return scores_on_device(logits_NV, tokens, top)


def score_of_candidates(logits_V: Tensor, candidates: Sequence[int]) -> PromptScore:
    """How likely each of ``candidates`` is under ``logits_V``, float32 on any device; ``top`` has
    them in their order, and the score is that of the likeliest."""
    assert candidates, "somebody has to be scored"
    best = logits_V.max()
    # float32 for the terms, float64 for their sum, as in the sampler.
    log_sum = float(best) + float((logits_V - best).exp().sum(dtype=torch.float64).log())
    asked = torch.tensor(candidates, device=logits_V.device)
    found = (logits_V[asked].double() - log_sum).tolist()
    rank = int((logits_V > logits_V[asked].max()).sum()) + 1
    return PromptScore(max(found), rank, tuple(zip(candidates, found, strict=True)))


def _on_host(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[PromptScore]:
    scores = []
    for logits_V, token in zip(logits_NV.detach().numpy(), tokens, strict=True):
        found = logprob_of(logits_V, token, top)
        rank = int(np.count_nonzero(logits_V > logits_V[token])) + 1
        scores.append(PromptScore(found.logprob, rank, found.top))
    return scores


def scores_on_device(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[PromptScore]:
    """``scores_of`` where moving logits costs."""
    token_N1 = torch.tensor(tokens, device=logits_NV.device).unsqueeze(1)
    own_N1 = logits_NV.gather(1, token_N1)
    rank_N = (logits_NV > own_N1).sum(dim=-1) + 1
    best_N1 = logits_NV.amax(dim=-1, keepdim=True)
    # float32 for the terms, float64 for their sum, as in the sampler.
    sum_N1 = (logits_NV - best_N1).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    log_sum_N1 = best_N1.double() + sum_N1.log()
    values_NK, ids_NK = logits_NV.topk(min(top, logits_NV.shape[1]), dim=-1)
    own = (own_N1.double() - log_sum_N1).squeeze(1).tolist()
    best = [
        sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        for ids, values in zip(
            ids_NK.tolist(), (values_NK.double() - log_sum_N1).tolist(), strict=True
        )
    ]
    rows = zip(own, rank_N.tolist(), best, strict=True)
    return [PromptScore(logprob, rank, tuple(top_of)) for logprob, rank, top_of in rows]
