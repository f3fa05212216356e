"""What moves while a command takes long: a bar where the steps are known, else a spinner.

Only on a terminal, on the console that the command writes its lines to (so that they do not run
into each other), and gone when it is done. A log of a bar is a thousand lines that say nothing.
"""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def bar(what: str, console: Console, *, total: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each of ``total`` steps."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(console, *columns) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def spinner(what: str, console: Console) -> Iterator[Callable[[str], None]]:
    """While it is not known how much is left. Yields what changes the words."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _progress(console, *columns) as progress:
        task = progress.add_task(what, total=None)
        yield lambda words: progress.update(task, description=words)


def _progress(console: Console, *columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
