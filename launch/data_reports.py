"""``trine data verify`` and ``trine data stats``: their options, and what they print.

What they need is imported when they run, so that help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.errors import UsageError
from ..configs.locations import check_location, is_remote
from .targets import STANDARD_OUTPUT, check_target, write_json, written

if TYPE_CHECKING:
    from ..data_pipeline.shards.problem import Problem
    from ..data_pipeline.shards.stats import Bucket, LengthCounts, SplitStats, Stats

AddCommand = Callable[[str, str, str, str], argparse.ArgumentParser]
"""Makes the parser of a command from its name, summary, description and epilog."""

SEQUENCE_LENGTHS = (2048, 4096, 8192, 32768)

_VERIFY = """\
Check every byte of a folder of prepared data: the manifest, the tokenizer, each shard and its index. Each problem is
a line with the file and, where it can be told, the first bytes that are wrong, the first and the last of them."""

_VERIFY_EXAMPLES = """\
example:
  trine data verify data/corpus

exit codes: 0 no problem, or warnings only; 1 some problem; 2 wrong use; 130 stopped by Ctrl-C"""

_STATS = """\
Tell what a folder of prepared data holds: documents and tokens of each split, and how long the documents are."""

_STATS_EXAMPLES = """\
examples:
  trine data stats data/corpus
  trine data stats data/corpus --picture lengths.png --json - 2>/dev/null

exit codes: 0 done; 1 the data are damaged; 2 wrong use; 130 stopped by Ctrl-C"""

_BAR_CHARACTERS = 30
_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


def add_verify(add: AddCommand) -> None:
    """Add the command ``verify``."""
    parser = add("verify", "check prepared data byte by byte", _VERIFY, _VERIFY_EXAMPLES)
    _add_folder(parser)
    parser.add_argument("--workers", type=int, metavar="N", help="shards read at once (default: one per core)")
    parser.set_defaults(command=_verify, parser=parser)


def add_stats(add: AddCommand) -> None:
    """Add the command ``stats``."""
    parser = add("stats", "tell what prepared data hold", _STATS, _STATS_EXAMPLES)
    _add_folder(parser)
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw the lengths of the documents there (needs matplotlib)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too; - for standard output")
    parser.set_defaults(command=_stats, parser=parser)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a folder of prepared data on this machine")


def _local(location: str) -> Path:
    check_location("DIR", location)
    if is_remote(location):
        raise UsageError(f"DIR={location} is a URL, and only local folders are read whole: copy it here first")
    return Path(location)


def _verify(arguments: argparse.Namespace) -> int:
    from ..data_pipeline.shards.verify import verify
    from .machine import usable_cores

    workers = usable_cores() if arguments.workers is None else arguments.workers
    with _bar("verified", "B") as progress:
        problems = verify(_local(arguments.directory), workers=workers, progress=progress)
    for problem in problems:
        print(problem)
    print(_verdict(arguments.directory, problems))
    return 1 if any(not problem.is_warning for problem in problems) else 0


def _verdict(directory: str, problems: Sequence[Problem]) -> str:
    warnings = sum(problem.is_warning for problem in problems)
    wrong = len(problems) - warnings
    tail = f", {_count(warnings, 'warning')}" if warnings else ""
    if not wrong:
        return f"{directory}: every byte is as it was written{tail}"
    return f"{directory}: {_count(wrong, 'problem')}{tail}; restore these files from a copy, or prepare the data again"


def _stats(arguments: argparse.Namespace) -> int:
    from ..data_pipeline.shards.stats import read_stats

    directory = _local(arguments.directory)
    check_target("--json", arguments.json)
    check_target("--picture", arguments.picture)
    if arguments.picture is not None:
        from .data_picture import check_matplotlib

        check_matplotlib()
    with _bar("read", " shards") as progress:
        stats = read_stats(directory, progress=progress)
    # Standard output is for the JSON alone where that is asked for.
    out = sys.stderr if arguments.json == STANDARD_OUTPUT else sys.stdout
    print(stats_report(arguments.directory, stats), file=out)
    if arguments.picture is not None:
        from .data_picture import draw_lengths

        written("--picture", arguments.picture, lambda: draw_lengths(stats, arguments.picture))
    if arguments.json is not None:
        write_json(stats_document(stats), arguments.json)
    return 0


@contextmanager
def _bar(verb: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc=f"trine: {verb}", unit=unit, unit_scale=True, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def stats_report(directory: str, stats: Stats) -> str:
    """The statistics as text, for a terminal."""
    manifest = stats.manifest
    lines = [
        f"{directory}: prepared from {' '.join(manifest.request.sources)}",
        f"  vocabulary       {manifest.vocabulary_size:,} tokens, stored as {manifest.dtype}; "
        f"{manifest.eos_id} ends a document",
        f"  tokenizer        {manifest.tokenizer}, sha256 {manifest.tokenizer_sha256[:12]}",
        f"  fingerprint      {manifest.fingerprint}",
        "",
        *_table(
            ("", "documents", "tokens", "shards", "bytes"),
            [(name, *map(_integer, _totals(split))) for name, split in stats.splits.items()],
        ),
        "",
        "tokens per document, with the token that ends it",
        *_table(
            ("", "mean", *_QUANTILES, "longest"),
            [(name, f"{split.lengths.mean:,.1f}", *_lengths(split.lengths)) for name, split in stats.splits.items()],
        ),
        "",
        "documents that fit a sequence length",
        *_table(
            ("", *map(_integer, SEQUENCE_LENGTHS)),
            [
                (name, *(_percent(split.lengths.share_fitting(length)) for length in SEQUENCE_LENGTHS))
                for name, split in stats.splits.items()
            ],
        ),
    ]
    for name, split in stats.splits.items():
        lines += ["", f"{name}: lengths of the documents", *_histogram(split.lengths)]
    return "\n".join(lines)


def stats_document(stats: Stats) -> dict[str, Any]:
    """The statistics as JSON values."""
    manifest = stats.manifest
    return {
        "fingerprint": manifest.fingerprint,
        "vocabulary_size": manifest.vocabulary_size,
        "dtype": manifest.dtype,
        "end_of_document": manifest.eos_id,
        "tokenizer": manifest.tokenizer,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "splits": {name: _split_document(split) for name, split in stats.splits.items()},
    }


def _split_document(split: SplitStats) -> dict[str, Any]:
    lengths = split.lengths
    return {
        **dict(zip(("documents", "tokens", "shards", "bytes"), _totals(split), strict=True)),
        "tokens_per_document": {
            "mean": lengths.mean,
            **{name: lengths.quantile(share) for name, share in _QUANTILES.items()},
            "longest": lengths.longest,
        },
        "share_fitting": {str(length): lengths.share_fitting(length) for length in SEQUENCE_LENGTHS},
        "histogram": [
            {"first": bucket.first, "last": bucket.last, "documents": bucket.documents, "tokens": bucket.tokens}
            for bucket in lengths.histogram()
        ],
    }


def _totals(split: SplitStats) -> tuple[int, int, int, int]:
    return split.lengths.documents, split.lengths.tokens, split.shards, split.bytes


def _lengths(lengths: LengthCounts) -> list[str]:
    return [*(_integer(lengths.quantile(share)) for share in _QUANTILES.values()), _integer(lengths.longest)]


def _histogram(lengths: LengthCounts) -> list[str]:
    buckets = lengths.histogram()
    most = max(bucket.documents for bucket in buckets)

    def row(bucket: Bucket) -> tuple[str, ...]:
        return (
            f"{bucket.first:,}-{bucket.last:,}",
            _integer(bucket.documents),
            _percent(bucket.documents / lengths.documents),
            _percent(bucket.tokens / lengths.tokens),
        )

    lines = _table(("tokens", "documents", "of documents", "of tokens"), [row(bucket) for bucket in buckets])
    bars = ["", *("#" * -(-_BAR_CHARACTERS * bucket.documents // most) for bucket in buckets)]
    return [f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True)]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under titles, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  " + "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (titles, *rows)
    ]


def _integer(number: int) -> str:
    return f"{number:,}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
