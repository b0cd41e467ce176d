"""``trine checkpoint``: its commands and their options. What they need is imported when they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..configs.errors import UsageError
from .checkpoint_places import find, find_many, told
from .data_reports import AddCommand
from .targets import check_target

SUMMARY = "look at the checkpoints of a run, verify and prune them"

DESCRIPTION = """\
Look at the checkpoints of a run, verify them and make room. DIR is the folder of a run or a folder of checkpoints;
inspect and verify take one checkpoint, too. Nothing in a checkpoint is executed or unpickled."""

_LIST = """\
List the checkpoints, oldest first, with what their state.json tells. The newest complete one is that from which a run
continues. Sizes are compared with the manifest; 'trine checkpoint verify' reads every byte."""

_LIST_EXAMPLES = """\
examples:
  trine checkpoint list runs/demo
  trine checkpoint list runs/demo --json - 2>/dev/null

exit codes: 0 done; 1 the folder cannot be read; 2 wrong use"""

_INSPECT = """\
Tell what a checkpoint holds: progress, data, model, layout, schedule and tensors. Of several the newest complete one is
taken. The files that are read are compared with the manifest first."""

_INSPECT_EXAMPLES = """\
examples:
  trine checkpoint inspect runs/demo
  trine checkpoint inspect runs/demo/checkpoints/step-00000200 --tensors 'layers.3.*'

exit codes: 0 done; 1 the checkpoint is damaged; 2 wrong use"""

_VERIFY = """\
Compare every byte of a checkpoint, or of all complete ones in a folder, with what was written. Each file that differs
is named."""

_VERIFY_EXAMPLES = """\
examples:
  trine checkpoint verify runs/demo
  trine checkpoint verify runs/demo --newest --workers 8

exit codes: 0 every byte is as it was written; 1 some file is damaged; 2 wrong use; 130 stopped by Ctrl-C"""

_PRUNE = """\
Say which checkpoints can go and how much room that gives; with --yes remove them. The newest complete one always stays,
and is verified before others go. A run that lives prunes by itself (checkpoint.keep), so nothing is removed then."""

_PRUNE_EXAMPLES = """\
examples:
  trine checkpoint prune runs/demo --keep 2
  trine checkpoint prune runs/demo --keep 1 --keep-every 1000 --unfinished --damaged --yes

exit codes: 0 done; 1 the newest is damaged, or something cannot be removed; 2 wrong use, or a run lives"""


def add_commands(add: AddCommand) -> None:
    """Add the commands by ``add``."""
    _add_one(add, "list", "list checkpoints", (_LIST, _LIST_EXAMPLES), _list, json=True)
    inspect = _add_one(add, "inspect", "tell what one holds", (_INSPECT, _INSPECT_EXAMPLES), _inspect, json=True)
    inspect.add_argument(
        "--tensors", nargs="?", const="*", metavar="PATTERN",
        help="list the tensors, too: all, or those whose names match a pattern with * and ?",
    )  # fmt: skip
    verify = _add_one(add, "verify", "check every byte", (_VERIFY, _VERIFY_EXAMPLES), _verify, json=True)
    verify.add_argument("--newest", action="store_true", help="of a folder only the newest complete one")
    _add_workers(verify)
    prune = _add_one(add, "prune", "remove old ones", (_PRUNE, _PRUNE_EXAMPLES), _prune, json=False)
    _add_prune_options(prune)
    _add_workers(prune)


def _add_one(
    add: AddCommand,
    name: str,
    summary: str,
    texts: tuple[str, str],
    command: Callable[[argparse.Namespace], int],
    *,
    json: bool,
) -> argparse.ArgumentParser:
    parser = add(name, summary, *texts)
    parser.add_argument("directory", metavar="DIR", help="the folder of a run, or of checkpoints")
    if json:
        parser.add_argument("--json", metavar="FILE", help="write the same for machines; - for standard output")
    parser.set_defaults(command=command, parser=parser)
    return parser


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="files read at once (default: one per core)")


def _add_prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", type=int, required=True, metavar="K", help="complete ones that stay: the newest")
    parser.add_argument(
        "--keep-every", type=int, metavar="N", help="those of steps that are multiples of this stay as well"
    )
    parser.add_argument("--unfinished", action="store_true", help="remove what saves left that did not end (.writing)")
    parser.add_argument("--damaged", action="store_true", help="remove those that runs found damaged (.damaged)")
    parser.add_argument("--no-verify", action="store_true", help="do not verify the newest before others go")
    parser.add_argument("--yes", action="store_true", help="do it")


def _list(arguments: argparse.Namespace) -> int:
    from .checkpoint_list import show_list

    check_target("--json", arguments.json)
    with told(arguments.directory):
        return show_list(find_many(arguments.directory), arguments.json)


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoint_report import show_report

    check_target("--json", arguments.json)
    with told(arguments.directory):
        return show_report(find(arguments.directory), arguments.tensors, arguments.json)


def _verify(arguments: argparse.Namespace) -> int:
    from .checkpoint_verify import show_verdicts

    check_target("--json", arguments.json)
    workers = _workers(arguments.workers)
    with told(arguments.directory):
        return show_verdicts(find(arguments.directory), arguments.newest, workers, arguments.json)


def _prune(arguments: argparse.Namespace) -> int:
    from .checkpoint_prune import Wish, prune

    for option, number in (("--keep", arguments.keep), ("--keep-every", arguments.keep_every)):
        if number is not None and number < 1:
            raise UsageError(f"{option} {number} is too few: the newest checkpoint always stays, so use 1 or more")
    wish = Wish(arguments.keep, arguments.keep_every or 0, arguments.unfinished, arguments.damaged)
    workers = 0 if arguments.no_verify else _workers(arguments.workers)
    with told(arguments.directory):
        return prune(find_many(arguments.directory), wish, workers=workers, yes=arguments.yes)


def _workers(asked: int | None) -> int:
    from .machine import usable_cores

    if asked is not None and asked < 1:
        raise UsageError(f"--workers {asked} reads nothing: use 1 or more")
    return usable_cores() if asked is None else asked
