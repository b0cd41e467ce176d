"""Runs that are submitted to a Slurm cluster with ``trine launch slurm``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster

from trine.pretrain.checkpoints import folder
from trine.pretrain.checkpoints.manifest import verify

STEPS = 40
LIFE_S = 240.0
"""Within which one life of a tiny run ends, however busy the machine."""

CONFIG: dict[str, Any] = {
    "model": {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "stack": [
            {"mixer": "gated_retention", "layers": 1, "heads": 2},
            {"shared_kv": {"kv_heads": 2, "head_dim": 16}},
            {"mixer": "cross_attention", "layers": 2, "heads": 2},
        ],
    },
    "train": {"steps": STEPS, "global_batch_size": 8, "sequence_length": 32},
    # The optimizer's eps is parity's, with which rounding is not magnified.
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "eps": 1e-5},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 5, "keep": 20},
}
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
SIZE = ("--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node")


@dataclass(frozen=True)
class Run:
    """One run directory, and how it is submitted."""

    cluster: Cluster
    recipe: Path
    directory: Path

    def launch(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """``trine launch slurm`` for this run, on a machine of the cluster."""
        command = [sys.executable, "-m", "trine", "launch", "slurm", str(self.recipe)]
        done = self.cluster.run(*command, f"run.directory={self.directory}", *words, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done

    def submit(self, *words: str) -> list[str]:
        """Submit it; the numbers of the jobs."""
        told = self.launch(*words, "--submit").stdout.splitlines()[0]
        return told.removeprefix("submitted ").partition(":")[0].split(", ")

    def metrics(self) -> list[dict[str, Any]]:
        """What the run has recorded of its steps."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for line in lines if line.endswith("}") and "loss" in (record := json.loads(line))]

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps are done."""
        steps = lambda: [m["step"] for m in self.metrics()]  # noqa: E731
        self.cluster.wait_until(lambda: step <= max(steps(), default=0), LIFE_S, f"{self.directory}: step {step} is not done")

    def log(self) -> str:
        """What script and ranks printed."""
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted((self.directory / "slurm").glob("*.log")))

    def samples(self) -> dict[int, list[str]]:
        """The samples of each step, over all data ranks."""
        found: dict[int, list[str]] = {}
        for path in sorted((self.directory / "samples").glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                found.setdefault(record["step"], []).extend(record["samples"])
        return found

    def state(self) -> dict[str, Any]:
        """How the last life ended, as it says itself."""
        state: dict[str, Any] = json.loads((self.directory / "exit_state.json").read_text())
        return state

    def assert_same_as(self, whole: Run, steps: int = STEPS) -> None:
        """Fail unless this run is finished and did, step by step, what that one did in one life of one process."""
        assert self.state()["outcome"] == "finished", self.log()
        mine, theirs = self.metrics(), whole.metrics()[:steps]
        assert [m["step"] for m in mine] == list(range(1, steps + 1))
        assert [m["loss"] for m in mine] == pytest.approx([m["loss"] for m in theirs], rel=1e-4)
        assert [m["consumed_samples"] for m in mine] == [m["consumed_samples"] for m in theirs]
        assert self.samples() == {step: ids for step, ids in whole.samples().items() if step <= steps}
        checkpoints = folder.complete(self.directory / "checkpoints")
        assert folder.step_of(checkpoints[-1]) == steps
        for checkpoint in checkpoints:
            verify(checkpoint)


def ended_well(job: dict[str, str], restarts: int) -> bool:
    """Whether a job is done, after so many requeues."""
    return job.items() >= {"JobState": "COMPLETED", "ExitCode": "0:0", "Restarts": str(restarts)}.items()
