"""Block keys: what they depend on, and what they must not depend on."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.ids import BLOCK_KEY_BYTES
from pdserve.kvstore.keys import (
    MUST_MATCH,
    NAMESPACE_BYTES,
    KeyChain,
    adapter_namespace,
    block_keys,
    namespace_digest,
    namespace_of,
    salted,
)

NAMESPACE = namespace_digest(model="m", block_tokens=4)
IDENTITY = dict.fromkeys(MUST_MATCH, "same")
TENANTS = st.text(max_size=4)
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=20)


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


def test_an_adapter_s_blocks_are_its_own_and_the_base_model_s_keep_their_keys() -> None:
    assert adapter_namespace(NAMESPACE, "") == NAMESPACE
    own = [adapter_namespace(NAMESPACE, digest) for digest in ("aa", "bb")]
    elsewhere = adapter_namespace(namespace_digest(model="other", block_tokens=4), "aa")
    assert len({NAMESPACE, *own, elsewhere}) == 4


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_a_chain_that_grows_has_the_keys_of_the_whole(tokens: list[int], cuts: list[int]) -> None:
    chain = KeyChain(NAMESPACE, 4, tenant="t")
    for cut in sorted(cuts):
        chain.extend(tokens[:cut])
    whole = block_keys(NAMESPACE, tokens, 4, tenant="t")
    assert block_keys(NAMESPACE, array("I", tokens), 4, tenant="t") == whole
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


@given(TOKENS, st.sampled_from(sorted(MUST_MATCH)))
def test_one_field_that_differs_leaves_no_key_in_common(tokens: list[int], field: str) -> None:
    ours = block_keys(namespace_of(IDENTITY), tokens, 4)
    theirs = block_keys(namespace_of({**IDENTITY, field: "other"}), tokens, 4)
    assert set(ours).isdisjoint(theirs)


@pytest.mark.parametrize("field", sorted(MUST_MATCH))
def test_an_identity_that_lacks_a_field_is_refused_by_name(field: str) -> None:
    identity = {name: value for name, value in IDENTITY.items() if name != field}
    with pytest.raises(ValueError, match=rf"lacks \['{field}'\]"):
        namespace_of(identity)
    with pytest.raises(ValueError, match=r"has \['colour'\] too many"):
        namespace_of({**IDENTITY, "colour": "red"})


@given(TOKENS, TENANTS, TENANTS, st.text(max_size=3), st.text(max_size=3))
def test_keys_of_two_tenants_or_two_salts_have_nothing_in_common(
    tokens: list[int], tenant: str, other: str, salt: str, other_salt: str
) -> None:
    ours = block_keys(salted(NAMESPACE, salt), tokens, 4, tenant=tenant)
    theirs = block_keys(salted(NAMESPACE, other_salt), tokens, 4, tenant=other)
    if (tenant, salt) == (other, other_salt):
        assert ours == theirs
    else:
        assert set(ours).isdisjoint(theirs)


def test_who_has_seen_a_key_of_another_tenant_cannot_go_on_from_it() -> None:
    """Each block's hash is keyed, not the first one's alone: a chain begun with a stolen key and
    the right tokens ends elsewhere."""
    tokens = list(range(8))
    stolen = block_keys(NAMESPACE, tokens, 4, tenant="victim")
    guessed = KeyChain(NAMESPACE, 4, tenant="thief", keys=stolen[:1]).extend(tokens)
    assert guessed[1] != stolen[1]
