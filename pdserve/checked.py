"""What every part of the settings is: checked when it is made."""

from collections.abc import Iterator

from pdserve.errors import ConfigError


class Checked:
    """Collects what is wrong with a part and raises it all at once."""

    __slots__ = ()

    def _problems(self) -> Iterator[str]:
        yield from ()

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(problems))

    def _positive(self, *names: str) -> Iterator[str]:
        for name in names:
            value = getattr(self, name)
            if not value > 0:  # NaN is not positive either
                yield f"{name} is {value}, must be positive"
