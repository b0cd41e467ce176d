"""The output folder of a preparation while it is being prepared: whose it is, and what was asked for there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ...configs.errors import UsageError
from ..durable import TEMPORARY_SUFFIX, write_durably
from ..shards.manifest import MANIFEST, SENTENCEPIECE, TOKENIZER, UNFINISHED, Request, Sha256
from ..shards.member_index import INDEX_SUFFIX
from .fragments import FRAGMENTS
from .splits import SPLITS

LOCK = "prepare.lock"
OWNER = "prepare.owner"
"""Stands for the lock on a file system that has none. A process that is killed leaves it behind."""
INPUTS = "inputs.json"
"""Which input files a folder was prepared from. Beside the manifest, whose fingerprint no time of a file may change."""

_SHARD = rf"({'|'.join(SPLITS)})-\d{{5,}}-\d{{3,}}(\.tar|{re.escape(INDEX_SUFFIX)})"
_NAMES = "|".join(re.escape(name) for name in (TOKENIZER, SENTENCEPIECE, MANIFEST, INPUTS, UNFINISHED))
_SHARD_OR_TEMPORARY = re.compile(rf"{_SHARD}|({_SHARD}|{_NAMES})\.[0-9a-f]+{re.escape(TEMPORARY_SUFFIX)}")
# Lustre and some network file systems have locks only where they are mounted with them.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_FIRST_TEMPORARY = re.compile(rf"{re.escape(UNFINISHED)}\.[0-9a-f]+{re.escape(TEMPORARY_SUFFIX)}")


class Claim(BaseModel):
    """What ``unfinished.json`` says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    request: Request
    inputs_sha256: Sha256
    """``chunks.inputs_sha256`` of the input files."""
    tokenizer_sha256: Sha256 | None = None
    """The tokenizer of the folder, once it is there."""


@contextmanager
def exclusively(output: Path) -> Iterator[None]:
    """Hold ``output``, which is made where it is missing, against a second preparation at the same time.

    The kernel lets go when the process ends, however it ends. Raises UsageError when another process holds it, or did
    so on a file system without locks when it was killed, and when it holds files that no preparation has put there.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    _check_ours(output)
    with _hold(output):
        yield


def take(output: Path, claim: Claim) -> Claim:
    """Claim ``output``, which must be held ``exclusively``: ``claim``, or what is there of the same preparation.

    Raises UsageError, saying what differs, when finished chunks of another preparation lie there.
    """
    path = output / UNFINISHED
    there = _read(path)
    if there is not None and claim == there.model_copy(update={"tokenizer_sha256": claim.tokenizer_sha256}):
        return there
    if any((output / FRAGMENTS).glob("*.json")):
        raise UsageError(f"{output} holds {_difference(output, there, claim)}")
    # No work is lost: a mistake that the first chunk has shown may be corrected without further ado.
    _remove_made(output)
    write_durably(path, claim.model_dump_json().encode())
    return claim


def note_tokenizer(output: Path, claim: Claim, tokenizer_sha256: str) -> None:
    """Write down which tokenizer the folder has."""
    noted = claim.model_copy(update={"tokenizer_sha256": tokenizer_sha256})
    write_durably(output / UNFINISHED, noted.model_dump_json().encode())


def note_inputs(output: Path, inputs_sha256: str) -> None:
    """Write down which input files the folder is prepared from, which the finished one keeps."""
    write_durably(output / INPUTS, _inputs_note(inputs_sha256))


def has_inputs(output: Path, inputs_sha256: str) -> bool:
    """Whether that is what was written down."""
    try:
        return (output / INPUTS).read_bytes() == _inputs_note(inputs_sha256)
    except FileNotFoundError:
        return False


def _inputs_note(inputs_sha256: str) -> bytes:
    return (json.dumps({"sha256": inputs_sha256}) + "\n").encode("ascii")


def remove_strays(output: Path, named: set[str]) -> None:
    """Remove the shards, indexes and temporary files that are not ``named``: what a kill has left behind."""
    for path in output.iterdir():
        if _SHARD_OR_TEMPORARY.fullmatch(path.name) and path.name not in named:
            path.unlink()
    for path in (output / FRAGMENTS).glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink()


def release(output: Path) -> None:
    """Remove what only an unfinished preparation needs. May be repeated, after a kill in its midst."""
    fragments = output / FRAGMENTS
    if fragments.is_dir():
        for path in fragments.iterdir():
            path.unlink()
        fragments.rmdir()
    (output / LOCK).unlink(missing_ok=True)
    # Last: while it is there, the same command comes back to this.
    (output / UNFINISHED).unlink(missing_ok=True)


def abandon(output: Path) -> None:
    """Remove all that a preparation has made, as far as it has come."""
    _remove_made(output)
    release(output)


def _remove_made(output: Path) -> None:
    remove_strays(output, set())
    for name in (TOKENIZER, SENTENCEPIECE, INPUTS):
        (output / name).unlink(missing_ok=True)


def _read(path: Path) -> Claim | None:
    """What the file says, if it is there and can be understood."""
    try:
        return Claim.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _difference(output: Path, there: Claim | None, here: Claim) -> str:
    if there is None:
        return f"the unfinished preparation of another version of trine; delete {output}, or choose another folder"
    difference = there.request.difference(here.request)
    if difference:
        return (
            f"another, unfinished preparation ({difference}); repeat its own command to finish it, delete {output}, "
            "or choose another folder"
        )
    return (
        "an unfinished preparation of input files that have changed since (in a name, a size or a time of "
        f"modification); delete {output} to begin anew, or choose another folder"
    )


def _check_ours(output: Path) -> None:
    names = {path.name for path in output.iterdir() if not _FIRST_TEMPORARY.fullmatch(path.name)} - {LOCK, OWNER}
    if names and not names & {UNFINISHED, MANIFEST}:
        raise UsageError(f"output {output} holds other files and no prepared data; choose a new or empty folder")


def _hold(output: Path) -> ExitStack:
    """Hold the folder until what is returned is closed."""
    path = output / LOCK
    while True:
        with ExitStack() as stack:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            if not _lock(descriptor, output):
                stack.callback(_own(output).unlink, missing_ok=True)
                return stack.pop_all()
            # A preparation that has just finished removed the file, and perhaps the next one has made it anew.
            if _is_at(path, descriptor):
                return stack.pop_all()


def _lock(descriptor: int, output: Path) -> bool:
    """Lock an open file; whether its file system has locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{output} is being prepared by another process; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own(output: Path) -> Path:
    """Make the file that says who prepares the folder, and return its path."""
    path = output / OWNER
    try:
        with path.open("x") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except FileExistsError as error:
        raise UsageError(
            f"{output} is being prepared by {path.read_text() or 'another process'}; wait for it or, if that has been "
            f"killed, delete {path}, for this file system has no locks that end with their process"
        ) from error
    return path
