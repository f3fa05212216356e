"""The seam between the model and the hardware: what a runner asks of its kernels.

A step is a *packed batch*: R runs, one per sequence, run r owning the tokens
``starts[r]:starts[r + 1]`` of N in all. A run of a whole prompt, of a chunk of it and of one
decoded token are the same thing; no kernel may tell them apart. ``BatchLayout`` says where each
token sits in its sequence and where its keys and values lie in the paged pool.

The promise every implementation makes: what it computes for a token depends on that token, the KV
before it and the weights alone, to the bit; never on the other rows of the batch.

Shape letters:
    N  tokens of the batch        R  runs               B  blocks of the longest table
    C  channels (hidden size)     F  channels of the feed-forward layer
    H  query heads                G  key/value heads    D  channels of a head
    L  layers                     T  tokens of a block  P  blocks of the pool; positions of the rope
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from pdserve.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the tokens of a packed batch stand. All tensors are on the model's device."""

    positions_N: Tensor
    """int64: absolute position of each token in its sequence."""

    slots_N: Tensor
    """int64: ``block * block_tokens + offset``, where the token's keys and values go."""

    starts_R1: Tensor
    """int32 [R + 1]: run r owns tokens ``starts[r]:starts[r + 1]``."""

    tables_RB: Tensor
    """int32: block ids of each run, padded with 0."""

    contexts_R: Tensor
    """int32: tokens that have KV once this step is done, the last position + 1."""

    longest_run: int
    longest_context: int

    adapted: "tuple[AdaptedRows, ...]" = ()
    """The rows of the batch that are not the base model's alone; no row is in two."""


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """One linear layer. ``weight_OC`` is plain, or quantised (``quantised.QuantisedWeight``), or in
    an implementation's own packing, in which case only the implementation whose ``pack`` made it
    may read it."""

    weight_OC: Tensor
    bias_O: Tensor | None = None
    packed: bool = False


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A dense layer, or one expert of a mixture."""

    gate_up: LinearWeight
    down: LinearWeight


@dataclass(frozen=True, slots=True)
class Mixture:
    """See ``mixture.py``."""

    router: LinearWeight
    experts: tuple[FeedForward, ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm_C: Tensor
    qkv: LinearWeight
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    attention_output: LinearWeight
    attention_output_norm_C: Tensor | None
    ffn_norm_C: Tensor
    ffn: FeedForward | Mixture
    ffn_output_norm_C: Tensor | None


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a linear layer: ``b (a x)``; see ``adapters.py``. Both are packed."""

    a: LinearWeight
    b: LinearWeight


@dataclass(frozen=True, slots=True)
class AdapterLayer:
    """Of one layer, what is adapted."""

    qkv: LowRank | None
    attention_output: LowRank | None
    gate_up: LowRank | None
    down: LowRank | None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    layers: tuple[AdapterLayer, ...]


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Tokens ``first:end`` of a batch, which are one adapter's."""

    first: int
    end: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class LayersTold:
    """Who wants to hear during a step that keys and values of its tokens lie in the pool.

    ``tell(count, done)`` says so of the first ``count`` layers, after ``every`` so many and after
    the last. It is called by the thread that computes, which waits. On a GPU the kernels that write
    them are launched by then, and have ended when the event ``done`` has; on a CPU it is None.
    """

    every: int
    tell: Callable[[int, Any], None]

    def is_due(self, count: int, layer_count: int) -> bool:
        return count % self.every == 0 or count == layer_count


class Stack(Protocol):
    """All layers of a model."""

    def __call__(
        self,
        embedded_NC: Tensor,
        batch: BatchLayout,
        ropes_LPD: Sequence[Tensor],
        pool_PL2GTD: Tensor,
        told: LayersTold | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output and the residual that it is to be added to; KV goes into the
        pool. ``embedded_NC`` may be overwritten. ``ropes_LPD``: a layer's table each, often one and
        the same."""
        ...


class Ops(Protocol):
    """Everything a model computes, but for the routing of ``mixture.py``. Inputs and outputs have
    the model's dtype."""

    name: str
    multiplies: str
    """How, where that changes bits: two workers with the same name may have different CPUs."""

    reads_quantised: bool
    """Whether ``pack`` takes a ``QuantisedWeight`` too."""

    quantised_alike: bool
    """Whether that gives the bits of the same weights dequantised and rounded to bfloat16."""

    reads_fp8: bool
    """Whether ``pack`` takes a ``fp8_weights.Fp8Weight`` too."""

    def pack(self, weight: LinearWeight) -> LinearWeight:
        """The same weight as ``linear`` likes it best; the plain one may then be dropped."""
        ...

    def embedded(self, tokens_N: Tensor, embedding: LinearWeight) -> Tensor:
        """Rows of the embedding [V, C]: [N, C]. It is plain, or a packed ``QuantisedWeight``."""
        ...

    def rms_norm(self, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        """Each row over its root mean square, times the weight; accumulated in float32, rounded
        once. Also the norm of q and k, with rows of D channels."""
        ...

    def add_rms_norm(
        self, x_NC: Tensor, residual_NC: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``residual' = x + residual``, rounded to the dtype; ``(norm of that, residual')``."""
        ...

    def rope_and_cache(
        self,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGD: Tensor,
        rope_PD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
    ) -> Tensor:
        """Turn q and k by their positions, put k and v into ``pool[:, layer]`` at ``slots``; as
        codes, where the pool's dtype is one of ``kv_codec``.

        Channel i < D/2 pairs with channel i + D/2. ``rope_PD`` is float32: D/2 cosines, then D/2
        sines, per position. q, k and v may be views whose rows are apart; a row is contiguous.

        Returns:
            The turned q, [N, H, D], contiguous.
        """
        ...

    def attention(
        self,
        q_NHD: Tensor,
        batch: BatchLayout,
        pool_PL2GTD: Tensor,
        layer: int,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention of each token over its sequence's KV in the pool, its own included; with
        a ``window``, over the last so many. Query head h reads key/value head ``h // (H / G)``.
        Returns [N, H, D], contiguous."""
        ...

    def silu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        """``silu(x[:, :F]) * x[:, F:]``: [N, F] from [N, 2 F]."""
        ...

    def gelu_mul(self, gate_up_NF2: Tensor) -> Tensor:
        """The same with the tanh form of gelu: ``g * sigmoid(sqrt(8 / pi) (g + 0.044715 g^3))``."""
        ...

    def linear(self, x_NC: Tensor, weight: LinearWeight) -> Tensor:
        """``x @ weight.T + bias``: [N, O]."""
        ...

    def stacked(self, layers: Sequence[LayerWeights], architecture: "Architecture") -> Stack:
        """``layers.LayerByLayer``, or what gives the same bits sooner."""
        ...

    def calls(self) -> Mapping[str, int]:
        """How often each of the above ran."""
        ...
