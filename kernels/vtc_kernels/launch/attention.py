"""Two launches: a program loads a tile of keys once and stores its logits for all query rows that
share the KV head, with their maximum and sum; then blocks of columns are normalised and reduced."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .rows import contiguous_rows, power, unit

#: query rows of one product: the smallest that tensor cores take
ROWS = 16
#: bytes of a tile of keys
TILE = 16384
#: columns of a program that reduces, and the most elements that it holds of one tensor
COLUMNS, HELD = 128, 2048
_CODES = {None: 0, "mean": 1, "max": 2}


@triton.jit
def logits_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    logits_ptr,
    top_ptr,
    sum_ptr,
    kv_heads,
    group,
    m,
    n,
    base,
    width,
    splits,
    scale,
    qb,
    qh,
    qm,
    kb,
    kh,
    kn,
    mb,
    mh,
    mm,
    mn,
    MASK: tl.constexpr,
    UQ: tl.constexpr,
    UK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    split = tl.program_id(1)
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv = (tl.program_id(0) % kv_heads).to(tl.int64)
    column = split * BN + tl.arange(0, BN)
    there = column < n
    d = tl.arange(0, BD)
    inside = (d < D)[None, :]
    place = b * kb * UK + kv * kh * UK + column.to(tl.int64) * kn * UK
    key = tl.load(key_ptr + place[:, None] + d[None, :], mask=there[:, None] & inside, other=0.0)
    key = tl.trans(key)
    for first in range(0, group * m, BR):
        row = first + tl.arange(0, BR)
        real = row < group * m
        head = kv * group + row // m
        token = (row % m).to(tl.int64)
        at = b * qb * UQ + head * qh * UQ + token * qm * UQ
        query = tl.load(
            query_ptr + at[:, None] + d[None, :], mask=real[:, None] & inside, other=0.0
        )
        logit = tl.dot(query, key, input_precision="ieee") * scale
        if MASK:
            at = b * mb + head * mh + token * mm
            logit += tl.load(
                mask_ptr + at[:, None] + (column.to(tl.int64) * mn)[None, :],
                mask=real[:, None] & there[None, :],
                other=0.0,
            ).to(tl.float32)
        logit = tl.where(there[None, :], logit, float("-inf"))
        top = tl.max(logit, 1)
        shift = tl.where(top == float("-inf"), 0.0, top)
        line = (b * kv_heads * group + head) * m + token
        tl.store(
            logits_ptr + (line * width)[:, None] + (column - base)[None, :],
            logit,
            mask=real[:, None] & ((column >= base) & (column < base + width))[None, :],
        )
        tl.store(top_ptr + line * splits + split, top, mask=real)
        tl.store(
            sum_ptr + line * splits + split, tl.sum(tl.exp(logit - shift[:, None]), 1), mask=real
        )


@triton.jit
def reduce_kernel(
    logits_ptr,
    top_ptr,
    sum_ptr,
    out_ptr,
    h,
    m,
    skip,
    count,
    width,
    splits,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < count
    target = tl.program_id(0).to(tl.int64)
    b = target
    first_token, tokens = 0, m
    first_head, heads = 0, h
    if ROWS == 0:
        first_token, tokens = b % m, 1
        b = b // m
    if HEADS == 0:
        first_head, heads = b % h, 1
        b = b // h
    split = tl.arange(0, BS)
    result = tl.full([BN], float("-inf") if ROWS == 2 else 0.0, tl.float32)
    for token in range(first_token, first_token + tokens):
        value = tl.full([BN], float("-inf") if HEADS == 2 else 0.0, tl.float32)
        for first in range(first_head, first_head + heads, BH):
            head = first + tl.arange(0, BH)
            real = head < first_head + heads
            line = (b * h + head) * m + token
            known = real[:, None] & (split < splits)[None, :]
            at = (line * splits)[:, None] + split[None, :]
            top = tl.load(top_ptr + at, mask=known, other=float("-inf"))
            part = tl.load(sum_ptr + at, mask=known, other=0.0)
            best = tl.max(top, 1)
            best = tl.where(best == float("-inf"), 0.0, best)
            whole = tl.zeros([BH], tl.float32)
            whole += tl.sum(part * tl.exp(top - best[:, None]), 1)
            logit = tl.load(
                logits_ptr + (line * width + skip)[:, None] + column[None, :],
                mask=real[:, None] & inside[None, :],
                other=float("-inf"),
            )
            share = tl.exp(logit - best[:, None]) / whole[:, None]
            if HEADS == 2:  # a maximum may step over NaN, which a row without a sum must not
                spoiled = tl.max((real & ~(whole > 0)).to(tl.int32), 0)
                most = tl.max(tl.where(real[:, None], share, float("-inf")), 0)
                most = tl.where(spoiled == 1, float("nan"), most)
                value = tl.where((most > value) | (most != most), most, value)
            else:
                value += tl.sum(tl.where(real[:, None], share, 0.0), 0)
        if HEADS == 1:
            value = value / h
        if ROWS == 2:
            result = tl.where((value > result) | (value != value), value, result)
        else:
            result += value
    if ROWS == 1:
        result = result / m
    tl.store(out_ptr + target * count + column, result, mask=inside)


def qrow(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    start: int,
    stop: int,
    heads: str | None,
    rows: str | None,
) -> Tensor:
    (b, h, m, d), (_, kv, n, _) = query.shape, key.shape
    lines = b * (h if heads is None else 1) * (m if rows is None else 1)
    kept = [*([h] if heads is None else []), *([m] if rows is None else [])]
    new = {"dtype": torch.float32, "device": query.device}
    out = torch.empty(b, *kept, stop - start, **new)
    if out.numel() == 0:
        return out
    query, key = contiguous_rows(query), contiguous_rows(key)
    bd = max(16, power(d))
    bn = max(16, min(128, TILE // (bd * key.element_size())))
    splits = triton.cdiv(n, bn)
    base = start // 16 * 16  # so that columns are stored in whole words of 16 bytes
    width = triton.cdiv(stop - base, 16) * 16
    logits = torch.empty(b * h * m, width, **new)
    top, total = torch.empty(b * h * m, splits, **new), torch.empty(b * h * m, splits, **new)
    uq, uk = unit(query, *query.stride()[:3]), unit(key, *key.stride()[:3])
    seen = None if mask is None else mask.expand(b, h, m, n)
    wrap_triton(logits_kernel)[(b * kv, splits)](
        query,
        key,
        query if seen is None else seen,
        logits,
        top,
        total,
        kv,
        h // kv,
        m,
        n,
        base,
        width,
        splits,
        scale,
        *(s // uq for s in query.stride()[:3]),
        *(s // uk for s in key.stride()[:3]),
        *((0, 0, 0, 0) if seen is None else seen.stride()),
        MASK=seen is not None,
        UQ=uq,
        UK=uk,
        D=d,
        BD=bd,
        BN=bn,
        BR=ROWS,
        num_warps=4,
        num_stages=2,
    )
    bs = power(splits)
    together = 1 if heads is None else min(8, power(h), HELD // max(bs, COLUMNS))
    wrap_triton(reduce_kernel)[(lines, triton.cdiv(stop - start, COLUMNS))](
        logits,
        top,
        total,
        out,
        h,
        m,
        start - base,
        stop - start,
        width,
        splits,
        HEADS=_CODES[heads],
        ROWS=_CODES[rows],
        BH=max(1, together),
        BS=bs,
        BN=COLUMNS,
        num_warps=4,
    )
    return out
