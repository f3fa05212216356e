"""How large a cluster is, in which mode, and how much it takes before it gives up."""

import random
from dataclasses import dataclass
from typing import Any

from pdserve.config import ClusterConfig, ModelConfig, PoolConfig, StoreConfig
from pdserve.router_config import RouterConfig
from pdserve.wire.outbox import OUTBOX_MAX
from tests.unit.engine.fakes import BLOCK_TOKENS

POOL_BLOCKS = 32
SLOTS = 64
OUTBOX_FEW = 8
"""Letters, so that a peer that hangs for a moment has left too many unread."""

HOUR_MS = 3_600_000
RESCUE_MS = 1_000.0
ROUTER_SILENCE_MS = 1_500
WORKER_SILENCE_MS = 2_000


@dataclass(frozen=True, slots=True)
class Shape:
    """How large, and in which mode. Drawn from the seed."""

    hosts: int
    prefills: int
    decodes: int
    gateways: int
    mode: Any
    slots: int
    pool_blocks: int
    gamma_per_s: float | None = None
    rescue_after_ms: float = RESCUE_MS
    rescue_ratio: float = 20.0
    tokens_per_s: int = 3_000  # that the router believes in at first
    routers: int = 1  # of which one leads
    outbox_max: int = OUTBOX_MAX  # letters that a worker keeps for one peer
    clocks_ms: tuple[int, ...] = (0, 0, 0)  # by how much those of hosts are wrong

    @staticmethod
    def drawn(dice: random.Random) -> "Shape":
        mode = dice.choice(("disaggregated", "disaggregated", "auto", "aggregated"))
        return Shape(
            hosts=dice.choice((1, 2, 2, 3)),
            prefills=0 if mode == "aggregated" else dice.choice((1, 2)),
            decodes=dice.choice((1, 2, 2)),
            gateways=dice.choice((1, 1, 2)),
            mode=mode,
            slots=dice.choice((24, SLOTS)),
            pool_blocks=dice.choice((14, POOL_BLOCKS)),
            routers=dice.choice((1, 2, 2)),
            outbox_max=dice.choice((OUTBOX_FEW, OUTBOX_MAX, OUTBOX_MAX)),
            clocks_ms=tuple(dice.choice((0, 0, -HOUR_MS, HOUR_MS)) for _ in range(3)),
        )

    def config(self) -> ClusterConfig:
        pool = PoolConfig(
            running_max=4,
            chunk_tokens=2 * BLOCK_TOKENS,
            mixed_chunk_tokens=BLOCK_TOKENS,
            pool_blocks=self.pool_blocks,
        )
        return ClusterConfig(
            model=ModelConfig(block_tokens=BLOCK_TOKENS),
            prefill=pool,
            decode=pool,
            store=StoreConfig(ticket_wait_ms=1_000),
            router=RouterConfig(
                mode=self.mode,
                worker_silence_ms=WORKER_SILENCE_MS,
                router_silence_ms=ROUTER_SILENCE_MS,
                gamma_per_s=self.gamma_per_s,
                rescue_after_ms=self.rescue_after_ms,
                rescue_ratio=self.rescue_ratio,
                attempts_max=20,
                prefill_tokens_per_s=self.tokens_per_s,
            ),
        )
