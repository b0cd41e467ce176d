"""From the configuration of a run's data to its sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..configs.errors import UsageError
from ..configs.schema import Data, DataSource
from .dataset import TokenDataset
from .mixture import Source
from .order import BlockOrder, SampleOrder, SequentialOrder
from .preparation.splits import TRAIN, VALIDATION
from .shards.manifest import Manifest, load_manifest
from .storage.folder import open_folder

_ORDERS = {"windows": SampleOrder, "blocks": BlockOrder}


@dataclass(frozen=True)
class PreparedData:
    """The data of a run as their manifests describe them, which are read once: no shard has been touched."""

    data: Data
    manifests: tuple[Manifest, ...]
    """One for each source, in their order."""

    @property
    def vocabulary_size(self) -> int:
        """Of all sources, whose tokenizers are the same."""
        return self.manifests[0].vocabulary_size

    def training(self, sequence_length: int, seed: int) -> list[Source]:
        """The training split of every source, in shuffled order. Raises UsageError as ``TokenDataset``."""
        sources = []
        for name, source, manifest in self._sources():
            dataset = self._dataset(source, manifest, TRAIN, sequence_length)
            sources.append(Source(name, dataset, source.weight, _ORDERS[self.data.shuffle](len(dataset), seed)))
        return sources

    def validation(self, sequence_length: int) -> list[Source]:
        """The validation split of the sources that have one, as it lies. Raises UsageError where none has."""
        sources = []
        for name, source, manifest in self._sources():
            # A source that is too small, or was prepared without one, leaves the others their shares.
            if manifest.tokens(VALIDATION) > sequence_length or len(self.manifests) == 1:
                dataset = self._dataset(source, manifest, VALIDATION, sequence_length)
                sources.append(Source(name, dataset, source.weight, SequentialOrder(len(dataset))))
        if not sources:
            raise UsageError(
                f"no source has a validation split with a window of train.sequence_length={sequence_length}: prepare "
                "one with a larger --validation-fraction, or set evaluation.interval=0"
            )
        return sources

    def _sources(self) -> Iterator[tuple[str, DataSource, Manifest]]:
        sources = self.data.mixture
        return zip(source_names(sources), sources, self.manifests, strict=True)

    def _dataset(self, source: DataSource, manifest: Manifest, split: str, sequence_length: int) -> TokenDataset:
        return TokenDataset(source.directory, split, sequence_length, cache=self.data.cache, manifest=manifest)


def read_prepared(data: Data) -> PreparedData:
    """Read the manifest of each source.

    Raises UsageError where a source is not there, two hold the same data, or their tokenizers differ; RunError where
    a manifest is damaged.
    """
    places = [source.directory for source in data.mixture]
    manifests = tuple(load_manifest(open_folder(place)) for place in places)
    for place, manifest in zip(places, manifests, strict=True):
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UsageError(
                f"{place} was prepared with another tokenizer ({manifest.tokenizer_sha256[:12]}) than {places[0]} "
                f"({manifests[0].tokenizer_sha256[:12]}), so its token ids mean something else: prepare it again with "
                f"--tokenizer {places[0]}/{manifests[0].tokenizer}"
            )
    _check_different(places, manifests)
    return PreparedData(data, manifests)


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """A short name for each source: the last part of its place, with its number where that would not tell all apart."""
    names = [PurePosixPath(source.directory).name or "data" for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{name}-{number}" for number, name in enumerate(names)]


def _check_different(places: Sequence[str], manifests: Sequence[Manifest]) -> None:
    seen: dict[str, str] = {}
    for place, manifest in zip(places, manifests, strict=True):
        first = seen.setdefault(manifest.fingerprint, place)
        if first != place:
            raise UsageError(f"{place} holds the same data as {first}: give them once, with the sum of the weights")
