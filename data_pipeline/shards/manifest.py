"""The manifest ``index.json``: what a folder of prepared data holds. Written last, it means: finished."""

from __future__ import annotations

import json
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from ...configs.errors import RunError, UsageError
from ..durable import write_durably
from ..storage.folder import Folder, open_folder

FORMAT: Final = 1
MANIFEST = "index.json"
TOKENIZER: Final = "tokenizer.json"
SENTENCEPIECE: Final = "tokenizer.model"
UNFINISHED = "unfinished.json"
"""Marks a folder that a preparation has claimed and not finished."""

DtypeName = Literal["uint16", "uint32"]
TokenizerName = Literal["tokenizer.json", "tokenizer.model"]
_MOST = 1 << 40
"""Of anything in one shard: the sums over all shards of a manifest then fit into 64 bits."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(_Record):
    """What was asked for. Equal requests on the same files give the same folder."""

    sources: tuple[str, ...]
    """Inputs, as they were given."""
    source_files: NonNegativeInt
    source_bytes: NonNegativeInt
    """Number and total size of the input files: a corpus that has grown is another request."""
    tokenizer_sha256: Sha256 | None
    """The tokenizer that was given, if one was."""
    trained_vocabulary: PositiveInt | None
    """Size of the vocabulary to be trained, if no tokenizer was given."""
    text_field: str
    """Field of JSON Lines and column of Parquet that holds a document's text."""
    validation_fraction: float
    chunk_bytes: PositiveInt
    """Size of the pieces in which the inputs were prepared: the same whatever the number of processes."""
    shard_tokens: PositiveInt

    def difference(self, other: Request) -> str:
        """The first field in which ``other`` differs, as ``name is X there and Y here``; else nothing."""
        here = other.model_dump(mode="json")
        for name, value in self.model_dump(mode="json").items():
            if here[name] != value:
                return f"{name} is {value} there and {here[name]} here"
        return ""


class ShardRecord(_Record):
    """One shard: a tar, and the index of its members beside it."""

    name: Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{5,}-[0-9]{3,}\.tar$")]
    """``{split}-{chunk}-{part}.tar``. The pattern keeps a manifest from other hands inside its own folder."""
    bytes: Annotated[int, Field(gt=0, lt=_MOST)]
    tokens: Annotated[int, Field(gt=0, lt=_MOST)]
    documents: Annotated[int, Field(ge=0, lt=_MOST)]
    """Documents that begin in the shard."""
    sha256: Sha256
    index_sha256: Sha256


class Manifest(_Record):
    """A finished preparation."""

    format: Literal[1] = FORMAT
    dtype: DtypeName
    """Token ids are little-endian."""
    vocabulary_size: PositiveInt
    eos_id: NonNegativeInt
    """The token that ends every document."""
    tokenizer: TokenizerName = TOKENIZER
    tokenizer_sha256: Sha256
    request: Request
    splits: Annotated[dict[str, Annotated[tuple[ShardRecord, ...], Field(min_length=1)]], Field(min_length=1)]
    """Shards of every split that holds documents, in the order of their tokens."""

    def tokens(self, split: str) -> int:
        """Tokens of a split, 0 if it is not there."""
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def documents(self, split: str) -> int:
        """Documents of a split, 0 if it is not there."""
        return sum(shard.documents for shard in self.splits.get(split, ()))

    def to_json(self) -> bytes:
        """The bytes of ``index.json``: a pure function of the contents."""
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode("ascii")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ``index.json`` in hexadecimal: equal fingerprints mean equal tokens in equal order."""
        return sha256(self.to_json()).hexdigest()

    def __copy__(self) -> Self:
        """Without the fingerprint: ``model_copy`` changes what it is of."""
        copied = super().__copy__()
        copied.__dict__.pop("fingerprint", None)
        return copied


def dtype_name(vocabulary_size: int) -> DtypeName:
    """The narrowest type that holds every id below ``vocabulary_size``."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def token_dtype(name: DtypeName) -> np.dtype[np.unsignedinteger]:
    """The little-endian numpy type of that name."""
    return np.dtype({"uint16": "<u2", "uint32": "<u4"}[name])


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit a preparation: everything the manifest names must already be on disk."""
    write_durably(directory / MANIFEST, manifest.to_json())


def load_manifest(folder: Folder | Path | str) -> Manifest:
    """Read the manifest of a folder of prepared data, local or behind a URL.

    Raises UsageError when there is none, it is of another format or the location is of a kind that is not read;
    RunError when it is damaged or cannot be read.
    """
    if isinstance(folder, (str, Path)):
        folder = open_folder(folder)
    path = folder.address(MANIFEST)
    try:
        data = folder.read_bytes(MANIFEST, fresh=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(_absence(folder)) from error
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error})") from error
    manifest = _parse(folder, data)
    # The fingerprint is computed from the contents: this makes it that of the file as well.
    if manifest.fingerprint != sha256(data).hexdigest():
        raise RunError(f"{path} was changed after it was written; {_remedy(folder)}")
    return manifest


def _parse(folder: Folder, data: bytes) -> Manifest:
    path = folder.address(MANIFEST)
    try:
        raw: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is not JSON ({error}); {_remedy(folder)}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found != FORMAT:
        raise UsageError(
            f"{path} has format {found} and this version of trine reads format {FORMAT}; "
            "prepare the data again in another folder, or use the version that wrote it"
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise RunError(f"{path} is damaged at {where} ({first['msg']}); {_remedy(folder)}") from error


def _absence(folder: Folder) -> str:
    remedy = "prepare the data first, or name the folder that holds it"
    try:
        unfinished = folder.sizes([UNFINISHED])
    except (FileNotFoundError, NotADirectoryError):
        return f"the folder of prepared data {folder.location} is not there; {remedy}"
    except OSError:  # it may be read but not listed
        unfinished = {}
    if unfinished:
        return f"the preparation of data in {folder.location} has not finished; run it again to complete it"
    return f"{folder.location} holds no prepared data ({MANIFEST} is missing); {remedy}"


def _remedy(folder: Folder) -> str:
    return f"restore it from a copy, or delete {folder.location} and prepare the data again"
