"""What a rank holds under each stage of ZeRO, and the time of its steps, beside Megatron-Core's distributed optimizer.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 \\
        python benchmarks/zero.py [--ranks 4] [--steps 5] [--json zero.json]

A differential model of 24 million parameters in fp32 on data-parallel ranks of this machine, each a new process, so
that what one engine leaves behind is not counted with the next. On a CPU memory is what only this process has (USS),
less what it had before the model was built; on a GPU what torch has allocated. DeepSpeed's buckets, whose defaults are
made for models a hundred times as large, have a million elements here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from trine.configs.checks import check_layout
from trine.configs.engine_checks import READ_AT
from trine.configs.layouts import parse_layout, under_layout
from trine.configs.schema import Config, DeepSpeed
from trine.launch.pool import RankPool
from trine.models.build import build_chunks
from trine.parallel.engines import make_engine
from trine.parallel.topology import build_topology, local_device
from trine.pretrain.parity import batch_of_step

MIB = 2**20
LAYOUTS = ("", "+zero0", "+zero1", "+zero2", "+zero3")
ON_GPU = ("+zero2+offload", "+zero3+offload")
"""On a CPU there is no other memory to which the state could go."""
BUCKETS = (
    "reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)  # fmt: skip
MODEL: dict[str, Any] = {
    "vocabulary_size": 8192, "hidden_size": 512, "ffn_hidden_size": 1408, "tied_embeddings": True,
    "stack": [{"mixer": "differential", "layers": 6, "heads": 4}],
}  # fmt: skip


def config_of(layout: str, ranks: int) -> Config:
    """Two microbatches of one short sequence for each rank."""
    raw = {
        "model": MODEL,
        "train": {"steps": 1000, "global_batch_size": 2 * ranks, "sequence_length": 128},
        "optimizer": {"schedule": "constant"},
        "data": {"directory": "unused"},
        "run": {"directory": "unused"},
    }
    config = under_layout(Config.model_validate(raw), parse_layout(layout))
    if config.deepspeed is None:
        return config
    buckets = {name: 1_000_000 for name in BUCKETS if config.zero_stage in READ_AT[name]}
    zero = config.deepspeed.zero_optimization.model_copy(update=buckets)
    return config.model_copy(update={"deepspeed": DeepSpeed(zero_optimization=zero)})


def measure(rank: int, world_size: int, *, config: dict[str, Any], steps: int) -> dict[str, float]:
    """A job of the pool: MiB that this rank holds between two microbatches and between steps, and seconds of a step."""
    run = Config.model_validate(config)
    topology = build_topology(check_layout(run, world_size), local_device(rank))
    before, within = _held(topology.device), 0.0
    engine = make_engine(build_chunks(run, topology), run, topology)
    seconds = []
    for step in range(steps):
        batches = list(batch_of_step(engine, step))

        def noting() -> Any:
            nonlocal within
            for number, batch in enumerate(batches):  # noqa: B023 - used up within the step
                if number == 1:
                    within = _held(topology.device)
                yield batch

        started = time.perf_counter()
        engine.train_step(noting())
        seconds.append(time.perf_counter() - started)
    between = _held(topology.device)
    engine.close()
    return {"within": within - before, "between": between - before, "seconds": median(seconds[1:])}


def _held(device: torch.device) -> float:
    held = torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_full_info().uss
    return held / MIB


def main() -> None:
    """Measure every layout and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpus = torch.cuda.device_count()
    results = {}
    print(f"{'engine':<18} {'in a step':>12} {'between steps':>14} {'seconds':>9}")
    for suffix in (*LAYOUTS, *(ON_GPU if gpus else ())):
        layout = f"dp{arguments.ranks}{suffix}"
        config = config_of(layout, arguments.ranks).model_dump(mode="json", exclude_none=True)
        with RankPool(600.0, use_gpus=gpus > 0, quiet=True) as pool:
            ranks = pool.run("zero:measure", arguments.ranks, config=config, steps=arguments.steps)
        worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        results[layout] = worst
        name = suffix.removeprefix("+") or "megatron"
        sizes = f"{worst['within']:>8,.0f} MiB {worst['between']:>10,.0f} MiB"
        print(f"{name:<18} {sizes} {worst['seconds']:>9.2f}", flush=True)
    if arguments.json:
        document = {"ranks": arguments.ranks, "torch": torch.__version__, "layouts": results}
        arguments.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
