"""Which modules a Python file imports, wherever in the file it does so. Reads source, runs none."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pdserve"
GENERATED = PACKAGE / "proto"


@dataclass(frozen=True, slots=True)
class Import:
    module: str  # as written, in full: pdserve.router.core, os.path
    line: int
    relative: bool = False

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports_of(tree: ast.AST) -> Iterator[Import]:
    """Every import statement, and every call of ``import_module`` with a literal name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(name.name, node.lineno) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                module = module or ""
                yield Import(module, node.lineno, relative=level > 0)
                # ``from pdserve import wire`` names a folder in its second half.
                yield from (
                    Import(f"{module}.{name.name}", node.lineno, relative=level > 0)
                    for name in names
                )
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield Import(module, node.lineno)
            case _:
                pass


def folder_of(path: Path) -> str | None:
    """The folder of ``pdserve`` that a file belongs to; None for the shared vocabulary."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def source_files(*roots: Path) -> list[Path]:
    """All Python files below ``roots`` that people wrote, in a stable order."""
    return sorted(
        path
        for root in roots
        for path in root.rglob("*.py")
        if GENERATED not in path.parents and "__pycache__" not in path.parts
    )
