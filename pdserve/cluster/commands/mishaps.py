"""Failures to simulate, as the command line says them.

prefill:0@30        the first prefill worker dies after 30 s, for good
prefill:0@30+20     20 s later another one takes its place
decode:1x4@60       from 60 s on the second decode worker takes four times as long
"""

import re
from collections.abc import Sequence

from pdserve.clock import S
from pdserve.errors import ConfigError
from pdserve.messages import Role
from pdserve.simulator.settings import Death, Failure, SimulationSettings, Slowdown

FORMS = "prefill:0@30, prefill:0@30+20 or decode:1x4@60"
_NUMBER = r"(\d+(?:\.\d+)?)"
_MISHAP = re.compile(rf"(prefill|decode):(\d+)(?:x{_NUMBER})?@{_NUMBER}(?:\+{_NUMBER})?")


def failures_of(said: Sequence[str], settings: SimulationSettings) -> tuple[Failure, ...]:
    """What is said, as failures of the workers that ``settings`` has.

    Raises:
        ConfigError: naming what does not fit, and what would.
    """
    return tuple(_failure(text, settings) for text in said)


def _failure(text: str, settings: SimulationSettings) -> Failure:
    parts = _MISHAP.fullmatch(text)
    if parts is None:
        raise ConfigError(f"fail is {text!r}, must be like {FORMS}")
    role, index = Role(parts[1]), int(parts[2])
    count = settings.workers_of(role)
    if index >= count:
        raise ConfigError(
            f"fail is {text!r}, but there are {count} {role.value} workers, counted from 0; set "
            f"{role.value}.replicas"
        )
    at_ns = round(float(parts[4]) * S)
    if parts[3] is None:
        back_after_ns = None if parts[5] is None else round(float(parts[5]) * S)
        return Death(role=role, index=index, at_ns=at_ns, back_after_ns=back_after_ns)
    if parts[5] is not None or float(parts[3]) <= 0:
        raise ConfigError(
            f"fail is {text!r}, but a slower worker has a factor above 0 and stays as it is until "
            "the next factor; say that one as a failure of its own"
        )
    return Slowdown(role=role, index=index, factor=float(parts[3]), at_ns=at_ns)
