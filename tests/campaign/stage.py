"""Who is on stage: starts actors and nodes, kills and stops them, and raises them again.

Actors are forks of this process, which is why it has one thread only; nodes and Redis are started
by their command lines. Every signal is this process's, so it knows whether a node that somebody
found gone had a reason to be.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pdserve.ids import StoreId
from pdserve.kvstore.directory import ARENA_NAME
from pdserve.kvstore.masters.metadata import RedisMetadata
from tests.campaign.actor import Actor, Conduct, Failed, Place
from tests.campaign.arenas import damage_arena
from tests.campaign.board import Board, Number
from tests.campaign.fencing import Fencer
from tests.campaign.masters import MasterPlan, MasterProcess, audit_masters
from tests.campaign.mutants import Mutant
from tests.campaign.processes import NodePlan, NodeProcess, RedisProcess, wake
from tests.campaign.roles import act
from tests.campaign.world import World

STOPPED_S_MAX = 0.8
"""SIGSTOP to SIGCONT; far below the time that a call waits for an answer."""

RESTART_S_MAX = 0.3
"""Between a death and the next incarnation."""

EVENTS_OF_OTHERS = 4

MASTERS_RATIO = 0.08
"""Of all strikes; masters do little that could be interrupted."""

SSD = 1
"""Which of the nodes has a disk."""


@dataclass(frozen=True, slots=True)
class Part:
    """One actor's role, with a number behind it, and how it behaves."""

    name: str
    remote: bool
    verify: bool = True


CAST = (
    Part("reader-0", remote=False, verify=False),
    Part("reader-1", remote=False),
    Part("reader-2", remote=True, verify=False),
    Part("reader-3", remote=True),
    Part("writer-0", remote=False),
    Part("writer-1", remote=True),
    Part("prefill-0", remote=False),
    Part("decode-0", remote=True),
    Part("prefill-1", remote=True),
    Part("decode-1", remote=False),
    Part("scout-0", remote=True),
    Part("locator-0", remote=True),
    Part("fencer-0", remote=True),
)
"""Readers without verification as well: nothing damages a byte here, so what is stored must be
right without a checksum's help; what the checksum finds would be hidden behind a miss."""


@dataclass
class Player:
    """An actor's part, and its process of this moment."""

    index: int
    part: Part
    channel: socket.socket | None
    pid: int = 0  # 0: dead
    incarnation: int = 0
    raise_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str
    who: str
    text: str
    events: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"{self.kind}: {self.who}: {self.text}", *self.events))


class Stage:
    def __init__(
        self,
        seed: int,
        world: World,
        directory: Path,
        shared: Path,
        mutant: Mutant | None,
    ) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.world = world
        self.directory = directory
        self.shared = shared
        self.mutant = mutant
        self.board = Board(len(CAST))
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._pid = os.getpid()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._rest = b""
        self._wake_at_s: dict[int, float] = {}  # stopped processes
        damages_arenas = mutant is not None and mutant.damages_arenas
        self._node_ratio = 0.5 if damages_arenas else 0.1  # of all who are struck
        self.redis = RedisProcess.start(directory / "redis")
        files = [str(directory / f"metadata-{number}") for number in range(2)]
        self._drills = [f"{file}-drills" for file in files]
        places = (files[0], files[1] if self.redis is None else self.redis.table(1))
        if self.redis is not None:
            # Forks have the client's modules then: a dozen that import them at once, on a busy
            # machine, take longer than a call may.
            RedisMetadata(self.redis.url)
            self._drills[1] = self.redis.url
        self._nodes_mutant = mutant.name if mutant is not None and mutant.is_nodes else None
        self.plans = [
            NodePlan(
                store_id=StoreId(f"campaign-{kind}"),
                directory=directory / kind,
                shared=shared,
                metadata=metadata,
                slot_count=world.slot_count,
                ssd=kind == "ssd",
                mutant=self._nodes_mutant,
            )
            for kind, metadata in zip(("plain", "ssd"), places, strict=True)
        ]
        self.nodes = [NodeProcess.start(plan) for plan in self.plans]
        self._masters_mutant = mutant.name if mutant is not None and mutant.is_masters else None
        self.masters = [
            MasterProcess.start(
                MasterPlan(name, directory / "masters", places[SSD], self._masters_mutant)
            )
            for name in ("m0", "m1")
        ]
        for node in self.nodes:
            assert node.wait_until_it_serves(), node.log.read_text()
        self.players = self._cast()
        for player in self.players:
            self._raise(player)

    def _cast(self) -> list[Player]:
        pairs: dict[str, tuple[socket.socket, socket.socket]] = {}
        players = []
        for index, part in enumerate(CAST):
            role, _, number = part.name.partition("-")
            channel = None
            if role in ("prefill", "decode"):
                pair = pairs.setdefault(number, socket.socketpair(type=socket.SOCK_DGRAM))
                channel = pair[role == "decode"]
            players.append(Player(index, part, channel))
        return players

    # ── actors ───────────────────────────────────────────────────────────────────────────────

    def _raise(self, player: Player) -> None:
        player.incarnation += 1
        self.board.begin_incarnation(player.index)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._be(player)
        player.pid = pid

    def _be(self, player: Player) -> None:
        """In the fork: never returns."""
        code = 1
        try:
            keep = {0, 1, 2, self._writing}
            if player.channel is not None:
                keep.add(player.channel.fileno())
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in keep:
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            actor = self._actor(player)
            try:
                if player.part.name.startswith("fencer"):
                    self._fencer(actor).live()
                else:
                    act(actor)
                code = 0
            except Failed:
                pass
            except BaseException:
                with contextlib.suppress(Failed):
                    actor.fail("crash", traceback.format_exc()[-2500:])
        finally:
            os._exit(code)

    def _fencer(self, actor: Actor) -> Fencer:
        return Fencer(actor, self.directory / "twins", self._nodes_mutant, self._masters_mutant)

    def _actor(self, player: Player) -> Actor:
        mutant = self.mutant
        chance = random.Random(f"{self.seed} {player.part.name} {player.incarnation}")
        if mutant is not None:
            mutant.change_client()
        return Actor(
            index=player.index,
            name=player.part.name,
            conduct=Conduct(
                remote=player.part.remote,
                verify=self._verifies(player.part),
                views=mutant is None or mutant.views,
                tolerates_misses=mutant is not None and mutant.tolerates_misses,
                damages_the_dead=mutant is not None and mutant.damages_arenas,
                corrupt=None if mutant is None else mutant.corrupts(player.part.name, chance),
            ),
            world=self.world,
            places=[
                Place(plan.store_id, plan.metadata, drills)
                for plan, drills in zip(self.plans, self._drills, strict=True)
            ],
            masters=[each.plan.socket for each in self.masters],
            board=self.board,
            stage=self._pid,
            failures=self._writing,
            chance=chance,
            channel=player.channel,
        )

    def _verifies(self, part: Part) -> bool:
        if self.mutant is None:
            return part.verify
        return (part.verify or self.mutant.all_verify) and not self.mutant.no_verify

    # ── violence ─────────────────────────────────────────────────────────────────────────────

    def strike(self) -> None:
        """Kill or stop somebody."""
        roll = self.chance.random()
        is_kill = self.chance.random() < 0.65
        if roll < self._node_ratio:
            self._strike_node(self.chance.choice(self.nodes), is_kill=is_kill)
        elif roll < self._node_ratio + 0.05 and self.redis is not None:
            self._strike_redis(self.redis, is_kill=is_kill)
        elif roll > 1 - MASTERS_RATIO:
            self._strike_master(self.chance.choice(self.masters), is_kill=is_kill)
        else:
            alive = [
                player
                for player in self.players
                if player.pid and not player.part.name.startswith("fencer")
            ]
            if alive:
                self._strike_player(self.chance.choice(alive), is_kill=is_kill)

    def _strike_node(self, node: NodeProcess, *, is_kill: bool) -> None:
        if node.address is None:
            return  # not up yet: it is hard enough
        role = f"node ({'SSD' if node.plan.ssd else 'plain'})"
        if not is_kill:
            self._stop(node.process.pid, role)
            return
        self._wake_at_s.pop(node.process.pid, None)
        node.kill()
        self._look_for_complaints(node)
        self.kills[role] += 1
        if self.mutant is not None and self.mutant.damages_arenas:
            damage_arena(node.plan, self.chance)
        self.nodes[self.nodes.index(node)] = NodeProcess.start(node.plan)

    def _strike_redis(self, redis: RedisProcess, *, is_kill: bool) -> None:
        if is_kill:
            self._wake_at_s.pop(redis.process.pid, None)
            redis.restart()
            self.kills["redis"] += 1
        else:
            self._stop(redis.process.pid, "redis")

    def _strike_master(self, master: MasterProcess, *, is_kill: bool) -> None:
        if is_kill:
            self._wake_at_s.pop(master.process.pid, None)
            master.kill()
            self._look_for_complaints(master)
            self.kills["master"] += 1
            self.masters[self.masters.index(master)] = MasterProcess.start(master.plan)
        elif self.redis is not None:  # a file might stay locked, and nodes could not enter it
            self._stop(master.process.pid, "master")

    def _strike_player(self, player: Player, *, is_kill: bool) -> None:
        role = player.part.name.partition("-")[0]
        if not is_kill:
            self._stop(player.pid, role)
            return
        self._wake_at_s.pop(player.pid, None)
        os.kill(player.pid, signal.SIGKILL)
        os.waitpid(player.pid, 0)
        player.pid = 0
        player.raise_at_s = time.monotonic() + self.chance.uniform(0, RESTART_S_MAX)
        self.kills[role] += 1

    def _stop(self, pid: int, role: str) -> None:
        if pid in self._wake_at_s:
            return
        os.kill(pid, signal.SIGSTOP)
        self._wake_at_s[pid] = time.monotonic() + self.chance.uniform(0.02, STOPPED_S_MAX)
        self.stops[role] += 1

    # ── watching ─────────────────────────────────────────────────────────────────────────────

    def look_around(self, *, raise_the_dead: bool = True) -> None:
        """Wake who slept long enough, raise who is dead, and hear who complains."""
        now_s = time.monotonic()
        for pid, at_s in list(self._wake_at_s.items()):
            if now_s >= at_s:
                del self._wake_at_s[pid]
                wake(pid)
        for node in self.nodes:
            serves, code = node.serves(), node.process.poll()
            if code is not None and serves:
                self.fail("exit", node.plan.store_id, f"ended by itself with {code}")
            elif code is not None:
                self._restart_node(node)
        for master in self.masters:
            if (code := master.process.poll()) is not None and not self.failures:
                text = f"ended by itself with {code}: {master.log.read_text()[-1000:]}"
                self.fail("exit", master.plan.name, text)
        for player in self.players:
            self._look_at(player)
            if raise_the_dead and player.pid == 0 and now_s >= player.raise_at_s:
                self._raise(player)
        self._hear()

    def _restart_node(self, node: NodeProcess) -> None:
        """It ended before it served: allowed while Redis is away, where it must enter itself."""
        if not node.plan.metadata.startswith("redis"):
            self.fail("exit", node.plan.store_id, node.log.read_text()[-2000:])
        node.kill()
        self.nodes[self.nodes.index(node)] = NodeProcess.start(node.plan)

    def _look_at(self, player: Player) -> None:
        if player.pid == 0:
            return
        if os.waitpid(player.pid, os.WNOHANG)[0]:
            player.pid = 0
            player.raise_at_s = time.monotonic() + RESTART_S_MAX
            self._hear()
            if self.board.phase != Board.END and not self.failures:
                self.fail("exit", player.part.name, "ended by itself", player.index)
            return
        overdue_ms = self.board.overdue_ms(player.index)
        if overdue_ms > 0 and player.pid not in self._wake_at_s:
            text = f"a call is {overdue_ms} ms beyond its limit"
            self.fail("hang", player.part.name, text, player.index)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reading, 65536):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            message = json.loads(line)
            player = self.players[message["actor"]]
            if "gone" not in message:
                self.fail(message["kind"], player.part.name, message["text"], player.index)
            elif any(node.address and node.address.tcp == message["gone"] for node in self.nodes):
                text = f"{message['gone']} is alive, and hung up: {message['text']}"
                if self.mutant is None or not self.mutant.tolerates_hang_ups:
                    self.fail("hang-up", player.part.name, text, player.index)

    def _look_for_complaints(self, child: NodeProcess | MasterProcess) -> None:
        plan, complaints = child.plan, child.complaints()
        if complaints:
            name = plan.store_id if isinstance(plan, NodePlan) else plan.name
            self.fail("node error", name, complaints)

    def fail(self, kind: str, who: str, text: str, actor: int | None = None) -> None:
        """With the last events of whom it happened to, and fewer of everybody else's."""
        events = () if actor is None else tuple(self.board.events(actor))
        others = tuple(
            f"{player.part.name}: {event}"
            for player in self.players
            if player.index != actor
            for event in self.board.events(player.index)[-EVENTS_OF_OTHERS:]
        )
        self.failures.append(Failure(kind, who, text, (*events, *others)))

    # ── quiet, and the end ───────────────────────────────────────────────────────────────────

    def quieten(self, within_s: float) -> bool:
        """Everybody alive and awake, holding nothing; False, and a failure, when somebody does."""
        self.board.phase = Board.QUIET
        until_s = time.monotonic() + within_s
        while not self._is_quiet():
            self._wake_at_s = dict.fromkeys(self._wake_at_s, 0.0)
            self.look_around(raise_the_dead=False)
            if self.failures:
                return False
            if time.monotonic() > until_s:
                for player in self._loud():
                    self.fail("hang", player.part.name, "does not become quiet", player.index)
                return False
            time.sleep(0.01)
        return True

    def _loud(self) -> list[Player]:
        return [
            player
            for player in self.players
            if player.pid
            and not player.part.name.startswith("fencer")
            and not self.board.get(player.index, Number.QUIET)
        ]

    def _is_quiet(self) -> bool:
        return not self._loud() and not self._wake_at_s and all(n.serves() for n in self.nodes)

    def who_maps(self, node: NodeProcess) -> str:
        """The actors that have its arena mapped, which nobody may at a quiet moment; "" if none."""
        arena = f"/{node.plan.store_id}/{ARENA_NAME}"
        names = []
        for player in self.players:
            with contextlib.suppress(OSError):
                if player.pid and arena in Path(f"/proc/{player.pid}/maps").read_text():
                    names.append(player.part.name)
        return f"; its arena is mapped by {', '.join(names)}" if names else ""

    def audit_masters(self) -> str:
        """Not with the faults of others, which the masters only repeat."""
        if self.mutant is not None and not self.mutant.is_masters:
            return ""
        return audit_masters(self.masters, self.nodes[SSD], self.world)

    def go_on(self) -> None:
        self.board.phase = Board.RUN

    def end(self, within_s: float) -> None:
        """Actors end by themselves, nodes in order; whoever does not is killed, and has failed."""
        self.board.phase = Board.END
        until_s = time.monotonic() + within_s
        while any(player.pid for player in self.players) and time.monotonic() < until_s:
            self._wake_at_s = dict.fromkeys(self._wake_at_s, 0.0)
            self.look_around(raise_the_dead=False)
            time.sleep(0.01)
        for player in self.players:
            if player.pid:
                if not self.failures:
                    self.fail("hang", player.part.name, "does not end", player.index)
                os.kill(player.pid, signal.SIGKILL)
                os.waitpid(player.pid, 0)
                player.pid = 0
        self._hear()
        for node in self.nodes:
            wake(node.process.pid)
            if node.process.poll() is None and (code := node.stop()) != 0 and not self.failures:
                self.fail("exit", node.plan.store_id, f"ended with {code}")
            self._look_for_complaints(node)
        for master in self.masters:
            wake(master.process.pid)
            if master.process.poll() is None and (code := master.stop()) and not self.failures:
                self.fail("exit", master.plan.name, f"ended with {code}")
            self._look_for_complaints(master)
        self._end_redis()

    def _end_redis(self) -> None:
        if self.redis is not None:
            self.redis.kill()

    def close(self) -> None:
        """Whatever happened: nothing of this stage goes on."""
        for player in self.players:
            if player.channel is not None:
                player.channel.close()
            if player.pid:
                os.kill(player.pid, signal.SIGKILL)
                os.waitpid(player.pid, 0)
        for child in (*self.nodes, *self.masters):
            child.kill()
        self._end_redis()
        os.close(self._reading)
        os.close(self._writing)
