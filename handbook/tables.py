"""Markdown, from values. Pure."""

from collections.abc import Iterable, Sequence

HEAD = "<!-- Made by python -m handbook; do not edit. -->\n\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A cell is one line; what would end it early is escaped."""
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([cell(text) for text in row]) for row in rows]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """``text`` as inline code, with a fence that is longer than any in it."""
    fence = "``" if "`" in text else "`"
    inner = f" {text} " if "`" in text else text
    return f"{fence}{inner}{fence}" if text else ""


def block(text: str, language: str = "") -> str:
    longest = max((len(run) for run in _runs(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def prose(text: str) -> str:
    """A docstring as Markdown: ``x`` becomes `x`, and what HTML would take for a tag stays text."""
    lines = []
    for line in text.replace("``", "`").splitlines():
        parts = line.split("`")
        parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
        lines.append("`".join(parts))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _runs(text: str) -> Iterable[str]:
    return (run for line in text.splitlines() for run in [line.lstrip()] if run.startswith("```"))
