"""A program reads a few kept rows once, writes them, and writes their norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import rows
from .rows import contiguous_rows, power, tile, unit


@triton.jit
def norm_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    kept_ptr,
    normed_ptr,
    k,
    xb,
    xn,
    ib,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    LAYER: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BK + tl.arange(0, BK)
    real = slot < k
    index = tl.load(index_ptr + b * ib + slot, mask=real, other=0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    mask = real[:, None] & inside[None, :]
    source = b * xb * U + index * xn * U
    target = (b * k + slot.to(tl.int64)) * D
    value = tl.load(x_ptr + source[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(kept_ptr + target[:, None] + d[None, :], value, mask=mask)
    y = value.to(tl.float32)
    if LAYER:
        mean = tl.sum(y, 1) / D
        y = tl.where(inside[None, :], y - mean[:, None], 0.0)
    variance = tl.sum(y * y, 1) / D
    y = y * (1.0 / tl.sqrt(variance + eps))[:, None]
    if WEIGHT:
        weight = tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
        y = y * weight[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + d, mask=inside, other=0.0).to(tl.float32)
        y = y + bias[None, :]
    if SCALE:
        scale = tl.load(scale_ptr + b * D + d, mask=inside, other=0.0).to(tl.float32)
        y = y * (1.0 + scale)[None, :]
    if SHIFT:
        shift = tl.load(shift_ptr + b * D + d, mask=inside, other=0.0).to(tl.float32)
        y = y + shift[None, :]
    tl.store(
        normed_ptr + target[:, None] + d[None, :], y.to(normed_ptr.dtype.element_ty), mask=mask
    )


def norm(
    x: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (b, k), d = index.shape, x.shape[2]
    kept = torch.empty(b, k, d, dtype=x.dtype, device=x.device)
    normed = torch.empty(b, k, d, dtype=x.dtype, device=x.device)
    if kept.numel() == 0:
        return kept, normed
    x, index = contiguous_rows(x), contiguous_rows(index)
    weight, bias, scale, shift = (
        None if t is None else t.contiguous() for t in (weight, bias, scale, shift)
    )
    bk, bd = tile(d, columns=power(d))
    u = unit(x, x.stride(0), x.stride(1))
    wrap_triton(norm_kernel)[(triton.cdiv(k, bk), b)](
        x,
        index,
        x if weight is None else weight,
        x if bias is None else bias,
        x if scale is None else scale,
        x if shift is None else shift,
        kept,
        normed,
        k,
        x.stride(0) // u,
        x.stride(1) // u,
        index.stride(0),
        eps,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        SCALE=scale is not None,
        SHIFT=shift is not None,
        LAYER=layer,
        U=u,
        D=d,
        BK=bk,
        BD=bd,
        num_warps=max(1, min(512 // rows.WARP, bk * bd * x.element_size() // (16 * rows.WARP))),
    )
    return kept, normed
