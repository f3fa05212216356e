"""Cost profiles as files: what ``pdserve profile`` writes, and those that come with the package.

A profile is YAML: the fields of ``router.costs.CostModel``, nothing left out, and ``about``, which
is for people: machine, versions, date and errors of a measured one, formula and inputs of an
analytic one. Programs take from it, where it is there, how large such a worker is (``Size``), which
weights it had (``weights``), and how much workers are slowed down by each other and by the rest of
a cluster (``contention``, ``prefill_slowdown``, ``decode_slowdown``). A name without a slash that
is no file is looked for among the shipped ones.

    python -m pdserve.cluster.profiles        writes the shipped ones anew, from ``router.analytic``
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.router.analytic import SHIPPED, analytic_costs, explanation
from pdserve.router.costs import CostModel, Origin
from pdserve.settings import nearest

SHIPPED_DIRECTORY = Path(__file__).with_name("profiles")

ABOUT = "about"
FACTORS = ("contention", "prefill_slowdown", "decode_slowdown")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of one worker; None: the profile does not say."""

    kv_capacity_tokens: int | None = None
    chunk_tokens: int | None = None
    running_max: int | None = None
    double_cost_tokens: int | None = None
    """With so many tokens before it a token is twice as much work as a prompt's first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    costs: CostModel
    size: Size
    contention: float = 1.0  # how many times as long work takes beside its neighbours' work
    prefill_slowdown: float = 1.0  # how many times as long beside gateway, router and stores
    decode_slowdown: float = 1.0
    weights: str | None = None  # that it was measured with, as ``weights_of`` names them


def load_profile(name_or_path: str | Path) -> CostModel:
    """A shipped profile by its name, or any by its path.

    Raises:
        ConfigError: there is none, or it is not one; every key at fault is named.
    """
    return read_profile(name_or_path).costs


def weights_of(model: ModelConfig) -> str:
    """As they were asked for: half as many bits make a decode step nearly twice as fast."""
    return f"dtype {model.dtype}, quantization {model.quantization}"


def doubt(profile: Profile, model: ModelConfig) -> str | None:
    """Why what it says may not hold for workers of this model."""
    weights = weights_of(model)
    if profile.weights in (None, weights):
        return None
    return (
        f"the profile {profile.costs.name} was measured with {profile.weights}, the workers have "
        f"{weights}: what it predicts may be off by a factor of two; measure again with these "
        "settings (pdserve profile)"
    )


def read_profile(name_or_path: str | Path) -> Profile:
    """The same, and the size of such a worker."""
    path = _find(name_or_path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profile {path} is not YAML: {error}") from error
    problems: list[str] = []
    about = _about(tree, problems)
    size = _size(about, problems)
    factors = {name: _factor(about, name, problems) for name in FACTORS}
    weights = _weights(about, problems)
    costs = _read(CostModel, tree, "", problems)
    if problems:
        raise ConfigError(f"the profile {path}: " + "; ".join(problems))
    assert isinstance(costs, CostModel)
    return Profile(costs, size, weights=weights, **factors)


def save_profile(
    costs: CostModel, path: str | Path, *, about: Mapping[str, Any] | None = None
) -> None:
    """Write ``costs`` where ``load_profile`` will find them.

    Args:
        about: plain values for people: where the numbers are from.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        Path(path).write_text(text_of(costs, about or {}))
    except OSError as error:
        raise ConfigError(f"cannot write the profile {path}: {error.strerror}") from error


def text_of(costs: CostModel, about: Mapping[str, Any]) -> str:
    tree = dataclasses.asdict(costs) | ({ABOUT: dict(about)} if about else {})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def shipped_names() -> Sequence[str]:
    return sorted(path.stem for path in SHIPPED_DIRECTORY.glob("*.yaml"))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.exists() or len(path.parts) != 1:
        return path
    shipped = SHIPPED_DIRECTORY / f"{path.name.removesuffix('.yaml')}.yaml"
    if shipped.exists():
        return shipped
    names = shipped_names()
    hint = nearest(path.name, names, otherwise="shipped ones")
    raise ConfigError(f"the profile {str(path)!r} is neither a file nor a shipped one; {hint}")


def _about(tree: object, problems: list[str]) -> Mapping[str, Any]:
    """Taken out of ``tree``."""
    about = (tree.pop(ABOUT, None) if isinstance(tree, dict) else None) or {}
    if isinstance(about, Mapping):
        return about
    problems.append(f"{ABOUT} must hold a mapping, not {about!r}")
    return {}


def _size(about: Mapping[str, Any], problems: list[str]) -> Size:
    said: dict[str, int] = {}
    for field in dataclasses.fields(Size):
        if about.get(field.name) is not None:
            try:
                said[field.name] = _fit(field.name, int, about[field.name])
            except ValueError as error:
                problems.append(f"{ABOUT}.{field.name} is {about[field.name]!r}, must be {error}")
    return Size(**said)


def _factor(about: Mapping[str, Any], name: str, problems: list[str]) -> float:
    said = about.get(name, 1.0)
    number = _number(said)
    if math.isfinite(number) and number >= 1:
        return number
    problems.append(f"{ABOUT}.{name} is {said!r}, must be a number, at least 1")
    return 1.0


def _weights(about: Mapping[str, Any], problems: list[str]) -> str | None:
    said = about.get("weights")
    if said is None or isinstance(said, str):
        return said
    problems.append(f"{ABOUT}.weights is {said!r}, must be text")
    return None


def _read(cls: type, tree: object, where: str, problems: list[str]) -> object:
    """``tree`` as a ``cls``; what does not fit goes to ``problems``, and the result is void."""
    if not isinstance(tree, Mapping):
        problems.append(f"{where or 'the file'} must hold a mapping, not {tree!r}")
        return None
    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(f"unknown key {name!r}; {nearest(str(key), hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            fields[key] = _read(hints[key], value, name, problems)
        else:
            try:
                fields[key] = _fit(key, hints[key], value)
            except ValueError as error:
                problems.append(f"{name} is {value!r}, must be {error}")
    missing = [f"{where}.{key}" if where else key for key in hints if key not in tree]
    problems += [f"{name} is missing" for name in missing]
    return None if problems else cls(**fields)


def _fit(key: str, hint: Any, value: Any) -> Any:
    """``value`` as ``hint``, or ValueError with what it must be."""
    if key == "origin":  # by its name: a compiled class does not tell the texts of its hint
        if value in get_args(Origin):
            return value
        raise ValueError("one of " + ", ".join(get_args(Origin)))
    if hint is str:
        if isinstance(value, str) and value:
            return value
        raise ValueError("text")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        raise ValueError("a whole number above 0")
    assert hint is float
    number = _number(value)
    if key == "bytes_per_s":
        if math.isfinite(number) and number > 0:
            return number
        raise ValueError("a number above 0")
    if math.isfinite(number) and number >= 0:
        return number
    raise ValueError("a number, not below 0")


def _number(value: object) -> float:
    """YAML takes 1e-7 for text, as it has no point."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def write_shipped(directory: Path = SHIPPED_DIRECTORY) -> None:
    for deployment in SHIPPED:
        costs = analytic_costs(deployment)
        save_profile(costs, directory / f"{costs.name}.yaml", about=explanation(deployment))


if __name__ == "__main__":
    write_shipped()
