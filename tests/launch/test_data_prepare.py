"""``trine data prepare`` as users start it: with workers, under MPI, killed, interrupted, and refused."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(240)

DEADLINE_S = 60.0
MPIRUN = Path(sys.executable).with_name("mpirun")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
OPTIONS = ["--train-tokenizer", "300", "--validation-fraction", "0.1", "--chunk-mb", "0.02"]
"""Some thirty chunks of the fixture ``library``."""


@pytest.fixture(scope="module")
def library() -> list[str]:
    """A megabyte of text: two packages of the standard library."""
    return [str(Path(sysconfig.get_path("stdlib"), name)) for name in ("asyncio", "email")]


@pytest.fixture(scope="module")
def long(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """So much that no command is done with it before a busy machine lets the test come to its point."""
    names = [tmp_path_factory.mktemp("names") / Path(given).name for _ in range(20) for given in library]
    for name, given in zip(names, itertools.cycle(library), strict=False):
        name.symlink_to(given)
    return [str(name) for name in names]


@pytest.fixture(scope="module")
def alone(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its preparation in one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    told = prepare(library, output, "--workers", "1")
    assert told.returncode == 0, told.stderr
    return output


@pytest.fixture(scope="module")
def expected(alone: Path) -> dict[str, str]:
    """The hashes of that."""
    found = hashes(alone)
    assert {"index.json", "tokenizer.json", "train-00000-000.tar", "train-00020-000.idx.npy"} <= found.keys()
    return found


def command(inputs: list[str], output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "trine", "data", "prepare", *inputs, "--output", str(output), *OPTIONS, *options]


def prepare(
    inputs: list[str], output: Path, *options: str, ranks: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    launcher = [str(MPIRUN), "-n", str(ranks), "--oversubscribe"] if ranks else []
    return subprocess.run(
        [*launcher, *command(inputs, output, *options)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * DEADLINE_S,
        env={**os.environ, **MPI, **environment},
    )


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a command as the leader of a process group of its own; what is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(words: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **MPI},
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_chunks(process: subprocess.Popen[str], output: Path, count: int) -> None:
    """Wait until so many chunks are done; the process must still be at work."""
    deadline = time.monotonic() + DEADLINE_S
    while len(list((output / "chunks").glob("*.json"))) < count:
        assert process.poll() is None, f"it ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, "chunks are not done in time"
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_write_what_one_process_writes(
    library: list[str], expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    told = prepare(library, tmp_path / "out", "--workers", str(workers))
    assert told.returncode == 0, told.stderr
    assert hashes(tmp_path / "out") == expected
    lines = told.stderr.splitlines()
    assert re.fullmatch(rf"trine: preparing \d+ files of \d\.\d MB in \d+ chunks, with {workers} processes", lines[0])
    assert lines[1].startswith("trine: training a vocabulary of 300 tokens on ")
    assert lines[-1].startswith("trine: tokenised ")
    assert lines[-1].endswith(" tokens/s)")
    assert told.stdout.startswith(f"{tmp_path / 'out'}: ")
    assert told.stdout.endswith("for validation; vocabulary 300\n")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_write_what_one_process_writes(
    library: list[str], expected: dict[str, str], tmp_path: Path, ranks: int
) -> None:
    told = prepare(library, tmp_path / "out", ranks=ranks)
    assert told.returncode == 0, told.stderr
    assert hashes(tmp_path / "out") == expected
    assert told.stdout.count("vocabulary 300") == 1


def test_tar_and_webdataset_read_the_shards(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")  # before the import: webdataset looks at it there
    import webdataset

    shards = sorted(map(str, alone.glob("train-*.tar")))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert len(keys) == len(set(keys)) >= len(shards) > 20
    listings = [subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True) for shard in shards]
    names = [name for listing in listings for name in listing.stdout.split()]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("tok", "len")]


def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    library: list[str],
    expected: dict[str, str],
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    output = tmp_path / "out"
    moments = random.Random(0)
    finished: dict[str, tuple[int, int]] = {}
    for chunks in (1, 5, 9):
        process = start(command(library, output, "--workers", "2"))
        wait_for_chunks(process, output, chunks)
        time.sleep(moments.uniform(0, 0.02))  # somewhere in the next chunks
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert "index.json" not in hashes(output)
        # Of chunks with a record every shard stays the very file that it was.
        for name, identity in finished.items():
            assert identity == _identity(output / name), f"{name} was written again"
        done = {path.stem for path in (output / "chunks").glob("*.json")}
        finished = {path.name: _identity(path) for path in output.glob("*.tar") if path.name.split("-")[1] in done}
        assert len(done) >= chunks
    assert prepare(library, output, "--workers", "2").returncode == 0
    assert hashes(output) == expected
    assert finished == {name: _identity(output / name) for name in finished}


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_workers_do_not_outlive_the_command(
    long: list[str], tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    process = start(command(long, tmp_path / "out", "--workers", "2"))
    wait_for_chunks(process, tmp_path / "out", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not alive


def test_a_killed_worker_is_one_sentence_and_the_same_command_continues(
    library: list[str],
    expected: dict[str, str],
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    process = start(command(library, tmp_path / "out", "--workers", "2"))
    wait_for_chunks(process, tmp_path / "out", 2)
    children = psutil.Process(process.pid).children()
    next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
    _, told = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert told.splitlines()[-1].startswith("trine: a worker process ended before its work was done, as happens when")
    assert "Traceback" not in told
    assert not psutil.wait_procs(children, timeout=DEADLINE_S)[1]
    assert prepare(library, tmp_path / "out", "--workers", "2").returncode == 0
    assert hashes(tmp_path / "out") == expected


def test_ctrl_c_ends_it_with_one_word(
    long: list[str], tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    process = start(command(long, tmp_path / "out", "--workers", "2"))
    wait_for_chunks(process, tmp_path / "out", 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, told = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "trine: interrupted"
    assert "Traceback" not in told


def test_an_end_of_the_workers_is_no_accident_however_late_the_executor_hears_of_it() -> None:
    # Slow in asking the executor to end, as on a busy machine, while tasks wait.
    program = """
import time
from concurrent.futures import ProcessPoolExecutor
from trine.data_pipeline.preparation.fan_out import completed
from trine.launch.executors import run_with_workers

def work(executor, processes):
    for _ in completed(executor, time.sleep, [(0,), *[(60,)] * 10]):
        raise ZeroDivisionError

def slow(executor, wait=True, shutdown=ProcessPoolExecutor.shutdown, **options):
    time.sleep(0.5)
    shutdown(executor, wait, **options)

if __name__ == "__main__":
    ProcessPoolExecutor.shutdown = slow
    try:
        run_with_workers(work, 2)
    except ZeroDivisionError:
        print("as it was raised")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("as it was raised\n", "")


def test_a_second_command_on_the_same_folder_is_refused(
    long: list[str], tmp_path: Path, start: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    process = start(command(long, tmp_path / "out", "--workers", "2"))
    wait_for_chunks(process, tmp_path / "out", 1)
    os.killpg(process.pid, signal.SIGSTOP)
    refused = prepare(long, tmp_path / "out", "--workers", "1")
    os.killpg(process.pid, signal.SIGCONT)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"trine: {tmp_path / 'out'} is being prepared by another process; wait for it")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_fails_ends_the_job_with_its_sentence(tmp_path: Path, library: list[str], ranks: int) -> None:
    bad = tmp_path / "zz.txt"
    bad.write_bytes(b"\xff")
    told = prepare([*library, str(bad)], tmp_path / "out", ranks=ranks)
    assert told.returncode == 2, told.stderr
    assert f"trine: {bad} is not UTF-8 text (byte 0)" in told.stderr
    assert "Traceback" not in told.stderr


def test_a_killed_rank_ends_the_job_and_the_same_command_continues(
    library: list[str],
    expected: dict[str, str],
    tmp_path: Path,
    start: Callable[[list[str]], subprocess.Popen[str]],
) -> None:
    process = start([str(MPIRUN), "-n", "3", "--oversubscribe", *command(library, tmp_path / "out")])
    wait_for_chunks(process, tmp_path / "out", 2)
    ranks = [child for child in psutil.Process(process.pid).children() if "trine" in child.cmdline()]
    assert len(ranks) == 3
    ranks[1].kill()
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert not psutil.wait_procs(ranks, timeout=DEADLINE_S)[1]
    told = prepare(library, tmp_path / "out", ranks=2)
    assert told.returncode == 0, told.stderr
    assert hashes(tmp_path / "out") == expected


def test_wrong_ways_to_start_it(library: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    told = prepare(library, output, "--workers", "0")
    assert (told.returncode, told.stderr) == (2, "trine: --workers 0 leaves nobody to work: use 1 or more\n")
    told = prepare(library, output, "--chunk-mb", "0")
    assert told.returncode == 2
    assert told.stderr.startswith("trine: --chunk-mb 0 is not the size of a chunk")
    told = prepare(library, output, "--workers", "2", ranks=1)
    assert told.returncode == 2
    assert "trine: --workers 2 has no effect under mpirun, whose ranks work: leave it out" in told.stderr
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    told = prepare(library, output, **torchrun)
    assert told.returncode == 2
    assert told.stderr.startswith("trine: torchrun starts processes that would all do the same here")
    # Slurm's variables without an MPI that knows of the other tasks.
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    told = prepare(library, output, **step)
    assert told.returncode == 2
    assert "trine: srun started 2 ranks and mpi4py sees 1" in told.stderr
    assert not output.exists()


def test_ranks_need_mpi4py(library: list[str], tmp_path: Path) -> None:
    words = command(library, tmp_path / "out")[3:]
    program = f"import sys; sys.modules['mpi4py'] = None; from trine.launch.cli import main; sys.exit(main({words!r}))"
    told = subprocess.run(
        [str(MPIRUN), "-n", "2", "--oversubscribe", sys.executable, "-c", program],
        capture_output=True, text=True, check=False, timeout=DEADLINE_S, env={**os.environ, **MPI},
    )  # fmt: skip
    assert told.returncode == 2
    assert "pip install 'trine[mpi]', or start one process and use --workers N" in told.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.corpus
@pytest.mark.timeout(3600)
def test_a_real_corpus_is_the_same_under_any_number_of_ranks(tmp_path: Path) -> None:
    """35 MB of documentation, from the Debian packages linux-doc-6.1 and python3.11-doc."""
    packages = ("linux-doc-6.1", "python3.11-doc")
    subprocess.run(["apt-get", "download", *packages], cwd=tmp_path, check=True)
    for package in tmp_path.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(tmp_path / "doc")], check=True)
    corpus = tmp_path / "corpus"
    for source in (tmp_path / "doc").rglob("*.rst.txt"):
        target = corpus / source.relative_to(tmp_path / "doc")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    assert sum(path.stat().st_size for path in corpus.rglob("*.rst.txt")) > 30_000_000
    found = []
    for ranks in (1, 2, 3):
        told = subprocess.run(
            [str(MPIRUN), "-n", str(ranks), "--oversubscribe", sys.executable, "-m", "trine", "data", "prepare",
             str(corpus), "--output", str(tmp_path / f"out{ranks}"), "--train-tokenizer", "8192"],
            capture_output=True, text=True, check=False, env={**os.environ, **MPI},
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        found.append(hashes(tmp_path / f"out{ranks}"))
        print(ranks, told.stderr, told.stdout, found[-1]["index.json"])
    assert found[0] == found[1] == found[2]
