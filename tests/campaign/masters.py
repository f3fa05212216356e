"""Masters in a campaign: two over one table, of which one leads, and what must be true of them.

They are killed and stopped like everybody else, and nothing waits for them. At a quiet moment
whoever leads must know exactly what the node has, however many leaders and nodes there were before.
"""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import StoreUnavailable
from pdserve.ids import BlockKey
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Seat
from pdserve.kvstore.masters.protocol import AskMaster, MasterReport
from tests.campaign.actor import Actor
from tests.campaign.board import Number
from tests.campaign.processes import (
    START_S_MAX,
    Child,
    NodeProcess,
    launched,
    stopped_by_itself,
    wake,
)
from tests.campaign.world import World
from tests.integration.store_nodes import ELSEWHERE

KNOWN_S_MAX = 60.0
"""For a leader to be there, and to know everything, when others want the cores."""

EVERYTHING = -1
LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class MasterPlan:
    name: str
    directory: Path  # of the socket and of logs
    metadata: str  # a file, or a URL of Redis
    mutant: str | None = None

    @property
    def socket(self) -> str:
        """Where each of its incarnations listens."""
        return str(self.directory / f"{self.name}.sock")

    def command(self, *, stop_before_renewal: bool = False) -> list[str]:
        is_redis = self.metadata.startswith("redis://")
        return [
            *(sys.executable, "-m", "tests.campaign.master"),
            *(("--mutant", self.mutant) if self.mutant else ()),
            *(("--stop-before-renewal",) if stop_before_renewal else ()),
            *("--directory", str(self.directory), "--master", self.name),
            *("--redis-url" if is_redis else "--metadata", self.metadata),
        ]


@dataclass
class MasterProcess(Child):
    """One incarnation."""

    plan: MasterPlan

    @staticmethod
    def start(plan: MasterPlan, *, stop_before_renewal: bool = False) -> "MasterProcess":
        plan.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = plan.command(stop_before_renewal=stop_before_renewal)
        return MasterProcess(*launched(command, plan.directory, plan.name), plan)


# ── at quiet moments ─────────────────────────────────────────────────────────────────────────────


def audit_masters(masters: Sequence[MasterProcess], node: NodeProcess, world: World) -> str:
    """What whoever leads does not know, or knows wrongly, of the node; "" when nothing."""
    client = MasterClient([each.plan.socket for each in masters], name="auditor")
    until_s = time.monotonic() + KNOWN_S_MAX
    try:
        while problem := _unknown(client, node, world):
            if time.monotonic() > until_s:
                return problem
            time.sleep(LOOK_S)
    finally:
        client.close()
    return ""


def _unknown(client: MasterClient, node: NodeProcess, world: World) -> str:
    try:
        report = client.report()
        if not (report.epoch and report.is_whole):
            return f"no master leads, or it does not know everything: {report}"
        stored = _stored(node)
        member = next((m for m in report.members if m.store_id == node.plan.store_id), None)
        if member is None or member.blocks != len(stored):
            return f"{len(stored)} blocks are stored, the leader knows {member}"
        for chain in world.chains[:: len(world.chains) // 20]:
            present = next((i for i, key in enumerate(chain) if key not in stored), len(chain))
            located = [each.count for each in client.locate(chain)]
            if located != ([present] if present else []):
                return f"{present} blocks of a chain are stored, located are {located}"
    except StoreUnavailable as error:
        return f"no master can be asked: {error}"
    return ""


def _stored(node: NodeProcess) -> set[BlockKey]:
    assert node.address is not None
    client = StoreClient(node.address, host=ELSEWHERE, owner="auditor", verify=False)
    try:
        return set(client.changes(EVERYTHING).added)
    finally:
        client.close()


# ── a leader that was away ───────────────────────────────────────────────────────────────────────


def late_renewal(actor: Actor, folder: Path, mutant: str | None) -> None:
    """A leader is stopped when it is about to renew, another one takes the seat, the first wakes up
    and says what it had to say: the seat's epoch must not fall."""
    table = EmbeddedMetadata(_made(folder) / "table")
    plans = [MasterPlan(name, folder, str(folder / "table"), mutant) for name in ("old", "new")]
    running: list[MasterProcess] = []
    try:
        running.append(MasterProcess.start(plans[0], stop_before_renewal=True))
        old = running[0].process
        if not _until(actor, lambda: stopped_by_itself(old.pid), "the first master does not lead"):
            return
        running.append(MasterProcess.start(plans[1]))
        if not _until(actor, lambda: _leader(table) == "new", "nobody succeeds a stopped leader"):
            return
        taken = _seat(table)
        if taken is None:
            return
        wake(old.pid)

        def has_had_its_say() -> bool:
            seat = _seat(table)
            if seat is not None and seat.epoch < taken.epoch:
                actor.fail("fence", f"after {taken} the seat is {seat}")
            report = _report(plans[0])
            return report is not None and (report.epoch == 0 or report.epoch > taken.epoch)

        if _until(actor, has_had_its_say, "a leader that was replaced does not step down"):
            actor.count(Number.DRILLS)
    finally:
        for each in running:
            wake(each.process.pid)
            each.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _until(actor: Actor, condition: Callable[[], bool], what: str) -> bool:
    """False when the stage ends meanwhile."""
    until_s = time.monotonic() + START_S_MAX
    while not condition():
        if not actor.goes_on():
            return False
        if time.monotonic() > until_s:
            actor.fail("hang", what)
        time.sleep(LOOK_S)
    return True


def _leader(table: EmbeddedMetadata) -> str:
    seat = _seat(table)
    return "" if seat is None or seat.is_vacant else seat.master


def _seat(table: EmbeddedMetadata) -> Seat | None:
    """None when nobody has led yet, or it cannot be asked just now."""
    try:
        return table.seat()
    except StoreUnavailable:
        return None


def _report(plan: MasterPlan) -> MasterReport | None:
    """Of this one master; None when it does not answer just now."""
    client = MasterClient([plan.socket], name="drill")
    try:
        return client.call(AskMaster(), MasterReport)
    except StoreUnavailable:
        return None
    finally:
        client.close()
