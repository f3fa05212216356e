"""Packed blocks: how far off a number may be, and that nothing else decides what it becomes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pdserve.model.store_codec import BlockCodec

LAYERS, HEADS, TOKENS, DIM = 2, 3, 8, 16
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
CODES = pytest.mark.parametrize("code", list(LARGEST))


def codec(code: torch.dtype, plain: torch.dtype = torch.bfloat16) -> BlockCodec:
    return BlockCodec(LAYERS, HEADS, TOKENS, DIM, plain, code)


def block(seed: int, plain: torch.dtype = torch.bfloat16, *, scale: float = 1.0) -> Tensor:
    """[L, 2, G, T, D], with channels of very different size, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(LAYERS, 2, HEADS, TOKENS, DIM, generator=generator)
    channels = torch.rand(LAYERS, 1, HEADS, 1, DIM, generator=generator) * 3
    return (numbers * 10**channels * scale).to(plain)


def bytes_of(numbers: Tensor) -> bytearray:
    return bytearray(numbers.contiguous().view(torch.uint8).flatten().numpy().tobytes())


def packed(codec: BlockCodec, numbers: Tensor) -> bytearray:
    out = bytearray(codec.packed_bytes)
    codec.pack(memoryview(bytes_of(numbers)), memoryview(out))
    return out


@CODES
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1 << 30), scale=st.floats(1e-3, 1e3))
def test_no_number_is_off_by_more_than_half_a_step(
    code: torch.dtype, seed: int, scale: float
) -> None:
    numbers = block(seed, torch.float32, scale=scale)
    plain = codec(code, torch.float32)
    found = plain.unpacked(memoryview(packed(plain, numbers)))
    error = (found - numbers).abs()
    largest = torch.stack(
        (
            numbers[:, 0].abs().amax(-2, keepdim=True).expand_as(numbers[:, 0]),  # by channel
            numbers[:, 1].abs().amax(-1, keepdim=True).expand_as(numbers[:, 1]),  # by token
        ),
        dim=1,
    )
    # Scales are rounded to bfloat16: up to 1/256 larger.
    step = largest / LARGEST[code] * (1 + 2**-8)
    if code == torch.int8:
        assert bool((error <= step / 2 * (1 + 1e-5)).all())
    else:
        smallest = step * 2.0**-9  # e4m3's, in steps of the scale
        assert bool((error <= torch.maximum(numbers.abs() / 16, smallest / 2) * (1 + 1e-5)).all())


@CODES
@pytest.mark.parametrize("plain", [torch.bfloat16, torch.float16, torch.float32])
def test_unpacking_rounds_to_the_pools_dtype_and_repeats_to_the_bit(
    code: torch.dtype, plain: torch.dtype
) -> None:
    numbers = block(3, plain, scale=0.1)
    this = codec(code, plain)
    first = packed(this, numbers)
    assert first == packed(this, numbers)
    out = bytearray(this.plain_bytes)
    this.unpack(memoryview(first), memoryview(out))
    assert out == bytes_of(this.unpacked(memoryview(first)).to(plain))


@CODES
def test_a_loud_channel_of_the_keys_does_not_drown_the_others(code: torch.dtype) -> None:
    numbers = block(1, torch.float32)
    louder = numbers.clone()
    louder[:, 0, :, :, 5] *= 1000
    this = codec(code, torch.float32)
    found, found_louder = (
        this.unpacked(memoryview(packed(this, each))) for each in (numbers, louder)
    )
    others = [channel for channel in range(DIM) if channel != 5]
    assert torch.equal(found[:, 0][..., others], found_louder[:, 0][..., others])
    assert torch.equal(found[:, 1], found_louder[:, 1])


def test_a_packed_block_has_little_more_than_half_the_bytes() -> None:
    smollm2 = BlockCodec(30, 3, 16, 64, torch.bfloat16, torch.int8)
    assert smollm2.plain_bytes == 368_640
    assert smollm2.packed_bytes == 30 * 3 * (2 * 16 * 64 + 2 * 64 + 2 * 16)
    assert smollm2.plain_bytes / smollm2.packed_bytes > 1.85


def test_zeros_stay_zeros() -> None:
    this = codec(torch.int8)
    zeros = torch.zeros(LAYERS, 2, HEADS, TOKENS, DIM, dtype=torch.bfloat16)
    assert not this.unpacked(memoryview(packed(this, zeros))).any()


def test_a_buffer_of_another_size_is_a_mistake() -> None:
    this = codec(torch.int8)
    with pytest.raises(AssertionError, match="bytes of"):
        this.pack(memoryview(bytearray(8)), memoryview(bytearray(this.packed_bytes)))
