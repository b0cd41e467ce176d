"""A flat range of a rank's parameter as rectangles of global tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .parameters import Blueprint, Section


@dataclass(frozen=True)
class Rectangle:
    """A block of one section's global tensor, and where its elements lie in the flat parameter of this rank."""

    section: Section
    offset: tuple[int, ...]
    """In the global tensor."""
    shape: tuple[int, ...]
    start: int
    """The first of its elements, which follow each other, in the flat parameter."""

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


def rectangles(
    blueprint: Blueprint, start: int, stop: int, tensor_rank: int, tensor_size: int
) -> Iterator[Rectangle]:
    """The elements ``start`` .. ``stop`` - 1 of a parameter as this rank holds it, in their order.

    A range of a matrix that lies row by row is at most the end of a row, whole rows, and the start of a row; in each
    of the sections that are stacked in a parameter.
    """
    first = 0
    for section, rows in zip(blueprint.sections, blueprint.local_rows(tensor_size), strict=True):
        columns = _local_columns(section, blueprint, tensor_size)
        size = rows * columns
        low, high = max(start - first, 0), min(stop - first, size)
        origin = _origin(blueprint, rows, columns, tensor_rank)
        for row, column, height, width in _blocks(low, high, columns):
            offset, shape = (origin[0] + row, origin[1] + column), (height, width)
            vector = len(section.shape) == 1
            yield Rectangle(
                section,
                offset[:1] if vector else offset,
                shape[:1] if vector else shape,
                first + row * columns + column,
            )
        first += size


def _local_columns(section: Section, blueprint: Blueprint, tensor_size: int) -> int:
    if len(section.shape) > 2:
        raise TypeError(f"{section.name} has {len(section.shape)} dimensions; only matrices and vectors can be cut")
    if len(section.shape) == 1:
        return 1
    return section.shape[1] // (tensor_size if blueprint.partition == 1 else 1)


def _origin(blueprint: Blueprint, rows: int, columns: int, tensor_rank: int) -> tuple[int, int]:
    """Where this rank's part of a section begins in the whole."""
    return (
        rows * tensor_rank if blueprint.partition == 0 else 0,
        columns * tensor_rank if blueprint.partition == 1 else 0,
    )


def _blocks(low: int, high: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, height, width) of the blocks that make up the elements ``low`` .. ``high`` - 1."""
    while low < high:
        row, column = divmod(low, columns)
        if column or high - low < columns:
            height, width = 1, min(columns - column, high - low)
        else:
            height, width = (high - low) // columns, columns
        yield row, column, height, width
        low += height * width
