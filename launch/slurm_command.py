"""``trine launch slurm``: its options, and the story of a submission: check, write, hand over."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from ..configs.errors import UsageError
from .containers import RUNTIMES, parse_container, with_folders
from .slurm_options import SlurmOptions, check_word, pairs

if TYPE_CHECKING:
    from ..configs.schema import Config
    from .containers import Container
    from .slurm_script import SlurmJob

SUMMARY = "as a job of a Slurm cluster"

DESCRIPTION = """\
Check a run, and print the batch script that trains it on a Slurm cluster; --submit hands it to sbatch.

The script continues the run until it is finished: before the time limit it has the run save and is requeued, and after
a failure it is requeued as long as lives bring new checkpoints. A chain of jobs takes turns instead, where requeueing
is not allowed. The folder of the run must be on a file system that all nodes share."""

EXAMPLES = """\
examples:
  trine launch slurm configs/yoco/3b.yaml --nodes 4 --gpus-per-node 8
  trine launch slurm configs/yoco/3b.yaml train.steps=50000 --nodes 4 --gpus-per-node 8 --time 2-00 --submit
  trine launch slurm configs/demo.yaml --nodes 2 --gpus-per-node 0 --ranks-per-node 4 --sbatch-arg=--mem=8G

exit codes: 0 done; 1 Slurm failed; 2 wrong use"""

_NAMED = ("job-name", "partition", "account", "qos", "exclude")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the command, and what it does."""
    size = parser.add_argument_group("size and time")
    size.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    size.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of each; 0 for none")
    size.add_argument("--ranks-per-node", type=int, metavar="R", help="ranks on each (default: one per GPU)")
    size.add_argument("--cpus-per-rank", type=int, metavar="C", help="cores of each rank (default: what Slurm gives)")
    size.add_argument("--time", default="24:00:00", metavar="LIMIT", help="the time limit (default: %(default)s)")
    size.add_argument(
        "--warn-seconds", type=int, default=300, metavar="S",
        help="how long before the limit the run saves and stops (default: %(default)s)",
    )  # fmt: skip
    _add_names(parser.add_argument_group("what Slurm is told"))
    _add_environment(parser.add_argument_group("what the ranks find"))
    lives = parser.add_argument_group("lives")
    lives.add_argument(
        "--max-failures", type=int, default=3, metavar="K",
        help="lives in a row without a new checkpoint after which it gives up (default: %(default)s)",
    )  # fmt: skip
    lives.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs that take turns, not one requeued")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--dry-run", action="store_true", help="print the script (the default)")
    do.add_argument("--submit", action="store_true", help="write it into the run's folder and submit it")


def _add_names(group: argparse._ArgumentGroup) -> None:
    for option in ("--partition", "--account", "--qos"):
        group.add_argument(option, metavar="NAME")
    group.add_argument("--job-name", metavar="NAME", help="(default: from the run's folder)")
    group.add_argument("--exclude", metavar="NODES", help="nodes that are not used, such as node[3,7-9]")
    group.add_argument(
        "--sbatch-arg", action="append", default=[], metavar="ARG",
        help="a further option of sbatch, as in --sbatch-arg=--constraint=ib; may be repeated",
    )  # fmt: skip


def _add_environment(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--launcher", choices=("srun", "torchrun"), default="srun", help="(default: %(default)s)")
    group.add_argument("--python", metavar="PATH", help="(default: this one; in a container: python)")
    group.add_argument("--env", action="append", default=[], metavar="K=V", help="a variable; may be repeated")
    group.add_argument("--container", metavar="IMAGE", help="run the ranks in a container")
    group.add_argument("--container-runtime", choices=RUNTIMES, help="what starts it")
    group.add_argument(
        "--mount", action="append", default=[], metavar="SRC:DST",
        help="a folder that the container sees, beside those of the run; may be repeated",
    )  # fmt: skip


def run_slurm(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Print or submit the script for the run of ``words``: a recipe and its overrides.

    Returns 0. Raises UsageError before anything is written, RunError when Slurm fails.
    """
    from .slurm_script import script_of

    job = checked_job(arguments, words)
    if arguments.submit:
        return _submit(job)
    sys.stdout.write(script_of(job))
    return 0


def checked_job(arguments: argparse.Namespace, words: Sequence[str]) -> SlurmJob:
    """The job that the options describe. Raises UsageError, or RunError for damaged data, as ``checked_config``."""
    from .run_checks import checked_config
    from .slurm_script import SlurmJob

    ranks = arguments.gpus_per_node if arguments.ranks_per_node is None else arguments.ranks_per_node
    options, container = _options(arguments, ranks), _container(arguments)
    options.check()
    check_word("the command", " ".join(arguments.typed))
    recipe, *overrides = words
    config = checked_config(Path(recipe), overrides, [ranks] * options.nodes, "--ranks-per-node", options.python)
    run = config.run.directory.absolute()
    for name, path, _ in _folders(Path(recipe), config):
        check_word(name, str(path))
    if "\\" in str(run):  # with which Slurm's names of files quote
        raise UsageError(f"run.directory={run} holds a backslash, which Slurm takes for something else: rename it")
    if container is not None:
        container = with_folders(container, _folders(Path(recipe), config))
    return SlurmJob(
        typed=("trine", *arguments.typed),
        directory=Path.cwd(),
        words=(str(Path(recipe).absolute()), *overrides),
        run=run,
        checkpoints=config.checkpoint_directory.absolute(),
        steps=config.train.steps,
        collective_timeout=config.watch.collective_timeout,
        options=_with_job_name(options, run),
        container=container,
    )


def _options(arguments: argparse.Namespace, ranks: int) -> SlurmOptions:
    given = {name: getattr(arguments, name.replace("-", "_")) for name in _NAMED}
    return SlurmOptions(
        nodes=arguments.nodes,
        ranks_per_node=ranks,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_rank=arguments.cpus_per_rank,
        time=arguments.time,
        warn_seconds=arguments.warn_seconds,
        names=tuple((name, value) for name, value in given.items() if value is not None),
        arguments=tuple(arguments.sbatch_arg),
        environment=pairs("--env", arguments.env),
        launcher=arguments.launcher,
        max_failures=arguments.max_failures,
        chain=arguments.chain,
        python=arguments.python or ("python" if arguments.container else sys.executable),
    )


def _container(arguments: argparse.Namespace) -> Container | None:
    return parse_container(arguments.container, arguments.container_runtime, arguments.mount)


def _with_job_name(options: SlurmOptions, run: Path) -> SlurmOptions:
    """With a name that no other run has: jobs of a chain wait for those of their name."""
    if any(name == "job-name" for name, _ in options.names):
        return options
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', run.name)}-{crc32(os.fsencode(run)):08x}"
    return replace(options, names=(("job-name", name), *options.names))


def _folders(recipe: Path, config: Config) -> Iterator[tuple[str, Path, bool]]:
    """What ranks read and write, and whether they write it; those that are written come first."""
    from .run_checks import local_data

    yield "run.directory", config.run.directory.absolute(), True
    yield "checkpoint.directory", config.checkpoint_directory.absolute(), True
    if config.data.cache is not None:
        yield "data.cache", config.data.cache.absolute(), True
    yield "the working directory", Path.cwd(), False
    yield "the folder of the recipe", recipe.absolute().parent, False
    for folder in local_data(config):
        yield "data.directory", folder.absolute(), False


def _submit(job: SlurmJob) -> int:
    from . import slurm_jobs
    from .rank_log import make_log_directory
    from .slurm_script import script_of

    script = job.log_directory / slurm_jobs.SCRIPT
    _refuse_finished(job)
    make_log_directory(script.parent)
    with slurm_jobs.only_one(script.parent):
        _refuse_second(job)
        slurm_jobs.write(script, script_of(job))
        _begin_anew(job)
        jobs = slurm_jobs.submit(script, dict(job.options.names)["job-name"], job.options.chain)
    print(f"submitted {', '.join(jobs)}: {script}")
    print(f"  follow  tail -F {shlex.quote(str(job.log_directory))}/{jobs[0]}*.log")
    print(f"  look    trine launch status {shlex.quote(str(job.run))}")
    print(f"  stop    trine launch stop {shlex.quote(str(job.run))}")
    return 0


def _refuse_finished(job: SlurmJob) -> None:
    from ..pretrain import exit_state

    state = exit_state.read(job.run)
    if state is not None and state.outcome == "finished" and state.step >= job.steps:
        raise UsageError(
            f"{job.run} has finished its {state.step} steps: raise train.steps={job.steps} to train further, or choose "
            "another run.directory"
        )


def _refuse_second(job: SlurmJob) -> None:
    from . import slurm_jobs

    submission = slurm_jobs.recall(job.run)
    live = slurm_jobs.live_jobs(submission) if submission else []
    if live:
        raise UsageError(
            f"{job.run} has job {live[0]} already: stop it with 'trine launch stop {job.run}', after which it saves "
            f"and ends, or with 'scancel {' '.join(state.number for state in live)}'"
        )


def _begin_anew(job: SlurmJob) -> None:
    """Forget what would keep a script from starting: failures that were counted, and a person's stop."""
    from ..pretrain import exit_state
    from .slurm_jobs import LIVES

    (job.log_directory / LIVES).unlink(missing_ok=True)
    state = exit_state.read(job.run)
    if state is not None and state.outcome == "stopped":
        (job.run / exit_state.NAME).unlink(missing_ok=True)
