"""A real store node is run: pins, evictions, draining, report, audit, and the commands for them."""

import json
import os
import time
from pathlib import Path

import pytest

from pdserve.cluster.commands.kv import audit, drain, show_stat
from pdserve.cluster.commands.kv import evict as evict_command
from pdserve.cluster.commands.replay import Wish, play
from pdserve.errors import CapacityError, ConfigError
from pdserve.ids import RequestId
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.arena import open_arena
from pdserve.kvstore.headers import HEADER_BYTES
from pdserve.wire.hosts import local_host_id
from tests.integration.store_nodes import (
    PATIENCE_S,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
    wait_for,
)

SHARES = ("--shares", json.dumps({"*": 1}))


def admin_of(node: Node) -> StoreAdmin:
    return StoreAdmin(node.address, host=local_host_id())


def test_pins_keep_blocks_and_end_with_their_time(tmp_path: Path) -> None:
    with running_node(tmp_path, slot_count=8) as node:
        client, admin = node.client("w"), admin_of(node)
        client.put(keys_of("system", 2), 0, filler("system"))
        assert admin.pin(keys_of("system", 4), hard=True, lifetime_ms=200) == 2
        client.put(keys_of("more", 2), 0, filler("more"))
        with pytest.raises(CapacityError, match="hard_pin_ratio"):
            admin.pin(keys_of("more", 2), hard=True)
        client.put(keys_of("flood", 8), 0, filler("flood"))
        assert read(client, keys_of("system", 2)) == [content("system", i) for i in range(2)]
        wait_for(client, lambda stat: stat.slots_pinned == 0)  # nobody asked it to look
        client.put(keys_of("flood again", 8), 0, filler("flood again"))
        assert read(client, keys_of("system", 2)) == []


def test_a_node_reports_what_it_did_and_for_whom(tmp_path: Path) -> None:
    with running_node(tmp_path, *SHARES, slot_count=8) as node:
        client, admin = node.client("w"), admin_of(node)
        client.put(keys_of("a", 3), 0, filler("a"), tenant="alice")
        client.put(keys_of("b", 8), 0, filler("b"), tenant="bob")
        read(client, keys_of("a", 3))
        read(node.client("r", remote=True), keys_of("never", 2))  # who cannot look by itself
        client.open_ticket(RequestId("r"), 0, reader="*", block_count=1, wait_ms=0, tenant="carol")
        report = admin.report()
        uses = {use.tenant: use.slots for use in report.tenants}
        assert uses == {"alice": 3, "bob": 4, "carol": 1}
        assert report.counters["blocks_asked"] == 5
        assert report.counters["blocks_found_memory"] == 3
        assert ("claim", "memory") in {(times.phase, times.tier) for times in report.phases}


def test_what_clients_measured_reaches_their_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.kvstore.client.NOTE_NS", 0)
    with running_node(tmp_path) as node:
        for remote in (False, True):
            client = node.client("w", remote=remote)
            client.put(keys_of("a", 2 + remote), 0, filler("a"))
            read(client, keys_of("a", 3))
        counts = {(t.phase, t.tier): t.count for t in admin_of(node).report().phases}
        assert counts["copy", "memory"] == 2  # the checksum is computed as the bytes are copied
        assert counts["network", "remote"] == 3
        assert counts["put", "memory"] == counts["put", "remote"] == 1


def test_an_audit_finds_a_flipped_bit_and_a_wrong_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_node(tmp_path) as node:
        client = node.client("w")
        client.put(keys_of("a", 4), 0, filler("a"))
        where = [node.address.unix_path]
        assert audit("", where, blocks_max=None, as_json=False) == 0
        assert "16 slots, 4 checksums: all as it should be" in capsys.readouterr().out
        (path,) = (tmp_path / "shared").glob("*/*/arena")
        arena = open_arena(path, client.store_id, writable=True)
        slots = [client.claim(keys_of("a", 4)).grant.slots[index] for index in (1, 2)]
        arena.payload(slots[0])[9] ^= 1
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), b"\x07", os.sysconf("SC_PAGESIZE") + slots[1] * HEADER_BYTES)
        report = admin_of(node).audit()
        assert [finding.split(":")[0] for finding in report.findings] == [
            f"slot {slots[0]}",
            f"the header of slot {slots[1]} says (7, <SlotState.COMMITTED",
        ]
        assert admin_of(node).audit(0).verified == 0
        assert audit("", where, blocks_max=None, as_json=True) == 1
        assert len(json.loads(capsys.readouterr().out)[0]["findings"]) == 2


def test_an_audit_beside_claims_writes_and_tickets_is_clean(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        client, reader = node.client("w"), node.client("d")
        client.put(keys_of("a", 3), 0, filler("a"))
        client.claim(keys_of("a", 2))
        ticket = client.open_ticket(RequestId("r"), 0, reader="d", block_count=3, wait_ms=0)
        client.push(ticket, keys_of("b", 2), 0, filler("b"))
        assert admin_of(node).audit().findings == ()
        reader.close()


def test_eviction_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running_node(tmp_path, *SHARES) as node:
        client, admin = node.client("w"), admin_of(node)
        client.put(keys_of("a", 4), 0, filler("a"), tenant="alice")
        client.put(keys_of("b", 4), 0, filler("b"), tenant="bob")
        claim = client.claim(keys_of("a", 2))
        where = [node.address.unix_path]
        assert admin.evict_prompt(keys_of("b", 2)) == 4
        with pytest.raises(ConfigError, match="--all, or --tenant"):
            evict_command("", where, tenant=None, prompt=None, everything=False, pinned=False)
        evict_command("", where, tenant="alice", prompt=None, everything=False, pinned=False)
        assert "evicted 2 blocks" in capsys.readouterr().out
        client.release(claim)
        admin.pin(keys_of("a", 1), hard=True)
        assert admin.evict_all() == 1
        assert admin.evict_all(pinned=True) == 1
        show_stat("", where, as_json=True)
        (stat,) = json.loads(capsys.readouterr().out)
        assert stat["stat"]["slots_free"] == 16
        show_stat("", where, as_json=False)
        assert "16 of 4,128 B" in capsys.readouterr().out


def test_a_draining_node_finishes_what_is_under_way_and_takes_nothing_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_node(tmp_path) as node:
        client, reader = node.client("w"), node.client("d")
        client.put(keys_of("a", 3), 0, filler("a"))
        ticket = client.open_ticket(RequestId("r"), 0, reader="d", block_count=3, wait_ms=0)
        where = [node.address.unix_path]
        host = local_host_id()
        assert drain("", where, host, timeout_s=0, undo=False) == 1
        assert "1 tickets" in capsys.readouterr().out
        with pytest.raises(CapacityError, match="draining"):
            client.put(keys_of("b", 1), 0, filler("b"))
        with pytest.raises(CapacityError, match="draining"):
            client.open_ticket(RequestId("s"), 0, reader="d", block_count=1, wait_ms=0)
        assert client.claim(keys_of("a", 3)).count == 0
        client.push(ticket, keys_of("t", 3), 0, filler("t"))
        client.seal(ticket)
        claim = reader.adopt(ticket)
        assert claim.count == 3
        reader.release(claim)
        assert drain("", where, host, timeout_s=PATIENCE_S, undo=False) == 0
        assert drain("", where, host, timeout_s=0, undo=True) == 0
        assert client.put(keys_of("b", 1), 0, filler("b")) == 1
        with pytest.raises(ConfigError, match="no store 'nowhere'"):
            drain("", where, "nowhere", timeout_s=0, undo=False)


def test_a_prefetched_prefix_is_claimed_without_a_look_at_the_disk(tmp_path: Path) -> None:
    """Goal: what came up while a prompt waited is in memory when it is asked for."""
    disk = ("--ssd-directory", str(tmp_path / "ssd"), "--ssd-bytes", str(512 << 20))
    keys = keys_of("talk", 6)
    with running_node(tmp_path, *disk, slot_count=8) as node:
        client, admin = node.client("w"), admin_of(node)
        client.put(keys, 0, filler("talk"))
        read(client, keys)  # its second touch: it goes down
        wait_for(client, lambda stat: stat.ssd["written"] == 6)
        client.put(keys_of("others", 8), 0, filler("others"))
        assert admin.report().counters["blocks_prefetched"] == 0
        admin.prefetch(keys)
        until_s = time.monotonic() + PATIENCE_S
        while admin.report().counters["blocks_prefetched"] < 6:
            assert time.monotonic() < until_s
        assert client.stat().ssd["read"] == 6
        assert read(client, keys) == [content("talk", index) for index in range(6)]
        report = admin.report()
        assert report.stat.ssd["read"] == 6  # no more than before
        assert report.counters["blocks_found_disk"] == 0


def test_a_replay_delivers_the_hits_of_the_simulation(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    turns = [
        [turn % 5, *range(100 + turn % 5 * 10, 101 + turn % 5 * 10 + turn // 5)]
        for turn in range(40)
    ]
    lines = [json.dumps({"timestamp": 5 * i, "hash_ids": ids}) for i, ids in enumerate(turns)]
    trace.write_text("\n".join(lines))
    played = play(trace, Wish(slots=16, block_bytes=1024, speed=20.0))
    assert played.hits == played.hits_simulated
    assert played.wrong == 0
    assert 0 < played.hits < played.blocks_asked
    assert played.holds
    trace.write_text('{"timestamp": 0}')
    with pytest.raises(ConfigError, match="line 1 of"):
        play(trace, Wish())
