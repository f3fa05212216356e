"""What a block is called: a chained hash of its tokens and of all tokens before it.

    root  = H(namespace, tenant)
    key_0 = H(namespace, root  | tokens of block 0)
    key_i = H(namespace, key_{i-1} | tokens of block i)

H is BLAKE2b with 16 bytes of output, keyed by the namespace digest: nobody can construct two
prefixes of one key, or guess a key without the namespace. So equal keys mean equal prefixes, in one
namespace, for one tenant; and the key of a block names its whole prefix, which is why a lookup is
a walk along the chain that ends at the first absence.

The *namespace digest* stands for everything that must agree before KV bytes mean the same thing to
two workers: model, weights, dtype, layout, block size.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterator, Sequence

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey

NAMESPACE_BYTES = 16

_PERSON_BLOCK = b"pdserve.kv.block"
_PERSON_ROOT = b"pdserve.kv.root"
_PERSON_NAMESPACE = b"pdserve.kv.name"

_TOKEN_CODE = "I"  # unsigned 32 bits; a token id that does not fit is a bug, and raises
assert array(_TOKEN_CODE).itemsize == 4


def namespace_digest(**fields: str | int) -> bytes:
    """16 bytes that change when any field's name, type or value does; their order is irrelevant."""
    digest = hashlib.blake2b(digest_size=NAMESPACE_BYTES, person=_PERSON_NAMESPACE)
    for name, value in sorted(fields.items()):
        for part in (name, type(value).__name__, str(value)):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.digest()


def block_keys(
    namespace: bytes, tokens: Sequence[int], block_tokens: int, *, tenant: str = ""
) -> tuple[BlockKey, ...]:
    """The keys of all full blocks of ``tokens``, in order."""
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
        self._namespace = namespace
        self._block_tokens = block_tokens
        self._root = hashlib.blake2b(
            tenant.encode(), digest_size=BLOCK_KEY_BYTES, key=namespace, person=_PERSON_ROOT
        ).digest()
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
        packed = array(_TOKEN_CODE, tokens[first * step : end * step])
        if sys.byteorder == "big":
            packed.byteswap()
        data = packed.tobytes()
        block_bytes = step * packed.itemsize
        key: bytes = self._keys[first - 1] if first else self._root
        blake2b = hashlib.blake2b
        for start in range(0, len(data), block_bytes):
            key = blake2b(
                key + data[start : start + block_bytes],
                digest_size=BLOCK_KEY_BYTES,
                key=self._namespace,
                person=_PERSON_BLOCK,
            ).digest()
            yield BlockKey(key)
