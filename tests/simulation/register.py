"""Who leads: ``cluster.terms.Register`` in the simulated world, and what must be true of routers.

It is on one host, as Ray's control service is. An entry never changes. A claim is two questions,
as there: enter, then look; it may have been entered although its answer never came.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from pdserve.clock import S
from pdserve.cluster.terms import TIMEOUT_S
from pdserve.errors import StoreUnavailable
from pdserve.messages import Leading
from pdserve.router.succession import Term
from tests.simulation.loop import current_process
from tests.simulation.network import Network


class SimRegister:
    """One for all; whoever asks is the process whose callback runs."""

    def __init__(self, network: Network, host: str) -> None:
        self.host = host
        self.down_until_ns = 0
        self._network = network
        self._terms: dict[int, Term] = {}

    async def latest(self) -> Term | None:
        await self._travel()
        term = self._terms[max(self._terms)] if self._terms else None
        await self._travel()
        return term

    async def claim(self, term: Term) -> Term | None:
        await self._travel()
        self._terms.setdefault(term.epoch, term)
        await self._travel()
        return await self.latest()

    async def _travel(self) -> None:
        """One way of a question."""
        process, network = current_process(), self._network
        assert process is not None
        now_ns = network.loop.now_ns
        if network.is_apart(process.host, self.host) or self.down_until_ns > now_ns:
            await asyncio.sleep(TIMEOUT_S)
            raise StoreUnavailable("the register cannot be reached")
        await asyncio.sleep(network.delay_ns(process.host, self.host) / S)


class Reigns:
    """I7, of routers: nobody leads in another's epoch, and whoever has heard of an epoch takes
    nothing from an older one."""

    def __init__(self) -> None:
        self._led_by: dict[int, str] = {}  # each epoch, by which process
        self._led: dict[str, int] = {}  # by a process: its last epoch
        self._heard: dict[str, int] = {}  # by a process: the youngest

    def begin(self, process: str, epoch: int) -> None:
        leader = self._led_by.setdefault(epoch, process)
        assert leader == process, f"I7: {process} leads in epoch {epoch}, as {leader} does"
        self._led[process] = epoch

    def watch(self, listen: Callable[..., Any]) -> Callable[..., Any]:
        """In the place of the ``listen`` of links."""

        async def listen_and_judge(
            connection: Any, hear: Callable[[object], None], **how: Any
        ) -> None:
            listener = current_process()
            assert listener is not None
            speaker = connection.peer.rpartition("=")[2].removeprefix("tcp:")
            epoch = self._led[speaker]  # a connection ends with the reign that it began in

            def judge(message: object) -> None:
                heard = self._heard.get(listener.name, 0)
                if not isinstance(message, Leading):
                    assert epoch >= heard, (
                        f"I7: {listener} takes a {type(message).__name__} of {speaker}, "
                        f"epoch {epoch}, and has heard of {heard}"
                    )
                hear(message)

            self._heard[listener.name] = max(self._heard.get(listener.name, 0), epoch)
            await listen(connection, judge, **how)

        return listen_and_judge
