"""Where the output of a rank goes: a file of its own, and for rank 0 the console as well."""

from __future__ import annotations

import datetime
import faulthandler
import logging
import os
import shlex
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ..configs.errors import UsageError


@dataclass(frozen=True)
class RankLog:
    """The open log of this rank."""

    path: Path
    console: TextIO
    """Standard error as it was at the start, also where that of the process now leads to the file."""


def log_path(directory: Path, rank: int) -> Path:
    """The log of ``rank`` in the folder of a run's logs."""
    return directory / f"rank-{rank}.log"


def make_log_directory(directory: Path) -> None:
    """Make the folder of a run's logs. Raises UsageError when it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the folder of logs {directory} cannot be made ({error.strerror}): choose another run.directory"
        ) from error


def open_rank_log(directory: Path, rank: int) -> RankLog:
    """Open the log of this process and send its output there, after what earlier attempts wrote.

    Log records, warnings and the stack of a crash go to the file. Rank 0 keeps its standard output and error,
    where trine's own warnings also appear; those of the others lead to the file, for their child processes
    too. Raises UsageError when the file cannot be written.
    """
    make_log_directory(directory)
    path = log_path(directory, rank)
    try:
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(
            f"the log {path} cannot be written ({error.strerror}): choose another run.directory"
        ) from error
    with suppress(OSError):  # a full disk, of which others will tell
        file.write(_header(rank))
    console = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    if rank != 0:
        _redirect_output(file)
    _configure_logging(file, console if rank == 0 else None)
    faulthandler.enable(file)
    return RankLog(path, console)


def _header(rank: int) -> str:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    host, command = socket.gethostname(), shlex.join(sys.orig_argv)
    return f"=== {now} | rank {rank} | host {host} | pid {os.getpid()} | {command}\n"


def _redirect_output(file: TextIO) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    # The old stream objects would hold lines back, and a killed process loses what it holds.
    sys.stdout = sys.stderr = file


def _configure_logging(file: TextIO, console: TextIO | None) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    # A log that cannot be written, on a full disk say, must not bury the sentence about it in tracebacks.
    logging.raiseExceptions = False
    to_file = logging.StreamHandler(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(to_file)
    logging.captureWarnings(True)
    threading.excepthook = _log_failed_thread
    if console is not None:
        to_console = logging.StreamHandler(console)
        to_console.setLevel(logging.WARNING)
        to_console.setFormatter(logging.Formatter("trine: %(message)s"))
        logging.getLogger("trine").addHandler(to_console)


def _log_failed_thread(failed: threading.ExceptHookArgs) -> None:
    """Keep the traceback of a thread, such as TensorBoard's when the disk is full, off the console."""
    if failed.exc_value is not None and failed.exc_type is not SystemExit:
        name = failed.thread.name if failed.thread else "of no name"
        logging.getLogger().error("thread %s has failed", name, exc_info=failed.exc_value)
