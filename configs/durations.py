"""Lengths of time as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PositiveFloat
from pydantic_core import PydanticCustomError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PART = r"(\d+(?:\.\d+)?)([dhms])"


def seconds_of(value: object) -> object:
    """``1d12h``, ``23h30m`` or ``90s`` in seconds; what is no text stays as it is, for others to judge."""
    if not isinstance(value, str) or re.fullmatch(r"[+-]?\d+(\.\d+)?", value):
        return value
    if not re.fullmatch(f"(?:{_PART})+", value):
        raise PydanticCustomError("duration", "not a length of time")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, value))


Duration = Annotated[PositiveFloat, BeforeValidator(seconds_of)]
"""Seconds, which may be written as a number or as text such as ``90m`` or ``1d12h``."""
