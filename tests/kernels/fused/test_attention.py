"""Fused softmax and differential attention against the references, in Triton's interpreter and on a GPU.

In the interpreter blocks are small, so that few tokens fill several of them; on a GPU they are those of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trine.kernels.fused.attention import fused_attention, unsupported
from trine.kernels.fused.tiles import TABLE, Tiles, padded, tiles, tiles_override
from trine.kernels.norm import HeadNorm
from trine.kernels.reference import softmax_maps

Randn = Callable[..., Tensor]
Check = Callable[..., None]
Packed = Callable[[list[list[int]]], Tensor]

KERNELS = {name.split("/")[0] for name in TABLE if name.split("_")[0] in ("attention", "differential")}


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    if "device" not in request.fixturenames or request.getfixturevalue("device") == "cuda":
        yield
        return
    blocks = {name: Tiles(32, 16, 4, 1) if name.endswith("kv") else Tiles(16, 32, 4, 1) for name in KERNELS}
    with tiles_override(blocks):
        yield


class Case(NamedTuple):
    """Sizes of one attention: tokens (queries, keys), heads (value heads, group, maps) and widths (d, dv)."""

    tokens: tuple[int, int]
    heads: tuple[int, int, int] = (2, 1, 2)
    widths: tuple[int, int] = (16, 32)
    window: int | None = None
    documents: list[list[int]] | None = None
    """Lengths of the documents of each sequence, over all keys; two sequences."""
    norm: str = ""
    """``weight``: a norm with a weight; ``plain``: one without."""

    def inputs(self, randn: Randn, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v, then lam where there are two maps, then the norm's weight."""
        (queries, keys), (groups, group, maps), (d, dv) = self.tokens, self.heads, self.widths
        batch = 1 if self.documents is None else 2
        sizes = ((groups * group * maps, queries, d), (groups * maps, keys, d), (groups, keys, dv))
        tensors = [randn(batch, *size, dtype=dtype) for size in sizes]
        tensors += [randn(dtype=torch.float32)] if maps == 2 else []
        tensors += [randn(dv, dtype=torch.float32)] if self.norm == "weight" else []
        return [x.detach().to(device).requires_grad_() for x in tensors]

    def options(self, packed: Packed, device: str, rest: tuple[Tensor, ...]) -> dict[str, Any]:
        """The keyword arguments, with lam and the norm's weight from ``rest``."""
        starts = None
        if self.documents is not None:
            # Like the share of a rank that holds the last queries: the starts count from its first key.
            starts = packed(self.documents)[:, -self.tokens[0] :].to(device)
        lam = rest[0] if self.heads[2] == 2 else None
        weight = rest[-1] if self.norm == "weight" else None
        norm = HeadNorm(weight, 1e-5, 0.8) if self.norm else None
        return dict(lam=lam, window=self.window, document_start=starts, head_norm=norm)


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: Tensor | None,
    window: int | None,
    document_start: Tensor | None,
    head_norm: HeadNorm | None,
) -> Tensor:
    """The same from the references' maps."""
    groups, maps = v.shape[1], 1 if lam is None else 2
    group = q.shape[1] // (groups * maps)
    each = [
        softmax_maps(q[:, s::maps], k[:, s::maps].repeat_interleave(group, dim=1), window, document_start)
        for s in range(maps)
    ]
    mixed = each[0] if lam is None else each[0] - lam * each[1]
    output = mixed @ v.repeat_interleave(group, dim=1)
    if head_norm is None:
        return output
    output = output * (output.square().mean(-1, keepdim=True) + head_norm.eps).rsqrt() * head_norm.scale
    return output if head_norm.weight is None else output * head_norm.weight


def compare(case: Case, randn: Randn, packed: Packed, assert_same: Check, device: str, dtype: torch.dtype) -> None:
    assert_same(
        lambda q, k, v, *rest: fused_attention(q, k, v, **case.options(packed, device, rest)),
        lambda q, k, v, *rest: exact(q, k, v, **case.options(packed, device, rest)),
        case.inputs(randn, device, dtype),
    )


DOCUMENTS = [[1, 1, 31, 37], [5, 16, 16, 33]]
CASES = {
    "two maps": Case((70, 70)),
    "one map": Case((70, 70), heads=(2, 1, 1)),
    "one token": Case((1, 1)),
    "one token after others": Case((1, 37), heads=(1, 2, 2)),
    "groups of pairs": Case((37, 37), heads=(2, 3, 2)),
    "groups of heads": Case((37, 37), heads=(2, 4, 1)),
    "widths within a block": Case((37, 37), widths=(24, 40)),
    "narrow values": Case((37, 37), heads=(2, 1, 1), widths=(40, 8)),
    # Here d of q and k are zero but for rounding, which grows with the size and is compared with 1.
    "window of one token": Case((19, 19), heads=(1, 1, 2), window=1),
    "window within a block": Case((70, 70), heads=(2, 1, 1), window=9),
    "window of a block": Case((70, 70), heads=(1, 2, 1), window=16),
    "window across blocks": Case((70, 70), heads=(1, 1, 2), window=45),
    "window beyond all keys": Case((37, 37), heads=(2, 1, 1), window=99),
    "last queries": Case((21, 70), heads=(2, 1, 2)),
    "last queries in a window": Case((33, 70), heads=(1, 2, 1), window=20),
    "documents": Case((70, 70), heads=(1, 1, 2), documents=DOCUMENTS),
    "documents of groups": Case((70, 70), heads=(1, 2, 1), documents=DOCUMENTS),
    "documents in a window": Case((70, 70), heads=(1, 1, 1), documents=DOCUMENTS, window=20),
    "documents of the last queries": Case((40, 70), heads=(1, 1, 2), documents=DOCUMENTS),
    "norm": Case((37, 37), widths=(16, 24), norm="weight"),
    "norm without a weight": Case((37, 37), heads=(1, 2, 2), norm="plain"),
    "norm of one map": Case((37, 37), heads=(1, 2, 1), norm="weight"),
}
ROUNDED = ("two maps", "one map", "groups of heads", "documents in a window", "norm")


@pytest.mark.parametrize("name", CASES)
def test_fp32_matches_the_references(
    randn: Randn, packed: Packed, assert_same: Check, device: str, name: str
) -> None:
    compare(CASES[name], randn, packed, assert_same, device, torch.float32)


@pytest.mark.parametrize("name", ROUNDED)
def test_bf16_matches_the_references(
    randn: Randn, packed: Packed, assert_same: Check, device: str, name: str
) -> None:
    compare(CASES[name], randn, packed, assert_same, device, torch.bfloat16)


LARGE_DOCUMENTS = [[1, 130, 259, 1, 720], [500, 64, 64, 483]]
LARGE = {
    "two maps": Case((1111, 1111), heads=(2, 1, 2), widths=(64, 128), norm="weight"),
    "groups of wide pairs": Case((1111, 1111), heads=(2, 3, 2), widths=(128, 256), norm="weight"),
    "widest pairs": Case((300, 300), heads=(1, 2, 2), widths=(256, 512), norm="weight"),
    "one map": Case((1111, 1111), heads=(2, 4, 1), widths=(128, 128)),
    "widths within a block": Case((1000, 1111), heads=(2, 2, 1), widths=(96, 192)),
    "widest heads": Case((515, 515), heads=(1, 2, 1), widths=(256, 512)),
    "wide heads": Case((515, 515), heads=(1, 2, 1), widths=(256, 256)),
    "window": Case((1000, 1111), heads=(2, 2, 1), widths=(64, 64), window=200),
    "window of pairs": Case((1111, 1111), heads=(2, 2, 2), widths=(64, 128), window=256),
    "documents": Case((1111, 1111), heads=(2, 2, 2), widths=(64, 128), documents=LARGE_DOCUMENTS),
    "documents in a window": Case((900, 1111), heads=(2, 2, 1), widths=(128, 128), documents=LARGE_DOCUMENTS, window=99),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_large_sizes_match_the_references(
    randn: Randn, packed: Packed, assert_same: Check, name: str, dtype: torch.dtype
) -> None:
    compare(LARGE[name], randn, packed, assert_same, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_it_agrees_with_torch(randn: Randn, group: int) -> None:
    """Both round to bf16, so their difference is within twice the bound against an exact result."""
    shapes = ((2, 4 * group, 1111, 64), (2, 4, 1111, 64), (2, 4, 1111, 64))
    inputs = [randn(*shape, dtype=torch.bfloat16).detach().cuda().requires_grad_() for shape in shapes]
    results = []
    for function in (
        fused_attention,
        lambda *x: scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
    ):
        output = function(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() < 4e-2 * theirs.float().norm()


def test_fp16(randn: Randn, device: str) -> None:
    """Between the tolerances of fp32 and bf16: its rounding is an eighth of bf16's."""
    q, k, v, lam = Case((37, 37)).inputs(randn, device, torch.float16)
    output = fused_attention(q, k, v, lam=lam)
    wide = (x.double() for x in (q, k, v))
    expected = exact(*wide, lam=lam, window=None, document_start=None, head_norm=None)
    assert output.dtype == torch.float16
    assert (output - expected).norm() < 3e-3 * expected.norm()


def test_views_are_read_in_place(randn: Randn, device: str) -> None:
    """Heads that lie between the tokens, as projections leave them, give the same bits, and results lie likewise."""
    inputs = Case((37, 37)).inputs(randn, device, torch.float32)
    lam = inputs.pop()
    # Like keys in a projection of keys and values: (T, B, H, 2 d), of which each head has the first half.
    views = [torch.cat((x, x), dim=-1).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in inputs]
    views = [view[..., : x.shape[-1]] for view, x in zip(views, inputs, strict=True)]
    results = []
    for q, k, v in (inputs, views):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        output = fused_attention(q, k, v, lam=lam)
        results.append([output, *torch.autograd.grad(output.sum(), (q, k, v, lam))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(x.permute(2, 0, 1, 3).is_contiguous() for x in results[1][:-1])


def test_rows_of_scattered_elements_are_copied(randn: Randn, device: str) -> None:
    q, k, v, lam = Case((37, 37)).inputs(randn, device, torch.float32)
    scattered = [x.detach().mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(fused_attention(*scattered, lam=lam), fused_attention(q, k, v, lam=lam))


def test_tokens_may_lie_further_apart_than_32_bits_count(randn: Randn, device: str) -> None:
    """On a CPU the gigabytes between them are never touched, so never taken."""
    length, stride = 40, 2**26
    room = torch.empty(length * stride, dtype=torch.bfloat16, device=device)
    q, k, v = (randn(1, 1, length, 16, dtype=torch.bfloat16).detach().to(device) for _ in range(3))
    far = [room.as_strided(x.shape, (stride, stride, stride, 1), 16 * i).copy_(x) for i, x in enumerate((q, k, v))]
    results = []
    for inputs in ((q, k, v), far):
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = fused_attention(*inputs)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_runs_repeat_bit_for_bit(randn: Randn, packed: Packed, device: str) -> None:
    small = Case((37, 37), heads=(1, 2, 2), norm="weight")
    case = small if device == "cpu" else LARGE["two maps"]
    inputs = case.inputs(randn, device, torch.bfloat16)
    runs = []
    for _ in range(2):
        output = fused_attention(*inputs[:3], **case.options(packed, device, tuple(inputs[3:])))
        runs.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_without_gradients_nothing_is_kept_for_them(randn: Randn, device: str) -> None:
    case = Case((37, 37), norm="plain")
    q, k, v, lam = case.inputs(randn, device, torch.float32)
    trained = fused_attention(q, k, v, lam=lam, head_norm=HeadNorm(None, 1e-5, 0.8))
    q, k, v, lam = (x.detach() for x in (q, k, v, lam))
    output = fused_attention(q, k, v, lam=lam, head_norm=HeadNorm(None, 1e-5, 0.8))
    assert output.grad_fn is None
    assert torch.equal(output, trained)


def test_gradients_have_the_dtypes_of_their_inputs(randn: Randn, device: str) -> None:
    case = Case((37, 37), norm="weight")
    *inputs, lam, weight = case.inputs(randn, device, torch.bfloat16)
    output = fused_attention(*inputs, lam=lam, head_norm=HeadNorm(weight, 1e-5, 0.8))
    grads = torch.autograd.grad(output.float().sum(), (*inputs, lam, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_it_is_differentiable_once(randn: Randn, device: str) -> None:
    q, k, v = Case((5, 5), heads=(1, 1, 1)).inputs(randn, device, torch.float32)
    (grad,) = torch.autograd.grad(fused_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtypes", "widths", "sentence"),
    [
        ("float64 float64 float64", (16, 32), "one for q, k and v, not float64"),
        ("bfloat16 bfloat16 float32", (16, 32), "one for q, k and v, not bfloat16, float32"),
        ("float32 float32 float32", (12, 32), "width d of 8 to 256 in steps of 8, not 12"),
        ("float32 float32 float32", (264, 32), "width d of 8 to 256 in steps of 8, not 264"),
        ("float16 float16 float16", (16, 520), "width dv of 8 to 512 in steps of 8, not 520"),
    ],
)
def test_what_is_not_taken_is_named(dtypes: str, widths: tuple[int, int], sentence: str) -> None:
    kinds = [getattr(torch, name) for name in dtypes.split()]
    sizes = (widths[0], widths[0], widths[1])
    reason = unsupported(*(torch.empty(1, 2, 3, size, dtype=kind) for size, kind in zip(sizes, kinds, strict=True)))
    assert reason is not None
    assert sentence in reason


def test_no_tokens_are_not_taken() -> None:
    assert unsupported(*(torch.empty(1, 2, 0, 16) for _ in range(3))) == "the fused kernels take no empty tensors"


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_taken_has_blocks(kernel: str, dtype: torch.dtype) -> None:
    for d, dv in ((8, 8), (8, 512), (256, 8), (256, 512)):
        assert unsupported(*(torch.empty(1, 2, 3, width, dtype=dtype) for width in (d, d, dv))) is None
        assert tiles(kernel, padded(d), padded(dv), dtype.itemsize).rows >= 16
