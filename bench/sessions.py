"""Conversations that come back: later turns from host memory, and from disk after a restart.

    python -m bench.sessions [--conversations 200] [--turns 5] [--quick] [--json FILE]

Conversations with a beginning of their own, a few hundred tokens, go through a real cluster turn by
turn, each with the model's own answers in its history. Think times are log-normal around a minute,
up to hours, and compressed to nothing: what is left of them is the order in which turns come, and
so how much came in between. The workers' own pools together hold a tenth of what all conversations
have at the end, so a later turn finds its history in the store or nowhere.

Behind some later turns a stranger asks as much, with tokens that nobody has seen: that is what the
turn would cost if it were computed. The ratio is that of the two medians, over such pairs. Then
everything is ended, and started again with the same disk, and some conversations go on.
"""

import argparse
import heapq
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.frame import Options, Row, at_most, row, run
from bench.http_load import Answer, ask, random_tokens
from pdserve.cluster.local import local_cluster
from pdserve.config import ClusterConfig, GatewayConfig, GiB, PoolConfig, StoreConfig

CONVERSATIONS, TURNS = 200, 5
FIRST_TOKENS = (200, 800)  # of a conversation's first prompt
NEXT_TOKENS = (20, 120)  # of what is said in later turns
ANSWER_TOKENS = 24
THINK_MEDIAN_S, THINK_SIGMA, THINK_S_MAX = 60.0, 1.5, 4 * 3600.0
POOLS_SHARE = 0.1  # of what all conversations have at the end
STRANGER_EVERY = 4  # later turns
AFTER_RESTART = 40  # conversations that go on
BLOCK_TOKENS = 16
MEMORY_RATIO_MAX, DISK_RATIO_MAX = 0.35, 0.5


@dataclass(slots=True)
class Conversation:
    number: int
    chance: random.Random
    history: list[int] = field(default_factory=list)
    turn: int = 0

    def ask(self, url: str) -> Answer:
        low, high = FIRST_TOKENS if self.turn == 0 else NEXT_TOKENS
        count = self.chance.randint(low, high)
        self.history += random_tokens(count, seed=self.chance.randrange(1 << 40))
        answer = ask(url, self.history, ANSWER_TOKENS)
        self.history += answer.tokens
        self.turn += 1
        return answer


@dataclass(slots=True)
class Pairs:
    """Seconds to the first token."""

    turns: list[float] = field(default_factory=list)
    strangers: list[float] = field(default_factory=list)
    cached_shares: list[float] = field(default_factory=list)  # of a turn's prompt

    def add(self, url: str, conversation: Conversation) -> None:
        said_tokens = len(conversation.history)
        answer = conversation.ask(url)
        prompt_tokens = len(conversation.history) - len(answer.tokens)
        assert prompt_tokens > said_tokens
        stranger = random_tokens(prompt_tokens, seed=conversation.chance.randrange(1 << 40))
        self.turns.append(_first_s(answer))
        self.strangers.append(_first_s(ask(url, stranger, 1)))
        self.cached_shares.append(answer.cached_tokens / prompt_tokens)


def measure(options: Options) -> Iterator[Row]:
    count = options.arguments.conversations or (40 if options.quick else CONVERSATIONS)
    turns = options.arguments.turns or (3 if options.quick else TURNS)
    conversations = [
        Conversation(n, random.Random(f"{options.arguments.seed}/{n}")) for n in range(count)
    ]
    with tempfile.TemporaryDirectory(prefix="pdserve-sessions-") as disk:
        config = _config(count, turns, Path(disk))
        with local_cluster(config) as cluster:
            ask(cluster.http, random_tokens(64, seed=1), 4)
            yield from _rows(
                "later turn, from host memory",
                _talk(cluster.http, conversations, turns),
                MEMORY_RATIO_MAX,
            )
        with local_cluster(config) as cluster:
            ask(cluster.http, random_tokens(64, seed=2), 4)
            pairs = Pairs()
            for conversation in conversations[:: max(1, count // AFTER_RESTART)]:
                pairs.add(cluster.http, conversation)
            yield from _rows("turn after a restart, from disk", pairs, DISK_RATIO_MAX)


def _talk(url: str, conversations: Sequence[Conversation], turns: int) -> Pairs:
    """All turns of all, in the order in which they would have come."""
    pairs = Pairs()
    later = 0
    due = [(0.0, conversation.number) for conversation in conversations]
    while due:
        now_s, number = heapq.heappop(due)
        conversation = conversations[number]
        later += conversation.turn > 0
        if conversation.turn > 0 and later % STRANGER_EVERY == 0:
            pairs.add(url, conversation)
        else:
            conversation.ask(url)
        if conversation.turn < turns:
            think_s = THINK_MEDIAN_S * conversation.chance.lognormvariate(0, THINK_SIGMA)
            heapq.heappush(due, (now_s + min(think_s, THINK_S_MAX), number))
    return pairs


def _rows(name: str, pairs: Pairs, ratio_max: float) -> Iterator[Row]:
    yield row(
        f"{name}, first token", [1000 * s for s in pairs.turns], "ms", reference="computed",
        reference_samples=[1000 * s for s in pairs.strangers], bar=at_most(ratio_max, of="ratio"),
    )  # fmt: skip
    yield row(f"{name}, of its prompt cached", [100 * s for s in pairs.cached_shares], "%")


def _config(count: int, turns: int, disk: Path) -> ClusterConfig:
    mean_tokens = sum(FIRST_TOKENS) / 2 + (turns - 1) * sum(NEXT_TOKENS) / 2 + turns * ANSWER_TOKENS
    blocks = POOLS_SHARE * count * mean_tokens / BLOCK_TOKENS
    pool = PoolConfig(pool_blocks=max(150, round(blocks / 2)))  # of two workers
    return ClusterConfig(
        prefill=pool,
        decode=replace(pool),
        gateway=GatewayConfig(http_port=0, grpc_port=-1),
        store=StoreConfig(arena_bytes=6 * GiB, ssd_directory=str(disk), ssd_bytes=12 * GiB),
        tcp=False,
    )


def _first_s(answer: Answer) -> float:
    return answer.token_s[0] - answer.sent_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=int, help=f"{CONVERSATIONS}, with --quick 40")
    parser.add_argument("--turns", type=int, help=f"{TURNS}, with --quick 3")
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    run("sessions", measure, add_arguments=add_arguments)
