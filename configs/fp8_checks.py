"""Whether ``precision.fp8`` fits the rest of a configuration. What the machine can do is checked on the ranks."""

from __future__ import annotations

from .errors import UsageError
from .linear_widths import linear_widths
from .remedies import nearest_multiples
from .schema import Config, Fp8
from .stack import SharedKVSegment, context_order

HARDWARE_UNIT = 16
"""Products of 8-bit numbers on GPUs want every width and every sum to be a multiple of this."""

BLOCKS = {"blockwise": 128, "mxfp8": 32}
"""Numbers that share a scale: a block must not lie across ranks, or scales would depend on the layout."""


def check_fp8(config: Config) -> None:
    """Raise UsageError, in one sentence, for the first thing that 8-bit products cannot do with this model."""
    fp8 = config.precision.fp8
    if fp8 is None:
        return
    if config.precision.compute == "fp32" and fp8.backend != "emulate":
        raise UsageError(
            f"precision.fp8.backend={fp8.backend} computes in bf16 beside its 8-bit products, and "
            "precision.compute=fp32: use precision.compute=bf16, or precision.fp8.backend=emulate"
        )
    if fp8.backend == "te" and fp8.recipe == "delayed" and config.train.recompute == "full":
        raise UsageError(
            "precision.fp8.recipe=delayed with precision.fp8.backend=te notes the magnitudes of recomputed layers "
            "twice, and train.recompute=full: use train.recompute=selective, or precision.fp8.recipe=tensorwise"
        )
    _check_kept_layers(config, fp8)
    unit = BLOCKS.get(fp8.recipe, 1 if fp8.backend == "emulate" else HARDWARE_UNIT)
    if unit > 1:
        _check_widths(config, fp8, unit)
        _check_tokens(config, fp8, unit)


def _check_kept_layers(config: Config, fp8: Fp8) -> None:
    kept = fp8.keep_first_last_bf16
    layers = sum(segment.layers for segment in config.model.stack if not isinstance(segment, SharedKVSegment))
    if 2 * kept >= layers:
        raise UsageError(
            f"precision.fp8.keep_first_last_bf16={kept} leaves none of the {layers} layers of model.stack in FP8: "
            f"use at most {(layers - 1) // 2}"
        )


def _check_widths(config: Config, fp8: Fp8, unit: int) -> None:
    for width in linear_widths(config.model):
        ranks = config.parallel.tensor if width.divided else 1
        local = width.size // ranks
        if local % unit == 0 or (width.narrow and fp8.backend != "te"):  # the others fill narrow rows up
            continue
        share = f" over parallel.tensor={ranks} is {local} per rank, which" if ranks > 1 else ""
        size = "" if f"={width.size}" in width.name else f" ({width.size} wide)"
        raise UsageError(
            f"{width.name}{size}{share} is not a multiple of {unit}, as {_wanted_by(fp8)} needs: "
            f"use {nearest_multiples(width.size, unit * ranks)}{_otherwise(fp8, width.narrow)}"
        )


def _check_tokens(config: Config, fp8: Fp8, unit: int) -> None:
    """The sum over tokens in the gradient of a weight. A ramp cuts sequences into shorter ones: as many tokens."""
    train, parallel = config.train, config.parallel
    zigzag = parallel.context > 1 and context_order(config.model.stack) == "zigzag"
    chunks = 2 * parallel.context if zigzag else parallel.context
    tokens = train.micro_batch_size * train.sequence_length // chunks
    if tokens % unit:
        over = f" over {chunks} chunks of parallel.context={parallel.context}" if chunks > 1 else ""
        raise UsageError(
            f"train.micro_batch_size={train.micro_batch_size} x train.sequence_length={train.sequence_length}{over} is "
            f"{tokens} tokens, which is not a multiple of {unit}, as {_wanted_by(fp8)} needs: change one of the two"
            f"{_otherwise(fp8)}"
        )


def _wanted_by(fp8: Fp8) -> str:
    if fp8.recipe in BLOCKS:
        return f"precision.fp8.recipe={fp8.recipe}"
    return f"precision.fp8.backend={fp8.backend}"


def _otherwise(fp8: Fp8, narrow: bool = False) -> str:
    if narrow:
        return ", or precision.fp8.backend=scaled_mm"
    return ", or precision.fp8.recipe=tensorwise" if fp8.recipe in BLOCKS else ", or precision.fp8.backend=emulate"
