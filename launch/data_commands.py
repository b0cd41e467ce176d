"""``trine data prepare``: its options, and what it does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.errors import UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

_MEBIBYTE = 1 << 20

SUMMARY = "turn text into token shards"

DESCRIPTION = """\
Turn text into token shards that runs read: a tokenizer, shards for training and validation, and a manifest
with checksums. The files depend on the inputs and the options alone, not on the number of processes.

A preparation that was cut short is continued by the same command: finished chunks are verified and kept. Started
alone, the command works with one process per core. Started by mpirun or srun, on one machine or many, rank 0
manages and the other ranks work."""

EXAMPLES = """\
examples:
  trine data prepare corpus/ more.jsonl --output data/corpus --tokenizer tokenizer.json
  trine data prepare stdlib --output data/demo --train-tokenizer 4096
  mpirun -n 65 trine data prepare /corpus --output data/corpus --tokenizer tokenizer.json"""


def add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the command, and ``run_prepare`` as what it does."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="a folder, a text file, a .jsonl or .parquet file, or 'stdlib': Python's own sources",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for them")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="use this tokenizer.json or SentencePiece .model"
    )
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train a byte-level BPE of this many tokens"
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME",
        help="field of JSON Lines, or column of Parquet, that holds the text (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=0.02, metavar="F",
        help="share of the documents that is held out for validation (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes on this machine (default: one per usable core)"
    )
    parser.add_argument(
        "--chunk-mb", type=float, metavar="MIB",
        help="size of a chunk of the inputs: what one process does at a time, and what a kill costs "
        "(default: a 256th of the inputs, from 1 to 512 MiB)",
    )  # fmt: skip
    parser.set_defaults(command=run_prepare, parser=parser)


def run_prepare(arguments: argparse.Namespace) -> int:
    """Prepare what the options say and print what was made. Returns 0; under MPI every rank does."""
    from .executors import run_with_workers

    return run_with_workers(_work(arguments), arguments.workers)


def _work(arguments: argparse.Namespace) -> Callable[[Executor | None, int], int]:
    def work(executor: Executor | None, processes: int) -> int:
        from ..data_pipeline.preparation.prepare import prepare
        from .prepare_progress import ConsoleProgress

        progress = ConsoleProgress(processes)
        try:
            manifest = prepare(
                arguments.inputs,
                arguments.output,
                tokenizer=arguments.tokenizer,
                train_tokenizer=arguments.train_tokenizer,
                text_field=arguments.text_field,
                validation_fraction=arguments.validation_fraction,
                chunk_bytes=_chunk_bytes(arguments.chunk_mb),
                executor=executor,
                progress=progress,
            )
        finally:
            progress.close()
        splits = ", ".join(
            f"{manifest.tokens(split):,} tokens of {manifest.documents(split):,} documents for {split}"
            for split in manifest.splits
        )
        print(f"{arguments.output}: {splits}; vocabulary {manifest.vocabulary_size:,}")
        return 0

    return work


def _chunk_bytes(mebibytes: float | None) -> int | None:
    if mebibytes is None:
        return None
    if not 1 <= mebibytes * _MEBIBYTE < 1 << 62:
        raise UsageError(f"--chunk-mb {mebibytes:g} is not the size of a chunk: use a number such as 64")
    return int(mebibytes * _MEBIBYTE)
