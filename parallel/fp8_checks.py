"""Whether the machine of a rank can do what ``precision.fp8`` asks for."""

from __future__ import annotations

import importlib
import logging

import torch

from ..configs.errors import UsageError
from ..configs.schema import Config
from ..kernels.fp8.products import refusal

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 9)
"""The first GPUs that multiply 8-bit floating-point numbers: Ada; Hopper is 9.0."""

_QUESTIONS = {"blockwise": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
"""What Transformer Engine is asked for recipes that not every GPU with 8-bit products has."""


def check_fp8_machine(config: Config, device: torch.device) -> None:
    """Raise UsageError, in one sentence, unless this rank's device and software have the backend and recipe."""
    fp8 = config.precision.fp8
    if fp8 is None or device.type == "meta":
        return
    if fp8.backend == "te":
        _check_transformer_engine(fp8.recipe, device)
    elif fp8.backend == "scaled_mm":
        _check_scaled_mm(fp8.recipe, device)
    elif device.type == "cuda":
        logger.warning("precision.fp8.backend=emulate multiplies in fp32 on a GPU: it is slower than no FP8 at all")


def _check_transformer_engine(recipe: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise UsageError(
            "precision.fp8.backend=te multiplies on GPUs alone, and this rank has none: use "
            "precision.fp8.backend=scaled_mm or emulate"
        )
    try:
        importlib.import_module("transformer_engine.pytorch")
        manager = importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
    except (ImportError, RuntimeError, OSError) as error:  # a wheel that finds no cuDNN raises RuntimeError
        raise UsageError(
            f"precision.fp8.backend=te needs Transformer Engine, which cannot be imported here ({error}): "
            "use precision.fp8.backend=scaled_mm or emulate"
        ) from error
    question = _QUESTIONS.get(recipe, "is_fp8_available")
    missing = (False, f"it has no {question}")
    available, reason = getattr(manager, question, lambda: missing)()
    if not available:
        remedy = "precision.fp8.recipe=tensorwise or " if recipe in _QUESTIONS else ""
        raise UsageError(
            f"precision.fp8.recipe={recipe} is not what Transformer Engine can do on this GPU with "
            f"precision.fp8.backend=te ({reason.rstrip('.')}): use {remedy}precision.fp8.backend=emulate"
        )


def _check_scaled_mm(recipe: str, device: torch.device) -> None:
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise UsageError(
            f"precision.fp8.backend=scaled_mm needs a GPU of compute capability 8.9 or more, and this one has "
            f"{capability[0]}.{capability[1]}: use precision.fp8.backend=emulate to try recipes, or no FP8"
        )
    if (reason := refusal(recipe, device)) is not None:
        raise UsageError(
            f"precision.fp8.recipe={recipe} is not what torch {torch.__version__} can do on this device with "
            f"precision.fp8.backend=scaled_mm ({reason.rstrip('.')}): use precision.fp8.recipe=tensorwise, or "
            "precision.fp8.backend=emulate"
        )
