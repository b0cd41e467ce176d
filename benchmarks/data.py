"""How fast data are prepared and read, beside what others do with the same documents on the same core.

Reading, from a warm page cache: windows of trine's shards in random order, alone and as batches; windows of
Megatron-Core's GPTDataset over the same tokens; and the shards read in sequence by webdataset. Preparing:
``preparation.prepare`` beside the bare encoder of the tokenizers package. README.md says how to read the
numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

# Read when the libraries are imported: one core each, and webdataset without commands and pickles.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", WDS_SECURE="1")

import numpy as np
import torch
import webdataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from tokenizers import Tokenizer
from torch.utils.data import default_collate

from trine.configs.ramps import StepShape
from trine.data_pipeline.corpus.sources import iter_documents
from trine.data_pipeline.corpus.tokenizer import train_byte_level_bpe
from trine.data_pipeline.dataset import TokenDataset
from trine.data_pipeline.loader import BatchLoader
from trine.data_pipeline.mixture import Mixture, Source
from trine.data_pipeline.order import SampleOrder
from trine.data_pipeline.preparation.prepare import prepare
from trine.data_pipeline.preparation.splits import TRAIN
from trine.data_pipeline.shards.manifest import TOKENIZER, load_manifest, token_dtype
from trine.data_pipeline.shards.stats import join_pieces

SEED = 0
BATCH = 8
"""Windows in a batch, where batches are made."""
ENCODED_AT_ONCE = 64
"""Documents that the bare encoder gets in one call."""
REFERENCE = {"reading": "GPTDataset, windows", "preparing": "tokenizers alone"}

Job = Callable[[], int]
"""Does some work and returns the tokens that it was."""


@dataclass(frozen=True)
class Timing:
    """One run of a job."""

    tokens: int
    cpu_seconds: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the JSON."""
    options = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="trine-benchmark-") as name:
        folder = Path(name)
        texts = corpus(options.inputs, options.megabytes * 1_000_000, folder)
        tell(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")
        preparing = measure(preparing_jobs(texts, options.vocabulary, folder), options.preparing_rounds)
        print(table("preparing", preparing))
        reading = {}
        for length in options.lengths:
            tell(f"reading windows of {length:,} tokens")
            jobs = reading_jobs(folder, length, options.read_tokens)
            reading[length] = measure(jobs, options.rounds)
            print(table("reading", reading[length], f"windows of {length:,}"))
    if options.json:
        write_json(options, preparing, reading)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with those of the quick mode filled in."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", nargs="+", default=["stdlib"], help="as for trine data prepare (default: stdlib)")
    parser.add_argument("--megabytes", type=float, help="characters that are used at most, in millions (default: 12)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="size of the tokenizer (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens per window")
    parser.add_argument("--rounds", type=int, help="rounds of reading; a fourth of it of preparing (default: 20)")
    parser.add_argument("--read-tokens", type=int, help="tokens that a reader reads in a round (default: 4000000)")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    options = parser.parse_args(argv)
    options.megabytes = options.megabytes or (2.0 if options.quick else 12.0)
    options.rounds = options.rounds or (5 if options.quick else 20)
    options.read_tokens = options.read_tokens or (1_000_000 if options.quick else 4_000_000)
    options.preparing_rounds = max(2, options.rounds // 4)
    return options


def corpus(inputs: Sequence[str], characters: float, folder: Path) -> list[str]:
    """The documents, which are also written to ``corpus.jsonl`` in ``folder``."""
    texts: list[str] = []
    held = 0
    for document in iter_documents(inputs):
        if held >= characters:
            break
        texts.append(document.text)
        held += len(document.text)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def preparing_jobs(texts: Sequence[str], vocabulary: int, folder: Path) -> dict[str, Job]:
    """The whole preparation from JSON Lines to shards, and the encoding of the same texts from memory."""
    tell(f"training a tokenizer of {vocabulary:,} tokens")
    trained = train_byte_level_bpe(texts[:: max(1, sum(map(len, texts)) // 4_000_000)], vocabulary)
    trained.save(str(folder / TOKENIZER))
    encoder = Tokenizer.from_file(str(folder / TOKENIZER))
    outputs = iter(range(1 << 30))

    def trine() -> int:
        output = folder / f"prepared-{next(outputs)}"
        manifest = prepare(
            [str(folder / "corpus.jsonl")], output, tokenizer=folder / TOKENIZER, validation_fraction=0.0
        )
        return manifest.tokens(TRAIN) - manifest.documents(TRAIN)

    def alone() -> int:
        tokens = 0
        for start in range(0, len(texts), ENCODED_AT_ONCE):
            encoded = encoder.encode_batch_fast(texts[start : start + ENCODED_AT_ONCE], add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in encoded)
        return tokens

    return {"trine data prepare": trine, REFERENCE["preparing"]: alone}


def reading_jobs(folder: Path, length: int, tokens: int) -> dict[str, Job]:
    """Readers of the first preparation in ``folder``; each reads about ``tokens`` in windows of ``length``."""
    data = folder / "prepared-0"
    windows = max(BATCH, tokens // length // BATCH * BATCH)
    dataset = TokenDataset(data, TRAIN, length)
    order = SampleOrder(len(dataset), SEED)
    mixture = Mixture([Source("data", dataset, 1.0, order)])
    place = dict(micro_batch_size=BATCH, data_parallel_rank=0, data_parallel_size=1)
    loader, with_documents = (BatchLoader(mixture, **place, documents=wanted) for wanted in (False, True))
    shape = StepShape(BATCH, length, 1)
    fast = megatron_dataset(data, folder / "megatron", length, positions=False)
    full = megatron_dataset(data, folder / "megatron", length, positions=True)

    def trine_windows(source: TokenDataset = dataset) -> int:
        return sum(torch.from_numpy(source[int(i)].tokens).numel() - 1 for i in order.sample_ids(0, windows))

    def trine_batches(reader: BatchLoader) -> int:
        plans = (plan for step in range(windows // BATCH) for plan in reader.plan(step * BATCH, BATCH))
        return sum(reader.read(plan, shape).tokens.numel() for plan in plans)

    def megatron_windows(source: Any) -> int:
        return sum(source[i % len(source)]["tokens"].numel() for i in range(windows))

    def megatron_batches(source: Any) -> int:
        batches = ([source[(start + i) % len(source)] for i in range(BATCH)] for start in range(0, windows, BATCH))
        return sum(default_collate(batch)["tokens"].numel() for batch in batches)

    def webdataset_windows() -> int:
        return sum(window.numel() - 1 for window in islice(webdataset_stream(data, length), windows))

    return {
        REFERENCE["reading"]: lambda: megatron_windows(fast),
        "trine, windows": trine_windows,
        "trine, windows, first touch": lambda: trine_windows(TokenDataset(data, TRAIN, length)),
        "webdataset, windows in sequence": webdataset_windows,
        "GPTDataset, batches": lambda: megatron_batches(fast),
        "trine, batches": lambda: trine_batches(loader),
        "GPTDataset, batches, document positions": lambda: megatron_batches(full),
        "trine, batches, document positions": lambda: trine_batches(with_documents),
    }


def megatron_dataset(data: Path, folder: Path, length: int, *, positions: bool) -> Any:
    """GPTDataset over the documents of ``data``; with ``positions`` it begins them anew at each document."""
    prefix = folder / "corpus"
    manifest = load_manifest(data)
    if not folder.exists():
        folder.mkdir()
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(manifest.dtype).type)
        for document in documents(data):
            builder.add_document(torch.from_numpy(document.astype(np.int64)), [document.size])
        builder.finalize(f"{prefix}.idx")
    tokenizer = SimpleNamespace(
        eod=manifest.eos_id, vocab_size=manifest.vocabulary_size, pad=-1,
        unique_identifiers={"class": "benchmark", "positions": positions},
    )  # fmt: skip
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=length, split="1", path_to_cache=str(folder / "cache"), tokenizer=tokenizer,
        reset_position_ids=positions, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    indexed, everything = IndexedDataset(str(prefix)), np.arange(manifest.documents(TRAIN), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), everything, None, Split.train, config)


def payloads(data: Path, suffix: str, dtype: np.dtype[Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The files of that suffix of all shards of the training split, in order."""
    for record in load_manifest(data).splits[TRAIN]:
        with tarfile.open(data / record.name, "r:") as tar:
            for member in tar:
                if member.name.endswith(suffix):
                    yield np.frombuffer(tar.extractfile(member).read(), dtype)  # type: ignore[union-attr]


def documents(data: Path) -> list[np.ndarray[Any, Any]]:
    """The token ids of every document of the training split."""
    tokens = np.concatenate(list(payloads(data, ".tok", token_dtype(load_manifest(data).dtype))))
    pieces = (part.astype(np.int64) for part in payloads(data, ".len", np.dtype("<u4")))
    ends = np.cumsum(np.concatenate(list(join_pieces(pieces))))
    return np.split(tokens, ends[:-1])


def webdataset_stream(data: Path, length: int) -> Iterator[torch.Tensor]:
    """Windows of ``length`` + 1 tokens from the shards as they lie, again and again."""
    manifest = load_manifest(data)
    dtype = token_dtype(manifest.dtype)
    shards = [str(data / record.name) for record in manifest.splits[TRAIN]]
    rest = np.empty(0, np.int64)
    while True:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            rest = np.concatenate([rest, np.frombuffer(sample["tok"], dtype).astype(np.int64)])
            while rest.size > length:
                yield torch.from_numpy(rest[: length + 1])
                rest = rest[length:]


def measure(jobs: dict[str, Job], rounds: int) -> dict[str, list[Timing]]:
    """Run all jobs in turn, round after round, so that what else the machine does falls on all of them alike."""
    for job in jobs.values():
        job()  # fills the page cache, and what the libraries make when they are first used
    timings: dict[str, list[Timing]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            tokens = job()
            timings[name].append(Timing(tokens, time.process_time() - cpu, time.perf_counter() - wall))
    return timings


def summary(kind: str, timings: dict[str, list[Timing]]) -> dict[str, dict[str, float]]:
    """For each job its median rates, and the median of its speed over the reference's in the same round."""
    reference = timings[REFERENCE[kind]]
    return {
        name: {
            "tokens_per_cpu_second": median(run.tokens / run.cpu_seconds for run in runs),
            "tokens_per_second": median(run.tokens / run.seconds for run in runs),
            "relative_speed": median(
                (run.tokens / run.cpu_seconds) / (other.tokens / other.cpu_seconds)
                for run, other in zip(runs, reference, strict=True)
            ),
            "relative_speed_by_clock": median(
                (run.tokens / run.seconds) / (other.tokens / other.seconds)
                for run, other in zip(runs, reference, strict=True)
            ),
        }
        for name, runs in timings.items()
    }


def table(kind: str, timings: dict[str, list[Timing]], what: str = "") -> str:
    """One line for each job."""
    rounds = len(next(iter(timings.values())))
    lines = [
        "",
        f"{kind}{', ' if what else ''}{what}: medians of {rounds} rounds; relative to {REFERENCE[kind]}",
        f"  {'':<40} {'M tokens/s CPU':>15} {'relative':>9} {'by clock':>9}",
    ]
    for name, row in summary(kind, timings).items():
        rate, relative, clock = (
            row[key] for key in ("tokens_per_cpu_second", "relative_speed", "relative_speed_by_clock")
        )
        lines.append(f"  {name:<40} {rate / 1e6:>15.2f} {relative:>9.2f} {clock:>9.2f}")
    return "\n".join(lines)


def write_json(
    options: argparse.Namespace, preparing: dict[str, list[Timing]], reading: dict[int, dict[str, list[Timing]]]
) -> None:
    """All medians, and what they were measured with."""
    document = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "tokenizers", "webdataset", "numpy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "preparing": summary("preparing", preparing),
        "reading": {str(length): summary("reading", timings) for length, timings in reading.items()},
    }
    options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def tell(sentence: str) -> None:
    """Progress, on standard error."""
    print(f"benchmark: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
