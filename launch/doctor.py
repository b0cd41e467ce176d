"""What this machine and this Python environment can do, found mostly without importing what is looked for."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from .machine import usable_cores, usable_memory

Status = Literal["yes", "no", "missing"]
"""``missing`` is a ``no`` that keeps every run from working."""

PYTHON = (3, 11)
TORCH = ">=2.11,<2.14"
MEGATRON_CORE = ">=0.16.1,<0.17"

_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    feature: str
    status: Status
    detail: str
    """What was found; where nothing was, what it would give and how to get it."""


def report() -> list[Finding]:
    """Look at everything. Imports torch, and nothing else that is looked for."""
    return [finding for look in _LOOKS for finding in look()]


def works(findings: Sequence[Finding]) -> bool:
    """Whether models can be trained here."""
    return all(finding.status != "missing" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """One line for each finding, in columns."""
    width = max(len(finding.feature) for finding in findings)
    return "\n".join(f"{f.feature:<{width}}  {f.status:<7}  {f.detail}" for f in findings)


def _python() -> Iterator[Finding]:
    wanted = ".".join(map(str, PYTHON))
    status: Status = "yes" if sys.version_info >= PYTHON else "missing"
    found = platform.python_version()
    yield Finding("Python", status, f"{found} ({sys.executable}); {wanted} or newer is needed")


def _packages() -> Iterator[Finding]:
    yield _needed("megatron-core", "the parallel engine", MEGATRON_CORE)
    yield _needed("pydantic", "typed configuration")
    yield _needed("PyYAML", "recipes")
    yield _needed("tokenizers", "text to tokens")
    yield _needed("psutil", "checkpoint writing")
    yield _needed("tensorboard", "curves of a run")
    yield _needed("tqdm", "progress")


def _torch() -> Iterator[Finding]:
    found = _needed("torch", "tensors and communication", TORCH)
    yield found
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        if found.status == "yes":
            yield Finding("torch import", "missing", f"torch is installed and cannot be imported: {error}")
        return
    yield from _devices(torch.cuda.device_count())
    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    cuda = torch.cuda.is_available()
    # Each kind of device has its own, and nothing trains without it.
    yield Finding("gloo", "yes" if gloo else "no" if cuda else "missing", "communication of CPU ranks, part of torch")
    yield Finding(
        "NCCL", "yes" if nccl else "missing" if cuda else "no",
        "communication of GPU ranks, part of torch for CUDA",
    )  # fmt: skip


def _devices(gpus: int) -> Iterator[Finding]:
    if not gpus:
        yield Finding("CUDA", "no", "torch finds no GPU: runs compute on the CPU and communicate by gloo")
        return
    import torch

    for index in range(gpus):
        device = torch.cuda.get_device_properties(index)
        yield Finding(
            f"CUDA device {index}", "yes",
            f"{device.name}, {device.total_memory / _GIB:.0f} GiB, capability {device.major}.{device.minor}",
        )  # fmt: skip


def _accelerators() -> Iterator[Finding]:
    yield _transformer_engine()
    yield _apex()
    yield _optional("Triton", "triton", "triton", "fused GPU kernels")
    yield _optional("flash-linear-attention", "fla", "flash-linear-attention", "other GPU kernels for retention")
    yield _optional("DeepSpeed", "deepspeed", "deepspeed", "engine=deepspeed: ZeRO 0 to 3 and offload")


def _transformer_engine() -> Finding:
    gives = "FP8 and fused layers on GPUs"
    if not _is_importable("transformer_engine"):
        return Finding("Transformer Engine", "no", f"not installed; would give {gives}")
    if not _is_importable("transformer_engine_torch"):
        return Finding(
            "Transformer Engine", "no",
            f"installed without its part for torch (transformer_engine_torch), which would give {gives}",
        )  # fmt: skip
    return Finding("Transformer Engine", "yes", f"{_version('transformer_engine')}: {gives}")


def _apex() -> Finding:
    gives = "fused optimizers and norms on GPUs"
    # Only NVIDIA's extensions have this module: the package index has an unrelated package named apex.
    if _is_importable("amp_C"):
        return Finding("apex", "yes", f"NVIDIA apex with its extensions: {gives}")
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "no", f"not installed; NVIDIA apex, built from source, would give {gives}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "normalization").is_dir() for folder in folders):
        return Finding("apex", "no", f"NVIDIA apex without its extensions, which would give {gives}")
    return Finding(
        "apex", "no",
        "the installed package of that name is not NVIDIA's but an unrelated one from the package index: "
        "uninstall it",
    )  # fmt: skip


def _launchers() -> Iterator[Finding]:
    mpirun = shutil.which("mpirun")
    yield Finding(
        "mpirun",
        "yes" if mpirun else "no",
        mpirun or "not on PATH; Open MPI could start ranks on several hosts",
    )
    yield _optional("mpi4py", "mpi4py", "mpi4py", "preparation of data under mpirun; training starts there without it")
    absent = [command for command in ("sbatch", "srun", "scontrol") if not shutil.which(command)]
    yield Finding(
        "Slurm", "no" if absent else "yes",
        f"not on PATH: {', '.join(absent)}; srun could start ranks on several hosts" if absent
        else "sbatch, srun and scontrol",
    )  # fmt: skip


def _data() -> Iterator[Finding]:
    uses = {
        "pyarrow": "preparation of Parquet files",
        "zstandard": "preparation of .zst files",
        "sentencepiece": "preparation with a sentencepiece model",
        "aiohttp": "prepared data on a web server",
        "s3fs": "prepared data in an S3 store",
        "matplotlib": "pictures of document lengths",
    }
    for package, use in uses.items():
        yield _optional(package, package, package, use)


def _machine() -> Iterator[Finding]:
    yield Finding("cores", "yes", f"{usable_cores()} that this process may use")
    yield Finding("memory", "yes", f"{usable_memory() / _GIB:.1f} GiB")
    uses = {Path.cwd(): "runs and checkpoints", Path("/dev/shm"): "memory that processes share"}
    for folder, use in uses.items():
        if folder.is_dir():
            free = shutil.disk_usage(folder).free
            yield Finding(f"free in {folder}", "yes", f"{free / _GIB:.1f} GiB for {use}")


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _torch, _packages, _accelerators, _launchers, _data, _machine,
)  # fmt: skip


def _needed(package: str, gives: str, wanted: str = "") -> Finding:
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(package, "missing", f"not installed; gives {gives}: pip install '{package}{wanted}'")
    if wanted and not _contains(wanted, found):
        return Finding(package, "missing", f"{found} is outside {wanted}: pip install '{package}{wanted}'")
    return Finding(package, "yes", f"{found}: {gives}")


def _contains(wanted: str, found: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(found, prereleases=True)


def _optional(feature: str, module: str, package: str, gives: str) -> Finding:
    if _is_importable(module):
        return Finding(feature, "yes", f"{_version(package)}: {gives}")
    return Finding(feature, "no", f"not installed; would give {gives}")


def _is_importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "version unknown"
