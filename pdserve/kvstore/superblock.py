"""The first page of an arena: what the file is, and which node it is lent by.

A node that takes over its predecessor's arena takes it as it is or not at all: everything here must
be what it would write itself, but for the *epoch*. That counts the nodes that had this file, one
after the other, from 1; 0 says that this system cannot tell who uses it (``arena_users``), and such
an arena is never taken over.

A model is not named here: its digest is in every block's key, so another model's blocks are keys
that nobody asks for. Two of them have two nodes, because they differ in block size or codec.
"""

import os
import struct
from dataclasses import dataclass, fields
from pathlib import Path

import xxhash

from pdserve.errors import StoreUnavailable
from pdserve.ids import StoreId

MAGIC = b"pdsvkv\0\0"
VERSION = 3

_FORMAT = struct.Struct("<8sIIQQ64sQ16sQ")
_EPOCH = struct.Struct("<Q")
_EPOCH_AT = _FORMAT.size - _EPOCH.size
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Superblock:
    codec: int
    slot_count: int
    block_bytes: int
    store_id: StoreId
    layout: int  # ``fingerprint`` of where everything lies
    boot: bytes  # of the machine: what memory had before, the file system may have lost in part
    epoch: int

    def pack(self) -> bytes:
        return _FORMAT.pack(
            MAGIC,
            VERSION,
            self.codec,
            self.slot_count,
            self.block_bytes,
            self.store_id.encode(),
            self.layout,
            self.boot,
            self.epoch,
        )

    def differences(self, other: "Superblock") -> str:
        """What is not the same but the epoch, in words; empty when nothing is."""
        names = [field.name for field in fields(self) if field.name != "epoch"]
        different = [name for name in names if getattr(self, name) != getattr(other, name)]
        return ", ".join(
            f"{name} is {getattr(self, name)}, not {getattr(other, name)}" for name in different
        )


def read_superblock(descriptor: int, store_id: StoreId) -> Superblock:
    """Raises StoreUnavailable when this is no arena of ``store_id`` and this release."""
    page = os.pread(descriptor, _FORMAT.size, 0).ljust(_FORMAT.size, b"\0")
    magic, version, codec, slot_count, block_bytes, padded, layout, boot, epoch = _FORMAT.unpack(
        page
    )
    name = padded.rstrip(b"\0")
    if (magic, version, name) != (MAGIC, VERSION, store_id.encode()):
        raise StoreUnavailable(
            f"this is not the arena of {store_id} in version {VERSION}, but {magic!r} of "
            f"{name!r} in version {version}"
        )
    return Superblock(codec, slot_count, block_bytes, store_id, layout, boot, epoch)


def write_superblock(descriptor: int, superblock: Superblock) -> None:
    os.pwrite(descriptor, superblock.pack(), 0)


def write_epoch(descriptor: int, epoch: int) -> None:
    os.pwrite(descriptor, _EPOCH.pack(epoch), _EPOCH_AT)


def read_epoch(descriptor: int) -> int:
    epoch: int = _EPOCH.unpack(os.pread(descriptor, _EPOCH.size, _EPOCH_AT))[0]
    return epoch


def fingerprint(*parts: object) -> int:
    """Of whatever decides over where bytes lie and what they mean."""
    return xxhash.xxh3_64_intdigest(repr((VERSION, *parts)).encode())


def boot_id() -> bytes:
    """16 bytes that change when the machine starts; zeros where the kernel does not tell."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))[:16]
    except (OSError, ValueError):
        return bytes(16)
