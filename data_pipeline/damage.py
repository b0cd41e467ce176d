"""What takes the place of samples that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..configs.errors import RunError
from .mixture import Mixture, SampleId

MOST_ATTEMPTS = 100
"""Windows tried in place of one sample: when so many are damaged too, nothing of the source can be trusted."""


class Replacement(NamedTuple):
    """One line of ``skipped.jsonl``."""

    source: str
    sample: int
    reason: str
    replaced_by: int


class Substitutes:
    """The damaged samples found so far, and what is read instead of each: a function of the sample alone.

    So every rank that is told of the same damage reads the same, and a run that is resumed does too.
    """

    def __init__(self, mixture: Mixture, budget: int) -> None:
        self._mixture, self._budget = mixture, budget
        self._attempts: dict[SampleId, int] = {}
        self._instead: dict[SampleId, SampleId] = {}
        self.found_before = 0
        """Damaged samples that the run found before it was resumed."""

    @property
    def table(self) -> Mapping[SampleId, SampleId]:
        """Which sample is read instead of which."""
        return self._instead

    @property
    def count(self) -> int:
        """Damaged samples found since the start of the run; one that is found again after the run was resumed counts
        again."""
        return self.found_before + len(self._instead)

    def replace(self, found: Mapping[SampleId, str]) -> list[Replacement]:
        """Choose a (or another) substitute for each sample of ``found``, which says what is wrong.

        Raises RunError when the budget is used up, or nothing whole is found in a sample's place.
        """
        replacements = [self._replace(sample, found[sample]) for sample in sorted(found)]
        if self.count > self._budget:
            last = replacements[-1]
            raise RunError(
                f"{self.count} damaged samples have been replaced, more than data.damage_budget={self._budget}; the "
                f"last one: {last.reason}. Repair the data ('trine data verify' lists the damage), or raise the budget"
            )
        return replacements

    def _replace(self, sample: SampleId, reason: str) -> Replacement:
        attempt = self._attempts[sample] = self._attempts.get(sample, 0) + 1
        name = self._mixture.sources[sample.source].name
        if attempt > MOST_ATTEMPTS:
            raise RunError(
                f"sample {sample.window} of {name} is damaged and so are {MOST_ATTEMPTS} others that were tried in its "
                f"place; the last one: {reason}"
            )
        instead = self._instead[sample] = self._mixture.substitute(sample, attempt)
        return Replacement(name, sample.window, reason, instead.window)
