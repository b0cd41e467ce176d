"""Checkpoints of a run, damaged on purpose, and ``trine checkpoint`` on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trine.launch.cli import main
from trine.pretrain.checkpoints.manifest import describe

Capture = pytest.CaptureFixture[str]


def checkpoint(*words: str | Path) -> int:
    """The exit code of a command."""
    return main(["checkpoint", *map(str, words)])


def refused(capsys: Capture, code: int, *words: str | Path) -> str:
    """The one sentence in which a command ends with ``code``."""
    assert checkpoint(*words) == code
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("trine: ")
    return line.removeprefix("trine: ")


def names(run: Path) -> list[str]:
    """What is in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_byte(path: Path) -> None:
    """Change one bit of a file, in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def put(path: Path, content: str) -> None:
    """Change a file and have the manifest agree."""
    path.write_text(content)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = describe(path)._asdict()
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
