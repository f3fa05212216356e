"""What a model looks like: plain data that says everything a generic layer needs.

A ``families`` file makes one from what a model's files declare; ``layers.py`` computes it,
``weights.py`` fills it. What differs within a model is said per layer (``LayerKind``), the rest
once. No torch in this file: the gateway reads it too.
"""

from dataclasses import dataclass
from typing import Literal

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.rope import Rope

_NEVER_TOKENS = 1 << 30  # more than any context

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A feed-forward layer of which every token uses a part, as a router says."""

    count: int
    per_token: int
    ffn: int  # channels of each
    normalised: bool  # the chosen ones' probabilities are divided by their sum

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count or self.ffn < 1:
            raise ConfigError(
                f"the model has {self.count} experts of {self.ffn} channels, {self.per_token} per "
                "token; both must be positive, and no more per token than there are"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What may differ from one layer to the next."""

    rope: Rope
    window: int | None = None
    """A token sees itself and the ``window - 1`` before it; None: all before it."""

    experts: Experts | None = None
    """None: a dense layer of ``Architecture.ffn`` channels."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"the model's sliding window is {self.window}, must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    family: str
    layers: tuple[LayerKind, ...]
    hidden: int
    head_count: int
    kv_head_count: int
    head_dim: int
    ffn: int
    vocab_size: int
    context_tokens: int
    norm_eps: float
    attention_scale: float  # of the scores
    tied_head: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    qk_norm: bool = False
    qkv_bias: bool = False
    output_norms: bool = False  # what attention and feed-forward add to the residual is normalised
    norm_offset: float = 0.0  # norm weights are stored less this
    activation: Activation = "silu"
    embedding_scale: float = 1.0  # rounded to the model's dtype before it is used

    def __post_init__(self) -> None:
        for name in (
            "layer_count", "hidden", "head_count", "kv_head_count", "head_dim", "ffn",
            "vocab_size", "context_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"the model's {name} is {getattr(self, name)}, must be positive")
        if self.head_count % self.kv_head_count:
            raise ConfigError(
                f"the model has {self.head_count} heads, no multiple of its "
                f"{self.kv_head_count} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"the model's head_dim is {self.head_dim}, must be even to be turned")

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def attention_like_linear_tokens(self) -> int:
        """With so many tokens before it, a token's attention takes as many multiplications as its
        linear layers: P / (2 · H · D) for layers whose matrices have P elements and which see all.
        A layer with a window stops there; where all do, that may be never."""
        attended = self.head_count * self.head_dim
        kept = self.kv_head_count * self.head_dim
        used = [k.experts.per_token * k.experts.ffn if k.experts else self.ffn for k in self.layers]
        elements = self.hidden * (self.layer_count * (2 * attended + 2 * kept) + 3 * sum(used))
        left = elements // (2 * attended)  # tokens, summed over layers
        seen = 0
        windows = sorted(kind.window or _NEVER_TOKENS for kind in self.layers)
        for index, window in enumerate(windows):
            growing = self.layer_count - index
            if left <= (window - seen) * growing:
                return seen + left // growing
            left -= (window - seen) * growing
            seen = window
        return _NEVER_TOKENS


def context_limit(architecture: Architecture, config: ModelConfig) -> int:
    """Tokens a sequence may have: the model's own limit, or the smaller one that is configured."""
    if config.context_tokens is None:
        return architecture.context_tokens
    if config.context_tokens > architecture.context_tokens:
        raise ConfigError(
            f"model.context_tokens is {config.context_tokens}, the model's own limit is "
            f"{architecture.context_tokens}; lower it, or leave it out"
        )
    return config.context_tokens
