"""The vocabulary's loss over tensor ranks, against Megatron-Core's and torch's in fp64 on whole logits; its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from largest import LargestTensor
from torch import Tensor
from torch.nn.functional import cross_entropy
from vocabulary import inputs

from trine.launch.pool import RankPool
from trine.parallel.cross_entropy import vocabulary_loss
from trine.parallel.topology import Topology

Loss = Callable[..., Tensor]

CHUNK = 7
CHUNKS = 5
"""Chunks of 7 that the 30 tokens fill."""
LIMIT = 1e-5
"""Relative error of a norm in fp32, in which sums of 12 and 40 products have another order."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


def exact(factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss in fp64, and the gradients of ``factor`` times it."""
    x, weight, labels = inputs(torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    loss = cross_entropy((x @ weight.mT).flatten(0, 1), labels.flatten())
    return loss.detach(), *torch.autograd.grad(factor * loss, (x, weight))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_over_tensor_ranks(ranks: RankPool, size: int, sequence_parallel: bool) -> None:
    found = ranks.run(
        "vocabulary:loss_and_gradients", size, sequence_parallel=sequence_parallel, chunk=CHUNK
    )
    loss, dx, dw = exact(3.0)
    for rank in found:
        assert relative(rank["loss"], loss) < LIMIT
        assert rank["loss"] == rank["alone"] == found[0]["loss"]
        assert relative(rank["loss"], rank["their_loss"].double()) < LIMIT
        assert relative(rank["dw"], rank["their_dw"].double()) < LIMIT
    assert relative(torch.cat([rank["dw"] for rank in found]), dw) < LIMIT
    whole = torch.cat([rank["dx"] for rank in found]) if sequence_parallel else found[0]["dx"]
    assert relative(whole, dx) < LIMIT
    assert [rank["traffic"] for rank in found] == [_collectives(size, sequence_parallel)] * size


def _collectives(size: int, sequence_parallel: bool) -> dict[str, int]:
    """One for each chunk, and one for x and its gradient."""
    if size == 1:
        return {}
    if sequence_parallel:
        return {"allgather_base": CHUNKS + 1, "reduce_scatter_base": 1}
    return {"allgather_base": CHUNKS, "allreduce": 1}


@pytest.fixture
def alone(one_rank: Topology) -> Loss:
    """The loss over one rank, this process."""

    def loss(x: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = CHUNK) -> Tensor:
        return vocabulary_loss(x, weight, labels, one_rank.groups.tp, sequence_parallel=False, chunk=chunk)

    return loss


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_of_them_frozen(alone: Loss, frozen: str) -> None:
    x, weight, labels = inputs()
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    alone(x, weight, labels).backward()
    _, dx, dw = exact(1.0)
    grads = (x.grad, dx), (weight.grad, dw)
    trained, untrained = reversed(grads) if frozen == "x" else grads
    assert untrained[0] is None
    assert trained[0] is not None and relative(trained[0], trained[1]) < LIMIT


def test_bf16_gives_bf16_gradients_and_an_fp32_loss(alone: Loss) -> None:
    x, weight, labels = inputs(torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    loss = alone(x, weight, labels)
    loss.backward()
    expected = exact(1.0)
    assert x.grad is not None and weight.grad is not None
    assert [t.dtype for t in (loss, x.grad, weight.grad)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for found, target in zip((loss, x.grad, weight.grad), expected, strict=True):
        assert relative(found, target) < 2e-2  # 8 bits of the inputs, of the logits and of the gradients


def test_a_second_backward_pass_is_refused(alone: Loss) -> None:
    x, weight, labels = inputs()
    loss = alone(x.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass"):
        loss.backward()


def test_logits_are_never_whole(alone: Loss) -> None:
    """2100 tokens in chunks of the default size."""
    tokens, width, vocabulary = 2100, 4, 300
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 1, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    with LargestTensor() as ours:
        alone(x, weight, labels, chunk=None).backward()
    with LargestTensor() as whole:
        cross_entropy((x @ weight.mT).flatten(0, 1), labels.flatten()).backward()
    assert ours.elements <= tokens * vocabulary / 4
    assert whole.elements >= tokens * vocabulary
