"""Takes secrets and clients' texts out of what leaves the house. Pure.

Three nets, each for what slips through the others: names (a setting, a header or a variable that is
called a key), forms (what looks like a key wherever it stands), and values (secrets that are known
to us, letter by letter). No pattern takes more than linear time on a line, whatever is in it.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

MARK = "***"

KNOWN_CHARACTERS_MIN = 6
"""A shorter value is no secret that could be told from an ordinary word."""

SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:salt|secret|password|passwd|pass|token|auth|credentials?|cookie"
    r"|(?:api|access|private|secret|license)[_-]?key|authorization)s?$",
    re.IGNORECASE,
)

_FORMS = (
    re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S
    ),
    re.compile(r"\bpd-[0-9a-f]{16,}"),  # ours
    re.compile(r"\b(?:sk|rk|pk|gsk)[-_][A-Za-z0-9_-]{16,}"),  # OpenAI's kind
    re.compile(r"\b(?:hf|ghp|gho|ghs|github_pat|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,2000}\.eyJ[\w-]{8,4000}\.[\w-]+"),  # a JSON web token
)  # fmt: skip

_BEARER = re.compile(r"\b((?:bearer|basic)\s+)[\w.~+/=-]{6,}", re.IGNORECASE)

_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@\"']{0,500}@", re.IGNORECASE)

_NAMED = re.compile(
    r"""((?:salt|secret|password|passwd|api[_-]?key|access[_-]?key|private[_-]?key
        |authorization|(?<![a-z])token|cookie)["']?\s*[:=]\s*)
        (?!["']?\*\*\*)("[^"]*"|'[^']*'|[^\s,;}\])]+)""",
    re.IGNORECASE | re.VERBOSE,
)

_TEXTS = "prompt|messages|content|text|input|instructions|arguments|suffix|tools|delta|output"
_SAID = re.compile(
    rf"""(["']?\b(?:{_TEXTS}|\w*token_ids|tokens)\b["']?\s*[:=]\s*)(?=[bB]?["'\[{{(]).*$""",
    re.MULTILINE,
)
"""What a client said or was answered, in JSON, in a ``repr`` or in a log. Where such a value ends
cannot be told in a line that may be cut, so the rest of the line goes."""

_REPORTS = frozenset(
    ["prompt", "messages", "content", "text", "input", "instructions", "arguments", "suffix"]
)


def forms_in(text: str) -> list[str]:
    """What looks like a key, as it stands there."""
    return [found[0] for form in _FORMS for found in form.finditer(text)]


def text_without_secrets(text: str, known: Collection[str] = ()) -> str:
    """Logs and whatever else has no structure.

    Args:
        known: secrets by value; those that are too short to be told from words are passed over.
    """
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= KNOWN_CHARACTERS_MIN:
            text = text.replace(secret, MARK)
    for form in _FORMS:
        text = form.sub(MARK, text)
    text = _BEARER.sub(rf"\1{MARK}", text)
    text = _USERINFO.sub(rf"\1{MARK}@", text)
    text = _SAID.sub(rf"\1{MARK}", text)
    return _NAMED.sub(rf"\1{MARK}", text)


def tree_without_secrets(tree: Any, known: Collection[str] = ()) -> Any:
    """JSON: the same, and by the names of its fields. Numbers and flags stay."""
    if isinstance(tree, Mapping):
        return {
            str(name): MARK
            if isinstance(value, str | list) and value and _is_told(str(name), value)
            else tree_without_secrets(value, known)
            for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [tree_without_secrets(each, known) for each in tree]
    if isinstance(tree, str):
        return text_without_secrets(tree, known)
    return tree


def settings_without_secrets(config: Any) -> dict[str, Any]:
    """Every setting of a tree of dataclasses. A field that its own class does not show (``repr`` is
    off) is secret whatever its name is."""
    shown: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            shown[field.name] = settings_without_secrets(value)
        elif value and not field.repr:
            shown[field.name] = MARK
        else:
            shown[field.name] = tree_without_secrets({field.name: value})[field.name]
    return shown


def secrets_in(environment: Mapping[str, str]) -> set[str]:
    """Values of variables that are called secret."""
    return {value for name, value in environment.items() if value and SECRET_NAME.search(name)}


def _is_told(name: str, value: Any) -> bool:
    """A path in a setting is no secret, what is in the file is."""
    if name in _REPORTS:
        return True
    return isinstance(value, str) and SECRET_NAME.search(name) is not None and "/" not in value
