"""The run that suffers: the demo's architecture, smaller, on two ranks and a part of Python's standard library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RANKS = 2
INTERVAL = 4
"""Steps between checkpoints."""
HANG_S = 10.0
LAYOUTS = {"data 2": {}, "pipeline 2": {"pipeline": 2}}
_VOCABULARY = 512
_TEXTS = ("json", "email", "http", "logging")


@dataclass(frozen=True)
class Run:
    """A run's folder and the command that starts and continues it."""

    directory: Path
    recipe: Path
    steps: int

    @property
    def checkpoints(self) -> Path:
        """Where it saves."""
        return self.directory / "checkpoints"

    def command(self, *overrides: str) -> list[str]:
        """The command line, as a user types it."""
        words = ["pretrain", self.recipe, f"run.directory={self.directory}", *overrides, "--nproc", RANKS]
        return [sys.executable, "-m", "trine", *map(str, words)]


def environment() -> dict[str, str]:
    """The environment of a user who is not inside torchrun, srun or mpirun."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC")
    return {k: v for k, v in os.environ.items() if not k.startswith(launcher)}


def prepare(folder: Path, layout: str, steps: int, repository: Path) -> Path:
    """Prepare data in ``folder`` and write the recipe; returns the recipe."""
    library = Path(json.__file__).parent.parent
    sources = [str(library / name) for name in _TEXTS]
    options = ["--output", folder / "data", "--train-tokenizer", _VOCABULARY, "--validation-fraction", "0.1"]
    words = [sys.executable, "-m", "trine", "data", "prepare", *sources, *map(str, options)]
    subprocess.run(words, check=True, capture_output=True, env=environment(), timeout=300)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(_recipe(folder / "data", layout, steps, repository)))
    return path


def _recipe(data: Path, layout: str, steps: int, repository: Path) -> dict[str, Any]:
    demo: dict[str, Any] = yaml.safe_load((repository / "configs" / "demo.yaml").read_text())
    shared = {"shared_kv": {"kv_heads": 4, "head_dim": 16}}
    stack = [shared if "shared_kv" in segment else segment for segment in demo["model"]["stack"]]
    return demo | {
        "model": demo["model"] | {"hidden_size": 64, "ffn_hidden_size": 176, "stack": stack},
        "parallel": LAYOUTS[layout],
        "train": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 128},
        "optimizer": demo["optimizer"] | {"warmup_steps": 10},
        "data": {"directory": str(data), "record_samples": True},
        "evaluation": {"interval": 10, "batches": 2},
        "checkpoint": {"interval": INTERVAL, "keep": 3, "failure_budget": 20},
        "watch": {"hang_seconds": HANG_S, "collective_timeout": 60},
        "run": {"directory": "unset"},
    }
