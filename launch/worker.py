"""One rank of a run.

Processes that this one spawns import this module again. What is heavy is therefore imported where it is used.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ..configs.schema import Config
    from ..pretrain.place import Place
    from .rank_log import RankLog


def main(argv: Sequence[str] | None = None, *, train: Callable[[Config, Place], None] | None = None) -> int:
    """Run the rank whose place the environment tells: ``argv`` is CONFIG.yaml and its overrides.

    Returns 0, or 75 where the run was stopped before its end; under torchrun, which takes every other number for a
    failure, always 0. After an error it does not return: the process ends with exit code 2 for a UsageError and 1
    for any other, without waiting for peers that may never answer. ``train`` is by default the pretraining.
    """
    from ..configs.loading import load_config
    from .environment import export, find_place
    from .lifeline import end_forks_with_rank, end_with_launcher
    from .rank_log import open_rank_log

    # Ctrl-C ends a rank even where it waits for others inside a collective.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    end_forks_with_rank()
    recipe, *overrides = sys.argv[1:] if argv is None else argv
    place: Place | None = None
    log: RankLog | None = None
    try:
        place = find_place()
        export(place)
        config = load_config(Path(recipe), overrides)
        log = open_rank_log(config.run.directory / "logs", place.rank)
        if train is None:
            code = _pretrain(config, place, log)
            return 0 if place.source in ("local", "torchrun") else code
        train(config, place)
    except Exception as error:
        _end(error, place, log)
    return 0


def _pretrain(config: Config, place: Place, log: RankLog) -> int:
    from ..pretrain.run import Outside, pretrain

    def tell(line: str) -> None:
        if not _is_told_by_launcher():
            print(f"trine: {line}", file=log.console, flush=True)

    return pretrain(config, place, Outside(tell, lambda error: _end(error, place, log, told=True), log.path))


def _is_told_by_launcher() -> bool:
    """Whether the launcher tells the user how its ranks ended."""
    from .environment import LAUNCHED_LOCALLY

    return LAUNCHED_LOCALLY in os.environ


def _end(error: Exception, place: Place | None, log: RankLog | None, *, told: bool = False) -> NoReturn:
    """Tell the launcher, the log and the console of ``error``, and leave without the exit handlers.

    With ``told`` log and console know it already; the main thread may then hold what the log needs.
    Destroying a process group whose other ranks wait for this one would wait for them in turn.
    """
    from ..configs.errors import RunError, UsageError

    _tell_launcher(error)
    if told:
        os._exit(1)
    if log is not None:
        logging.getLogger().error("the run ends here", exc_info=error)
    elif not isinstance(error, (UsageError, RunError)):
        traceback.print_exception(error)
    if not _is_told_by_launcher():
        print(_sentence(error, place, log), file=log.console if log else sys.stderr, flush=True)
    _end_children()
    with suppress(OSError):  # a full disk
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(2 if isinstance(error, UsageError) else 1)


def _tell_launcher(error: Exception) -> None:
    """Write the error, while it is handled, where torch's launcher looks for it if it started this rank."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _sentence(error: Exception, place: Place | None, log: RankLog | None) -> str:
    from ..configs.errors import RunError, UsageError

    if isinstance(error, UsageError) or place is None:
        return f"trine: {error}"
    line = str(error).strip().partition("\n")[0]
    what = line if isinstance(error, RunError) else f"{type(error).__name__}: {line}"
    return f"trine: rank {place.rank} failed: {what}" + (f"; see {log.path}" if log else "")


def _end_children() -> None:
    """Without the exit handlers, what multiprocessing started would stay."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":  # a process that a rank has spawned
    from .lifeline import end_with_parent

    end_with_parent()
