"""FrameFusion, merging: a token that repeats its cell of the frame before goes into it.

Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large
Vision Language Models", ICCV 2025, https://arxiv.org/abs/2501.01986. Visual tokens in the order of
cells, then time; similarity: cosine of hidden states with the token before at the same cell. Runs
of similar tokens collapse into their first one, as the plain mean. keep="auto" merges every pair
with a similarity of at least `threshold`, or, if that is more than the compute budget asks for, the
most similar ones: needed share = 1 - (L * cost - tokens that layers have processed) / (layers left
* tokens there are), in shares of the original tokens. Paper defaults: cost 0.3, threshold 0.6
(LLaVA-Video; 0.5 for Qwen2-VL and InternVL).

Differs from the released code: it acts before a layer instead of behind its attention; batches. An
exact budget takes the most similar pairs; where a cell would have to vanish (an image, or fewer
tokens than cells) neighbours in that order merge across cells too, after all pairs of one cell.

When to use: a first step inside the language model for videos whose frames repeat, in recipes of
your own; `framefusion` is the whole method.

Cost: one cosine per token in each layer where it acts: about N D multiply-adds. Reads hidden states
only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algorithms.frames import highest
from ..context import Context
from ..errors import InvalidRecipe
from ..plan import Plan
from ..reducer import Method
from ..registry import register

NEVER = float("-inf")


@register("framefusion_merge")
@dataclass(frozen=True)
class FrameFusionMerge(Method):
    """Keeps the first of tokens that repeat from frame to frame, as their mean.

    Args:
        threshold: least similarity with keep="auto".
        cost: with keep="auto", tokens that the layers of the language model process on average, as
            a share: merging stops there.
    """

    threshold: float = 0.6
    cost: float = 0.3

    paper: ClassVar[str] = "FrameFusion, ICCV 2025, https://arxiv.org/abs/2501.01986"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    merging: ClassVar[bool] = True
    default_at: ClassVar[str] = "decoder.0"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})
    frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.cost <= 1.0:
            raise InvalidRecipe(f"framefusion_merge: cost={self.cost}: a share, above 0 to 1.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        order, likeness, same = repeats(ctx)
        counts: tuple[int, ...] | None = k
        gone = torch.tensor([n - m for n, m in zip(ctx.counts, k, strict=True)], device="cpu")
        if k == ctx.counts:  # keep="auto"
            least = left_for(ctx, self.cost)
            most = [most_merged(n, m) for n, m in zip(ctx.counts, least, strict=True)]
            pairs = (same & (likeness >= self.threshold)).sum(1)
            gone, counts = pairs.cpu().minimum(torch.tensor(most, device="cpu")), None
        rank = torch.where(same, likeness + 2, likeness)  # pairs of one cell go first
        merged = highest(rank, gone.to(rank.device)[:, None])
        return collapse(ctx, order, merged, counts)


def most_merged(count: int, least: float) -> int:
    """How many of `count` tokens may merge until `least` are left: a whole number, rounded down;
    2.9999999 is 3."""
    return max(0, min(count - 1, math.floor(count - least + 1e-6)))


def left_for(ctx: Context, cost: float) -> list[float]:
    """Tokens of every row which, from this layer to the last, spend what the compute budget
    `cost` leaves."""
    done = [sum(layer[row] for layer in ctx.history) for row in range(len(ctx.counts))]
    ahead = ctx.depth - len(ctx.history)
    spare = [cost * ctx.depth * n - d for n, d in zip(ctx.original, done, strict=True)]
    return [tokens / ahead for tokens in spare]


def repeats(ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Order [R, N] of the tokens by cell, then time; in that order the likeness [R, N] of each with
    the one before, and whether both are of one cell."""
    grids = list(zip(ctx.layout, ctx.original, strict=True))
    cells = [n if grid is None else grid.cells for grid, n in grids]
    whole = [n if grid is None else n - grid.tail for grid, n in grids]
    device, end = ctx.x.device, 2 * max(ctx.original)
    size = torch.tensor(cells, device=device)[:, None]
    behind = ctx.source - torch.tensor(whole, device=device)[:, None]
    cell = torch.where(behind < 0, ctx.source % size, size + behind)
    cell = torch.where(ctx.visual, cell, end)
    cell, order = cell.sort(dim=1, stable=True)
    x = ctx.x.gather(1, order[..., None].expand_as(ctx.x)).float()
    near = F.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
    near = torch.where(cell[:, 1:] >= size, -2.0, near)  # what is behind the frames goes last
    near = torch.where(cell[:, 1:] == end, NEVER, near)
    same = cell[:, 1:] == cell[:, :-1]
    return order, F.pad(near, (1, 0), value=NEVER), F.pad(same & (near > -2.0), (1, 0))


def collapse(ctx: Context, order: Tensor, merged: Tensor, counts: tuple[int, ...] | None) -> Plan:
    """Tokens at the places `merged` [R, N] of `order` go into the last one before that does not."""
    steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
    leader = order.gather(1, torch.where(merged, 0, steps).cummax(1).values)
    leader = torch.empty_like(order).scatter(1, order, leader)
    keep = torch.empty_like(merged).scatter(1, order, ~merged) & ctx.visual
    plan = Plan.from_mask(keep, counts)
    slot = torch.where(ctx.visual, plan.destination().gather(1, leader), 0)
    own = ctx.visual.float()
    sized = "token_size" in ctx.signals
    size = ctx.signals["token_size"] if sized else own
    zero = torch.zeros(plan.index.shape, device=order.device, dtype=torch.float32)
    members = zero.scatter_add(1, slot, own)
    total = zero.scatter_add(1, slot, torch.where(ctx.visual, size, 0.0))
    weight = own / members.gather(1, slot)
    return Plan(plan.index, plan.n, plan.counts, torch.where(ctx.visual, slot, -1), weight, total)
