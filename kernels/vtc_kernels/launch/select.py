"""One program per row finds the k-th highest key bit by bit, without sorting, and then numbers what
stays block by block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from . import rows
from .rows import contiguous_rows, power

#: tokens that a program numbers at once
BLOCK = 4096


@triton.jit
def load_keys(score_ptr, valid_ptr, token, n, prefix, VALID: tl.constexpr):
    """Integers without sign in the order of the scores: NaN and the prefix are the highest, 0 is
    for tokens that are not valid and for those beyond the row."""
    real = token < n
    score = tl.load(score_ptr + token, mask=real, other=0.0).to(tl.float32) + 0.0  # no -0.0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    key = tl.where(score != score, 0xFFFFFFFF, key)
    if VALID:
        valid = tl.load(valid_ptr + token, mask=real, other=0)
        key = tl.where(valid != 0, key, 0)
    key = tl.where(token < prefix, 0xFFFFFFFF, key)
    return tl.where(real, key, 0)


@triton.jit
def select_kernel(
    score_ptr,
    valid_ptr,
    count_ptr,
    index_ptr,
    inverse_ptr,
    n,
    k,
    prefix,
    sb,
    vb,
    cb,
    VALID: tl.constexpr,
    COUNTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    score_ptr += b * sb
    valid_ptr += b * vb
    index_ptr += b * k
    inverse_ptr += b * n
    count = k
    if COUNTS:
        count = tl.load(count_ptr + b * cb).to(tl.int32)
        count = tl.minimum(tl.maximum(count, 1), k)
    key = load_keys(score_ptr, valid_ptr, tl.arange(0, BN), n, prefix, VALID)
    limit = tl.zeros([1], tl.uint32)  # the highest number that at least `count` keys reach
    for step in range(0, 32):
        higher = limit | (tl.full([1], 0x80000000, tl.uint32) >> step)
        reach = tl.sum((key >= higher).to(tl.int32), 0)
        limit = tl.where(reach >= count, higher, limit)
    need = count - tl.sum((key > limit).to(tl.int32), 0)  # of those equal to it, lowest first
    done = tl.zeros([1], tl.int32)
    last = tl.zeros([1], tl.int32)
    for first in range(0, n, BM):
        token = first + tl.arange(0, BM)
        real = token < n
        own = load_keys(score_ptr, valid_ptr, token, n, prefix, VALID)
        equal = own == limit  # tokens beyond the row come last, so none of them is needed
        keep = (own > limit) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= need))
        slot = done + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(index_ptr + slot, token.to(tl.int64), mask=keep)
        tl.store(inverse_ptr + token, tl.where(keep, slot, -1), mask=real)
        need -= tl.sum(equal.to(tl.int32), 0)
        done += tl.sum(keep.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(keep, token, 0), 0))
    if COUNTS:
        for first in range(0, k, BM):
            slot = first + tl.arange(0, BM)
            rest = (slot >= count) & (slot < k)
            tl.store(index_ptr + slot, tl.zeros([BM], tl.int64) + last, mask=rest)


def select(
    scores: Tensor, k: int, prefix: int, valid: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, n = scores.shape
    index = torch.empty(b, k, dtype=torch.int64, device=scores.device)
    inverse = torch.empty(b, n, dtype=torch.int32, device=scores.device)
    if index.numel() == 0:
        return index, inverse.fill_(-1)
    scores = contiguous_rows(scores)
    valid = None if valid is None else contiguous_rows(valid)
    wide = power(n)
    wrap_triton(select_kernel)[(b,)](
        scores,
        scores if valid is None else valid,
        scores if counts is None else counts,
        index,
        inverse,
        n,
        k,
        prefix,
        scores.stride(0),
        0 if valid is None else valid.stride(0),
        0 if counts is None else counts.stride(0),
        VALID=valid is not None,
        COUNTS=counts is not None,
        BN=wide,
        BM=min(wide, BLOCK),
        num_warps=max(1, min(16, wide // (8 * rows.WARP))),
    )
    return index, inverse
