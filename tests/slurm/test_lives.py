"""How lives of a job begin and end, with a program of a few lines in place of the training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_runs import LIFE_S, SIZE, Run, ended_well

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

NewRun = Callable[[str], Run]
Standin = Callable[[str], str]


def options(run: Run, program: str) -> list[str]:
    """Have ``program`` run in place of Python on two nodes with two ranks each."""
    return ["--python", program, "--env", f"STANDIN_RUN={run.directory}", *SIZE, "2"]


def test_it_gives_up_after_lives_without_a_new_checkpoint(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("failing")
    program = standin("[[ $RANK == 0 && $LIFE == 1 ]] && mkdir -p $RUN/checkpoints/step-00000003; sleep 1; exit 1")
    (job,) = run.submit(*options(run, program), "--max-failures", "2")
    ended = cluster.wait_for(job, seconds=LIFE_S)
    # The first life made a checkpoint, so two more are tried.
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "2"), run.log()
    assert "life 3 | giving up: 2 lives in a row made no new checkpoint (the newest is step-00000003)" in run.log()


def test_a_cancelled_job_does_not_come_back(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("cancelled")
    program = standin("trap 'leave stopped true 75' TERM; while :; do sleep 0.1; done")
    (job,) = run.submit(*options(run, program))
    cluster.wait_until(lambda: "life 1 | nodes" in run.log(), LIFE_S, "it does not begin")
    cluster.run("scancel", job)
    ended = cluster.wait_for(job, seconds=LIFE_S)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), run.log()
    # The script itself ends before Slurm kills it, and has understood.
    assert "the job was cancelled or requeued by somebody else" in run.log()
    assert "requeued\n" not in run.log()


def test_a_refused_run_is_not_tried_again(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("refused")
    (job,) = run.submit(*options(run, standin("leave refused false 2")))
    ended = cluster.wait_for(job, seconds=LIFE_S)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), run.log()


def test_the_time_limit_itself(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    """Slurm's own warning and its limit, of which it takes a minute as the least, for a run that heeds neither."""
    run = new_run("late")
    program = standin("[[ $LIFE == 2 ]] && leave finished false 0; trap '' TERM; while :; do sleep 0.2; done")
    (job,) = run.submit(*options(run, program), "--time", "1", "--warn-seconds", "30")
    assert ended_well(cluster.wait_for(job, seconds=2 * LIFE_S), restarts=1), run.log()
    assert "life 1 | the time limit comes near" in run.log()
    assert "life 1 | the time limit came before the run had saved" in run.log()
    assert "life 2 | nodes" in run.log()


def test_gpus_are_asked_for(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("gpus")
    program = standin('echo "rank $RANK sees $CUDA_VISIBLE_DEVICES on $SLURMD_NODENAME"; leave finished false 0')
    gpus = ["--gpus-per-node", "2", "--ranks-per-node", "2", "--cpus-per-rank", "3"]
    (job,) = run.submit(*options(run, program), *gpus)
    ended = cluster.wait_for(job, seconds=LIFE_S)
    assert ended_well(ended, restarts=0), run.log()
    assert (ended["TresPerNode"], ended["NumTasks"], ended["CPUs/Task"]) == ("gres:gpu:2", "4", "3")
    first, second = cluster.nodes_of(job)
    assert sorted(line for line in run.log().splitlines() if line.startswith("rank ")) == [
        f"rank 0 sees 0,1 on {first}", f"rank 1 sees 0,1 on {first}",
        f"rank 2 sees 0,1 on {second}", f"rank 3 sees 0,1 on {second}",
    ]  # fmt: skip


def test_what_slurm_cannot_give_is_told_in_one_sentence(new_run: NewRun) -> None:
    run = new_run("impossible")
    words = ["--nodes", "2", "--gpus-per-node", "9", "--ranks-per-node", "2", "--submit"]
    told = run.launch(*words, check=False)
    assert told.returncode == 1
    assert told.stderr.count("\n") == 1
    assert told.stderr.startswith(f"trine: sbatch refuses {run.directory}/slurm/job.sbatch: ")
    assert "Requested node configuration is not available" in told.stderr


def test_a_folder_with_any_name(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("a b'c\"d 100% $HOME `x`#1 \u00e9")
    program = standin('printf "%s\\n" "$@" >"$RUN/words.$RANK"; leave finished false 0')
    hostile = f"checkpoint.directory=\"{run.directory.parent}/$(touch x) 'y'\""
    (job,) = run.submit(hostile, *options(run, program))
    assert ended_well(cluster.wait_for(job, seconds=LIFE_S), restarts=0), run.log()
    words = (run.directory / "words.3").read_text().splitlines()
    assert words[:3] == ["-m", "trine", "pretrain"]
    assert words[4:] == [f"run.directory={run.directory}", hostile]
    logs = {path.name for path in (run.directory / "slurm").glob("*.log")}
    assert logs == {f"{job}.log", f"{job}_0.log", f"{job}_1.log"}


def test_a_job_that_waits_is_cancelled(cluster: Cluster, new_run: NewRun, standin: Standin) -> None:
    run = new_run("waiting")
    (job,) = run.submit(*options(run, standin("leave finished false 0")), "--sbatch-arg=--begin=now+1hour")
    told = cluster.run(sys.executable, "-m", "trine", "launch", "stop", run.directory)
    assert told.stdout == f"cancelled {job}, which had not begun\n"
    assert cluster.wait_for(job, seconds=LIFE_S)["JobState"] == "CANCELLED"


def test_a_cluster_without_networks(shared: Path, recipe: Path, standin: Standin) -> None:
    """All nodes on this machine's loopback: the support code's other mode."""
    cluster = Cluster(shared / "plain", count=3, networks=False)
    try:
        cluster.start()
        run = Run(cluster, recipe, shared / "runs" / "plain")
        program = standin("[[ $LIFE == 2 ]] && leave finished false 0; while :; do sleep 0.2; done")
        (job,) = run.submit(*options(run, program), "--env", "MASTER_ADDR=127.0.0.1")
        cluster.wait_until(lambda: "life 1 | nodes" in run.log(), LIFE_S, "it does not begin")
        dead = cluster.nodes_of(job)[0]
        cluster.cut_power(dead)
        assert ended_well(cluster.wait_for(job, seconds=LIFE_S), restarts=1), run.log()
        assert dead not in cluster.nodes_of(job)
    finally:
        cluster.stop()
