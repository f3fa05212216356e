"""Models for clusters that are shot at; see tests/integration/conftest.py."""

from tests.integration.conftest import default_model, small_model

__all__ = ["default_model", "small_model"]
