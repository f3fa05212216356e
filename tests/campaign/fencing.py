"""Nodes of one id, one after the other, where the first has not heard of its end.

The old one is stopped (when it serves, or when it has its epoch and is not entered yet), its
successor starts and is entered, the old one wakes up and says what it has to say: that it leaves,
or that it is there. Whoever asks afterwards must find the successor. Masters are drilled alike.
"""

import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from pdserve.errors import StoreUnavailable
from pdserve.ids import StoreId
from pdserve.kvstore.masters.metadata import Metadata
from tests.campaign.actor import Actor, metadata_at
from tests.campaign.board import Number
from tests.campaign.masters import late_renewal
from tests.campaign.processes import (
    START_S_MAX,
    NodePlan,
    NodeProcess,
    stopped_by_itself,
    wake,
)

DRILLS = ((0, True), None, (1, True), (0, False), (1, False))
"""Of nodes by whose metadata, and whether the old one announces itself or leaves; None: of masters,
which have a file of their own."""

PAUSE_S = 2.0
"""Between two drills; a start of two processes each."""


class Fencer:
    """One drill after the other, on each metadata in turn."""

    def __init__(
        self, actor: Actor, directory: Path, mutant: str | None, masters_mutant: str | None
    ) -> None:
        self._actor = actor
        self._directory = directory
        self._mutant = mutant
        self._masters = masters_mutant

    def live(self) -> None:
        drill = 0
        # In a store whose masters lack a guard, theirs alone: it is a matter of milliseconds
        # whether one such drill finds it.
        drills = DRILLS if self._masters is None else (None,)
        while self._actor.goes_on():
            try:
                match drills[drill % len(drills)]:
                    case None:
                        self._actor.note(f"drill {drill}, late renewal")
                        late_renewal(self._actor, self._directory / f"seat-{drill}", self._masters)
                    case place, announces:
                        where = self._actor.places[place].drills
                        self._drill(drill, where, metadata_at(where), announces=announces)
            except StoreUnavailable as error:  # Redis was killed meanwhile
                self._actor.note(f"drill {drill} came to nothing: {error}")
            drill += 1
            self._rest()

    def _rest(self) -> None:
        until_s = time.monotonic() + PAUSE_S
        while time.monotonic() < until_s and self._actor.goes_on():
            time.sleep(0.05)

    def _drill(self, drill: int, where: str, metadata: Metadata, *, announces: bool) -> None:
        actor = self._actor
        store_id = StoreId(f"twin-{drill}")
        folder = self._directory / store_id
        running: list[NodeProcess] = []

        def start(name: str, *, stop_before_register: bool = False) -> NodeProcess:
            plan = NodePlan(
                store_id=store_id,
                directory=folder / name,
                shared=folder / name,  # as on two hosts
                metadata=where,
                slot_count=1,
                mutant=self._mutant,
            )
            running.append(NodeProcess.start(plan, stop_before_register=stop_before_register))
            return running[-1]

        actor.note(f"drill {drill}, {'late announcement' if announces else 'late leave'}")
        try:
            old = start("old", stop_before_register=announces)
            if not self._stop(old, by_itself=announces):
                return
            new = start("new")
            if not new.wait_until_it_serves():
                return
            wake(old.process.pid)
            if not announces:
                old.process.terminate()
            self._wait_for_its_say(old)
            self._must_be_member(metadata, store_id, new)
            actor.count(Number.DRILLS)
        finally:
            for each in running:
                wake(each.process.pid)
                each.kill()
            metadata.remove(store_id, 1 << 60)
            shutil.rmtree(folder, ignore_errors=True)

    def _stop(self, old: NodeProcess, *, by_itself: bool) -> bool:
        if not by_itself:
            if not old.wait_until_it_serves():
                return False
            old.process.send_signal(signal.SIGSTOP)
            return True
        until_s = time.monotonic() + START_S_MAX
        while not stopped_by_itself(old.process.pid):
            if old.process.poll() is not None or time.monotonic() > until_s:
                return False
            time.sleep(0.01)
        return True

    def _wait_for_its_say(self, old: NodeProcess) -> None:
        """Until it has announced itself, or has ended."""
        until_s = time.monotonic() + START_S_MAX
        while old.process.poll() is None and not old.serves():
            if time.monotonic() > until_s:
                self._actor.fail("hang", f"the old {old.plan.store_id} neither serves nor ends")
            time.sleep(0.01)

    def _must_be_member(self, metadata: Metadata, store_id: StoreId, new: NodeProcess) -> None:
        entries: Sequence[object] = [
            member.address for member in metadata.members() if member.store_id == store_id
        ]
        if entries != [new.address]:
            self._actor.fail(
                "fence", f"{store_id} is at {new.address}, its predecessor left {entries}"
            )
