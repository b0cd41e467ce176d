"""JSON whose form nobody vouches for: what is asked of it is there and of the right kind, or it is None."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Document:
    """A value of JSON, or None for one that is not there."""

    value: Any = None

    @staticmethod
    def read(path: Path) -> Document:
        """What a file holds; nothing where it is missing or no JSON. Raises OSError where it cannot be read."""
        try:
            # What is no number in JSON is none here either, so that it can be written as JSON again.
            return Document(json.loads(path.read_bytes(), parse_float=_finite, parse_constant=lambda _: None))
        except (FileNotFoundError, ValueError, RecursionError):
            return Document()

    def at(self, *keys: str | int) -> Document:
        """What lies at the end of a path of keys and positions."""
        value = self.value
        for key in keys:
            if isinstance(key, str):
                value = value.get(key) if isinstance(value, dict) else None
            else:
                value = value[key] if isinstance(value, list) and key < len(value) else None
        return Document(value)

    @property
    def integer(self) -> int | None:
        """A whole number."""
        return self.value if isinstance(self.value, int) and not isinstance(self.value, bool) else None

    @property
    def number(self) -> float | None:
        """Any number."""
        return self.value if isinstance(self.value, float) else self.integer

    @property
    def text(self) -> str | None:
        """A string."""
        return self.value if isinstance(self.value, str) else None

    @property
    def flag(self) -> bool:
        """Whether it is true."""
        return self.value is True

    @property
    def items(self) -> list[Document]:
        """The values of a list."""
        return [Document(item) for item in self.value] if isinstance(self.value, list) else []

    @property
    def fields(self) -> dict[str, Document]:
        """The values of an object by name."""
        return {key: Document(v) for key, v in self.value.items()} if isinstance(self.value, dict) else {}


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None
