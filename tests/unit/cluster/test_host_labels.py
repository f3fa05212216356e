"""On which hosts what runs, by Ray's labels; and where a host is."""

import pytest

from pdserve.cluster.app import _front_options, _pool_options
from pdserve.cluster.places import place_of
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.router_config import RouterConfig
from pdserve.settings import from_tree


def test_a_pool_asks_for_the_labels_that_it_was_given() -> None:
    config = from_tree({"decode": {"labels": {"ray.io/accelerator-type": "in(H100,H200)"}}})
    options = _pool_options(config.decode, config)["ray_actor_options"]
    assert options["label_selector"] == {"ray.io/accelerator-type": "in(H100,H200)"}
    assert "label_selector" not in _pool_options(config.prefill, config)["ray_actor_options"]


def test_gateways_and_router_ask_for_theirs_and_for_no_core() -> None:
    config = from_tree({"gateway": {"labels": {"zone": "a"}}})
    assert _front_options(config) == {"num_cpus": 0, "label_selector": {"zone": "a"}}
    assert _front_options(ClusterConfig()) == {"num_cpus": 0}


def test_ray_takes_the_selectors_that_the_settings_describe() -> None:
    from ray._private.label_utils import validate_label_selector

    for value in ("H100", "in(a,b)", "!a", "!in(a,b)"):
        assert not validate_label_selector({"ray.io/accelerator-type": value})


@pytest.mark.parametrize(
    ("names", "place"),
    [
        ("", ()),
        ("zone", ("z1",)),
        (" zone, rack ", ("z1", "r7")),
        ("zone,cabinet", ("z1", "")),
    ],
)
def test_a_host_is_where_its_labels_say(names: str, place: tuple[str, ...]) -> None:
    labels = {"zone": "z1", "rack": "r7", "ray.io/node-id": "abc"}
    assert place_of(labels, RouterConfig(topology_labels=names)) == place


def test_a_way_that_shrinks_with_distance_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"far_ratio is 0\.5"):
        RouterConfig(far_ratio=0.5)
