"""Which rank a process takes itself for."""

from __future__ import annotations

from pathlib import Path

import pytest

from trine.configs.errors import UsageError
from trine.launch.environment import export, find_place
from trine.pretrain.place import Place

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
}  # fmt: skip
STEP = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)", "SLURM_STEP_NODELIST": "n[1-3]",
}  # fmt: skip
# What the shell of `sbatch --ntasks=4` sees: a rank number and a number of tasks, but nobody started the tasks.
SBATCH_SHELL = {
    "SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4", "SLURM_JOB_NODELIST": "n[1-2]",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-n1-1234@1",
}  # fmt: skip
ALONE = Place(0, 1, 0, 1, "single")


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, ALONE),
        (TORCHRUN, Place(5, 8, 1, 4, "torchrun")),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, Place(5, 8, 1, 8, "torchrun")),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, ALONE),
        (STEP, Place(4, 7, 1, 2, "slurm")),
        (STEP | {"SLURM_NODEID": "0"}, Place(4, 7, 1, 3, "slurm")),
        (SBATCH_SHELL, ALONE),
        # Slurm's own number for the batch shell, should a version of it export that.
        (SBATCH_SHELL | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "4"}, ALONE),
        (MPI, Place(2, 4, 2, 4, "mpi")),
        (TORCHRUN | STEP, Place(5, 8, 1, 4, "torchrun")),
        (TORCHRUN | MPI, Place(5, 8, 1, 4, "torchrun")),
        # mpirun in a batch job reaches the other hosts by srun, and ranks there see that step's variables.
        (STEP | MPI, Place(2, 4, 2, 4, "mpi")),
    ],
)
def test_place(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "4"}, "local rank 4 of 4"),
    ],
)
def test_contradictory_variables_are_named(environ: dict[str, str], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        find_place(environ)


def exported(environ: dict[str, str]) -> dict[str, str]:
    result = dict(environ)
    export(find_place(result), result)
    return result


def test_export_leaves_torchrun_alone() -> None:
    assert exported(TORCHRUN) == TORCHRUN


def test_export_of_one_host_needs_no_name_service() -> None:
    after = exported(MPI)
    assert [after[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["2", "4", "2", "4"]
    assert after["MASTER_ADDR"] == "127.0.0.1"


def test_port_is_that_of_the_job() -> None:
    ports = [
        int(exported(environ)["MASTER_PORT"])
        for environ in (MPI, MPI | {"OMPI_COMM_WORLD_RANK": "3"}, MPI | {"PMIX_NAMESPACE": "prterun-n1-99@1"})
    ]
    assert ports[0] == ports[1] != ports[2]
    assert all(20000 <= port < 32768 for port in ports)
    assert exported({k: v for k, v in MPI.items() if k != "PMIX_NAMESPACE"})["MASTER_PORT"] == "29500"


def test_export_keeps_what_is_set() -> None:
    after = exported(STEP | {"MASTER_ADDR": "chosen", "MASTER_PORT": "4000"})
    assert (after["MASTER_ADDR"], after["MASTER_PORT"]) == ("chosen", "4000")


def test_mpi_on_several_hosts_asks_for_the_address() -> None:
    several = MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UsageError, match="mpirun -x MASTER_ADDR=HOST"):
        exported(several)
    assert exported(several | {"MASTER_ADDR": "n1"})["MASTER_ADDR"] == "n1"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command of that name, which notes its arguments and expands any list to two hosts."""
    command = tmp_path / "scontrol"
    command.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments\necho first\necho second\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "arguments"


def test_slurm_ranks_meet_on_the_first_host(scontrol: Path) -> None:
    after = exported(STEP)
    assert after["MASTER_ADDR"] == "first"
    assert (after["RANK"], after["WORLD_SIZE"]) == ("4", "7")
    assert after["MASTER_PORT"] != exported(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]


def test_node_list_reaches_no_shell(scontrol: Path, tmp_path: Path) -> None:
    exported(STEP | {"SLURM_STEP_NODELIST": f"n1; touch {tmp_path}/owned"})
    assert scontrol.read_text().splitlines() == ["show", "hostnames", f"n1; touch {tmp_path}/owned"]
    assert not (tmp_path / "owned").exists()


def test_without_scontrol_the_address_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="set MASTER_ADDR to that host"):
        exported(STEP)
