"""pool_tokens and unpool_tokens: windows of a token grid become one token, and back.

There is no kernel of its own for either. Pooling tokens in their [B, H, W, D] layout moves the
least bytes possible in torch already (it is a channels-last average pool); unpooling is
expand_tokens by a map that follows from the grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import on_gpu
from ..token_map import window_slots
from .expand import expand


def pool_tokens(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The mean of every window of a token grid, added in fp32 and rounded once. Differentiable.

    Args:
        x: [B, H * W, D] floating point, tokens in raster order.
        grid: (H, W) tokens. window: (h, w), a divisor of the grid.
    Returns: [B, H * W / (h * w), D] of x's dtype, in raster order.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: it must be [B, H * W, D] floating point"
        )
    rows, columns = _windows(grid, window)
    if x.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"x has {x.shape[1]} tokens and a grid of {grid[0]} x {grid[1]} has "
            f"{grid[0] * grid[1]}: leave class tokens out, or give the grid of these tokens"
        )
    b, _, d = x.shape
    if x.numel() == 0:
        return x.reshape(b, grid[0], grid[1], d)[:, :rows, :columns].reshape(b, rows * columns, d)
    image = x.reshape(b, *grid, d).permute(0, 3, 1, 2)
    return F.avg_pool2d(image, window).permute(0, 2, 3, 1).reshape(b, rows * columns, d)


def unpool_tokens(
    y: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """out[n] = residual[n] + gate * y[the window of n]. Differentiable.

    Without residual and gate the rows are copied exactly, in any dtype. A GPU runs the kernel of
    expand_tokens; fp64 takes the torch formula.

    Args:
        y: [B, H * W / (h * w), D], one token per window.
        grid: (H, W) tokens of the result. window: (h, w), a divisor of the grid.
        residual: [B, H * W, D], None is zeros. gate: [B, D] or [D], None is one.
    Returns: [B, H * W, D] of y's dtype, computed in fp32 and rounded once.
    """
    rows, columns = _windows(grid, window)
    if y.ndim != 3 or y.shape[1] != rows * columns:
        raise ValueError(
            f"y is of shape {tuple(y.shape)}: a grid of {grid[0]} x {grid[1]} with windows of "
            f"{window[0]} x {window[1]} needs [B, {rows * columns}, D]"
        )
    b, _, d = y.shape
    full = (b, grid[0] * grid[1], d)
    if residual is not None and residual.shape != full:
        raise ValueError(f"residual is of shape {tuple(residual.shape)}: it must be {full}")
    if gate is not None:
        gate = gate.expand(b, d)
    if on_gpu(y, residual, gate):
        return expand(y, window_slots(grid, window, y.device).expand(b, -1), residual, gate, None)
    return reference(y, grid, window, residual, gate)


def reference(
    y: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    residual: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    """A broadcast over the axes of the windows; elementwise torch computes a low dtype in fp32 and
    rounds once."""
    (b, _, d), (high, wide) = y.shape, window
    rows, columns = grid[0] // high, grid[1] // wide
    value = y if residual is not None or gate is None else (y * gate[:, None]).to(y.dtype)
    value = value.reshape(b, rows, 1, columns, 1, d)
    if residual is None:
        value = value.expand(b, rows, high, columns, wide, d)
    else:
        residual = residual.reshape(b, rows, high, columns, wide, d)
        if gate is None:
            value = (residual + value).to(y.dtype)
        else:
            value = torch.addcmul(residual, value, gate[:, None, None, None, None]).to(y.dtype)
    return value.reshape(b, grid[0] * grid[1], d)


def _windows(grid: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    """Windows of the grid, down and across."""
    if min(window) < 1 or grid[0] % window[0] or grid[1] % window[1]:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} tokens has no whole windows of {window[0]} x "
            f"{window[1]}: pad it, or choose a window that divides it"
        )
    return grid[0] // window[0], grid[1] // window[1]
