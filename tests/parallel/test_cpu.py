"""The CPU backend changes Megatron-Core and nothing else, and can be taken back."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
before = torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda
import trine.parallel
from trine.parallel import cpu
from megatron.core import parallel_state
assert cpu.installed() and parallel_state.torch is not torch
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
cpu.install()
cpu.uninstall()
assert not cpu.installed() and parallel_state.torch is torch
assert (torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda) == before
cpu.install()
import megatron.core.models.gpt.gpt_model as later
assert later.torch.zeros(1, device="cuda").device.type == "cpu"
print("restored")
"""

RECOMPUTE = """
import torch
from trine.parallel import topology
from trine.configs.checks import Layout
import tempfile, os
device = topology.join(0, 1, 0, init_method="file://" + os.path.join(tempfile.mkdtemp(), "store"))
topology.build_topology(Layout(1, 1, 1, 1, 1, 1, 1), device)
from megatron.core import tensor_parallel
from megatron.core.transformer import utils
tensor_parallel.model_parallel_cuda_manual_seed(1)
def layer(x):
    # A literal CUDA device inside: with a function mode the recomputation in backward would meet the real one.
    return x * utils.get_default_causal_mask(4).float().sum()
x = torch.ones(3, requires_grad=True)
tensor_parallel.checkpoint(layer, False, x).sum().backward()
assert torch.equal(x.grad, torch.full((3,), 6.0)), x.grad
print("recomputed")
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_and_uninstall() -> None:
    assert run(PROGRAM) == "restored"


def test_recomputation_in_backward_sees_the_backend() -> None:
    assert run(RECOMPUTE).endswith("recomputed")


NORM = """
import torch
import trine.parallel
from megatron.core.optimizer import clip_grads
x = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)) + 3
exact = x.double().norm().item()
found, _ = clip_grads.l2_norm_impl(1, torch.zeros(1), [[x[:1_000_000], x[1_000_000:]]], False)
assert abs(found.item() / exact - 1) < 2e-7, (found.item(), exact)
print("exact")
"""


def test_gradient_norm_of_many_elements() -> None:
    """Within two units of fp32's last place: what divides the elements otherwise must not change the norm."""
    assert run(NORM).endswith("exact")
