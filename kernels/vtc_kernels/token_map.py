"""TokenMap: where the N tokens of every row go. Decided once, used for every tensor after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks


def segments(slot: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The CSR form of a slot map [B, N] into m slots per row (negative = lost).

    Returns order [B*N], flat token numbers sorted by slot, ties in order, and offsets [B*m + 2]:
    slot j of row b holds order[offsets[b*m + j] : offsets[b*m + j + 1]]. What lies behind the last
    slot, up to B*N, stands for the lost tokens and is token 0.
    """
    b, n = slot.shape
    base = torch.arange(b, device=slot.device)[:, None] * m
    flat = torch.where(slot >= 0, slot + base, b * m).reshape(-1)
    flat, order = torch.sort(flat, stable=True)
    offsets = torch.searchsorted(flat, torch.arange(b * m + 2, device=slot.device))
    return torch.where(flat < b * m, order, 0), offsets


def window_slots(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """[1, H * W] int32: the window of each token of a grid, in raster order."""
    height, width = grid
    row = torch.arange(height, dtype=torch.int32, device=device)[:, None] // window[0]
    column = torch.arange(width, dtype=torch.int32, device=device) // window[1]
    return (row * (width // window[1]) + column).reshape(1, -1)


@dataclass(frozen=True, eq=False, repr=False)
class TokenMap:
    """N tokens of each row go into K slots; gather, expand and merge are its three directions.

    gather(x)[k] = x[index[k]], expand(y)[n] = y[inverse[n]], merge(x)[k] = mean of x[n] over
    inverse[n] == k. Expand and segment sum are each other's adjoint, and so are gather and the
    segment sum over `index`: scattering is always written as a gather, so nothing is added
    atomically and results do not depend on the order of threads.

    Attributes:
        index: [B, K] the token that each slot sits on.
        inverse: [B, N] the slot of each token, -1 when it is lost.
        order, offsets: CSR of `inverse`, see `segments`; None when nothing is merged.
    """

    index: Tensor
    inverse: Tensor
    order: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def keep(cls, index: Tensor, n: int) -> TokenMap:
        """Keep the tokens `index` [B, K] of n and lose the others. A repeated index is one token
        in several slots; it belongs to the last of them."""
        checks.indices("index", index, 0, n)
        b, k = index.shape
        inverse = torch.full((b, n), -1, dtype=torch.int32, device=index.device)
        slot = torch.arange(k, dtype=torch.int32, device=index.device).expand(b, k)
        return cls(index, inverse.scatter_reduce(1, index.long(), slot, "amax"))

    @classmethod
    def merge(cls, inverse: Tensor, k: int, index: Tensor | None = None) -> TokenMap:
        """Send token n to slot inverse[b, n] of k, or nowhere (-1). Slots sit on `index` [B, k];
        without it on their first token (token 0 for an empty slot)."""
        if k < 0:
            raise ValueError(f"k={k} slots: 0 or more are possible")
        checks.indices("inverse", inverse, -(2**31), k)
        if index is not None:
            checks.indices("index", index, 0, max(1, inverse.shape[1]))
            checks.shape("index", index, (inverse.shape[0], k), f"a map into {k} slots")
        order, offsets = segments(inverse, k)
        if index is None:
            b, n = inverse.shape
            first = torch.cat([order, order.new_zeros(1)])[offsets[:-2]].reshape(b, k)
            empty = (offsets[1:-1] == offsets[:-2]).reshape(b, k)
            index = torch.where(empty, 0, first % max(n, 1))
        return cls(index, inverse.to(torch.int32), order, offsets)

    @classmethod
    def pooling(
        cls,
        rows: int,
        height: int,
        width: int,
        window: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> TokenMap:
        """Every `window` (height, width) of a token grid becomes one token, in raster order."""
        high, wide = window
        if high < 1 or wide < 1 or height % high or width % wide:
            raise ValueError(
                f"a grid of {height} x {width} tokens has no whole windows of {high} x {wide}: "
                f"pad it, or choose a window that divides it."
            )
        slot = window_slots((height, width), window, torch.device(device))
        return cls.merge(slot.expand(rows, -1), (height // high) * (width // wide))

    def __repr__(self) -> str:
        merged = "" if self.order is None else ", merging"
        return (
            f"TokenMap({self.inverse.shape[0]} rows, {self.n} tokens into {self.k} slots{merged})"
        )

    @property
    def n(self) -> int:
        """Tokens per row before."""
        return self.inverse.shape[1]

    @property
    def k(self) -> int:
        """Slots per row after."""
        return self.index.shape[1]

    def csr(self) -> tuple[Tensor, Tensor]:
        """order and offsets, made now when the map has none."""
        if self.order is None or self.offsets is None:
            return segments(self.inverse, self.k)
        return self.order, self.offsets
