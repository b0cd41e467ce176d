"""Fixtures shared by every test."""

from __future__ import annotations

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

from trine.launch.pool import RankPool

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, cases marked ``gpu`` are left out unless ``-m`` asks for them."""
    if torch.cuda.is_available() or re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A case marked ``gpu`` fails where there is none: a run that asks for it may not pass without it."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("this case needs a CUDA device, and torch finds none; run without -m gpu", pytrace=False)


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
def ranks() -> Iterator[RankPool]:
    """Worker processes for distributed tests, started when first used and kept for the session."""
    with RankPool(seconds=240) as pool:
        yield pool
