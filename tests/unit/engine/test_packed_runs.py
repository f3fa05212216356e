"""Runs on their way to the other ranks."""

from pdserve.engine.packed_runs import packed, unpacked
from pdserve.model.runner import Run


def test_runs_come_out_as_they_went_in() -> None:
    runs = [
        Run([5, 6, 7], 16, [3, 9]),
        Run((1,), 0, range(4, 6), wants_logits=False),
        Run([2, 3], 40, [8], draft_count=1),
    ]
    listed = [
        Run([5, 6, 7], 16, [3, 9]),
        Run([1], 0, [4, 5], wants_logits=False),
        Run([2, 3], 40, [8], draft_count=1),
    ]
    assert unpacked(packed(runs)) == listed
