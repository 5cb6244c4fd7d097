"""One program per row numbers its kept tokens, block by block; others mark the rows left over."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import rows
from .rows import contiguous_rows, power

#: tokens that a program holds at once
BLOCK = 4096


@triton.jit
def pack_kernel(
    keep_ptr,
    start_ptr,
    source_ptr,
    inverse_ptr,
    rows,
    n,
    total,
    kb,
    BN: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BN)
    if b < rows:
        position = tl.load(start_ptr + b)
        for first in range(0, n, BN):
            token = first + lane
            keep = tl.load(keep_ptr + b * kb + token, mask=token < n, other=0) != 0
            row = position + tl.cumsum(keep.to(tl.int32), 0) - 1
            position += tl.sum(keep.to(tl.int32), 0)
            keep = keep & (row < total)
            flat = (b * n + token).to(tl.int32)
            tl.store(source_ptr + row, flat, mask=keep)
            tl.store(inverse_ptr + b * n + token, tl.where(keep, row, -1), mask=token < n)
    else:
        row = (b - rows) * BN + lane
        rest = (row >= tl.load(start_ptr + rows)) & (row < total)
        tl.store(source_ptr + row, tl.full([BN], -1, tl.int32), mask=rest)


def pack(keep: Tensor, starts: Tensor, total: int, full: bool) -> tuple[Tensor, Tensor]:
    b, n = keep.shape
    source = torch.empty(total, dtype=torch.int32, device=keep.device)
    inverse = torch.empty(b, n, dtype=torch.int32, device=keep.device)
    if source.numel() + inverse.numel() == 0:
        return source, inverse
    keep = contiguous_rows(keep)
    block = min(power(n), BLOCK) if full else min(power(max(n, total)), BLOCK)
    wrap_triton(pack_kernel)[(b if full else b + triton.cdiv(total, block),)](
        keep,
        starts,
        source,
        inverse,
        b,
        n,
        total,
        keep.stride(0),
        BN=block,
        num_warps=max(1, min(8, block // (8 * rows.WARP))),
    )
    return source, inverse
