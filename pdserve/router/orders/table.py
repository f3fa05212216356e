"""From the name of a policy to its order."""

from collections.abc import Callable, Mapping

from pdserve.clock import MS
from pdserve.router.costs import CostModel
from pdserve.router.orders import mlfq, static
from pdserve.router.orders.base import Order
from pdserve.router.orders.boost import FixedGamma, GammaBoost, GammaSource, TailGamma
from pdserve.router.orders.hrrn import HighestResponseRatio
from pdserve.router_config import QueuePolicy, RouterConfig


def order_of(settings: RouterConfig, costs: CostModel, gamma: GammaSource | None = None) -> Order:
    """A fresh order for ``settings.policy``.

    Args:
        gamma: what ``gamma_boost`` ranks by; None: ``settings.gamma_per_s``, or a fit to the waits.
    """
    orders: Mapping[QueuePolicy, Callable[[], Order]] = {
        "sjf_raw": lambda: static.StaticOrder(static.prompt_tokens),
        "sjf": lambda: static.StaticOrder(static.uncached_work),
        "sjf_aging": lambda: static.StaticOrder(static.aged_work(settings.rescue_ratio)),
        "edf": lambda: static.StaticOrder(static.deadline),
        "hrrn": HighestResponseRatio,
        "lpm": lambda: static.StaticOrder(static.cached_prefix),
        "lpm_aging": static.AgedPrefix,
        "wspt": lambda: static.StaticOrder(static.weighted_uncached),
        "gamma_boost": lambda: _gamma_boost(settings, gamma),
        "mlfq": lambda: mlfq.plain(settings, costs),
        "fastserve": lambda: mlfq.published(settings, costs),
        "fastserve_released": lambda: mlfq.released(settings, costs),
        "srpt": static.ShortestRemaining,
    }
    if settings.policy not in orders:
        raise AssertionError(f"{settings.policy} is built where its γ and its counters are")
    return orders[settings.policy]()


def _gamma_boost(settings: RouterConfig, gamma: GammaSource | None) -> GammaBoost:
    if gamma is None:
        fixed = settings.gamma_per_s
        gamma = TailGamma() if fixed is None else FixedGamma(fixed)
    return GammaBoost(gamma, floor_ns=round(settings.first_quantum_ms * MS))
