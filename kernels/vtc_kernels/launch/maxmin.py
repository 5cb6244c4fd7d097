"""One program per row keeps all distances in registers; without similarities, one launch per pick,
in which every program first finds the pick from the block maxima that the last launch left."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from torch.nn import functional as F

from . import rows
from .rows import contiguous_rows, power, unit

#: tile of a product of features: rows, columns, and features at once
ROWS, COLUMNS, FEATURES = 64, 64, 16
#: tokens that one program can select from; half as many with priorities
LIMIT = 16384


@triton.jit
def distance(similarity):
    """1 - similarity, at least 0; NaN is 0."""
    d = 1.0 - similarity
    return tl.where(d > 0.0, d, 0.0)


@triton.jit
def cosines(
    x_ptr, row, column, n, D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        left = tl.load(
            x_ptr + row[:, None] * D + d[None, :],
            mask=(row < n)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        right = tl.load(
            x_ptr + column[:, None] * D + d[None, :],
            mask=(column < n)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def gram_kernel(
    x_ptr,
    out_ptr,
    n,
    D: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    value = cosines(x_ptr + b * n * D, row, column, n, D, BR, BC, BD)
    tl.store(
        out_ptr + b * n * n + row[:, None] * n + column[None, :],
        value,
        mask=(row < n)[:, None] & (column < n)[None, :],
    )


@triton.jit
def isolation_kernel(
    x_ptr,
    valid_ptr,
    out_ptr,
    n,
    xb,
    xn,
    VALID: tl.constexpr,
    FEATURES: tl.constexpr,
    U: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    real = row < n
    x_ptr += b * xb * U
    nearest = tl.full([BR], float("inf"), tl.float32)
    for start in range(0, n, BC):
        column = start + tl.arange(0, BC)
        other = column < n
        if FEATURES:
            value = cosines(x_ptr, row, column.to(tl.int64), n, D, BR, BC, BD)
        else:
            value = tl.load(
                x_ptr + row[:, None] * xn * U + column[None, :],
                mask=real[:, None] & other[None, :],
                other=0.0,
            ).to(tl.float32)
        if VALID:
            other = tl.load(valid_ptr + b * n + column, mask=other, other=0) != 0
        counts = other[None, :] & (row[:, None] != column[None, :])
        nearest = tl.minimum(nearest, tl.min(tl.where(counts, distance(value), float("inf")), 1))
    if VALID:
        own = tl.load(valid_ptr + b * n + row, mask=real, other=0) != 0
        nearest = tl.where(own, nearest, float("-inf"))
    tl.store(out_ptr + b * n + row, nearest, mask=real)


@triton.jit
def select_kernel(
    similarity_ptr,
    valid_ptr,
    first_ptr,
    isolation_ptr,
    priority_ptr,
    out_ptr,
    n,
    k,
    sb,
    sn,
    VALID: tl.constexpr,
    FIRST: tl.constexpr,
    PRIORITY: tl.constexpr,
    U: tl.constexpr,
    BN: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BN)
    real = token < n
    free = real
    if VALID:
        free = tl.load(valid_ptr + b * n + token, mask=real, other=0) != 0
    far = tl.where(free, float("inf"), float("-inf"))
    if FIRST:
        pick = tl.load(first_ptr + b).to(tl.int32)
    else:
        start = tl.load(isolation_ptr + b * n + token, mask=real, other=float("-inf"))
        _, pick = tl.max(start, 0, return_indices=True, return_indices_tie_break_left=True)
    for step in range(0, k - 1):
        tl.store(out_ptr + b * k + step, pick.to(tl.int64))
        row = tl.load(
            similarity_ptr + b * sb * U + pick.to(tl.int64) * sn * U + token,
            mask=real,
            other=0.0,
        ).to(tl.float32)
        far = tl.where(token == pick, float("-inf"), tl.minimum(far, distance(row)))
        score = far
        if PRIORITY:  # read again for every pick: long rows leave no registers for it
            priority = tl.load(priority_ptr + b * n + token, mask=real, other=0.0).to(tl.float32)
            score = far * priority
            score = tl.where(far < 0.0, far, tl.where(score > 0.0, score, 0.0))
        _, pick = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out_ptr + b * k + k - 1, pick.to(tl.int64))


@triton.jit(do_not_specialize=["step"])
def step_kernel(
    x_ptr,
    valid_ptr,
    first_ptr,
    priority_ptr,
    far_ptr,
    best_ptr,
    out_ptr,
    n,
    k,
    step,
    blocks,
    VALID: tl.constexpr,
    PRIORITY: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BB: tl.constexpr,
):
    """best [2, B, blocks, 2]: score and token of each block, bits of int32, read from one half and
    written to the other."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64)
    if FIRST:
        pick = tl.load(first_ptr + b).to(tl.int32)
    else:
        block = tl.arange(0, BB)
        last = best_ptr + (((step + 1) % 2 * rows + b) * blocks + block) * 2
        score = tl.load(last, mask=block < blocks, other=-1)
        # scores are >= 0 or -inf: their bits as integers are in order, -inf is below all
        _, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(last + 1, mask=block < blocks, other=0)
        pick = tl.sum(tl.where(block == at, token, 0), 0)
    tl.store(out_ptr + b * k + step, pick.to(tl.int64), mask=tl.program_id(0) == 0)
    if not LAST:
        token = tl.program_id(0) * BN + tl.arange(0, BN)
        real = token < n
        row = (b * n + token) * D
        taken = (b * n + pick) * D
        acc = tl.zeros([BN], tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            value = tl.load(
                x_ptr + row[:, None] + d[None, :],
                mask=real[:, None] & (d < D)[None, :],
                other=0.0,
            )
            own = tl.load(x_ptr + taken + d, mask=d < D, other=0.0)
            acc += tl.sum(value * own[None, :], 1)
        if FIRST:
            free = real
            if VALID:
                free = tl.load(valid_ptr + b * n + token, mask=real, other=0) != 0
            far = tl.where(free, float("inf"), float("-inf"))
        else:
            far = tl.load(far_ptr + b * n + token, mask=real, other=float("-inf"))
        far = tl.where(token == pick, float("-inf"), tl.minimum(far, distance(acc)))
        tl.store(far_ptr + b * n + token, far, mask=real)
        score = far
        if PRIORITY:
            priority = tl.load(priority_ptr + b * n + token, mask=real, other=0.0).to(tl.float32)
            score = far * priority
            score = tl.where(far < 0.0, far, tl.where(score > 0.0, score, 0.0))
        most, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        next_ptr = best_ptr + ((step % 2 * rows + b) * blocks + tl.program_id(0)) * 2
        bits = tl.where(most < 0.0, -1, most.to(tl.int32, bitcast=True))
        tl.store(next_ptr, bits)
        tl.store(next_ptr + 1, tl.where(most < 0.0, 0, tl.program_id(0) * BN + at))


def maxmin(
    similarity: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    b, n, _ = similarity.shape
    out = torch.empty(b, k, dtype=torch.int64, device=similarity.device)
    if out.numel() == 0:
        return out
    similarity = contiguous_rows(similarity)
    valid = None if valid is None else valid.contiguous()
    u = unit(similarity, similarity.stride(0), similarity.stride(1))
    isolation = None if first is not None else isolated(similarity, valid, features=False)
    bn = power(n)
    wrap_triton(select_kernel)[(b,)](
        similarity,
        out if valid is None else valid,
        out if first is None else first.contiguous(),
        out if isolation is None else isolation,
        out if priority is None else priority.contiguous(),
        out,
        n,
        k,
        similarity.stride(0) // u,
        similarity.stride(1) // u,
        VALID=valid is not None,
        FIRST=first is not None,
        PRIORITY=priority is not None,
        U=u,
        BN=bn,
        num_warps=max(1, min(1024 // rows.WARP, bn // (8 * rows.WARP))),
    )
    return out


def isolated(x: Tensor, valid: Tensor | None, features: bool) -> Tensor:
    """[B, N] distance to the nearest other valid token, -inf where not valid; x holds
    similarities, or unit features (contiguous)."""
    b, n = x.shape[:2]
    out = torch.empty(b, n, dtype=torch.float32, device=x.device)
    rows, columns = (ROWS, COLUMNS) if features else (8, min(256, power(n)))
    u = unit(x, x.stride(0), x.stride(1))
    wrap_triton(isolation_kernel)[(triton.cdiv(n, rows), b)](
        x,
        out if valid is None else valid,
        out,
        n,
        x.stride(0) // u,
        x.stride(1) // u,
        VALID=valid is not None,
        FEATURES=features,
        U=u,
        D=x.shape[2],
        BR=rows,
        BC=columns,
        BD=FEATURES,
        num_warps=8 if features else 4,
    )
    return out


def tokens(
    x: Tensor,
    k: int,
    valid: Tensor | None,
    first: Tensor | None,
    priority: Tensor | None,
) -> Tensor:
    b, n, d = x.shape
    out = torch.empty(b, k, dtype=torch.int64, device=x.device)
    if out.numel() == 0:
        return out
    x = F.normalize(x.float(), dim=-1).contiguous()
    valid = None if valid is None else valid.contiguous()
    if n <= min(d, LIMIT if priority is None else LIMIT // 2):
        similarity = torch.empty(b, n, n, dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(n, ROWS), triton.cdiv(n, COLUMNS), b)
        wrap_triton(gram_kernel)[grid](
            x, similarity, n, D=d, BR=ROWS, BC=COLUMNS, BD=FEATURES, num_warps=8
        )
        return maxmin(similarity, k, valid, first, priority)
    first = isolated(x, valid, features=True).argmax(1) if first is None else first.contiguous()
    priority = None if priority is None else priority.contiguous()
    bn = 16 if n <= 8192 else 32
    blocks = triton.cdiv(n, bn)
    far = torch.empty(b, n, dtype=torch.float32, device=x.device)
    best = torch.empty(2, b, blocks, 2, dtype=torch.int32, device=x.device)
    for step in range(k):
        last = step == k - 1
        wrap_triton(step_kernel)[(1 if last else blocks, b)](
            x,
            out if valid is None else valid,
            first,
            out if priority is None else priority,
            far,
            best,
            out,
            n,
            k,
            step,
            blocks,
            VALID=valid is not None,
            PRIORITY=priority is not None,
            FIRST=step == 0,
            LAST=last,
            D=d,
            BN=bn,
            BD=min(power(d), 4096 // bn),
            BB=power(blocks),
            num_warps=4,
        )
    return out
