import struct
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.text.gguf_metadata import read_metadata
from tests.unit.text.support import write_gguf


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf",
        lambda w: w.add_string("t.text", "né"),
        lambda w: w.add_bool("t.yes", True),
        lambda w: w.add_uint64("t.large", 1 << 40),
        lambda w: w.add_float32("t.half", 0.5),
        lambda w: w.add_array("t.texts", ["a", "", "▁b"]),
        lambda w: w.add_array("t.numbers", [1, -2]),
        lambda w: w.add_string("other", "x"),
    )
    assert read_metadata(path, "t.") == {
        "t.text": "né",
        "t.yes": True,
        "t.large": 1 << 40,
        "t.half": 0.5,
        "t.texts": ["a", "", "▁b"],
        "t.numbers": [1, -2],
    }


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf", lambda w: w.add_array("t", ["abc", "d"])).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(whole.index(b"d", 24)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            read_metadata(cut)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60), "damaged"),
        (b"GGUF" + struct.pack("<IQQQI", 3, 0, 1, 0, 77), "damaged"),  # a value of no known type
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_metadata(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_metadata(tmp_path / "a.gguf")
