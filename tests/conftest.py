"""Fixtures shared by every test."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, as Megatron-Core does: its kernels then run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from trine.configs.checks import Layout
from trine.launch.pool import RankPool
from trine.parallel import topology

# Tensors here are small: a second thread costs more than it gives, and most where ranks of a pool compute as well.
torch.set_num_threads(1)

ONE_RANK = Layout(world_size=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1, num_microbatches=1)
REPOSITORY = Path(__file__).resolve().parent.parent


def _missing() -> dict[str, str]:
    """What cases need by their markers and this machine lacks: the marker, and what a case says of it."""
    missing = {} if torch.cuda.is_available() else {"gpu": "a CUDA device, and torch finds none"}
    for marker, module in {"apex": "amp_C", "engine": "transformer_engine_torch"}.items():
        if importlib.util.find_spec(module) is None:
            missing[marker] = f"the module {module}, which is not installed"
    return missing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases marked by what is missing here, such as ``gpu``, are left out unless ``-m`` asks for them."""
    expression = config.option.markexpr
    absent = [marker for marker in _missing() if not re.search(rf"(?<!not )\b{marker}\b", expression)]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A case marked by what is missing here fails: a run that asks for it may not pass without it."""
    for marker, needed in _missing().items():
        if item.get_closest_marker(marker):
            pytest.fail(f"this case needs {needed}; run without -m {marker}", pytrace=False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout under test."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Load one file of golden tensors: numbers made by running the published reference code.

    The folder is ``shared/golden`` beside the checkout, or the one named by TRINE_GOLDEN. Where CI=true its
    absence is a failure: parity with the references is the product, so it may not go untested in silence.
    """
    folder = Path(os.environ.get("TRINE_GOLDEN", REPOSITORY.parent / "shared" / "golden"))

    def load(name: str) -> dict[str, Any]:
        path = folder / name
        if not path.exists():
            message = f"golden tensors {path} are missing; set TRINE_GOLDEN to the folder that holds {name}"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        tensors: dict[str, Any] = torch.load(path, weights_only=True)
        return tensors

    return load


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[topology.Topology]:
    """A process group of this process alone."""
    store = Path(tmp_path_factory.mktemp("group")) / "store"
    device = topology.join(0, 1, 0, init_method=f"file://{store}")
    yield topology.build_topology(ONE_RANK, device)
    topology.leave_topology()
    topology.leave()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Worker processes for distributed tests, started when first used and kept for the session."""
    with RankPool(seconds=240) as pool:
        yield pool
