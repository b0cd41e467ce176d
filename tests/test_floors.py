"""Rooms import only the rooms below them, and the engine is touched in two rooms alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAY_IMPORT = {
    "configs": set(),
    "kernels": {"configs"},
    "data_pipeline": {"configs"},
    "parallel": {"configs", "kernels"},
    "models": {"configs", "kernels", "parallel"},
    "pretrain": {"configs", "kernels", "data_pipeline", "parallel", "models"},
    "launch": {"configs", "kernels", "data_pipeline", "parallel", "models", "pretrain"},
}


def imported_names(path: Path, root: Path) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, wherever the statement stands."""
    package = ["trine", *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield ".".join(module)
            yield from (".".join([*module, alias.name]) for alias in node.names)


def files_of(repository: Path, room: str) -> list[Path]:
    return sorted((repository / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_downward(repository: Path, room: str) -> None:
    assert files_of(repository, room)
    for path in files_of(repository, room):
        for name in imported_names(path, repository):
            parts = name.split(".")
            if parts[0] == "trine" and len(parts) > 1 and parts[1] in MAY_IMPORT and parts[1] != room:
                assert parts[1] in MAY_IMPORT[room], f"{path.relative_to(repository)} imports {name}"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT.keys() - {"parallel", "models"}))
def test_the_engine_stays_in_its_rooms(repository: Path, room: str) -> None:
    for path in files_of(repository, room):
        for name in imported_names(path, repository):
            assert not name.startswith("megatron"), f"{path.relative_to(repository)} imports {name}"


@pytest.mark.parametrize("room", ["kernels", "models"])
def test_kernels_and_models_do_not_communicate(repository: Path, room: str) -> None:
    for path in files_of(repository, room):
        for name in imported_names(path, repository):
            assert not name.startswith("torch.distributed"), f"{path.relative_to(repository)} imports {name}"


def test_kernels_know_nothing_of_the_engine(repository: Path) -> None:
    for path in files_of(repository, "kernels"):
        assert not any(name.startswith("megatron") for name in imported_names(path, repository))


def test_the_parser_of_this_test_sees_relative_imports(tmp_path: Path) -> None:
    room = tmp_path / "kernels"
    room.mkdir()
    (room / "wrong.py").write_text("from ..models.block import Block\nfrom . import other\n")
    names = set(imported_names(room / "wrong.py", tmp_path))
    assert "trine.models.block" in names
    assert "trine.kernels.other" in names
