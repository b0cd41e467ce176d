"""Checkpoints: a resumed run is the uninterrupted one, and damage is found before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import hybrid
from training import config_of

from trine.configs.errors import RunError
from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool
from trine.pretrain.checkpoints import folder
from trine.pretrain.checkpoints.manifest import DamageError, verify
from trine.pretrain.parity_pieces import whole

pytestmark = pytest.mark.timeout(300)

STACK: list[dict[str, Any]] = [
    {"mixer": "differential", "layers": 1, "heads": 2, "kv_heads": 2},
    {"mixer": "gated_retention", "layers": 1, "heads": 2},
    {"shared_kv": {"kv_heads": 2, "head_dim": 12}},
    {"mixer": "cross_attention", "layers": 2, "heads": 4},
]
SAVED = {"tensor": 2, "sequence": True, "pipeline": 2}
SAVED_RANKS = 8


def train(
    ranks: RankPool, world_size: int, parallel: dict[str, Any], compute: str = "fp32", **arguments: Any
) -> list[dict[str, Any]]:
    config = config_of(
        STACK, parallel=parallel, optimizer={"schedule": "cosine"}, precision={"compute": compute}
    )
    raw = config.model_dump(mode="json", exclude_none=True)
    return ranks.run("training:train", world_size, config=raw, **arguments)


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankPool) -> list[dict[str, Any]]:
    return train(ranks, SAVED_RANKS, SAVED, steps=5)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    train(ranks, SAVED_RANKS, SAVED, steps=3, save=str(root))
    found = folder.newest(root)
    assert found is not None
    assert found.name == "step-00000003"
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(SAVED_RANKS, SAVED), (1, {}), (4, {"context": 4})],
    ids=["same layout", "one process", "cp4"],
)
def test_resumed_run_equals_the_uninterrupted_one(
    ranks: RankPool, saved: Path, uninterrupted: list[dict[str, Any]], world_size: int, parallel: dict[str, Any]
) -> None:
    """Losses and norms within 1e-6 of fp32 sums in another order; wrong Adam step counts would show at 1e-4."""
    resumed = train(ranks, world_size, parallel, steps=2, load=str(saved.parent))
    assert resumed[0]["losses"] == pytest.approx(uninterrupted[0]["losses"][3:], rel=2e-6)
    assert resumed[0]["grad_norms"] == pytest.approx(uninterrupted[0]["grad_norms"][3:], rel=1e-5)
    ours, theirs = whole(resumed, "parameters"), whole(uninterrupted, "parameters")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


CHAIN = ["tp2+sp+pp2+cp2", "pp4+vpp2", "cp4", "tp1", "tp2+dp2", "pp2+cp2+dp2+recompute"]


def test_a_run_that_changes_its_layout_at_every_step(ranks: RankPool, tmp_path: Path) -> None:
    """Model, optimizer, schedule and position pass through one checkpoint format under every kind of parallelism.

    Losses and norms within 1e-5 of the run that never stopped: fp32 sums in another order.
    """
    config = config_of(hybrid(), train={"document_masking": True}, optimizer={"schedule": "cosine"})
    uninterrupted = ranks.run(
        "training:train", 1, config=config.model_dump(mode="json", exclude_none=True), steps=len(CHAIN)
    )
    losses, norms, rates, last = [], [], [], None
    for name in CHAIN:
        layout = parse_layout(name)
        raw = under_layout(config, layout).model_dump(mode="json", exclude_none=True)
        load = folder.newest(tmp_path)
        last = ranks.run(
            "training:train", layout.world_size, config=raw, steps=1, load=load and str(tmp_path), save=str(tmp_path)
        )
        losses += last[0]["losses"]
        norms += last[0]["grad_norms"]
        rates += last[0]["learning_rates"]
    assert losses == pytest.approx(uninterrupted[0]["losses"], rel=1e-5)
    assert norms == pytest.approx(uninterrupted[0]["grad_norms"], rel=1e-5)
    assert rates == uninterrupted[0]["learning_rates"]
    ours, theirs = whole(last, "parameters"), whole(uninterrupted, "parameters")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), (4, {"pipeline": 2})], ids=["one process", "pp2+dp2"]
)
def test_tied_embedding_survives(
    ranks: RankPool, tmp_path: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    """The tied weight has a gradient bucket of its own; the parameters behind its padding must not be shifted."""
    model = {"tied_embeddings": True}
    config = config_of(STACK, parallel=parallel, model=model).model_dump(mode="json", exclude_none=True)
    uninterrupted = ranks.run("training:train", world_size, config=config, steps=5)
    ranks.run("training:train", world_size, config=config, steps=3, save=str(tmp_path))
    resumed = ranks.run("training:train", world_size, config=config, steps=2, load=str(tmp_path))
    assert resumed[0]["losses"] == uninterrupted[0]["losses"][3:]
    ours, theirs = whole(resumed, "parameters"), whole(uninterrupted, "parameters")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_learning_rate_continues(ranks: RankPool, tmp_path: Path, schedule: str) -> None:
    optimizer = {"schedule": schedule, "warmup_steps": 2, "minimum_learning_rate": 1e-5, "wsd_decay_steps": 2}
    config = config_of(STACK, optimizer=optimizer).model_dump(mode="json", exclude_none=True)
    (uninterrupted,) = ranks.run("training:train", 1, config=config, steps=5)
    ranks.run("training:train", 1, config=config, steps=3, save=str(tmp_path))
    path = str(tmp_path)
    (resumed,) = ranks.run("training:train", 1, config=config, steps=2, load=path)
    assert resumed["learning_rates"] == uninterrupted["learning_rates"][3:]
    assert len(set(uninterrupted["learning_rates"])) > 3
    config["optimizer"]["learning_rate"] *= 2
    (hotter,) = ranks.run("training:train", 1, config=config, steps=2, load=path)
    assert hotter["learning_rates"][0] > 1.5 * resumed["learning_rates"][0]


def test_bf16_run_resumes(ranks: RankPool, tmp_path: Path) -> None:
    """Matrices in bf16 beside vectors in fp32, each with its state. Equal on the same layout; on another, bf16's
    eight bits in other places."""
    pipeline: dict[str, Any] = {"pipeline": 2}
    uninterrupted = train(ranks, 2, pipeline, "bf16", steps=5)
    train(ranks, 2, pipeline, "bf16", steps=3, save=str(tmp_path))
    path = str(tmp_path)
    same = train(ranks, 2, pipeline, "bf16", steps=2, load=path)
    assert same[0]["losses"] == uninterrupted[0]["losses"][3:]
    assert same[0]["grad_norms"] == uninterrupted[0]["grad_norms"][3:]
    for parallel in ({}, {"tensor": 2, "sequence": True}):
        other = train(ranks, 2, parallel, "bf16", steps=2, load=path)
        assert other[0]["losses"] == pytest.approx(uninterrupted[0]["losses"][3:], rel=1e-3)


def test_names_do_not_depend_on_the_layout(saved: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(str(saved)).read_metadata().state_dict_metadata.keys()
    assert "layers.0.mixer.differential.lambda_q1" in names
    assert "layers.3.mixer.input.query" in names
    assert "shared_kv.2.input.key" in names
    assert "optimizer.state.exp_avg.layers.1.feed_forward.input.gate" in names


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_flipped_bit_is_found(copy: Path) -> None:
    damaged = next(copy.glob("*.distcp"))
    flip_byte(damaged)
    with pytest.raises(DamageError, match=rf"is damaged: {damaged.name} differs from what was written"):
        verify(copy)


def test_cut_and_missing_files_are_found(copy: Path) -> None:
    damaged = next(copy.glob("*.distcp"))
    size = damaged.stat().st_size
    os.truncate(damaged, size - 1)
    with pytest.raises(DamageError, match=rf"{damaged.name} has {size - 1:,} bytes instead of {size:,}"):
        verify(copy)
    damaged.unlink()
    with pytest.raises(DamageError, match=rf"is damaged: {damaged.name} is missing"):
        verify(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 4}', '{"format": 4, "files": {"../../x": {"bytes": 1}}}'])
def test_a_manifest_that_says_nothing_is_damage(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DamageError, match=r"is damaged: manifest\.json cannot be understood"):
        verify(copy)


def test_a_manifest_must_vouch_for_what_is_unpickled(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"][".metadata"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamageError, match=r"does not list \.metadata"):
        verify(copy)


def test_missing_or_foreign_manifest(copy: Path) -> None:
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(RunError, match=r"has format 99; this version of trine reads format 4: use the version that wrote it, or begin anew in another"):
        verify(copy)
    manifest.unlink()
    with pytest.raises(DamageError, match=r"is damaged: manifest\.json is missing"):
        verify(copy)


def loading_of(root: Path, ranks: RankPool, parallel: dict[str, Any], **settings: Any) -> str:
    """What all of two ranks say of the checkpoints in ``root``."""
    config = config_of(STACK, parallel=parallel, checkpoint=settings).model_dump(mode="json", exclude_none=True)
    (told,) = set(ranks.run("training:error_of_loading", 2, config=config, load=str(root)))
    return str(told)


@pytest.mark.parametrize("damaged", ["state.json", ".metadata", "__5_0.distcp", "manifest.json"])
def test_the_checkpoint_before_a_damaged_one_is_used(ranks: RankPool, copy: Path, damaged: str) -> None:
    """Which of two ranks reads the damaged file does not matter; what is damaged is never opened."""
    newer = Path(shutil.copytree(copy, copy.with_name("step-00000004")))
    flip_byte(newer / damaged) if damaged != "manifest.json" else (newer / damaged).unlink()
    assert loading_of(copy.parent, ranks, {"pipeline": 2}) == "loaded step-00000003"
    assert sorted(p.name for p in copy.parent.iterdir()) == ["step-00000003", "step-00000004.damaged"]


def test_a_damaged_checkpoint_ends_the_run_where_asked(ranks: RankPool, copy: Path) -> None:
    shutil.copytree(copy, copy.with_name("step-00000004"))
    flip_byte(copy.with_name("step-00000004") / "state.json")
    told = loading_of(copy.parent, ranks, {}, on_damage="stop")
    assert "step-00000004 is damaged: state.json differs from what was written; remove it" in told


def test_a_run_does_not_begin_anew_where_every_checkpoint_is_damaged(ranks: RankPool, copy: Path) -> None:
    flip_byte(copy / "tensors.json")
    for _ in range(2):
        assert "is whole: repair or remove the damaged ones" in loading_of(copy.parent, ranks, {})


def test_checkpoint_of_another_model_is_refused(ranks: RankPool, saved: Path) -> None:
    wider = config_of(STACK, model={"ffn_hidden_size": 96}).model_dump(mode="json", exclude_none=True)
    (told,) = ranks.run("training:error_of_loading", 1, config=wider, load=str(saved.parent))
    assert "does not hold this model" in told


def test_unfinished_checkpoint_does_not_exist(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "step-00000009.writing")
    assert folder.newest(tmp_path) is None
    assert folder.newest(tmp_path / "nowhere") is None


def test_only_the_newest_are_kept(ranks: RankPool, tmp_path: Path) -> None:
    for first in range(3):
        train(ranks, 1, {}, steps=1, first_step=first, save=str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8, 10, 12):
        folder.path_of(tmp_path, step).mkdir()
    going = folder.superseded(tmp_path, keep=2, keep_every=4)
    assert [folder.step_of(path) for path in going] == [2, 5, 6]
    assert [folder.step_of(path) for path in folder.superseded(tmp_path, keep=3, keep_every=0)] == [2, 4, 5, 6]


def test_training_goes_on_while_a_checkpoint_is_written(ranks: RankPool, tmp_path: Path) -> None:
    """Each holds the state of the step after which it was begun, though the next step changed it at once. The fifth was
    planned by the third, as Megatron-Core does where nothing has changed."""
    config = config_of(STACK, optimizer={"schedule": "cosine"}, checkpoint={"keep": 9})
    raw = config.model_dump(mode="json", exclude_none=True)
    fifth = ranks.run("training:saves_while_training", 2, config=raw, save=str(tmp_path))
    assert [folder.step_of(path) for path in folder.complete(tmp_path)] == [1, 2, 3, 4, 5]
    for after in (fifth, train(ranks, 2, {}, steps=3)):
        loaded = whole(train(ranks, 1, {}, steps=0, load=str(tmp_path)), "parameters")
        theirs = whole(after, "parameters")
        assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)
        for step in (4, 5):
            shutil.rmtree(folder.path_of(tmp_path, step), ignore_errors=True)


def test_what_is_not_a_tensor_is_text(saved: Path) -> None:
    """Nothing but torch's index of the tensors is pickled."""
    assert {path.name for path in saved.iterdir() if path.suffix != ".distcp"} == {
        ".metadata", "manifest.json", "random.npz", "state.json", "tensors.json"
    }  # fmt: skip
    state = json.loads((saved / "state.json").read_text())
    assert state["updates"] == 3
    shapes = json.loads((saved / "tensors.json").read_text())
    assert shapes["layers.3.mixer.input.query"] == {"shape": [48, 48], "dtype": "float32"}
