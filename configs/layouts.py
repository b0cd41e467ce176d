"""Layouts by name, as people write them: ``tp2+sp`` is two tensor ranks with sequence parallelism."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError
from .schema import Config, DeepSpeed, Parallel, ZeroOptimization
from .validation import nearest

_SIZES = {
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "vpp": "parallel.virtual_pipeline",
    "cp": "parallel.context",
    "dp": "data",
    "zero": "deepspeed.zero_optimization.stage",
}
"""What the number of each numbered part sets."""

_STAGES = 3
"""The highest of ZeRO's stages, which begin at 0; sizes begin at 1 and have no end."""

_CHOICES: dict[str, tuple[str, Any]] = {
    "sp": ("parallel.sequence", True),
    "a2a": ("parallel.context_exchange", "all_to_all"),
    "even": ("parallel.pipeline_split", "even"),
    "selective": ("train.recompute", "selective"),
    "recompute": ("train.recompute", "full"),
    "offload": ("deepspeed.zero_optimization.offload_optimizer", {"device": "cpu"}),
}
"""What each part without a number sets, and to which value."""


@dataclass(frozen=True)
class NamedLayout:
    """How a model is divided and what it recomputes, on ``world_size`` = tensor x pipeline x context x data ranks.

    Layouts are equal when they say the same, in whichever order their names say it.
    """

    name: str = field(compare=False)
    """As it was written."""
    world_size: int
    data: int
    parallel: dict[str, Any]
    """The keys of the section ``parallel`` that the name sets, and no others."""
    train: dict[str, Any]
    """The keys of the section ``train`` that the name sets, and no others."""
    zero: dict[str, Any]
    """The keys of ``deepspeed.zero_optimization`` that the name sets; with none Megatron-Core's engine trains."""


def parse_layout(name: str) -> NamedLayout:
    """The layout of a name: parts joined by ``+`` in any order.

    ``tpN``, ``ppN``, ``vppN``, ``cpN``, ``dpN``: N tensor ranks, pipeline stages, chunks per stage, context ranks,
    data ranks. ``sp``: sequence parallelism. ``a2a``: context ranks exchange tokens for heads. ``even``: as many
    layers in each chunk. ``selective``, ``recompute``: ``train.recompute`` is ``selective`` or ``full``. ``zeroN``:
    DeepSpeed's ZeRO at stage N. ``offload``: its optimizer in host memory.

    Whether a model can be divided so is asked of ``check_layout``. Raises UsageError with one sentence for a part
    that is unknown, that says again what another says, that says nothing, or whose number is below 1.
    """
    name = name.strip()
    settings = _settings(name)
    for part, needed, idle in (("a2a", "cp", 1), ("even", "pp", 1), ("offload", "zero", None)):
        if _CHOICES[part][0] in settings and settings.get(_SIZES[needed]) in (None, idle):
            raise UsageError(f"layout {name!r} has the part {part}, which says nothing without {needed}N: add it")
    parallel, data = _section(settings, "parallel"), settings.get("data", 1)
    return NamedLayout(
        name=name,
        world_size=Parallel(**parallel).model_parallel * data,
        data=data,
        parallel=parallel,
        train=_section(settings, "train"),
        zero=_section(settings, "deepspeed.zero_optimization"),
    )


def parse_layouts(names: str) -> tuple[NamedLayout, ...]:
    """The layouts of names with commas between them, in their order. Raises UsageError as ``parse_layout`` does."""
    return tuple(parse_layout(name) for name in names.split(","))


def under_layout(config: Config, layout: NamedLayout) -> Config:
    """A copy of ``config`` with its whole layout replaced: what ``layout`` does not set takes its default."""
    train = config.train.model_copy(update={"recompute": "none"} | layout.train)
    zero = DeepSpeed(zero_optimization=ZeroOptimization(**layout.zero)) if layout.zero else None
    engine = {"engine": "deepspeed" if zero else "megatron", "deepspeed": zero}
    return config.model_copy(update={"parallel": Parallel(**layout.parallel), "train": train, **engine})


def _settings(name: str) -> dict[str, Any]:
    """What each part of ``name`` sets, by dotted key."""
    values: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for part in name.split("+"):
        part = part.strip()
        key, value = _setting(part, name)
        if key in values:
            raise UsageError(f"layout {name!r} sets {key} by {said_by[key]} and again by {part}: keep one of them")
        values[key], said_by[key] = value, part
    return values


def _setting(part: str, name: str) -> tuple[str, Any]:
    if part in _CHOICES:
        return _CHOICES[part]
    numbered = re.fullmatch(r"([a-z]+)(-?[0-9]+)", part)
    if numbered is None or numbered[1] not in _SIZES:
        raise _unknown_part(part, name)
    size, least = int(numbered[2]), _least(numbered[1])
    if size < least:
        raise UsageError(f"layout {name!r} has the part {part}, which must be {numbered[1]}{least} or more")
    if numbered[1] == "zero" and size > _STAGES:
        raise UsageError(f"layout {name!r} has the part {part}, which must be zero{_STAGES} or less")
    return _SIZES[numbered[1]], size


def _least(kind: str) -> int:
    return 0 if kind == "zero" else 1


def _unknown_part(part: str, name: str) -> UsageError:
    if not part:
        return UsageError(f"layout {name!r} has an empty part: join parts by + and layouts by commas, as in tp2+sp,cp2")
    forms = {size: f"{size}N" for size in _SIZES} | {choice: choice for choice in _CHOICES}
    near = nearest(part.lower().rstrip("0123456789"), forms)
    hint = f"; did you mean {forms[near]}?" if near else ""
    return UsageError(f"layout {name!r}: {part!r} is not one of {', '.join(forms.values())}{hint}")


def _section(settings: dict[str, Any], section: str) -> dict[str, Any]:
    """The settings of one section of the configuration, by the names of its keys."""
    prefix = f"{section}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
