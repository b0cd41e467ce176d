"""``trine launch``: its commands, each of which checks a run and then starts it here, elsewhere or later."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import mpi_command, slurm_command
from .data_reports import AddCommand

SUMMARY = "start a run on a cluster, or keep one going here"

DESCRIPTION = """\
Start a run and keep it going: as a job of a Slurm cluster, under mpirun, or on this machine. What can be refused is
refused at once, before anything waits in a queue."""

_LOCAL = """\
Do what 'trine pretrain' does, and start the ranks again after a failure: they resume from the newest checkpoint. A run
that finished, was stopped or was refused is not started again."""

_LOCAL_EXAMPLES = """\
example:
  trine launch local configs/demo.yaml --nproc 2 --max-restarts 5

exit codes: 0 done; 1 failed; 2 wrong use; 75 stopped before the end, with everything saved; 130 stopped by Ctrl-C"""

_STATUS = """\
Tell how the last life of a run ended, what Slurm says of its jobs, and which checkpoint is the newest."""

_STATUS_EXAMPLES = """\
example:
  trine launch status runs/demo

exit codes: 0 done; 2 wrong use"""

_STOP = """\
Have a run save after the step at hand and end; the jobs of its chain that wait are cancelled. The same command that
started it continues it."""

_STOP_EXAMPLES = """\
example:
  trine launch stop runs/demo

exit codes: 0 done; 1 Slurm failed; 2 wrong use"""

Command = Callable[[argparse.Namespace], int]
AddRecipe = Callable[[argparse.ArgumentParser, str], None]
Words = Callable[[argparse.Namespace], list[str]]
"""The recipe and its overrides, checked, of parsed arguments."""
Launch = Callable[[Sequence[str], int | None], int]
"""Start ranks on this machine, as many as asked for, and wait for them."""


def add_commands(add: AddCommand, add_recipe: AddRecipe, words: Words, launch: Launch) -> None:
    """Add the commands by ``add``, with the recipe that they take by ``add_recipe``."""
    for module, name, run in (
        (slurm_command, "slurm", slurm_command.run_slurm),
        (mpi_command, "mpi", mpi_command.run_mpi),
    ):
        parser = add(name, module.SUMMARY, module.DESCRIPTION, module.EXAMPLES)
        add_recipe(parser, "the recipe of the run")
        module.add_options(parser)
        parser.set_defaults(command=_with_words(run, words), parser=parser)
    local = add("local", "here, again after each failure", _LOCAL, _LOCAL_EXAMPLES)
    add_recipe(local, "the recipe of the run")
    _add_local_options(local)
    local.set_defaults(command=_with_words(partial(_local, launch), words), parser=local)
    for name, run_one, summary, description, examples in (
        ("status", _status, "tell how a run is getting on", _STATUS, _STATUS_EXAMPLES),
        ("stop", _stop, "have a run save and end", _STOP, _STOP_EXAMPLES),
    ):
        parser = add(name, summary, description, examples)
        parser.add_argument("run", type=Path, metavar="RUN_DIRECTORY", help="the run.directory of the run")
        parser.set_defaults(command=run_one, parser=parser)


def _with_words(run: Callable[[argparse.Namespace, list[str]], int], words: Words) -> Command:
    return lambda arguments: run(arguments, words(arguments))


def _add_local_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start, as for trine pretrain")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="K",
        help="failures in a row without a new checkpoint after which it gives up (default: %(default)s)",
    )  # fmt: skip


def _local(launch: Launch, arguments: argparse.Namespace, words: list[str]) -> int:
    from ..configs.loading import load_config
    from ..pretrain.checkpoints.folder import newest
    from .restarts import keep_running

    checkpoints = load_config(Path(words[0]), words[1:]).checkpoint_directory
    return keep_running(
        lambda: launch(words, arguments.nproc), lambda: newest(checkpoints), arguments.max_restarts
    )


def _status(arguments: argparse.Namespace) -> int:
    from .run_status import print_status

    return print_status(arguments.run)


def _stop(arguments: argparse.Namespace) -> int:
    from .run_status import ask_to_stop

    return ask_to_stop(arguments.run)
