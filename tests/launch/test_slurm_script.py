"""The text of batch scripts: what Slurm reads of it, what bash reads of it, and that nothing gets out of its quotes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import write_run

from trine.launch.cli import main

pytestmark = pytest.mark.timeout(60)

Capture = pytest.CaptureFixture[str]
SIZE = ["--nodes", "2", "--gpus-per-node", "8"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder as the working directory."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(capsys: Capture, *words: str) -> str:
    """What the command prints; bash must find it well formed."""
    assert main(["launch", "slurm", "recipe.yaml", *words]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    subprocess.run(["bash", "-n"], input=told.out, text=True, check=True)
    return told.out


def header(text: str) -> dict[str, str]:
    """The options that Slurm finds: quotes are read as it reads them."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in shlex.split(line)]
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def srun(text: str) -> list[str]:
    """The words of the step, as bash cuts them; variables stay."""
    found = re.search(r"^(srun (?:.|\n)*?) &$", text, re.MULTILINE)
    assert found
    return shlex.split(found[1].replace("\\\n", ""))


def test_header(here: Path, capsys: Capture) -> None:
    words = ["--partition", "gpu", "--account", "a", "--qos", "high", "--exclude", "node[3,7-9]", "--job-name", "yoco"]
    text = script(capsys, *SIZE, *words, "--time", "2-12", "--cpus-per-rank", "7", "--sbatch-arg=--constraint=ib&nvme")
    assert header(text) == {
        "--job-name": "yoco", "--partition": "gpu", "--account": "a", "--qos": "high", "--exclude": "node[3,7-9]",
        "--nodes": "2", "--ntasks-per-node": "8", "--gpus-per-node": "8", "--cpus-per-task": "7", "--time": "2-12",
        "--signal": "B:USR1@300", "--requeue": "", "--open-mode": "append", "--chdir": str(here),
        "--output": f"{here}/run/slurm/%j.log", "--constraint": "ib&nvme",
    }  # fmt: skip
    # Slurm stops reading at the first line that is neither a comment nor empty.
    first = next(number for number, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in text.splitlines()[first:])


def test_machines_without_gpus_are_asked_for_none(capsys: Capture) -> None:
    text = script(capsys, "--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "4")
    assert "--gpus-per-node" not in header(text)
    assert header(text)["--ntasks-per-node"] == "4"
    assert not re.search("NCCL|CUDA|TORCH_FR", text)


def test_one_task_per_rank(here: Path, capsys: Capture) -> None:
    words = srun(script(capsys, *SIZE, "train.steps=2000", "--cpus-per-rank", "7"))
    assert words[1:4] == ["--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=7"]
    assert {"--kill-on-bad-exit=1", "--wait=60", "--distribution=block", "--open-mode=append"} < set(words)
    assert words[-6:] == [sys.executable, "-m", "trine", "pretrain", str(here / "recipe.yaml"), "train.steps=2000"]


def test_torchrun(here: Path, capsys: Capture) -> None:
    text = script(capsys, *SIZE, "run.directory=$HOME/x", "--launcher", "torchrun", "--cpus-per-rank", "7")
    assert (header(text)["--ntasks-per-node"], header(text)["--cpus-per-task"]) == ("1", "56")
    words = srun(text)
    shell = words.index("sh")
    assert words[shell + 2].startswith('trap "" USR1 USR2; exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID"')
    assert words[shell + 3 : shell + 6] == [sys.executable, "--nnodes=2", "--nproc-per-node=8"]
    assert words[-1] == "run.directory=$$HOME/x"  # which torchrun makes one of


def test_cores_are_asked_for_where_they_are_used(capsys: Capture) -> None:
    alone = script(capsys, *SIZE)
    assert not re.search("cpus-per-task", alone)  # the site's own rule holds
    together = script(capsys, *SIZE, "--launcher", "torchrun")
    assert header(together)["--cpus-per-task"] == "8"
    assert "--cpus-per-task=8" in srun(together)


def test_environment(here: Path, capsys: Capture) -> None:
    text = script(capsys, *SIZE, "--cpus-per-rank", "7", "--env", "NCCL_DEBUG=INFO", "--env", "A=b c'd$(e)")
    start = text.index("export PYTHONUNBUFFERED")
    block = text[start : text.index("# ---- The ranks")]
    told = subprocess.run(
        ["bash", "-c", f'scontrol() {{ echo first; echo second; }}\n{block}\nenv -0'],
        env={"RUN": str(here), "SLURM_JOB_ID": "1234", "RESTARTS": "2", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(line.split("=", 1) for line in told.stdout.split("\0") if line)
    traces = f"{here}/slurm/nccl_traces/1234_2_rank_"
    assert found.items() >= {
        "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "7", "MASTER_ADDR": "first", "NCCL_DEBUG": "INFO", "A": "b c'd$(e)",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ENABLE_MONITORING": "1", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "1200",
        "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": traces, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": traces,
    }.items()  # fmt: skip
    assert int(found["MASTER_PORT"]) == 20000 + (1234 * 31 + 2) % 12000
    assert (here / "slurm" / "nccl_traces").is_dir()


def test_pyxis(here: Path, capsys: Capture) -> None:
    words = srun(script(capsys, *SIZE, "--container", "nvcr.io#nvidia/pytorch:26.01-py3", "--container-runtime", "pyxis",
                        "--mount", "/raid:/scratch", "--mount", "/opt/licences:/opt/licences:ro"))  # fmt: skip
    assert "--container-image=nvcr.io#nvidia/pytorch:26.01-py3" in words
    assert f"--container-workdir={here}" in words
    mounts = next(word for word in words if word.startswith("--container-mounts=")).partition("=")[2].split(",")
    assert {"/raid:/scratch", "/opt/licences:/opt/licences:ro", f"{here}/run:{here}/run", f"{here}:{here}:ro"} <= set(mounts)
    # What lies within another mount comes after it, which would hide it.
    assert mounts.index(f"{here}/run:{here}/run") > mounts.index(f"{here}:{here}:ro")
    assert words[-5:-1] == ["python", "-m", "trine", "pretrain"]


def test_apptainer(here: Path, capsys: Capture) -> None:
    (here / "image.sif").touch()
    words = srun(script(capsys, *SIZE, "--container", "./image.sif", "--container-runtime", "apptainer",
                        "--mount", f"{here}:{here}", "--python", "/opt/venv/bin/python"))  # fmt: skip
    start = words.index("apptainer")
    # One mount that holds everything is enough.
    assert words[start:-1] == [
        "apptainer", "exec", "--nv", "--pwd", str(here), "--bind", f"{here}:{here}", "./image.sif",
        "/opt/venv/bin/python", "-m", "trine", "pretrain",
    ]  # fmt: skip


def test_nothing_gets_out_of_its_quotes(here: Path, capsys: Capture) -> None:
    hostile = here / "a'; touch pwned; echo '\"$(touch pwned)`touch pwned`%j#"
    words = [f"run.directory={hostile}", "checkpoint.directory=\"'; touch pwned #\"", "--env", "A=';touch pwned;'"]
    text = script(capsys, *SIZE, *words, "--partition", "p';touch$IFS'pwned'#", "--python", "$(touch pwned)")
    assert header(text)["--partition"] == "p';touch$IFS'pwned'#"
    assert header(text)["--output"] == str(hostile).replace("%", "%%") + "/slurm/%j.log"
    # Run it whole, with a Slurm that does nothing, and a Python that is not there.
    tools = here / "tools"
    tools.mkdir()
    for name in ("srun", "scontrol"):
        (tools / name).write_text('#!/bin/bash\nprintf "%s\\n" "$0" "$@" >>"$SEEN"; exit 2\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, cwd=here, check=False,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SEEN": str(here / "seen")},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    seen = (here / "seen").read_text().splitlines()
    assert [f"run.directory={hostile}", words[1]] == seen[-2:]
    assert "$(touch pwned)" in seen
    assert not list(here.rglob("pwned"))
