"""Parity with numbers made by the authors' published code in fp32.

Outputs to 5e-6 and gradients to 1e-5 relative: both sides round in fp32, in different orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, silu

from trine.kernels.differential import differential_attention, differential_attention_v2
from trine.kernels.norm import rms_norm
from trine.kernels.retention import fixed_decay_log, retention
from trine.kernels.rotary import apply_rotary, rotary_frequencies, rotary_tables

Golden = Callable[[str], dict[str, Any]]


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, count * d) to (B, count, T, d)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """(B, H, T, d) to (B, T, H * d)."""
    return x.transpose(1, 2).flatten(2)


def close(result: Tensor, expected: Tensor, bound: float = 5e-6) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=bound)


def close_relative(result: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert float((result.detach() - expected).norm() / expected.norm()) < bound


def trained(file: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The input and the weights of a module file, requiring gradients."""
    weights = {name: w.clone().requires_grad_() for name, w in file["state_dict"].items()}
    return file["input"].clone().requires_grad_(), weights


def check_gradients(file: dict[str, Any], output: Tensor, x: Tensor, weights: dict[str, Tensor]) -> None:
    grad_x, *grads = torch.autograd.grad(output, (x, *weights.values()), file["grad_output"])
    close_relative(grad_x, file["grad_input"])
    assert set(weights) == set(file["grads"])
    for name, grad in zip(weights, grads, strict=True):
        close_relative(grad, file["grads"][name])


def test_differential_v1(golden: Golden) -> None:
    file = golden("diff_v1_mha.pt")
    x, w = trained(file)
    cos, sin = rotary_tables(torch.arange(24), rotary_frequencies(8, 1e4, "standard"))
    close(cos, file["cos"], 1e-6)
    close(sin, file["sin"], 1e-6)
    q, k = (apply_rotary(heads(linear(x, w[f"{name}_proj.weight"]), 8), cos, sin) for name in "qk")
    v = heads(linear(x, w["v_proj.weight"]), 4)
    lam = (w["lambda_q1"] @ w["lambda_k1"]).exp() - (w["lambda_q2"] @ w["lambda_k2"]).exp()
    lam = lam + file["config"]["lambda_init"]
    close(lam, file["lambda_full"])
    o = rms_norm(differential_attention(q, k, v, lam), w["subln.weight"], 1e-5)
    output = linear(tokens(o * (1 - file["config"]["lambda_init"])), w["out_proj.weight"])
    close(output, file["output"])
    check_gradients(file, output, x, w)


def test_differential_v2(golden: Golden) -> None:
    file = golden("diff_v2_mha.pt")
    x, w = trained(file)
    cos, sin = rotary_tables(torch.arange(24), rotary_frequencies(16, 1e4, "standard"))
    q, k = (
        apply_rotary(heads(linear(x, w[f"{name}_proj.weight"]), count), cos, sin)
        for name, count in (("q", 8), ("k", 4))
    )
    v = heads(linear(x, w["v_proj.weight"]), 4)
    lam = linear(x, w["lambda_proj.weight"]).sigmoid().transpose(1, 2)
    output = linear(tokens(differential_attention_v2(q, k, v, lam)), w["o_proj.weight"])
    close(output, file["output"])
    check_gradients(file, output, x, w)


def quarters(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(4, dim=2)


def check_quarters(
    file: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, decays: list[Tensor], bound: float
) -> None:
    """States of the four quarters of a sequence from zero, and handed from one to the next."""
    state = torch.zeros_like(file["cp4_local_states"][0], dtype=k.dtype)
    parts = zip(quarters(q), quarters(k), quarters(v), decays, strict=True)
    for r, part in enumerate(parts):
        close_relative(retention(*part, chunk_size=3)[1], file["cp4_local_states"][r], bound)
        close(state, file["cp4_prefix_states"][r].to(state), 5e-6)
        _, state = retention(*part, initial_state=state, chunk_size=3)


def test_gated_retention(golden: Golden) -> None:
    file = golden("gated_retention_op.pt")
    q, k, v, gate = (file[name].clone().requires_grad_() for name in ("q", "k", "v", "gate_logits"))
    log_decay = logsigmoid(gate) / 16
    close(log_decay, file["log_decay"], 1e-6)
    scaled = k * k.shape[-1] ** -0.5
    for chunk_size in (16, 24, 128):
        output, state = retention(q, scaled, v, log_decay, chunk_size=chunk_size)
        for form in ("parallel", "chunk16", "hier", "recurrent"):
            close(output, file[f"out_{form}"])
        close(state, file["final_state"])
        grads = torch.autograd.grad(output, (q, k, v, gate), file["grad_output"], retain_graph=True)
        for name, grad in zip(("q", "k", "v", "gate_logits"), grads, strict=True):
            close_relative(grad, file[f"grad_{name}"])
    check_quarters(file, q, scaled, v, list(quarters(log_decay)), 1e-5)
    sums = torch.stack([part.sum(dim=-1) for part in quarters(log_decay)])
    close(sums.exp(), file["cp4_decay"])


def multi_scale_inputs(
    file: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    x, w = file["input"].to(dtype), {name: weight.to(dtype) for name, weight in file["state_dict"].items()}
    frequencies = rotary_frequencies(16, 1e4, "linspace")
    close(frequencies, file["angle"][::2], 1e-7)
    cos, sin = rotary_tables(torch.arange(32), frequencies)
    q, k = (apply_rotary(heads(linear(x, w[f"{name}_proj.weight"]), 3), cos, sin) for name in "qk")
    return x, w, [q, k * 16**-0.5, heads(linear(x, w["v_proj.weight"]), 3)]


def test_retention(golden: Golden) -> None:
    file = golden("retnet_msr.pt")
    decay = fixed_decay_log(3)
    close(decay, file["decay_log"], 1e-8)
    for dtype in (torch.float64, torch.float32):
        _, _, qkv = multi_scale_inputs(file, dtype)
        output, state = retention(*qkv, decay, chunk_size=8)
        close_relative(output.transpose(1, 2), file["raw_unnormalised_fp64"], 1e-6)
        close_relative(state, file["final_state_fp64"], 1e-6)
        check_quarters(file, *qkv, [decay] * 4, 1e-6)


def test_retention_layer(golden: Golden) -> None:
    """With eps 0 the norm removes the row factors by which the published forms differ from the textbook."""
    file = golden("retnet_msr.pt")
    x, w, qkv = multi_scale_inputs(file, torch.float64)
    normalised = tokens(rms_norm(retention(*qkv, fixed_decay_log(3))[0], None, 0.0))
    output = linear(silu(linear(x, w["g_proj.weight"])) * normalised, w["out_proj.weight"])
    close(output, file["output_ideal_fp64"], 1e-6)
