"""What a rank owns under each of ZeRO's stages: which elements of which parameters, their state and their gradients.

DeepSpeed's own checkpoints are bound to the number of data ranks. Here its live memory is described as what every
engine owns, so that checkpoints and parity need to know nothing of it. All contact with the inner parts of DeepSpeed's
optimizers is in this file.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .engine import STATE_KEYS, Owned

_MOMENTS = STATE_KEYS[1:]


class Partitions(ABC):
    """The division of one DeepSpeed engine's parameters.

    Args:
        engine: DeepSpeed's.
    """

    divides_parameters = False

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._adam: torch.optim.Optimizer = engine.basic_optimizer

    @abstractmethod
    def owned(self) -> Iterator[Owned]:
        """What this rank owns, also before the first update."""

    def weight_of(self, owned: Owned) -> Tensor:
        """Its elements in the model: flat, the live memory."""
        return owned.parameter.detach().view(-1)[owned.start : owned.stop]

    @abstractmethod
    def gradient_of(self, owned: Owned) -> Tensor:
        """Its reduced gradient, flat, between the last backward pass of a step and the update."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Make DeepSpeed forget the gradients of a step that it has not used for an update."""

    @abstractmethod
    def take_masters(self) -> None:
        """Give the model the values of the fp32 master copies, on every rank."""

    @property
    def updates(self) -> int:
        """How often Adam has updated what this rank owns."""
        return next((int(state["step"]) for state in self._adam.state.values()), 0)

    @updates.setter
    def updates(self, count: int) -> None:
        for flat in self._masters():
            self._state(flat)["step"].fill_(count)

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """The tensors that Adam updates."""

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """Adam's state of a tensor, which torch makes at the first update: zeros."""
        state: dict[str, Tensor] = self._adam.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state |= {key: torch.zeros_like(master) for key in _MOMENTS}
        return state

    def _live(self, master: Tensor, start: int, count: int) -> dict[str, Tensor]:
        """A range of a master copy and of its moments."""
        state = self._state(master)
        tensors = {"param": master, **{key: state[key] for key in _MOMENTS}}
        return {key: tensor.detach().view(-1)[start : start + count] for key, tensor in tensors.items()}


class Undivided(Partitions):
    """Stage 0: every data rank keeps everything."""

    def owned(self) -> Iterator[Owned]:
        copy = int(self._engine.data_parallel_group.rank())
        for group in self._adam.param_groups:
            for parameter in group["params"]:
                state = self._live(parameter, 0, parameter.numel())
                yield Owned(parameter, 0, state, copy)

    def gradient_of(self, owned: Owned) -> Tensor:
        parameter: Any = owned.parameter
        gradient: Tensor = parameter.grad.view(-1)
        return gradient

    def drop_gradients(self) -> None:
        self._engine.zero_grad()

    def take_masters(self) -> None:
        """The parameters are their own master copies."""

    def _masters(self) -> list[Tensor]:
        return [parameter for group in self._adam.param_groups for parameter in group["params"]]


class DividedState(Partitions):
    """Stages 1 and 2: the parameters of a group lie in one flat buffer, of which each data rank owns a range."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._places = {place.parameter: place for place in self._find_places()}

    def owned(self) -> Iterator[Owned]:
        masters = self._masters()
        for parameter, place in self._places.items():
            yield Owned(parameter, place.start, self._live(masters[place.group], place.in_master, place.elements))

    def gradient_of(self, owned: Owned) -> Tensor:
        place = self._places[owned.parameter]
        if self._zero.cpu_offload:
            self._zero._wait_for_offload_copies()
            whole: Any = self._masters()[place.group].grad
            return whole[place.in_master : place.in_master + place.elements]  # type: ignore[no-any-return]
        gradients = self._zero.averaged_gradients[place.group]
        found: Tensor = [g for g in gradients if not getattr(g, "_zero_padding", False)][place.index]
        return found.view(-1)

    def drop_gradients(self) -> None:
        zero = self._zero
        zero.zero_grad()
        zero.micro_step_id = -1
        zero._release_preflattened_grad_buffers()
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()

    def take_masters(self) -> None:
        self._zero.update_lp_params()

    def _masters(self) -> list[Tensor]:
        return list(self._zero.single_partition_of_fp32_groups)

    def _find_places(self) -> Iterator[_Place]:
        """In the order of the flat buffers, which with ``round_robin_gradients`` is not that of the groups. (There
        DeepSpeed's own ``_hp_mapping`` of a parameter is wrong.)"""
        zero = self._zero
        buffers = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for group, (parameters, offsets) in enumerate(buffers):
            size = zero.partition_size[group]
            first, index = size * int(zero.real_dp_process_group[group].rank()), 0
            for parameter, offset in zip(parameters, offsets, strict=True):
                start, stop = max(offset, first), min(offset + parameter.numel(), first + size)
                if start < stop:
                    yield _Place(parameter, group, index, start - offset, start - first, stop - start)
                    index += 1


@dataclass(frozen=True)
class _Place:
    """What a rank owns of a parameter at stages 1 and 2."""

    parameter: nn.Parameter
    group: int
    index: int
    """Among the parameters of the group of which this rank owns something."""
    start: int
    """The first element, in the parameter."""
    in_master: int
    """The same, in the rank's master copy of the group."""
    elements: int


class DividedParameters(Partitions):
    """Stage 3: each data rank owns an equal range of every parameter, the last with padding."""

    divides_parameters = True

    def owned(self) -> Iterator[Owned]:
        rank, masters = int(self._engine.data_parallel_group.rank()), self._masters()
        for parameter in itertools.chain.from_iterable(self._zero.fp16_groups):
            group, place, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = rank * count
            count = min(count, parameter.ds_numel - start)
            if count > 0:
                yield Owned(parameter, start, self._live(masters[group], place, count))

    def weight_of(self, owned: Owned) -> Tensor:
        parameter: Any = owned.parameter
        part: Tensor = parameter.ds_tensor.detach()
        return part[: owned.stop - owned.start]

    def gradient_of(self, owned: Owned) -> Tensor:
        gradient: Tensor = self._zero.get_local_fp32_grad_for_param(owned.parameter)
        return gradient.view(-1)[: owned.stop - owned.start]

    def drop_gradients(self) -> None:
        self._zero.zero_grad()
        self._zero.averaged_gradients = {}
        self._zero.reset_cpu_buffers()

    def take_masters(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _masters(self) -> list[Tensor]:
        return list(self._zero.fp32_partitioned_groups_flat)


def partitions_of(engine: Any) -> Partitions:
    """The division that fits the stage of DeepSpeed's ``engine``."""
    kinds = (Undivided, DividedState, DividedState, DividedParameters)
    return kinds[int(engine.zero_optimization_stage())](engine)
