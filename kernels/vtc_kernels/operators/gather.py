"""gather_tokens: the kept rows of several tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..backend import TRITON, on_gpu, operator
from ..token_map import TokenMap, segments
from .merge import segment_merge

if TYPE_CHECKING or TRITON:
    from ..launch import gather as launch

#: tensors that one launch moves
SLOTS = 4


def gather_tokens(
    index: Tensor | TokenMap, *tensors: Tensor, axis: int | Sequence[int] = 1
) -> list[Tensor]:
    """Rows `index` of every tensor: hidden states, rotary tables, positions, masks, a KV cache.

    Exact copies in any dtype; differentiable. Index may repeat tokens.

    Args:
        index: [B, K] int32 or int64 in [0, N), or a map that has one. The range is checked on a
            CPU only.
        tensors: [B, ..., N, ...]; a batch axis of 1 is broadcast. Only the last axis, or nothing
            behind the token axis, must be contiguous for the copy to need no other copy.
        axis: the token axis of all tensors, or one per tensor. Axes between batch and tokens
            (heads of a cache, planes of positions) share the index.
    Returns: for every tensor [B, ..., K, ...], contiguous.
    """
    index = index.index if isinstance(index, TokenMap) else index
    axes = [axis] * len(tensors) if isinstance(axis, int) else list(axis)
    if len(axes) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many axes, {len(axes)} were given")
    least = 2**31
    for i, x in enumerate(tensors):
        axes[i] = _checked(x, axes[i])
        least = min(least, x.shape[axes[i]])
    checks.indices("index", index, 0, least)
    b = index.shape[0]
    for x, a in zip(tensors, axes, strict=True):
        if x.shape[0] not in (1, b):
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} does not go with an index of {b} rows and "
                f"token axis {a}: its first axis must be the batch ({b} or 1)"
            )
    if not on_gpu(index, *tensors, copies=True):
        return reference(tensors, index, axes)
    flat = [_flat(x, index, a) for x, a in zip(tensors, axes, strict=True)]
    out: list[Tensor] = []
    for start in range(0, len(flat), SLOTS):
        out += gather(flat[start : start + SLOTS], index)
    return [
        y.reshape(*index.shape[:1], *x.shape[1:a], index.shape[1], *x.shape[a + 1 :])
        for y, x, a in zip(out, tensors, axes, strict=True)
    ]


def _checked(x: Tensor, axis: int) -> int:
    """The token axis, counted from the front; the batch is before it."""
    checks.tensor("what is gathered", x)
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim or axis % x.ndim == 0:
        raise ValueError(
            f"axis={axis!r} of a tensor with {x.ndim} axes: name the token axis, behind the batch"
        )
    return axis % x.ndim


def _flat(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x as [B, P, N, W]: planes that share the index, tokens, and what a token holds."""
    x = x.expand(index.shape[0], *x.shape[1:])
    planes, width = prod(x.shape[1:axis]), prod(x.shape[axis + 1 :])
    return x.reshape(index.shape[0], planes, x.shape[axis], width)


def reference(xs: Sequence[Tensor], index: Tensor, axes: Sequence[int]) -> list[Tensor]:
    """By one flat index_select each."""
    return [_rows(x, index, axis) for x, axis in zip(xs, axes, strict=True)]


def _rows(x: Tensor, index: Tensor, axis: int) -> Tensor:
    b, k = index.shape
    if b == 1:
        return x.index_select(axis, index[0])
    shape, n = x.shape, x.shape[axis]
    if axis > 1 or shape[0] < b or x.stride(0) == 0:
        return _planes(x, index, axis)
    step = max(n, 1)
    base = torch.arange(0, b * step, step, device=index.device).unsqueeze(1)
    flat = torch.add(index, base).view(-1)
    return x.reshape(b * n, *shape[2:]).index_select(0, flat).view(b, k, *shape[2:])


def _planes(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """With planes between batch and tokens, or rows that the batch shares."""
    (b, k), n, shape = index.shape, x.shape[axis], x.shape
    shared = shape[0] < b or x.stride(0) == 0  # one copy of the rows for the whole batch
    x = x[:1] if shared else x
    rows, planes = x.shape[0], prod(shape[1:axis])
    base = (torch.arange(rows * planes, device=index.device) * n).view(rows, planes, 1)
    flat = (base + index[:, None]).view(-1)
    picked = x.reshape(rows * planes * n, *shape[axis + 1 :]).index_select(0, flat)
    return picked.view(b, *shape[1:axis], k, *shape[axis + 1 :])


def _gather(xs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """xs [B, P, N, W], index [B, K] -> [B, P, K, W] each."""
    return launch.gather(xs, index) if on_gpu(index) else reference(xs, index, [2] * len(xs))


def _setup(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.n = [x.shape[2] for x in inputs[0]]


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[list[Tensor | None], None]:
    (index,) = ctx.saved_tensors
    return [
        scatter_sum(g, index, n) if g.is_floating_point() or g.is_complex() else None
        for g, n in zip(grads, ctx.n, strict=True)
    ], None


def scatter_sum(g: Tensor, index: Tensor, n: int) -> Tensor:
    """The adjoint of a gather: g [B, P, K, W] summed into [B, P, n, W] at `index` [B, K]."""
    b, p, _, w = g.shape
    if g.is_complex():
        parts = torch.view_as_real(g.resolve_conj()).flatten(3)
        return torch.view_as_complex(scatter_sum(parts, index, n).unflatten(3, (w, 2)).contiguous())
    planes = g.transpose(1, 2).flatten(2)  # [B, K, P * W]
    total, _ = segment_merge(planes, None, index, *segments(index, n), n, False)
    return total.reshape(b, n, p, w).transpose(1, 2)


gather = operator(_gather)
gather.register_autograd(_backward, setup_context=_setup)
