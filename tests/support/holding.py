"""A process that locks run directories as it is told, line by line: ``python holding.py BEAT_SECONDS``.

``acquire DIRECTORY``, ``check`` and ``release`` are answered by ``done`` or by the error; the log goes to stderr.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from trine.configs.errors import RunError, UsageError
from trine.pretrain.run_lock import RunLock


class Process:
    """Such a process, as a test sees it."""

    def __init__(self, beat_seconds: float, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, __file__, str(beat_seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | environment,
            )  # fmt: skip

    def ask(self, line: str) -> None:
        """Tell it what to do."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def answer(self) -> str:
        """Wait for the answer to the oldest request that has none."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def does(self, line: str) -> str:
        """What it answers to ``line``."""
        self.ask(line)
        return self.answer()

    def close(self) -> None:
        """Kill it."""
        self.popen.kill()
        self.popen.communicate()


def main(beat_seconds: float) -> None:
    """Obey until the end of the input."""
    lock: RunLock | None = None
    for line in sys.stdin:
        verb, _, directory = line.strip().partition(" ")
        try:
            if verb == "acquire":
                lock = RunLock.acquire(Path(directory), beat_seconds=beat_seconds)
            elif lock is not None:
                {"check": lock.check, "release": lock.release}[verb]()
        except (UsageError, RunError) as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        else:
            print("done", flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    main(float(sys.argv[1]))
