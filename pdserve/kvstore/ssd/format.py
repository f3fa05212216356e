"""The bytes of a segment of the log. Pure: no file is touched here.

    page 0     superblock: what this is, and which blocks it holds
    batches    each a page that names its blocks, and the blocks, each from a page border on
    footer     once nothing more is appended: where every block is, and a last page that points here

Whatever is read back is checked before it is believed: a page carries a checksum of itself, the
number of its segment and its own offset, so neither a torn nor a misplaced one is taken for whole.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore.codecs import PayloadCodec

PAGE_BYTES = 4096
VERSION = 2

BATCH_BYTES_MAX = 8 << 20
"""Of the blocks of one write. Larger ones are hardly faster, and a reader may wait for one."""

BATCH_BLOCKS_MAX = 128
"""That one page can name, with room to spare."""

_MAGIC, _BATCH_MAGIC, _FOOTER_MAGIC = b"pdsvseg\0", b"pdsvbat\0", b"pdsvidx\0"
_SUPERBLOCK = struct.Struct("<8sIIQQ")  # version, codec, block bytes, segment
_BATCH = struct.Struct("<8sQQII")  # segment, offset, count, codec
_RECORD = struct.Struct(f"<{BLOCK_KEY_BYTES}sQ")  # key, checksum
_FOOTER = struct.Struct("<8sQQQQ")  # segment, where the index begins, count, its checksum
_INDEXED = struct.Struct(f"<{BLOCK_KEY_BYTES}sQQ")  # key, checksum, offset
_CHECK = struct.Struct("<Q")

assert _BATCH.size + BATCH_BLOCKS_MAX * _RECORD.size + _CHECK.size <= PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Kind:
    """What all blocks of a log have in common; a log of another kind is of no use."""

    block_bytes: int
    codec: PayloadCodec

    @property
    def padded_bytes(self) -> int:
        """Of a block in a segment."""
        return round_up(self.block_bytes)

    @property
    def batch_blocks(self) -> int:
        """The most that are written at once."""
        return min(BATCH_BLOCKS_MAX, max(1, BATCH_BYTES_MAX // self.padded_bytes))


@dataclass(frozen=True, slots=True)
class Record:
    key: BlockKey
    checksum: int
    offset: int  # of its bytes in the segment


def superblock(kind: Kind, segment: int) -> bytes:
    return _page(_SUPERBLOCK.pack(_MAGIC, VERSION, kind.codec, kind.block_bytes, segment))


def batch_page(
    kind: Kind, segment: int, offset: int, blocks: Sequence[tuple[BlockKey, int]]
) -> bytes:
    """The page at ``offset`` that names the blocks behind it, each with its checksum."""
    assert 1 <= len(blocks) <= BATCH_BLOCKS_MAX, f"{len(blocks)} blocks in a batch"
    head = _BATCH.pack(_BATCH_MAGIC, segment, offset, len(blocks), kind.codec)
    return _page(head + b"".join(_RECORD.pack(key, checksum) for key, checksum in blocks))


def batch_records(kind: Kind, segment: int, offset: int, page: bytes) -> list[Record]:
    """What the page at ``offset`` names; nothing when it is not a whole page of this kind there."""
    if not _is_whole(page):
        return []
    magic, of_segment, at, count, codec = _BATCH.unpack_from(page)
    if (magic, of_segment, at, codec) != (_BATCH_MAGIC, segment, offset, kind.codec):
        return []
    records = []
    for index in range(count):
        key, checksum = _RECORD.unpack_from(page, _BATCH.size + index * _RECORD.size)
        place = offset + PAGE_BYTES + index * kind.padded_bytes
        records.append(Record(BlockKey(key), checksum, place))
    return records


def batch_bytes(kind: Kind, block_count: int) -> int:
    """That a batch takes in the segment."""
    return PAGE_BYTES + block_count * kind.padded_bytes


def footer(segment: int, offset: int, records: Sequence[Record]) -> bytes:
    """What follows the last batch, at ``offset``: whole pages."""
    index = b"".join(_INDEXED.pack(each.key, each.checksum, each.offset) for each in records)
    tail = _FOOTER.pack(_FOOTER_MAGIC, segment, offset, len(records), _digest(index))
    return index.ljust(round_up(len(index)), b"\0") + _page(tail)


def footer_bytes(record_count: int) -> int:
    return round_up(record_count * _INDEXED.size) + PAGE_BYTES


def footer_start(segment: int, size: int, last_page: bytes) -> int | None:
    """Where the footer of a file of ``size`` bytes begins, None when it has none."""
    if not _is_whole(last_page):
        return None
    magic, of_segment, start, count, _ = _FOOTER.unpack_from(last_page)
    if (magic, of_segment) != (_FOOTER_MAGIC, segment) or start + footer_bytes(count) != size:
        return None
    return int(start)


def footer_records(data: bytes) -> list[Record] | None:
    """The records of a whole footer, None when it is torn."""
    _, _, _, count, digest = _FOOTER.unpack_from(data, len(data) - PAGE_BYTES)
    index = data[: count * _INDEXED.size]
    if _digest(index) != digest:
        return None
    return [Record(BlockKey(key), *rest) for key, *rest in _INDEXED.iter_unpack(index)]


def round_up(value: int) -> int:
    """To whole pages."""
    return -(-value // PAGE_BYTES) * PAGE_BYTES


def _page(content: bytes) -> bytes:
    content = content.ljust(PAGE_BYTES - _CHECK.size, b"\0")
    return content + _CHECK.pack(_digest(content))


def _is_whole(page: bytes) -> bool:
    body, check = page[: -_CHECK.size], page[-_CHECK.size :]
    return len(page) == PAGE_BYTES and check == _CHECK.pack(_digest(body))


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)
