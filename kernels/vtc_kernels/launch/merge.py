"""One program adds the members of a few slots, one after another, for a block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import contiguous_rows, tile, unit, warps


@triton.jit
def merge_kernel(
    x_ptr,
    weight_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    total_ptr,
    slots,
    n,
    sb,
    sn,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    slot = tl.program_id(0) * BK + tl.arange(0, BK)
    real = slot < slots
    start = tl.load(offsets_ptr + slot, mask=real, other=0)
    end = tl.load(offsets_ptr + slot + 1, mask=real, other=0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BK, BD], tl.float32)
    total = tl.zeros([BK], tl.float32)
    for step in range(0, tl.max(end - start, 0)):  # pyright: ignore[reportArgumentType]
        more = start + step < end
        token = tl.load(order_ptr + start + step, mask=more, other=0).to(tl.int64)
        row = (token // n) * sb * U + (token % n) * sn * U
        value = tl.load(
            x_ptr + row[:, None] + d[None, :], mask=more[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + token, mask=more, other=0.0).to(tl.float32)
            value = tl.where(more[:, None], value * weight[:, None], 0.0)
        else:
            weight = more.to(tl.float32)
        acc += value
        total += weight
    if MEAN:
        acc = acc / tl.maximum(total, 1.1754943508222875e-38)[:, None]
    slot = slot.to(tl.int64)
    tl.store(
        out_ptr + slot[:, None] * D + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (d < D)[None, :],
    )
    tl.store(total_ptr + slot, total, mask=real & (tl.program_id(1) == 0))


def merge(
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    b, n, d = x.shape
    x = contiguous_rows(x)
    out = torch.empty(b, k, d, dtype=x.dtype, device=x.device)
    total = torch.empty(b, k, dtype=torch.float32, device=x.device)
    if b * n * k * d == 0:
        return out.zero_(), total.zero_()
    bk, bd = tile(d)
    u = unit(x, x.stride(0), x.stride(1))
    wrap_triton(merge_kernel)[(triton.cdiv(b * k, bk), triton.cdiv(d, bd))](
        x,
        x if weight is None else weight.contiguous(),
        order,
        offsets,
        out,
        total,
        b * k,
        n,
        x.stride(0) // u,
        x.stride(1) // u,
        WEIGHTED=weight is not None,
        MEAN=mean,
        U=u,
        D=d,
        BK=bk,
        BD=bd,
        num_warps=warps(bd * x.element_size(), bk),
    )
    return out, total
