"""Pooled density: a span of blocks works on a coarser grid, every cell the mean of its tokens.

The token density of SparseDiT (https://arxiv.org/abs/2412.06028) without its trained modules:
behind the span every token gets the change of its cell. A training-free stand-in of ours; see
`flexdit` for the method itself. Few tokens while the images are noisy cost least
(`noise=(0.5, 1.0)`): late steps decide about details.

A cell's rotary position is that of its centre. Any number of cells is met exactly: rows of the
grid at equal heights share them.

When to use: as the floor for diffusion transformers, and in early, noisy steps also in earnest:
`noise=(0.5, 1.0)`.

Cost: one mean per cell: N D additions at both ends of the span."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..context import Context, Layout
from ..errors import InvalidBudget, InvalidInput
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("pooled")
@dataclass(frozen=True)
class Pooled(Method):
    """Keeps the means of the cells of a coarser grid."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"dit"})
    merging: ClassVar[bool] = True
    default_at: ClassVar[str] = "dit.1"

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        layout, (rows, n) = ctx.layout[0], ctx.x.shape[:2]
        if layout is None or layout.n != n:
            raise InvalidInput(
                f"pooled at {ctx.site}: {n} tokens are no whole grid. It has to be the first step "
                f"that drops."
            )
        if k[0] < layout.frames:
            raise InvalidBudget(
                f"pooled at {ctx.site}: {k[0]} tokens for {layout.frames} frames, but every frame "
                f"needs one."
            )
        index, cell, weight = (
            part.to(ctx.x.device).expand(rows, -1) for part in cells(layout, k[0])
        )
        return Plan(index, n, None, cell, weight)


def cells(layout: Layout, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of k cells over all frames: [k] the token at the centre of each; of every token [N] its cell,
    and its share in the mean of that."""
    centres: list[int] = []
    numbers: list[Tensor] = []
    for frame in range(layout.frames):
        share = (frame + 1) * k // layout.frames - frame * k // layout.frames
        first = len(centres)
        places, inside = _of_frame(layout.height, layout.width, share)
        centres += [frame * layout.cells + place for place in places]
        numbers.append(inside.flatten() + first)
    number = torch.cat(numbers)
    weight = 1.0 / number.bincount(minlength=k)[number]
    return torch.tensor(centres, device="cpu"), number, weight


def _of_frame(height: int, width: int, k: int) -> tuple[list[int], Tensor]:
    """Centre of each of k cells, and the cell of every place [height, width]. Bands of lines share
    the cells; a band is cut into columns of nearly equal width."""
    bands = min(height, k, max(1, round(math.sqrt(k * height / width)), math.ceil(k / width)))
    column = torch.arange(width, device="cpu")
    centres: list[int] = []
    rows: list[Tensor] = []
    for i in range(bands):
        share = (i + 1) * k // bands - i * k // bands
        first, last = _inside(i, bands, height)
        rows += [column * share // width + len(centres)] * (last - first + 1)
        middle = (first + last) // 2 * width
        centres += [middle + sum(_inside(j, share, width)) // 2 for j in range(share)]
    return centres, torch.stack(rows)


def _inside(i: int, parts: int, n: int) -> tuple[int, int]:
    """First and last of the places p < n with p * parts // n == i."""
    return -(-i * n // parts), -(-(i + 1) * n // parts) - 1
