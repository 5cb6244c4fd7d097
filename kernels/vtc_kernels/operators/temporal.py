"""temporal_cosine: how much every place changes from frame to frame (STTS, DyCoke, FrameFusion)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import TRITON, on_gpu, operator
from .match import TINY, unit_gradient

if TYPE_CHECKING or TRITON:
    from ..launch import temporal as launch

#: the widest rows of which the kernel holds two
WIDEST = 4096


def temporal_cosine(x: Tensor) -> Tensor:
    """Cosine of every token with the token at the same place of the frame before, in fp32.

    A zero vector has cosine 0: norms are at least 1e-12. Differentiable. fp64 and rows wider than
    4096 run the torch formula on a GPU too.

    Args:
        x: [B, T, N, D] floating point, T at least 1. On a GPU it may be strided; a last axis that
            is contiguous is read in place.
    Returns: fp32 (fp64 for fp64) [B, T - 1, N]: frame t + 1 against frame t. Empty for T = 1.
    """
    if x.ndim != 4 or not x.is_floating_point() or x.shape[1] == 0:
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: it must be floating point with four axes, "
            f"[batch, frames, tokens, width], and at least one frame"
        )
    return (temporal if on_gpu(x) else reference)(x)


def reference(x: Tensor) -> Tensor:
    """Frame after frame, so that one frame in fp32 stays in the cache until the next has come."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cosines = []
    old = x[:, 0].to(wide)
    old_norm = torch.linalg.vector_norm(old, dim=-1).clamp(min=TINY)
    for frame in x[:, 1:].unbind(1):
        new = frame.to(wide)
        norm = torch.linalg.vector_norm(new, dim=-1).clamp(min=TINY)
        cosines.append(torch.linalg.vecdot(new, old) / (norm * old_norm))
        old, old_norm = new, norm
    return torch.stack(cosines, 1) if cosines else x[:, 1:].to(wide).sum(-1)


def _temporal(x: Tensor) -> Tensor:
    return (launch.temporal if on_gpu(x) and x.shape[3] <= WIDEST else reference)(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    unit = F.normalize(x.to(g.dtype), dim=-1, eps=TINY)
    g = g[..., None]
    pull = F.pad(g * unit[:, :-1], (0, 0, 0, 0, 1, 0)) + F.pad(g * unit[:, 1:], (0, 0, 0, 0, 0, 1))
    return unit_gradient(x, pull).to(x.dtype)


temporal = operator(_temporal)
temporal.register_autograd(_backward, setup_context=_setup)
