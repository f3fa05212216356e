"""Which version of this package runs."""

from importlib import metadata


def installed_version() -> str:
    try:
        return metadata.version("pdserve")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0+checkout"
