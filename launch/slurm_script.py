"""The text of a batch script: what it asks of Slurm, what it sets, what it starts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from .containers import Container
from .slurm_options import SlurmOptions
from .slurm_shell import BEGINNING, ENDING, FUNCTIONS

_TRACE_ENTRIES = 2000
_LEAST_HEARTBEAT_S = 600
# Below 32768, where Linux begins to give ports to outgoing connections.
_FIRST_PORT, _PORTS = 20000, 12000


@dataclass(frozen=True)
class SlurmJob:
    """One run as a job; all paths are absolute, and no text holds a control character."""

    typed: tuple[str, ...]
    """The command that asked for it."""
    directory: Path
    """Where it was given, to which paths in the recipe are relative."""
    words: tuple[str, ...]
    """What ``trine pretrain`` gets: the recipe and its overrides."""
    run: Path
    checkpoints: Path
    steps: int
    collective_timeout: float
    options: SlurmOptions
    container: Container | None

    @property
    def log_directory(self) -> Path:
        """Where the script and the ranks print."""
        return self.run / "slurm"


def script_of(job: SlurmJob) -> str:
    """The batch script of ``job``."""
    parts = [
        "#!/bin/bash\n" + "\n".join(_about(job)),
        "\n".join(f"#SBATCH {line}" for line in _header(job)),
        "set -u\n" + _settings(job),
        _section("How it is told what to do next") + FUNCTIONS.rstrip(),
        _section("A life begins") + BEGINNING.rstrip(),
        _section("What the ranks find in their environment") + "\n" + "\n".join(_environment(job)),
        _section("The ranks") + "\n" + _step(job),
        _section("A life ends") + ENDING.rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str) -> str:
    return f"# ---- {title} {'-' * (100 - len(title))}"


def _about(job: SlurmJob) -> Iterator[str]:
    options = job.options
    yield f"# A run of trine {__version__} on {options.nodes} nodes with {options.ranks_per_node} ranks each, made by"
    yield f"#   {shlex.join(job.typed)}"
    yield "#"
    chained, times = "", ""
    if options.chain > 1:
        chained, times = "--dependency=singleton ", f", {options.chain} times"
    yield f"# To submit it by hand{times}, make the folder of its logs first, without which Slurm drops the job:"
    yield f"#   mkdir -p {_quoted(job.log_directory)} && sbatch {chained}FILE"
    yield "# To stop the run for good, after it has saved:"
    yield f"#   touch {_quoted(job.run / 'stop')}"


def _header(job: SlurmJob) -> Iterator[str]:
    options, (tasks, cpus) = job.options, _tasks(job.options)
    yield from (f"--{name}={shlex.quote(value)}" for name, value in options.names)
    yield f"--nodes={options.nodes}"
    yield f"--ntasks-per-node={tasks}"
    if options.gpus_per_node:
        yield f"--gpus-per-node={options.gpus_per_node}"
    if cpus:
        yield f"--cpus-per-task={cpus}"
    yield f"--time={options.time}"
    yield f"--signal=B:USR1@{options.warn_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--chdir={_quoted(job.directory)}"
    # Slurm puts values for its own names that begin with a percent sign.
    yield f"--output={shlex.quote(str(job.log_directory).replace('%', '%%') + '/%j.log')}"
    yield from (_quoted_argument(argument) for argument in options.arguments)


def _tasks(options: SlurmOptions) -> tuple[int, int | None]:
    """Tasks of a node, and cores of each; None leaves those to Slurm, which gives one, or what the site has set."""
    if options.launcher == "srun":
        return options.ranks_per_node, options.cpus_per_rank
    return 1, options.ranks_per_node * (options.cpus_per_rank or 1)


def _settings(job: SlurmJob) -> str:
    chained = job.options.chain > 1
    counted = "chain" if chained else "$SLURM_JOB_ID"
    return "\n".join(
        (
            "# run.directory, checkpoint.directory, train.steps",
            f"RUN={_quoted(job.run)}",
            f"CHECKPOINTS={_quoted(job.checkpoints)}",
            f"STEPS={job.steps}",
            "# So many lives in a row without a new checkpoint end it; where they are counted, and for whom.",
            f"MAX_FAILURES={job.options.max_failures}",
            "LIVES=$RUN/slurm/lives",
            f"COUNTED_BY={counted}",
            "# yes: the next job of a chain goes on after this one; no: this one is requeued.",
            f"CHAIN={'yes' if chained else 'no'}",
            "RESTARTS=${SLURM_RESTART_COUNT:-0}",
        )
    )


def _environment(job: SlurmJob) -> Iterator[str]:
    options = job.options
    yield "export PYTHONUNBUFFERED=1"
    yield f"export OMP_NUM_THREADS={options.cpus_per_rank or 1}"
    yield 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield "# Another port for every life: an old one may still be held by what is left of the last."
    yield f"MASTER_PORT=$(({_FIRST_PORT} + (SLURM_JOB_ID * 31 + RESTARTS) % {_PORTS}))"
    yield "export MASTER_ADDR MASTER_PORT"
    if options.gpus_per_node:
        yield from _gpu_environment(job)
    yield from (f"export {name}={shlex.quote(value)}" for name, value in options.environment)


def _gpu_environment(job: SlurmJob) -> Iterator[str]:
    heartbeat = max(_LEAST_HEARTBEAT_S, math.ceil(2 * job.collective_timeout))
    yield "export CUDA_DEVICE_MAX_CONNECTIONS=1  # in this order tensor parallelism overlaps its communication"
    yield "export NCCL_DEBUG=WARN"
    yield "export TORCH_NCCL_ASYNC_ERROR_HANDLING=3"
    yield "export TORCH_NCCL_ENABLE_MONITORING=1"
    yield f"export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC={heartbeat}"
    yield "# Where ranks hang, each writes its last collectives; 'torchfrtrace' compares them. Old and new names."
    yield "export TORCH_NCCL_DUMP_ON_TIMEOUT=1"
    yield f"export TORCH_FR_BUFFER_SIZE={_TRACE_ENTRIES} TORCH_NCCL_TRACE_BUFFER_SIZE={_TRACE_ENTRIES}"
    yield 'mkdir -p "$RUN/slurm/nccl_traces"'
    yield 'export TORCH_FR_DUMP_TEMP_FILE="$RUN/slurm/nccl_traces/${SLURM_JOB_ID}_${RESTARTS}_rank_"'
    yield 'export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$TORCH_FR_DUMP_TEMP_FILE"'


def _step(job: SlurmJob) -> str:
    options = job.options
    torchrun = options.launcher == "torchrun"
    tasks, cpus = _tasks(options)
    cores = f" --cpus-per-task={cpus}" if cpus else ""  # which srun does not take over from the job
    lines = [
        f"srun --nodes={options.nodes} --ntasks-per-node={tasks}{cores}",
        "--distribution=block --mpi=none --kill-on-bad-exit=1 --wait=60 --open-mode=append",
        # %n numbers the nodes of the job, from that of rank 0.
        '--output="${RUN//%/%%}/slurm/%j_%n.log" --error="${RUN//%/%%}/slurm/%j_%n.log"',
        *(_container_words(job, job.container) if job.container else ()),
        *(_torchrun_words(job) if torchrun else _rank_words(job)),
    ]
    comment = "One torchrun per node. It ignores the signals that its ranks take for a request to save and stop."
    if not torchrun:
        comment = "One task per rank, in the order of the nodes. %j and %n are the numbers of job and node."
    return f"# {comment}\n" + " \\\n  ".join(lines) + " &"


def _rank_words(job: SlurmJob) -> Iterator[str]:
    yield f"{shlex.quote(job.options.python)} -m trine pretrain {shlex.join(job.words)}"


def _torchrun_words(job: SlurmJob) -> Iterator[str]:
    """The number of a node is known there only, and a shell there fills it in."""
    options = job.options
    start = '"$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'
    yield f"sh -c 'trap \"\" USR1 USR2; exec {start}'"
    yield f"{shlex.quote(options.python)} --nnodes={options.nodes} --nproc-per-node={options.ranks_per_node}"
    yield '--rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0'
    # torchrun puts values for its own names that begin with a dollar sign; two stand for one.
    yield f"-m trine pretrain {shlex.join(word.replace('$', '$$') for word in job.words)}"


def _container_words(job: SlurmJob, container: Container) -> Iterator[str]:
    mounts = shlex.quote(",".join(map(str, container.mounts)))
    image, here = shlex.quote(container.image), _quoted(job.directory)
    if container.runtime == "pyxis":
        yield f"--container-image={image} --container-workdir={here}"
        yield f"--container-mounts={mounts}"
    else:
        gpus = "--nv " if job.options.gpus_per_node else ""
        yield f"apptainer exec {gpus}--pwd {here}"
        yield f"--bind {mounts} {image}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _quoted_argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name + equals + (shlex.quote(value) if value else "")
