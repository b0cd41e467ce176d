"""Cases for a GPU, or for a package, are left out where there is none, and fail where they are asked for all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASE = (
    "import pytest\n@pytest.mark.gpu\ndef test_gpu(): pass\ndef test_cpu(): pass\n"
    "@pytest.mark.apex\ndef test_apex(): pass\n"
)


@pytest.mark.parametrize(
    ("words", "code", "sentences"),
    [
        ([], 0, ["1 passed, 2 deselected"]),
        (["-m", "gpu"], 1, ["2 deselected, 1 error", "needs a CUDA device, and torch finds none; run without -m gpu"]),
        (["-m", "not gpu"], 0, ["1 passed, 2 deselected"]),
        (["-m", "apex"], 1, ["2 deselected, 1 error", "needs the module amp_C, which is not installed; run without -m apex"]),
    ],
)
def test_without_a_gpu_and_apex(
    repository: Path, tmp_path: Path, words: list[str], code: int, sentences: list[str]
) -> None:
    (tmp_path / "test_case.py").write_text(CASE)
    options = ["-c", str(repository / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), *options, "-p", "conftest_of_trine", *words],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_as_plugin(repository, tmp_path))},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == code, result.stdout
    assert all(sentence in result.stdout for sentence in sentences), result.stdout


def _as_plugin(repository: Path, folder: Path) -> Path:
    """A folder from which pytest loads the conftest of all tests as a plugin, outside their folder; apex is hidden."""
    plugins = folder / "plugins"
    plugins.mkdir()
    text = (repository / "tests" / "conftest.py").read_text()
    (plugins / "conftest_of_trine.py").write_text(f"{text}\nimport sys\nsys.modules['amp_C'] = None\n")
    return plugins
