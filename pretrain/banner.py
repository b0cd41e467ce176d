"""The start-up banner: what was chosen, and why."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from .. import __version__
from ..configs.ramps import full_shape, shapes_of
from ..configs.schema import Config, DeepSpeed
from ..configs.sequence_checks import ExchangingSegment
from ..configs.stack import SharedKVSegment, context_order
from ..kernels.dispatch import explain
from ..kernels.vendor import norms_and_activations
from ..models.split import pipeline_split
from ..parallel.topology import Topology
from .place import Place


def banner(
    config: Config, topology: Topology, place: Place, parameters: list[int], data: str, resumed_from: Path | None
) -> str:
    """The banner's text.

    Args:
        parameters: elements held by each pipeline stage of one tensor rank.
        data: the sources.
    """
    start = f"resuming from {resumed_from}" if resumed_from else "from the first step"
    rows = {
        "engine": f"torch {torch.__version__}, {_engine(config)}; {_origin(place)}",
        "device": _device(topology.device),
        "model": f"{_stack(config)}; hidden {config.model.hidden_size}, vocabulary {config.model.vocabulary_size}",
        "layout": _layout(topology, config),
        "parameters": f"{sum(parameters):,} per tensor rank (stages: {', '.join(f'{n:,}' for n in parameters)})",
        "kernels": explain(config.kernels.backend, topology.device),
        "norms": norms_and_activations(topology.device),
        "precision": f"{config.precision.compute} compute, fp32 gradients, master weights and optimizer state",
        "linear maps": _linear_maps(config),
        "optimizer": _optimizer(config),
        "batch": _batch(config, topology),
        "data": data,
        "documents": _documents(config),
        "activations": _activations(config),
        "run": f"{config.run.directory}, {start}",
    }
    lines = [f"trine {__version__}"] + [f"  {name:<12}{text}" for name, text in rows.items()]
    return "\n".join(lines)


def _engine(config: Config) -> str:
    core = f"megatron-core {version('megatron-core')}"
    return f"{core}, DeepSpeed {version('deepspeed')}" if config.engine == "deepspeed" else core


def _origin(place: Place) -> str:
    if place.source in ("local", "single"):
        return "ranks started here"
    return f"ranks started by {place.source}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} with NCCL"
    threads = torch.get_num_threads()
    return f"CPU with gloo, {threads} thread{'s' if threads > 1 else ''} per rank: no CUDA device was found"


def _stack(config: Config) -> str:
    parts = []
    for segment in config.model.stack:
        if isinstance(segment, SharedKVSegment):
            kv = segment.shared_kv
            parts.append(f"[shared K,V {kv.kv_heads} x {kv.head_dim}]")
        else:
            parts.append(f"{segment.layers} {segment.mixer}")
    return " + ".join(parts)


def _layout(topology: Topology, config: Config) -> str:
    layout = topology.layout
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual pipeline": layout.virtual_pipeline,
        "context": layout.context,
        "data": layout.data,
    }
    text = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "no parallelism"
    sequence = " with sequence parallelism" if config.parallel.sequence else ""
    order = f"; {_context(config)}" if layout.context > 1 else ""
    ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
    return f"{ranks}: {text}{sequence}{order}{_chunks(config, topology)}"


def _context(config: Config) -> str:
    how = {"gather": "keys and values gathered", "all_to_all": "tokens exchanged for heads"}
    exchanges = any(isinstance(segment, ExchangingSegment) for segment in config.model.stack)
    dealt = f"each sequence dealt out in {context_order(config.model.stack)} chunks"
    return dealt + (f", {how[config.parallel.context_exchange]}" if exchanges else "")


def _chunks(config: Config, topology: Topology) -> str:
    if topology.layout.pipeline == 1:
        return ""
    split, asked = pipeline_split(config), config.parallel.pipeline_split
    how = asked if isinstance(asked, str) else "as asked"
    return f"; layers {' + '.join(map(str, split))} ({how})"


def _activations(config: Config) -> str:
    kept = {
        "none": "kept for the backward pass",
        "selective": "between matrix products computed again (selective recompute)",
        "full": "of all but each layer's input computed again (full recompute)",
    }
    return kept[config.train.recompute]


def _linear_maps(config: Config) -> str:
    fp8 = config.precision.fp8
    if fp8 is None:
        return f"in {config.precision.compute}"
    how = {
        "te": "Transformer Engine",
        "scaled_mm": "torch's scaled_mm",
        "emulate": "emulated: rounded to 8 bits and multiplied in fp32, slower than no FP8 and no measure of speed",
    }
    kept = fp8.keep_first_last_bf16
    layers = "layer" if kept == 1 else f"{kept} layers"
    ends = f"; the first and last {layers} in {config.precision.compute}" if kept else ""
    return f"FP8, recipe {fp8.recipe}, backend {fp8.backend} ({how[fp8.backend]}){ends}"


def _documents(config: Config) -> str:
    if config.train.document_masking:
        return "kept apart: attention masked, recurrent state reset"
    return "a window is one text (train.document_masking=false)"


def _optimizer(config: Config) -> str:
    o = config.optimizer
    return (
        f"AdamW ({_division(config)}), lr {o.learning_rate:g} {o.schedule}, {o.warmup_steps} warm-up steps, "
        f"betas {o.betas[0]:g} {o.betas[1]:g}, weight decay {o.weight_decay:g}, clip {o.clip_grad:g}"
    )


def _division(config: Config) -> str:
    if config.engine == "megatron":
        return "distributed"
    zero = (config.deepspeed or DeepSpeed()).zero_optimization
    divided = {0: "nothing divided", 1: "state divided", 2: "state and gradients divided", 3: "all divided"}
    offloads = {"optimizer": zero.offload_optimizer, "parameters": zero.offload_param}
    in_host = " and ".join(name for name, offload in offloads.items() if offload and offload.device == "cpu")
    return f"ZeRO stage {zero.stage}: {divided[zero.stage]}" + (f"; {in_host} in host memory" if in_host else "")


def _batch(config: Config, topology: Topology) -> str:
    train = config.train
    return (
        f"{train.global_batch_size} x {train.sequence_length} tokens a step{_ramps(config)}, "
        f"{topology.layout.num_microbatches} microbatches of {train.micro_batch_size} per data rank, "
        f"{train.steps} steps"
    )


def _ramps(config: Config) -> str:
    before = [shape for shape in shapes_of(config.train) if shape != full_shape(config.train)]
    if not before:
        return ""
    return f" (after {', '.join(f'{shape.samples * shape.pieces} x {shape.sequence_length}' for shape in before)})"
