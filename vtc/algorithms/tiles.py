"""Images that the vision tower reads in tiles: each tile gets its own share of the budget.

Scores of different tiles are not comparable: attention sums to one in each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..context import Context
from ..errors import UnsupportedModel
from ..plan import Plan
from ..reducer import top_k


def tiles(ctx: Context, row: int) -> list[Tensor]:
    """Places of the tokens of each tile (tower image) of a row, ascending. Reads the signal `tile`
    where a row may have several; inside `torch.compile` the frames of its grid are its tiles."""
    layout, count = ctx.layout[row], ctx.counts[row]
    places = torch.arange(count, device=ctx.x.device)
    if layout is not None and layout.frames == 1:
        return [places]
    if torch.compiler.is_compiling():
        if layout is None or layout.n != count or layout.tail:
            raise UnsupportedModel(
                f"{ctx.site}: torch.compile needs images of one known, full grid, to give every "
                f"tile its share. Run the model uncompiled."
            )
        return list(places.split(layout.cells))
    tile = ctx.signals["tile"][row, :count]
    return [places[tile == i] for i in tile.unique()]


def share(k: int, groups: list[Tensor]) -> list[tuple[Tensor, int]]:
    """k split evenly, the remainder to the first; what small ones cannot use goes to the others."""
    sizes, level, left = [len(group) for group in groups], 0, k
    for done, size in enumerate(sorted(sizes)):  # what every group can have, the small ones full
        level = left // (len(sizes) - done)
        if size > level:
            break
        left -= size
    more = [i for i, n in enumerate(sizes) if n > level][: k - sum(min(level, n) for n in sizes)]
    return [(group, min(level, len(group)) + (i in more)) for i, group in enumerate(groups)]


def best(score: Tensor, places: Tensor, n: int) -> Tensor:
    """Of some places of a row, the n with the highest score [N], ascending."""
    if not n:
        return places[:0]
    row = score[places][None]
    return places[top_k(row, torch.ones_like(row, dtype=torch.bool), (n,)).index[0]]


def top_of_tiles(ctx: Context, score: Tensor, k: tuple[int, ...]) -> Plan:
    """The highest scores [R, N] of every tile of each row, k[r] in all."""
    groups = [tiles(ctx, row) for row in range(len(k))]
    if all(len(each) == 1 for each in groups):
        return top_k(score, ctx.visual, k)
    keep = torch.zeros_like(ctx.visual)
    for row, each in enumerate(groups):
        for places, n in share(k[row], each):
            keep[row, best(score[row], places, n)] = True
    return Plan.from_mask(keep, k)
