"""Clusters that are shot at end as all others do; and the one that most faults strike."""

from tests.faults.fortress import calm, fortress, some_calm, stops
from tests.integration.conftest import _ray_ends

__all__ = ["_ray_ends", "calm", "fortress", "some_calm", "stops"]
