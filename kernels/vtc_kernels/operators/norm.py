"""gather_norm: the kept rows and their norm in one pass (the first thing a pruned layer does)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..backend import TRITON, on_gpu, operator
from .gather import reference as gather_reference
from .gather import scatter_sum

if TYPE_CHECKING or TRITON:
    from ..launch import norm as launch

#: widest row that one program holds
LIMIT = 16384


def gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows `index` of x, and norm(rows) * (1 + scale) + shift of them.

    norm(r) = r / sqrt(mean(r^2) + eps) * weight + bias for kind "rms"; "layer" subtracts the mean
    of r first. The norm is computed in fp32 and rounded once; differentiable. On a GPU rows of
    D > 16384 and fp64 run the torch formula.

    Args:
        x: [B, N, D] floating point.
        index: [B, K] int32 or int64 in [0, N), may repeat tokens; the range is checked on a CPU.
        weight, bias: [D], None is one and zero.
        eps: added to the mean square or the variance.
        kind: "rms" or "layer".
        scale, shift: [B, D] of an adaptive norm (adaLN), None is zero.
    Returns: kept [B, K, D], exact copies, and normed [B, K, D], both of x's dtype.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind={kind!r}: use 'rms' or 'layer'")
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype} is not a floating point [B, N, D]"
        )
    b, n, d = x.shape
    checks.indices("index", index, 0, n)
    if len(index) != b:
        raise ValueError(
            f"index of shape {tuple(index.shape)} does not go with x of {b} rows: use [{b}, K]"
        )
    for name, t, shape in (
        ("weight", weight, (d,)),
        ("bias", bias, (d,)),
        ("scale", scale, (b, d)),
        ("shift", shift, (b, d)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, x needs {shape}")
    run = norm if d <= LIMIT and on_gpu(x, index, weight, bias, scale, shift) else reference
    return run(x, index, weight, bias, eps, kind == "layer", scale, shift)


def reference(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One flat index_select, one norm."""
    (kept,) = gather_reference([x], index, [1])
    shape, wide = x.shape[-1:], torch.promote_types(x.dtype, torch.float32)
    like = all(t is None or t.dtype == x.dtype for t in (weight, bias))
    if like and layer and scale is None and shift is None:
        return kept, F.layer_norm(kept, shape, weight, bias, eps)
    y = kept.to(wide)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if layer:
        y = F.layer_norm(y, shape, weight, bias, eps)
    else:
        square = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square()
        y = y * (square / x.shape[-1] + eps).rsqrt()
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
    if scale is not None:
        y = y * (1 + scale.to(wide)[:, None])
    y = y if shift is None else y + shift.to(wide)[:, None]
    return kept, y.to(x.dtype)


def _gather_norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    run = launch.norm if on_gpu(x) else reference
    return run(x, index, weight, bias, eps, layer, scale, shift)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, weight, bias, ctx.eps, ctx.layer, scale, shift = inputs
    ctx.save_for_backward(output[0], index, weight, bias, scale)
    ctx.n, ctx.shift = x.shape[1], None if shift is None else shift.dtype


def _backward(ctx: Any, g_kept: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    kept, index, weight, bias, scale = ctx.saved_tensors
    wide = torch.promote_types(kept.dtype, torch.float32)
    row, g = kept.to(wide), g.to(wide)
    row = row - row.mean(-1, keepdim=True) if ctx.layer else row
    inverse = (row.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
    row = row * inverse
    g_scale, g_shift = None, None if ctx.shift is None else g.sum(1).to(ctx.shift)
    if scale is not None:
        y = row if weight is None else row * weight.to(wide)
        y = y if bias is None else y + bias.to(wide)
        g_scale, g = (g * y).sum(1).to(scale.dtype), g * (1 + scale.to(wide)[:, None])
    g_weight = None if weight is None else (g * row).sum((0, 1)).to(weight.dtype)
    g_bias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
    g = g if weight is None else g * weight.to(wide)
    inner = g - row * (g * row).mean(-1, keepdim=True)
    inner = inner - g.mean(-1, keepdim=True) if ctx.layer else inner
    total = (g_kept.to(wide) + inner * inverse).to(kept.dtype)
    g_x = scatter_sum(total[:, None], index, ctx.n)[:, 0]
    return g_x, None, g_weight, g_bias, None, None, g_scale, g_shift


norm = operator(_gather_norm)
norm.register_autograd(_backward, setup_context=_setup)
