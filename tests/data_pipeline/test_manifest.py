"""The manifest: what is not there, of another version or damaged is said in a sentence."""

from __future__ import annotations

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.shards.manifest import MANIFEST, UNFINISHED, Manifest, dtype_name, load_manifest, token_dtype
from trine.data_pipeline.storage.folder import open_folder


def test_fingerprint_is_that_of_the_file(prepared: Path) -> None:
    assert load_manifest(prepared).fingerprint == sha256((prepared / MANIFEST).read_bytes()).hexdigest()


def test_the_fingerprint_is_computed_once_and_not_inherited(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert manifest.fingerprint is manifest.fingerprint
    changed = manifest.model_copy(update={"eos_id": manifest.eos_id + 1})
    assert changed.fingerprint == sha256(changed.to_json()).hexdigest() != manifest.fingerprint
    assert manifest == Manifest.model_validate_json(manifest.to_json())


def test_a_folder_that_cannot_be_listed_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=rf"{tmp_path} holds no prepared data \(index\.json is missing\)"):
        load_manifest(tmp_path)


def test_absence_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"folder of prepared data {tmp_path / 'absent'} is not there"):
        load_manifest(tmp_path / "absent")
    with pytest.raises(UsageError, match=rf"{tmp_path} holds no prepared data \(index\.json is missing\)"):
        load_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"folder of prepared data {tmp_path / 'file'} is not there"):
        load_manifest(tmp_path / "file")
    (tmp_path / UNFINISHED).touch()
    with pytest.raises(UsageError, match=f"the preparation of data in {tmp_path} has not finished; run it again"):
        load_manifest(tmp_path)


def test_a_path_a_name_and_a_folder_are_read_alike(prepared: Path) -> None:
    assert load_manifest(prepared) == load_manifest(str(prepared)) == load_manifest(open_folder(prepared))


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(RunError, match=rf"{tmp_path}/index\.json cannot be read \(Is a directory\)"):
        load_manifest(tmp_path)


def edited(prepared: Path, folder: Path, **changes: Any) -> Path:
    raw = json.loads((prepared / MANIFEST).read_bytes()) | changes
    (folder / MANIFEST).write_text(json.dumps(raw, indent=1) + "\n")
    return folder


def test_another_format_is_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has format 2 and this version of trine reads format 1"):
        load_manifest(edited(prepared, tmp_path, format=2))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"eos_id": "zero"}, "eos_id"),
        ({"splits": {"train": [{"name": "../../secret.tar"}]}}, r"splits\.train\.0\.name"),
        ({"tokenizer": "/etc/passwd"}, "tokenizer"),
        ({"splits": {}}, "splits"),
        ({"splits": {"train": []}}, r"splits\.train"),
        ({"splits": {"train": [{"name": "train-00000-000.tar", "bytes": 1, "tokens": 1 << 62}]}}, r"splits\.train\.0\.tokens"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damage_is_located(prepared: Path, tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(RunError, match=rf"index\.json is damaged at {where} \(.*\); restore it from a copy, or delete"):
        load_manifest(edited(prepared, tmp_path, **changes))


def test_half_a_file_or_another_layout_is_damage(prepared: Path, tmp_path: Path) -> None:
    data = (prepared / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match="is damaged: it is not JSON"):
        load_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"[]")
    with pytest.raises(RunError, match="is damaged at the whole"):
        load_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(json.loads(data)))
    with pytest.raises(RunError, match="was changed after it was written"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(("size", "name", "width"), [(2, "uint16", 2), (65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_the_narrowest_type_that_holds_every_id(size: int, name: Any, width: int) -> None:
    assert dtype_name(size) == name
    assert token_dtype(name).itemsize == width
    assert np.array([size - 1], token_dtype(name))[0] == size - 1
