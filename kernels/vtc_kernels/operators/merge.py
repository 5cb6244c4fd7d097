"""merge_tokens: weighted means of the tokens that share a slot (ToMe, VisionZip, PruMerge)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..backend import TRITON, on_gpu, operator
from ..token_map import TokenMap
from .expand import rows_at

if TYPE_CHECKING or TRITON:
    from ..launch import merge as launch


def merge_tokens(
    x: Tensor, to: TokenMap, size: Tensor | None = None, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """out[k] = sum size[n] x[n] / sum size[n] over the tokens n of slot k, summed in fp32.

    Deterministic: every slot adds its tokens in order. On a CPU the weights of a bf16 or fp16 `x`
    are rounded to its dtype before they are used. An empty slot is zero.

    Args:
        x: [B, N, D] floating point.
        to: which token goes where; `TokenMap.merge` makes one that is ready for many tensors.
        size: [B, N] how many original tokens each token stands for, at least 0; None is one each.
        mean: False leaves the division out: with `size` as weights, a segment sum.
    Returns: merged [B, K, D] of x's dtype, and sizes [B, K] fp32: the sum of `size` per slot.
    """
    if not isinstance(to, TokenMap):
        raise ValueError(f"`to` is {type(to).__name__}: make a map with TokenMap.merge(slot, k)")
    checks.tensor("x", x, 3)
    checks.shape("x", x, (*to.inverse.shape, x.shape[2]), f"this map of {to.n} tokens per row")
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}: means need floating-point tokens")
    if size is not None:
        checks.tensor("size", size)
        checks.shape("size", size, tuple(to.inverse.shape), "one number per token")
    order, offsets = to.csr()
    run = segment_merge if on_gpu(x, size) else reference
    return run(x, size, to.inverse, order, offsets, to.k, mean)


def reference(
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """One embedding_bag over the CSR. Its last bag holds the lost tokens and is thrown away."""
    b, n, d = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    if n == 0 or k == 0:
        return x.new_zeros(b, k, d), x.new_zeros(b, k, dtype=wide)
    slot, share = inverse.long().clamp(min=0), weight
    if weight is None:
        total = offsets[:-1].diff().to(wide).reshape(b, k)
    else:
        share = torch.where(inverse >= 0, weight.to(wide), 0.0)
        total = share.new_zeros(b, k).scatter_add(1, slot, share)
    if mean:
        inverted = 1 / total.clamp(min=torch.finfo(torch.float32).tiny)
        share = inverted.gather(1, slot) * (1 if share is None else share)
    merged = F.embedding_bag(
        order,
        x.reshape(b * n, d),
        offsets,
        mode="sum",
        per_sample_weights=None if share is None else share.reshape(-1).to(x.dtype)[order],
        include_last_offset=True,
    )
    return merged[:-1].reshape(b, k, d), total


def _segment_merge(
    x: Tensor,
    weight: Tensor | None,
    inverse: Tensor,
    order: Tensor,
    offsets: Tensor,
    k: int,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    run = launch.merge if on_gpu(x) else reference
    return run(x, weight, inverse, order, offsets, k, mean)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, inverse, _, _, _, ctx.mean = inputs
    ctx.save_for_backward(x, weight, inverse, *output)


def _backward(ctx: Any, g: Tensor, g_total: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, inverse, out, total = ctx.saved_tensors
    own = total.new_ones(inverse.shape) if weight is None else weight.float()
    scale = 1 / total.clamp(min=torch.finfo(torch.float32).tiny) if ctx.mean else None
    share = own if scale is None else own * rows_at(scale[..., None], inverse)[..., 0]
    spread = rows_at(g, inverse)
    grad_x = (spread.float() * share[..., None]).to(x.dtype)
    if weight is None:
        return grad_x, None, None, None, None, None, None
    center = rows_at(out, inverse).float() if ctx.mean else 0.0
    pull = (spread.float() * (x.float() - center)).sum(-1)
    if scale is not None:
        pull = pull * rows_at(scale[..., None], inverse)[..., 0]
    grad_w = pull + rows_at(g_total[..., None], inverse)[..., 0]
    return grad_x, grad_w.to(weight.dtype), None, None, None, None, None


segment_merge = operator(_segment_merge)
segment_merge.register_autograd(_backward, setup_context=_setup)
