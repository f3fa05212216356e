"""What the parts of one worker share: its device, the making of sequences, what is to be said."""

from pdserve.config import StoreConfig
from pdserve.engine.blocks import blocks_for
from pdserve.engine.device import Device
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Put
from pdserve.engine.outputs import Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.runner import Runner
from pdserve.engine.sayings import delta, failed
from pdserve.engine.sequence import Sequence
from pdserve.errors import OutOfBlocks, PdserveError
from pdserve.ids import BlockKey, WorkerId
from pdserve.messages import (
    ChunkDone,
    Parked,
    Progress,
    Request,
    Route,
    Timing,
    Token,
    WorkerFailed,
)
from pdserve.text.tokenizer import Tokenizer

RETRY_AFTER_MS = 100


class Workplace:
    def __init__(
        self,
        *,
        worker: WorkerId,
        runner: Runner,
        mover: Mover,
        tokenizer: Tokenizer,
        namespace: bytes,
        store: StoreConfig,
    ) -> None:
        self.worker = worker
        self.store = store
        self.local = mover.local
        self.block_tokens = runner.pool.block_tokens
        self.device = Device(runner.pool.block_count, mover)
        self.pool = self.device.pool
        self.counters = self.device.counters
        self.stirred = False
        """Something changed since the last step began, so another step may get further."""

        self._tokenizer = tokenizer
        self._namespace = namespace
        self.attention_like_linear_tokens = runner.architecture.attention_like_linear_tokens
        self._context_tokens = runner.architecture.context_tokens
        self._outputs: list[Output] = []

    # ── sequences ────────────────────────────────────────────────────────────────────────────────

    def sequence(
        self,
        request: Request,
        route: Route,
        tokens: tuple[int, ...],
        timing: Timing,
        keys: tuple[BlockKey, ...],
    ) -> Sequence:
        return Sequence(
            request,
            route,
            tokens,
            timing,
            keys=keys,
            namespace=self._namespace,
            tokenizer=self._tokenizer,
            block_tokens=self.block_tokens,
            context_tokens=self._context_tokens,
        )

    def stays(self, route: Route) -> bool:
        """Whether the sequence is decoded where its prompt is computed: here."""
        return route.prefill == route.decode == self.worker

    def blocks_for(self, token_count: int) -> int:
        return blocks_for(token_count, self.block_tokens)

    def never_fits(self, block_count: int) -> OutOfBlocks | None:
        """The error of what is larger than the whole pool."""
        if block_count <= self.pool.block_count:
            return None
        return OutOfBlocks(block_count, self.pool.block_count, retry_after_ms=RETRY_AFTER_MS)

    def offer_blocks(self, sequence: Sequence) -> None:
        """To the store of this host, for whoever has the same prefix."""
        full = sequence.full_blocks
        if self.store.offload and full:
            put = Put(self.local, sequence.keys(full), tuple(sequence.blocks[:full]))
            self.device.offer(put)

    def release_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks.clear()

    # ── saying ───────────────────────────────────────────────────────────────────────────────────

    def say(self, message: Progress | ChunkDone | WorkerFailed | Parked) -> None:
        self._outputs.append(ToRouter(message))

    def say_failed(self, sequence: Sequence, error: PdserveError) -> None:
        self.say(failed(sequence, error))

    def say_tokens(self, sequence: Sequence, tokens: tuple[Token, ...], *, timed: bool) -> None:
        message = delta(sequence, tokens, timed=timed)
        self._outputs.append(ToGateway(sequence.request.reply_to, message))

    def hand_off(self, handoff: ToDecode) -> None:
        self._outputs.append(handoff)

    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs
