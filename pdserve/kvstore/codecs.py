"""How the numbers of a block are written in its bytes, and who refuses whom.

All blocks of a store node are of one codec, as they are of one size. It stands in the header of
every slot and of every batch on a disk, and a client says which one it reads: who expects another
one is refused when it connects, and finds nothing should it get that far. The namespace digest has
the codec too, so keys differ already; this holds where a key would ever be wrong.
"""

from enum import IntEnum

from pdserve.errors import CodecMismatch


class PayloadCodec(IntEnum):
    """Numbers are in files and in shared memory: they are never given to anything else."""

    UNSTATED = 0  # bytes that mean nothing to the store's user, or are of no model
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4  # codes, and a bfloat16 scale per token and head
    FP8 = 5  # the same, e4m3
    INT8_PACKED = 6  # bfloat16 packed for a store: keys by channel, values by token
    FP8_PACKED = 7

    @property
    def label(self) -> str:
        return self.name.lower()


def codec_of(label: str) -> PayloadCodec:
    """By its ``label``. ValueError for what is none."""
    for codec in PayloadCodec:
        if codec.label == label:
            return codec
    labels = ", ".join(codec.label for codec in PayloadCodec)
    raise ValueError(f"{label!r} is no codec of blocks; there are {labels}")


def refuse_other(expected: PayloadCodec, found: int) -> None:
    """Raises CodecMismatch when ``found``, a codec's number, is not what is expected."""
    if found != expected:
        known = found in PayloadCodec.__members__.values()
        name = PayloadCodec(found).label if known else f"codec {found}"
        raise CodecMismatch(
            f"blocks there are written as {name}, {expected.label} is expected; workers of one "
            "model.dtype and model.kv_dtype share a store node"
        )
