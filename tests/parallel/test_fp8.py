"""8-bit linear maps under every kind of parallelism: one process's numbers, one process's scales, one checkpoint."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stacks import hybrid
from training import config_of

from trine.configs.errors import UsageError
from trine.configs.layouts import parse_layout, under_layout
from trine.configs.linear_widths import linear_widths
from trine.configs.schema import Config, Fp8
from trine.kernels.fp8.formats import SCALINGS
from trine.launch.pool import RankPool
from trine.parallel import fp8_checks
from trine.parallel.engine_config import engine_config
from trine.parallel.fp8_checks import check_fp8_machine
from trine.parallel.fp8_history import LENGTH
from trine.parallel.fp8_linear import Fp8ColumnLinear, Fp8RowLinear
from trine.parallel.linear import ColumnLinear, RowLinear
from trine.parallel.linears import linears_of
from trine.parallel.parameters import Section, blueprint_of, linear_default
from trine.pretrain.parity_comparison import TOLERANCES, compare
from trine.pretrain.parity_pieces import whole

pytestmark = pytest.mark.timeout(240)

STEPS = 3
EVEN: list[dict[str, Any]] = [
    {"mixer": "gated_retention", "layers": 1, "heads": 4, "head_dim": 16},
    {"mixer": "differential", "layers": 1, "heads": 2, "head_dim": 16},
]
"""Widths that hardware multiplies, but for a decay per head."""
EVEN_SIZES: dict[str, Any] = {
    "model": {"hidden_size": 64, "ffn_hidden_size": 96},
    "train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32},
}
LARGE_MICROBATCH: dict[str, Any] = {"steps": 5, "global_batch_size": 8, "micro_batch_size": 8, "sequence_length": 32}
WIDE_STACK: list[dict[str, Any]] = [{"mixer": "attention", "layers": 1, "heads": 2, "head_dim": 32}]
BLOCK_STACK: list[dict[str, Any]] = [{"mixer": "attention", "layers": 1, "heads": 2, "head_dim": 128}]
BLOCK_SIZES: dict[str, Any] = {
    "model": {"hidden_size": 128, "ffn_hidden_size": 256},
    "train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 128},
}


def fp8(recipe: str = "tensorwise", backend: str = "emulate", **more: Any) -> dict[str, Any]:
    return {"fp8": {"backend": backend, "recipe": recipe, **more}}


def raw(stack: list[dict[str, Any]], layout: str = "tp1", **sections: Any) -> tuple[int, dict[str, Any]]:
    named = parse_layout(layout)
    config = under_layout(config_of(stack, **sections), named)
    return named.world_size, config.model_dump(mode="json", exclude_none=True)


def train(ranks: RankPool, stack: list[dict[str, Any]], layout: str = "tp1", **sections: Any) -> list[Any]:
    world_size, config = raw(stack, layout, **{k: v for k, v in sections.items() if k not in ("steps", "load", "save")})
    more = {k: v for k, v in sections.items() if k in ("load", "save")}
    return ranks.run("training:train", world_size, config=config, steps=sections.get("steps", STEPS), **more)


@pytest.fixture(scope="module")
def plain(ranks: RankPool) -> Any:
    return train(ranks, hybrid())[0]


@pytest.fixture(scope="module")
def rounded(ranks: RankPool) -> Any:
    return train(ranks, hybrid(), precision=fp8())[0]


@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "dp2"])
def test_hybrid_of_all_mixers(ranks: RankPool, rounded: Any, layout: str) -> None:
    """Pipeline stages sum nothing else. Data parallelism adds gradients, and tensor parallelism partial sums, in another
    order; a number that lies between two of e5m2, 12 to 25 % apart, may then round to the other one, and what follows
    it rounds anew: under data parallelism from the second step on, for which the first update differs in its last bit.
    So single gradients differ by hundredths, far less than the tenths that a missing part makes."""
    found = train(ranks, hybrid(), layout, precision=fp8())
    comparison = compare(rounded, found, small_gradient=0.0)
    assert layout != "pp2" or not comparison.excess
    assert layout == "tp2+sp" or comparison.gradient <= TOLERANCES["gradient"]
    assert found[0]["losses"] == pytest.approx(rounded["losses"], rel=1e-3)
    assert found[0]["grad_norms"] == pytest.approx(rounded["grad_norms"], rel=5e-2)
    ours, theirs = whole(found, "gradients"), whole([rounded], "gradients")
    assert median(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs) < 0.05


@pytest.mark.parametrize("layout", ["tp2+sp", "tp2+pp2", "tp2+sp+cp2"])
def test_all_but_the_rounding_is_exact(ranks: RankPool, layout: str) -> None:
    """With operands that are scaled and not rounded, every layout gives one process's numbers as fp32 sums do."""
    results = []
    for one in ("tp1", layout):
        world_size, config = raw(EVEN, one, **EVEN_SIZES, precision=fp8())
        results.append(ranks.run("fp8_jobs:without_rounding", world_size, config=config, steps=2))
    assert not compare(results[0][0], results[1], small_gradient=0.0).excess


@pytest.mark.parametrize("layout", ["tp2+sp", "cp2+dp2"])
def test_scales_do_not_depend_on_the_layout(ranks: RankPool, layout: str) -> None:
    """The magnitudes that scales are made from: those that no rounding has touched exactly, others as far as it goes;
    gradients although a data rank has half the microbatches, and a context rank's mean is over half the tokens."""
    _, config = raw(EVEN, **EVEN_SIZES, precision=fp8("delayed"))
    (expected,) = ranks.run("fp8_jobs:magnitudes", 1, config=config)
    world_size, config = raw(EVEN, layout, **EVEN_SIZES, precision=fp8("delayed"))
    for found in ranks.run("fp8_jobs:magnitudes", world_size, config=config):
        assert found.keys() == expected.keys()
        for name, roles in expected.items():
            newest = [[past[0] for past in each] for each in (found[name], roles)]
            assert newest[0] == pytest.approx(newest[1], rel=0.1), name
            assert newest[0][1] == newest[1][1]
        assert found["layers.0.mixer.input"][0][0] == expected["layers.0.mixer.input"][0][0]


@pytest.mark.parametrize(
    "after",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 2, "global_batch_size": 16},
        {"micro_batch_size": 1, "global_batch_size": 16, "sequence_length": 16},
    ],
)
def test_histories_serve_a_run_with_other_microbatches(ranks: RankPool, after: dict[str, int]) -> None:
    """A microbatch's loss is the mean of its own tokens: eight times fewer have eight times larger gradients, and scales
    of the past would saturate them. The cases here change gradients by 8, 4 and 16; what single tokens differ by, where
    the runs have not the same, is less in the median."""
    _, config = raw(EVEN, model=EVEN_SIZES["model"], train=LARGE_MICROBATCH, precision=fp8("delayed"))
    (before,) = ranks.run("fp8_jobs:magnitudes", 1, config=config)
    _, config = raw(EVEN, model=EVEN_SIZES["model"], train=LARGE_MICROBATCH | after, precision=fp8("delayed"))
    (resumed,) = ranks.run("fp8_jobs:magnitudes", 1, config=config, state=before)
    gradients = [roles[2][:2] for roles in resumed.values()]
    assert [old for _, old in gradients] == [roles[2][0] for roles in before.values()]
    assert 0.7 < median(newest / old for newest, old in gradients) < 2
    if "global_batch_size" not in after:  # the same tokens, but for e5m2's rounding
        assert all(newest == pytest.approx(old, rel=0.1) for newest, old in gradients)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_blocks_do_not_depend_on_the_layout(ranks: RankPool, recipe: str) -> None:
    (expected,) = train(ranks, BLOCK_STACK, **BLOCK_SIZES, precision=fp8(recipe), steps=2)
    found = train(ranks, BLOCK_STACK, "tp2+sp", **BLOCK_SIZES, precision=fp8(recipe), steps=2)
    assert found[0]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    ours, theirs = whole(found, "gradients"), whole([expected], "gradients")
    assert max(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs) < 0.05


def test_losses_stay_near_those_without(plain: Any, rounded: Any) -> None:
    """Rounding errors of 2 % per number are independent and average out: losses agree to a part in a thousand. The
    gradients carry e5m2's 7 % per number, and show that 8 bits were used at all."""
    assert rounded["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    assert rounded["losses"] != plain["losses"]
    ours, theirs = whole([rounded], "gradients"), whole([plain], "gradients")
    off = median(((ours[n] - theirs[n]).norm() / theirs[n].norm()).item() for n in theirs)
    assert 0.02 < off < 0.3


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_emulation_trains_as_torchs_product_does(ranks: RankPool, recipe: str) -> None:
    """In bf16, bit for bit; the gated retention's decay has a width that no hardware multiplies."""
    results = [
        train(ranks, EVEN, "tp2+sp", **EVEN_SIZES, precision={"compute": "bf16", **fp8(recipe, backend)})
        for backend in ("emulate", "scaled_mm")
    ]
    for ours, theirs in zip(*results, strict=True):
        assert ours["losses"] == theirs["losses"]
        assert ours["grad_norms"] == theirs["grad_norms"]
        assert all(torch.equal(a[-1], b[-1]) for a, b in zip(ours["parameters"], theirs["parameters"], strict=True))


@pytest.mark.parametrize("layout", ["selective", "recompute"])
def test_recomputed_activations(ranks: RankPool, layout: str) -> None:
    (kept,) = train(ranks, EVEN, **EVEN_SIZES, precision=fp8("delayed"))
    (again,) = train(ranks, EVEN, layout, **EVEN_SIZES, precision=fp8("delayed"))
    assert again["losses"] == kept["losses"]
    assert again["grad_norms"] == kept["grad_norms"]


@pytest.mark.parametrize(("layout", "passes"), [("tp1", 1), ("recompute", 2)])
def test_maps_are_called_in_their_context_when_recomputed_too(ranks: RankPool, layout: str, passes: int) -> None:
    """Transformer Engine's maps are 8-bit only in theirs; others compared with themselves would not show it."""
    _, config = raw(EVEN, layout, **EVEN_SIZES)
    (calls,) = ranks.run("fp8_jobs:calls_in_the_context", 1, config=config)
    assert calls == {True: passes * 2 * 2 * 4, False: 0}  # by microbatches, layers and maps of a layer


def test_delayed_scaling_resumes_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    """Also on pipeline stages, which hold the histories of their own layers alone."""
    more: dict[str, Any] = {**EVEN_SIZES, "precision": fp8("delayed")}
    (through,) = train(ranks, EVEN, **more, steps=4)
    train(ranks, EVEN, **more, steps=2, save=str(tmp_path))
    (resumed,) = train(ranks, EVEN, **more, steps=2, load=str(tmp_path))
    assert resumed["losses"] == through["losses"][2:]
    assert resumed["grad_norms"] == through["grad_norms"][2:]
    staged = train(ranks, EVEN, "pp2", **more, steps=2, load=str(tmp_path))
    assert staged[0]["losses"] == pytest.approx(through["losses"][2:], rel=1e-6)
    (anew,) = train(ranks, EVEN, **{**more, "precision": fp8("tensorwise")}, steps=2, load=str(tmp_path))
    assert anew["losses"] == pytest.approx(through["losses"][2:], rel=5e-3)


@pytest.mark.parametrize("layout", ["tp1", "tp2+sp"])
def test_a_history_of_zeros_is_none(ranks: RankPool, layout: str) -> None:
    """As a map has one whose gradient was zero so far: a scale of 1 would make zeros of all that is small."""
    world_size, config = raw(EVEN, layout, **EVEN_SIZES, precision=fp8("delayed"))
    expected = ranks.run("fp8_jobs:magnitudes", world_size, config=config)
    zeros = {name: [[0.0] * LENGTH for _ in roles] for name, roles in expected[0].items()}
    assert ranks.run("fp8_jobs:magnitudes", world_size, config=config, state=zeros) == expected


def test_magnitudes_are_asked_of_other_ranks_while_there_is_no_past(ranks: RankPool) -> None:
    """A step more than has none, because the host knows of a past one step late."""
    world_size, config = raw(EVEN, "tp2+sp", **EVEN_SIZES, precision=fp8("delayed"))
    for first, second, *later in ranks.run("fp8_jobs:maxima_over_ranks", world_size, config=config, steps=4):
        assert first == second > 0
        assert later == [0, 0]


@pytest.mark.parametrize(("before", "after"), [(fp8(), {}), ({}, fp8("delayed")), (fp8("delayed"), {})])
def test_a_checkpoint_loads_whatever_the_choice(
    ranks: RankPool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    (saved,) = train(ranks, EVEN, **EVEN_SIZES, precision=before, steps=2, save=str(tmp_path))
    (loaded,) = train(ranks, EVEN, **EVEN_SIZES, precision=after, steps=0, load=str(tmp_path))
    ours, theirs = whole([loaded], "parameters"), whole([saved], "parameters")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (on,) = train(ranks, EVEN, **EVEN_SIZES, precision=after, steps=1, load=str(tmp_path))
    assert math.isfinite(on["losses"][0])


def test_the_log_says_which_histories_begin_anew(ranks: RankPool) -> None:
    _, delayed = raw(EVEN, **EVEN_SIZES, precision=fp8("delayed"))
    _, tensorwise = raw(EVEN, **EVEN_SIZES, precision=fp8())
    (state,) = ranks.run("fp8_jobs:magnitudes", 1, config=delayed)
    (nothing,) = ranks.run("fp8_jobs:said_when_loading", 1, config=delayed, state=state)
    assert nothing == ""
    del state["layers.1.mixer.input"]
    (some,) = ranks.run("fp8_jobs:said_when_loading", 1, config=delayed, state=state)
    (all_of_them,) = ranks.run("fp8_jobs:said_when_loading", 1, config=delayed, state=None)
    (unused,) = ranks.run("fp8_jobs:said_when_loading", 1, config=tensorwise, state=state)
    assert some.startswith("delayed scaling begins anew for 1 of 8 linear maps")
    assert all_of_them.startswith("delayed scaling begins anew for 8 of 8 linear maps")
    assert "are left out: this run does not use them" in unused


def test_every_rank_refuses_what_the_machine_cannot_do(ranks: RankPool) -> None:
    _, config = raw(EVEN, "dp2", **EVEN_SIZES, precision={"compute": "bf16", **fp8("mxfp8", "scaled_mm")})
    wide = config | {"model": config["model"] | {"hidden_size": 64, "ffn_hidden_size": 128, "stack": WIDE_STACK}}
    (told,) = set(ranks.run("fp8_jobs:refused", 2, config=wide))
    assert told.startswith("precision.fp8.recipe=mxfp8 is not what torch")


def test_weights_are_quantised_once_a_step(ranks: RankPool) -> None:
    """Two microbatches a step; an evaluation sees the weights that the last step left."""
    _, config = raw(EVEN, **EVEN_SIZES, precision=fp8())
    ((first, second, evaluation),) = ranks.run("fp8_jobs:quantisations_of_weights", 1, config=config)
    assert first == second == evaluation == 8


def test_the_loss_without_fp8_is_that_of_a_run_without(ranks: RankPool) -> None:
    """And what is looked at has no effect on what comes after."""
    _, config = raw(EVEN, **EVEN_SIZES, precision=fp8("delayed"))
    ((first, without, again),) = ranks.run("fp8_jobs:losses_with_and_without", 1, config=config)
    (plain,) = train(ranks, EVEN, **EVEN_SIZES, steps=1)
    assert without == plain["losses"][0]
    assert first == again != without


def test_an_infinite_number_shows_in_the_loss_and_not_in_the_histories(ranks: RankPool) -> None:
    """Delayed scaling would saturate it in silence; the step is then passed over and leaves no trace."""
    world_size, config = raw(EVEN, "tp2+sp", **EVEN_SIZES, precision=fp8("delayed"))
    for good, bad, largest in ranks.run("fp8_jobs:spoilt", world_size, config=config):
        assert math.isfinite(good)
        assert math.isnan(bad)
        assert math.isfinite(largest)


@pytest.mark.parametrize(("kept", "layers"), [(0, range(8)), (2, range(2, 6))])
def test_layers_of_the_whole_model_are_kept(ranks: RankPool, kept: int, layers: range) -> None:
    """Of the model and not of a stage; the output layer and the embedding are never 8-bit."""
    world_size, config = raw(hybrid(), "pp2", precision=fp8(keep_first_last_bf16=kept))
    names: set[str] = set().union(*ranks.run("fp8_jobs:eight_bit_weights", world_size, config=config))
    inside = [f"layers.{n}.{part}.weight" for n in layers for part in ("mixer.input", "mixer.output", "feed_forward.input", "feed_forward.fc2")]  # fmt: skip
    shared = ["shared_kv.6.input.weight"] if 6 in layers else []
    assert names == {*inside, *shared}


def test_the_widths_that_are_checked_are_those_of_the_model(ranks: RankPool) -> None:
    config = config_of(hybrid(), precision=fp8())
    (shapes,) = ranks.run("fp8_jobs:eight_bit_weights", 1, config=config.model_dump(mode="json", exclude_none=True))
    sizes = {width.size for width in linear_widths(config.model)}
    assert {columns for _, columns in shapes.values()} <= sizes
    for name, (rows, _) in shapes.items():
        if name.endswith(("mixer.output.weight", "fc2.weight")):
            assert rows in sizes, name


def machine(recipe: str, backend: str) -> Config:
    return config_of(EVEN, **EVEN_SIZES, precision={"compute": "bf16", **fp8(recipe, backend)})


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_blocks_that_torch_refuses_are_refused(recipe: str) -> None:
    with pytest.raises(UsageError, match=f"precision.fp8.recipe={recipe} is not what torch .* can do on this device .*scaled_mm.*: use"):
        check_fp8_machine(machine(recipe, "scaled_mm"), torch.device("cpu"))


def test_transformer_engine_that_cannot_be_imported_is_refused(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("cudnn shared object not found.")

    monkeypatch.setattr(fp8_checks.importlib, "import_module", broken)
    with pytest.raises(UsageError) as refused:
        check_fp8_machine(machine("delayed", "te"), torch.device("cuda", 0))
    assert str(refused.value) == (
        "precision.fp8.backend=te needs Transformer Engine, which cannot be imported here (cudnn shared object not "
        "found.): use precision.fp8.backend=scaled_mm or emulate"
    )


class TransformerEngine:
    """In place of the package: says of each recipe whether this GPU has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: tuple[bool, str]) -> None:
        manager = SimpleNamespace(**{f"is_{name}_available": lambda answer=answer: answer for name, answer in answers.items()})
        modules = {
            "transformer_engine.pytorch": SimpleNamespace(),
            "transformer_engine.pytorch.fp8": SimpleNamespace(FP8GlobalStateManager=manager),
        }
        monkeypatch.setattr(fp8_checks.importlib, "import_module", modules.__getitem__)


@pytest.mark.parametrize("recipe", SCALINGS)
def test_transformer_engine_is_asked_for_the_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"blockwise": "fp8_block_scaling", "mxfp8": "mxfp8"}.get(recipe, "fp8")
    answers = dict.fromkeys(("fp8", "mxfp8", "fp8_block_scaling"), (True, ""))
    TransformerEngine(monkeypatch, **answers)
    check_fp8_machine(machine(recipe, "te"), torch.device("cuda", 0))
    TransformerEngine(monkeypatch, **answers | {asked: (False, "Device compute capability 10.0 or higher required.")})
    with pytest.raises(UsageError) as refused:
        check_fp8_machine(machine(recipe, "te"), torch.device("cuda", 0))
    remedy = "precision.fp8.recipe=tensorwise or " if recipe in ("blockwise", "mxfp8") else ""
    assert str(refused.value) == (
        f"precision.fp8.recipe={recipe} is not what Transformer Engine can do on this GPU with precision.fp8.backend=te "
        f"(Device compute capability 10.0 or higher required): use {remedy}precision.fp8.backend=emulate"
    )


def test_an_old_transformer_engine_without_the_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    TransformerEngine(monkeypatch, fp8=(True, ""))
    with pytest.raises(UsageError, match=r"recipe=mxfp8 is not what .* \(it has no is_mxfp8_available\): use"):
        check_fp8_machine(machine("mxfp8", "te"), torch.device("cuda", 0))


def test_transformer_engine_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    TransformerEngine(monkeypatch, fp8=(True, ""))
    with pytest.raises(UsageError) as refused:
        check_fp8_machine(machine("delayed", "te"), torch.device("cpu"))
    assert str(refused.value) == (
        "precision.fp8.backend=te multiplies on GPUs alone, and this rank has none: use precision.fp8.backend=scaled_mm "
        "or emulate"
    )


def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match=r"needs a GPU of compute capability 8\.9 or more, and this one has 8\.0: use"):
        check_fp8_machine(machine("tensorwise", "scaled_mm"), torch.device("cuda", 0))


def test_emulation_on_a_gpu_says_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_fp8_machine(machine("tensorwise", "emulate"), torch.device("cuda", 0))
    assert "slower than no FP8 at all" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "format"), [("tensorwise", "hybrid"), ("delayed", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_what_transformer_engine_is_told(recipe: str, format: str) -> None:
    """No more can be tried without it: the classes are chosen, and Megatron-Core's configuration is what it reads."""
    config = machine(recipe, "te")
    engine = engine_config(config, torch.device("cpu"))
    assert (engine.fp8, engine.fp8_recipe) == (format, recipe)
    assert engine_config(machine(recipe, "emulate"), torch.device("cpu")).fp8 is None


class StandIn(torch.nn.Module):
    """In place of Transformer Engine's linear maps, which do not exist without it: notes what it is made with."""

    def __init__(self, input_size: int, output_size: int, **arguments: Any) -> None:
        super().__init__()
        self.sizes, self.arguments = (input_size, output_size), arguments
        self.weight = torch.nn.Parameter(torch.zeros(output_size, input_size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.t(), None


class OneRank:
    def size(self) -> int:
        return 1


def test_the_maps_of_transformer_engine_are_made_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tagged with the same blueprints, so that first values and checkpoints are the same; no bias, sums inside."""
    from megatron.core.extensions import transformer_engine

    for name in ("TEColumnParallelLinear", "TERowParallelLinear"):
        monkeypatch.setattr(transformer_engine, name, StandIn)
    monkeypatch.delitem(sys.modules, "trine.parallel.te_linear", raising=False)
    made = linears_of(Fp8(backend="te"), 0, 2)
    config, groups = object(), SimpleNamespace(tp=OneRank())
    law = linear_default(4)
    column: Any = made.column(4, [Section("a", (6, 4), law), Section("b", (2, 4), law)], config, groups)  # type: ignore[arg-type]
    row: Any = made.row(6, 4, law, config, groups)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "trine.parallel.te_linear")
    assert [type(column).__name__, type(row).__name__] == ["TEColumnLinear", "TERowLinear"]
    assert [column.sizes, row.sizes] == [(4, 8), (6, 4)]
    assert [section.name for section in blueprint_of(column.weight).sections] == ["a", "b"]
    assert (blueprint_of(column.weight).partition, blueprint_of(row.weight).partition) == (0, 1)
    for one in (column, row):
        assert one.arguments["config"] is config
        assert one.arguments["tp_group"] is groups.tp
        assert not one.arguments["bias"] and not one.arguments["is_expert"]
    assert row.arguments["input_is_parallel"] and not column.arguments["gather_output"]
    assert [tuple(y.shape) for y in column(torch.zeros(3, 1, 4))] == [(3, 1, 6), (3, 1, 2)]
    assert tuple(row(torch.zeros(3, 1, 6)).shape) == (3, 1, 4)


def test_the_classes_of_each_backend() -> None:
    ours: Any = linears_of(Fp8(backend="emulate"), 0, 2)
    assert [ours.column.func, ours.row.func] == [Fp8ColumnLinear, Fp8RowLinear]
    for off in (linears_of(None, 0, 2), linears_of(Fp8(backend="te", keep_first_last_bf16=1), 0, 3)):
        assert [off.column, off.row] == [ColumnLinear, RowLinear]
