"""``trine checkpoint list``: one line per checkpoint."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.errors import RunError
from ..pretrain.checkpoints.contents import Contents, problem_of, read_contents
from ..pretrain.checkpoints.inventory import Entry, file_sizes
from ..pretrain.checkpoints.manifest import MANIFEST
from .checkpoint_places import Place
from .checkpoint_text import UNKNOWN, count, integer, local_time, say, size, stream_for_text, table, utc_time
from .targets import write_json


class _Row(NamedTuple):
    entry: Entry
    written: float
    bytes: int
    contents: Contents | None
    """None for what has no manifest to speak for it."""
    wrong: tuple[str, ...]
    newest: bool = False
    """Whether a run would continue from it: the newest complete one with which nothing is seen to be wrong."""


def show_list(place: Place, json_target: str | None) -> int:
    """Print the checkpoints of ``place``. Returns 0."""
    rows: list[_Row] = []
    for entry in place.entries():
        with suppress(FileNotFoundError):  # a run has removed it meanwhile
            rows.append(_row(entry))
    whole = [row.entry for row in rows if row.entry.state == "complete" and not row.wrong]
    rows = [row._replace(newest=row.entry in whole[-1:]) for row in rows]
    say(_text(rows) if rows else [place.nothing], stream_for_text(json_target))
    if json_target is not None:
        document = {"directory": str(place.root), "checkpoints": [_document(row) for row in rows]}
        write_json(document, json_target)
    return 0


def written(path: Path) -> float:
    """When a checkpoint was completed, or last changed where it was not."""
    manifest = path / MANIFEST
    return (manifest if manifest.exists() else path).stat().st_mtime


def layout_of(contents: Contents | None) -> str:
    """The ranks that wrote a checkpoint, and their layout."""
    if contents is None:
        return UNKNOWN
    ranks, layout = contents.ranks, contents.layout
    told = [count(ranks, "rank")] if ranks else []
    return ": ".join([*told, *([layout] if layout else [])]) or UNKNOWN


def _row(entry: Entry) -> _Row:
    if entry.state == "unfinished":
        return _Row(entry, written(entry.path), sum(file_sizes(entry.path).values()), None, ())
    contents, wrong = None, tuple[str, ...]()
    try:
        contents = read_contents(entry.path)
        wrong = contents.wrong if entry.state == "complete" else ()
    except RunError as error:
        wrong = (problem_of(error, entry.path),)
    except FileNotFoundError:
        raise
    except OSError as error:
        wrong = (f"{Path(error.filename or entry.path).name} cannot be read ({error.strerror})",)
    sizes = contents.sizes if contents else file_sizes(entry.path)
    return _Row(entry, written(entry.path), sum(sizes.values()), contents, wrong)


def _text(rows: list[_Row]) -> list[str]:
    cells = [
        (
            integer(row.entry.step),
            integer(_progress(row, "tokens")),
            local_time(row.written),
            size(row.bytes),
            "damaged" if row.wrong else row.entry.state,
            layout_of(row.contents),
            "; ".join([*(["newest"] if row.newest else []), *row.wrong[:1], *(["..."] if row.wrong[1:] else [])]),
        )
        for row in rows
    ]
    return table(("step", "tokens", "written", "size", "state", "layout", ""), cells, right=(0, 1, 3))


def _document(row: _Row) -> dict[str, Any]:
    return {
        "path": str(row.entry.path),
        "step": row.entry.step,
        "state": row.entry.state,
        "newest": row.newest,
        "samples": _progress(row, "samples"),
        "tokens": _progress(row, "tokens"),
        "written": utc_time(row.written),
        "bytes": row.bytes,
        "ranks": row.contents.ranks if row.contents else None,
        "layout": row.contents.layout if row.contents else None,
        "wrong": list(row.wrong),
    }


def _progress(row: _Row, what: str) -> int | None:
    return row.contents.run.at("progress", what).integer if row.contents else None
