"""A whole training step: trine's engine beside Hugging Face models of the same size, its trainer beside a bare loop.

    python benchmarks/train_step.py [--dtype bf16] [--json train_step.json]

On a CPU models of 24 million parameters (6 layers, width 512, feed-forward 1,408, vocabulary 8,192, tied) take steps
of one sequence of 1,024 tokens: forward, backward, clipping, AdamW. On a GPU recipes of 1.3 to 1.4 billion parameters
do, in bf16, with their share of the GPU's peak.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import Contender, Job, Measure, Row, arguments, compare, machine, need, table, write_json
from torch import nn

from trine.configs.checks import check_layout
from trine.configs.loading import load_config
from trine.configs.schema import Config
from trine.data_pipeline.opening import read_prepared
from trine.data_pipeline.preparation.prepare import prepare
from trine.models.build import build_chunks
from trine.parallel.engine import Engine
from trine.parallel.engines import make_engine
from trine.parallel.topology import Topology, build_topology, join, leave, leave_topology
from trine.pretrain.parity import batch_of_step
from trine.pretrain.place import Place
from trine.pretrain.trainer import Trainer

WIDTH, LAYERS, FEED_FORWARD, VOCABULARY, LENGTH = 512, 6, 1408, 8192, 1024
STACKS: dict[str, list[dict[str, Any]]] = {
    "transformer": [{"mixer": "attention", "layers": LAYERS, "heads": 8}],
    "differential": [{"mixer": "differential", "layers": LAYERS, "heads": 4}],
    "retention": [{"mixer": "retention", "layers": LAYERS, "heads": 8, "value_head_dim": 128}],
    "YOCO": [
        {"mixer": "gated_retention", "layers": LAYERS // 2, "heads": 4},
        {"shared_kv": {"kv_heads": 4, "head_dim": 64}},
        {"mixer": "cross_attention", "layers": LAYERS // 2, "heads": 8},
    ],
}
GPU_RECIPES = {
    "transformer": "retnet/transformer-1.3b", "differential": "differential/1.4b", "retention": "retnet/1.3b",
    "YOCO": "yoco/1.4b",
}  # fmt: skip
SPEC_FLOPS = 989e12
"""Dense bf16 products of an H100 or H200 by its data sheet."""
LEARNING_RATE, CLIP = 3e-4, 1.0


def config_of(stack: list[dict[str, Any]], dtype: str, **sections: Any) -> Config:
    """A run of one sequence a step."""
    raw = {
        "model": {
            "vocabulary_size": VOCABULARY, "hidden_size": WIDTH, "ffn_hidden_size": FEED_FORWARD, "stack": stack,
            "tied_embeddings": True,
        },
        "train": {"steps": 10**6, "global_batch_size": 1, "sequence_length": LENGTH},
        "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant", "clip_grad": CLIP},
        "precision": {"compute": dtype},
        "data": {"directory": "unused"},
        "run": {"directory": "unused"},
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return Config.model_validate(raw)


@contextmanager
def one_process() -> Iterator[Callable[[Config], Topology]]:
    """Join a process group of this process alone; gives what makes the topology of a configuration, once."""
    place = Path(tempfile.mkdtemp())
    device = join(0, 1, 0, init_method=f"file://{place / 'store'}")
    made: list[Topology] = []

    def topology(config: Config) -> Topology:
        if not made:
            made.append(build_topology(check_layout(config, 1), device))
        return made[0]

    try:
        yield topology
    finally:
        leave_topology()
        leave()
        shutil.rmtree(place)


def engine_of(config: Config, topology: Topology) -> Engine:
    """Model, optimizer and schedule, as a run builds them."""
    return make_engine(build_chunks(config, topology), config, topology)


def engine_step(engine: Engine) -> Job:
    """A step on the same tokens every time."""
    batches = list(batch_of_step(engine, 0))
    return lambda: engine.train_step(iter(batches))


def bare_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Job:
    """A step of a loop that one would write by hand: torch's fused AdamW on fp32 parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return value.item()

    return step


def hugging_face(kind: str, attention: str, dtype: str) -> Job:
    """A step of Llama or DiffLlama from transformers."""
    need("transformers", "pip install 'trine[bench]'")
    import transformers

    shape = dict(
        hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "Llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        model = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**shape))
    model.train()
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    bf16 = dtype == "bf16"

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            value: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return value

    return bare_step(model, loss)


def against_hugging_face(measure: Measure, rounds: int, dtype: str) -> dict[str, list[Row]]:
    """The Transformer baseline beside Llama, differential attention beside DiffLlama, and the other stacks."""
    results = {}
    with one_process() as topology:
        engines = {}
        for name, stack in STACKS.items():
            config = config_of(stack, dtype)
            engines[name] = engine_of(config, topology(config))
        ours = {name: Contender(f"trine, {name}", engine_step(engine)) for name, engine in engines.items()}
        peers = {
            "transformer": [("Llama", "sdpa"), ("Llama", "eager")],
            "differential": [("DiffLlama", "sdpa"), ("DiffLlama", "eager")],
        }
        for name, models in peers.items():
            theirs = [Contender(f"Hugging Face {m}, {a}", hugging_face(m, a, dtype)) for m, a in models]
            results[name] = compare([ours[name], *theirs], measure, rounds=rounds)
            print(table(f"Training step, {name}, {LENGTH} tokens, {dtype}", results[name], tokens=LENGTH), flush=True)
        results["stacks"] = compare(list(ours.values()), measure, rounds=rounds)
        print(table(f"Training step of trine's stacks, {dtype}", results["stacks"], tokens=LENGTH), flush=True)
        for engine in engines.values():
            engine.close()
    return results


def trainer_overhead(measure: Measure, rounds: int, dtype: str) -> list[Row]:
    """What a run does in a step, reading, judging and reporting included, beside a bare loop over the same modules."""
    with one_process() as topology, tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
        prepare([str(path) for path in sources], data, train_tokenizer=2048, validation_fraction=0.1)
        sections: dict[str, Any] = {
            "data": {"directory": str(data)}, "run": {"directory": str(Path(folder) / "run")},
            "evaluation": {"interval": 0}, "checkpoint": {"interval": 0},
        }  # fmt: skip
        config = config_of(STACKS["differential"], dtype, **sections)
        place = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, source="single")
        trainer = Trainer(config, topology(config), place, read_prepared(config.data))
        trainer._begin()

        def trainer_step() -> None:
            trainer._train_step()
            trainer._agree()

        bare_config = config_of(STACKS["differential"], dtype)
        (chunk,) = build_chunks(bare_config, topology(config))
        engine = engine_of(bare_config, topology(config))
        (batch,) = batch_of_step(engine, 0)
        bare = bare_step(chunk, lambda: chunk(*batch).mean())
        contenders = [
            Contender("bare loop, torch's AdamW", bare),
            Contender("trine's engine", engine_step(engine)),
            Contender("trine's trainer", trainer_step),
        ]
        rows = compare(contenders, measure, rounds=rounds)
        trainer.data.close()
        trainer.reporter.close(trainer.step, "measured")
        trainer.engine.close()
        engine.close()
    print(table(f"The same differential model, {LENGTH} tokens, {dtype}", rows, tokens=LENGTH), flush=True)
    return rows


def on_gpu(measure: Measure, rounds: int, lengths: list[int]) -> dict[str, Any]:
    """Steps of the recipes at several lengths of the sequence, one model at a time."""
    results: dict[str, Any] = {}
    with one_process() as topology:
        for name, recipe in GPU_RECIPES.items():
            for length in lengths:
                overrides = [
                    f"train.sequence_length={length}", "train.global_batch_size=1", "train.micro_batch_size=1",
                    "train.recompute=selective", "precision.compute=bf16", "model.vocabulary_size=32000",
                    "parallel.tensor=1", "parallel.pipeline=1", "data.directory=unused", "run.directory=unused",
                ]  # fmt: skip
                config = load_config(Path(__file__).parent.parent / "configs" / f"{recipe}.yaml", overrides)
                engine = engine_of(config, topology(config))
                flops = 3 * length * sum(chunk.flops_per_token(length) for chunk in engine.chunks)
                job = Contender(f"{recipe}, {length} tokens", engine_step(engine), flops)
                (row,) = results[f"{name} {length}"] = compare([job], measure, rounds=rounds, peak=SPEC_FLOPS)
                rate = length / row.seconds
                print(f"{row.name}: {rate:,.0f} tokens/s, MFU {row.of_peak:.1%}, {row.peak_mib:,.0f} MiB", flush=True)
                engine.close()
                del engine, job
    return results


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=5)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="on a CPU (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="lengths of the sequence on a GPU")
    options = parser.parse_args()
    logging.getLogger("trine").setLevel(logging.ERROR)
    device = torch.device(options.device)
    measure, rounds = Measure(device, options.threads), 2 if options.quick else options.rounds
    results: dict[str, Any]
    if device.type == "cuda":
        results = on_gpu(measure, rounds, options.tokens)
    else:
        print(f"no GPU: this measures small models on a CPU, in {measure.clock}")
        results = against_hugging_face(measure, rounds, options.dtype)
        results["trainer"] = trainer_overhead(measure, rounds, options.dtype)
    about = {"command": sys.argv, "machine": machine(device), "clock": measure.clock}
    write_json(options.json, about | {"rows": results})


if __name__ == "__main__":
    main()
