"""A program writes a few tokens for a block of columns: one read of the slot, one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import as_words, contiguous_rows, tile, unit, warps


@triton.jit
def expand_kernel(
    y_ptr,
    inverse_ptr,
    residual_ptr,
    gate_ptr,
    fill_ptr,
    out_ptr,
    n,
    yb,
    yk,
    rb,
    rn,
    gb,
    COPY: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    FILL: tl.constexpr,
    UY: tl.constexpr,
    UR: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    real = token < n
    slot = tl.load(inverse_ptr + b * n + token, mask=real, other=-1).to(tl.int64)
    kept = slot >= 0
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    inside = (d < D)[None, :]
    row = b * yb * UY + tl.where(kept, slot, 0) * yk * UY
    value = tl.load(y_ptr + row[:, None] + d[None, :], mask=kept[:, None] & inside, other=0)
    if not COPY:
        value = value.to(tl.float32)
    if GATE:
        gate = tl.load(gate_ptr + b * gb + d, mask=d < D, other=0.0).to(tl.float32)
        value = value * gate[None, :]
    if FILL:
        fill = tl.load(fill_ptr + d, mask=d < D, other=0)
        value = tl.where(kept[:, None], value, fill.to(value.dtype)[None, :])
    token = token.to(tl.int64)
    if RESIDUAL:
        at = b * rb * UR + token * rn * UR
        rest = tl.load(
            residual_ptr + at[:, None] + d[None, :], mask=real[:, None] & inside, other=0
        )
        value += rest.to(tl.float32)
    tl.store(
        out_ptr + (b * n + token)[:, None] * D + d[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & inside,
    )


def expand(
    y: Tensor,
    inverse: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    fill: Tensor | None,
) -> Tensor:
    (b, _, width), n = y.shape, inverse.shape[1]
    out = torch.empty(b, n, width, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    copy = residual is None and gate is None
    y, target = contiguous_rows(y), out
    fill = None if fill is None else fill.to(y.dtype).contiguous()
    if copy:  # rows as words, so any dtype
        words = as_words(y, out) if fill is None else as_words(y, out, fill)
        y, target, fill = words[0], words[1], None if fill is None else words[2]
    residual = None if residual is None else contiguous_rows(residual)
    gate = None if gate is None else contiguous_rows(gate)
    width = y.shape[-1]
    bn, bd = tile(width)
    uy = unit(y, y.stride(0), y.stride(1))
    ur = 1 if residual is None else unit(residual, residual.stride(0), residual.stride(1))
    wrap_triton(expand_kernel)[(triton.cdiv(n, bn), b, triton.cdiv(width, bd))](
        y,
        inverse.contiguous(),
        y if residual is None else residual,
        y if gate is None else gate,
        y if fill is None else fill,
        target,
        n,
        y.stride(0) // uy,
        y.stride(1) // uy,
        0 if residual is None else residual.stride(0) // ur,
        0 if residual is None else residual.stride(1) // ur,
        0 if gate is None else gate.stride(0),
        COPY=copy,
        RESIDUAL=residual is not None,
        GATE=gate is not None,
        FILL=fill is not None,
        UY=uy,
        UR=ur,
        D=width,
        BN=bn,
        BD=bd,
        num_warps=warps(bd * y.element_size(), bn),
    )
    return out
