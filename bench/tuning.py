"""Which of vLLM's settings is the peer: all that decide between chats and long prompts are tried.

Chunk budget × long-prefill threshold × scheduling policy, each on a server of its own, all with the
same load, whose seed no comparison uses. The best is the one with the lowest score; a comparison
says what its score is.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.frame import percentile
from bench.peers.mixed_load import Arrival, Outcome, ttfts_s
from bench.runs import Work
from bench.servers import ServerFailed, Vllm

TUNING_SEED = 1_000_003
BUDGETS_TOKENS = (None, 256, 512)
THRESHOLDS_TOKENS = (0, 64, 128)

ALL_SETTINGS = [
    Vllm(budget, threshold, chats_first)
    for budget, threshold, chats_first in itertools.product(
        BUDGETS_TOKENS, THRESHOLDS_TOKENS, (False, True)
    )
]
FEW_SETTINGS = [
    Vllm(None, 0, False),
    Vllm(512, 64, False),
    Vllm(512, 128, False),
    Vllm(512, 128, True),
]
"""For a quick look: the defaults, and what was best whenever all were tried."""


@dataclass(frozen=True, slots=True)
class Tried:
    outcomes: Mapping[Vllm, Sequence[Outcome]]
    failed: Mapping[Vllm, str]  # settings that vLLM does not start with, and what it said

    def best(self, score: Callable[[Sequence[Outcome]], tuple[float, ...]]) -> Vllm:
        """The setting with the lowest score; of equal ones the first tried.

        Raises:
            ServerFailed: none worked.
        """
        if not self.outcomes:
            raise ServerFailed(f"vLLM works with no setting; {next(iter(self.failed.values()))}")
        return min(self.outcomes, key=lambda setting: score(self.outcomes[setting]))


def try_all(work: Work, settings: Sequence[Vllm], arrivals: Sequence[Arrival]) -> Tried:
    outcomes, failed = {}, {}
    for setting in settings:
        try:
            outcomes[setting] = work.outcomes(setting, arrivals)
        except ServerFailed as error:
            failed[setting] = str(error)
    return Tried(outcomes, failed)


def chat_ttft_s_p90(outcomes: Sequence[Outcome]) -> float:
    """What the headline is about: how long chats wait behind long prompts."""
    return percentile(ttfts_s(o for o in outcomes if o.kind == "chat"), 0.9)
