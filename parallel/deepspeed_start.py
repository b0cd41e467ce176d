"""Starting DeepSpeed around a model whose process groups are Megatron-Core's."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..configs.engine_checks import no_deepspeed
from ..configs.ramps import shapes_of
from ..configs.schema import Config, DeepSpeed
from .topology import Topology

_OPEN_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"


def load_deepspeed() -> Any:
    """The module ``deepspeed``, told which kind of device there is. Raises UsageError where it cannot be imported."""
    # It would look for GPUs of every maker, and take one that torch was not built for.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    known = "deepspeed" in sys.modules
    try:
        deepspeed = importlib.import_module("deepspeed")
    except (ImportError, OSError, RuntimeError) as error:
        raise no_deepspeed(str(error)) from error
    if not known:
        _quieten()
        # None of its compiled operations is used: it would look for a compiler, and on CPUs compile a sum of its own.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _quieten() -> None:
    """Let DeepSpeed's messages go where a run's do, to the rank's log, and its notes on every detail nowhere."""
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    # Once per collective in the log of every rank, of newer names for the same operations.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def start(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, topology: Topology
) -> Any:
    """DeepSpeed's engine around ``model``, whose parameters are those of ``optimizer``. Every rank must call it."""
    deepspeed = load_deepspeed()
    _number_anew()
    with _device_by_environment(topology.device):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=ProcessGroups(topology), config=deepspeed_config(config, topology),
            dist_init_required=False,
        )  # fmt: skip
    return engine


@contextmanager
def _device_by_environment(device: torch.device) -> Iterator[None]:
    """Within it DeepSpeed takes this rank's device, which it chooses by LOCAL_RANK and asks for as long as it runs.

    Open MPI's variable must not contradict it, as one does that is left over in a shell, or that counts GPUs of which a
    rank sees one.
    """
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    of_open_mpi = os.environ.pop(_OPEN_MPI, None)
    try:
        yield
    finally:
        if of_open_mpi is not None:
            os.environ[_OPEN_MPI] = of_open_mpi


def _number_anew() -> None:
    """Have ZeRO's stage 3 number modules and parameters from 0, as in a new process.

    Ranks compare the numbers: those that have been in more runs of a pool of workers than others would have others.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)


def stop(engine: Any) -> None:
    """End what ``start`` gave, so that nothing but its caller holds the model and its process groups.

    Stage 3 keeps the model in the process, on the stack of modules whose forward pass runs and in a method's cache.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    released = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(released).nonlocals["func"].cache_clear()  # behind a decorator


def deepspeed_config(config: Config, topology: Topology) -> dict[str, Any]:
    """The run in DeepSpeed's words."""
    train, layout = config.train, topology.layout
    settings = (config.deepspeed or DeepSpeed()).model_dump(exclude_none=True)
    per_step = max(shape.samples for shape in shapes_of(train)) // (train.micro_batch_size * layout.data)
    return {
        "communication_data_type": "fp32",
        **settings,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": per_step,
        "gradient_clipping": config.optimizer.clip_grad,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own fused AdamW runs on CPUs, and needs no compiler
        "steps_per_print": sys.maxsize,
    }


class ProcessGroups:
    """What DeepSpeed asks of a model that is divided over tensor ranks, an "mpu".

    To DeepSpeed context ranks are data ranks: they hold the same parameters, and gradients are averaged over both.
    """

    def __init__(self, topology: Topology) -> None:
        self._tensor: dist.ProcessGroup = topology.groups.tp
        self._data: dist.ProcessGroup = topology.groups.dp_cp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share each matrix."""
        return self._tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """How many share each matrix."""
        return int(self._tensor.size())

    def get_tensor_model_parallel_rank(self) -> int:
        """This one among them."""
        return int(self._tensor.rank())

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters."""
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their ranks in the run."""
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_world_size(self) -> int:
        """How many hold the same parameters."""
        return int(self._data.size())

    def get_data_parallel_rank(self) -> int:
        """This one among them."""
        return int(self._data.rank())
