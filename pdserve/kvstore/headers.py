"""A slot's header in the arena: what its payload should be, 48 bytes.

    0   generation    u64
    8   checksum      u64   XXH3 over key and payload
    16  key           16 bytes; zeros where there is none
    32  parent        u32   the slot of the block before it; ``NO_PARENT``
    36  state, codec  u8 each
    40  check         u32   of the bytes before, and of which slot this is
    44  (unused)

A node may be killed in the middle of writing one: the check says so afterwards. A header that was
never written is all zeros, and right: FREE.
"""

import struct
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId
from pdserve.kvstore.slot_states import STATES, Slot, SlotState

NO_PARENT = (1 << 32) - 1

_BODY = struct.Struct("<QQ16sIBB2x")
_CHECK = struct.Struct("<I4x")
HEADER_BYTES = _BODY.size + _CHECK.size
_NO_KEY = bytes(BLOCK_KEY_BYTES)
_NUMBER_OF = {state: number for number, state in enumerate(STATES)}
_CHECK_MASK = (1 << 32) - 1

_COLUMNS = np.dtype(
    [
        ("generation", "<u8"),
        ("checksum", "<u8"),
        ("key", "u1", BLOCK_KEY_BYTES),
        ("parent", "<u4"),
        ("state", "u1"),
        ("codec", "u1"),
        ("unused", "<u2"),
        ("check", "<u4"),
        ("unused_too", "<u4"),
    ]
)
assert _COLUMNS.itemsize == HEADER_BYTES


class Header(NamedTuple):
    generation: int
    checksum: int
    key: BlockKey | None
    state: SlotState
    codec: int = 0


class HeaderColumns(NamedTuple):
    """The headers of all slots, a copy: keys [slots, 16], the others [slots]."""

    generations: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    keys: NDArray[np.uint8]
    parents: NDArray[np.uint32]
    states: NDArray[np.uint8]
    is_sound: NDArray[np.bool_]


def pack_header(slot: SlotId, record: Slot, codec: int) -> bytes:
    body = _BODY.pack(
        record.generation,
        record.checksum,
        record.key or _NO_KEY,
        NO_PARENT if record.parent is None else record.parent,
        _NUMBER_OF[record.state],
        codec,
    )
    return body + _CHECK.pack(_check_of(slot, body))


def unpack_header(view: memoryview, start: int) -> Header:
    generation, checksum, key, _, state, codec = _BODY.unpack_from(view, start)
    known = BlockKey(key) if any(key) else None
    return Header(generation, checksum, known, STATES[state], codec)


def header_columns(view: memoryview, slot_count: int) -> HeaderColumns:
    """``view``: of the headers of all slots, one behind the other. Linear in the arena."""
    rows = np.frombuffer(view, _COLUMNS, slot_count).copy()
    is_sound = np.ones(slot_count, np.bool_)
    copied = rows.tobytes()
    # Zeros are what nobody has written yet; most slots of a young arena.
    words: NDArray[np.uint64] = rows.view(np.uint64).reshape(slot_count, -1)
    for slot in np.flatnonzero(words.any(axis=1)).tolist():
        start = slot * HEADER_BYTES
        body = copied[start : start + _BODY.size]
        (check,) = _CHECK.unpack_from(copied, start + _BODY.size)
        is_sound[slot] = check == _check_of(slot, body) and body[36] < len(STATES)
    return HeaderColumns(
        rows["generation"].copy(),
        rows["checksum"].copy(),
        rows["key"].copy(),
        rows["parent"].copy(),
        rows["state"].copy(),
        is_sound,
    )


def _check_of(slot: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body, slot) & _CHECK_MASK
