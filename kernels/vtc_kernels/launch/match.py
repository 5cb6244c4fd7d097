"""A program keeps the best cosine of a block of tokens while it walks over tiles of the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import contiguous_rows, power, unit, warps

#: tokens of a and of b in a tile, and the most bytes of their rows that one step takes
TOKENS, STEP = 64, 64


@triton.jit
def match_kernel(
    a_ptr,
    b_ptr,
    valid_ptr,
    protect_ptr,
    cosine_ptr,
    index_ptr,
    na,
    nb,
    ab,
    an,
    bb,
    bn,
    vb,
    vn,
    pb,
    pn,
    VALID: tl.constexpr,
    PROTECT: tl.constexpr,
    UA: tl.constexpr,
    UB: tl.constexpr,
    D: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BA + tl.arange(0, BA)
    real = token < na
    d = tl.arange(0, BD)
    own = a_ptr + (batch * ab * UA + token.to(tl.int64) * an * UA)[:, None]
    square = tl.zeros([BA], tl.float32)
    for start in range(0, D, BD):
        at = start + d
        x = tl.load(own + at[None, :], mask=real[:, None] & (at < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        square += tl.sum(x * x, 1)
    norm = tl.maximum(tl.sqrt(square), 1e-12)
    best = tl.full([BA], float("-inf"), tl.float32)
    index = tl.zeros([BA], tl.int32)
    for first in range(0, nb, BB):
        other = first + tl.arange(0, BB)
        there = other < nb
        rows = b_ptr + (batch * bb * UB + other.to(tl.int64) * bn * UB)[:, None]
        dot = tl.zeros([BA, BB], tl.float32)
        squares = tl.zeros([BB], tl.float32)
        for start in range(0, D, BD):
            at = start + d
            inside = (at < D)[None, :]
            x = tl.load(own + at[None, :], mask=real[:, None] & inside, other=0.0)
            y = tl.load(rows + at[None, :], mask=there[:, None] & inside, other=0.0)
            dot = tl.dot(x, tl.trans(y), dot, input_precision="ieee")
            wide = y.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
        if VALID:
            flag = tl.load(valid_ptr + batch * vb + other.to(tl.int64) * vn, mask=there, other=0)
            there = there & (flag != 0)
        cosine = dot / norm[:, None] / tl.maximum(tl.sqrt(squares), 1e-12)[None, :]
        cosine = tl.where(cosine != cosine, float("inf"), cosine)  # NaN is above all cosines
        cosine = tl.where(there[None, :], cosine, float("-inf"))
        most, which = tl.max(cosine, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(most > best, first + which, index)
        best = tl.where(most > best, most, best)
    best = tl.where(best == float("inf"), float("nan"), best)
    token = token.to(tl.int64)
    if PROTECT:
        safe = tl.load(protect_ptr + batch * pb + token * pn, mask=real, other=0) != 0
        best = tl.where(safe, float("-inf"), best)
        index = tl.where(safe, 0, index)
    tl.store(cosine_ptr + batch * na + token, best, mask=real)
    tl.store(index_ptr + batch * na + token, index.to(tl.int64), mask=real)


def bipartite(
    a: Tensor, b: Tensor, valid: Tensor | None, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, na, d), nb = a.shape, b.shape[1]
    cosine = torch.empty(batch, na, dtype=torch.float32, device=a.device)
    index = torch.empty(batch, na, dtype=torch.int64, device=a.device)
    if cosine.numel() == 0:
        return cosine, index
    a, b = contiguous_rows(a), contiguous_rows(b)
    ua, ub = unit(a, a.stride(0), a.stride(1)), unit(b, b.stride(0), b.stride(1))
    flags = [cosine if t is None else t.view(torch.int8) for t in (valid, protect)]
    wrap_triton(match_kernel)[(triton.cdiv(na, TOKENS), batch)](
        a,
        b,
        *flags,
        cosine,
        index,
        na,
        nb,
        a.stride(0) // ua,
        a.stride(1) // ua,
        b.stride(0) // ub,
        b.stride(1) // ub,
        *((0, 0) if valid is None else valid.stride()),
        *((0, 0) if protect is None else protect.stride()),
        VALID=valid is not None,
        PROTECT=protect is not None,
        UA=ua,
        UB=ub,
        D=d,
        BA=TOKENS,
        BB=TOKENS,
        BD=max(16, min(STEP // a.element_size(), power(d))),
        num_warps=warps(STEP, TOKENS),
    )
    return cosine, index
