"""A model and its optimizer as files: Megatron-Core's sharded format, written beside the training.

Planning, format and resharding are Megatron-Core's. Three things are not:

- The files are written by a thread. Megatron-Core forks a process or keeps one, which costs a fork of the rank per
  save or seconds of imports at the first, and leaves processes behind when a rank is killed; torch's own asynchronous
  saving uses a thread, too. Writing and hashing spend their time outside the interpreter's lock.
- Megatron-Core pickles what is not a tensor (learning rates, step counts) into ``common.pt``. Here it is for the caller
  to write as text, so that ``.metadata`` is the only file that must be unpickled, by torch, when a checkpoint is read.
- No rank writes while the others depend on it in a collective: a full disk is an outcome that ranks can share.
"""

from __future__ import annotations

import copy
import hashlib
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import mapping
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..configs.errors import RunError
from .agreement import done_by_first_rank
from .engine import Engine
from .index_classes import check_index
from .shards import loaded_parameters, sharded_state

_FILES_PER_RANK = 2

# torch's CheckpointException is no Exception but a BaseException: nothing else would catch it.
_ENGINE_ERRORS = (CheckpointException, CheckpointingException)

# Megatron-Core would start a server process per rank for results that cross processes; here they stay in one.
filesystem_async._results_queue = queue.SimpleQueue()


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """What one rank has written, or why it could not."""

    files: list[WrittenFile]
    error: str | None
    results: list[Any]
    """Where each piece of a tensor lies; what Megatron-Core's index is made of."""


class TensorWriter:
    """Writes an engine's tensors, again and again: the plan of one save serves the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._strategy = _PlanningStrategy("torch_dist", 1, thread_count=_FILES_PER_RANK, cached_metadata=True)
        self._validated = False

    @torch.no_grad()
    def begin(self, folder: Path) -> PendingTensors:
        """Copy this rank's tensors and begin to write them to ``folder``, which exists. Every rank must call it.

        Training may go on at once: what is written is the state at the time of the call.
        """
        engine = self._engine
        sharded, _ = save_preprocess(sharded_state(engine), validate_access_integrity=not self._validated)
        self._validated = True  # every save has the shards of the first
        writer, index = self._strategy.async_save(sharded, folder)
        return PendingTensors(_copied(writer.write_buckets, _live(engine)), writer, index)


class PendingTensors:
    """Tensors on their way to the disk."""

    def __init__(self, buckets: list[Any], writer: Any, index: Any) -> None:
        self._writer, self._index = writer, index
        self._outcome: Written | None = None
        self._thread = threading.Thread(target=self._write, args=(buckets,), name="checkpoint")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread.is_alive()

    def written(self) -> Written:
        """What this rank wrote, once it is no longer busy."""
        self._thread.join()
        if self._outcome is None:
            raise RuntimeError("the thread that writes a checkpoint ended without a word")
        return self._outcome

    def write_index(self, results: list[list[Any]]) -> None:
        """On rank 0, with every rank's ``results``: write the index that makes the files readable."""
        index = copy.copy(self._index)
        # Every rank's plan, by which Megatron-Core compares one save with the next; to read the files takes none.
        vars(index).pop("all_local_plans", None)
        self._writer.finish(index, results)

    def shapes(self) -> dict[str, dict[str, Any]]:
        """On rank 0: every global tensor by name, with its shape and dtype."""
        return {
            name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype).removeprefix("torch.")}
            for name, entry in sorted(self._index.state_dict_metadata.items())
            if hasattr(entry, "size")
        }

    def _write(self, buckets: list[Any]) -> None:
        files: list[WrittenFile] = []
        results: list[Any] = []
        try:
            for bucket in buckets:
                results += _write_bucket(bucket, self._writer.transforms)
                files.append(described(Path(bucket[0])))
        except BaseException as error:  # whatever it is, the other ranks must hear of it
            self._outcome = Written([], f"{type(error).__name__}: {error}", [])
            return
        self._outcome = Written(files, None, results)


def described(path: Path) -> WrittenFile:
    """A file as it is on disk now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WrittenFile(path.name, path.stat().st_size, digest)


def load_tensors(folder: Path, engine: Engine) -> None:
    """Load model and optimizer from a folder whose files have been verified. Every rank must call it.

    Raises:
        RunError: the files hold another model, or their index is none.
    """
    done_by_first_rank(lambda: check_index(folder / ".metadata"))
    # What is owned is live memory, into which it is read; whole parameters are joined from sections.
    sharded, _, factories = load_preprocess(sharded_state(engine))
    sharded, _ = extract_sharded_base(sharded)
    try:
        loaded = TorchDistLoadShardedStrategy().load(sharded, folder)
    except _ENGINE_ERRORS as error:
        raise RunError(f"checkpoint {folder} does not hold this model: {_last_line(error)}") from error
    engine.take_loaded(loaded_parameters(engine, mapping.apply_factory_merges(loaded, factories)["model"]))


class _PlanningStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Plans a save and leaves the writing to the caller."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: tuple[Any, ...]) -> tuple[Any, Any]:
        """The writer with what it is to write, and on rank 0 the index."""
        return writer, planned[1]


def _live(engine: Engine) -> set[int]:
    """Addresses of the memory that training changes."""
    parameters = (p for chunk in engine.chunks for p in chunk.parameters())
    owned = (t for one in engine.owned() for t in (engine.weight_of(one), *one.state.values()))
    return {tensor.untyped_storage().data_ptr() for tensor in (*parameters, *owned)}


def _copied(buckets: list[Any], live: set[int]) -> list[Any]:
    """The same buckets with every tensor in host memory of its own."""
    copies = [
        (path, key, (plain, [(item, _copy(tensor, live)) for item, tensor in tensors]))
        for path, key, (plain, tensors) in buckets
    ]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def _copy(tensor: Tensor, live: set[int]) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.to("cpu", non_blocking=True)
    # Megatron-Core has copied what is part of a larger storage already.
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


def _write_bucket(bucket: Any, transforms: Any) -> list[Any]:
    """Write one file durably by Megatron-Core's writer, and say where the pieces lie in it."""
    outcome: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(0)
    # Without its decorator, which turns the garbage collector off: that is meant for a process that writes and ends.
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data.__wrapped__
    write([transforms], 0, bucket, outcome, unfinished, use_fsync=True)
    _, results = outcome.get()
    if isinstance(results, Exception):
        raise results
    found: list[Any] = results
    return found


def _last_line(error: BaseException) -> str:
    """What went wrong: torch reports a rank's whole traceback, whose last line names the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rpartition("Exception: ")[2]
