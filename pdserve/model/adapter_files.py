"""LoRA adapters on disk, as PEFT saves them: which there are, what they declare, what they are.

    <directory>/adapter_config.json         rank, alpha, options
    <directory>/adapter_model.safetensors   two matrices for each adapted one

An adapter's *digest* is that of both files, byte for byte. It is the adapter's identity everywhere
behind the gateway: part of the keys of its KV blocks, and what a worker finds its matrices by. So a
name may be given to other files, and hosts may have different ones, without two adapters ever being
taken for one.

No torch in this file: the gateway reads it too. The matrices are read in ``adapters.py``.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.families.config_json import read_json

CONFIG_FILE = "adapter_config.json"
MATRICES_FILE = "adapter_model.safetensors"

Number = TypeVar("Number", int, float)

_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    # The others took something off the base model's weights when training began.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out"),
            *("modules_to_save", "trainable_token_indices", "target_parameters"),
            *("layer_replication", "alora_invocation_tokens", "arrow_config"),
        ),
        (None, False, [], {}),
    ),
}
"""Options that change what an adapter computes, and the values with which they change nothing."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    name: str
    """What clients call it."""

    directory: Path
    digest: str
    """Of both files, in hexadecimal."""

    rank: int
    alpha: float
    rank_stabilised: bool
    """The scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``."""

    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    """Other ranks and alphas for modules whose name ends as a pattern says."""

    def rank_of(self, module: str) -> int:
        """``module``: as ``model.layers.3.self_attn.q_proj``."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied by."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def refusal(self, reason: str) -> ConfigError:
        return _refusal(self.name, self.directory, reason)


def locate_adapters(config: ModelConfig, served_name: str) -> tuple[AdapterFiles, ...]:
    """The adapters of ``config.adapters``, in that order.

    Args:
        served_name: what clients call the base model.

    Raises:
        ConfigError: a directory lacks a file, or declares what we do not compute.
    """
    if served_name in config.adapters:
        raise ConfigError(
            f"model.adapters has an adapter named {served_name!r}, which is the base model's name; "
            "rename one of them (model.served_name)"
        )
    return tuple(
        _located(name, Path(path).expanduser(), config.adapter_rank_max)
        for name, path in config.adapters.items()
    )


def _located(name: str, directory: Path, rank_max: int) -> AdapterFiles:
    digest = hashlib.blake2b(digest_size=16)
    for file in (CONFIG_FILE, MATRICES_FILE):
        try:
            with (directory / file).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, hashlib.blake2b).digest())
        except OSError as error:
            raise _refusal(
                name,
                directory,
                f"cannot read {file} ({error.strerror}); name a directory that PEFT's "
                "save_pretrained wrote, with safetensors",
            ) from error
    fields = read_json(directory / CONFIG_FILE)
    _check(name, directory, fields)
    adapter = AdapterFiles(
        name=name,
        directory=directory,
        digest=digest.hexdigest(),
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rank_stabilised=bool(fields.get("use_rslora")),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
    )
    highest = max([adapter.rank, *adapter.rank_pattern.values()])
    if highest > rank_max:
        raise adapter.refusal(
            f"its rank is {highest}, model.adapter_rank_max is {rank_max}; raise that, every "
            "adapter of this rank takes memory and time in proportion"
        )
    return adapter


def _check(name: str, directory: Path, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type")
        raise _refusal(name, directory, f"peft_type is {kind!r}, only LORA can be served")
    for option, plain in _PLAIN.items():
        if fields.get(option) not in plain:
            raise _refusal(
                name,
                directory,
                f"{option} is {json.dumps(fields[option])}, which is not supported; merge the "
                "adapter into the base model's weights, or train it without",
            )
    _check_numbers(name, directory, fields, "r", "rank_pattern", (int,))
    _check_numbers(name, directory, fields, "lora_alpha", "alpha_pattern", (int, float))


def _check_numbers(
    name: str,
    directory: Path,
    fields: Mapping[str, Any],
    field: str,
    pattern_field: str,
    types: tuple[type, ...],
) -> None:
    patterns = fields.get(pattern_field) or {}
    try:
        values = [fields.get(field), *patterns.values()]
        for pattern in patterns:
            re.compile(pattern)
    except (AttributeError, re.error) as error:
        problem = f"{pattern_field} is {json.dumps(patterns)}, cannot be used: {error}"
        raise _refusal(name, directory, problem) from error
    if not all(type(value) in types and value > 0 for value in values):
        raise _refusal(
            name, directory, f"{field} and {pattern_field} say {values}, must be positive numbers"
        )


def _by_pattern(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """As PEFT reads them: a regular expression for the last parts of a module's name."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return otherwise


def _refusal(name: str, directory: Path, reason: str) -> ConfigError:
    return ConfigError(f"model.adapters: {name!r} at {directory}: {reason}")
