"""select_topk: the k highest scores of every row as a TokenMap, from one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import TRITON, on_gpu, operator
from ..token_map import TokenMap

if TYPE_CHECKING or TRITON:
    from ..launch import select as launch

#: the longest row that one program holds
LONGEST = 16384
#: up to this many scores a CPU sorts all of them faster than it looks for a threshold
SORTED = 2048


def select_topk(
    scores: Tensor,
    k: int,
    prefix: int = 0,
    valid: Tensor | None = None,
    counts: Tensor | None = None,
) -> TokenMap:
    """Keep the k tokens of each row with the highest scores, in ascending order.

    The order is total, so every device keeps the same tokens: first the prefix, then NaN of either
    sign (as torch.sort has it), then numbers down to -inf with -0.0 equal to 0.0, then tokens that
    are not valid. Equal scores are kept from the lowest index on. Not differentiable: scores that
    require a gradient get none.

    A GPU runs one program per row for rows of up to 16384 scores; longer rows and fp64 scores take
    the torch formula.

    Args:
        scores: [B, N] floating point.
        k: slots per row, at most N.
        prefix: so many tokens at the start of each row always stay, valid or not; they count
            toward k (class tokens, registers).
        valid: [B, N] bool, False ranks below everything: padding goes first.
        counts: [B] integers in [1, k]: row b keeps counts[b] tokens only and its last one is
            repeated in the slots behind them. Checked on a CPU, clamped elsewhere.
    Returns: a TokenMap with index [B, k] int64 ascending and inverse [B, N] int32, the slot of
        each token or -1; with `counts` the last token of row b belongs to slot counts[b] - 1.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores are {scores.dtype} of shape {tuple(scores.shape)}: they must be floating "
            f"point [B, N], one row per image"
        )
    b, n = scores.shape
    if not 0 <= prefix <= k <= n:
        raise ValueError(
            f"k={k} and prefix={prefix} of {n} tokens: 0 <= prefix <= k <= {n} is needed"
        )
    if valid is not None and (valid.dtype != torch.bool or valid.shape != scores.shape):
        raise ValueError(
            f"valid is {valid.dtype} of shape {tuple(valid.shape)}: it must be bool of the shape "
            f"of the scores, {tuple(scores.shape)}"
        )
    if counts is not None:
        _check_counts(counts, b, k)
    scores = scores.detach()
    if on_gpu(scores) and n <= LONGEST:
        return TokenMap(*select(scores, k, prefix, valid, counts))
    if scores.device.type == "cpu" and not (prefix or torch.compiler.is_compiling()):
        index = None if counts is not None else _without_ties(scores, k, valid)
        if index is not None:
            return TokenMap(index, _inverse(index, n))
    return TokenMap(*reference(scores, k, prefix, valid, counts))


def _check_counts(counts: Tensor, b: int, k: int) -> None:
    if counts.shape != (b,) or counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(
            f"counts are {counts.dtype} of shape {tuple(counts.shape)}: they must be integers, one "
            f"for each of the {b} rows"
        )
    if torch.compiler.is_compiling() or counts.device.type != "cpu" or b * k == 0:
        return
    low, high = int(counts.min()), int(counts.max())
    if low < 1 or high > k:
        raise ValueError(
            f"counts go from {low} to {high}: each must be 1 to k={k}, so raise k or clamp them"
        )


def _without_ties(scores: Tensor, k: int, valid: Tensor | None) -> Tensor | None:
    """The quick way, for data that decides: what is no less than the k-th score. None where that
    is not k tokens, for ties or NaN."""
    b, n = scores.shape
    if b * k == 0:
        return None
    key = scores if valid is None else scores.masked_fill(~valid, float("-inf"))
    keep = key >= key.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    index = keep.nonzero()[:, 1]
    if len(index) != b * k or (b > 1 and not bool((keep.sum(1) == k).all())):
        return None
    return index.reshape(b, k).contiguous()


def reference(
    scores: Tensor, k: int, prefix: int, valid: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Short rows by a stable sort; others by the k-th key: what is above it stays, and of what is
    equal to it the first ones."""
    b, n = scores.shape
    if k == 0:
        return (
            torch.empty(b, 0, dtype=torch.int64, device=scores.device),
            torch.full((b, n), -1, dtype=torch.int32, device=scores.device),
        )
    if counts is None and b * n <= SORTED:
        plain = prefix == 0 and valid is None
        key = scores if plain else order_keys(scores, prefix, valid)
        index = torch.argsort(key, dim=1, descending=True, stable=True)[:, :k].sort(1).values
        return index, _inverse(index, n)
    key = order_keys(scores, prefix, valid)
    if counts is None:
        limit = key.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        keep = _above(key, limit, k)
        index = torch.nonzero_static(keep, size=b * k)[:, 1].reshape(b, k).contiguous()
        return index, _inverse(index, n)
    count = counts.long().clamp(1, k)[:, None]
    keep = _above(key, key.topk(k, dim=1).values.gather(1, count - 1), count)
    position = keep.cumsum(1)
    slot = torch.arange(1, k + 1, device=key.device)
    index = torch.searchsorted(position, torch.minimum(slot, count))
    return index, torch.where(keep, position - 1, -1).to(torch.int32)


def order_keys(scores: Tensor, prefix: int, valid: Tensor | None) -> Tensor:
    """Integers in the order of the scores. The highest is for NaN and for the prefix, which wins
    ties by its position; the lowest is for tokens that are not valid."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + 0.0  # no -0.0
    itype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    info = torch.iinfo(itype)
    bits = scores.view(itype)
    key = (bits ^ ((bits >> (info.bits - 1)) & info.max)).masked_fill(scores.isnan(), info.max)
    if valid is not None:
        key = key.masked_fill(~valid, info.min)
    if prefix:
        first = torch.arange(key.shape[1], device=key.device) < prefix
        key = key.masked_fill(first, info.max)
    return key


def _above(key: Tensor, limit: Tensor, k: int | Tensor) -> Tensor:
    """Which k keys of each row stay when `limit` [B, 1] is the k-th highest."""
    above, equal = key > limit, key == limit
    need = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= need))


def _inverse(index: Tensor, n: int) -> Tensor:
    b, k = index.shape
    slot = torch.arange(k, dtype=torch.int32, device=index.device).expand(b, k)
    lost = torch.full((b, n), -1, dtype=torch.int32, device=index.device)
    return lost.scatter(1, index, slot)


def _select(
    scores: Tensor, k: int, prefix: int, valid: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    run = launch.select if on_gpu(scores) and scores.shape[1] <= LONGEST else reference
    return run(scores, k, prefix, valid, counts)


select = operator(_select)
