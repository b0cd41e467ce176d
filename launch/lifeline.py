"""Processes of a run do not outlive the one that started them, however that one ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the kernel kill this rank when the launcher that started it ends; only Linux can."""
    if sys.platform == "linux":
        _die_with_parent()


def end_forks_with_rank() -> None:
    """Have the kernel kill what this rank forks from now on when the rank ends; only Linux can."""
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=_die_with_parent)


def end_with_parent() -> None:
    """Have this process, which a rank has spawned, end when that rank does."""
    # Ctrl-C reaches it as well, and its traceback would tell the user nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_outlast_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A signal, more precisely, at the end of the thread that started this process: launchers and ranks start
    # processes from their main threads.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _outlast_parent() -> None:
    # The parent is known only some time after the main module has been imported, which is when this begins.
    while (parent := multiprocessing.parent_process()) is None:
        time.sleep(0.1)
    parent.join()
    os._exit(1)
