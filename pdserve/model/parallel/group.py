"""Where the ranks of a split model meet: two operations, and nothing else is exchanged in a step.

Each rank brings its parts, in order; everybody gets all of them, and adds them in that order. The
order is ours because a sum of floats depends on it: an all-reduce of a library adds in an order
that may depend on the length of the message, and so on who shares the batch. For two parts it is
the same traffic; for n it is n / 2 times that of a ring.

Shape letters: N tokens, C channels, V tokens of the vocabulary that a part has logits for.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor

from pdserve.errors import RankLost
from pdserve.model.parallel.parts import Split


class Group(Protocol):
    def summed(self, parts_NC: Sequence[Tensor]) -> Tensor:
        """The sum over the parts of all ranks, [N, C]; in float32, rounded once.

        Raises:
            RankLost: a rank is gone, or has not come in time.
        """
        ...

    def side_by_side(self, parts_NV: Sequence[Tensor]) -> Tensor:
        """The columns of all ranks' parts in order, [N, parts * V]. Raises as ``summed``."""
        ...


class Alone:
    """All parts are in this process."""

    def summed(self, parts_NC: Sequence[Tensor]) -> Tensor:
        return in_order(parts_NC)

    def side_by_side(self, parts_NV: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts_NV), dim=-1)


class Ranks:
    """Parts are in several processes, which torch's default process group connects.

    There is one such group in a process; a second cannot be joined before ``close``.
    """

    def __init__(self, split: Split, meeting: Path, device: torch.device, *, wait_s: float) -> None:
        """Returns when all ranks are there.

        Args:
            meeting: a file that is not there yet, the same for all ranks.
            wait_s: bound of every wait for another rank, this one included.

        Raises:
            RankLost: not all ranks came.
        """
        # One host, and none of anybody else's business.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._split = split
        self._wait_s = wait_s
        wait = timedelta(seconds=wait_s)
        with self._losses():
            torch.distributed.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                init_method=f"file://{meeting}",
                rank=split.rank,
                world_size=split.rank_count,
                timeout=wait,
                device_id=None if device.type == "cpu" else device,
            )

    def summed(self, parts_NC: Sequence[Tensor]) -> Tensor:
        return in_order(self._all(parts_NC))

    def side_by_side(self, parts_NV: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(self._all(parts_NV)), dim=-1)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the others may be gone already
            torch.distributed.destroy_process_group()

    def _all(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        own = torch.stack(list(parts))
        everybodys = own.new_empty((self._split.rank_count, *own.shape))
        with self._losses():
            torch.distributed.all_gather(list(everybodys), own)
        return everybodys.flatten(0, 1).unbind()

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's own errors of a group are kinds of it
            raise RankLost(
                f"a process of this split model is gone, or did not come within {self._wait_s:g} s "
                f"({error}); the worker must be started again"
            ) from error


def in_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum, one after the other; rounded to the parts' dtype at the end."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
