"""The story of ``trine parity``: plan, run, tell, write."""

from __future__ import annotations

import sys

import torch

from ..configs.errors import RunError, UsageError
from ..configs.schema import Config
from ..pretrain.parity import StepsOfRank
from .parity import Row, make_plan, run_plan
from .parity_report import document, footer, header, passed, reference_line, table_line
from .targets import STANDARD_OUTPUT, check_target, write_json


def run_parity(
    config: Config,
    recipe: str,
    *,
    layouts: str | None,
    steps: int,
    seconds: float,
    device: str | None,
    json_target: str | None,
) -> int:
    """Compare and print; the table goes to standard output, or to standard error where that is for the JSON.

    Args:
        recipe: how the table calls the configuration.
        json_target: a file, or ``-`` for standard output.

    Returns:
        0 when every layout agrees, else 1.

    Raises:
        UsageError: the layouts or the options cannot be; nothing was started.
        RunError: the reference failed, or the JSON cannot be written.
    """
    if not seconds > 0:
        raise UsageError(f"--timeout {seconds:g} leaves no time: use more than 0")
    check_target("--json", json_target)
    plan = make_plan(config, layouts, steps=steps, gpus=_gpus(device))
    table = sys.stderr if json_target == STANDARD_OUTPUT else sys.stdout

    def say(text: str) -> None:
        print(text, file=table, flush=True)

    def tell_reference(reference: StepsOfRank, took: float) -> None:
        say(reference_line(plan, reference, took))

    def tell_row(row: Row) -> None:
        say(table_line(plan, row))
        if row.trace:
            print(row.trace.rstrip(), file=sys.stderr, flush=True)

    say(header(plan, recipe))
    try:
        rows = run_plan(plan, seconds=seconds, on_reference=tell_reference, on_row=tell_row)
    except RunError as error:
        for note in getattr(error, "__notes__", ()):
            print(note, file=sys.stderr)
        raise
    say(footer(rows))
    if json_target is not None:
        write_json(document(plan, rows), json_target)
    return 0 if passed(rows) else 1


def _gpus(device: str | None) -> int:
    """GPUs to use: none where a single one leaves nothing to divide over, unless it is asked for."""
    count = torch.cuda.device_count()
    if device == "gpu" and not count:
        raise UsageError("--device gpu needs a GPU and torch finds none: use --device cpu")
    return count if device == "gpu" or (device is None and count > 1) else 0
