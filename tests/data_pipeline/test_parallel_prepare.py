"""Preparation by several processes: the same bytes as by one, and no work lost when a process is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trine.configs.errors import RunError, UsageError
from trine.data_pipeline.preparation.prepare import prepare
from trine.data_pipeline.shards.manifest import MANIFEST, Manifest

VOCABULARY, SHARD_TOKENS, CHUNK_BYTES = 300, 1200, 10_000
"""As in the fixture ``prepared``."""


def run(inputs: Path, output: Path, executor: Executor | None, **changes: Any) -> Manifest:
    arguments = {
        "train_tokenizer": VOCABULARY,
        "validation_fraction": 0.2,
        "shard_tokens": SHARD_TOKENS,
        "chunk_bytes": CHUNK_BYTES,
    }
    return prepare([str(inputs)], output, executor=executor, **arguments | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def processes(count: int, **arguments: Any) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), **arguments)


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_write_what_one_writes(corpus: Path, prepared: Path, tmp_path: Path, workers: int) -> None:
    with processes(workers) as executor:
        run(corpus, tmp_path, executor)
    assert contents(tmp_path) == contents(prepared)


def test_threads_write_what_one_writes(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as executor:
        run(corpus, tmp_path, executor)
    assert contents(tmp_path) == contents(prepared)


def test_what_a_process_raises_is_told_as_it_is(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.txt").write_bytes(b"good until here \xff")
    tokenizer = {"tokenizer": prepared / "tokenizer.json", "train_tokenizer": None}
    with processes(1) as executor, pytest.raises(UsageError, match=r"bad\.txt is not UTF-8 text \(byte 16\)"):
        run(tmp_path / "in", tmp_path / "out", executor, **tokenizer)


def test_a_full_disk_is_one_sentence(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        # The same error as a full disk: the limit of a file's size, which holds in the workers alone.
        processes(2, initializer=_limit_file_size, initargs=(3000,)) as executor,
        pytest.raises(RunError, match=r"preparing .*out failed: .*File too large; what is finished is kept"),
    ):
        run(corpus, output, executor, tokenizer=prepared / "tokenizer.json", train_tokenizer=None)
    assert not [name for name in contents(output) if name.endswith(".tmp")], "half files would fill the disk"
    run(corpus, output, None, tokenizer=prepared / "tokenizer.json", train_tokenizer=None)
    assert MANIFEST in contents(output)


def _limit_file_size(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_killed_process_is_one_sentence_and_loses_its_chunk_alone(
    corpus: Path, prepared: Path, tmp_path: Path
) -> None:
    killed = threading.Event()

    def kill_when_three_are_done() -> None:
        while len(list((tmp_path / "chunks").glob("*.json"))) < 3:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        killed.set()

    with processes(1) as executor:
        process = executor.submit(os.getpid).result()
        watcher = threading.Thread(target=kill_when_three_are_done, daemon=True)
        watcher.start()
        with pytest.raises(RunError, match="a worker process ended before its work was done, as happens when memory"):
            run(corpus, tmp_path, executor, chunk_bytes=500)
    assert killed.is_set()
    kept = {path.name: path.stat().st_ino for path in tmp_path.glob("train-0000[0-2]-*.tar")}
    run(corpus, tmp_path, None, chunk_bytes=500)
    assert kept == {name: (tmp_path / name).stat().st_ino for name in kept}
    clean = tmp_path.with_name("clean")
    run(corpus, clean, None, chunk_bytes=500)
    assert contents(tmp_path) == contents(clean)
