"""``trine checkpoint verify``: every byte, and the name of each file that is damaged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from checkpoint_damage import Capture, checkpoint, flip_byte

from trine.pretrain.checkpoints.manifest import read_manifest

pytestmark = pytest.mark.timeout(300)


def test_verify(run: Path, one: Path, capsys: Capture) -> None:
    assert checkpoint("verify", run) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    total = sum(entry.bytes for entry in read_manifest(one).values())
    assert lines[2] == f"step-00000003: every byte is as it was written ({total / 1e6:.1f} MB in 8 files)"
    assert [line.partition(":")[0] for line in lines] == ["step-00000001", "step-00000002", "step-00000003"]
    assert last.startswith("3 checkpoints verified, ")


def test_verify_names_every_damaged_file(run: Path, one: Path, capsys: Capture, tmp_path: Path) -> None:
    flip_byte(one / "__1_0.distcp")
    (one / "random.npz").unlink()
    (one / "notes.txt").touch()
    cut = one.with_name("step-00000001") / ".metadata"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert checkpoint("verify", run, "--workers", "3", "--json", tmp_path / "found.json") == 1
    lines = capsys.readouterr().out.splitlines()
    size = cut.stat().st_size
    assert lines[0] == f"step-00000001: .metadata has {size:,} bytes instead of {size + 1:,}"
    assert lines[1].startswith("step-00000002: every byte")
    assert lines[2:] == [
        "step-00000003: __1_0.distcp differs from what was written",
        "step-00000003: random.npz is missing",
        "step-00000003: notes.txt: warning: the manifest does not name it, so nothing reads it",
        "2 of 3 checkpoints damaged: restore the named files from a copy, or remove the checkpoint, and a run continues "
        "from the one before",
    ]
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["damaged"] == 2
    assert [one["whole"] for one in document["checkpoints"]] == [False, True, False]
    assert document["checkpoints"][2]["problems"][1] == {"file": "random.npz", "what": "is missing"}
    assert document["checkpoints"][2]["not_in_manifest"] == ["notes.txt"]
    assert checkpoint("verify", run, "--newest") == 1
    assert "1 of 1 checkpoint damaged" in capsys.readouterr().out
    assert checkpoint("verify", one.with_name("step-00000002")) == 0


def test_verify_goes_on_after_a_file_that_cannot_be_read(one: Path, capsys: Capture) -> None:
    (one / "tensors.json").unlink()
    (one / "tensors.json").mkdir()
    # A folder of the size that is expected.
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["files"]["tensors.json"]["bytes"] = (one / "tensors.json").stat().st_size
    (one / "manifest.json").write_text(json.dumps(manifest))
    (one / "state.json").unlink()
    assert checkpoint("verify", one) == 1
    state, tensors, _ = capsys.readouterr().out.splitlines()
    assert state == "step-00000003: state.json is missing"
    assert tensors == "step-00000003: tensors.json cannot be read (Is a directory)"


def test_ctrl_c_does_not_wait_for_a_large_file(one: Path) -> None:
    """Two terabytes of nothing, of which a disk that knows holes holds none."""
    name, size = "__9_0.distcp", 2 << 40
    with (one / name).open("wb") as file:
        file.truncate(size)
    manifest = json.loads((one / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": size, "sha256": "0" * 64}
    (one / "manifest.json").write_text(json.dumps(manifest))
    words = [sys.executable, "-m", "trine", "checkpoint", "verify", str(one)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: name in open_files(process.pid))
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "trine: interrupted\n")


def open_files(pid: int) -> list[str]:
    return [Path(file.path).name for file in psutil.Process(pid).open_files()]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)
