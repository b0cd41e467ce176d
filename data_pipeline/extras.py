"""Packages that only some inputs need, and the sentence for one that is not installed."""

from __future__ import annotations

from ..configs.errors import UsageError


def missing_package(need: str, package: str, extra: str) -> UsageError:
    """The error for an optional package that is missing: ``need`` says what for, ``extra`` is the one that has it."""
    return UsageError(f"{need} needs the package {package}, which is not installed: pip install 'trine[{extra}]'")
