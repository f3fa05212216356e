"""One worker that prefills and decodes, on a real model."""

from collections.abc import Iterable, Sequence

from pdserve.clock import Clock, monotonic
from pdserve.cluster.worker_parts import make_loop
from pdserve.config import PoolConfig, StoreConfig
from pdserve.decode.draft_model import DraftModel
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import Mover
from pdserve.engine.outputs import ToGateway
from pdserve.ids import WorkerId
from pdserve.messages import Dispatch, Request, Route, Sampling, Timing, Token
from pdserve.model.runner import ModelRunner
from tests.unit.engine.fakes import FakeStore, address
from tests.unit.engine.rig import NAMESPACE, TOKENIZER, request

HERE = WorkerId("w")


def loop_of(
    runner: ModelRunner,
    settings: PoolConfig,
    *,
    clock: Clock = monotonic,
    draft_model: DraftModel | None = None,
) -> EngineLoop:
    """Its pool holds what somebody else left there."""
    runner.pool.tensor.normal_()
    store = FakeStore()
    return make_loop(
        worker=HERE,
        runner=runner,
        mover=Mover(runner.pool, lambda _address: store, address("w"), threaded=False),
        tokenizer=TOKENIZER,
        namespace=NAMESPACE,
        settings=settings,
        store=StoreConfig(offload=False),
        clock=clock,
        draft_model=draft_model,
    )


def dispatched(asked: Request) -> Dispatch:
    return Dispatch(asked, Route(HERE, HERE, address("w"), address("w")), Timing())


def answers(
    loop: EngineLoop, asked: Iterable[Request]
) -> tuple[dict[str, list[Token]], dict[str, int]]:
    """By request, and what the worker counted; in the end it holds nothing."""
    said: dict[str, list[Token]] = {}
    for one in asked:
        loop.handle(dispatched(one))
        said[one.request] = []
    while loop.busy():
        for output in loop.step():
            if isinstance(output, ToGateway):
                said[output.message.request] += output.message.tokens
    assert loop.pool.free_count == loop.pool.block_count
    return said, dict(loop.load().counters)


def drawn_by(
    samplings: Sequence[Sampling], prompt: Sequence[int], *, max_tokens: int
) -> list[Request]:
    """A request each, whose prompts begin alike; the later ones' are longer."""
    return [
        request(
            f"r{index}",
            [*prompt, *range(100, 100 + 20 * index)],
            sampling=sampling,
            max_tokens=max_tokens,
            choice=index,
        )
        for index, sampling in enumerate(samplings)
    ]
