"""The largest magnitudes of past steps, from which delayed scaling takes its scales."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

ROLES = ("input", "weight", "gradient")
"""The operands of a linear map's three products."""

LENGTH = 16
"""Steps that a scale looks back on. Transformer Engine's recipe looks back on 1024 and Megatron-Core's default is 1;
16 outlasts single odd batches and forgets the large gradients of the first steps soon."""

History = list[list[float]]
"""For each role the magnitudes of the last steps, the newest first: what a checkpoint holds of one linear map."""


class Histories:
    """The histories of all linear maps of this rank. All ranks that hold a layer have the same.

    Gradients are those of the mean over a rank's tokens of a step, of which each token gets its part: the more tokens a
    rank has, in whatever microbatches, the smaller they are. What is kept is in units that this does not change, so
    that a run may go on under another layout, with other microbatches, or with another batch.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._past = torch.zeros(count, len(ROLES), LENGTH, device=device)
        self.in_force = torch.zeros(count, len(ROLES), device=device)
        """The magnitudes that this step's scales are made for; 0 where the past has none, and then a scale is made for
        the magnitude of the tensor itself, over all ranks that have parts of it."""
        self._seen = torch.zeros(count, len(ROLES), device=device)
        self._units = torch.ones(len(ROLES), device=device)
        self._known = [False] * count
        """Whether a map has steps behind it."""
        self._has_past = [[False] * len(ROLES) for _ in range(count)]
        self._answers: list[Tensor] = []
        """For the last two steps that ended, whether ``in_force`` of the next two is not 0."""

    def note(self, index: int, role: int, amax: Tensor) -> None:
        """This rank's part of a tensor of this step has the largest magnitude ``amax``, () fp32."""
        torch.maximum(self._seen[index, role], amax, out=self._seen[index, role])

    def has_past(self, index: int, role: int) -> bool:
        """Whether ``in_force`` is not 0, as far as the host knows without waiting for the device; for the first step
        that this is so it does not know. The same on all ranks that hold the layer."""
        return self._has_past[index][role]

    def begin_step(self, gradient_unit: float) -> None:
        """Begin to note, in place of what an evaluation or a step that does not count has left.

        ``gradient_unit`` is what the gradients of this step's tokens are proportional to.
        """
        if len(self._answers) == 2:
            # That of the step before the last: the loss of the last one came after it, and was waited for.
            self._has_past = self._answers[0].tolist()
        self._seen.zero_()
        self._units[ROLES.index("gradient")] = gradient_unit
        self._use()

    def end_step(self, group: dist.ProcessGroup) -> None:
        """Make what was noted on the ranks of ``group``, all that hold these layers, the newest of the past."""
        dist.all_reduce(self._seen, op=dist.ReduceOp.MAX, group=group)
        newest = torch.where(self._seen.isfinite(), self._seen / self._units, torch.zeros_like(self._seen))
        self._past = torch.cat([newest.unsqueeze(-1), self._past[..., :-1]], dim=-1)
        self._known = [True] * len(self._known)
        self._answers = [*self._answers[-1:], _lasting(self._past).to("cpu", non_blocking=True)]
        self._use()

    def state(self, index: int) -> History | None:
        """The past of one map as JSON can hold it without loss; None where there is none."""
        past: History = self._past[index].tolist()
        return past if self._known[index] else None

    def restore(self, index: int, history: History | None) -> None:
        """Go on from ``state``; None begins anew."""
        self._known[index] = history is not None
        past = torch.zeros(len(ROLES), LENGTH) if history is None else torch.tensor(history)
        self._past[index].copy_(past)
        self._has_past[index] = _lasting(past).tolist()
        self._answers = []
        self._use()

    def _use(self) -> None:
        self.in_force.copy_(self._past.amax(dim=-1) * self._units)


def _lasting(past: Tensor) -> Tensor:
    """Whether there is a magnitude in the past (..., LENGTH), and after one more step still."""
    return past[..., :-1].amax(dim=-1) > 0
