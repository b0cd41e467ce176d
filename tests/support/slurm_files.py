"""The configuration files of a Slurm cluster whose nodes are all on this machine."""

from __future__ import annotations

import getpass
import os
import socket
import stat
from pathlib import Path

NETWORK = "10.77.0"
"""Where the nodes of a cluster with networks have their addresses; the controller is .254."""

CONTROLLER = "ctl"

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=20
MinJobAge=3600
InactiveLimit=0
Waittime=0
GresTypes=gpu
{nodes} CPUs={cpus} RealMemory=2000000 Gres=gpu:{gpus}
PartitionName=main Nodes=node[1-{count}] Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job waits for it, by default 120 s. NoInAddrAny: nobody else may reach the daemons.
# config_overrides: the nodes claim more cores and memory than the machine has.


def write_cluster_files(folder: Path, *, count: int, cpus: int, gpus: int, port: int, networks: bool) -> None:
    """Write what the daemons read, into a folder that is there: slurm.conf, gres.conf, hosts, the key of munge."""
    for name in ("etc", "log", "spool", "state", "munge", "run", "dev"):
        (folder / name).mkdir(mode=0o755)
    # munged refuses a socket below folders that others may not enter.
    (folder / "etc" / "slurm.conf").write_text(
        _CONFIGURATION.format(
            controller=f"{CONTROLLER}({NETWORK}.254)" if networks else f"{_this_host()}(127.0.0.1)",
            user=getpass.getuser(),
            port=port,
            folder=folder,
            nodes=_nodes(count, port, networks),
            cpus=cpus,
            gpus=gpus,
            count=count,
        )
    )
    _make_fake_gpus(folder / "dev", gpus)
    (folder / "etc" / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-{gpus - 1}]\n")
    (folder / "etc" / "hosts").write_text(_hosts(count, networks))
    switch = Path("/etc/nsswitch.conf")
    lines = [line for line in switch.read_text().splitlines() if not line.startswith("hosts:")] if switch.exists() else []
    (folder / "etc" / "nsswitch.conf").write_text("\n".join([*lines, "hosts: files"]) + "\n")  # no name server there
    key = folder / "munge" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def _nodes(count: int, port: int, networks: bool) -> str:
    if networks:
        return f"NodeName=node[1-{count}] NodeAddr={NETWORK}.[1-{count}] Port={port + 1}"
    ports = f"[{port + 1}-{port + count}]"
    return f"NodeName=node[1-{count}] NodeHostname={_this_host()} NodeAddr=127.0.0.1 Port={ports}"


def _hosts(count: int, networks: bool) -> str:
    if not networks:
        nodes = " ".join(f"node{number}" for number in range(1, count + 1))
        return Path("/etc/hosts").read_text() + f"127.0.0.1 {_this_host()} {nodes}\n"
    nodes = "".join(f"{NETWORK}.{number} node{number}\n" for number in range(1, count + 1))
    return f"127.0.0.1 localhost\n{NETWORK}.254 {CONTROLLER}\n{nodes}"


def _make_fake_gpus(folder: Path, gpus: int) -> None:
    """Null devices, which Slurm counts as GPUs; torch sees none."""
    for number in range(gpus):
        os.mknod(folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _this_host() -> str:
    return socket.gethostname().partition(".")[0]
