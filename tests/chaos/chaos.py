"""A run among faults: it must end as the same run without any, to the last bit.

    python tests/chaos/chaos.py --seed 7 --faults 26 --report chaos.json

The command trains a small model on two ranks; faults of all kinds hit it at random moments, which the seed decides as
far as time allows, and a supervisor starts the same command again after each life. Needs root, since it fills a disk
that it mounts, and Debian's datefudge. Exit code 0: everything as promised; 1: not; 2: wrong use.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from campaign import Campaign, Told
from company import datefudge_library
from demo import LAYOUTS, Run, prepare
from fault import Pace, Scene
from life import LONG_S, Life
from plan import KINDS, draw
from promises import differences, same_samples
from remains import goodput, read_checkpoints, read_lines
from report import line, summary, table
from small_disk import small_disk

REPOSITORY = Path(__file__).resolve().parents[2]
_MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        datefudge_library()
        with _scratch(options.keep) as folder:
            document = _chaos(options, folder)
            if options.report:
                options.report.write_text(json.dumps(document, indent=1) + "\n")
            return 1 if document["problems"] else 0
    except RuntimeError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="draws faults and moments (default: %(default)s)")
    parser.add_argument(
        "--faults", type=int, default=KINDS, metavar="N", help="at least so many; each kind occurs (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=180, help="length of the run (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, help="of the two ranks (default: the seed decides)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what happened there as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy consoles and the run's folder there")
    return parser.parse_args(argv)


@contextmanager
def _scratch(keep: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="trine-chaos-"))
    try:
        yield folder
    finally:
        if keep is not None:
            shutil.copytree(folder, keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _chaos(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    started, dice = time.monotonic(), Random(options.seed)
    layout = dice.choice(list(LAYOUTS))
    layout = options.layout or layout
    recipe = prepare(folder, layout, options.steps, REPOSITORY)
    reference = Run(folder / "fault-free", recipe, options.steps)
    pace = _fault_free(reference, folder)
    print(f"fault-free: {options.steps} steps of {pace.step_s:.2f} s on {layout}, {pace.start_s:.0f} s to start", flush=True)
    # Damaged checkpoints stay where they are.
    size = (12 + options.faults // 2) * pace.checkpoint_bytes + 32 * _MIB
    with small_disk(folder / "disk", size) as disk:
        run = Run(disk.folder / "run", recipe, options.steps)
        scene = Scene(run, disk, pace)
        campaign = Campaign(scene, draw(options.seed, options.faults, scene), dice, folder, _say)
        try:
            campaign.run()
            document = _document(options, layout, campaign, run, reference, time.monotonic() - started)
        finally:
            disk.clear()
            if options.keep is not None:
                shutil.copytree(run.directory, options.keep / "run", dirs_exist_ok=True)
    print(f"\n{table(campaign.told)}\n\n{summary(document)}", flush=True)
    return document


def _fault_free(run: Run, folder: Path) -> Pace:
    """The run without faults, which also shows how fast this machine is. Raises RuntimeError where it fails."""
    life = Life(run, 0, folder / "life-00")
    try:
        life.wait(lambda: life.first_step_at is not None, "the first step")
        start_s = (life.first_step_at or 0.0) - life.started
        if code := life.wait_ended(LONG_S):
            raise RuntimeError(f"the run without faults ends with {code}: {life.console}")
    finally:
        life.kill()
    lines = read_lines(run.directory / "metrics.jsonl").whole
    newest = read_checkpoints(run).whole[run.steps]
    return Pace(
        start_s,
        step_s=statistics.median(entry["step_time_s"] for entry in lines if "loss" in entry),
        save_s=statistics.median(entry["total_s"] for entry in lines if "checkpoint" in entry),
        checkpoint_bytes=sum(path.stat().st_size for path in newest.iterdir()),
    )


def _say(told: Told) -> None:
    print(line(told), flush=True)


def _document(
    options: argparse.Namespace, layout: str, campaign: Campaign, run: Run, reference: Run, seconds: float
) -> dict[str, Any]:
    problems = list(campaign.problems)
    if campaign.finished:
        problems += differences(run, reference, disk_was_full=campaign.disk_was_full)
    last = [read_lines(one.directory / "metrics.jsonl").losses.get(options.steps) for one in (run, reference)]
    totals = {
        "faults": len(campaign.told),
        "kinds": len({told.fault for told in campaign.told}),
        "lives": campaign.lives,
        "seconds": round(seconds, 1),
        "repeated": sum(told.repeated or 0 for told in campaign.told),
        "goodput": goodput(run),
        "loss": last[0] and last[0][0],
        "loss_fault_free": last[1] and last[1][0],
        "same_samples": same_samples(run, reference),
    }
    told = [entry.document() for entry in campaign.told]
    return {
        "seed": options.seed, "layout": layout, "steps": options.steps, "totals": totals, "problems": problems,
        "faults": told,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
