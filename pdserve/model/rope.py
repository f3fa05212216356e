"""Rotary position embedding: which angle each channel pair turns by, as numbers without torch.

Pair i of D/2 turns by ``position * frequency_i``, where ``frequency_i = base^(-2i/D)``, stretched
for models that were trained on longer texts later:

* ``linear``: every frequency divided by one factor.
* ``llama3``: long waves divided by the factor, short ones kept, a ramp between the two.
* ``yarn``: a similar ramp by the number of turns over the original context, and attention scaled
  a little, which is folded into cosine and sine.
* ``factors``: one divisor per frequency, as GGUF files spell llama3 out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pdserve.errors import ConfigError
from pdserve.model.gguf_file import GgufFile

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    base: float
    kind: Literal["default", "linear", "llama3", "yarn", "factors"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original / low are divided
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original / high are kept
    beta_fast: float = 32.0  # yarn: pairs that turn more often are kept
    beta_slow: float = 1.0  # yarn: pairs that turn less often are divided
    attention_factor: float = 1.0  # yarn: times cosine and sine
    factors: tuple[float, ...] = ()  # factors: one per pair


def frequencies(rope: Rope, head_dim: int) -> FloatArray:
    """[D/2] radians per position."""
    exponents: FloatArray = -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain: FloatArray = np.power(rope.base, exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "factors":
        return plain / np.asarray(rope.factors, dtype=np.float64)
    if rope.kind == "llama3":
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        turns = rope.original_context * plain / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * kept + plain / rope.factor * (1 - kept)
    if rope.kind == "yarn":

        def pair_that_turns(times: float) -> float:
            wave = rope.original_context / (times * 2 * math.pi)
            return head_dim * math.log(wave) / (2 * math.log(rope.base))

        first = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
        last = min(math.ceil(pair_that_turns(rope.beta_slow)), head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
        kept = 1 - np.clip(ramp, 0.0, 1.0)
        return plain * kept + plain / rope.factor * (1 - kept)
    return plain


def rope_table(
    rope: Rope, head_dim: int, position_count: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[positions, D] float32: D/2 cosines, then D/2 sines.

    Angles are float32 products, as the reference implementations take them; cosine and sine of
    these in float64, rounded once, so that every machine has the same table.
    """
    positions = np.arange(position_count, dtype=np.float32)
    angles = np.outer(positions, frequencies(rope, head_dim).astype(np.float32))
    wide = angles.astype(np.float64)
    table = np.concatenate([np.cos(wide), np.sin(wide)], axis=1) * rope.attention_factor
    return table.astype(np.float32)


def rope_of_config(config: Mapping[str, Any], context_tokens: int) -> Rope:
    """From a ``config.json``, in its older spelling (``rope_scaling``) or its newer one."""
    scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        raise ConfigError("config.json: only a part of each head is turned; not supported")
    if kind == "default":
        return Rope(base=base)
    try:
        factor = float(scaling["factor"])
        original = int(scaling.get("original_max_position_embeddings") or context_tokens)
        if kind == "linear":
            return Rope(base=base, kind="linear", factor=factor)
        if kind == "llama3":
            return Rope(
                base=base,
                kind="llama3",
                factor=factor,
                original_context=original,
                low_frequency_factor=float(scaling["low_freq_factor"]),
                high_frequency_factor=float(scaling["high_freq_factor"]),
            )
        if kind == "yarn" and not scaling.get("mscale") and scaling.get("truncate", True):
            return Rope(
                base=base,
                kind="yarn",
                factor=factor,
                original_context=original,
                beta_fast=float(scaling.get("beta_fast") or 32.0),
                beta_slow=float(scaling.get("beta_slow") or 1.0),
                attention_factor=float(scaling.get("attention_factor") or _yarn_attention(factor)),
            )
    except KeyError as error:
        raise ConfigError(f"config.json: rope scaling {kind!r} lacks {error}") from error
    raise ConfigError(f"rope scaling {kind!r} is not supported; known: linear, llama3, plain yarn")


def rope_of_gguf(file: GgufFile, family: str, head_dim: int, context_tokens: int) -> Rope:
    base = file.field(f"{family}.rope.freq_base", float, 10_000.0)
    kind = file.field(f"{family}.rope.scaling.type", str, "none")
    if "rope_freqs.weight" in file.tensors:
        factors = file.dequantised("rope_freqs.weight")
        if kind != "none" or factors.size != head_dim // 2:
            raise ConfigError(f"{file.path.name}: rope factors beside rope scaling {kind!r}")
        return Rope(base=base, kind="factors", factors=tuple(float(f) for f in factors))
    if kind == "none":
        return Rope(base=base)
    factor = file.field(f"{family}.rope.scaling.factor", float)
    if kind == "linear":
        return Rope(base=base, kind="linear", factor=factor)
    if kind == "yarn":
        original = file.field(f"{family}.rope.scaling.original_context_length", int, context_tokens)
        return Rope(
            base=base,
            kind="yarn",
            factor=factor,
            original_context=original,
            attention_factor=_yarn_attention(factor),
        )
    raise ConfigError(f"{file.path.name}: rope scaling {kind!r} is not supported")


def _yarn_attention(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
