"""What importing the package does to who imports it."""

from bench.surface_package import network_calls


def test_nothing_asks_the_network_when_it_is_imported() -> None:
    assert network_calls() == 0
