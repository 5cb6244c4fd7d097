"""Grid: a regular sub-grid of the image. The second floor that any method has to beat.

Differs from common practice: any token count is met exactly; where the grid of an image is not
known (tiles with newline tokens) tokens are spaced evenly in reading order.

When to use: always, beside `random`, as the bar for any other method; and where regular coverage
matters more than content, as in a first look at a whole page.

Cost: none: places follow from the shape of the image alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..context import Context, Layout
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("grid")
@dataclass(frozen=True)
class Grid(Method):
    """Keeps tokens at regular distances (uniform sampling)."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder", "cache", "dit"})

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        keep = torch.zeros(ctx.visual.shape, dtype=torch.bool, device="cpu")
        for row, (count, budget) in enumerate(zip(ctx.counts, k, strict=True)):
            layout = ctx.layout[row]
            whole = layout is not None and layout.n == count
            places = _spread(layout, budget) if whole and layout else _even(count, budget)
            keep[row, places] = True
        return Plan.from_mask(keep.to(ctx.x.device), k)


def _even(n: int, k: int) -> list[int]:
    """k of n positions at equal distances, centred."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def _spread(layout: Layout, k: int) -> list[int]:
    """k cells of frames x height x width: rows at equal distances share the budget. What stands
    behind the frames stays, where it leaves room for a cell."""
    if 0 < layout.tail < k:
        frames = replace(layout, tail=0)
        return [*_spread(frames, k - layout.tail), *range(frames.n, layout.n)]
    lines = layout.frames * layout.height
    square = round(math.sqrt(k * lines / layout.width))
    rows = min(lines, k, max(1, square, math.ceil(k / layout.width)))
    out = []
    for i, line in enumerate(_even(lines, rows)):
        share = (i + 1) * k // rows - i * k // rows
        out += [line * layout.width + column for column in _even(layout.width, share)]
    return out
