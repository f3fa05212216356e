import json
import os
from pathlib import Path

from pdserve.cluster.support.logs import FILES_MAX, clean, tail, tails, why_lines

WHY = {"call": "c1", "choice": 0, "tenant": "t", "prompt_tokens": 3, "decisions": [{"level": 1}]}


def test_a_tail_begins_with_a_line(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    file.write_text("".join(f"line {number}\n" for number in range(100)))
    assert tail(file, 20) == "line 98\nline 99\n"
    assert tail(file, 1 << 20).startswith("line 0\n")


def test_the_latest_logs_come_first_and_no_link_is_followed(tmp_path: Path) -> None:
    logs, secret = tmp_path / "logs", tmp_path / "secret.log"
    (logs / "serve").mkdir(parents=True)
    secret.write_text("hunter2\n")
    for age, name in enumerate(["new.log", "serve/old.err", "core.bin"]):
        file = logs / name
        file.write_text(f"{name}\n")
        os.utime(file, (1000 - age, 1000 - age))
    (logs / "link.log").symlink_to(secret)
    (logs / "away").symlink_to(tmp_path)
    assert list(tails([logs])) == [
        ("logs/logs/new.log", "new.log\n"),
        ("logs/logs/serve/old.err", "serve/old.err\n"),
    ]


def test_there_is_a_bound_on_files(tmp_path: Path) -> None:
    for number in range(FILES_MAX + 5):
        (tmp_path / f"{number}.log").write_text("x\n")
    assert len(list(tails([tmp_path]))) == FILES_MAX


def test_the_why_of_requests_is_found_in_a_log() -> None:
    log = f'INFO 12:00 pdserve.why: {json.dumps(WHY)}\nother\nINFO {{"call": broken\n'
    assert [json.loads(line) for line in why_lines(log)] == [WHY]


def test_a_line_that_nobody_can_read_is_cut() -> None:
    assert len(clean("x" * 100_000 + "\nshort\n").splitlines()[0]) < 5000
    assert clean("short\n") == "short\n"
