"""The cluster of the tests about overload and poison: one for all of them, with faults built in."""

import os
import tempfile
from pathlib import Path

from pdserve.engine.faults import STEP_ENV
from tests.integration.harness import TestCluster, settings, shared

EXITS, RAISES, HANGS = 41_001, 41_002, 41_003
"""A step that computes one of these ends its process, raises, or hangs; the last only once."""

HUNG = Path(tempfile.gettempdir()) / f"pdserve-test-hung-{os.getpid()}"
"""Is there once a step has hung."""

TTFT_MAX_MS = 1500.0
WRITE_TIMEOUT_S = 3.0
WAITING_MAX = 4096
PATIENCE_MS = 600_000.0
"""For a herd of thousands, on a machine that is busy with other things."""


def poisoned_cluster(small_model: Path) -> TestCluster:
    config = settings(
        small_model,
        prefill={"replicas": 2, "pool_blocks": 500},
        decode={"replicas": 2, "pool_blocks": 500},
        router={
            "ttft_max_ms": {"interactive": TTFT_MAX_MS},
            "waiting_max": WAITING_MAX,
            "queue_age_max_ms": PATIENCE_MS,
        },
        gateway={"write_timeout_s": WRITE_TIMEOUT_S},
    )
    faults = f"exit:{EXITS},raise:{RAISES},hang:{HANGS}:{HUNG}"
    return shared(config, environment={STEP_ENV: faults})
