"""Which tokens grammars allow next, computed while nobody waits for it where that is possible.

*What is done once for a request*, compiling its constraint and replaying its tokens, is begun on a
thread of its own when the request comes in: it waits for blocks or for its prompt anyway.

*What is done in every step*, some 10 microseconds a row, is done when the step's rows are gone
through: while a GPU computes their logits, or behind the pass of a CPU. A thread beside that would
take a core from one of those that the model computes with and have all others of them wait: with
eight rows on two cores it was no faster.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pdserve.model.sampler import SamplerRow
from pdserve.text.grammar import Guide


class Masks:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")  # started at the first use

    def open(self, guide: Guide) -> None:
        """Begin what takes long; who looks ahead before it is done waits for it."""
        self._thread.submit(guide.open)

    def close(self) -> None:
        """What is under way is finished; nothing is begun any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def looking_ahead(
    asked: Sequence[tuple[Guide | None, Sequence[int]]], rows: Iterable[SamplerRow]
) -> Iterator[SamplerRow]:
    """``rows``, for which each guide looks ahead over its drafts first; None is unconstrained."""
    for guide, drafts in asked:
        if guide is not None:
            guide.look_ahead(drafts)
    yield from rows
