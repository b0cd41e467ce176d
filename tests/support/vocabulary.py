"""A job for the rank pool: the loss over a vocabulary cut over tensor ranks, beside Megatron-Core's on whole logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch.nn.functional import linear
from traffic import Traffic

from trine.configs.checks import Layout
from trine.parallel.cross_entropy import vocabulary_loss
from trine.parallel.topology import build_topology, leave_topology, local_device


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x (10, 3, 12), weight (40, 12), labels (10, 3): sizes that no chunk of 7 tokens divides."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((10, 3, 12), (40, 12)))
    return x, weight, torch.randint(0, 40, (10, 3), generator=generator)


def loss_and_gradients(rank: int, world_size: int, *, sequence_parallel: bool, chunk: int) -> dict[str, Any]:
    """This rank's loss, dX, rows of dW and collectives; the loss without gradients; and Megatron-Core's loss and dW."""
    layout = Layout(
        world_size=world_size, tensor=world_size, pipeline=1, virtual_pipeline=1, context=1, data=1, num_microbatches=1
    )
    topology = build_topology(layout, local_device(rank))
    group = topology.groups.tp
    x, weight, labels = inputs()
    mine = weight.chunk(world_size)[rank].clone().requires_grad_()
    share = (x.chunk(world_size)[rank] if sequence_parallel else x).clone().requires_grad_()

    def loss_of(x: Tensor) -> Tensor:
        return vocabulary_loss(x, mine, labels, group, sequence_parallel=sequence_parallel, chunk=chunk)

    with Traffic() as traffic:
        loss = loss_of(share)
        (3 * loss).backward()
    with torch.no_grad():
        alone = loss_of(share)
    theirs = mine.detach().clone().requires_grad_()
    expected = vocab_parallel_cross_entropy(linear(x, theirs), labels).mean()
    (3 * expected).backward()
    leave_topology()
    return {
        "loss": loss.detach(), "dx": share.grad, "dw": mine.grad, "alone": alone, "traffic": dict(traffic.counts),
        "their_loss": expected.detach(), "their_dw": theirs.grad,
    }  # fmt: skip
