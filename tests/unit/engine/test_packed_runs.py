"""Runs on their way to the other ranks."""

from pdserve.engine.packed_runs import packed, unpacked
from pdserve.model.runner import Reader, Run


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


def test_others_hear_that_logits_are_read_and_not_what_becomes_of_them() -> None:
    runs = [
        Run([1, 2], 0, [0], reader=Reader(logits=lambda _: None)),
        Run([1, 2], 0, [1], reader=Reader(hidden=lambda _: None)),
        Run([1, 2], 0, [2]),
    ]
    told = unpacked(packed(runs))
    assert [run.reader is not None for run in told] == [True, False, False]
    assert told[0].reader is not None
    assert told[0].reader.hidden is None
