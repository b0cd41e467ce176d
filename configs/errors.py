"""The two ways in which a command ends badly: wrong use (exit code 2) and failure (exit code 1)."""

from __future__ import annotations


class UsageError(ValueError):
    """Wrong use: one sentence that names the thing, its value and the remedy. The command exits with 2."""


class RunError(RuntimeError):
    """A failure of a run that was asked for correctly. The command exits with 1."""
