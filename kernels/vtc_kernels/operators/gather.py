"""gather_tokens: the kept rows of several tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backend import TRITON, on_gpu, operator
from ..token_map import segments
from .merge import segment_merge

if TYPE_CHECKING or TRITON:
    from ..launch import gather as launch

#: tensors that one launch moves
SLOTS = 4


def gather_tokens(index: Tensor, *tensors: Tensor, axis: int | Sequence[int] = 1) -> list[Tensor]:
    """Rows `index` of every tensor: hidden states, rotary tables, positions, masks, a KV cache.

    Exact copies in any dtype; differentiable. Index may repeat tokens.

    Args:
        index: [B, K] integers in [0, N).
        tensors: [B, ..., N, ...]; a batch axis of 1 is broadcast. Only the last axis, or nothing
            behind the token axis, must be contiguous for the copy to need no other copy.
        axis: the token axis of all tensors, or one per tensor. Axes between batch and tokens
            (heads of a cache, planes of positions) share the index.
    Returns: for every tensor [B, ..., K, ...], contiguous.
    """
    axes = [axis] * len(tensors) if isinstance(axis, int) else list(axis)
    if len(axes) != len(tensors):
        raise ValueError(f"{len(tensors)} tensors need as many axes, {len(axes)} were given")
    flat = [_flat(x, index, a) for x, a in zip(tensors, axes, strict=True)]
    if on_gpu(index, *flat):
        out: list[Tensor] = []
        for start in range(0, len(flat), SLOTS):
            out += gather(flat[start : start + SLOTS], index)
    else:
        out = reference(flat, index)
    return [
        y.reshape(index.shape[0], *x.shape[1:a], index.shape[1], *x.shape[a + 1 :])
        for y, x, a in zip(
            out, tensors, [a % x.ndim for a, x in zip(axes, tensors, strict=True)], strict=True
        )
    ]


def _flat(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x as [B, P, N, W]: planes that share the index, tokens, and what a token holds."""
    axis, b = axis % x.ndim, index.shape[0]
    if axis == 0 or x.shape[0] not in (1, b):
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} does not go with an index of {b} rows and token "
            f"axis {axis}: its first axis must be the batch ({b} or 1), its tokens behind it"
        )
    if x.shape[0] != b:
        x = x.expand(b, *x.shape[1:])
    planes, width = x.shape[1:axis].numel(), x.shape[axis + 1 :].numel()
    return x.reshape(b, planes, x.shape[axis], width)


def reference(xs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """xs [B, P, N, W], index [B, K] -> [B, P, K, W] each, by one flat index_select."""
    return [_rows(x, index) for x in xs]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    (b, p, n, w), k = x.shape, index.shape[1]
    if b == 1:
        return x.index_select(2, index[0])
    shared = x.stride(0) == 0  # broadcast over the batch: one copy of the rows is enough
    x = x[:1] if shared else x
    base = torch.arange(0, x.shape[0] * p * n, n, device=x.device).reshape(-1, p, 1)
    flat = (base + index[:, None]).reshape(-1)
    return x.reshape(x.shape[0] * p * n, w).index_select(0, flat).reshape(b, p, k, w)


def _gather(xs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    return launch.gather(xs, index) if on_gpu(index) else reference(xs, index)


def _setup(ctx: Any, inputs: tuple[Sequence[Tensor], Tensor], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.n = [x.shape[2] for x in inputs[0]]


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[list[Tensor | None], None]:
    (index,) = ctx.saved_tensors
    return [
        scatter_sum(g, index, n) if g.is_floating_point() else None
        for g, n in zip(grads, ctx.n, strict=True)
    ], None


def scatter_sum(g: Tensor, index: Tensor, n: int) -> Tensor:
    """The adjoint of a gather: g [B, P, K, W] summed into [B, P, n, W] at `index` [B, K]."""
    b, p, _, w = g.shape
    planes = g.transpose(1, 2).flatten(2)  # [B, K, P * W]
    total, _ = segment_merge(planes, None, index, *segments(index, n), n, False)
    return total.reshape(b, n, p, w).transpose(1, 2)


gather = operator(_gather)
gather.register_autograd(_backward, setup_context=_setup)
