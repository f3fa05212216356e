"""The header of a GGUF file, compared with its own package; broken files."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.model.families.registry import read_architecture
from pdserve.model.gguf_file import TYPES, GgufFile
from pdserve.model.source import ModelFiles


def write(path: Path, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(77)
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_bool("a.flag", True)
    writer.add_token_list(["a", "bc", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_string("text", "größer")
    writer.add_tensor("weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("odd", np.ones(3, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    write(path)
    return path


def test_fields_are_read_and_arrays_passed_over(path: Path) -> None:
    file = GgufFile(path)
    assert file.field("llama.context_length", int) == 77
    assert file.field("llama.attention.layer_norm_rms_epsilon", float) == 0.5
    assert file.field("text", str) == "größer"
    assert file.metadata["a.flag"] is True
    assert "numbers" not in file.metadata
    assert file.field("absent", int, 3) == 3


def test_tensors_come_out_in_their_shape(path: Path) -> None:
    file = GgufFile(path)
    assert np.array_equal(file.dequantised("weight"), np.arange(12, dtype=np.float32).reshape(3, 4))
    assert file.dequantised("odd").tolist() == [1.0, 1.0, 1.0]


def test_its_own_package_finds_the_same(path: Path) -> None:
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = GgufFile(path).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.offset == theirs[name].data_offset
        assert tensor.shape == tuple(theirs[name].shape[::-1])


def test_a_file_cut_off_is_refused_before_any_tensor_is_read(path: Path) -> None:
    GgufFile(path).check_whole()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"ends within the tensor odd; download it again"):
        GgufFile(path).check_whole()


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1 << 62, 4), "ends within the tensor weight"),  # more bytes than 64 bits count
        ((3, 5), r"has the shape \(3, 5\), of type Q4_K, whose rows are multiples of 256"),
        ((), "has the shape"),
    ],
)
def test_impossible_shapes_are_refused_before_memory_is_taken(
    path: Path, shape: tuple[int, ...], says: str
) -> None:
    file = GgufFile(path)
    q4_k = int(gguf.GGMLQuantizationType.Q4_K)
    kind = 0 if shape[-1:] == (4,) else q4_k
    file.tensors["weight"] = dataclasses.replace(file.tensors["weight"], shape=shape, type_id=kind)
    with pytest.raises(ConfigError, match=says):
        file.blocks("weight")


def test_a_header_that_would_be_read_for_ever_or_into_the_void_is_refused(tmp_path: Path) -> None:
    """Arrays within arrays without end, and tensors aligned to nothing."""

    def named(name: bytes) -> bytes:
        return len(name).to_bytes(8, "little") + name

    def four(value: int) -> bytes:
        return value.to_bytes(4, "little")

    start = b"GGUF" + four(3) + bytes(8) + (1).to_bytes(8, "little")
    nested = named(b"deep") + four(9) + (four(9) + (1).to_bytes(8, "little")) * 5000
    unaligned = named(b"general.alignment") + four(4) + four(0)
    for field, says in ((nested, "arrays within arrays"), (unaligned, "aligned to 0 bytes")):
        path = tmp_path / "bad.gguf"
        path.write_bytes(start + field)
        with pytest.raises(ConfigError, match=f"is not a whole GGUF file: .*{says}"):
            GgufFile(path)


def test_an_array_where_one_value_is_wanted_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="numbers is an array; only one value is supported"):
        GgufFile(path).field("numbers", int, 7)


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    header = GgufFile(path).tensors["weight"].offset
    for length in range(1, header, 7):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError):
            GgufFile(path).dequantised("weight")
    path.write_bytes(content[: header + 40])
    with pytest.raises(ConfigError, match="ends within the tensor weight"):
        GgufFile(path).dequantised("weight")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(40), "version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 40, "not a whole GGUF file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        GgufFile(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        GgufFile(tmp_path / "none.gguf")


def test_a_missing_field_a_wrong_kind_and_a_missing_tensor_are_named(path: Path) -> None:
    file = GgufFile(path)
    with pytest.raises(ConfigError, match=r"lacks the field llama\.block_count"):
        file.field("llama.block_count", int)
    with pytest.raises(ConfigError, match="text is 'größer', must be int"):
        file.field("text", int)
    with pytest.raises(ConfigError, match="lacks the tensor none"):
        file.dequantised("none")


OTHER_TYPES = sorted({kind.name for kind in gguf.GGMLQuantizationType} - set(TYPES))


@pytest.mark.parametrize("type_name", OTHER_TYPES)
def test_a_type_that_is_not_read_is_named_with_its_tensor(path: Path, type_name: str) -> None:
    """Those too that the package would dequantise: nobody has looked whether it does so rightly."""
    file = GgufFile(path)
    kind = int(gguf.GGMLQuantizationType[type_name])
    file.tensors["weight"] = dataclasses.replace(file.tensors["weight"], type_id=kind)
    says = rf"tensor weight has the type {type_name}, which is not supported; use a file of F32"
    for call in (file.check_whole, lambda: file.dequantised("weight")):
        with pytest.raises(ConfigError, match=says):
            call()


def test_a_type_without_a_name_is_given_by_number(path: Path) -> None:
    file = GgufFile(path)
    file.tensors["weight"] = dataclasses.replace(file.tensors["weight"], type_id=999)
    with pytest.raises(
        ConfigError, match="tensor weight has the unknown type 999; use a file of F32"
    ):
        file.blocks("weight")


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write(path, architecture="mamba")
    with pytest.raises(ConfigError, match="'mamba'; known: llama, qwen2, qwen3"):
        read_architecture(ModelFiles("other", "gguf", path))
