"""Makes Triton's interpreter compute products of bf16 operands, which it keeps as bit patterns.

Without it ``tl.dot`` multiplies the 16-bit integers (triton-lang/triton#11584). Stores of bf16 still truncate instead of
rounding. Not seen by the interpreter at all: races, the size of shared memory, warps, stages and speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def bf16_products() -> Iterator[None]:
    """Within it, bf16 operands of ``tl.dot`` are widened to fp32 first."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _widened(a), _widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = original


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    values = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(values, tl.float32)
