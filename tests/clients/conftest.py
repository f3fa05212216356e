"""Clusters that are shared end as all others do."""

from tests.integration.conftest import _ray_ends

__all__ = ["_ray_ends"]
