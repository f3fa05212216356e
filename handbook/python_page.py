"""The public Python API, from signatures and docstrings, without importing anything of it."""

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from handbook.tables import HEAD, block, prose

INTRODUCTION = """# Python

What programs may import. Everything else may change from one version to the next.
"""


@dataclass(frozen=True, slots=True)
class Offer:
    """What of a module is for users, under the name they import it by."""

    imported_from: str
    file: str
    names: Sequence[str]


OFFERS = (
    Offer(
        "pdserve",
        "pdserve/cluster/offline.py",
        ("LLM", "SamplingParams", "RequestOutput", "CompletionOutput"),
    ),
    Offer("pdserve.cluster.app", "pdserve/cluster/app.py", ("build",)),
    Offer(
        "pdserve.cluster.autoscaling",
        "pdserve/cluster/autoscaling.py",
        ("policy", "joint_policy", "Headroom", "metric_of"),
    ),
    Offer("pdserve.settings", "pdserve/settings.py", ("load", "from_tree", "to_tree")),
)


def python_page(root: Path) -> str:
    out = [HEAD + INTRODUCTION]
    for offer in OFFERS:
        tree = ast.parse((root / offer.file).read_text())
        out.append(f"## {offer.imported_from}\n\n{documented(ast.get_docstring(tree) or '')}\n")
        for name in offer.names:
            out += described(_named(tree.body, name), "###")
    return "\n".join(out)


def described(node: ast.stmt, marks: str, owner: str = "") -> Iterator[str]:
    """A function, or a class with its public members."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"{marks} {owner}{node.name}\n\n" + block(signature(node), "python")
        yield documented(ast.get_docstring(node) or "") + "\n"
        return
    assert isinstance(node, ast.ClassDef)
    yield f"{marks} {node.name}\n"
    begin = [member for member in node.body if _is(member, "__init__")]
    fields = [member for member in node.body if isinstance(member, ast.AnnAssign)]
    if begin:
        yield block(signature(begin[0], node.name), "python")
    elif fields:
        lines = [f"{node.name}:", *(f"    {ast.unparse(each)}" for each in fields)]
        yield block("\n".join(lines), "python")
    yield documented(ast.get_docstring(node) or "") + "\n"
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and _is_offered(member):
            yield from described(member, marks + "#", f"{node.name}.")


def signature(node: ast.stmt, name: str = "") -> str:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    arguments.args.args = [each for each in arguments.args.args if each.arg not in ("self", "cls")]
    inner = ast.unparse(arguments.args)
    gives = f" -> {ast.unparse(node.returns)}" if node.returns is not None and not name else ""
    line = f"{name or node.name}({inner}){gives}"
    if len(line) <= 90:
        return line
    return (
        f"{name or node.name}(\n"
        + "".join(f"    {each},\n" for each in _split(inner))
        + f"){gives}"
    )


def documented(docstring: str) -> str:
    """Markdown of a docstring: its sections (Args, Raises) as lists, its examples as code."""
    out: list[str] = []
    section = False
    code: list[str] = []
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        indented = line.startswith("    ")
        if code and line.strip() and not indented:
            out += ["", block("\n".join(code), "python")]
            code = []
        if line.rstrip(":") in ("Args", "Returns", "Raises", "Yields") and line.endswith(":"):
            out += ["", f"*{line}*", ""]
            section = True
        elif section and indented and ":" in line and not line.startswith("     "):
            name, _, said = line.strip().partition(":")
            out.append(prose(f"- ``{name}``:{said}"))
        elif section and indented:
            out.append(prose(f"  {line.strip()}"))
        elif indented or (code and not line.strip()):
            code.append(line.removeprefix("    "))
        else:
            section = section and not line.strip()
            out.append(prose(line))
    if any(code):
        out += ["", block("\n".join(code), "python")]
    return "\n".join(out).strip()


def _split(arguments: str) -> Iterator[str]:
    """At the commas that are in no brackets."""
    depth, part = 0, ""
    for letter in arguments + ",":
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield part.strip()
            part = ""
        else:
            part += letter


def _is(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name


def _is_offered(member: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """What says nothing of itself is for our own use."""
    return not member.name.startswith("_") and ast.get_docstring(member) is not None


def _named(body: Sequence[ast.stmt], name: str) -> ast.stmt:
    for node in body:
        if getattr(node, "name", None) == name:
            return node
    raise KeyError(f"{name} is not defined at the top of its module; mend OFFERS")
