"""Numbers that would fit, as the sentence about a number that does not lists them."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """Every whole number that divides ``number``, in order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def listed(numbers: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(str(number) for number in numbers)


def nearest_multiples(number: int, unit: int) -> str:
    """The positive multiples of ``unit`` on either side of ``number``, which is none itself."""
    below = max(number - number % unit, 0)
    return f"{below} or {below + unit}" if below else str(unit)


def even_parts(number: int, count: int) -> list[int]:
    """``count`` whole numbers that add up to ``number`` and differ by one at most, the larger first."""
    share, larger = divmod(number, count)
    return [share + 1] * larger + [share] * (count - larger)
