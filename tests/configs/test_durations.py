"""Lengths of time as people write them."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from trine.configs.durations import Duration

DURATION = TypeAdapter(Duration)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(90, 90), (1.5, 1.5), ("90", 90), ("90s", 90), ("90m", 5400), ("23h30m", 84600), ("1d12h", 129600), ("0.5h", 1800)],
)
def test_lengths(written: object, seconds: float) -> None:
    assert DURATION.validate_python(written) == seconds


@pytest.mark.parametrize("written", ["", "9x", "h", "1h 30m", "-1h", "0s", 0, -3, "12:30:00", [1]])
def test_what_is_no_length(written: object) -> None:
    with pytest.raises(ValidationError):
        DURATION.validate_python(written)
