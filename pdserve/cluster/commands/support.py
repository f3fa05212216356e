"""``pdserve support-bundle``: gather, redact, write, and say what is missing."""

import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pdserve.clock import monotonic
from pdserve.cluster.commands.bars import bar
from pdserve.cluster.support.archive import packed, write
from pdserve.cluster.support.gathering import Wish, gather, sources_of
from pdserve.cluster.support.redacting import KNOWN_CHARACTERS_MIN, secrets_in
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError

SECONDS_MAX = 120.0


def support_bundle(
    config: ClusterConfig,
    *,
    out: Path | None,
    url: str,
    nodes: Sequence[str],
    log_directories: Sequence[Path],
    doctor_arguments: Sequence[str] | None,
    seconds_max: float = SECONDS_MAX,
) -> Path:
    """Where the bundle is.

    Args:
        doctor_arguments: as `pdserve doctor` takes them; None leaves the doctor out.

    Raises:
        ConfigError: the file cannot be written; nothing has been asked then.
    """
    if not 0 < seconds_max <= SECONDS_MAX:
        raise ConfigError(
            f"--seconds is {seconds_max:g}, must be above 0 and at most {SECONDS_MAX:g}"
        )
    now = datetime.datetime.now(tz=datetime.UTC)
    path = out or Path(f"pdserve-bundle-{now:%Y%m%d-%H%M%S}.tar.gz")
    if path.exists() or not path.parent.is_dir():
        raise ConfigError(f"--out is {path}: it is there already, or its directory is not")
    known = known_secrets(config)
    wish = Wish(
        config=config,
        url=url,
        nodes=tuple(nodes),
        log_directories=tuple(log_directories),
        doctor_arguments=doctor_arguments,
        known=known,
    )
    sources = sources_of(wish)
    console = Console(highlight=False, soft_wrap=True)
    with bar("gathering", console, total=len(sources)) as step:
        parts = list(
            gather(
                sources,
                seconds_max=seconds_max,
                clock=monotonic,
                done=lambda _: step(),
                known=known,
            )
        )
    about = {"made_at": now.isoformat(timespec="seconds"), "url": url.rpartition("@")[2]}
    content = packed(parts, about, at_unix_s=int(time.time()))
    write(path, content)
    console.print(f"{path}: {len(content) / 1024:,.0f} KiB", markup=False)
    for part in parts:
        if part.missing:
            console.print(f"  without {part.name}: {part.missing}", markup=False)
    console.print("Keys and clients' texts are taken out; look into it before you pass it on.")
    return path


def known_secrets(config: ClusterConfig) -> set[str]:
    """Values that must not be in it, wherever they stand: of the environment, and in files that
    the settings name."""
    secrets = secrets_in(os.environ)
    if config.store.key_salt:
        secrets.add(config.store.key_salt)
    for name in (config.store.key_file, config.store.tls_key, config.gateway.tls_key):
        if name is not None:
            secrets |= _lines_of(Path(name).expanduser())
    return {secret for secret in secrets if len(secret) >= KNOWN_CHARACTERS_MIN}


def _lines_of(path: Path) -> set[str]:
    """Each line by itself: logs break texts where they like. Marks of PEM are no secrets."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return set()  # what cannot be read here is not in our logs by our doing
    return {line.strip() for line in lines if line.strip() and not line.startswith("-----")}
