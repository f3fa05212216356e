"""The quick start's blocks, in their order, by the terminal that each is typed into."""

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
BLOCK = re.compile(r'^```(sh|python) title="terminal (\d)(, stays open)?"\n(.*?)^```', re.M | re.S)
FENCE = re.compile(r"^```\w", re.M)


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    terminal: int
    stays_open: bool
    code: str

    @property
    def script(self) -> str:
        """What is typed into the terminal's shell."""
        if self.language == "sh":
            return self.code
        return f"python - <<'PROGRAM'\n{self.code}PROGRAM\n"


def blocks(text: str | None = None) -> list[Block]:
    page = PAGE.read_text() if text is None else text
    found = [
        Block(language, int(terminal), bool(stays), code)
        for language, terminal, stays, code in BLOCK.findall(page)
    ]
    assert len(found) == len(FENCE.findall(page)), "a block says no terminal"
    return found
