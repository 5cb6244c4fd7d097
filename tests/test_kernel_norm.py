"""gather_norm: torch against loops, the kernel against torch, gradients, compile, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernels import DEVICE, DTYPES, close, indices, launched, randn
from torch import Tensor
from vtc_kernels.backend import OPERATORS
from vtc_kernels.launch import norm as launch
from vtc_kernels.operators import norm
from vtc_kernels.operators.norm import gather_norm


def plain(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    layer: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, in fp64."""
    (b, k), d = index.shape, x.shape[2]
    kept = torch.empty(b, k, d, dtype=x.dtype, device=x.device)
    out = torch.empty(b, k, d, dtype=torch.float64, device=x.device)
    for i in range(b):
        for j in range(k):
            kept[i, j] = x[i, int(index[i, j])]
            row = kept[i, j].double()
            row = row - row.mean() if layer else row
            row = row / ((row * row).mean() + eps).sqrt()
            row = row if weight is None else row * weight.double()
            row = row if bias is None else row + bias.double()
            row = row if scale is None else row * (1 + scale[i].double())
            out[i, j] = row if shift is None else row + shift[i].double()
    return kept, out


def options(b: int, d: int, which: str, dtype: torch.dtype) -> list[Tensor | None]:
    """weight, bias, scale, shift"""
    shapes = {"w": (d,), "b": (d,), "c": (b, d), "h": (b, d)}
    return [
        randn(*shape, dtype=dtype, seed=i) if name in which else None
        for i, (name, shape) in enumerate(shapes.items())
    ]


def compare(x: Tensor, index: Tensor, which: str, layer: bool, eps: float = 1e-5) -> None:
    weight, bias, scale, shift = options(x.shape[0], x.shape[2], which, x.dtype)
    args = x, index, weight, bias, eps, layer, scale, shift
    kept, expected = plain(*args)
    kind = "layer" if layer else "rms"
    public = gather_norm(x, index, weight, bias, eps, kind, scale, shift)
    for rows, normed in (public, launched(launch.norm, *args)):
        assert rows.dtype == normed.dtype == x.dtype
        assert torch.equal(rows, kept)
        close(normed, expected)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize(
    "n,d", [(1, 8), (7, 72), (33, 8), (33, 1000), (7, 1152), (577, 72), (7, 3)]
)
def test_sizes(n: int, d: int, layer: bool) -> None:
    x = randn(2, n, d) + 0.5
    for k in sorted({0, 1, min(n - 1, 40), min(n, 40)}):
        compare(x, indices(2, n, k), "wb" if layer else "w", layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["", "w", "b", "wb", "ch", "wbc", "wbch", "h"])
def test_every_combination(which: str, dtype: torch.dtype) -> None:
    x, index = randn(3, 33, 72, dtype=dtype), indices(3, 33, 5)
    for layer in (False, True):
        compare(x, index, which, layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_and_repeated_tokens(dtype: torch.dtype) -> None:
    wide = torch.full((2, 20, 2, 90), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, 4:17, 1, 8:80] = randn(2, 13, 72, dtype=dtype)
    x = wide[:, 4:17, 1, 8:80]
    index = torch.tensor([[5, 5, 0, 12, 5], [1, 0, 1, 0, 12]], device=DEVICE)
    for given in (x, x[:1].expand(2, 13, 72), x.transpose(1, 2).contiguous().transpose(1, 2)):
        for i in (index, index.to(torch.int32), index.repeat(1, 2)[:, ::2], index[:1].expand(2, 5)):
            compare(given, i, "wbch", True)
    weight, bias, scale, shift = options(2, 144, "wbch", dtype)
    given = [None if t is None else t[..., ::2] for t in (weight, bias, scale, shift)]
    out = launched(launch.norm, x, index, *given[:2], 1e-5, False, *given[2:])
    close(out[1], plain(x, index, *given[:2], 1e-5, False, *given[2:])[1])


def test_copies_keep_every_bit() -> None:
    """NaN, infinities and -0 in one row do not touch the others."""
    x = randn(1, 9, 72, dtype=torch.bfloat16)
    x[0, 2, 0], x[0, 4, 1], x[0, 6] = float("nan"), float("inf"), -0.0
    index = torch.arange(9, device=DEVICE)[None]
    for layer in (False, True):
        kept, normed = launched(launch.norm, x, index, None, None, 1e-6, layer, None, None)
        again = norm.reference(x, index, None, None, 1e-6, layer, None, None)
        for rows in (kept, again[0]):
            assert torch.equal(rows.view(torch.int16), x.view(torch.int16))
        assert torch.equal(normed.isnan(), again[1].isnan())
        assert normed[0, [0, 1, 3, 5, 7, 8]].isfinite().all()
        assert torch.equal(normed[0, 6].float(), torch.zeros(72, device=DEVICE))


def test_rows_of_different_scale_and_eps() -> None:
    x = randn(1, 12, 72) * torch.logspace(-4, 4, 12, device=DEVICE)[:, None] + 1e-4
    for eps in (1e-6, 1e-12, 0.1):
        compare(x, indices(1, 12, 12), "w", False, eps)
        compare(x, indices(1, 12, 12), "w", True, eps)


def test_empty_batch() -> None:
    x, index = torch.empty(0, 5, 8, device=DEVICE), torch.empty(0, 3, dtype=torch.int64)
    for run in (norm.reference, launch.norm):
        out = run(x, index.to(DEVICE), None, None, 1e-6, False, None, None)
        assert [t.shape for t in out] == [(0, 3, 8)] * 2


# -- gradients, registration -----------------------------------------------------------------------


def small(layer: bool, which: str = "wbch") -> tuple[Any, ...]:
    x = randn(2, 5, 6).double().requires_grad_()
    index = torch.tensor([[1, 4, 1], [0, 2, 3]], device=DEVICE)
    given = [
        None if t is None else t.double().requires_grad_()
        for t in options(2, 6, which, torch.float32)
    ]
    return x, index, *given[:2], 1e-3, layer, *given[2:]


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("which", ["", "w", "bh", "wbch", "c"])
def test_gradients(which: str, layer: bool) -> None:
    args = small(layer, which)
    leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
    pull = [randn(2, 3, 6, seed=s).double() for s in (8, 9)]
    grads = []
    for run in (OPERATORS["gather_norm"], norm.reference):
        grads.append(torch.autograd.grad(run(*args), leaves, pull))
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: OPERATORS["gather_norm"](*args), leaves)


def test_gradients_in_low_precision() -> None:
    x, index = randn(2, 9, 72, dtype=torch.bfloat16), indices(2, 9, 4)
    weight = randn(72, dtype=torch.bfloat16)
    pull = [randn(2, 4, 72, dtype=torch.bfloat16, seed=s) for s in (8, 9)]

    def grads(run: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = run(leaves[0], index, leaves[1], None, 1e-6, False, None, None)
        return torch.autograd.grad(out, leaves, [p.to(dtype) for p in pull])

    exact = grads(norm.reference, torch.float64)
    for got, want in zip(grads(OPERATORS["gather_norm"], x.dtype), exact, strict=True):
        assert got.dtype == x.dtype
        close(got, want, 2)


def test_operator() -> None:
    for args in (small(False), small(True, "w")):
        torch.library.opcheck(OPERATORS["gather_norm"], args)
        for got, want in zip(OPERATORS["gather_norm"](*args), plain(*args), strict=True):
            assert torch.allclose(got, want.to(got.dtype))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    def both(x: Tensor, index: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        rms = gather_norm(x, index, w, scale=c)
        return *rms, *gather_norm(x, index, w, w, kind="layer")

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for n in (9,) if backend == "inductor" else (9, 12):
        args = randn(2, n, 16), indices(2, n, n - 4), randn(16, seed=1), randn(2, 16, seed=2)
        for got, want in zip(compiled(*args), both(*args), strict=True):
            assert torch.allclose(got, want, atol=1e-6)


def test_errors() -> None:
    x, index, w = randn(2, 5, 8), indices(2, 5, 3), randn(8)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        (r"kind='batch': use 'rms' or 'layer'", (x, index, w), {"kind": "batch"}),
        (r"x of shape \(5, 8\) and torch.float32 is not", (x[0], index, w), {}),
        (r"x of shape .* and torch.int64 is not a floating", (x.long(), index, w), {}),
        (r"index of shape \(1, 3\) .* use \[2, K\]", (x, index[:1], w), {}),
        ("index is torch.float32: token numbers are int32 or int64", (x, index.float(), w), {}),
        (r"weight has shape \(7,\), x needs \(8,\)", (x, index, w[:7]), {}),
        (r"bias has shape \(7,\), x needs \(8,\)", (x, index, w, w[:7]), {}),
        (r"scale has shape \(8,\), x needs \(2, 8\)", (x, index, w), {"scale": w}),
        (r"shift has shape \(8,\), x needs \(2, 8\)", (x, index, w), {"shift": w}),
    ]
    for text, args, more in calls:
        with pytest.raises(ValueError, match=text):
            gather_norm(*args, **more)
