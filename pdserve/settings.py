"""Where a cluster's settings come from, and that what is wrong is said before anything starts.

Sources, later ones win: the defaults of ``config``, a YAML file, ``PDSERVE_<PART>__<FIELD>``
environment variables, ``part.field=value`` assignments from the command line. This file is the only
code that reads any of them.

An unknown key is an error that names the nearest known one; all problems are told together.

A cluster of several models has one tree of settings, and one for each model in ``further_models``.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pdserve.config import ClusterConfig, ModelConfig
from pdserve.errors import ConfigError

ENV_PREFIX = "PDSERVE_"

MODEL_PARTS = ("model", "prefill", "decode", "router", "autoscaling", "gateway", "drain_timeout_s")
"""What a further model may have of its own. The rest is the cluster's, said once; so is all of
``gateway`` but for how a model's texts are read."""

GATEWAY_FIELDS = ("tool_call_parser", "reasoning_parser", "pooling")

OF_THE_FILES = ("revision", "stored_as", "adapters")
"""Fields of ``model`` that tell of one source, and nothing of another."""

FURTHER_MAX = 31
"""Each model is a router and a worker at least, and each gateway keeps its vocabulary."""

MODEL_NAME_MAX = 256  # characters


def load(
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    assignments: Sequence[str] = (),
    also: Sequence[str] = (),
) -> ClusterConfig:
    """The settings from all sources.

    Args:
        file: YAML; None for none.
        environment: usually ``os.environ``, which None means.
        assignments: ``part.field=value``, values as in YAML.
        also: further models, ``name=source``; what else they are to be is said by the file.

    Raises:
        ConfigError: naming every key that is unknown and every value that does not fit.
    """
    import yaml

    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = _as_tree(yaml.safe_load(file.read_text()), str(file))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
    environment = os.environ if environment is None else environment
    for name, text in sorted(environment.items()):
        path = name.removeprefix(ENV_PREFIX).lower().split("__")
        if name.startswith(ENV_PREFIX) and len(path) > 1:
            _assign(tree, path, _yaml_value(text, name), name)
    for assignment in assignments:
        path_text, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r} is not of the form part.field=value")
        _assign(tree, path_text.strip().split("."), _yaml_value(text, assignment), assignment)
    for model in also:
        name, equals, source = model.partition("=")
        if not equals or not name or not source:
            raise ConfigError(f"--also {model!r} is not of the form name=source")
        _assign(tree, ("models", name, "model", "source"), source, f"--also {model}")
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> ClusterConfig:
    """Settings from nested plain dicts, as YAML or Serve's ``args`` give them."""
    problems: list[str] = []
    config = cast(ClusterConfig, _build(ClusterConfig(), tree, "", problems))
    if not problems:
        _further(config, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def first_model(config: ClusterConfig) -> ClusterConfig:
    """The settings of the model that is named nowhere: as if it were alone."""
    return dataclasses.replace(config, models={})


def further_models(config: ClusterConfig) -> dict[str, ClusterConfig]:
    """By name, the settings of each model in ``config.models`` as if it were alone.

    What it does not say is as for the first model, but for ``OF_THE_FILES`` and the profile of what
    work costs, if its source is another.
    """
    return _further(config, [])


def deployment_suffix(model: str) -> str:
    """What the names of a further model's deployments end in. Serve puts them into the names of
    actors and into URLs: letters, digits and dashes alone."""
    plain = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return f"-{plain}" if plain else ""


def to_tree(config: ClusterConfig) -> dict[str, Any]:
    """Nested plain dicts of every setting; ``from_tree`` takes them back."""
    return dataclasses.asdict(config)


def changes(config: ClusterConfig) -> list[tuple[str, Any, Any]]:
    """(name, default, value) of every setting that is not as it is by default."""
    found: list[tuple[str, Any, Any]] = []

    def compare(where: str, default: Any, value: Any) -> None:
        if isinstance(value, dict) and isinstance(default, dict) and set(value) == set(default):
            for key in value:
                compare(f"{where}.{key}" if where else key, default[key], value[key])
        elif value != default:
            found.append((where, default, value))

    compare("", to_tree(ClusterConfig()), to_tree(first_model(config)))
    own = to_tree(first_model(config))
    for name, model in further_models(config).items():
        compare(f"models.{name}", own, to_tree(model))
    return found


def _yaml_value(text: str, source: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} holds no YAML value: {error}") from error


def _as_tree(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold a mapping, not {type(value).__name__}")
    return value


def _assign(tree: dict[str, Any], path: Sequence[str], value: object, source: str) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{source}: {part} is a value, it has no fields")
    tree[path[-1]] = value


def nearest(word: str, known: Collection[str], *, otherwise: str = "known") -> str:
    """The way out of a wrong name: the right spelling, or all there are."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(known)}"


def _further(config: ClusterConfig, problems: list[str]) -> dict[str, ClusterConfig]:
    """``further_models``, and what is wrong with them."""
    first = first_model(config)
    found: dict[str, ClusterConfig] = {}
    suffixes: dict[str, str] = {}
    if len(config.models) > FURTHER_MAX:
        problems.append(
            f"models has {len(config.models)} entries, at most {FURTHER_MAX} are served"
        )
    for name, tree in config.models.items():
        where = f"models.{name}"
        gateway = tree.get("gateway")
        shared = set(gateway).difference(GATEWAY_FIELDS) if isinstance(gateway, Mapping) else ()
        for key in sorted(map(str, shared)):
            problems.append(
                f"{where}.gateway.{key}: no model has that of its own, only "
                f"{', '.join(GATEWAY_FIELDS)}"
            )
        unknown = [key for key in tree if key not in MODEL_PARTS]
        for key in unknown:
            if key in get_type_hints(ClusterConfig):
                problems.append(
                    f"{where}.{key}: it is the whole cluster's; say it outside of models"
                )
            else:
                problems.append(f"unknown key '{where}.{key}'; {nearest(str(key), MODEL_PARTS)}")
        model = tree.get("model") or {}
        if isinstance(model, Mapping) and "served_name" in model:
            problems.append(f"{where}.model.served_name: the model's name is {name!r} already")
        suffix = deployment_suffix(name)
        if not suffix or len(name) > MODEL_NAME_MAX:
            problems.append(
                f"{where}: a name has a Latin letter or digit, and at most "
                f"{MODEL_NAME_MAX} characters; take another"
            )
        elif suffix in suffixes:
            problems.append(
                f"{where}: too much like models.{suffixes[suffix]}; names must differ in "
                "letters or digits"
            )
        suffixes.setdefault(suffix, name)
        parts = {key: value for key, value in tree.items() if key not in unknown}
        base = _inherited(first, model, name)
        found[name] = cast(ClusterConfig, _build(base, parts, where, problems))
    _check_names(first, found, problems)
    return found


def _inherited(first: ClusterConfig, model: object, name: str) -> ClusterConfig:
    own: dict[str, Any] = {"served_name": name, "adapters": {}}
    router = first.router
    if isinstance(model, Mapping) and model.get("source", first.model.source) != first.model.source:
        fresh = ModelConfig()
        own |= {field: getattr(fresh, field) for field in OF_THE_FILES}
        router = dataclasses.replace(router, profile=None)
    return dataclasses.replace(first, model=dataclasses.replace(first.model, **own), router=router)


def _check_names(
    first: ClusterConfig, found: Mapping[str, ClusterConfig], problems: list[str]
) -> None:
    """Each name, an adapter's too, is one model's."""
    owner = dict.fromkeys(first.model.adapters, "model.adapters")
    if first.model.served_name is not None:
        owner[first.model.served_name] = "model.served_name"
    for name, config in found.items():
        for said, where in [
            (name, f"models.{name}"),
            *((adapter, f"models.{name}.model.adapters") for adapter in config.model.adapters),
        ]:
            if said in owner:
                problems.append(
                    f"{where}: {said!r} is a name in {owner[said]} already; take another"
                )
            owner.setdefault(said, where)


def _build(default: Any, tree: object, where: str, problems: list[str]) -> Any:
    """``default`` with the values of ``tree`` in place; what does not fit goes to ``problems``."""
    cls = type(default)
    if not isinstance(tree, Mapping):
        problems.append(f"{where or 'the configuration'} must be a mapping, not {tree!r}")
        return default
    hints = get_type_hints(cls)
    changes: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            problems.append(f"unknown key {name!r}; {nearest(str(key), hints)}")
        elif dataclasses.is_dataclass(hints[key]):
            changes[key] = _build(getattr(default, key), value, name, problems)
        else:
            try:
                changes[key] = _fit(hints[key], value)
            except ValueError as error:
                problems.append(f"{name} is {value!r}, must be {error}")
    try:
        return dataclasses.replace(default, **changes)
    except ConfigError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return default


def _fit(hint: Any, value: Any) -> Any:
    """``value`` as the type that ``hint`` says, or ValueError with what it must be."""
    origin = get_origin(hint)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ValueError("one of " + ", ".join(map(str, get_args(hint))))
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _fit(next(arg for arg in get_args(hint) if arg is not type(None)), value)
    if origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {str(key): _fit(get_args(hint)[1], item) for key, item in value.items()}
        raise ValueError("a mapping")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ValueError(
        {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
    )
