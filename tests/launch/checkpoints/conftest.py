"""A run that has written checkpoints, and copies of its folder to damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_folder import write_folder
from training import config_of

from trine.launch.pool import RankPool

STACK: list[dict[str, Any]] = [
    {"mixer": "gated_retention", "layers": 1, "heads": 2},
    {"shared_kv": {"kv_heads": 2, "head_dim": 12}},
    {"mixer": "cross_attention", "layers": 1, "heads": 4},
]


@pytest.fixture(scope="session")
def written(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps on two pipeline stages, with a checkpoint after each."""
    base = tmp_path_factory.mktemp("written")
    write_folder(base / "data", {"train": [[200] * 3]}, shard_tokens=300, member_tokens=100)
    config = config_of(
        STACK,
        parallel={"pipeline": 2},
        model={"vocabulary_size": 257},
        train={"steps": 3, "global_batch_size": 4, "sequence_length": 16},
        data={"directory": str(base / "data"), "workers": 0},
        evaluation={"interval": 0},
        checkpoint={"interval": 1, "keep": 9, "background": False},
        run={"directory": str(base / "run")},
    )
    ranks.run("running:pretrain", 2, config=config.model_dump(mode="json", exclude_none=True))
    return base / "run"


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture
def one(run: Path) -> Path:
    """The newest checkpoint of the copy."""
    return run / "checkpoints" / "step-00000003"
