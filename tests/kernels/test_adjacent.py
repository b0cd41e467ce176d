"""Parts that lie side by side in memory."""

from __future__ import annotations

import torch

from trine.kernels.adjacent import adjacent, empty_parts, joined


def test_what_is_adjacent() -> None:
    whole = torch.randn(3, 2, 10)
    for view in (whole, whole[1:], whole[0]):
        for widths in ([5, 5], [3, 6, 1], [10]):
            parts = view.split(widths, dim=-1)
            assert adjacent(parts)
            assert joined(parts).data_ptr() == view.data_ptr()
            assert torch.equal(joined(parts), view)


def test_what_is_not() -> None:
    whole = torch.randn(3, 2, 10)
    first, second = whole.split(5, dim=-1)
    for parts in (
        (second, first),
        (first, second.clone()),
        whole[:, :1].split(5, dim=-1),
        whole.transpose(0, 1).split(5, dim=-1),
        whole[..., :8].split(4, dim=-1),
        (first, first),
        (first, second.to(torch.bfloat16).to(torch.float32)),
        (whole[0, 0, :5], whole[0, 0, 5:]),
        whole[:0].split(5, dim=-1),
    ):
        assert not adjacent(parts)
        assert torch.equal(joined(parts), torch.cat(tuple(parts), dim=-1))


def test_empty_parts_are_adjacent() -> None:
    parts = empty_parts((torch.randn(4, 3, 2), torch.randn(4, 3, 5)))
    assert [tuple(part.shape) for part in parts] == [(4, 3, 2), (4, 3, 5)]
    assert adjacent(parts)
