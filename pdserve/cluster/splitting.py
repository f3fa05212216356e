"""Whether the model can be cut as the settings say, before a worker tries it."""

from pdserve.config import ClusterConfig


def check_parts(config: ClusterConfig) -> None:
    """Reads no weights, and nothing at all where no worker has several processes.

    Raises:
        ConfigError: the model cannot be found or read, or does not come out even.
    """
    if config.tensor_parts == 1:
        return
    from pdserve.model.families.registry import read_architecture
    from pdserve.model.parallel.parts import part_of
    from pdserve.model.source import locate

    part_of(read_architecture(locate(config.model)), config.tensor_parts)
