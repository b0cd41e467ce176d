"""A document in a window sees nothing of the others, whoever holds which tokens."""

from __future__ import annotations

import pytest
from stacks import MIXERS, hybrid, stack_of
from training import config_of

from trine.configs.layouts import parse_layout, under_layout
from trine.launch.pool import RankPool

pytestmark = pytest.mark.timeout(120)

STACKS = {mixer: stack_of(mixer) for mixer in MIXERS} | {"hybrid": hybrid()}


@pytest.mark.parametrize("layout", ["tp1", "cp2", "cp2+a2a", "tp2+sp+cp2", "cp4"])
@pytest.mark.parametrize("stack", STACKS)
def test_no_document_reaches_into_the_next(ranks: RankPool, stack: str, layout: str) -> None:
    """Changing the documents before does not move one bit of a document's logits: masked weights are zeros.

    Gated retention alone moves by rounding, as its decays are differences of a running sum over a chunk of tokens,
    whatever their documents. Without masking they move, so the test can fail. And the logits are those of the document in a window of its own,
    but for rounding: rotary angles and decays are then taken from other positions.
    """
    named = parse_layout(layout)
    config = under_layout(config_of(STACKS[stack]), named).model_dump(mode="json", exclude_none=True)
    found = ranks.run("documents:leaks", named.world_size, config=config)
    assert max(rank["masked"] for rank in found) <= (1e-5 if stack in ("gated_retention", "hybrid") else 0.0)
    assert max(rank["unmasked"] for rank in found) > 1e-3
    assert max(rank["alone"] for rank in found) < 2e-5
