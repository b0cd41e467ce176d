"""Training on a Slurm cluster, with the scripts that users get: over nodes, through warnings, failures and chains."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from slurm_cluster import Cluster
from slurm_runs import LAYOUT, LIFE_S, SIZE, Run, ended_well

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

NewRun = Callable[[str], Run]
LIVES_S = 2 * LIFE_S


def test_eight_ranks_on_two_nodes_train_as_one_process(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("eight")
    (job,) = run.submit("train.steps=4", *LAYOUT, *SIZE, "4")
    assert ended_well(cluster.wait_for(job, seconds=LIFE_S), restarts=0), run.log()
    assert "layout      8 ranks: tensor 2, pipeline 2, data 2" in run.log()
    run.assert_same_as(whole, steps=4)


def test_deepspeed_trains_over_nodes_as_one_process(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("deepspeed")
    zero = ("engine=deepspeed", "deepspeed.zero_optimization.stage=3", "parallel.tensor=2", "parallel.sequence=true")
    (job,) = run.submit("train.steps=4", *zero, *SIZE, "4")
    assert ended_well(cluster.wait_for(job, seconds=LIFE_S), restarts=0), run.log()
    assert "layout      8 ranks: tensor 2, data 4 with sequence parallelism" in run.log()
    run.assert_same_as(whole, steps=4)


def test_a_run_that_is_warned_saves_and_is_continued(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("warned")
    (job,) = run.submit(*LAYOUT, *SIZE, "2")
    run.wait_for_step(3)
    cluster.run("scancel", "--batch", "-s", "USR1", job)  # as Slurm does some time before the limit
    assert ended_well(cluster.wait_for(job, seconds=LIVES_S), restarts=1), run.log()
    run.assert_same_as(whole)
    told = run.log()
    assert "life 1 | the time limit comes near" in told
    assert "stopped at step" in told
    assert "life 2 | srun ended with code 0; the run says: finished at step 40" in told
    assert not (run.directory / "stop").exists()


def test_a_node_without_power_is_replaced(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("power")
    (job,) = run.submit(*LAYOUT, *SIZE, "2")
    run.wait_for_step(6)
    _, dead = cluster.nodes_of(job)
    cluster.cut_power(dead)
    try:
        ended = cluster.wait_for(job, seconds=LIVES_S)
        assert dead not in cluster.nodes_of(job)
    finally:
        cluster.start_node(dead)
    assert ended_well(ended, restarts=1), run.log()
    assert f"life 2 | nodes {ended['NodeList']}; begins from checkpoint step-" in run.log()
    run.assert_same_as(whole)


def test_a_chain_goes_on_to_the_last_step(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("chain")
    jobs = run.submit(*LAYOUT, *SIZE, "2", "--chain", "3")
    assert len(jobs) == 3
    run.wait_for_step(3)
    cluster.run("scancel", "--batch", "-s", "USR1", jobs[0])
    for job in jobs:
        assert ended_well(cluster.wait_for(job, seconds=LIVES_S), restarts=0), run.log()
    run.assert_same_as(whole)
    told = run.log()
    assert f"job {jobs[0]}, life 1 | the next job of the chain goes on" in told
    assert f"job {jobs[2]}, life 1 | nothing to do: the run has finished its 40 steps" in told


def test_torchrun_on_each_node(cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run("torchrun")
    (job,) = run.submit(*LAYOUT, *SIZE, "2", "--launcher", "torchrun")
    run.wait_for_step(3)
    cluster.run("scancel", "--full", "-s", "USR1", job)  # to the script, every torchrun and every rank
    assert ended_well(cluster.wait_for(job, seconds=LIVES_S), restarts=1), run.log()
    run.assert_same_as(whole)
    assert "life 1 | srun ended with code 0; the run says: stopped at step" in run.log()


def test_one_run_has_one_life_at_a_time(cluster: Cluster, new_run: NewRun) -> None:
    run = new_run("twice")
    words = ("train.steps=100000", *LAYOUT, *SIZE, "2")
    (job,) = run.submit(*words)
    run.wait_for_step(2)
    second = run.launch(*words, "--submit", check=False)
    assert second.returncode == 2
    assert second.stderr.startswith(f"trine: {run.directory} has job {job} RUNNING on node")
    assert second.stderr.count("\n") == 1
    status = cluster.run(sys.executable, "-m", "trine", "launch", "status", run.directory).stdout
    assert f"job         {job} RUNNING on node" in status

    forced = cluster.run("sbatch", "--parsable", "--job-name=forced", run.directory / "slurm" / "job.sbatch")
    refused = cluster.wait_for(forced.stdout.strip(), seconds=LIFE_S)
    assert (refused["JobState"], refused["ExitCode"], refused["Restarts"]) == ("FAILED", "2:0", "0"), run.log()
    assert "is in use by process" in run.log()

    done = run.metrics()[-1]["step"]
    run.wait_for_step(done + 2)  # the first goes on
    cluster.run(sys.executable, "-m", "trine", "launch", "stop", run.directory)
    assert ended_well(cluster.wait_for(job, seconds=LIFE_S), restarts=0), run.log()
    assert (run.state()["outcome"], run.state()["resume"]) == ("stopped", False)
    assert [m["step"] for m in run.metrics()] == list(range(1, run.state()["step"] + 1))


@pytest.mark.parametrize("which", [0, 1], ids=["node of the script and of rank 0", "another node"])
def test_ranks_that_are_cut_off_do_no_harm(which: int, cluster: Cluster, new_run: NewRun, whole: Run) -> None:
    run = new_run(f"cable-{which}")
    (job,) = run.submit(*LAYOUT, *SIZE, "2")
    run.wait_for_step(6)
    cut = cluster.nodes_of(job)[which]
    old = [process for process in cluster.processes(cut) if "pretrain" in process.cmdline()]
    assert old
    cluster.pull_cable(cut)
    try:
        cluster.wait_until(lambda: "life 2 | nodes" in run.log(), LIFE_S, "the job did not begin a second life")
        assert any(process.is_running() for process in old), "nobody is cut off any more"
        ended = cluster.wait_for(job, seconds=LIVES_S)
        survivors = [process for process in old if process.is_running()]
    finally:
        cluster.plug_cable(cut)
    assert ended_well(ended, restarts=1), run.log()
    run.assert_same_as(whole)
    cluster.wait_until(lambda: not any(process.is_running() for process in survivors), LIFE_S, "Slurm left old ranks")
    # What woke up there has changed nothing, and asked nobody to stop.
    run.assert_same_as(whole)
    assert not (run.directory / "stop").exists()
    assert ended_well(cluster.job(job), restarts=1)
