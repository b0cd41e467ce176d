"""Whole runs and their data: resumed under other layouts, ramped, mixed, damaged. What they read is what they log."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import config_of

from trine.configs.errors import UsageError
from trine.configs.schema import Config
from trine.data_pipeline.shards.manifest import load_manifest
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(240)

STACK = [
    {"mixer": "gated_retention", "layers": 1, "heads": 4},
    {"shared_kv": {"kv_heads": 2, "head_dim": 8}},
    {"mixer": "cross_attention", "layers": 3, "heads": 4},
]
LENGTH = 32

Runner = Callable[..., Path]


@pytest.fixture
def start(ranks: RankPool, data: Path, tmp_path: Path) -> Runner:
    """Run, or continue, in ``tmp_path/<name>`` on some ranks; returns the run's directory."""

    def run(name: str, world: int = 1, own_data: dict[str, str] | None = None, **sections: Any) -> Path:
        config = run_config(data, tmp_path / name, **sections)
        raw = config.model_dump(mode="json", exclude_none=True)
        ranks.run("running:pretrain", world, config=raw, own_data=own_data)
        return tmp_path / name

    return run


@pytest.fixture
def refusal(ranks: RankPool, data: Path, tmp_path: Path) -> Callable[..., str]:
    """What all ranks of a run in ``tmp_path/<name>`` say instead of finishing it."""

    def run(name: str, world: int = 1, **sections: Any) -> str:
        raw = run_config(data, tmp_path / name, **sections).model_dump(mode="json", exclude_none=True)
        (said,) = set(ranks.run("running:refused", world, config=raw))
        return str(said)

    return run


def run_config(prepared: Path, directory: Path, **sections: Any) -> Config:
    """Six steps of 8 samples. The optimizer's eps is parity's, with which rounding is not magnified."""
    train = {"steps": 6, "global_batch_size": 8, "sequence_length": LENGTH} | sections.pop("train", {})
    source = {} if "sources" in sections.get("data", {}) else {"directory": str(prepared)}
    return config_of(
        STACK,
        model={"vocabulary_size": None},
        train=train,
        data={"directory": None, "record_samples": True} | source | sections.pop("data", {}),
        evaluation={"interval": 3, "batches": 1} | sections.pop("evaluation", {}),
        checkpoint={"interval": 2, "keep": 9},
        run={"directory": str(directory)},
        **sections,
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def samples(run: Path) -> dict[int, list[str]]:
    """What every step read, over all ranks, in the order of the global batch."""
    found: dict[int, list[str]] = {}
    for path in sorted((run / "samples").glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], []).extend(record["samples"])
    return found


def test_resume_at_any_layout_reads_and_computes_the_same(start: Runner) -> None:
    """DP 1 -> 2 -> 4 and TP 1 -> 2, other microbatches and numbers of threads. Losses within 1e-6: sums are taken in
    other orders."""
    whole = start("whole")
    steps = [
        dict(world=1, train={"steps": 1}),
        dict(world=2, train={"steps": 2, "micro_batch_size": 4}, data={"workers": 0}),
        dict(world=4, train={"steps": 4, "micro_batch_size": 1}, data={"workers": 3, "read_ahead": 1}),
        dict(world=2, train={"steps": 5}, parallel={"tensor": 2, "sequence": True}),
        dict(world=4, train={"steps": 6}, parallel={"pipeline": 2}),
    ]
    for part in steps:
        resumed = start("parts", **part)
    assert samples(resumed) == samples(whole)
    assert sorted(samples(whole)) == list(range(1, 7))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


def test_another_batch_size_keeps_the_order(start: Runner) -> None:
    whole = [sample for step in samples(start("whole")).values() for sample in step]
    start("parts", train={"steps": 3, "global_batch_size": 4})
    parts = start("parts", train={"steps": 5, "global_batch_size": 12}, world=2)
    assert [sample for step in samples(parts).values() for sample in step] == whole[: 3 * 4 + 2 * 12]
    last = metrics(parts)[-1]
    assert (last["consumed_samples"], last["batch_size"]) == (36, 12)
    assert last["tokens"] == 36 * LENGTH


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pipeline": 2}),
        (2, {"context": 2}),
        (4, {"tensor": 2, "sequence": True}),
        (4, {"pipeline": 2, "virtual_pipeline": 2, "context": 2}),
    ],
    ids=["pp2", "cp2", "tp2+sp+dp2", "pp2+vpp2+cp2+recompute"],
)
def test_ramps_compute_the_same_under_every_layout(start: Runner, world: int, parallel: dict[str, Any]) -> None:
    """Documents apart, 2 steps of 4 samples as 4 sequences each of 8 tokens, then 16 tokens, then the whole."""
    train = {
        "document_masking": True,
        "micro_batch_size": 2,
        "batch_ramp": [{"until_samples": 8, "global_batch_size": 4}],
        "sequence_ramp": [
            {"until_samples": 8, "sequence_length": 8},
            {"until_samples": 16, "sequence_length": 16},
        ],
    }
    recompute = "full" if "virtual_pipeline" in parallel else "none"
    one = start("one", train=train)
    other = start("other", world, train=train | {"recompute": recompute}, parallel=parallel)
    assert [(m["batch_size"], m["sequence_length"], m["consumed_samples"]) for m in metrics(one)] == [
        (4, 8, 4), (4, 8, 8), (8, 16, 16), (8, 32, 24), (8, 32, 32), (8, 32, 40),
    ]  # fmt: skip
    assert [m["tokens"] for m in metrics(one)] == [32 * m["consumed_samples"] for m in metrics(one)]
    assert samples(other) == samples(one)
    assert losses(other) == pytest.approx(losses(one), rel=2e-6)


def test_a_ramp_is_resumed_exactly(start: Runner) -> None:
    """Stopped within and between stages; the losses are those of the run that never stopped, to the last bit."""
    train = {
        "batch_ramp": [{"until_samples": 10, "global_batch_size": 4}],
        "sequence_ramp": [{"until_samples": 20, "sequence_length": 8}],
    }
    whole = start("whole", train=train)
    for steps in (1, 3, 5, 6):
        parts = start("parts", train=train | {"steps": steps})
    assert samples(parts) == samples(whole)
    assert losses(parts) == losses(whole)


def sources_of(*folders: Path, weights: tuple[float, ...]) -> dict[str, Any]:
    return {"sources": [{"directory": str(f), "weight": w} for f, w in zip(folders, weights, strict=True)]}


@pytest.fixture
def second(data: Path, tmp_path: Path) -> Path:
    """Other text under the same tokenizer."""
    from trine.data_pipeline.preparation.prepare import prepare

    corpus = tmp_path / "second.jsonl"
    texts = (f"sentence {n} of another source, {'and on ' * (n % 5)}to its end" for n in range(300))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(corpus)], tmp_path / "second", tokenizer=data / "tokenizer.json", validation_fraction=0.2)
    return tmp_path / "second"


def test_a_mixture_is_read_in_its_shares_and_resumed(start: Runner, data: Path, second: Path) -> None:
    mixed = sources_of(data, second, weights=(3, 1))
    whole = start("whole", data=mixed, train={"steps": 10})
    names = [sample.partition(":")[0] for step in samples(whole).values() for sample in step]
    assert (names.count("tokens"), names.count("second")) == (60, 20)
    start("parts", data=mixed, train={"steps": 4})
    parts = start("parts", 2, data=sources_of(data, second, weights=(0.75, 0.25)), train={"steps": 10})
    assert samples(parts) == samples(whole)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert {t: round(events.Scalars(t)[-1].value, 4) for t in events.Tags()["scalars"] if "mix" in t} == {
        "data/mix/tokens": 0.75,
        "data/mix/second": 0.25,
    }


def test_changed_data_are_refused_and_accepted_where_asked(
    start: Runner, refusal: Callable[..., str], data: Path, second: Path
) -> None:
    start("run", data=sources_of(data, second, weights=(3, 1)), train={"steps": 2})
    changed = sources_of(data, second, weights=(1, 1))
    said = refusal("run", 2, data=changed)
    assert "the weights were tokens 0.75, second 0.25 and are tokens 0.5, second 0.5" in said
    said = refusal("run", data=sources_of(data, second, weights=(3, 1)), train={"seed": 5})
    assert "train.seed was 1234 and is 5. Resume" in said
    assert said.endswith("accept the change with data.on_change=accept")
    run = start("run", data=changed | {"on_change": "accept"}, train={"steps": 4})
    # And what was accepted is then the state of things.
    run = start("run", 2, data=changed)
    seen = [sample for step in samples(run).values() for sample in step]
    assert len(set(seen)) == len(seen) == 48
    assert [sum(s.startswith("second") for s in step) for step in samples(run).values()] == [2, 2, 4, 4, 4, 4]


@pytest.fixture(scope="module")
def many(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences in many small shards, so that damage hits some samples and not all."""
    from trine.data_pipeline.preparation.prepare import prepare

    output = tmp_path_factory.mktemp("many") / "tokens"
    corpus = output.with_name("corpus.jsonl")
    texts = (f"the {n}th shard keeps {n % 9} tokens of its own {'and sends them on ' * (n % 4)}" for n in range(500))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(corpus)], output, tokenizer=data / "tokenizer.json", validation_fraction=0.2, shard_tokens=400)
    return output


def damaged_copy(data: Path, target: Path, shards: tuple[int, ...]) -> Path:
    """``data`` with one byte of the first token payload of some training shards flipped."""
    shutil.copytree(data, target)
    records = load_manifest(target).splits["train"]
    for number in shards:
        with (target / records[number].name).open("r+b") as file:
            file.seek(512 + 40)
            byte = file.read(1)[0]
            file.seek(512 + 40)
            file.write(bytes([byte ^ 1]))
    return target


def skipped(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_damage_stops_a_run_with_one_sentence(refusal: Callable[..., str], many: Path, tmp_path: Path) -> None:
    damaged = damaged_copy(many, tmp_path / "damaged", tuple(range(8)))
    said = refusal("run", data={"directory": str(damaged)})
    assert re.search(r"train-00000-00\d\.tar, member 00000-0000\d\d\.tok is damaged: expected crc32", said)
    assert said.endswith("or train on with data.on_damage=skip, which replaces damaged samples by others")


def test_a_shard_that_is_missing_is_told_before_training(
    refusal: Callable[..., str], many: Path, tmp_path: Path
) -> None:
    shutil.copytree(many, tmp_path / "short")
    last = load_manifest(many).splits["train"][-1].name
    (tmp_path / "short" / last).unlink()
    assert last in refusal("run", data={"directory": str(tmp_path / "short")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_damaged_samples_are_replaced_the_same_under_every_layout(start: Runner, many: Path, tmp_path: Path) -> None:
    """Byte flips and a missing shard. Of two tensor ranks only one sees the damage, as if its node's disk had it."""
    damaged = damaged_copy(many, tmp_path / "damaged" / "tokens", (0, 3, 4))
    (damaged / load_manifest(many).splits["train"][1].name).unlink()
    skip = {"directory": str(damaged), "on_damage": "skip", "damage_budget": 60}
    whole = start("whole", data=skip, evaluation={"interval": 0})
    data_ranks = start("data", 2, data=skip, evaluation={"interval": 0})
    tensor = start(
        "tensor", 2, data=skip | {"directory": str(many)}, evaluation={"interval": 0}, parallel={"tensor": 2},
        own_data={"1": str(damaged)},
    )  # fmt: skip
    lines = skipped(whole)
    assert 4 < len(lines) < 60
    clean = losses(start("clean", data={"directory": str(many)}, evaluation={"interval": 0}))
    assert losses(whole) != pytest.approx(clean, rel=1e-4)
    for run in (data_ranks, tensor):
        assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
        assert _without_reason(skipped(run)) == _without_reason(lines)
    start("parts", data=skip, evaluation={"interval": 0}, train={"steps": 2})
    parts = start("parts", 2, data=skip, evaluation={"interval": 0})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    assert _without_reason(skipped(parts)) == _without_reason(lines)


def test_threads_do_not_decide_what_replaces_a_sample(start: Runner, many: Path, tmp_path: Path) -> None:
    """A source so small that a damaged sample comes again among what is read ahead."""
    damaged = damaged_copy(many, tmp_path / "damaged", (0, 3, 4))
    data = {"directory": str(damaged), "on_damage": "skip", "read_ahead": 40}
    train = {"sequence_length": 512, "steps": 5}
    runs = [
        start(f"{threads}", data=data | {"workers": threads}, train=train, evaluation={"interval": 0})
        for threads in (0, 2)
    ]
    assert skipped(runs[0]) == skipped(runs[1]) != []
    assert losses(runs[0]) == losses(runs[1])


def test_damaged_validation_samples_are_logged_as_well(start: Runner, many: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(many, tmp_path / "damaged")
    (damaged / load_manifest(many).splits["validation"][0].name).unlink()
    run = start("run", data={"directory": str(damaged), "on_damage": "skip"}, train={"steps": 1})
    lines = skipped(run)
    assert {(line["step"], line["split"]) for line in lines} == {(0, "validation")}
    assert all("validation-0" in line["reason"] for line in lines)


def test_replaced_samples_are_counted_over_resumes(start: Runner, refusal: Callable[..., str], many: Path, tmp_path: Path) -> None:
    """The budget is that of the whole run."""
    damaged = damaged_copy(many, tmp_path / "damaged", (0, 3, 4))
    data = {"directory": str(damaged), "on_damage": "skip"}
    first = len(skipped(start("run", data=data, evaluation={"interval": 0}, train={"steps": 3})))
    whole = len(skipped(start("run", data=data, evaluation={"interval": 0})))
    assert 0 < first < whole
    start("again", data=data, evaluation={"interval": 0}, train={"steps": 3})
    said = refusal("again", data=data | {"damage_budget": whole - 1}, evaluation={"interval": 0})
    assert f"{whole} damaged samples have been replaced" in said


def test_data_ranks_that_are_no_more_leave_no_records_behind(start: Runner) -> None:
    """Four data ranks record six steps; two of them go on from the second."""
    run = start("run", 4, train={"micro_batch_size": 1})
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name > "step-00000002":
            shutil.rmtree(checkpoint)
    whole = samples(run)
    assert samples(start("run", 2, train={"micro_batch_size": 1, "steps": 4})) == {n: whole[n] for n in range(1, 5)}


def test_ranks_that_have_other_data_are_told(ranks: RankPool, data: Path, many: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path / "run", parallel={"tensor": 2}).model_dump(mode="json", exclude_none=True)
    with pytest.raises(UsageError, match=r"rank 1 reads other data in .*tokens \(fingerprint [0-9a-f]{16}\) than rank 0"):
        ranks.run("running:pretrain", 2, config=config, own_data={"1": str(many)})


def _without_reason(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in ("step", "source", "sample", "replaced_by")} for line in lines]


def test_too_much_damage_ends_a_run(refusal: Callable[..., str], many: Path, tmp_path: Path) -> None:
    damaged = damaged_copy(many, tmp_path / "damaged", tuple(range(8)))
    said = refusal("run", 2, data={"directory": str(damaged), "on_damage": "skip", "damage_budget": 3})
    assert re.match(r"\d+ damaged samples have been replaced, more than data\.damage_budget=3; the last one: shard", said)
