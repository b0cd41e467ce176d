"""The CPU backend: makes Megatron-Core run where there is no CUDA device.

Megatron-Core asks ``torch.cuda`` for devices, streams and generators in many places. Here each ``megatron.core``
module gets a proxy in place of its global name ``torch``; the real torch module stays as it is, but for the three
methods below. A ``TorchFunctionMode`` would be shorter but wrong: autograd runs backward outside of it, so
recomputed activations would meet the real CUDA calls.

Every patch, with its reason:

====================================  ==================================================================
``torch`` in ``megatron.core.*``      factories with ``device="cuda"`` make CPU tensors; ``torch.cuda`` is inert
``Tensor.cuda``, ``Module.cuda``      called as methods, so a module's global name cannot reach them
``Tensor.type()``                     the optimizers recognise parameters by ``torch.cuda.FloatTensor``
``tensor_parallel.random`` helpers    read and write the generator of a CUDA device
``clip_grads.l2_norm_impl``           a gradient norm summed in fp32 is off by 1e-5 at some million elements
``fused_weight_gradient_mlp_cuda``    apex's extension, which adds a weight's gradient to its buffer, is for CUDA alone
collectives of the gradient buffers   gloo copies the buffer of a rank that is alone three times, to give it the same
====================================  ==================================================================
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .main_gradients import add_product

_CPU = torch.device("cpu")
_ENGINE = "megatron.core"
_FACTORIES = (
    "tensor as_tensor zeros ones empty full arange linspace rand randn randint empty_strided "
    "zeros_like ones_like empty_like full_like"
).split()
_MEMORY_QUERIES = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split()

_ROW = 4096
"""Elements whose squares are summed in fp32."""

_undo: list[Callable[[], None]] = []


def installed() -> bool:
    """Whether the backend is in force."""
    return bool(_undo)


def install() -> None:
    """Put the backend in force; a second call does nothing.

    Raises:
        RuntimeError: a CUDA device is present, where Megatron-Core needs no help.
    """
    if installed():
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend is for machines without a CUDA device; this one has one")
    proxy = _torch_proxy()
    finder = _EngineFinder(proxy)
    sys.meta_path.insert(0, finder)
    _undo.append(lambda: sys.meta_path.remove(finder))
    for name, module in list(sys.modules.items()):
        if name.startswith(_ENGINE):
            _give_proxy(module, proxy)
    _undo.append(lambda: _take_proxy(proxy))
    _patch_methods()
    _patch_engine()


def uninstall() -> None:
    """Restore everything that ``install`` changed."""
    while _undo:
        _undo.pop()()


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        _undo.append(lambda: delattr(owner, name))
    else:
        original = getattr(owner, name)
        _undo.append(lambda: setattr(owner, name, original))
    setattr(owner, name, value)


def _patch_methods() -> None:
    tensor_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    _replace(torch.Tensor, "type", type_as_on_cuda)
    _replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)


def _patch_engine() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.random as random

    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # Linear maps use it where they are told to, as ``data_parallel`` does.
    fused = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    _replace(layers, "fused_weight_gradient_mlp_cuda", fused)
    _replace(clip_grads, "l2_norm_impl", _l2_norm)
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        _replace(buffers, name, _nothing_alone(getattr(buffers, name)))
    # With one generator for both, forking the "CUDA" state always moves the CPU's; the warning is moot here.
    logging.getLogger(random.__name__).addFilter(_drop_generator_warning)
    _undo.append(lambda: logging.getLogger(random.__name__).removeFilter(_drop_generator_warning))


def _add_weight_gradient(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Add dy^T x, of x (T, K) and dy (T, N), to ``main_grad`` (N, K) fp32."""
    add_product(main_grad, dy.mT, x)


def _l2_norm(
    chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """Norm of all tensors together, (1,) fp32, with the contract of apex's ``multi_tensor_l2norm``."""
    return torch.tensor([math.sqrt(sum(_sum_of_squares(x.flatten()) for x in tensor_lists[0]))]), None


def _sum_of_squares(x: torch.Tensor) -> float:
    """Of x (n,): short rows in fp32, which is fast, and what they give in fp64."""
    whole = x.numel() - x.numel() % _ROW
    norms = torch.linalg.vector_norm(x[:whole].view(-1, _ROW), dim=-1)
    rest = torch.linalg.vector_norm(x[whole:], dtype=torch.float64)
    return float(norms.double().square().sum() + rest.square())


def _nothing_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """``collective`` (output, input, ..., group=) but for a group of one rank whose output is its input's memory."""

    def call(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() == 1 and output.data_ptr() == given.data_ptr() and not kwargs.get("async_op"):
            return None
        return collective(output, given, *args, **kwargs)

    return call


def _drop_generator_warning(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed" not in record.getMessage()


class _TorchProxy(types.ModuleType):
    """A copy of the torch namespace; names that torch adds later are looked up in the original."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _Event:
    """A CUDA event of a device that finishes everything at once."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class _Stream:
    """A CUDA stream of a device that has only one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


def _names_cuda(device: Any) -> bool:
    return getattr(device, "type", device) == "cuda" or (isinstance(device, str) and device.startswith("cuda:"))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _inert_cuda() -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update({k: v for k, v in torch.cuda.__dict__.items() if not k.startswith("__")})
    cuda.__dict__.update(
        is_available=lambda: False,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        set_device=lambda _: None,
        synchronize=lambda *_, **__: None,
        empty_cache=lambda: None,
        get_rng_state=lambda *_, **__: torch.get_rng_state(),
        set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        Stream=_Stream,
        Event=_Event,
        stream=lambda _: contextlib.nullcontext(),
        current_stream=_Stream,
        default_stream=_Stream,
        memory_stats=lambda *_, **__: {},
        **{name: (lambda *_, **__: 0) for name in _MEMORY_QUERIES},
    )
    return cuda


def _torch_proxy() -> types.ModuleType:
    proxy = _TorchProxy("torch")
    proxy.__dict__.update({k: v for k, v in torch.__dict__.items() if k != "__class__"})
    for name in _FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    proxy.cuda = _inert_cuda()  # type: ignore[attr-defined]
    return proxy


def _give_proxy(module: types.ModuleType, proxy: types.ModuleType) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = proxy  # type: ignore[attr-defined]


def _take_proxy(proxy: types.ModuleType) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(_ENGINE) and getattr(module, "torch", None) is proxy:
            module.torch = torch  # type: ignore[attr-defined]


class _EngineLoader(importlib.abc.Loader):
    """Loads a Megatron-Core module and gives it the proxy when it is complete."""

    def __init__(self, loader: importlib.abc.Loader, proxy: types.ModuleType) -> None:
        self._loader, self._proxy = loader, proxy

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        _give_proxy(module, self._proxy)


class _EngineFinder(importlib.abc.MetaPathFinder):
    """Finds Megatron-Core modules through the ordinary finders and wraps their loaders."""

    def __init__(self, proxy: types.ModuleType) -> None:
        self._proxy = proxy

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_ENGINE):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _EngineLoader(spec.loader, self._proxy)
                return spec
        return None
