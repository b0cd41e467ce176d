"""Ramps: the shape of a step is a function of the samples before it."""

from __future__ import annotations

from typing import Any

import pytest

from trine.configs.ramps import StepShape, full_shape, shape_after, shapes_of
from trine.configs.schema import Train

BATCHES = [{"until_samples": 100, "global_batch_size": 8}, {"until_samples": 300, "global_batch_size": 32}]
LENGTHS = [{"until_samples": 100, "sequence_length": 16}, {"until_samples": 200, "sequence_length": 32}]


def train(**keys: Any) -> Train:
    return Train.model_validate({"steps": 10, "global_batch_size": 64, "sequence_length": 128} | keys)


def test_a_run_without_ramps_has_one_shape() -> None:
    whole = StepShape(samples=64, sequence_length=128, pieces=1)
    assert full_shape(train()) == whole
    assert shapes_of(train()) == [whole]
    assert all(shape_after(train(), consumed) == whole for consumed in (0, 1, 64, 10**12))


def test_stages_end_at_their_boundaries() -> None:
    ramped = train(batch_ramp=BATCHES, sequence_ramp=LENGTHS)
    expected = {
        0: (8, 16, 8),
        99: (8, 16, 8),
        100: (32, 32, 4),
        199: (32, 32, 4),
        200: (32, 128, 1),
        299: (32, 128, 1),
        300: (64, 128, 1),
        10**12: (64, 128, 1),
    }
    for consumed, shape in expected.items():
        assert shape_after(ramped, consumed) == StepShape(*shape)
    assert full_shape(ramped) == StepShape(64, 128, 1)


def test_a_window_keeps_its_tokens_whatever_it_is_cut_into() -> None:
    ramped = train(sequence_ramp=LENGTHS)
    assert {shape_after(ramped, consumed).tokens for consumed in range(0, 400, 7)} == {64 * 128}
    both = train(batch_ramp=BATCHES, sequence_ramp=LENGTHS)
    assert [shape.tokens for shape in shapes_of(both)] == [8 * 128, 32 * 128, 32 * 128, 64 * 128]


def test_the_shapes_of_a_run_are_those_of_all_its_positions() -> None:
    for keys in (
        {"batch_ramp": BATCHES},
        {"sequence_ramp": LENGTHS},
        {"batch_ramp": BATCHES, "sequence_ramp": LENGTHS},
    ):
        ramped = train(**keys)
        walked = dict.fromkeys(shape_after(ramped, consumed) for consumed in range(400))
        assert shapes_of(ramped) == list(walked)
    assert [shape.samples for shape in shapes_of(train(batch_ramp=BATCHES))] == [8, 32, 64]


def test_a_shape_that_comes_again_is_named_once() -> None:
    up_and_down = [{"until_samples": 10, "global_batch_size": 64}, {"until_samples": 20, "global_batch_size": 32}]
    assert [shape.samples for shape in shapes_of(train(batch_ramp=up_and_down))] == [64, 32]


@pytest.mark.parametrize("samples", [1, 24, 25])
def test_steps_of_a_run_follow_each_other(samples: int) -> None:
    """A stage ends with the first step that begins after its boundary, so the last one may reach beyond it."""
    ramped = train(batch_ramp=[{"until_samples": 50, "global_batch_size": samples}])
    consumed = steps = 0
    while (shape := shape_after(ramped, consumed)).samples == samples:
        consumed, steps = consumed + shape.samples, steps + 1
    assert consumed - samples < 50 <= consumed
    assert steps == -(-50 // samples)
