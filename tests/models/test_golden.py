"""The blocks against tensors made by running the authors' own code.

Bounds: outputs 5e-6 absolute (logits 2e-5), gradients 1e-5 of their norm: what another order of fp32 sums costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trine.configs.schema import Config
from trine.configs.stack import expand
from trine.models.build import build_chunks
from trine.models.language_model import LanguageModel
from trine.models.mixers import retention as retention_module
from trine.models.mixers.base import Mixer
from trine.models.registry import build_mixer
from trine.models.sequences import Sequences
from trine.models.shared_kv import shared_keys_values
from trine.models.site import Site
from trine.parallel.context import ContextParallel, SequenceShare
from trine.parallel.topology import Topology

Golden = dict[str, Any]
Names = dict[str, tuple[str, ...]]
"""Our parameter: the authors' parameters whose rows it stacks."""

DIFFERENTIAL: Names = {
    "input.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "output.weight": ("out_proj.weight",),
    "differential.sub_norm": ("subln.weight",),
    **{f"differential.lambda_{x}": (f"lambda_{x}",) for x in ("q1", "k1", "q2", "k2")},
}
DIFFERENTIAL_V2: Names = {
    "input.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "lambda_proj.weight"),
    "output.weight": ("o_proj.weight",),
}
RETENTION: Names = {
    "input.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"),
    "output.weight": ("out_proj.weight",),
}
GATED_RETENTION: Names = {
    "input.weight": tuple(f"{x}_proj.weight" for x in ("q", "k", "v", "g", "gt")),
    "output.weight": ("out_proj.weight",),
}


def stacked(tensors: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.cat([tensors[name] for name in names])


@torch.no_grad()
def load(module: torch.nn.Module, tensors: dict[str, Tensor], names: Names) -> None:
    parameters = dict(module.named_parameters())
    assert parameters.keys() == names.keys()
    for ours, theirs in names.items():
        parameters[ours].copy_(stacked(tensors, theirs))


def assert_gradients(module: torch.nn.Module, tensors: dict[str, Tensor], names: Names, bound: float = 1e-5) -> None:
    for ours, parameter in module.named_parameters():
        expected = stacked(tensors, names[ours])
        assert parameter.grad is not None
        assert (parameter.grad - expected).norm() <= bound * expected.norm(), ours


def whole(length: int, site: Site) -> Sequences:
    """Sequences of which this rank holds all."""
    return Sequences(ContextParallel(SequenceShare(length), site.groups.cp))


def run_mixer(mixer: Mixer[Any], d: Golden) -> tuple[Tensor, Tensor]:
    """Output and input gradient in the authors' layout (B, S, D)."""
    x = d["input"].transpose(0, 1).contiguous().requires_grad_()
    y = mixer(x, None, whole(len(x), mixer.site)).transpose(0, 1)
    (y * d["grad_output"]).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad.transpose(0, 1)


def assert_close_gradient(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert (found - expected).norm() <= bound * expected.norm()


def test_differential_attention(golden: Any, config_for: Callable[..., Config], site_for: Callable[..., Site]) -> None:
    d = golden("diff_v1_mha.pt")
    config = config_for(hidden_size=64, stack=[{"mixer": "differential", "layers": 3, "heads": 4}])
    layer = d["config"]["depth_zero_based"]
    mixer = build_mixer(expand(config.model.stack)[layer], site_for(config, layer))
    load(mixer, d["state_dict"], DIFFERENTIAL)
    y, grad = run_mixer(mixer, d)
    assert mixer.differential.current_lambda().item() == pytest.approx(float(d["lambda_full"]), abs=1e-6)
    for output in (d["output"], d["output_flash2"], d["output_naive"]):
        torch.testing.assert_close(y, output, atol=5e-6, rtol=0)
    assert_close_gradient(grad, d["grad_input"])
    assert_gradients(mixer, d["grads"], DIFFERENTIAL)


def test_differential_attention_v2(
    golden: Any, config_for: Callable[..., Config], site_for: Callable[..., Site]
) -> None:
    d = golden("diff_v2_mha.pt")
    segment = {"mixer": "differential_v2", "layers": 1, "heads": 4, "kv_heads": 4}
    config = config_for(hidden_size=64, stack=[segment])
    mixer = build_mixer(expand(config.model.stack)[0], site_for(config))
    load(mixer, d["state_dict"], DIFFERENTIAL_V2)
    y, grad = run_mixer(mixer, d)
    torch.testing.assert_close(y, d["output"], atol=5e-6, rtol=0)
    assert_close_gradient(grad, d["grad_input"])
    assert_gradients(mixer, d["grads"], DIFFERENTIAL_V2)


@pytest.fixture
def retnet(golden: Any, config_for: Callable[..., Config], site_for: Callable[..., Site]) -> tuple[Golden, Mixer[Any]]:
    d = golden("retnet_msr.pt")
    segment = {"mixer": "retention", "layers": 1, "heads": 3, "value_head_dim": 32, "norm_eps": 1e-12}
    config = config_for(hidden_size=48, stack=[segment])
    mixer = build_mixer(expand(config.model.stack)[0], site_for(config))
    load(mixer, d["state_dict"], RETENTION)
    return d, mixer


def test_retention_is_the_scale_free_ideal(retnet: tuple[Golden, Mixer[Any]]) -> None:
    """With a vanishing eps the head norm removes every normalisation, and all forms are one."""
    d, mixer = retnet
    y, _ = run_mixer(mixer, d)
    torch.testing.assert_close(y.double(), d["output_ideal_fp64"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("form", ["parallel", "chunk"])
def test_retention_with_the_reference_normalisation(
    retnet: tuple[Golden, Mixer[Any]], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors scale each row of scores by a detached c > 0, so their norm's eps is eps / c^2 on our rows.

    Given that eps per row, outputs and all gradients of their parallel and chunk forms are ours.
    """
    d, mixer = retnet
    theirs = d[f"raw_{form}"].reshape(2, 32, 3, 32)
    c = theirs.norm(dim=-1, keepdim=True) / d["raw_unnormalised_fp64"].norm(dim=-1, keepdim=True)  # (B, S, H, 1)
    eps = (1e-6 / c**2).transpose(1, 2)

    def norm_with_row_eps(x: Tensor, weight: None, _: float) -> Tensor:
        assert weight is None
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    monkeypatch.setattr(retention_module, "rms_norm", norm_with_row_eps)
    y, grad = run_mixer(mixer, d)
    torch.testing.assert_close(y, d[f"output_{form}"], atol=5e-6, rtol=0)
    assert_close_gradient(grad, d[f"grad_input_{form}"])
    assert_gradients(mixer, d[f"grads_{form}"], RETENTION)


def yoco_names() -> Names:
    names: Names = {
        "embedding.weight": ("embed_tokens.weight",),
        "output.weight": ("output_projection.weight",),
        "final_norm.weight": ("layer_norm.weight",),
        "decoder.shared_kv.2.norm.weight": ("cross_decoder.kv_layer_norm.weight",),
        "decoder.shared_kv.2.input.weight": ("cross_decoder.k_proj.weight", "cross_decoder.v_proj.weight"),
    }
    for i in range(4):
        theirs = f"self_decoder.layers.{i}." if i < 2 else f"cross_decoder.layers.{i - 2}."
        mixer = GATED_RETENTION if i < 2 else {
            "input.weight": ("q_proj.weight",), "output.weight": ("out_proj.weight",)
        }  # fmt: skip
        block = {f"mixer.{k}": tuple(f"mixer.{name}" for name in v) for k, v in mixer.items()} | {
            "mixer_norm.weight": ("mixer_layer_norm.weight",),
            "feed_forward_norm.weight": ("final_layer_norm.weight",),
            "feed_forward.input.weight": ("ffn.fc1.weight", "ffn.gate.weight"),
            "feed_forward.fc2.weight": ("ffn.fc2.weight",),
        }
        names |= {f"decoder.layers.{i}.{k}": tuple(theirs + name for name in v) for k, v in block.items()}
    return names


@pytest.fixture
def yoco(golden: Any, config_for: Callable[..., Config], one_rank: Topology) -> tuple[Golden, LanguageModel]:
    d = golden("yoco_gret_lm.pt")
    stack = [
        {"mixer": "gated_retention", "layers": 2, "heads": 2},
        {"shared_kv": {"kv_heads": 2, "head_dim": 8}},
        {"mixer": "cross_attention", "layers": 2, "heads": 4},
    ]
    config = config_for(hidden_size=32, stack=stack, embedding_scale=True, sequence_length=40)
    (model,) = build_chunks(config, one_rank)
    load(model, d["state_dict"], yoco_names())
    return d, model


def test_yoco_language_model(yoco: tuple[Golden, LanguageModel]) -> None:
    d, model = yoco
    logits = model(d["input_ids"]).transpose(0, 1)
    torch.testing.assert_close(logits, d["logits"], atol=2e-5, rtol=0)
    loss = model(d["input_ids"], d["targets"])
    torch.testing.assert_close(loss, d["loss"], atol=0, rtol=1e-5)
    loss.backward()
    assert_gradients(model, d["grads"], yoco_names())


def test_yoco_shared_keys_and_values(yoco: tuple[Golden, LanguageModel]) -> None:
    """V as handed over; K is handed over rotated, so it is compared after rotating the authors' K."""
    from trine.models.heads import merge_heads, rotate, split_heads

    d, model = yoco
    producer = model.decoder.shared_kv["2"]
    sequences = whole(d["k_proj_out"].shape[1], model.site)
    k, v = shared_keys_values(producer(d["self_decoder_out"].transpose(0, 1), sequences))
    unrotated = split_heads(d["k_proj_out"].transpose(0, 1), 2)
    expected = merge_heads(rotate(unrotated, producer.kv.rope, sequences.share))
    torch.testing.assert_close(k, expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(v, d["v_proj_out"].transpose(0, 1), atol=5e-6, rtol=0)
