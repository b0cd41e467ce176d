"""How large the blocks of each kernel are, and with how many warps and pipeline stages it runs.

A table instead of a search at run time: all ranks then run the same code, whose rounding and speed repeat from run to
run. An entry is named ``kernel/width/value width/bytes`` and serves all heads up to its widths: d of queries and keys,
dv of values, both padded to powers of two, and the bytes of an element. The smallest entry that holds the heads is
used. Retention's kernels take ``rows`` tokens by ``keys`` columns of a head at most. The environment variable
TRINE_TILES may name a JSON file with other values, by entry or for a whole kernel:

    {"attention_forward/64/64/2": {"rows": 64, "keys": 64, "warps": 4, "stages": 3},
     "attention_backward_q": {"rows": 64, "keys": 32, "warps": 4, "stages": 2}}

The values are chosen for GPUs of compute capability 9.0, with 227 KiB of shared memory and 64 K registers per
multiprocessor: accumulators fill half of the registers at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.errors import UsageError

SHARED_BYTES = 227 * 1024
"""Shared memory that one program may use on a GPU of compute capability 9.0."""


class Tiles(NamedTuple):
    """``rows`` queries by ``keys`` keys per block, run by ``warps`` warps with ``stages`` blocks in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


TABLE: dict[str, Tiles] = {
    "attention_forward/64/64/2": Tiles(128, 64, 4, 3),
    "attention_forward/128/128/2": Tiles(128, 64, 8, 3),
    "attention_forward/256/256/2": Tiles(128, 64, 8, 2),
    "attention_forward/256/512/2": Tiles(64, 32, 8, 2),
    "attention_forward/64/128/4": Tiles(32, 32, 4, 1),
    "attention_forward/256/512/4": Tiles(16, 16, 4, 1),
    "attention_backward_kv/64/64/2": Tiles(64, 128, 8, 2),
    "attention_backward_kv/128/128/2": Tiles(32, 128, 8, 3),
    "attention_backward_kv/256/256/2": Tiles(32, 64, 8, 2),
    "attention_backward_kv/256/512/2": Tiles(32, 32, 8, 1),
    "attention_backward_kv/64/128/4": Tiles(32, 32, 8, 1),
    "attention_backward_kv/256/512/4": Tiles(16, 16, 4, 1),
    "attention_backward_q/64/64/2": Tiles(128, 64, 8, 2),
    "attention_backward_q/128/128/2": Tiles(128, 64, 8, 2),
    "attention_backward_q/256/256/2": Tiles(64, 32, 8, 2),
    "attention_backward_q/256/512/2": Tiles(32, 32, 8, 1),
    "attention_backward_q/64/128/4": Tiles(32, 32, 8, 1),
    "attention_backward_q/256/512/4": Tiles(16, 16, 4, 1),
    "differential_forward/64/128/2": Tiles(128, 64, 8, 2),
    "differential_forward/128/256/2": Tiles(64, 32, 8, 3),
    "differential_forward/256/512/2": Tiles(32, 32, 8, 1),
    "differential_forward/64/128/4": Tiles(32, 32, 8, 1),
    "differential_forward/256/512/4": Tiles(16, 16, 8, 1),
    "differential_backward_kv/64/128/2": Tiles(32, 128, 8, 3),
    "differential_backward_kv/128/256/2": Tiles(32, 32, 8, 2),
    "differential_backward_kv/256/512/2": Tiles(16, 32, 8, 2),
    "differential_backward_kv/64/128/4": Tiles(32, 32, 8, 1),
    "differential_backward_kv/256/512/4": Tiles(16, 16, 8, 1),
    "differential_backward_q/64/128/2": Tiles(128, 64, 8, 2),
    "differential_backward_q/128/256/2": Tiles(64, 32, 8, 2),
    "differential_backward_q/256/512/2": Tiles(32, 32, 8, 1),
    "differential_backward_q/64/128/4": Tiles(32, 32, 8, 1),
    "differential_backward_q/256/512/4": Tiles(16, 16, 8, 1),
    "retention_states/512/512/2": Tiles(64, 64, 4, 3),
    "retention_states/512/512/4": Tiles(32, 32, 4, 1),
    "retention_tokens/64/64/2": Tiles(64, 64, 4, 3),
    "retention_tokens/512/512/2": Tiles(64, 128, 8, 2),
    "retention_tokens/512/512/4": Tiles(32, 32, 4, 1),
}
"""Entries by name; the module docstring says what a name means."""

_overrides: list[Mapping[str, Tiles]] = []
# A plain list instead of a context variable: autograd runs backward passes in threads of its own.


def tiles(kernel: str, width: int, value_width: int, element_size: int) -> Tiles:
    """The blocks of ``kernel`` for heads of padded widths d and dv, of elements of ``element_size`` bytes.

    Raises LookupError where the table has no entry that holds them, UsageError for a bad TRINE_TILES.
    """
    entry = _smallest_entry(kernel, width, value_width, element_size)
    path = os.environ.get("TRINE_TILES")
    for source in (*reversed(_overrides), *([_read(path)] if path else [])):
        for name in (entry, kernel):
            if name in source:
                return source[name]
    return TABLE[entry]


def check_tiles() -> None:
    """Raises UsageError for a bad TRINE_TILES, which no kernel need have asked for yet."""
    if path := os.environ.get("TRINE_TILES"):
        _read(path)


@contextmanager
def tiles_override(values: Mapping[str, Tiles]) -> Iterator[None]:
    """Within it the given entries or whole kernels use other blocks, in all threads; the innermost one wins."""
    _overrides.append(dict(values))
    try:
        yield
    finally:
        _overrides.pop()


def padded(width: int) -> int:
    """The power of two, 16 or more, that holds ``width``: what matrix products of blocks take."""
    return max(16, 1 << (width - 1).bit_length())


def _smallest_entry(kernel: str, width: int, value_width: int, element_size: int) -> str:
    fitting = [
        (int(entry_width), int(entry_value_width), name)
        for name in TABLE
        for entry_kernel, entry_width, entry_value_width, size in [name.split("/")]
        if entry_kernel == kernel and int(size) == element_size
        if int(entry_width) >= width and int(entry_value_width) >= value_width
    ]
    if not fitting:
        raise LookupError(f"no tiles for {kernel} of widths {width} and {value_width}, {element_size} bytes")
    return min(fitting)[-1]


@lru_cache
def _read(path: str) -> dict[str, Tiles]:
    """The entries of a JSON file. Raises UsageError that names the file, the entry and the remedy."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as problem:
        raise UsageError(f"TRINE_TILES={path} cannot be read ({problem}); name a JSON file") from problem
    if not isinstance(content, dict):
        raise UsageError(f"TRINE_TILES={path} holds no JSON object; use one of entries by name")
    return {name: _parse(path, name, fields) for name, fields in content.items()}


def _parse(path: str, name: str, fields: Any) -> Tiles:
    kernels = sorted({entry.split("/")[0] for entry in TABLE})
    if name not in TABLE and name not in kernels:
        known = [entry for entry in TABLE if entry.split("/")[0] == name.split("/")[0]]
        raise UsageError(f"TRINE_TILES={path}: {name!r} is unknown; use one of {', '.join(known or kernels)}")
    if not isinstance(fields, dict) or fields.keys() != set(Tiles._fields):
        raise UsageError(f"TRINE_TILES={path}: {name} is {fields!r}; give it {', '.join(Tiles._fields)}")
    limits = {"rows": (16, 512), "keys": (16, 512), "warps": (1, 16), "stages": (1, 8)}
    for field, (low, high) in limits.items():
        value = fields[field]
        power = field == "stages" or (type(value) is int and value & (value - 1) == 0)
        if type(value) is not int or not low <= value <= high or not power:
            kind = "a number" if field == "stages" else "a power of two"
            raise UsageError(f"TRINE_TILES={path}: {name} has {field} {value!r}; use {kind} from {low} to {high}")
    return Tiles(**fields)
