"""Journals: a resumed run continues the lines of the steps that its checkpoint covers, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trine.pretrain.journal import Journal, forget_after


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "metrics.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, last_step: int, *steps: int) -> None:
    journal = Journal(path, last_step)
    for step in steps:
        journal.write({"step": step, "run": last_step})
    journal.close()


def test_a_run_writes_a_line_for_each_record(path: Path) -> None:
    journal = Journal(path, 0)
    journal.write({"step": 1, "loss": 2.5, "name": "\u00fcber\u2028\n"})
    # On disk before it is closed: a run that is killed loses no line.
    assert lines(path) == [{"step": 1, "loss": 2.5, "name": "\u00fcber\u2028\n"}]
    journal.write({"step": 2})
    journal.flush()
    assert [line["step"] for line in lines(path)] == [1, 2]
    journal.close()
    assert path.read_bytes().endswith(b"\n")


def test_a_resumed_run_continues_after_its_checkpoint(path: Path) -> None:
    write(path, 0, 1, 2, 2, 3, 4)
    write(path, 2, 3, 4)
    assert [(line["step"], line["run"]) for line in lines(path)] == [(1, 0), (2, 0), (2, 0), (3, 2), (4, 2)]
    write(path, 9, 10)
    assert [line["step"] for line in lines(path)] == [1, 2, 2, 3, 4, 10]


def test_a_run_from_the_start_forgets_all(path: Path) -> None:
    write(path, 0, 0, 1, 2)
    write(path, 0, 0, 1)
    assert [line["step"] for line in lines(path)] == [0, 1]


@pytest.mark.parametrize(
    "cut",
    ["", '{"step": 2, "lo', '{"step"', "{}", "2", "null", "[2]", '{"step": null}', '{"step": "x"}', "\x00\x00", "\n\n"],
)
def test_a_line_that_a_kill_cut_short_is_dropped(path: Path, cut: str) -> None:
    write(path, 0, 1, 2)
    with path.open("a") as file:
        file.write(cut)
    write(path, 5, 6)
    assert [line["step"] for line in lines(path)] == [1, 2, 6]


def test_bytes_that_are_no_text_are_dropped_with_their_line(path: Path) -> None:
    write(path, 0, 1, 2)
    with path.open("ab") as file:
        file.write(b'{"step": 2\xff\xfe\n')
    write(path, 5, 6)
    assert [line["step"] for line in lines(path)] == [1, 2, 6]


def test_a_whole_line_without_its_end_is_kept(path: Path) -> None:
    write(path, 0, 1, 2)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(path, 2, 3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_forgetting_leaves_other_files_and_no_traces(path: Path) -> None:
    forget_after(path, 3)
    assert not path.exists()
    write(path, 0, 1, 2)
    other = path.with_name("other.jsonl")
    write(other, 0, 1, 2)
    forget_after(path, 1)
    assert [line["step"] for line in lines(path)] == [1]
    assert [line["step"] for line in lines(other)] == [1, 2]
    assert sorted(file.name for file in path.parent.iterdir()) == ["metrics.jsonl", "other.jsonl"]
