"""A program copies a few kept rows of up to four tensors. Rows are words, so any dtype goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import as_words, contiguous_rows, power, unit, warps

#: rows of one program, and words of a row that it holds at once
ROWS, WORDS = 4, 512


@triton.jit
def copy_rows(
    x_ptr,
    y_ptr,
    index,
    slot,
    real,
    k,
    b,
    p,
    xb,
    xp,
    xn,
    P: tl.constexpr,
    U: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
):
    if p < P:
        source = b * xb * U + p * xp * U + index * xn * U
        target = ((b * P + p) * k + slot) * W
        for start in tl.static_range(0, W, BW):  # pyright: ignore[reportGeneralTypeIssues]
            w = start + tl.arange(0, BW)
            mask = real[:, None] & (w < W)[None, :]
            row = tl.load(x_ptr + source[:, None] + w[None, :], mask=mask)
            tl.store(y_ptr + target[:, None] + w[None, :], row, mask=mask)


@triton.jit
def gather_kernel(
    index_ptr,
    x0,
    y0,
    x1,
    y1,
    x2,
    y2,
    x3,
    y3,
    k,
    ib,
    b0,
    p0,
    n0,
    b1,
    p1,
    n1,
    b2,
    p2,
    n2,
    b3,
    p3,
    n3,
    P0: tl.constexpr,
    U0: tl.constexpr,
    W0: tl.constexpr,
    BW0: tl.constexpr,
    P1: tl.constexpr,
    U1: tl.constexpr,
    W1: tl.constexpr,
    BW1: tl.constexpr,
    P2: tl.constexpr,
    U2: tl.constexpr,
    W2: tl.constexpr,
    BW2: tl.constexpr,
    P3: tl.constexpr,
    U3: tl.constexpr,
    W3: tl.constexpr,
    BW3: tl.constexpr,
    BK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * BK + tl.arange(0, BK)
    real = slot < k
    index = tl.load(index_ptr + b * ib + slot, mask=real, other=0).to(tl.int64)
    slot = slot.to(tl.int64)
    copy_rows(x0, y0, index, slot, real, k, b, p, b0, p0, n0, P0, U0, W0, BW0)
    if P1 > 0:
        copy_rows(x1, y1, index, slot, real, k, b, p, b1, p1, n1, P1, U1, W1, BW1)
    if P2 > 0:
        copy_rows(x2, y2, index, slot, real, k, b, p, b2, p2, n2, P2, U2, W2, BW2)
    if P3 > 0:
        copy_rows(x3, y3, index, slot, real, k, b, p, b3, p3, n3, P3, U3, W3, BW3)


def gather(xs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """xs: up to four [B, P, N, W]; index [B, K] -> [B, P, K, W] each."""
    b, k = index.shape
    outs = [torch.empty(b, x.shape[1], k, x.shape[3], dtype=x.dtype, device=x.device) for x in xs]
    full = [(contiguous_rows(x), y) for x, y in zip(xs, outs, strict=True) if y.numel()]
    if not full:
        return outs
    index = contiguous_rows(index)
    pointers, strides, shapes = [], [], {}
    for j in range(4):
        x, y = as_words(*full[j]) if j < len(full) else (index, index)
        u = unit(x, *x.stride()[:3]) if j < len(full) else 1
        pointers += [x, y]
        strides += [s // u for s in x.stride()[:3]] if j < len(full) else [0, 0, 0]
        planes, width = (x.shape[1], x.shape[3]) if j < len(full) else (0, 1)
        shapes |= {f"P{j}": planes, f"U{j}": u, f"W{j}": width, f"BW{j}": min(power(width), WORDS)}
    widest = max(shapes[f"BW{j}"] for j in range(4))
    rows = ROWS * WORDS // widest if widest < WORDS else ROWS
    grid = (triton.cdiv(k, rows), b, max(shapes[f"P{j}"] for j in range(4)))
    wrap_triton(gather_kernel)[grid](
        index,
        *pointers,
        k,
        index.stride(0),
        *strides,
        **shapes,
        BK=rows,
        num_warps=warps(4 * widest, rows),
    )
    return outs
