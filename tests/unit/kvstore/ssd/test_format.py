"""Pages of a segment: read back as they were written, and taken for nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import BlockKey
from pdserve.kvstore.codecs import PayloadCodec, codec_of, refuse_other
from pdserve.kvstore.ssd.format import (
    BATCH_BLOCKS_MAX,
    BATCH_BYTES_MAX,
    PAGE_BYTES,
    Kind,
    Record,
    batch_bytes,
    batch_page,
    batch_records,
    footer,
    footer_bytes,
    footer_records,
    footer_start,
)

KIND = Kind(5000, PayloadCodec.BFLOAT16)
BLOCKS = [(BlockKey(bytes([index]) * 16), index << 60) for index in range(5)]


def test_a_batch_names_its_blocks_and_their_places() -> None:
    page = batch_page(KIND, 7, 3 * PAGE_BYTES, BLOCKS)
    records = batch_records(KIND, 7, 3 * PAGE_BYTES, page)
    assert [(record.key, record.checksum) for record in records] == BLOCKS
    assert [record.offset for record in records] == [(4 + 2 * i) * PAGE_BYTES for i in range(5)]
    assert batch_bytes(KIND, 5) == 11 * PAGE_BYTES


@pytest.mark.parametrize(
    ("kind", "segment", "page_index"),
    [
        (Kind(5000, PayloadCodec.INT8), 7, 3),
        (KIND, 8, 3),
        (KIND, 7, 4),
    ],
)
def test_a_page_of_another_codec_segment_or_place_names_nothing(
    kind: Kind, segment: int, page_index: int
) -> None:
    page = batch_page(KIND, 7, 3 * PAGE_BYTES, BLOCKS)
    assert batch_records(kind, segment, page_index * PAGE_BYTES, page) == []


@given(st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))
def test_no_flipped_byte_of_a_page_goes_unnoticed(where: int, flip: int) -> None:
    page = bytearray(batch_page(KIND, 7, PAGE_BYTES, BLOCKS))
    page[where] ^= flip
    assert batch_records(KIND, 7, PAGE_BYTES, bytes(page)) == []


@given(st.integers(0, 500), st.integers(0, 1 << 20))
def test_a_footer_is_found_from_the_end_and_torn_ones_are_not_believed(
    count: int, where: int
) -> None:
    records = [Record(BlockKey(i.to_bytes(16, "big")), i, i * PAGE_BYTES) for i in range(count)]
    start = 9 * PAGE_BYTES
    data = footer(4, start, records)
    size = start + len(data)
    assert len(data) == footer_bytes(count)
    assert footer_start(4, size, data[-PAGE_BYTES:]) == start
    assert footer_start(5, size, data[-PAGE_BYTES:]) is None
    assert footer_start(4, size + PAGE_BYTES, data[-PAGE_BYTES:]) is None
    assert footer_records(data) == records
    if count:
        torn = bytearray(data)
        torn[where % (count * 32)] ^= 1
        assert footer_records(bytes(torn)) is None


@pytest.mark.parametrize("block_bytes", [100, 368_640, 2 << 20, 1 << 30])
def test_a_batch_is_bounded_in_blocks_and_bytes(block_bytes: int) -> None:
    kind = Kind(block_bytes, PayloadCodec.UNSTATED)
    assert 1 <= kind.batch_blocks <= BATCH_BLOCKS_MAX
    assert kind.batch_blocks == 1 or kind.batch_blocks * kind.padded_bytes <= BATCH_BYTES_MAX


def test_every_codec_has_a_label_that_finds_it() -> None:
    for codec in PayloadCodec:
        assert codec_of(codec.label) is codec
        refuse_other(codec, int(codec))
    with pytest.raises(ValueError, match="'int7' is no codec of blocks; there are unstated, float"):
        codec_of("int7")
