"""What a checkpoint says of itself: its JSON and the names and sizes of its files. Nothing is unpickled."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...configs.errors import RunError
from .document import Document
from .inventory import file_sizes
from .manifest import MANIFEST, RANDOM, STATE, TENSORS, DamageError, FileEntry, Problem, problems, read_manifest

OPTIMIZER = "optimizer."
"""How the names of the optimizer's tensors begin."""

_NO_ARRAYS = (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, RuntimeError, EOFError)
_HEADER_BYTES = 256
_STAGE_UNLESS_SAID = 1


@dataclass(frozen=True)
class TensorEntry:
    """A global tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Their size."""
        bits = re.match(r"[a-z]+(\d{1,3})", self.dtype)
        return self.elements * (int(bits[1]) // 8 if bits else 1)


@dataclass(frozen=True)
class Contents:
    """A checkpoint as far as JSON tells it."""

    path: Path
    files: dict[str, FileEntry]
    """What the manifest lists; nothing where it cannot be read."""
    sizes: dict[str, int]
    """The bytes of what is there."""
    state: Document
    """``state.json``."""
    wrong: tuple[str, ...]
    """Where the manifest does not agree with what was read, in sentences."""

    @property
    def run(self) -> Document:
        """What the run noted."""
        return self.state.at("run")

    @property
    def config(self) -> Document:
        """The configuration of the run."""
        return self.run.at("config")

    @cached_property
    def ranks(self) -> int | None:
        """How many ranks wrote it: as many have their random states in it."""
        return _rows(self.path / RANDOM)

    @property
    def layout(self) -> str | None:
        """The layout of the ranks that wrote it, as ``trine parity`` names it."""
        parallel = self.config.at("parallel")
        if not parallel.fields:
            return None
        zero = self.config.at("deepspeed", "zero_optimization")
        sizes = {key: parallel.at(key).integer or 1 for key in ("tensor", "pipeline", "virtual_pipeline", "context")}
        divided = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
        parts = {
            f"tp{sizes['tensor']}": sizes["tensor"] > 1,
            "sp": parallel.at("sequence").flag,
            f"pp{sizes['pipeline']}": sizes["pipeline"] > 1,
            f"vpp{sizes['virtual_pipeline']}": sizes["virtual_pipeline"] > 1,
            f"cp{sizes['context']}": sizes["context"] > 1,
            "a2a": sizes["context"] > 1 and parallel.at("context_exchange").text == "all_to_all",
            f"dp{(self.ranks or 0) // divided}": (self.ranks or 0) // divided > 1,
            f"zero{self._zero_stage}": self._zero_stage is not None,
            "offload": self._zero_stage is not None and zero.at("offload_optimizer", "device").text == "cpu",
        }
        return "+".join(part for part, counts in parts.items() if counts) or "tp1"

    @property
    def _zero_stage(self) -> int | None:
        """ZeRO's stage, of a run by DeepSpeed."""
        if self.config.at("engine").text != "deepspeed":
            return None
        stage = self.config.at("deepspeed", "zero_optimization", "stage").integer
        return _STAGE_UNLESS_SAID if stage is None else stage

    @cached_property
    def tensors(self) -> list[TensorEntry]:
        """Every global tensor, by name."""
        return list(_tensors(Document.read(self.path / TENSORS)))


def read_contents(path: Path, hashed: Collection[str] = (STATE,)) -> Contents:
    """Read what a checkpoint says; the ``hashed`` files are compared with the manifest before, of others the sizes are.

    Raises RunError where it has another format, OSError where a file cannot be read.
    """
    files, wrong = manifest_of(path)
    sizes = file_sizes(path)
    found = [wrong] if wrong else list(_disagreements(path, files, sizes, hashed))
    sentences = [f"{problem.name} {problem.what}" for problem in found]
    state = Document.read(path / STATE)
    if not state.fields:
        sentences.append(f"{STATE} holds nothing that can be understood")
    return Contents(path, files, sizes, state, tuple(sentences))


def manifest_of(path: Path) -> tuple[dict[str, FileEntry], Problem | None]:
    """Every file of a checkpoint but the manifest, or what is wrong with that.

    Raises RunError where it has another format, OSError where it cannot be read.
    """
    try:
        return read_manifest(path), None
    except DamageError as error:
        return {}, error.problem
    except (OverflowError, RecursionError) as error:
        return {}, Problem(MANIFEST, f"cannot be understood ({error})")


def problem_of(error: RunError, path: Path) -> str:
    """What ``error`` says of the checkpoint ``path``, to be read after its name."""
    return str(error).removeprefix(f"checkpoint {path} ")


def _disagreements(
    path: Path, files: dict[str, FileEntry], sizes: dict[str, int], hashed: Collection[str]
) -> Iterator[Problem]:
    for name, entry in files.items():
        if name in hashed or sizes.get(name) != entry.bytes:
            yield from problems(path, {name: entry})


def _rows(path: Path) -> int | None:
    """The first number of the shape of the array ``cpu``, from its header alone."""
    try:
        with zipfile.ZipFile(path) as arrays, arrays.open("cpu.npy") as array:
            shape = re.search(rb"'shape': \((\d{1,9}),", array.read(_HEADER_BYTES))
    except _NO_ARRAYS:
        return None
    return int(shape[1]) if shape else None


def _tensors(document: Document) -> Iterator[TensorEntry]:
    for name, entry in sorted(document.fields.items()):
        shape = [size.integer for size in entry.at("shape").items]
        dtype = entry.at("dtype").text
        sizes = tuple(size for size in shape if size is not None and 0 <= size < 1 << 63)
        if dtype is not None and len(sizes) == len(shape):
            yield TensorEntry(name, sizes, dtype)
