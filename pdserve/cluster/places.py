"""Where a host's processes meet, and where the host is among others."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.router_config import RouterConfig


def sockets_directory(config: ClusterConfig) -> Path:
    """Where this host's sockets are, once there are any."""
    default = Path(tempfile.gettempdir()) / f"pdserve-{os.getuid()}"
    return Path(config.directory) if config.directory else default


def directory_of(config: ClusterConfig) -> Path:
    """The same directory, made on first use, for this user alone."""
    directory = sockets_directory(config)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ConfigError(f"directory is {directory}, which belongs to somebody else; set another")
    return directory


def place_of(labels: Mapping[str, str], settings: RouterConfig) -> tuple[str, ...]:
    """Where a host with these Ray labels is, coarse to fine; empty where nobody asks."""
    names = filter(None, map(str.strip, settings.topology_labels.split(",")))
    return tuple(labels.get(name, "") for name in names)


def tcp_host_of(config: ClusterConfig) -> str | None:
    """This host's address, for those on others; None: nobody is to come over TCP."""
    if not config.tcp:
        return None
    import ray

    return str(ray.util.get_node_ip_address())
