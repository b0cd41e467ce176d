"""The kernels compile for a GPU of compute capability 9.0: what Triton's interpreter does not see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trine.kernels.fused.tiles import SHARED_BYTES, TABLE

ATTENTION = {name: tiles for name, tiles in TABLE.items() if name.split("_")[0] in ("attention", "differential")}


def shared_bytes(name: str) -> int:
    """Shared memory of a kernel: the blocks it keeps, and those of the loop once per stage.

    A program keeps its queries (``q``: their gradient, too) or its keys and values; the loop brings the others.
    """
    kernel, *numbers = name.split("/")
    width, value_width, size = (int(number) for number in numbers)
    rows, keys, _, stages = TABLE[name]
    maps = 2 if kernel.startswith("differential") else 1
    of_queries, of_keys = rows * (maps * width + value_width), keys * (maps * width + value_width)
    if kernel.endswith("forward"):
        return (rows * maps * width + stages * of_keys) * size
    if kernel.endswith("_q"):
        return (of_queries + stages * of_keys) * size
    statistics = stages * 2 * maps * rows * 4
    # Before dK is stored, its elements change places between the threads.
    return (of_keys + stages * of_queries + keys * width) * size + statistics


@pytest.mark.parametrize("name", ATTENTION)
def test_shared_memory_fits(name: str) -> None:
    assert shared_bytes(name) <= SHARED_BYTES


def launches_of(program: str, repository: Path, cache: Path) -> list[dict[str, Any]]:
    """What a program of tests/support compiles, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    path = repository / "tests" / "support" / program
    result = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_attention_compiles(repository: Path, tmp_path: Path) -> None:
    """Both passes of differential attention with its norm at two widths, and of packed documents with a window of one
    token."""
    launches = launches_of("compiled_attention.py", repository, tmp_path)
    assert len(launches) == 12
    for launch in launches:
        assert launch["shared"] <= SHARED_BYTES
        # Tensor cores make the products; the row sums have none.
        assert (launch["products"] > 0) == (launch["kernel"] != "attention_row_sums")
    # All registers fit at widths of 128 and 256; at the others a few do not, which is known and no more.
    assert [launch["stack"] for launch in launches[1::3]] == [0, 0, 0, 0]
    assert max(launch["stack"] for launch in launches) <= 168
    forward = launches[0]
    assert forward["shared"] <= shared_bytes("differential_forward/64/128/2")


def test_retention_compiles(repository: Path, tmp_path: Path) -> None:
    """Both passes at two widths, one in blocks: two scans each, and the products for output, dQ, dK and dV."""
    launches = launches_of("compiled_retention.py", repository, tmp_path)
    assert [launch["kernel"] for launch in launches] == ["scan_states"] * 4 + ["mix_tokens"] * 8
    for launch in launches:
        assert launch["shared"] <= SHARED_BYTES
        assert launch["products"] > 0  # tensor cores make them
        assert launch["stack"] == 0  # all registers fit
