"""What travels between pipeline stages."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trine.configs.stack import SharedKV, carried_kv, expand
from trine.configs.validation import validate
from trine.parallel.pipeline import Stage, pack, stages_of, unpack


@given(
    tensor=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 5),
    batch=st.integers(1, 3),
    hidden=st.integers(1, 9),
    width=st.integers(1, 6),
)
def test_packing_is_a_bijection(tensor: int, rows: int, batch: int, hidden: int, width: int) -> None:
    """Under sequence parallelism hidden has 1 / tensor of the rows, and K,V as many elements per row more."""
    sequence = rows * tensor
    x = torch.randn(rows, batch, hidden)
    kv = torch.randn(sequence, batch, width)
    boundary = pack(x, kv)
    assert boundary._base is None
    assert boundary.shape == (rows, batch, hidden + width * tensor)
    x_again, kv_again = unpack(boundary, hidden, sequence)
    assert torch.equal(x_again, x)
    assert kv_again is not None
    assert torch.equal(kv_again, kv)


def test_hidden_alone_passes_through() -> None:
    x = torch.randn(3, 2, 4)
    again, kv = unpack(pack(x, None), 4, 3)
    assert again is x
    assert kv is None


def test_gradients_of_both_parts_come_back() -> None:
    x = torch.randn(2, 1, 3, requires_grad=True)
    kv = torch.randn(4, 1, 5, requires_grad=True)
    x_again, kv_again = unpack(pack(x, kv), 3, 4)
    assert kv_again is not None
    (x_again.sum() + 2 * kv_again.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(kv.grad, 2 * torch.ones_like(kv))


def test_stages_of_an_interleaved_pipeline() -> None:
    split = (1, 3, 2, 2)
    assert stages_of(split, 2, 0) == [Stage(0, 1, True, False), Stage(4, 6, False, False)]
    assert stages_of(split, 2, 1) == [Stage(1, 4, False, False), Stage(6, 8, False, True)]


def stack(*segments: dict[str, object]) -> tuple[object, ...]:
    raw = {
        "model": {"hidden_size": 32, "ffn_hidden_size": 32, "stack": list(segments)},
        "train": {"steps": 1, "global_batch_size": 1, "sequence_length": 8},
        "data": {"directory": "d"},
        "run": {"directory": "r"},
    }
    return expand(validate(raw).model.stack)


SELF = {"mixer": "attention", "layers": 2, "heads": 2}
CROSS = {"mixer": "cross_attention", "layers": 2, "heads": 2}
NARROW = {"shared_kv": {"kv_heads": 1, "head_dim": 16}}
WIDE = {"shared_kv": {"kv_heads": 2, "head_dim": 16}}


def carried(plans: tuple[object, ...]) -> list[int]:
    """K,V heads carried into each possible stage start."""
    found = [carried_kv(plans, first) for first in range(len(plans) + 1)]
    return [kv.kv_heads if isinstance(kv, SharedKV) else 0 for kv in found]


def test_kv_is_carried_only_where_it_is_read_later() -> None:
    assert carried(stack(SELF, NARROW, CROSS)) == [0, 0, 0, 1, 0]
    assert carried(stack(SELF, NARROW, CROSS, SELF)) == [0, 0, 0, 1, 0, 0, 0]


def test_kv_passes_through_layers_that_do_not_read_it() -> None:
    assert carried(stack(NARROW, SELF, CROSS)) == [0, 1, 1, 1, 0]


def test_a_second_shared_kv_replaces_the_first() -> None:
    assert carried(stack(SELF, NARROW, CROSS, WIDE, CROSS)) == [0, 0, 0, 1, 0, 2, 0]
