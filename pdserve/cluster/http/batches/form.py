"""``multipart/form-data`` (RFC 7578), as clients upload files: a body to its fields. Pure, strict,
and bounded: what two readers could understand differently is refused.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField, RequestError

PARTS_MAX = 1000
HEAD_BYTES_MAX = 4096

_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))\s*(?:;|$)', re.IGNORECASE)
_PARAMETER = re.compile(r';\s*([a-z]+\*?)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Field:
    data: bytes
    filename: str | None = None

    def text(self, name: str) -> str:
        """
        Raises:
            InvalidField: it is not UTF-8.
        """
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise InvalidField(name, "is not UTF-8") from None


def fields_of_form(content_type: str, body: bytes, known: Collection[str]) -> dict[str, Field]:
    """By name, those that are ``known``. As with other bodies, what nobody asks for is passed over.

    Raises:
        RequestError: it is no such form, or one that is cut off.
        InvalidField: a field comes twice.
    """
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise RequestError("the content-type names no boundary; send multipart/form-data")
    mark = b"\r\n--" + (found[1] or found[2]).encode()
    preamble, *parts = (b"\r\n" + body).split(mark)
    if not parts or parts[-1].rstrip(b" \t\r\n") != b"--" or preamble.strip():
        raise RequestError("the body is no whole form: it has to end with its boundary and --")
    if len(parts) - 1 > PARTS_MAX:
        raise RequestError(f"the form has {len(parts) - 1} fields, at most {PARTS_MAX} pass")
    fields: dict[str, Field] = {}
    for part in parts[:-1]:
        name, field = _field(part)
        if name not in known:
            continue
        if name in fields:
            raise InvalidField(shown(name).strip("'\""), "appears twice in the form")
        fields[name] = field
    return fields


def _field(part: bytes) -> tuple[str, Field]:
    head, gap, data = part.partition(b"\r\n\r\n")
    if not gap or not head.startswith(b"\r\n") or len(head) > HEAD_BYTES_MAX:
        raise RequestError("a field of the form has no headers, or ones that are too long")
    for line in head[2:].decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            break
    else:
        raise RequestError("a field of the form has no content-disposition")
    if value.partition(";")[0].strip().lower() != "form-data":
        raise RequestError("a field of the form is not form-data")
    said = {key.lower(): _plain(quoted, bare) for key, quoted, bare in _PARAMETER.findall(value)}
    if "name" not in said:  # one that is empty is some field that nobody asks for
        raise RequestError("a field of the form has no name")
    return said["name"], Field(data, said.get("filename"))


def _plain(quoted: str, bare: str) -> str:
    return bare or re.sub(r"\\(.)", r"\1", quoted)
