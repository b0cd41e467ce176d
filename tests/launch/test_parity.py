"""``trine parity``: it agrees where layouts agree, fails where one does not, and refuses what cannot be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.configs.loading import RECIPES, load_config
from trine.configs.schema import Config
from trine.launch import parity
from trine.launch.cli import main
from trine.launch.parity import make_plan
from trine.launch.parity_report import header
from trine.pretrain.parity_comparison import TOLERANCES

pytestmark = pytest.mark.timeout(180)

Capture = pytest.CaptureFixture[str]

RECIPE = """\
model:
  hidden_size: 24
  ffn_hidden_size: 40
  stack:
    - {mixer: differential, layers: 1, heads: 2}
    - {mixer: gated_retention, layers: 1, heads: 2}
train: {steps: 50, global_batch_size: 512, micro_batch_size: 2, sequence_length: 10, document_masking: true}
optimizer: {learning_rate: 0.5}
precision: {compute: bf16}
data: {directory: nowhere}
run: {directory: nowhere}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A recipe of two layers whose data do not exist and whose vocabulary they would decide."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def config(tiny: Path) -> Config:
    return load_config(tiny)


def test_layouts_that_agree(tiny: Path) -> None:
    command = [sys.executable, "-m", "trine", "parity", str(tiny), "train.sequence_length=12"]
    options = ["--layouts", "tp2+sp,pp2", "--steps", "2", "--json", "-", "--device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["ok"] is True
    assert results["steps"] == 2
    assert results["tolerances"] == TOLERANCES
    assert results["versions"].keys() == {"trine", "python", "torch", "megatron-core"}
    assert results["config"]["precision"] == {"compute": "fp32"}
    assert results["config"]["optimizer"]["learning_rate"] == 1e-4
    assert results["config"]["model"]["vocabulary_size"] == 1000
    assert [(row["layout"], row["ranks"], row["verdict"]) for row in results["layouts"]] == [
        ("tp2+sp", 2, "ok"), ("pp2", 2, "ok")
    ]  # fmt: skip
    for row in results["layouts"]:
        assert all(row[name] <= limit for name, limit in TOLERANCES.items())
        assert row["seconds"] > 0
    # Sums in another order are never all equal to the last bit, so something was compared.
    assert results["layouts"][0]["gradient"] > 0
    told = done.stderr
    assert "2 layers of width 24" in told
    assert "vocabulary 1000" in told
    assert "fp32 on this machine's CPU with gloo" in told
    assert "constant learning rate 0.0001 and eps 1e-05" in told
    assert "4 windows of 12 random tokens with 4 documents in each" in told
    assert "in microbatches of 2" in told
    assert re.search(r"^tp2\+sp +2 +\d\.\de[-+]\d\d .* ok ", told, re.MULTILINE)
    assert "2 of 2 layouts compute the same as one process within 1e-05 for loss, 1e-05 for gradient norm" in told
    assert "warn" not in told.lower()


@pytest.mark.parametrize(
    ("fp8", "told"),
    [([], "CPU with gloo; whatever"), (["precision.fp8.backend=emulate"], "CPU with gloo, without precision.fp8; whatever")],
)
def test_it_says_that_it_leaves_fp8_out(tiny: Path, fp8: list[str], told: str) -> None:
    plan = make_plan(load_config(tiny, fp8), "tp2", steps=1, gpus=0)
    assert plan.config.precision.fp8 is None
    assert told in header(plan, "tiny.yaml")


def test_layouts_that_do_not_agree(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """A planted fault in tensor parallelism is named by its parameter, a rank that dies ends its own row alone."""
    monkeypatch.setattr(parity, "JOB", "faults:train")
    target = tmp_path / "results.json"
    words = ["parity", str(tiny), "--layouts", "tp2,pp2,dp2", "--steps", "1", "--device", "cpu"]
    assert main([*words, "--json", str(target)]) == 1
    results = json.loads(target.read_text())
    assert results["ok"] is False
    wrong, died, right = results["layouts"]
    assert (wrong["verdict"], died["verdict"], right["verdict"]) == ("FAIL", "FAIL", "ok")
    assert wrong["gradient"] > 0.1
    assert wrong["gradient_name"].startswith("layers.0.mixer.differential.")
    assert "gradient" in wrong["reason"]
    assert died["reason"] == "rank 1 of 2 was killed by signal 9 (SIGKILL), as happens when memory runs out"
    assert "gradient" not in died
    told = capfd.readouterr().out
    assert re.search(r"^tp2 .* FAIL  layers\.0\.mixer\.differential\..* above tolerance: .*gradient", told, re.MULTILINE)
    assert re.search(r"^pp2 .* FAIL  rank 1 of 2 was killed by signal 9", told, re.MULTILINE)
    assert re.search(r"^dp2 .* ok ", told, re.MULTILINE)
    assert "1 of 3 layouts compute the same" in told


@pytest.mark.parametrize(
    ("job", "sentence", "traceback"),
    [
        ("faults:broken", "cannot be computed: rank 0 of 1 failed: KeyError: 'absent'; compare a smaller model by overrides, or give it more time with --timeout", True),
        ("faults:not_finite", "has a loss or a gradient norm that is not finite", False),
    ],
)
def test_without_a_reference_nothing_is_compared(
    job: str, sentence: str, traceback: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setattr(parity, "JOB", job)
    assert main(["parity", str(tiny), "--layouts", "tp2", "--device", "cpu"]) == 1
    told = capfd.readouterr()
    assert told.err.splitlines()[-1].startswith("trine: the reference, one process, ")
    assert told.err.splitlines()[-1].endswith(sentence)
    assert ("Traceback" in told.err) == traceback
    assert "tp2 " not in told.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layouts", "tp3"], "layout tp3: model.stack.0.heads=2 cannot be divided over parallel.tensor=3"),
        (["--layouts", "pp2,pp5"], "layout pp5: "),
        (["--layouts", "tq2"], "'tq2'"),
        (["--layouts", "tp2", "--steps", "0"], "--steps 0 compares nothing"),
        (["--timeout", "0"], "--timeout 0 leaves no time"),
        (["--json", "/absent/folder/file"], "--json /absent/folder/file cannot be written"),
        (["train.stepz=1"], "train.stepz is not a key"),
        (["train.steps"], "'train.steps' is no override"),
        (["model.stack.0.heads=5"], "heads=5"),
        (["model.hidden_size=999424", "model.ffn_hidden_size=999424"], "overrides such as a model.hidden_size and model.ffn_hidden_size below 999424 and 999424"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    words: list[str], sentence: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(parity, "RankPool", None)
    assert main(["parity", str(tiny), "--device", "cpu", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert sentence in told.err
    assert told.err.startswith("trine: ")
    assert told.err.count("\n") == 1


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield


@pytest.mark.usefixtures("under_torchrun")
def test_it_starts_its_own_ranks(tiny: Path, capsys: Capture) -> None:
    assert main(["parity", str(tiny)]) == 2
    assert "run it by itself, without torchrun" in capsys.readouterr().err


def test_gpus_limit_the_ranks(config: Config) -> None:
    with pytest.raises(UsageError, match="layout dp4: its 4 ranks need as many GPUs and this machine has 2"):
        make_plan(config, "tp2,dp4", steps=1, gpus=2)
    plan = make_plan(config, None, steps=1, gpus=2)
    assert {layout.world_size for layout in plan.layouts} == {2}
    assert all("this machine has 2" in str(row.reason) for row in plan.refused if row.layout.name == "tp2+pp2+dp2")


def test_the_recipe_for_it_takes_the_whole_standard_list() -> None:
    plan = make_plan(load_config(RECIPES / "parity.yaml"), None, steps=3, gpus=0)
    assert [row.layout.name for row in plan.refused] == []
    assert len(plan.layouts) >= 12
    assert max(layout.world_size for layout in plan.layouts) == 8
    mixers = [getattr(segment, "mixer", None) for segment in plan.config.model.stack]
    assert len(set(mixers)) == 9  # eight and the shared K,V


def test_the_standard_list_leaves_out_what_the_model_cannot_take(config: Config) -> None:
    plan = make_plan(config, None, steps=1, gpus=0)
    refused = {row.layout.name: str(row.reason) for row in plan.refused}
    assert "model.stack.0.heads=2 cannot be divided over parallel.tensor=4" in refused["tp4+sp"]
    assert "tp2" in [layout.name for layout in plan.layouts]


def test_help_states_the_tolerances(capsys: Capture) -> None:
    assert main(["parity", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1e-5 for loss and gradient norm, 1e-4 for gradients and parameters" in told
    assert TOLERANCES == {"loss": 1e-5, "grad_norm": 1e-5, "gradient": 1e-4, "parameter": 1e-4}
