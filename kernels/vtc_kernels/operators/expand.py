"""expand_tokens: every source token reads its slot back (unmerge, drop-and-restore, FlexDiT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..backend import TRITON, on_gpu, operator
from ..token_map import TokenMap, segments

if TYPE_CHECKING or TRITON:
    from ..launch import expand as launch


def expand_tokens(
    y: Tensor,
    to: TokenMap,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    fill: Tensor | None = None,
) -> Tensor:
    """out[n] = residual[n] + gate * y[inverse[n]], and residual[n] (or `fill`) for lost tokens.

    Without residual and gate the rows are copied exactly, in any dtype.

    Args:
        y: [B, K, D] slots.
        to: which slot each token belongs to.
        residual: [B, N, D], None is zeros. gate: [B, D] or [D], finite; None is one.
        fill: [D] instead of zeros for lost tokens; not together with `residual`.
    Returns: [B, N, D] of y's dtype, computed in fp32 and rounded once.
    """
    if residual is not None and fill is not None:
        raise ValueError("lost tokens keep their residual, so `fill` has no place beside it")
    if not isinstance(to, TokenMap):
        raise ValueError(f"`to` is {type(to).__name__}: give the TokenMap of these slots")
    checks.tensor("y", y, 3)
    b, d = len(to.inverse), y.shape[2]
    checks.shape("y", y, (b, to.k, d), f"this map into {to.k} slots")
    if residual is not None:
        checks.tensor("residual", residual)
        checks.shape("residual", residual, (b, to.n, d), f"this map of {to.n} tokens")
    if fill is not None:
        checks.tensor("fill", fill)
        checks.shape("fill", fill, (d,), "every lost token")
    if gate is not None:
        checks.tensor("gate", gate)
        if gate.shape not in ((d,), (b, d)):
            raise ValueError(f"gate has shape {tuple(gate.shape)}: it must be {(d,)} or {(b, d)}")
        gate = gate.expand(b, d)
    run = expand if on_gpu(y, residual, gate, fill) else reference
    return run(y, to.inverse, residual, gate, fill)


def rows_at(y: Tensor, inverse: Tensor) -> Tensor:
    """y [B, K, D] at `inverse` [B, N] -> [B, N, D], zero where it is negative."""
    return (expand if on_gpu(y) else reference)(y, inverse, None, None, None)


def reference(
    y: Tensor,
    inverse: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    fill: Tensor | None,
) -> Tensor:
    """One flat index_select from y with a last row for the lost tokens, then one pass. Elementwise
    torch computes a low dtype in fp32 and rounds once."""
    (b, k, d), n = y.shape, inverse.shape[1]
    lost = y.new_zeros(1, d) if fill is None else fill.to(y.dtype).reshape(1, d)
    base = torch.arange(b, device=y.device)[:, None] * k
    flat = torch.where(inverse >= 0, inverse + base, b * k).reshape(-1)
    out = torch.cat([y.reshape(b * k, d), lost]).index_select(0, flat).reshape(b, n, d)
    if gate is None:
        return out if residual is None else (residual + out).to(y.dtype)
    if residual is not None:
        return torch.addcmul(residual, out, gate[:, None]).to(y.dtype)
    scaled = (out * gate[:, None]).to(y.dtype)
    return scaled if fill is None else torch.where((inverse >= 0)[..., None], scaled, out)


def _expand(
    y: Tensor,
    inverse: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    fill: Tensor | None,
) -> Tensor:
    return (launch.expand if on_gpu(y) else reference)(y, inverse, residual, gate, fill)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, inverse, residual, gate, fill = inputs
    ctx.save_for_backward(inverse, gate, None if gate is None else y)
    ctx.k = y.shape[1]
    ctx.like = [None if t is None else (t.dtype, t.shape) for t in (y, residual, gate, fill)]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    from .merge import segment_merge  # merge uses rows_at of this file in its own gradient

    inverse, gate, y = ctx.saved_tensors
    y_like, residual_like, gate_like, fill_like = ctx.like
    csr = segments(inverse, ctx.k)
    total, _ = segment_merge(g, None, inverse, *csr, ctx.k, False)
    grad_y, grad_gate, grad_fill = total, None, None
    if gate is not None:
        grad_y = (total.float() * gate[:, None]).to(y_like[0])
        grad_gate = (total.float() * y.float()).sum(1).to(gate_like[0])
    if fill_like is not None:
        grad_fill = (g.float() * (inverse < 0)[..., None]).sum((0, 1)).to(fill_like[0])
    grad_residual = None if residual_like is None else g.to(residual_like[0])
    return grad_y, None, grad_residual, grad_gate, grad_fill


expand = operator(_expand)
expand.register_autograd(_backward, setup_context=_setup)
