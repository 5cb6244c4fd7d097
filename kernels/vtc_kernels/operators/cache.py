"""kv_compact: drop columns of a KV cache where it lies, without a second cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import TRITON, on_gpu, operator

if TYPE_CHECKING or TRITON:
    from ..launch import cache as launch

#: bytes that a CPU moves at once
TILE = 1 << 20


def kv_compact(index: Tensor, *caches: Tensor, prefix: int = 0) -> list[Tensor]:
    """Move columns `index` of every cache to its front, in place, and return views of them.

    Exact copies in any dtype. The columns behind the front keep something, but nothing of use. Not
    differentiable. A GPU moves two caches (keys and values) per launch and needs no memory beside
    them; a CPU, and fp64, use a buffer of about 1 MB, and torch.compile on a CPU one of K columns.

    Args:
        index: [B, K] integers in [0, N), ascending; the last index may be repeated at the end, as
            select_topk does with `counts`. Checked on a CPU, not on a GPU and not compiled: an
            index in another order gives wrong columns there.
        caches: [B, H, N, Dh] each, with a contiguous last axis and memory of their own; H, N and
            Dh may differ. No tensor twice.
        prefix: so many columns are in place already (index[:, :prefix] is 0, 1, 2, ...) and are
            not touched.
    Returns: cache[:, :, :K] of every cache.
    """
    if index.ndim != 2 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"index is {index.dtype} of shape {tuple(index.shape)}: it must be [B, K] integers"
        )
    k = index.shape[1]
    if not 0 <= prefix <= k:
        raise ValueError(f"prefix={prefix} of {k} kept columns: choose one from 0 to {k}")
    for i, cache in enumerate(caches):
        _check(cache, index)
        if any(cache is other for other in caches[:i]):
            raise ValueError("a cache is given twice: its columns would move twice. Give it once.")
    eager = not torch.compiler.is_compiling()
    if caches and eager and index.device.type == "cpu" and index.numel():
        _check_order(index, prefix, min(c.shape[2] for c in caches))
    if prefix < k:
        run = compact if on_gpu(index, *caches, copies=True) else reference
        for start in range(0, len(caches), 2):
            pair = caches[start : start + 2]
            run(index, pair[0], pair[1] if len(pair) == 2 else None, prefix)
    return [cache[:, :, :k] for cache in caches]


def _check(cache: Tensor, index: Tensor) -> None:
    (b, k), shape = index.shape, tuple(cache.shape)
    if cache.ndim != 4 or shape[0] != b or shape[2] < k:
        raise ValueError(
            f"a cache of shape {shape} does not go with an index of {b} rows and {k} columns: it "
            f"must be [B, H, N, Dh] with B = {b} and N of at least {k}"
        )
    if cache.shape[3] > 1 and cache.stride(3) != 1:
        raise ValueError(
            f"the last axis of a cache of shape {shape} has stride {cache.stride(3)}: only a "
            f"contiguous one can be compacted in place, so call contiguous() and keep the result"
        )
    if any(s == 0 and size > 1 for s, size in zip(cache.stride(), shape, strict=True)):
        raise ValueError(
            f"a cache of shape {shape} is expanded (strides {cache.stride()}), so its rows share "
            f"memory: compact the tensor that it was expanded from"
        )
    if torch.is_grad_enabled() and cache.requires_grad:
        raise ValueError(
            "a cache requires grad, and it cannot be compacted in place with a gradient: call "
            "under torch.no_grad(), or use gather_tokens(index, cache, axis=2)"
        )


def _check_order(index: Tensor, prefix: int, n: int) -> None:
    ahead, behind = index[:, 1:], index[:, :-1]
    if not bool(((ahead > behind) | ((ahead == behind) & (ahead == index[:, -1:]))).all()):
        raise ValueError(
            "index is not ascending, so columns would be overwritten before they are read: sort "
            "every row (only its last index may be repeated)"
        )
    if int(index.min()) < 0 or int(index.max()) >= n:
        raise ValueError(
            f"index goes from {int(index.min())} to {int(index.max())}: the caches have columns 0 "
            f"to {n - 1}"
        )
    if not torch.equal(index[:, :prefix], torch.arange(prefix).expand_as(index[:, :prefix])):
        raise ValueError(
            f"prefix={prefix} says that index begins with 0 to {prefix - 1} in every row, and it "
            f"does not: lower the prefix"
        )


def reference(index: Tensor, first: Tensor, second: Tensor | None, prefix: int) -> None:
    """A few columns at a time, read and then written; see the kernel for why this is in order."""
    k = index.shape[1]
    for cache in (first,) if second is None else (first, second):
        if cache.element_size() == 1:
            cache = cache.view(torch.uint8)  # torch does not index every kind of float8
        if torch.compiler.is_compiling():  # loops would fix the sizes of the graph
            rows = index[:, None, prefix:, None].long()
            rows = rows.expand(-1, cache.shape[1], -1, cache.shape[3])
            cache[:, :, prefix:k] = cache.gather(2, rows)
            continue
        column = max(1, cache.shape[1] * cache.shape[3] * cache.element_size())
        step = max(1, TILE // column)
        for row, own in zip(index, cache, strict=True):
            for start in range(prefix, k, step):
                end = min(k, start + step)
                own[:, start:end] = own.index_select(1, row[start:end])


def _compact(index: Tensor, first: Tensor, second: Tensor | None, prefix: int) -> None:
    run = launch.compact if on_gpu(index, first, second, copies=True) else reference
    run(index, first, second, prefix)


compact = operator(_compact, mutates=("first", "second"))
