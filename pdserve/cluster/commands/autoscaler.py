"""What ``pdserve autoscaler explain`` shows: decisions as tables; and a policy's dry run.

A *dry run* plays what a router's autoscaler has seen, one observation a second for the last twenty
minutes, through the policy of another configuration. The pools stay as they were then, so it tells
when that policy would have acted first; what would have become of the load, ``pdserve simulate
--autoscale`` tells.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pdserve.cluster.http_client import get_json, of_model
from pdserve.cluster.scaler import plan_of, replayed
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.settings import further_models, load

PATH = "/cluster/autoscaling"
OBSERVATIONS_PATH = f"{PATH}/observations"

SHOWN_MAX = 20
"""Changes, the latest ones."""


def explain(url: str, *, as_json: bool, model: str | None = None) -> None:
    said = get_json(url, of_model(PATH, model))
    if as_json:
        print(json.dumps(said, indent=2))
    else:
        Console(highlight=False).print(render(said))


def save(url: str, file: Path, model: str | None = None) -> None:
    """
    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    text = json.dumps(get_json(url, of_model(OBSERVATIONS_PATH, model)))
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text + "\n")
    except FileExistsError:
        raise ConfigError(f"{file} is there already; name another file") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


def dry_run(
    url: str,
    file: Path | None,
    config: str | None,
    assignments: Sequence[str],
    *,
    as_json: bool,
    model: str | None = None,
) -> None:
    """By the policy of ``model``, where the settings have several.

    Raises:
        ConfigError: the file is no recording of observations, or a setting does not fit.
    """
    settings: ClusterConfig = load(
        None if config is None else Path(config), assignments=assignments
    )
    settings = further_models(settings).get(model or "", settings)
    seen = get_json(url, of_model(OBSERVATIONS_PATH, model)) if file is None else _read(file)
    try:
        observations = list(seen["observations"])
        changes = [asdict(one) for one in replayed(plan_of(settings), observations)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file or url} holds no observations of this version ({error!r}); "
            "write them with `pdserve autoscaler explain --save FILE`"
        ) from error
    if as_json:
        print(json.dumps({"observations": len(observations), "changes": changes}, indent=2))
        return
    now_ms = observations[-1]["at_ms"] if observations else 0
    span_s = (now_ms - observations[0]["at_ms"]) / 1000 if observations else 0.0
    console = Console(highlight=False)
    console.print(f"dry run over {len(observations)} observations, {span_s:.0f} s")
    console.print(_changes(changes, now_ms) if changes else Text("nothing would have changed"))


def render(said: Mapping[str, Any]) -> Group:
    """What the router's autoscaler says of itself."""
    pools = _table("pool", "workers", "wanted", "least", "most", "demand", "start s", "why")
    latest = {one["pool"]: one for one in said["latest"]}
    for pool in said["pools"]:
        now = latest.get(pool["pool"], {})
        pools.add_row(
            pool["pool"],
            str(now.get("workers", "")),
            str(now.get("wanted", "")),
            str(pool["least"]),
            str(pool["most"]),
            f"{now['demand']:.2f}" if now else "",
            f"{pool['start_s']:g}",
            now.get("why", "it looks on before it decides"),
        )
    parts: list[Any] = [pools]
    if said["dry_run"]:
        parts = [Text("dry run: nothing is changed (autoscaling.dry_run)"), *parts]
    if said["changes"]:
        parts += [Text(), _changes(said["changes"], said["now_ms"])]
    else:
        parts += [Text(), Text("no changes so far")]
    return Group(*parts)


def _changes(changes: Sequence[Mapping[str, Any]], now_ms: int) -> Table:
    table = _table("ago s", "pool", "from", "to", "workers", "demand", "why")
    for one in changes[-SHOWN_MAX:]:
        table.add_row(
            f"{(now_ms - one['at_ms']) / 1000:.0f}",
            one["pool"],
            str(one["before"]),
            str(one["wanted"]),
            str(one["workers"]),
            f"{one['demand']:.2f}",
            one["why"],
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("pool", "why") else "right")
    return table


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from error
