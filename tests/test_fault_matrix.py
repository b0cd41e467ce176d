"""The table of faults in docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"`((?:\w+/)*\w+\.py)?(?:::(\w+))?`")


def test_every_row_names_a_test(repository: Path) -> None:
    text = (repository / "docs" / "reliability.md").read_text()
    rows = [line for line in text.partition("## Fault matrix")[2].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    for row in rows:
        shown = row.split(" | ")[-1]
        file = ""
        found = [match.groups() for match in NAME.finditer(shown) if any(match.groups())]
        assert found, row
        for path, name in found:
            file = path or file
            source = (repository / "tests" / file).read_text()
            assert name is None or f"def {name}(" in source, f"{file} has no {name}"
