"""A tiny corpus and a tiny run, used through the command line as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 8
CONFIG: dict[str, Any] = {
    "model": {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "embedding_scale": True,
        "stack": [
            {"mixer": "gated_retention", "layers": 1, "heads": 2},
            {"shared_kv": {"kv_heads": 2, "head_dim": 16}},
            {"mixer": "cross_attention", "layers": 2, "heads": 2},
            {"mixer": "differential_cross_attention", "layers": 1, "heads": 1},
        ],
    },
    "parallel": {"pipeline": 2},
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
    "optimizer": {"learning_rate": 5e-3, "schedule": "constant", "warmup_steps": 2},
    "evaluation": {"interval": 4, "batches": 2},
    "checkpoint": {"interval": 3},
}

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared shards of some sentences."""
    from trine.data_pipeline.preparation.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    subjects = ["the rank", "a shard", "the decoder", "every layer", "one stage"]
    lines = [f"{s} {verb} {n} tokens and sends them on" for s in subjects for verb in ("reads", "keeps") for n in range(60)]  # fmt: skip
    for part in range(6):
        (folder / f"{part}.txt").write_text("\n".join(lines[part::6]))
    output = tmp_path_factory.mktemp("data") / "tokens"
    prepare([str(folder)], output, train_tokenizer=300, validation_fraction=0.3)
    return output


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The tiny run as a YAML file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"data": {"directory": str(data)}, "run": {"directory": "unset"}}))
    return path


def command_line(*arguments: object) -> list[str]:
    """A command line of trine in this interpreter."""
    return [sys.executable, "-m", "trine", *map(str, arguments)]


def clean_environment() -> dict[str, str]:
    """The environment of a user who is not inside torchrun, srun or mpirun."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC")
    return {k: v for k, v in os.environ.items() if not k.startswith(launcher)}


@pytest.fixture(scope="session")
def trine() -> Cli:
    """Run the command and return its outcome."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments), capture_output=True, text=True, timeout=150, env=clean_environment(), check=False
        )

    return run


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The steps and the evaluations that a run recorded."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m], [m for m in lines if "validation_loss" in m]


@pytest.fixture(scope="session")
def finished(trine: Cli, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run: its directory and what it printed."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    done = trine("pretrain", recipe, f"run.directory={directory}")
    assert done.returncode == 0, done.stderr
    return directory, done.stderr + done.stdout


@pytest.fixture(scope="session")
def metrics_of() -> Callable[[Path], tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """``read_metrics`` for tests."""
    return read_metrics


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """``command_line`` for tests."""
    return command_line


@pytest.fixture(scope="session")
def environment() -> Callable[[], dict[str, str]]:
    """``clean_environment`` for tests."""
    return clean_environment
