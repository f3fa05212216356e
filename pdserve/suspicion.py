"""Deaths *in one place*: what gateway, router and workers must agree on to find who is guilty.

``router.suspicion`` has the theory.
"""

from collections.abc import Iterable, Sequence

GUILTY_DEATHS = 2

PROGRESS_TOKENS = 8
"""A place is that wide: what dies in decode's first step has one token more each time."""


def is_alone(deaths: int, others: Iterable[int]) -> bool:
    """Whether nobody else who was computed has been in as many deaths, at least one.

    Args:
        deaths: of a request, before this one, in one place.
        others: the same of those beside it.
    """
    return all(other < max(1, deaths) for other in others)


def alone_in_step(deaths: Sequence[int]) -> list[bool]:
    """Of the requests of one step that raised, which are alone, by their earlier deaths."""
    return [
        is_alone(count, [*deaths[:index], *deaths[index + 1 :]])
        for index, count in enumerate(deaths)
    ]
