"""Values: what is promised of them at run time; that nobody changes them is mypy's to see."""

import dataclasses
import pickle

import pytest

from pdserve.ids import RequestId
from pdserve.lifecycle import Event
from pdserve.messages import Progress
from pdserve.values import value


@value
class Pair:
    first: int
    second: tuple[int, ...] = ()


def test_values_with_equal_fields_are_one_in_a_set() -> None:
    assert Pair(1, (2,)) == Pair(first=1, second=(2,))
    assert {Pair(1), Pair(1), Pair(2)} == {Pair(1), Pair(2)}


def test_a_value_has_no_other_fields() -> None:
    with pytest.raises(AttributeError):
        Pair(1).third = 3  # type: ignore[attr-defined]


def test_a_changed_copy_leaves_the_value_as_it_was() -> None:
    one = Pair(1)
    assert dataclasses.replace(one, second=(3,)) == Pair(1, (3,))
    assert one == Pair(1)


def test_messages_survive_being_pickled() -> None:
    """As Ray does with what a control call carries."""
    said = Progress(RequestId("r"), 0, Event.ENDED, 5)
    assert pickle.loads(pickle.dumps(said)) == said
