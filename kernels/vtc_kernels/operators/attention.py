"""qrow_scores: what a few query rows pay to every key (FastV, SparseVLM, MustDrop, CLS scores)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import TRITON, on_gpu, operator

if TYPE_CHECKING or TRITON:
    from ..launch import attention as launch

Reduction = Literal["mean", "max"] | None


def qrow_scores(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    heads: Reduction = "mean",
    rows: Reduction = None,
) -> Tensor:
    """Softmax attention of M query rows over all N keys, of which keys [start, stop) are returned.

    softmax(scale * query @ key^T + mask) in fp32; reduced over heads first, over rows afterwards.
    KV heads are not repeated, and nothing grows with N x N: the attention of all other rows can
    stay in a fused kernel. A row that sees no key is NaN, as it is in torch.

    On a GPU logits are summed in fp32; on a CPU they are rounded to the input dtype once.
    fp64 always runs the torch formula. Differentiable in query, key and mask; equal maxima share
    their gradient.

    Args:
        query: [B, H, M, Dh] floating point, M and H at least 1.
        key: [B, Hkv, N, Dh] of the same dtype; query head h looks at KV head h // (H // Hkv).
            Both may be strided (a transposed [B, N, H, Dh]); a last axis that is contiguous is
            read in place on a GPU.
        scale: factor of the logits; None is Dh ** -0.5.
        mask: added to the logits, -inf = unseen; any shape that broadcasts to [B, H, M, N],
            which is not expanded in memory.
        start, stop: the keys that are returned, 0 <= start <= stop <= N; None stops at N.
        heads, rows: "mean" or "max" over that axis, None keeps it.
    Returns: fp32 (fp64 for fp64) [B, H, M, stop - start] without the axes that are reduced.
    """
    _check(query, key, mask, heads, rows)
    n = key.shape[2]
    stop = n if stop is None else stop
    if not 0 <= start <= stop <= n:
        raise ValueError(
            f"keys {start} to {stop} of {n}: choose 0 <= start <= stop <= {n}, negative numbers "
            f"do not count from the end"
        )
    factor = query.shape[3] ** -0.5 if scale is None else scale
    run: Any = qrow if on_gpu(query, key, mask) else reference
    return run(query, key, mask, factor, start, stop, heads, rows)


def _check(
    query: Tensor, key: Tensor, mask: Tensor | None, heads: Reduction, rows: Reduction
) -> None:
    shapes = f"query of shape {tuple(query.shape)} and key of shape {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"{shapes}: both need four axes, [batch, heads, tokens, head width]")
    (b, h, m, d), (kb, kv, n, kd) = query.shape, key.shape
    if (b, d) != (kb, kd):
        raise ValueError(f"{shapes} must have the same batch and the same head width")
    if h == 0 or m == 0 or kv == 0 or h % kv:
        raise ValueError(
            f"{shapes}: query heads must be a multiple of KV heads, and there must be a row"
        )
    if query.dtype != key.dtype or not query.is_floating_point():
        raise ValueError(
            f"query is {query.dtype} and key {key.dtype}: give both in one floating point dtype"
        )
    for name, value in (("heads", heads), ("rows", rows)):
        if value not in ("mean", "max", None):
            raise ValueError(f'{name} is {value!r}: choose "mean", "max" or None (keep the axis)')
    if mask is None:
        return
    if not mask.is_floating_point():
        raise ValueError(
            f"mask is {mask.dtype}, but it is added to the logits: use "
            f'torch.where(mask, 0.0, float("-inf")) for a mask that is True where a key is seen'
        )
    sizes = zip(reversed(mask.shape), (n, m, h, b), strict=False)
    if mask.ndim > 4 or any(have != 1 and have != want for have, want in sizes):
        raise ValueError(
            f"a mask of shape {tuple(mask.shape)} does not broadcast to {(b, h, m, n)}: every "
            f"axis, counted from the last, must be 1 or of that size"
        )


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    start: int,
    stop: int,
    heads: Reduction,
    rows: Reduction,
) -> Tensor:
    """One product per KV head with all its query rows."""
    share = _attention(query, key, mask, scale)[..., start:stop]
    return _reduced(_reduced(share, 1, heads), -2, rows)


def _attention(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    (b, h, m, d), (_, kv, n, _) = query.shape, key.shape
    if b > 1 or key.dtype != torch.float32:
        key = key.contiguous()  # else matmul copies strided keys itself, several times slower
    grouped = query.reshape(b, kv, h // kv * m, d)
    logits = (grouped @ key.transpose(2, 3)).reshape(b, h, m, n)
    logits = logits.to(torch.promote_types(query.dtype, torch.float32)) * scale
    return (logits if mask is None else logits + mask).softmax(-1)


def _qrow(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    start: int,
    stop: int,
    heads: str | None,
    rows: str | None,
) -> Tensor:
    run: Any = launch.qrow if on_gpu(query) else reference
    return run(query, key, mask, scale, start, stop, heads, rows)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, mask, *ctx.rest = inputs
    ctx.save_for_backward(query, key, mask)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Attention is computed again; dlogits = p * (dp - sum(dp * p))."""
    query, key, mask = ctx.saved_tensors
    scale, start, stop, heads, rows = ctx.rest
    p = _attention(query, key, mask, scale)
    b, h, m, n = p.shape
    share = p[..., start:stop]
    by_head = _reduced(share, 1, heads)
    if rows is not None:
        g = _spread(g.unsqueeze(-2), by_head, -2, rows)
    if heads is not None:
        g = _spread(g.unsqueeze(1), share, 1, heads)
    pull = p * F.pad(g, (start, n - stop))
    grad = pull - p * pull.sum(-1, keepdim=True)
    grad_mask = None
    if mask is not None and ctx.needs_input_grad[2]:
        grad_mask = grad.sum_to_size(mask.shape).to(mask.dtype)
    kv, d = key.shape[1], query.shape[3]
    grad = (grad * scale).reshape(b, kv, h // kv * m, n)
    grad_query = (grad @ key.to(grad.dtype)).reshape(b, h, m, d).to(query.dtype)
    grad_key = grad.transpose(2, 3) @ query.reshape(b, kv, h // kv * m, d).to(grad.dtype)
    return grad_query, grad_key.to(key.dtype), grad_mask, None, None, None, None, None


def _reduced(share: Tensor, axis: int, how: str | None) -> Tensor:
    if how is None:
        return share
    return share.mean(axis) if how == "mean" else share.amax(axis)


def _spread(g: Tensor, share: Tensor, axis: int, how: str) -> Tensor:
    """The gradient of a mean or a maximum of `share` over `axis`, which g has with size 1."""
    if how == "mean":
        return (g / share.shape[axis]).expand_as(share)
    best = share == share.amax(axis, keepdim=True)
    return g * best / best.sum(axis, keepdim=True)


qrow = operator(_qrow)
qrow.register_autograd(_backward, setup_context=_setup)
