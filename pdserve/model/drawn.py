"""Tokens drawn on the device that has the logits, and fetched while it goes on computing.

Only for rows whose token is their best logit (``sampler.is_plain``): all else is drawn on the host.

Shape letters: R rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.messages import Token


class Drawn:
    """The tokens of one step: already the input of the next, not yet known here."""

    def __init__(self, logits_RV: Tensor) -> None:
        on_gpu = logits_RV.device.type == "cuda"
        self._tokens_R = logits_RV.argmax(dim=-1)
        self._host_R = torch.empty(len(logits_RV), dtype=torch.int64, pin_memory=on_gpu)
        self._host_R.copy_(self._tokens_R, non_blocking=True)
        self._fetched: Any = None
        if on_gpu:
            self._fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._fetched.record()

    def of(self, rows: Sequence[int]) -> Tensor:
        """The tokens of ``rows``, ascending, on the device; nothing is waited for."""
        if len(rows) == len(self._tokens_R):
            return self._tokens_R
        index_R = torch.tensor(rows, pin_memory=self._host_R.is_pinned())
        return self._tokens_R[index_R.to(self._tokens_R.device, non_blocking=True)]

    def tokens(self) -> list[Token]:
        """Waits for the step, though not for what was launched after it."""
        if self._fetched is not None:
            self._fetched.synchronize()
        return [Token(token) for token in self._host_R.tolist()]
