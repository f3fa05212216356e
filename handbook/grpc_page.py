"""Services, calls and messages of the gRPC API, from the protocol files and their comments."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from handbook.tables import HEAD, block, table

FILES = ("pdserve/v1/inference.proto", "kserve/inference.proto", "vllm/engine.proto")

INTRODUCTION = """# gRPC services

Made from the files in `proto/`. How to reach them, keys, deadlines and errors:
[gRPC](../grpc.md).
"""

RPC = re.compile(
    r"rpc\s+(\w+)\s*\(\s*(stream\s+)?([\w.]+)\s*\)\s*returns\s*\(\s*(stream\s+)?([\w.]+)\s*\)"
)


@dataclass(slots=True)
class Definition:
    """A service, message or enum at the top of a file."""

    kind: str
    name: str
    comment: str
    lines: list[str] = field(default_factory=list)


def grpc_page(folder: Path) -> str:
    out = [HEAD + INTRODUCTION]
    for name in FILES:
        text = (folder / name).read_text()
        package = re.findall(r"^package ([\w.]+);", text, re.M)[0]
        out.append(f"## {package}\n\n{opening(text)}\n")
        for found in definitions(text):
            title = f"### {package}.{found.name}\n\n{found.comment}\n"
            if found.kind == "service":
                out.append(title + "\n" + table(["call", "takes", "gives", ""], calls(found)))
            else:
                out.append(title + "\n" + block("\n".join(found.lines), "protobuf"))
    return "\n".join(out)


def opening(text: str) -> str:
    """What the file says before its first statement."""
    said = []
    for line in text.splitlines():
        if not line.startswith("//"):
            break
        said.append(line.removeprefix("//").strip())
    return "\n".join(said)


def definitions(text: str) -> Iterator[Definition]:
    """In the file's order, each with the comment above it."""
    comment: list[str] = []
    open_: Definition | None = None
    depth = 0
    for line in text.splitlines():
        if open_ is None:
            if begun := re.match(r"(service|message|enum)\s+(\w+)\s*\{", line):
                open_ = Definition(begun[1], begun[2], "\n".join(comment))
            elif line.startswith("//"):
                comment.append(line.removeprefix("//").strip())
                continue
            comment = []
        if open_ is not None:
            open_.lines.append(line)
            bare = line.partition("//")[0]
            depth += bare.count("{") - bare.count("}")
            if depth == 0:
                yield open_
                open_ = None


def calls(service: Definition) -> Iterator[list[str]]:
    comment: list[str] = []
    for line in service.lines:
        if found := RPC.search(line):
            takes, gives = (
                f"{'stream of ' if stream else ''}`{message}`"
                for stream, message in (found.group(2, 3), found.group(4, 5))
            )
            yield [f"`{found[1]}`", takes, gives, " ".join(comment)]
            comment = []
        elif line.strip().startswith("//"):
            comment.append(line.strip().removeprefix("//").strip())
        else:
            comment = []
