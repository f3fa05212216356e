"""A ``config.json``, and the fields that mean the same in every family.

``common`` reads those; a family file says the rest. Every refusal names the file, the field and its
value.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError
from pdserve.model.architecture import Activation, Architecture, LayerKind
from pdserve.model.rope import rope_of_config

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


class ConfigJson:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fields = read_json(directory / "config.json")

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)

    def number(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int):
            raise self.refusal(f"{name} is {value!r}, not a number")
        return value

    def refusal(self, reason: str) -> ConfigError:
        return ConfigError(f"{self.directory.name}/config.json: {reason}")


def common(
    config: ConfigJson,
    family: str,
    layers: Sequence[LayerKind],
    *,
    head_dim: int | None = None,
    tied_by_default: bool = False,
) -> Architecture:
    """A Llama with these layers, under the field names that all families share; a family replaces
    what it has otherwise. ``head_dim`` is the family's own, where config.json need not say it."""
    heads = config.number("num_attention_heads")
    head_dim = config.get("head_dim") or head_dim or config.number("hidden_size") // heads
    return Architecture(
        family=family,
        layers=tuple(layers),
        hidden=config.number("hidden_size"),
        head_count=heads,
        kv_head_count=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn=config.number("intermediate_size"),
        vocab_size=config.number("vocab_size"),
        context_tokens=config.number("max_position_embeddings"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        attention_scale=head_dim**-0.5,
        tied_head=bool(config.get("tie_word_embeddings", tied_by_default)),
        qkv_bias=bool(config.get("attention_bias", False)),
        activation=_activation(config),
        eos_token_ids=_eos_of(config),
        bos_token_id=config.get("bos_token_id"),
    )


def alike(
    config: ConfigJson, slides: Callable[[int], bool], *, windowed_by_default: bool = True
) -> tuple[LayerKind, ...]:
    """Dense layers with one rope, of which some see a window only. ``slides``: see ``sliding``.
    ``windowed_by_default``: what no ``use_sliding_window`` means in this family."""
    ropes = [name for name in (_FULL, _SLIDING) if name in (config.get("rope_parameters") or {})]
    if ropes:
        raise config.refusal(f"rope_parameters has a rope for {ropes[0]} alone; not supported here")
    used = config.get("use_sliding_window", windowed_by_default)
    window = window_of(config) if used else None
    rope = rope_of_config(config.fields, config.number("max_position_embeddings"))
    return tuple(
        LayerKind(rope=rope, window=window if slid else None) for slid in sliding(config, slides)
    )


def sliding(config: ConfigJson, slides: Callable[[int], bool]) -> tuple[bool, ...]:
    """Whether each layer slides: as ``layer_types`` says or, where it is not there, ``slides``."""
    count = config.number("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(slides(index) for index in range(count))
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown:
        raise config.refusal(f"layer_types has {', '.join(unknown)}; known: {_FULL}, {_SLIDING}")
    if len(kinds) != count:
        raise config.refusal(f"layer_types names {len(kinds)} layers, num_hidden_layers is {count}")
    return tuple(kind == _SLIDING for kind in kinds)


def window_of(config: ConfigJson) -> int | None:
    """``sliding_window``; None where nothing is ever outside."""
    if config.get("sliding_window") is None:
        return None
    window = config.number("sliding_window")
    return window if window < config.number("max_position_embeddings") else None


def _activation(config: ConfigJson) -> Activation:
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    value = config.get(name, "silu")
    if value not in _ACTIVATIONS:
        raise config.refusal(f"{name} is {value!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _eos_of(config: ConfigJson) -> tuple[int, ...]:
    """From both files: instruct models name the end of a turn in the second one only."""
    found: list[int] = []
    generation = config.directory / "generation_config.json"
    for source in (config.fields, read_json(generation) if generation.exists() else {}):
        value = source.get("eos_token_id")
        found.extend(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(dict.fromkeys(found))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold an object, not {type(value).__name__}")
    return value
