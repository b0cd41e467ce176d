"""The table of blocks, and what replaces its entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trine.configs.errors import UsageError
from trine.kernels.fused.tiles import TABLE, Tiles, padded, tiles, tiles_override

ENTRY = "attention_forward/64/64/2"
SMALL, LARGE = Tiles(16, 32, 4, 1), Tiles(64, 32, 4, 2)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write content to a file that TRINE_TILES names, and tell its path."""

    def write(content: Any) -> Path:
        path = tmp_path / "tiles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("TRINE_TILES", str(path))
        return path

    return write


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRINE_TILES", raising=False)


def test_widths_are_padded_to_what_products_take() -> None:
    assert [padded(width) for width in (8, 16, 17, 64, 96, 256)] == [16, 16, 32, 64, 128, 256]


def test_the_smallest_entry_that_holds_the_heads_is_used() -> None:
    assert tiles("attention_forward", 32, 64, 2) == TABLE[ENTRY]
    assert tiles("attention_forward", 64, 128, 2) == TABLE["attention_forward/128/128/2"]
    assert tiles("attention_forward", 16, 512, 2) == TABLE["attention_forward/256/512/2"]
    with pytest.raises(LookupError, match="attention_forward of widths 512 and 64, 2 bytes"):
        tiles("attention_forward", 512, 64, 2)


def test_the_innermost_override_wins_and_ends() -> None:
    with tiles_override({"attention_forward": SMALL}):
        assert tiles("attention_forward", 64, 64, 2) == SMALL
        with tiles_override({ENTRY: LARGE}):
            assert tiles("attention_forward", 64, 64, 2) == LARGE
            assert tiles("attention_forward", 128, 128, 2) == SMALL
    assert tiles("attention_forward", 64, 64, 2) == TABLE[ENTRY]


def test_a_file_replaces_entries_and_kernels(named: Any) -> None:
    named({ENTRY: LARGE._asdict(), "attention_backward_q": SMALL._asdict()})
    assert tiles("attention_forward", 64, 64, 2) == LARGE
    assert tiles("attention_forward", 128, 128, 2) == TABLE["attention_forward/128/128/2"]
    assert tiles("attention_backward_q", 256, 256, 2) == SMALL
    with tiles_override({"attention_forward": SMALL}):
        assert tiles("attention_forward", 64, 64, 2) == SMALL


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ([1], "holds no JSON object; use one of entries by name"),
        ({"attention": {}}, "'attention' is unknown; use one of attention_backward_kv, "),
        ({"attention_forward/1/1/2": {}}, "is unknown; use one of attention_forward/64/64/2, "),
        ({ENTRY: {"rows": 16}}, f"{ENTRY} is {{'rows': 16}}; give it rows, keys, warps, stages"),
        ({ENTRY: SMALL._asdict() | {"rows": 48}}, "has rows 48; use a power of two from 16 to 512"),
        ({ENTRY: SMALL._asdict() | {"keys": 8}}, "has keys 8; use a power of two from 16 to 512"),
        ({ENTRY: SMALL._asdict() | {"warps": True}}, "has warps True; use a power of two from 1 to 16"),
        ({ENTRY: SMALL._asdict() | {"stages": 9}}, "has stages 9; use a number from 1 to 8"),
    ],
)
def test_a_bad_file_is_named_with_its_entry(named: Any, content: Any, sentence: str) -> None:
    path = named(content)
    with pytest.raises(UsageError) as caught:
        tiles("attention_forward", 64, 64, 2)
    assert str(caught.value).startswith(f"TRINE_TILES={path}")
    assert sentence in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRINE_TILES", str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match=r"none\.json cannot be read .*; name a JSON file"):
        tiles("attention_forward", 64, 64, 2)
