"""Whether the models can be cut as the settings say, before a worker tries it."""

from pdserve.config import ClusterConfig
from pdserve.settings import first_model, further_models


def check_parts(config: ClusterConfig) -> None:
    """Of all models. Reads no weights, and nothing at all where no worker has several processes.

    Raises:
        ConfigError: the model cannot be found or read, or does not come out even.
    """
    for each in (first_model(config), *further_models(config).values()):
        if each.tensor_parts > 1:
            _check(each)


def _check(config: ClusterConfig) -> None:
    from pdserve.model.families.registry import read_architecture
    from pdserve.model.parallel.parts import part_of
    from pdserve.model.source import locate

    part_of(read_architecture(locate(config.model)), config.tensor_parts)
