"""``trine checkpoint inspect``: what a checkpoint holds, and what is said of one that is garbled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_damage import Capture, checkpoint, flip_byte, put, refused

pytestmark = pytest.mark.timeout(300)

PARAMETERS = 2 * 384 * 48 + 48 + 2 * (3 * 48 * 72 + 2 * 48) + 5 * 48 * 48 + 48 * 2 + (48 + 2 * 48 * 24) + 2 * 48 * 48
"""Embedding and output, last norm, feed-forward networks and norms, gated retention, shared K,V, cross attention."""

GARBLED = [
    "", "[]", "null", '{"run": 3}', "[" * 100_000, '{"step": 1e999, "run": {"model": {"stack": [1, {"layers": NaN}]}}}',
    '{"run": {"config": {"parallel": {"tensor": -1, "pipeline": "x"}}, "data": {"sources": [[], {}]}}}',
    '{"run": {"compute": "\\u001b[31m", "watch": {"skipped": true}}, "optimizer": [[]]}',
]  # fmt: skip


def test_inspect(run: Path, one: Path, capsys: Capture) -> None:
    for named in (run, run / "checkpoints", one):
        assert checkpoint("inspect", named) == 0
        name, *lines = capsys.readouterr().out.splitlines()
        assert name == str(one)
        rows = {line[2:14].strip(): line[14:] for line in lines if line[2:14].strip()}
        assert rows.pop("written").endswith(", format 4")
        assert rows.pop("files").endswith(": 4 *.distcp, .metadata, manifest.json, random.npz, state.json, tensors.json")
        count, _ = rows["tensors"].split(" tensors, ")
        assert f": {int(count) // 4} of the model with {4 * PARAMETERS / 1e3:.1f} kB" in rows.pop("tensors")
        assert rows == {
            "progress": "step 3 of 3; 12 samples, 192 tokens",
            "model": "1 gated_retention + [shared K,V 2 x 12] + 1 cross_attention; hidden 48, vocabulary 257",
            "parameters": f"{PARAMETERS:,}",
            "layout": "2 ranks: pp2",
            "precision": "fp32 compute",
            "schedule": "constant, learning rate 0.001 now, 0.001 to 0; 0 warm-up steps, decay until step 3",
            "watch": "0 skipped steps, 0 spikes, 0 roll-backs",
            "data": "after 12 samples of 16 tokens; seed 1234, windows shuffled, 0 samples replaced",
        }
        assert lines[-1].endswith(", weight 1: 12 samples read")


def test_inspect_lists_tensors(one: Path, capsys: Capture) -> None:
    assert checkpoint("inspect", one, "--tensors", "*layers.1.mixer.*quer*") == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["tensor", "shape", "dtype"]
    assert [line.split() for line in table[1:]] == [
        [f"{prefix}layers.1.mixer.input.query", "48", "x", "48", "float32"]
        for prefix in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param.")
    ]
    assert checkpoint("inspect", one, "--tensors", "none") == 0
    assert capsys.readouterr().out.endswith("\n\nno tensor has a name like 'none'\n")
    assert checkpoint("inspect", one, "--json", "-", "--tensors") == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["tensors"]) == document["tensor_count"]
    assert {"name": "final_norm.weight", "shape": [48], "dtype": "float32"} in document["tensors"]
    assert document["parameters"] == PARAMETERS
    assert (document["step"], document["steps"], document["samples"], document["tokens"]) == (3, 3, 12, 192)
    assert document["learning_rate"] == 1e-3
    assert document["data"]["sources"][0]["read"] == 12


@pytest.mark.parametrize("name", ["state.json", "tensors.json", "random.npz"])
def test_inspect_says_first_that_a_checkpoint_is_damaged(one: Path, name: str, capsys: Capture) -> None:
    flip_byte(one / name)
    assert checkpoint("inspect", one, "--json", "-") == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[1] == f"  damaged     {name} differs from what was written"
    assert json.loads(told.out)["wrong"][0] == f"{name} differs from what was written"


@pytest.mark.parametrize("content", GARBLED, ids=range(len(GARBLED)))
def test_garbled_state_that_the_manifest_vouches_for(run: Path, one: Path, content: str, capsys: Capture) -> None:
    put(one / "state.json", content)
    put(one / "tensors.json", content.replace("run", "shape"))
    assert checkpoint("list", run, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["checkpoints"][-1]["tokens"] is None
    code = checkpoint("inspect", one, "--tensors", "--json", "-")
    told = capsys.readouterr()
    assert code == int("state.json holds nothing that can be understood" in told.err)
    assert code == int(not content.startswith("{"))
    assert "\x1b" not in told.err
    assert json.loads(told.out)["parameters"] is None


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"format": 4, "files": {"a": {"bytes": 1e999, "sha256": ""}}}', '{"format": 4}']
)
def test_garbled_manifest(run: Path, one: Path, content: str, capsys: Capture) -> None:
    (one / "manifest.json").write_text(content)
    assert checkpoint("list", run) == 0
    assert "manifest.json cannot be understood" in capsys.readouterr().out
    assert checkpoint("inspect", one) == 1
    assert "  damaged     manifest.json cannot be understood" in capsys.readouterr().out
    assert checkpoint("verify", one) == 1
    assert capsys.readouterr().out.startswith("step-00000003: manifest.json cannot be understood")


def test_another_format_is_told(one: Path, capsys: Capture) -> None:
    (one / "manifest.json").write_text('{"format": 99, "files": {}}')
    assert refused(capsys, 1, "inspect", one) == f"checkpoint {one} has format 99; this version of trine reads format 4: use the version that wrote it, or begin anew in another run.directory"
    assert checkpoint("verify", one) == 1
    assert capsys.readouterr().out.startswith("step-00000003: has format 99; this version")
