"""Memory in common."""

import os

from pdserve.engine.staging import mapped_memory, new_memory


def test_who_has_the_descriptor_has_the_same_memory() -> None:
    descriptor = new_memory(100)
    assert not os.get_inheritable(descriptor), "children get what they are passed"
    other = os.dup(descriptor)
    mine, theirs = mapped_memory(descriptor), mapped_memory(other)
    assert bytes(theirs) == bytes(100)
    mine[3] = 7
    assert theirs[3] == 7
