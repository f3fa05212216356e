"""What the parts of one worker share: its device, the making of sequences, what is to be said."""

from pdserve.config import StoreConfig
from pdserve.engine.blocks import blocks_for
from pdserve.engine.device import Device
from pdserve.engine.masks import Masks
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Put
from pdserve.engine.outputs import OfPrompt, Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.runner import Runner
from pdserve.engine.sayings import delta, error_delta, failed, hypothesis_deltas
from pdserve.engine.sequence import Ending, Sequence
from pdserve.errors import AdapterMissing, ErrorInfo, OutOfBlocks, PdserveError, StoreError
from pdserve.ids import BlockKey, WorkerId
from pdserve.kvstore.keys import adapter_namespace
from pdserve.messages import (
    ChunkDone,
    FinishReason,
    Handoff,
    Parked,
    Progress,
    Request,
    Route,
    Timing,
    Token,
    WorkerFailed,
)
from pdserve.prompt_tasks import PromptDelta
from pdserve.text.grammar import Grammars, Guide
from pdserve.text.tokenizer import Tokenizer

RETRY_AFTER_MS = 100

STRETCHES_MAX = 6
"""A last chunk's blocks are pushed in so many stretches of layers. The step stands still while each
is told of, some 50 µs for a prompt; what of the last one is not copied when the step ends is what a
first token waits for."""


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
        self.sees_other_hosts = mover.sees_other_hosts
        self.block_tokens = runner.pool.block_tokens
        self.device = Device(runner.pool.block_count, mover)
        self.pool = self.device.pool
        self.copy_block = runner.pool.copy_block
        self.counters = self.device.counters
        self.stirred = False
        """Something changed since the last step began, so another step may get further."""

        self.masks = Masks()
        self._grammars = Grammars(tokenizer)
        self._tokenizer = tokenizer
        self._namespace = namespace
        self._adapters = runner.adapters
        self.attention_like_linear_tokens = runner.architecture.attention_like_linear_tokens
        self._context_tokens = runner.architecture.context_tokens
        self.layers_told = -(-runner.architecture.layer_count // STRETCHES_MAX)  # ceil
        """Layers that are pushed together while later ones are computed."""

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
        """The sequence; it has ended already where this worker lacks its adapter."""
        sequence = Sequence(
            request,
            route,
            tokens,
            timing,
            keys=keys,
            namespace=adapter_namespace(self._namespace, request.adapter),
            tokenizer=self._tokenizer,
            block_tokens=self.block_tokens,
            context_tokens=self._context_tokens,
            guide=self._guide(request, tokens),
        )
        lacks_it = request.adapter and request.adapter not in self._adapters
        if sequence.ending is None and lacks_it:
            missing = AdapterMissing(self.worker, request.model, request.adapter)
            sequence.ending = Ending(FinishReason.ERROR, error=missing)
        return sequence

    def turns_away(self, handoff: Handoff) -> bool:
        """Whether its blocks are of another model or layout, which is said; while versions change
        they may have the right shape all the same."""
        request = handoff.request
        own = adapter_namespace(self._namespace, request.adapter).hex()
        if handoff.namespace in ("", own):
            return False
        error = StoreError(f"{request.request}'s blocks are of another model or layout")
        self.say(WorkerFailed(request.request, request.attempt, ErrorInfo.of(error)))
        return True

    def _guide(self, request: Request, tokens: tuple[int, ...]) -> Guide | None:
        """What the request's tokens so far leave of its constraint."""
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        guide = Guide(self._grammars, constraint, tokens[request.prompt_tokens :])
        self.masks.open(guide)
        return guide

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
            blocks = tuple(sequence.blocks[:full])
            put = Put(self.local, sequence.keys(full), blocks, sequence.request.tenant)
            self.device.offer(put)

    def release_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks.clear()

    # ── saying ───────────────────────────────────────────────────────────────────────────────────

    def say(self, message: Progress | ChunkDone | WorkerFailed | Parked) -> None:
        self._outputs.append(ToRouter(message))

    def say_failed(self, sequence: Sequence, error: PdserveError, *, alone: bool = False) -> None:
        """``alone``: of a step that raised, as in ``messages.WorkerFailed``."""
        self.say(failed(sequence, error, alone=alone))

    def say_tokens(self, sequence: Sequence, tokens: tuple[Token, ...], *, timed: bool) -> None:
        message = delta(sequence, tokens, timed=timed)
        self._outputs.append(ToGateway(sequence.request.reply_to, message))

    def say_of_prompt(self, sequence: Sequence, message: PromptDelta) -> None:
        self._outputs.append(OfPrompt(sequence.request.reply_to, message))

    def say_hypothesis(
        self, sequence: Sequence, index: int, tokens: tuple[Token, ...], ending: Ending
    ) -> None:
        """One whole answer of a beam search."""
        for message in hypothesis_deltas(sequence, index, tokens, ending):
            self._outputs.append(ToGateway(sequence.request.reply_to, message))

    def say_error(self, sequence: Sequence, error: PdserveError) -> None:
        """To the client, who is not helped by another attempt."""
        self._outputs.append(ToGateway(sequence.request.reply_to, error_delta(sequence, error)))

    def hand_off(self, handoff: ToDecode) -> None:
        self._outputs.append(handoff)

    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs
