"""What a run has left in its folder, read by somebody who trusts nothing."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import Run

from trine.configs.errors import RunError
from trine.pretrain.checkpoints import folder
from trine.pretrain.checkpoints.manifest import read_state, verify


@dataclass(frozen=True)
class Lines:
    """A file of JSON lines."""

    whole: list[dict[str, Any]]
    torn: list[int]
    """Numbers of the lines that are none, from 1; the last one may be cut short by a kill."""
    cut: bool
    """Whether the last line has no end."""

    @property
    def losses(self) -> dict[int, tuple[Any, ...]]:
        """Everything that must be repeated exactly of each step: of a step that is there twice, the last."""
        names = ("loss", "grad_norm", "lr", "tokens", "consumed_samples")
        return {line["step"]: tuple(line[name] for name in names) for line in self.whole if "loss" in line}

    @property
    def steps(self) -> list[int]:
        """The steps in the order of the file."""
        return [line["step"] for line in self.whole if "loss" in line]

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """Steps and validation losses in the order of the file."""
        return [(line["step"], line["validation_loss"]) for line in self.whole if "validation_loss" in line]


def read_lines(path: Path) -> Lines:
    """The lines of a file, which need not exist."""
    data = path.read_bytes() if path.exists() else b""
    whole: list[dict[str, Any]] = []
    torn: list[int] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn.append(number)
    return Lines(whole, torn, cut=bool(data) and not data.endswith(b"\n"))


@dataclass(frozen=True)
class Checkpoints:
    """The complete checkpoints of a run."""

    whole: dict[int, Path] = field(default_factory=dict)
    """By step, oldest first."""
    broken: dict[int, str] = field(default_factory=dict)
    """What is wrong with the others."""

    @property
    def newest(self) -> int:
        """The step of the newest whole one; 0 without one."""
        return max(self.whole, default=0)


def read_checkpoints(run: Run) -> Checkpoints:
    """Look at every byte of every complete checkpoint."""
    found = Checkpoints()
    for path in folder.complete(run.checkpoints):
        step = folder.step_of(path)
        try:
            verify(path)
            if read_state(path)["step"] != step:
                raise RunError(f"{path} holds another step")
            found.whole[step] = path
        except (RunError, OSError) as error:
            found.broken[step] = str(error)
    return found


def newest_step(run: Run) -> int:
    """The step of the newest complete checkpoint, by its name alone; 0 without one."""
    newest = folder.newest(run.checkpoints)
    return folder.step_of(newest) if newest else 0


def read_samples(run: Run) -> dict[str, list[Any]]:
    """What each data rank has read, line for line."""
    files = sorted((run.directory / "samples").glob("rank-*.jsonl"))
    return {path.name: [(line["step"], line["samples"]) for line in read_lines(path).whole] for path in files}


def tensor_hashes(path: Path) -> dict[str, str]:
    """The checksum of each file of tensors in a checkpoint."""
    files: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".distcp")}


def logged_steps(run: Run) -> list[int]:
    """The steps of the loss in TensorBoard."""
    return [event.step for event in _scalars(run, "lm loss")]


def goodput(run: Run) -> float | None:
    """The goodput that the trainer has last reported to TensorBoard."""
    values = _scalars(run, "resilience/goodput")
    return round(float(values[-1].value), 4) if values else None


def _scalars(run: Run, tag: str) -> list[Any]:
    # It tells each time that it has met the traces of a kill.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return list(events.Scalars(tag)) if tag in events.Tags()["scalars"] else []
