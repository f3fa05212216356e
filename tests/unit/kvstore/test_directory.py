"""The folder of a node: made, removed, and cleaned up after the dead."""

import os
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.ids import StoreId
from pdserve.kvstore.directory import remove_dead, root_of, take_directory


def test_a_node_that_ends_leaves_nothing(tmp_path: Path) -> None:
    one = take_directory(tmp_path, StoreId("one"))
    two = take_directory(tmp_path, StoreId("two"))
    assert one.path.stat().st_mode & 0o777 == 0o700
    one.remove()
    assert two.path.exists()
    two.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_folders_of_the_dead_are_removed_with_their_sockets(tmp_path: Path) -> None:
    socket_path = tmp_path / "dead.sock"
    socket_path.touch()
    dead = take_directory(tmp_path, StoreId("dead"))
    (dead.path / "arena").write_bytes(b"x")
    dead.note_socket(str(socket_path))
    os.close(dead._lock)  # what the kernel does when a process dies
    half_made = root_of(tmp_path) / "half-made"
    half_made.mkdir()
    alive = take_directory(tmp_path, StoreId("alive"))
    assert alive.dead == ("dead",)
    assert not socket_path.exists()
    assert list(root_of(tmp_path).iterdir()) == [alive.path]
    alive.remove()


def test_the_living_keep_their_folders_and_ids(tmp_path: Path) -> None:
    one = take_directory(tmp_path, StoreId("one"))
    with pytest.raises(ConfigError, match="give this one another id"):
        take_directory(tmp_path, StoreId("one"))
    assert one.path.exists()
    one.remove()


def test_a_place_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    root_of(tmp_path).mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 755; it must be this user's"):
        take_directory(tmp_path, StoreId("one"))


def test_the_next_of_the_same_id_finds_what_the_dead_one_left(tmp_path: Path) -> None:
    socket_path = tmp_path / "dead.sock"
    socket_path.touch()
    dead = take_directory(tmp_path, StoreId("one"))
    (dead.path / "arena").write_bytes(b"x")
    dead.note_socket(str(socket_path))
    os.close(dead._lock)
    again = take_directory(tmp_path, StoreId("one"))
    assert (again.path / "arena").read_bytes() == b"x"
    assert again.dead == ()
    assert not socket_path.exists()
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_dead_node_left_is_removed_for_it(tmp_path: Path) -> None:
    alive, dead = take_directory(tmp_path, StoreId("a")), take_directory(tmp_path, StoreId("b"))
    os.close(dead._lock)
    for each in ("a", "b", "c"):
        remove_dead(tmp_path, StoreId(each))
    assert list(root_of(tmp_path).iterdir()) == [alive.path]
    alive.remove()
    remove_dead(tmp_path, StoreId("a"))
    assert list(tmp_path.iterdir()) == []
