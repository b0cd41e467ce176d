"""What a batch script does at each end of a life: the script itself, under a Slurm of a few lines.

``srun`` does what a test says, ``scontrol requeue`` ends the script, as Slurm does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import write_run

from trine.launch.cli import main

pytestmark = pytest.mark.timeout(60)

REQUEUED = -signal.SIGKILL
DEADLINE_S = 30.0

SCONTROL = """\
#!/bin/bash
echo "$@" >>calls
[[ $1 == -o ]] && shift
case $1 in
  show) [[ $2 == job ]] && echo "JobId=7 JobState=${JOB_STATE:-RUNNING} Reason=${REASON:-None} Restarts=${SLURM_SAYS:-0} BatchFlag=1" || echo node1 ;;
  requeue) [[ ${NO_REQUEUE:-} ]] && exit 1; kill -KILL $PPID ;;
esac
"""

SRUN = """\
#!/bin/bash
leave() { printf '{\\n "outcome": "%s",\\n "resume": %s,\\n "reason": "it \\\\"so\\\\" ended",\\n "step": %d\\n}\\n' "$1" "$2" "$3" >run/exit_state.json; exit "$4"; }
echo "$@" >>steps
eval "$DOES"
"""


@dataclass
class Batch:
    """A script, and where it runs."""

    folder: Path
    path: Path

    def start(self, does: str, **environment: str) -> subprocess.Popen[str]:
        """Start it for a step that does this."""
        variables = {
            "PATH": f"{self.folder}/tools:/usr/bin:/bin",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node1",
            "DOES": does,
        } | environment
        return subprocess.Popen(
            ["bash", str(self.path)], cwd=self.folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def run(self, does: str, **environment: str) -> tuple[int, str]:
        """Its exit code, and what it says."""
        process = self.start(does, **environment)
        said, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said

    def wait_for(self, *names: str) -> None:
        """Wait until files are there."""
        deadline = time.monotonic() + DEADLINE_S
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, names
            time.sleep(0.02)

    @property
    def steps(self) -> int:
        """How often ranks were started."""
        path = self.folder / "steps"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def requeues(self) -> int:
        """How often Slurm was asked to start the job again."""
        return (self.folder / "calls").read_text().splitlines().count("requeue 7")


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Batch]:
    """Make the script of a run of 1000 steps, with these options."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)

    def make(*words: str) -> Batch:
        size = ["--nodes", "1", "--gpus-per-node", "0", "--ranks-per-node", "2"]
        assert main(["launch", "slurm", "recipe.yaml", *size, *words]) == 0
        path = tmp_path / "job.sbatch"
        path.write_text(capsys.readouterr().out)
        return Batch(tmp_path, path)

    return make


ENDS = {
    "finished": ("leave finished false 1000 0", 0, 0),
    "stopped to be continued": ("leave stopped true 7 75", REQUEUED, 0),
    "stopped by a person": ("leave stopped false 7 75", 0, 0),
    "refused": ("leave refused false 0 2", 2, 2),
    "refused before it may write": ("exit 2", 2, 2),
    "failed": ("leave failed true 7 1", REQUEUED, 1),
    "killed": ("kill -KILL $$", REQUEUED, 1),
    "without a word, after a stop whose signal reached torchrun": ("exit 0", REQUEUED, 1),
}
"""What a step does; the exit code where a job is requeued, and that in a chain."""


@pytest.mark.parametrize("end", ENDS)
def test_ends(end: str, batch: Callable[..., Batch]) -> None:
    does, code, _ = ENDS[end]
    job = batch()
    found, said = job.run(does)
    assert found == code, said
    assert job.requeues == (code == REQUEUED)
    assert "srun ended with code" in said


@pytest.mark.parametrize("end", ENDS)
def test_ends_in_a_chain(end: str, batch: Callable[..., Batch]) -> None:
    does, _, code = ENDS[end]
    job = batch("--chain", "3")
    found, said = job.run(does)
    assert found == code, said
    assert job.requeues == 0


def test_the_reason_is_told(batch: Callable[..., Batch]) -> None:
    said = batch().run("leave stopped false 7 75")[1]
    assert 'the run says: stopped at step 7 (it \\"so\\" ended)' in said


def test_what_an_earlier_life_said_is_not_taken_for_this_one(batch: Callable[..., Batch]) -> None:
    job = batch()
    job.run("leave stopped true 7 75")
    code, said = job.run("kill -KILL $$")
    assert (code, "the run says: none at step 0" in said) == (REQUEUED, True), said


def test_a_finished_run_is_not_started_again(batch: Callable[..., Batch]) -> None:
    job = batch()
    job.run("leave finished false 1000 0")
    code, said = job.run("exit 1")
    assert (code, job.steps) == (0, 1)
    assert "nothing to do: the run has finished its 1000 steps" in said
    assert batch("train.steps=2000").run("leave finished false 2000 0")[0] == 0
    assert job.steps == 2


def test_a_chain_ends_with_a_persons_stop(batch: Callable[..., Batch]) -> None:
    job = batch("--chain", "3")
    job.run("leave stopped false 7 75")
    code, said = job.run("exit 1")
    assert (code, job.steps) == (0, 1)
    assert "nothing to do: it \\\"so\\\" ended; remove" in said


def test_it_gives_up(batch: Callable[..., Batch]) -> None:
    job = batch("--max-failures", "2")
    assert job.run("exit 1")[0] == REQUEUED
    code, said = job.run("leave failed true 0 1")
    assert code == 1
    assert "giving up: 2 lives in a row made no new checkpoint (the newest is none)" in said
    # Slurm itself requeues after the loss of a node: those lives do not come to their end here, but count.
    code, said = job.run("exit 0")
    assert (code, job.steps) == (1, 2), said
    # Another job begins to count anew.
    assert job.run("exit 1", SLURM_JOB_ID="8")[0] == REQUEUED


def test_a_chain_counts_over_its_jobs(batch: Callable[..., Batch]) -> None:
    job = batch("--max-failures", "2", "--chain", "5")
    for number in range(3):
        code, said = job.run("exit 1", SLURM_JOB_ID=str(number))
        assert (code, "giving up" in said) == (1, number > 0)
    assert job.steps == 2


def test_new_checkpoints_and_stops_are_no_failures(batch: Callable[..., Batch]) -> None:
    job = batch("--max-failures", "1")
    for number in (99_999_999, 100_000_000):  # in the order of numbers, not of names
        code, said = job.run(f"mkdir -p run/checkpoints/step-{number}; exit 1")
        assert code == REQUEUED, said
        assert job.run("leave stopped true 7 75")[0] == REQUEUED
    code, said = job.run("mkdir -p run/checkpoints/step-100000001.writing run/checkpoints/step-5; exit 1")
    assert (code, "the newest is step-100000000" in said) == (1, True), said


def test_a_garbled_count_is_none(batch: Callable[..., Batch]) -> None:
    job = batch("--max-failures", "1")
    (job.folder / "run" / "slurm").mkdir(parents=True)
    (job.folder / "run" / "slurm" / "lives").write_text("7 $(touch pwned)9 none\n")
    assert job.run("mkdir -p run/checkpoints/step-00000001; exit 1")[0] == REQUEUED
    assert not (job.folder / "pwned").exists()


def test_a_warning_is_handed_on(batch: Callable[..., Batch]) -> None:
    job = batch()
    does = "touch up; until [[ -e run/stop ]]; do sleep 0.05; done; [[ $(<run/stop) == requeue ]] && leave stopped true 7 75"
    process = job.start(does)
    job.wait_for("up")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == REQUEUED, said
    assert "the time limit comes near" in said
    assert "srun ended with code 75; the run says: stopped at step 7" in said
    assert not (job.folder / "run" / "stop").exists()


def test_a_warning_reaches_ranks_that_were_just_starting(batch: Callable[..., Batch]) -> None:
    job = batch()
    process = job.start("touch up; until rm run/stop; do sleep 0.05; done; until [[ -e run/stop ]]; do sleep 0.05; done; leave stopped true 0 75")
    job.wait_for("up")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == REQUEUED, said


def test_a_persons_stop_stays_one(batch: Callable[..., Batch]) -> None:
    job = batch()
    does = "touch run/stop up; until [[ -e go ]]; do sleep 0.05; done; [[ -s run/stop ]] || leave stopped false 7 75"
    process = job.start(does)
    job.wait_for("up", "run/stop")
    process.send_signal(signal.SIGUSR1)
    (job.folder / "go").touch()
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, said


@pytest.mark.parametrize(
    ("state", "reason", "code"),
    [
        ("COMPLETING", "None", 0),  # scancel, or Slurm's own requeue
        ("COMPLETING", "TimeLimit", REQUEUED),  # the limit came before the run had saved
        ("RUNNING", "None", REQUEUED),  # a preemption's time of grace
    ],
)
def test_sigterm(state: str, reason: str, code: int, batch: Callable[..., Batch]) -> None:
    job = batch()
    does = "touch up; until [[ -e run/stop ]]; do sleep 0.05; done; leave stopped true 7 75"
    process = job.start(does, JOB_STATE=state, REASON=reason)
    job.wait_for("up")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, said
    assert job.requeues == (code == REQUEUED)


def test_a_life_that_was_given_up_leaves_the_next_one_alone(batch: Callable[..., Batch]) -> None:
    """Its node was cut off, and comes back when Slurm has started the job again elsewhere."""
    job = batch()
    code, said = job.run("leave failed true 7 1", SLURM_SAYS="1")
    assert (code, job.requeues) == (1, 0)
    assert "it may have started the job again elsewhere" in said
    process = job.start("touch up; until [[ -e go ]]; do sleep 0.05; done", SLURM_SAYS="1", JOB_STATE="RUNNING")
    job.wait_for("up")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)  # in which it would have told the next life to stop
    (job.folder / "go").touch()
    said, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, job.requeues) == (0, 0), said
    assert not (job.folder / "run" / "stop").exists()


def test_a_site_that_does_not_requeue(batch: Callable[..., Batch]) -> None:
    code, said = batch().run("leave stopped true 7 75", NO_REQUEUE="1")
    assert code == 1
    assert "Slurm does not requeue this job: submit it again, or use --chain" in said


def test_a_folder_that_cannot_be_made(batch: Callable[..., Batch]) -> None:
    job = batch()
    (job.folder / "run").write_text("")
    assert job.run("exit 0")[0] == 1
    assert job.steps == 0


def test_it_needs_bash_coreutils_and_slurm_alone(batch: Callable[..., Batch]) -> None:
    job = batch()
    for name in "bash cat date head mkdir mv rm sleep touch".split():
        os.symlink(f"/usr/bin/{name}", job.folder / "tools" / name)
    code, said = job.run("leave stopped true 7 75", PATH=f"{job.folder}/tools")
    assert (code, "not found" in said) == (REQUEUED, False), said
