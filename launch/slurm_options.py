"""What is asked of Slurm for a run: the values of the options, checked one by one and together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..configs.errors import UsageError

# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ARGUMENT = re.compile(r"--([a-z][a-z0-9-]*)(=.*)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
_OWN = (
    "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos",
    "job-name", "exclude", "requeue", "no-requeue", "open-mode", "signal", "output", "error", "chdir", "array", "wrap",
    "parsable", "test-only",
)  # fmt: skip
"""Options of sbatch that the script sets itself, or that would make another kind of job of it."""


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of Slurm, and how its ranks are started."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int | None
    time: str
    """As Slurm writes limits: ``24:00:00``, ``2-12``, ``90``."""
    warn_seconds: int
    """How long before the time limit Slurm tells the script of it."""
    names: tuple[tuple[str, str], ...]
    """Values that Slurm knows by name: partition, account, qos, job-name, exclude."""
    arguments: tuple[str, ...]
    """Further options of sbatch, as ``--name`` or ``--name=value``."""
    environment: tuple[tuple[str, str], ...]
    launcher: Literal["srun", "torchrun"]
    max_failures: int
    """Lives in a row without a new checkpoint after which the script gives up."""
    chain: int
    """Jobs that take turns; with 1 the job is requeued instead."""
    python: str

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node

    def check(self) -> None:
        """Raise UsageError with one sentence for the first value that cannot be."""
        self._check_numbers()
        for name, value in self.names:
            check_word(f"--{name}", value)
            if " " in value:
                raise UsageError(f"--{name}={value!r} holds a space, which no such name of Slurm does: take it out")
        for argument in self.arguments:
            _check_argument(argument, self.chain)
        for name, value in self.environment:
            _check_variable(name, value)
        check_word("--python", self.python)
        self._check_time()

    def _check_numbers(self) -> None:
        least = {
            "--nodes": (self.nodes, 1),
            "--gpus-per-node": (self.gpus_per_node, 0),
            "--ranks-per-node": (self.ranks_per_node, 1),
            "--cpus-per-rank": (self.cpus_per_rank, 1),
            "--warn-seconds": (self.warn_seconds, 1),
            "--max-failures": (self.max_failures, 1),
            "--chain": (self.chain, 1),
        }
        for option, (value, minimum) in least.items():
            if value is not None and value < minimum:
                hint = "; machines without GPUs need it" if option == "--ranks-per-node" else ""
                raise UsageError(f"{option} {value} is too few: use {minimum} or more{hint}")
        if 0 < self.gpus_per_node < self.ranks_per_node:
            raise UsageError(
                f"--ranks-per-node {self.ranks_per_node} is more than --gpus-per-node {self.gpus_per_node}, and each "
                f"rank needs a GPU of its own: use {self.gpus_per_node} or fewer"
            )

    def _check_time(self) -> None:
        if self.warn_seconds > 65535:  # Slurm keeps 16 bits
            raise UsageError(f"--warn-seconds {self.warn_seconds} is more than Slurm takes: use 65535 or less")
        limit = seconds_of_limit(self.time)
        if limit <= self.warn_seconds:
            raise UsageError(
                f"--time {self.time} is {limit} seconds, not longer than --warn-seconds {self.warn_seconds}, so the "
                "run would be told to save before it begins: raise the one or lower the other"
            )


def seconds_of_limit(text: str) -> int:
    """The seconds of a time limit as Slurm writes it. Raises UsageError for anything else."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise UsageError(
            f"--time {text} is no time limit: write minutes, or hours:minutes:seconds as in 24:00:00, or "
            "days-hours as in 2-12"
        )
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    first, second, third = parts
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)


def pairs(option: str, words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``NAME=VALUE`` words as pairs. Raises UsageError for a word without an equals sign."""
    for word in words:
        if "=" not in word:
            raise UsageError(f"{option} {word} is no NAME=VALUE: write for example {option} NCCL_IB_HCA=mlx5")
    return tuple((word.partition("=")[0], word.partition("=")[2]) for word in words)


def check_word(name: str, value: str) -> None:
    """Raise UsageError unless ``value``, which ``name`` gives, is text on one line.

    A line break would begin a new line of the script, where anything could stand.
    """
    if not value.strip():
        raise UsageError(f"{name} is empty: give it a value, or leave it out")
    if _CONTROL.search(value):
        raise UsageError(f"{name}={value!r} holds a line break or another control character: take it out")


def _check_argument(argument: str, chain: int) -> None:
    check_word("--sbatch-arg", argument)
    found = _ARGUMENT.fullmatch(argument)
    if found is None:
        raise UsageError(
            f"--sbatch-arg={argument} is no long option of sbatch: write it as in --sbatch-arg=--constraint=ib"
        )
    # sbatch takes any beginning of a name that is clear.
    own = next((name for name in _OWN if name.startswith(found[1])), None)
    if own is not None:
        raise UsageError(
            f"--sbatch-arg={argument} would change --{own}, which the script needs as it is: use the options of "
            "trine launch slurm"
        )
    if chain > 1 and found[1] in ("dependency", "kill-on-invalid-dep"):
        raise UsageError(
            f"--sbatch-arg={argument} does not go with --chain {chain}, whose jobs wait for each other: leave one out"
        )


def _check_variable(name: str, value: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise UsageError(f"--env {name}={value} does not begin with the name of a variable: use letters, digits and _")
    if value:
        check_word(f"--env {name}", value)
