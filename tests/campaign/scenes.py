"""What the explorer plays: small programs that meet on a tiny store."""

from collections.abc import Mapping
from dataclasses import dataclass

STEPS_MAX = 6

Step = tuple[str, ...]
"""What to do, and with what: ``("claim", "ab")``; a word's letters are a chain's blocks."""


@dataclass(frozen=True, slots=True)
class Scene:
    name: str
    slot_count: int
    programs: Mapping[str, tuple[Step, ...]]
    stored: tuple[str, ...] = ()  # chains that are there from the start


SCENES = (
    Scene(
        "two puts of one chain, and a reader",
        3,
        {
            "w1": (("reserve", "ab", "0"), ("scribble",), ("commit",)),
            "w2": (("reserve", "abc", "0"), ("scribble",), ("commit",), ("claim", "abc")),
            "r": (("claim", "abc"), ("claim", "ab"), ("release",), ("condemn",), ("release",)),
        },
    ),
    Scene(
        "puts that want each other's memory, and a reader that holds some",
        2,
        {
            "w1": (("reserve", "ab", "0"), ("commit",), ("reserve", "c", "0"), ("commit",)),
            "w2": (("reserve", "d", "0"), ("scribble",), ("abandon",), ("reserve", "e", "0")),
            "r": (("claim", "ab"), ("release",), ("claim", "d")),
        },
        stored=("d",),
    ),
    Scene(
        "children whose parents may go meanwhile",
        3,
        {
            "w1": (("reserve", "abc", "2"), ("scribble",), ("commit",), ("claim", "abc")),
            "w2": (("reserve", "xyz", "0"), ("commit",), ("reserve", "ab", "1"), ("commit",)),
            "r": (("claim", "ab"), ("condemn",), ("release",), ("claim", "a")),
        },
        stored=("ab",),
    ),
    Scene(
        "a hand-off that somebody aborts while it is written",
        3,
        {
            "p": (
                ("open", "t", "d", "3"),
                ("push", "t", "ab"),
                ("scribble",),
                ("commit",),
                ("tail", "t"),
                ("commit",),
            ),
            "d": (("abort", "t"), ("reserve", "xyz", "0"), ("commit",), ("claim", "xyz")),
        },
    ),
    Scene(
        "a hand-off, its reader, and a put beside them",
        4,
        {
            "p": (("open", "t", "d", "2"), ("push", "t", "ab"), ("commit",), ("seal", "t")),
            "d": (("adopt", "t"), ("condemn",), ("release",)),
            "w": (("reserve", "abc", "0"), ("scribble",), ("commit",), ("claim", "ab")),
        },
    ),
    Scene(
        "three hand-offs that cannot all have their memory",
        2,
        {
            "p1": (("open", "t1", "p3", "2"), ("push", "t1", "a"), ("commit",), ("seal", "t1")),
            "p2": (("open", "t2", "*", "2"), ("tail", "t2"), ("commit",), ("seal", "t2")),
            "p3": (("adopt", "t1"), ("adopt", "t2"), ("abort", "t2"), ("release",)),
        },
    ),
    Scene(
        "a reader that pins by itself, and others that want its memory or condemn it",
        3,
        {
            "r": (("look", "ab"), ("pin",), ("confirm",), ("drop",)),
            "w": (("reserve", "xyz", "0"), ("scribble",), ("commit",), ("reserve", "d", "0")),
            "c": (("claim", "ab"), ("condemn",), ("release",)),
        },
        stored=("ab",),
    ),
)
"""Two to four slots, two or three actors, at most six steps each."""
