"""The progress of a preparation on the console: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from ..data_pipeline.preparation.progress import Progress

_LINE_SECONDS = 10.0


class ConsoleProgress(Progress):
    """Tells standard error that ``processes`` work, and how they get on.

    Rates count what was done in this process's time, not what was found done.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._bar: Any = None
        self._total_bytes = self._bytes = self._documents = self._tokens = 0
        self._kept_documents = self._kept_tokens = 0
        self._start = self._told = time.monotonic()

    def say(self, sentence: str) -> None:
        """Print ``sentence`` on a line of its own."""
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"trine: {sentence}", file=sys.stderr, flush=True)

    def plan(self, files: int, total_bytes: int, chunks: int) -> None:
        """Print how much there is to do: the first chunk may take minutes, and until then nothing else is told."""
        self.say(
            f"preparing {_count(files, 'file')} of {total_bytes / 1e6:,.1f} MB in {_count(chunks, 'chunk')}, with "
            f"{_count(self._processes, 'process', 'processes')}"
        )

    def begin(self, total_bytes: int) -> None:
        """Start the bar, and the clock."""
        self._total_bytes = total_bytes
        self._start = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(desc="tokenising", total=total_bytes, unit="B", unit_scale=True, file=sys.stderr)

    def advance(self, input_bytes: int, documents: int, tokens: int, *, kept: bool) -> None:
        """Move the bar, or print a line if the last one is some time ago."""
        self._bytes += input_bytes
        self._documents += documents
        self._tokens += tokens
        if kept:
            self._kept_documents += documents
            self._kept_tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._rates(), refresh=False)
            self._bar.update(input_bytes)
        elif time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            share = self._bytes / self._total_bytes if self._total_bytes else 1.0
            self.say(f"tokenised {share:.1%} of {self._total_bytes / 1e6:,.1f} MB, {self._rates()}")

    def finish(self) -> None:
        """End the bar and print the totals."""
        self.close()
        kept = f", of them {self._kept_tokens:,} that were there already" if self._kept_tokens else ""
        self.say(
            f"tokenised {self._tokens:,} tokens of {self._documents:,} documents{kept} "
            f"in {time.monotonic() - self._start:.1f} s ({self._rates()})"
        )

    def close(self) -> None:
        """Leave the line of the bar, so that what comes next begins a new one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        documents, tokens = self._documents - self._kept_documents, self._tokens - self._kept_tokens
        return f"{documents / seconds:,.0f} documents/s, {tokens / seconds:,.0f} tokens/s"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
