"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd per node, for tests. Needs root.

Each node is a process tree of its own pid and mount namespace, so that one kill is a power cut. With networks, nodes
and controller also have network namespaces, host names and addresses of their own, joined by a bridge inside the
controller's namespace: the machine's own network is left alone, and cables can be pulled.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil
from slurm_files import CONTROLLER, NETWORK, write_cluster_files

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "setpriv", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
_START_S, _END_S, _CALL_S = 60.0, 10.0, 60.0


class Cluster:
    """``count`` nodes named node1, node2, ... that claim ``cpus`` cores and ``gpus`` GPUs each.

    Everything it writes is in ``folder``, a new one; every process that it starts ends with ``stop`` or with the
    thread that called ``start``.
    """

    def __init__(self, folder: Path, *, count: int = 3, cpus: int = 64, gpus: int = 8, networks: bool = True) -> None:
        self.folder, self.count, self.networks = folder, count, networks
        self.nodes = [f"node{number}" for number in range(1, count + 1)]
        self._cpus, self._gpus = cpus, gpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing or os.getuid() != 0:
            raise RuntimeError(
                f"a Slurm cluster needs root (this is user {os.getuid()}) and {', '.join(missing) or 'its daemons'}: "
                "make test-slurm installs them"
            )
        self.folder.mkdir(mode=0o755)
        port = 27000 if self.networks else _free_ports(self.count + 1)
        write_cluster_files(
            self.folder, count=self.count, cpus=self._cpus, gpus=self._gpus, port=port, networks=self.networks
        )
        self._start_munge()
        self._start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_until(lambda: set(self.idle_nodes()) == set(self.nodes), _START_S, "not all nodes became idle")

    def stop(self) -> None:
        """End every process of the cluster, and with them the networks."""
        for name in sorted(self._daemons, key=lambda name: name == "munged"):
            self._end(name)

    def run(self, *words: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command where the cluster is reachable, and return its outcome."""
        return subprocess.run(
            [*self.inside(), *map(str, words)],
            capture_output=True, text=True, check=check, timeout=_CALL_S, env=self.environment(**environment),
        )  # fmt: skip

    def inside(self) -> list[str]:
        """What stands before a command that is to run on the controller's machine."""
        if not self.networks:
            return []
        pid = str(self._first_process("slurmctld"))
        return ["nsenter", "-t", pid, "--net", "--uts", "--mount", "--pid", f"--wd={Path.cwd()}"]

    def environment(self, **additions: str) -> dict[str, str]:
        """The environment of a user of the cluster who is in no job."""
        foreign = ("SLURM_", "SBATCH_", "OMPI_", "TORCHELASTIC", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")} | additions

    def idle_nodes(self) -> list[str]:
        """The nodes that could take a job."""
        told = self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False)
        return told.stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm tells of a job, by its own names."""
        told = self.run("scontrol", "-o", "show", "job", number, check=False)
        return dict(re.findall(r"(?:^|\s)([A-Za-z/:]+)=(\S*)", told.stdout))

    def nodes_of(self, number: str) -> list[str]:
        """The nodes of a job, in its order."""
        return self.run("scontrol", "show", "hostnames", self.job(number)["NodeList"]).stdout.split()

    def wait_for(self, number: str, states: Sequence[str] = ENDED, *, seconds: float) -> dict[str, str]:
        """Wait until the job is in one of ``states`` and return what Slurm tells of it then."""
        self.wait_until(lambda: self.job(number).get("JobState") in states, seconds, f"job {number} is not {states}")
        return self.job(number)

    def wait_until(self, condition: Callable[[], bool], seconds: float, complaint: str) -> None:
        """Poll ``condition``; after ``seconds`` fail with the complaint and what the controller logged."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = (self.folder / "log" / "slurmctld.log").read_text(errors="replace").splitlines()[-40:]
                queue = self.run("squeue", "-l", check=False).stdout
                raise AssertionError("\n".join([f"{complaint} after {seconds:g} s", queue, *log]))
            time.sleep(0.1)

    def cut_power(self, node: str) -> None:
        """End everything on a node at once."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    def pull_cable(self, node: str) -> None:
        """Disconnect a node, whose processes go on. Needs networks."""
        self._in_network("slurmctld", "ip", "link", "set", f"v{node}", "down")

    def plug_cable(self, node: str) -> None:
        """Connect it again."""
        self._in_network("slurmctld", "ip", "link", "set", f"v{node}", "up")

    def processes(self, node: str) -> list[psutil.Process]:
        """Every process on a node but its first, which keeps its namespaces."""
        return psutil.Process(self._first_process(node)).children(recursive=True)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, after a power cut too."""
        wait = "until ip address show dev eth0 2>/dev/null | grep -q 'inet '; do sleep .05; done"
        setup = [f"hostname {node}", "ip link set lo up", wait] if self.networks else []
        # The first process of a pid namespace inherits orphans, which a shell that waits reaps.
        self._start_apart(node, [*setup, f"slurmd -D -N {node} & wait; wait"])
        if self.networks:
            self._connect(node)

    def _start_controller(self) -> None:
        address = f"{NETWORK}.254/24"
        bridge = f"ip link add br0 type bridge && ip address add {address} dev br0 && ip link set br0 up"
        if self.networks:
            marker = self.folder / "run" / "bridge"
            setup = [f"hostname {CONTROLLER}", "ip link set lo up", f"{bridge} && touch {marker}"]
            self._start_apart("slurmctld", [*setup, "slurmctld -D -c & trap 'kill $!' TERM; wait; wait"])
            self._wait_for_file(marker, "the bridge was not made: does this kernel allow network namespaces?")
        else:
            self._start("slurmctld", "slurmctld", "-D", "-c")

    def _start_munge(self) -> None:
        munge, log = self.folder / "munge", self.folder / "log" / "munged.log"
        sockets = ["-S", str(munge / "munge.socket"), f"--key-file={munge / 'munge.key'}", f"--seed-file={munge / 'seed'}"]
        self._start(
            "munged", "munged", "-F", "-f", *sockets, f"--log-file={log}",
            f"--pid-file={self.folder / 'run' / 'munged.pid'}", "--num-threads=10",
        )  # fmt: skip
        self._wait_for_file(munge / "munge.socket", f"munged does not answer: see {log}")

    def _start_apart(self, name: str, commands: Sequence[str]) -> None:
        etc = self.folder / "etc"
        mounts = [f"mount --bind {etc / file} /etc/{file}" for file in ("hosts", "nsswitch.conf") if Path("/etc", file).exists()]
        networks = ["--net", "--uts"] if self.networks else []
        spaces = ["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._start(name, "unshare", *networks, *spaces, "bash", "-c", "\n".join([*mounts, *commands]))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=self.environment(),
            )  # fmt: skip

    def _end(self, name: str) -> None:
        daemon = self._daemons[name]
        if name == "slurmctld" and self.networks:
            with suppress(psutil.Error, IndexError):
                os.kill(self._first_process(name), signal.SIGTERM)
        elif name in ("munged", "slurmctld"):
            daemon.terminate()
        else:
            daemon.kill()
        try:
            daemon.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _first_process(self, name: str) -> int:
        """The first process of a daemon's namespace, as seen from outside."""
        return int(psutil.Process(self._daemons[name].pid).children()[0].pid)

    def _connect(self, node: str) -> None:
        number = node.removeprefix("node")
        here = os.readlink("/proc/self/ns/net")

        def is_apart() -> bool:
            with suppress(IndexError, FileNotFoundError, psutil.Error):
                return os.readlink(f"/proc/{self._first_process(node)}/ns/net") != here
            return False

        self.wait_until(is_apart, _START_S, f"{node} has no network of its own")
        controller, pid = str(self._first_process("slurmctld")), str(self._first_process(node))
        link = ["ip", "link", "add", f"v{node}", "netns", controller, "type", "veth", "peer", "name", "eth0", "netns", pid]
        subprocess.run(link, check=True, timeout=_CALL_S)
        self._in_network("slurmctld", "ip", "link", "set", f"v{node}", "master", "br0", "up")
        self._in_network(node, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self._in_network(node, "ip", "link", "set", "eth0", "up")

    def _in_network(self, name: str, *command: str) -> None:
        nsenter = ["nsenter", "-t", str(self._first_process(name)), "-n"]
        subprocess.run([*nsenter, *command], check=True, capture_output=True, timeout=_CALL_S)

    def _wait_for_file(self, path: Path, complaint: str) -> None:
        deadline = time.monotonic() + _START_S
        while not path.exists():
            assert time.monotonic() < deadline, complaint
            time.sleep(0.05)


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody on this machine listens at."""
    for first in range(27000, 32000 - count, count):
        if all(map(_is_free, range(first, first + count))):
            return first
    raise RuntimeError(f"no {count} neighbouring ports are free")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
