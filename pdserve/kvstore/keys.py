"""What a block is called: a chained hash of its tokens and of all tokens before it.

    K     = HMAC(namespace, tenant)
    key_0 = H(K, 0         | tokens of block 0)
    key_i = H(K, key_{i-1} | tokens of block i)

H is BLAKE2b with 16 bytes of output, keyed: equal keys mean equal prefixes, in one namespace, for
one tenant; and the key of a block names its whole prefix, which is why a lookup is a walk along the
chain that ends at the first absence. Without K nobody can guess a key, go on from one that he has
seen, or tell that two tenants' keys stand for the same tokens.

The *namespace digest* stands for everything that must agree before KV bytes mean the same thing to
two workers (``MUST_MATCH``). An adapter's blocks have one of their own, made from that and the
adapter's digest. ``salted`` makes it a secret: K is one exactly as far as the namespace is.
"""

import functools
import hashlib
import hmac
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence

from pdserve.errors import FrameError
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey

NAMESPACE_BYTES = 16

SCHEMA = 2
"""Of keys and of what a block's bytes mean. Another one finds none of the blocks on a disk."""

MUST_MATCH = frozenset(
    {
        "weights",
        "packing",
        "architecture",  # layers, key/value heads, their size, rope, windows
        "quantization",
        "dtype",
        "kv_dtype",  # the codec
        "block_tokens",
        "layout",
        "kernels",
        "multiplies",
        "deterministic",
        "parts",
        "torch",
    }
)
"""What two workers must have in common to share blocks. Adapter and tenant come to it per chain."""

_PERSON_BLOCK = b"pdserve.kv.block"
_PERSON_NAMESPACE = b"pdserve.kv.name"
_NO_PARENT = bytes(BLOCK_KEY_BYTES)

_TOKEN_CODE = "I"  # noqa: S105  # unsigned 32 bits; a token id that does not fit is a bug, and raises
_TOKEN_BYTES = array(_TOKEN_CODE).itemsize
assert _TOKEN_BYTES == 4


def namespace_of(identity: Mapping[str, str | int], *, salt: str = "") -> bytes:
    """The namespace of blocks that a worker of this ``identity`` writes and may read.

    Args:
        identity: exactly the fields of ``MUST_MATCH``.
        salt: as in ``salted``.

    Raises:
        ValueError: a field is missing, or one is there that nobody has thought about: who left it
            out would read blocks that are not what it would have computed.
    """
    if identity.keys() != MUST_MATCH:
        missing, unknown = MUST_MATCH - identity.keys(), identity.keys() - MUST_MATCH
        raise ValueError(
            f"the identity of KV blocks lacks {sorted(missing)} and has {sorted(unknown)} too "
            "many; it must have what keys.MUST_MATCH names"
        )
    return salted(namespace_digest(**identity), salt)


def namespace_digest(**fields: str | int) -> bytes:
    """16 bytes that change when any field's name, type or value does; their order is irrelevant."""
    digest = hashlib.blake2b(digest_size=NAMESPACE_BYTES, person=_PERSON_NAMESPACE)
    for name, value in sorted({"schema": SCHEMA, **fields}.items()):
        for part in (name, type(value).__name__, str(value)):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.digest()


def salted(namespace: bytes, salt: str) -> bytes:
    """The namespace of those who know ``salt``, which nobody else can compute; "" is none."""
    if not salt:
        return namespace
    return hmac.digest(salt.encode(), namespace, "sha256")[:NAMESPACE_BYTES]


def adapter_namespace(namespace: bytes, adapter: str) -> bytes:
    """The namespace of an adapter's blocks, whose bytes are not the base model's.

    Args:
        adapter: its digest; "" is none, and leaves the namespace as it is.
    """
    return namespace_digest(base=namespace.hex(), adapter=adapter) if adapter else namespace


def block_keys(
    namespace: bytes, tokens: Sequence[int], block_tokens: int, *, tenant: str = ""
) -> tuple[BlockKey, ...]:
    """The keys of all full blocks of ``tokens``, in order. Their bytes, one after the other, are
    ``b"".join`` of them.

    Tokens in an ``array("I")`` are hashed where they lie; others are packed first, which takes
    twice as long as hashing them.
    """
    return KeyChain(namespace, block_tokens, tenant=tenant).extend(tokens)


class KeyChain:
    """The keys of a sequence that grows: only blocks that became full are hashed.

    ``keys`` are those of the sequence's first blocks, where somebody has computed them already.
    """

    def __init__(
        self,
        namespace: bytes,
        block_tokens: int,
        *,
        tenant: str = "",
        keys: Sequence[BlockKey] = (),
    ) -> None:
        assert len(namespace) == NAMESPACE_BYTES, f"a namespace digest of {len(namespace)} bytes"
        assert block_tokens > 0
        self._block_tokens = block_tokens
        self._begun = _begun(namespace, tenant)
        self._keys = tuple(keys)

    def extend(self, tokens: Sequence[int]) -> tuple[BlockKey, ...]:
        """The keys of all full blocks of ``tokens``, which are all tokens of the sequence so far.

        Fewer tokens than the keys known cover give the keys that fit; nothing is forgotten.
        """
        block_count = len(tokens) // self._block_tokens
        known = len(self._keys)
        if block_count <= known:
            return self._keys[:block_count]
        self._keys += tuple(self._hash(tokens, known, block_count))
        return self._keys

    def _hash(self, tokens: Sequence[int], first: int, end: int) -> Iterator[BlockKey]:
        step = self._block_tokens
        begun = self._begun
        key: bytes = self._keys[first - 1] if first else _NO_PARENT
        with memoryview(_packed(tokens, first * step, end * step)) as packed:
            for start in range(0, len(packed), step):
                digest = begun.copy()
                digest.update(key)
                digest.update(packed[start : start + step])
                key = digest.digest()
                yield BlockKey(key)


# To begin takes as long as three blocks, and most prompts are of the same few tenants.
@functools.lru_cache(maxsize=1024)
def _begun(namespace: bytes, tenant: str) -> "hashlib.blake2b":
    """The keyed hash before its first byte. It is copied for each block."""
    return hashlib.blake2b(
        digest_size=BLOCK_KEY_BYTES,
        key=hmac.digest(namespace, tenant.encode(), "sha256"),
        person=_PERSON_BLOCK,
    )


def _packed(tokens: Sequence[int], first: int, end: int) -> "array[int] | memoryview":
    """Token ids of 32 bits, little-endian."""
    if isinstance(tokens, array) and tokens.typecode == _TOKEN_CODE:
        packed: array[int] | memoryview = memoryview(tokens)[first:end]
    elif first == 0 and end == len(tokens):
        packed = array(_TOKEN_CODE, tokens)
    else:
        packed = array(_TOKEN_CODE, tokens[first:end])
    if sys.byteorder == "big":
        swapped = array(_TOKEN_CODE, packed)
        swapped.byteswap()
        return swapped
    return packed


def split_keys(joined: bytes | memoryview) -> list[BlockKey]:
    """Keys that lie one behind the other, as in a message. Raises FrameError for half a key."""
    if len(joined) % BLOCK_KEY_BYTES:
        raise FrameError(f"{len(joined)} bytes of keys that have {BLOCK_KEY_BYTES} each")
    starts = range(0, len(joined), BLOCK_KEY_BYTES)
    return [BlockKey(bytes(joined[start : start + BLOCK_KEY_BYTES])) for start in starts]
