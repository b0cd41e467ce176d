"""Compiles Triton kernels for a GPU of compute capability 9.0 on a machine without one, as their launchers call them.

A process that does so must not run Triton's interpreter: TRITON_INTERPRET is not set there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


class Compiled(NamedTuple):
    """What one launch would have run: resources per thread and program, and its PTX."""

    kernel: str
    registers: int
    stack: int
    """Bytes of a thread's own memory; registers that did not fit are kept there."""
    shared: int
    ptx: str


class Recorder:
    """Stands for a kernel in its launcher's module: every launch is compiled instead of run."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return self._compile

    def _compile(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
        names = self._kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | keywords
        assert set(values) == set(names)
        source = ASTSource(self._kernel, *_specialised({name: values[name] for name in names}))
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        registers, stack = _resources(compiled.asm["cubin"])
        name, shared, ptx = self._kernel.__name__, compiled.metadata.shared, compiled.asm["ptx"]
        self.launches.append(Compiled(name, registers, stack, shared, ptx))


def _specialised(values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton's launcher derives them from arguments.

    Capitals are the kernels' constants; None and 1 are made constants, and numbers that 16 divides are marked.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, (name, value) in enumerate(values.items()):
        if name.isupper() or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and name not in constants and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a kernel, from the tool that comes with Triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        words = [str(program), "-res-usage", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])
