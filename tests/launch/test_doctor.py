"""What the doctor finds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from trine.launch import doctor
from trine.launch.cli import main

EXPECTED = {
    "Python", "torch", "megatron-core", "gloo", "NCCL", "Transformer Engine", "apex", "DeepSpeed", "mpi4py",
    "mpirun", "Triton", "flash-linear-attention", "psutil", "tqdm", "tensorboard", "pyarrow", "s3fs", "Slurm", "cores", "memory",
}  # fmt: skip


def apex() -> doctor.Finding:
    importlib.invalidate_caches()
    return next(finding for finding in doctor.report() if finding.feature == "apex")


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(EXPECTED)
    assert all(any(line.startswith(f"{feature} ") for line in lines) for feature in EXPECTED)


def test_a_version_out_of_range_keeps_everything_from_working(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TORCH", "<2")
    assert main(["doctor"]) == 1
    assert "pip install 'torch<2'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "says"), [("scaffolds", "uninstall it"), ("normalization", "without its extensions")]
)
def test_an_apex_without_extensions_is_told_apart_unimported(
    folder: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = apex()
    assert found.status == "no"
    assert says in found.detail


def test_apex_with_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "amp_C.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert apex().status == "yes"
