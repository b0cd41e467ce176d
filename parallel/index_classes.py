"""What torch's index of sharded tensors may be made of: the one file of a checkpoint that is pickled.

A pickle can name any function to be called, and a manifest beside it says only that nobody has changed the file since
the manifest was written. So the index is read once with names limited to these, before torch reads it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ..configs.errors import RunError

_DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()
_PLANNING = "torch.distributed.checkpoint"
_ALLOWED = {
    ("torch", "Size"),
    *(("torch", name) for name in _DTYPES),
    ("torch.serialization", "_get_layout"),
    *((f"{_PLANNING}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_PLANNING}.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
}  # fmt: skip


def check_index(path: Path) -> None:
    """Raise RunError unless the index names nothing but what an index is made of."""
    try:
        with path.open("rb") as file:
            _Limited(file).load()
    except _ForeignError as error:
        raise RunError(
            f"{path} asks for {error}, which no index of tensors is made of: it would run foreign code, so this "
            "checkpoint is not opened"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError, ValueError) as error:
        raise RunError(f"{path} is no index of tensors ({error})") from error


class _ForeignError(Exception):
    """A name that does not belong there."""


class _Limited(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _ForeignError(f"{module}.{name}")
        return super().find_class(module, name)
