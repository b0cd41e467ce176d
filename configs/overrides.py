"""Overrides from the command line: ``key.sub=value`` laid over the mapping of a recipe before it is validated."""

from __future__ import annotations

from typing import Any

import yaml

from .errors import UsageError
from .validation import shown


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one key of ``raw`` in place.

    ``override`` is ``key.sub=value``: the value is read as YAML, a part of the key may be an index into a list
    (``model.stack.0.layers=4``), and sections that are absent come into being. Whether the key exists is left to
    validation. Raises UsageError when the override is malformed or leads through something that has no keys.
    """
    key, value = _parse(override)
    *parents, last = key.split(".")
    place: Any = raw
    for depth, part in enumerate(parents):
        place = _descend(place, part, ".".join(parents[:depth]), override)
    if isinstance(place, list):
        place[_index(place, last, ".".join(parents), override)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise _no_keys(place, ".".join(parents), override)


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"override {override!r} has no '=': write it as key.sub=value")
    if not all(part.strip() for part in key.split(".")):
        raise UsageError(f"override {override!r} has an empty key: write it as key.sub=value")
    if not text.strip():
        raise UsageError(f"override {override!r} has no value: write it as key.sub=value")
    try:
        return key.strip(), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UsageError(f"override {override!r} has a value that is not YAML: put it in quotes") from None


def _descend(place: Any, part: str, path: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, path, override)]
    if not isinstance(place, dict):
        raise _no_keys(place, path, override)
    if place.get(part) is None:
        place[part] = {}
    return place[part]


def _index(items: list[Any], part: str, path: str, override: str) -> int:
    indices = [str(index) for index in range(len(items))]
    if part not in indices:
        range_text = f"from 0 to {len(items) - 1}" if items else "none, for it is empty"
        raise UsageError(f"override {override!r}: {part} is not an index of {path} (they are {range_text})")
    return indices.index(part)


def _no_keys(place: Any, path: str, override: str) -> UsageError:
    return UsageError(f"override {override!r}: {path} is {shown(place)}, which has no keys")
