"""What a family file declares."""

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.model.architecture import Architecture
from pdserve.model.families.config_json import ConfigJson
from pdserve.model.gguf_file import GgufFile


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Modules below ``model.layers.<i>.`` that families name differently."""

    ffn_norm: str = "post_attention_layernorm"
    attention_output_norm: str = ""  # only where there are output norms
    ffn_output_norm: str = ""
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"


def _as_it_is(_: GgufFile, architecture: Architecture) -> Architecture:
    return architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    name: str
    config_class: str
    """What ``architectures`` says in its config.json."""

    read: Callable[[ConfigJson], Architecture]
    """Raises ``ConfigError`` for what we cannot compute, naming the field."""

    names: TensorNames = TensorNames()
    gguf_name: str | None = None
    """What ``general.architecture`` says in its GGUF files; None: no file says so."""

    of_gguf: Callable[[GgufFile, Architecture], Architecture] = _as_it_is
    """What a Llama with the file's metadata becomes; raises ``ConfigError`` like ``read``."""
