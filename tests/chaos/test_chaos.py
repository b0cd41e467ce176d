"""A run among faults, by the script that people run by hand: it must end as the same run without any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

SCRIPT = Path(__file__).with_name("chaos.py")
FAULTS = 26


@pytest.mark.parametrize("layout", ["data 2", "pipeline 2"])
def test_faults_change_nothing(layout: str, tmp_path: Path) -> None:
    report = tmp_path / "chaos.json"
    options = ["--seed", "7", "--faults", str(FAULTS), "--layout", layout, "--report", str(report)]
    # Its table is for whoever runs pytest with -s, or finds a failure.
    done = subprocess.run([sys.executable, str(SCRIPT), *options, "--keep", str(tmp_path / "kept")], check=False)
    assert report.exists(), f"the script ended with {done.returncode} before it had a report"
    found = json.loads(report.read_text())
    assert found["problems"] == []
    assert done.returncode == 0
    totals = found["totals"]
    assert totals["faults"] >= FAULTS
    assert totals["same_samples"]
    assert totals["loss"] == totals["loss_fault_free"]
