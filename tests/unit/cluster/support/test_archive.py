import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.support.archive import CUT, Gathered, packed, within_bounds, write
from pdserve.errors import ConfigError

PARTS = st.lists(
    st.builds(
        Gathered,
        name=st.uuids().map(str),
        content=st.integers(0, 3000).map(bytes),
        missing=st.sampled_from(["", "", "no answer within 5 s"]),
    ),
    max_size=8,
)


@given(PARTS, st.integers(len(CUT) + 1, 2000), st.integers(0, 6000))
def test_an_archive_keeps_within_its_bounds_and_tells_of_every_part(
    parts: list[Gathered], part_max: int, total_max: int
) -> None:
    kept, entries = within_bounds(parts, part_bytes_max=part_max, total_bytes_max=total_max)
    assert sum(len(part.content) for part in kept) <= total_max
    assert all(len(part.content) <= part_max for part in kept)
    assert [entry.name for entry in entries] == [part.name for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        whole = entry.bytes == len(part.content) and not entry.cut
        assert whole or entry.cut or entry.missing


def test_what_is_missing_is_told_with_its_reason() -> None:
    content = packed(
        [Gathered("status.json", b"{}"), Gathered("kv.json", missing="nothing answers")],
        {"url": "u"},
        at_unix_s=7,
    )
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["pdserve-bundle/manifest.json", "pdserve-bundle/status.json"]
        file = tar.extractfile("pdserve-bundle/manifest.json")
        assert file is not None
        manifest = json.load(file)
    assert manifest["missing"] == {"kv.json": "nothing answers"}
    assert [part["name"] for part in manifest["parts"]] == ["status.json"]


def test_the_same_parts_are_the_same_bytes() -> None:
    parts = [Gathered("a", b"x" * 100)]
    assert packed(parts, {}, at_unix_s=7) == packed(parts, {}, at_unix_s=7)


def test_a_bundle_is_its_owners_alone_and_takes_no_files_place(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    write(path, b"x")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="--out is"):
        write(path, b"y")
    assert path.read_bytes() == b"x"
