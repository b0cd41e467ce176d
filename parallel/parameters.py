"""What a parameter is as a whole, whatever part of it this rank holds.

Every parameter carries a ``Blueprint``: its full shape, how tensor parallelism cuts it, and the law of its first
value. From it follow, in one place each, initial values that do not depend on the layout (here) and the names and
shards of a checkpoint (``shards.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Law:
    """The distribution of a parameter's first value: ``uniform`` on +-scale, ``normal`` with deviation scale."""

    kind: Literal["uniform", "normal", "constant"]
    scale: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """An fp32 sample on the generator's device."""
        out = torch.empty(shape, dtype=torch.float32, device=generator.device)
        if self.kind == "uniform":
            return out.uniform_(-self.scale, self.scale, generator=generator)
        if self.kind == "normal":
            return out.normal_(0.0, self.scale, generator=generator)
        return out.fill_(self.scale)


ONES = Law("constant", 1.0)


def linear_default(fan_in: int) -> Law:
    """PyTorch's default for ``nn.Linear``: kaiming uniform with a = sqrt 5, that is U(+-fan_in^-0.5)."""
    return Law("uniform", fan_in**-0.5)


def xavier_uniform(fan_in: int, fan_out: int, gain: float) -> Law:
    """Glorot's uniform law with the *full* fans: a shard's would depend on the layout."""
    return Law("uniform", gain * math.sqrt(6.0 / (fan_in + fan_out)))


@dataclass(frozen=True)
class Section:
    """A named block of rows of a parameter, itself one global tensor of the checkpoint.

    Several projections that read the same input live in one parameter, so that they are one matrix multiplication
    and, under sequence parallelism, one all-gather; each is cut over tensor ranks on its own.
    """

    name: str
    shape: tuple[int, ...]
    law: Law


@dataclass(frozen=True)
class Blueprint:
    """Sections stacked along dimension 0, each cut evenly along ``partition`` (None: replicated on tensor ranks)."""

    sections: tuple[Section, ...]
    partition: int | None

    def local_rows(self, tensor_size: int) -> list[int]:
        """Rows of each section on one rank."""
        cut = tensor_size if self.partition == 0 else 1
        return [section.shape[0] // cut for section in self.sections]

    def local_elements(self, tensor_size: int) -> list[int]:
        """Elements of each section on one tensor rank."""
        cut = 1 if self.partition is None else tensor_size
        return [math.prod(section.shape) // cut for section in self.sections]


def tag(parameter: nn.Parameter, blueprint: Blueprint) -> nn.Parameter:
    """Attach the blueprint, and the attributes by which Megatron-Core counts a parameter once over tensor ranks."""
    parameter.blueprint = blueprint  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = blueprint.partition is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if blueprint.partition is None else blueprint.partition  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    return parameter


def blueprint_of(parameter: nn.Parameter) -> Blueprint:
    """The blueprint that ``tag`` attached.

    Raises:
        TypeError: the parameter was made without one; its checkpoint and initial value would be undefined.
    """
    blueprint = getattr(parameter, "blueprint", None)
    if not isinstance(blueprint, Blueprint):
        raise TypeError(f"a parameter of shape {tuple(parameter.shape)} has no blueprint; make it with tag()")
    return blueprint


def replicated(name: str, shape: tuple[int, ...], law: Law, device: torch.device) -> nn.Parameter:
    """A parameter that every tensor rank holds whole."""
    parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
    return tag(parameter, Blueprint((Section(name, shape, law),), partition=None))


def global_names(module: nn.Module, rename: Callable[[str], str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of ``module`` once, under its name in the whole model.

    ``rename`` turns the name on this pipeline stage into the global one (layers are numbered from the stage's
    first). The section's name replaces the last part (``weight``).
    """
    for name, parameter in module.named_parameters():
        yield rename(name).rpartition(".")[0], parameter


def section_name(prefix: str, section: Section) -> str:
    """The global name of one section, as it stands in checkpoints."""
    return f"{prefix}.{section.name}" if prefix else section.name


@torch.no_grad()
def initialise(
    module: nn.Module, rename: Callable[[str], str], seed: int, tensor_rank: int, tensor_size: int
) -> None:
    """Give every parameter its first value: a function of the seed and its global name, never of the layout."""
    for prefix, parameter in global_names(module, rename):
        blueprint = blueprint_of(parameter)
        blocks = torch.split(parameter, blueprint.local_rows(tensor_size), dim=0)
        for section, block in zip(blueprint.sections, blocks, strict=True):
            digest = hashlib.sha256(f"{seed}/{section_name(prefix, section)}".encode()).digest()
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            full = section.law.draw(section.shape, generator)
            if blueprint.partition is not None:
                full = full.chunk(tensor_size, dim=blueprint.partition)[tensor_rank]
            block.copy_(full)
