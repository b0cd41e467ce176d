"""A Slurm cluster, and runs on it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster
from slurm_runs import CONFIG, LIFE_S, STEPS, Run
from small_folder import write_folder


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that every node sees, and every user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="trine-slurm-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def networked(shared: Path) -> Iterator[Cluster]:
    """Three nodes with addresses of their own."""
    cluster = Cluster(shared / "networked")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(networked: Cluster) -> Iterator[Cluster]:
    """The same, all nodes idle before and after."""
    yield networked
    networked.run("scancel", "--user=root", check=False)
    networked.wait_until(lambda: set(networked.idle_nodes()) == set(networked.nodes), 120, "not all nodes are idle again")


@pytest.fixture(scope="session")
def recipe(shared: Path) -> Path:
    """The tiny run as a YAML file, and its data."""
    data, path = shared / "data", shared / "tiny.yaml"
    lengths = {"train": [[90, 200, 33, 400] for _ in range(8)], "validation": [[200]]}
    write_folder(data, lengths, shard_tokens=1000, member_tokens=300)
    config = CONFIG | {"data": {"directory": str(data), "record_samples": True}, "run": {"directory": "unset"}}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def new_run(cluster: Cluster, recipe: Path, shared: Path) -> Callable[[str], Run]:
    """Make a run with a directory of this name."""
    return lambda name: Run(cluster, recipe, shared / "runs" / name)


@pytest.fixture(scope="session")
def whole(networked: Cluster, recipe: Path, shared: Path) -> Run:
    """The run in one process, never interrupted, and without Slurm."""
    run = Run(networked, recipe, shared / "runs" / "whole")
    command = [sys.executable, "-m", "trine", "pretrain", str(recipe), f"run.directory={run.directory}", "--nproc", "1"]
    subprocess.run(command, check=True, timeout=LIFE_S, env=networked.environment(), capture_output=True)
    assert len(run.metrics()) == STEPS
    return run


@pytest.fixture
def standin(tmp_path: Path) -> Callable[[str], str]:
    """Make a program that does this in bash in place of Python; RUN, RANK and LIFE are known to it."""

    def make(body: str) -> str:
        path = tmp_path / "python"
        names = "RUN=$STANDIN_RUN RANK=$SLURM_PROCID LIFE=$((${SLURM_RESTART_COUNT:-0} + 1))"
        path.write_text(f"#!/bin/bash\n{names}\n{_STANDIN}\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


_STANDIN = r"""
leave() { # OUTCOME RESUME CODE
  [[ $RANK == 0 ]] && printf '{\n "outcome": "%s",\n "resume": %s,\n "reason": "so",\n "step": 7\n}\n' "$1" "$2" >"$RUN/exit_state.json"
  exit "$3"
}
"""
