"""Each type of weight that is read from GGUF files, against two others who know the format.

One is the ``gguf`` package, which dequantises for us. The other is below: the sums that ``ggml``'s
``block_q…`` structures stand for, one weight at a time, as slow and plain as they can be said. Bits
are compared, since both do the same few operations of float32 in the same order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pdserve.model.gguf_file import TYPES, GgufFile

F = np.float32
Block = np.ndarray[Any, np.dtype[np.uint8]]


def half(block: Block, at: int) -> F:
    return F(block[at : at + 2].view(np.float16)[0])


def nibble(numbers: Block, at: int) -> int:
    """Of 16 bytes: their low halves, then their high ones."""
    return int(numbers[at % 16]) >> 4 * (at // 16) & 15


def fifth_bit(bits: Block, at: int) -> int:
    return int(bits[at // 8]) >> at % 8 & 1


def q4_0(block: Block, at: int) -> F:
    return half(block, 0) * F(nibble(block[2:], at) - 8)


def q4_1(block: Block, at: int) -> F:
    return half(block, 0) * F(nibble(block[4:], at)) + half(block, 2)


def q5_0(block: Block, at: int) -> F:
    number = nibble(block[6:], at) | fifth_bit(block[2:6], at) << 4
    return half(block, 0) * F(number - 16)


def q5_1(block: Block, at: int) -> F:
    number = nibble(block[8:], at) | fifth_bit(block[4:8], at) << 4
    return half(block, 0) * F(number) + half(block, 2)


def q8_0(block: Block, at: int) -> F:
    return half(block, 0) * F(block[2:].view(np.int8)[at])


def six_bits(packed: Block, group: int) -> tuple[int, int]:
    """Scale and minimum of one of eight groups, in 12 bytes: those of the first four have their six
    bits in a byte each; the upper two bits of these bytes belong to the last four."""
    if group < 4:
        return int(packed[group]) & 63, int(packed[group + 4]) & 63
    low, upper = int(packed[group + 4]), group - 4
    return (
        low & 15 | int(packed[upper]) >> 6 << 4,
        low >> 4 | int(packed[upper + 4]) >> 6 << 4,
    )


def k_number(numbers: Block, at: int) -> int:
    """Of 128 bytes: 32 of them hold 64 weights, low halves first."""
    pair, within = divmod(at, 64)
    return int(numbers[32 * pair + within % 32]) >> 4 * (within // 32) & 15


def with_minimum(block: Block, at: int, number: int) -> F:
    scale, minimum = six_bits(block[4:16], at // 32)
    return half(block, 0) * F(scale) * F(number) - half(block, 2) * F(minimum)


def q4_k(block: Block, at: int) -> F:
    return with_minimum(block, at, k_number(block[16:], at))


def q5_k(block: Block, at: int) -> F:
    fifth = int(block[16 + at % 32]) >> at // 32 & 1
    return with_minimum(block, at, k_number(block[48:], at) | fifth << 4)


def q6_k(block: Block, at: int) -> F:
    half_block, within = divmod(at, 128)
    quarter, lane = divmod(within, 32)
    low = block[64 * half_block + lane + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
    high = block[128 + 32 * half_block + lane] >> 2 * quarter & 3
    scale = block[192:208].view(np.int8)[at // 16]
    return half(block, 208) * F(scale) * F(int(low | high << 4) - 32)


def f32(block: Block, _at: int) -> F:
    return F(block.view(np.float32)[0])


def f16(block: Block, _at: int) -> F:
    return half(block, 0)


def bf16(block: Block, _at: int) -> F:
    return F((block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0])


WEIGHTS: dict[str, Callable[[Block, int], F]] = {
    "F32": f32, "F16": f16, "BF16": bf16, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1,
    "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip
SCALES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def drawn_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int) -> Block:
    """Any bytes, but that all numbers of float16 and the like are finite; [rows, bytes]."""
    group, group_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // group, group_bytes), dtype=np.uint8)
    for at in SCALES_AT.get(kind.name, ()):
        blocks[:, at + 1] &= 0xBF  # no exponent of ones alone: neither infinite nor no number
    if kind.name not in SCALES_AT:
        blocks[:, -1] &= 0xBF
    return blocks.reshape(rows, -1)


def test_every_type_that_is_read_is_tested_here() -> None:
    assert set(WEIGHTS) == set(TYPES)


@pytest.mark.parametrize("type_name", TYPES)
def test_a_tensor_has_the_weights_that_its_bytes_stand_for(tmp_path: Path, type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    group, _ = gguf.GGML_QUANT_SIZES[kind]
    shape = (3, 2 * max(group, 4))
    stored = drawn_blocks(kind, *shape, seed=int(kind))
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = GgufFile(path).dequantised("weight")

    assert found.shape == shape
    assert found.dtype == np.float32
    theirs = gguf.dequantize(stored, kind)
    assert np.array_equal(found.view(np.uint32), theirs.view(np.uint32))
    blocks = stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    said = [WEIGHTS[type_name](block, at) for block in blocks for at in range(group)]
    expected = np.array(said, dtype=np.float32).reshape(shape)
    # Zeros have a sign, which a sum and a product may not agree on; no other bit may differ.
    assert np.array_equal(found, expected)
    assert len({float(weight) for weight in said}) > 8
