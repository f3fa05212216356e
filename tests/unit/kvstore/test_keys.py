"""Block keys: what they depend on, and what they must not depend on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import BLOCK_KEY_BYTES
from pdserve.kvstore.keys import NAMESPACE_BYTES, KeyChain, block_keys, namespace_digest

NAMESPACE = namespace_digest(model="m", block_tokens=4)


def test_only_full_blocks_have_keys() -> None:
    assert block_keys(NAMESPACE, [1, 2, 3], 4) == ()
    keys = block_keys(NAMESPACE, list(range(9)), 4)
    assert len(keys) == 2
    assert all(len(key) == BLOCK_KEY_BYTES for key in keys)


def test_a_key_names_its_whole_prefix() -> None:
    keys = block_keys(NAMESPACE, [1, 2, 3, 4, 5, 6, 7, 8], 4)
    other = block_keys(NAMESPACE, [9, 2, 3, 4, 5, 6, 7, 8], 4)
    assert keys[0] != other[0]
    assert keys[1] != other[1], "equal tokens after different ones"
    assert block_keys(NAMESPACE, [1, 2, 3, 4, 9, 9, 9, 9], 4)[0] == keys[0]


@pytest.mark.parametrize(
    ("namespace", "tenant", "block_tokens"),
    [
        (namespace_digest(model="other", block_tokens=4), "", 4),
        (NAMESPACE, "somebody", 4),
        (NAMESPACE, "", 2),
    ],
)
def test_nothing_is_shared_across_namespaces_tenants_and_block_sizes(
    namespace: bytes, tenant: str, block_tokens: int
) -> None:
    tokens = [1] * 8
    ours = set(block_keys(NAMESPACE, tokens, 4))
    assert ours.isdisjoint(block_keys(namespace, tokens, block_tokens, tenant=tenant))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_a_chain_that_grows_has_the_keys_of_the_whole(tokens: list[int], cuts: list[int]) -> None:
    chain = KeyChain(NAMESPACE, 4, tenant="t")
    for cut in sorted(cuts):
        chain.extend(tokens[:cut])
    whole = block_keys(NAMESPACE, tokens, 4, tenant="t")
    assert chain.extend(tokens) == whole
    known = KeyChain(NAMESPACE, 4, tenant="t", keys=whole[:2])
    assert known.extend(tokens) == whole


def test_a_shorter_sequence_forgets_nothing() -> None:
    chain = KeyChain(NAMESPACE, 4)
    keys = chain.extend(list(range(8)))
    assert chain.extend([0, 1, 2, 3]) == keys[:1]
    assert chain.extend(list(range(8))) == keys


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_cannot_be_one_is_a_bug(token: int) -> None:
    with pytest.raises(OverflowError):
        block_keys(NAMESPACE, [token] * 4, 4)


def test_a_namespace_depends_on_names_types_and_values_but_not_on_order() -> None:
    digest = namespace_digest(a=1, b="x")
    assert len(digest) == NAMESPACE_BYTES
    assert namespace_digest(b="x", a=1) == digest
    for other in (
        namespace_digest(a=2, b="x"),
        namespace_digest(a="1", b="x"),
        namespace_digest(a=1, c="x"),
        namespace_digest(a=1),
        namespace_digest(a=1, bx=""),
    ):
        assert other != digest
