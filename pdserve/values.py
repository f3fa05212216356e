"""Values that are made in great numbers: frozen to the type checker, plain at run time.

A frozen dataclass sets each of its fields through ``object.__setattr__``, so one of twelve fields
takes about five times as long to make as one that may be changed. Messages are made by the hundred
thousand per second, and mypy, which reads every line that could change one, is told that they are
frozen. So here the interpreter is not asked to watch as well.
"""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

Class = TypeVar("Class")


@dataclass_transform(frozen_default=True)
def value(cls: type[Class]) -> type[Class]:
    """A dataclass with slots, equal and hashed by its fields; only the type checker forbids to
    change them."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
