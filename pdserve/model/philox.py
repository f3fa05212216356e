"""Random numbers without a generator: a pure function of (seed, choice, index).

Philox4x32-10 encrypts a 128-bit counter under a 64-bit key; the key is the request's seed, the
counter says which choice and which of its tokens the number is for. So a request that resumes on
another worker draws the same numbers, and no generator's state travels with it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

_WORD = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)  # fractions of the golden ratio and of √3
_ROUND_COUNT = 10

UNIFORM_BITS = 53
"""As many as a float64 between 0 and 1 holds."""

Counter = tuple[int, int, int, int]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four random words of 32 bits; all arguments are words, the lowest first."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUND_COUNT):
        product0 = _MULTIPLIERS[0] * word0
        product1 = _MULTIPLIERS[1] * word2
        word0, word1, word2, word3 = (
            (product1 >> 32) ^ word1 ^ key0,
            product1 & _WORD,
            (product0 >> 32) ^ word3 ^ key1,
            product0 & _WORD,
        )
        key0 = (key0 + _KEY_STEPS[0]) & _WORD
        key1 = (key1 + _KEY_STEPS[1]) & _WORD
    return word0, word1, word2, word3


def uniform_bits(seed: int, choice: int, index: int) -> int:
    """A whole number in [0, 2**53). Of ``seed`` the lowest 64 bits count."""
    key = (seed & _WORD, seed >> 32 & _WORD)
    high, low, _, _ = philox((choice & _WORD, index & _WORD, 0, 0), key)
    return (high << 32 | low) >> (64 - UNIFORM_BITS)


def uniform(seed: int, choice: int, index: int) -> float:
    """The number in [0, 1) that token ``index`` of choice ``choice`` is drawn with."""
    return uniform_bits(seed, choice, index) / (1 << UNIFORM_BITS)
