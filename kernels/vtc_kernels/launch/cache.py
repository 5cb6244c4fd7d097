"""A program moves the kept columns of one head to the front, tile by tile, each read then written.
Rows are words, so any dtype goes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import as_words, contiguous_rows, power, unit, warps

#: words of a row that a program moves, and of a tile
WORDS, TILE = 256, 4096


@triton.jit
def move_columns(
    x_ptr,
    index_ptr,
    k,
    prefix,
    part,
    xn,
    U: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    TILE: tl.constexpr,
):
    # Slot j takes column index[j] >= j. Tiles go in ascending order, and a tile reads no column
    # that an earlier one wrote: its columns are not below its slots, and those are above all
    # earlier slots. Only a repeated last index L may lie below its slots; slot L then holds L as
    # well, so what was written there is the column itself. Within a tile slot j may be the column
    # of another slot, so all of the tile is read before any of it is written.
    BK: tl.constexpr = TILE // BW
    w = part * BW + tl.arange(0, BW)
    for start in range(prefix, k, BK):
        slot = start + tl.arange(0, BK)
        real = slot < k
        column = tl.load(index_ptr + slot, mask=real, other=0).to(tl.int64)
        mask = real[:, None] & (w < W)[None, :]
        row = tl.load(x_ptr + (column * xn * U)[:, None] + w[None, :], mask=mask)
        tl.debug_barrier()
        target = slot.to(tl.int64) * xn * U
        tl.store(x_ptr + target[:, None] + w[None, :], row, mask=mask)


@triton.jit
def compact_kernel(
    index_ptr,
    x0,
    x1,
    k,
    prefix,
    ib,
    b0,
    h0,
    n0,
    b1,
    h1,
    n1,
    H0: tl.constexpr,
    U0: tl.constexpr,
    W0: tl.constexpr,
    BW0: tl.constexpr,
    H1: tl.constexpr,
    U1: tl.constexpr,
    W1: tl.constexpr,
    BW1: tl.constexpr,
    TILE: tl.constexpr,
):
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2) % 2
    part = tl.program_id(2) // 2
    index_ptr += b * ib
    if (which == 0) & (h < H0) & (part * BW0 < W0):
        base = x0 + b * b0 * U0 + h.to(tl.int64) * h0 * U0
        move_columns(base, index_ptr, k, prefix, part, n0, U0, W0, BW0, TILE)
    if (which == 1) & (h < H1) & (part * BW1 < W1):
        base = x1 + b * b1 * U1 + h.to(tl.int64) * h1 * U1
        move_columns(base, index_ptr, k, prefix, part, n1, U1, W1, BW1, TILE)


def compact(index: Tensor, first: Tensor, second: Tensor | None, prefix: int) -> None:
    (b, k), index = index.shape, contiguous_rows(index)
    pair = [x for x in (first, second) if x is not None and x.numel()]
    if not pair or prefix >= k:
        return
    pointers, strides, shapes, parts = [], [], {}, 1
    for j in range(2):
        if j >= len(pair):
            pointers.append(index)
            strides += [0, 0, 0]
            shapes |= {f"H{j}": 0, f"U{j}": 1, f"W{j}": 1, f"BW{j}": 1}
            continue
        (x,) = as_words(pair[j])
        u, width = unit(x, *x.stride()[:3]), x.shape[3]
        block = min(power(width), WORDS)
        parts = max(parts, triton.cdiv(width, block))
        pointers.append(x)
        strides += [s // u for s in x.stride()[:3]]
        shapes |= {f"H{j}": x.shape[1], f"U{j}": u, f"W{j}": width, f"BW{j}": block}
    wrap_triton(compact_kernel)[(max(shapes["H0"], shapes["H1"]), b, 2 * parts)](
        index,
        *pointers,
        k,
        prefix,
        index.stride(0),
        *strides,
        **shapes,
        TILE=TILE,
        num_warps=warps(4 * TILE // 4),
    )
