"""MustDrop, vision stage: neighbouring patches that look alike are merged.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
2024, https://arxiv.org/abs/2411.10803. Local spatial merging: the token grid is cut into windows of
3 x 3; a window whose 72 ordered pairs of different tokens have a mean cosine of at least 0.8
becomes the plain mean of its tokens, at its last (bottom-right) place, or, where a model pads its
tiles, at the last one that shows the picture. Acts once, on what leaves the first block of the
vision tower, so before block 1. Rows and columns that fill no window stay, and so do images smaller
than a window.

Differs from the released code: every image merges all windows that qualify (the code merges as many
as the least of the batch: `batch="min"`); tokens stay in reading order (the code puts merged ones
first); with several patches per language-model token a token is all of them side by side, so the
merge stays one language-model token; towers with rotary positions inside are merged behind the
projector instead; positions in the prompt stay (the code counts those of the shorter prompt anew:
positions="renumber"). Sizes are remembered but change nothing unless `mass` is set (the code
forgets them). A fixed budget is ours: the most similar windows are merged until k tokens are left,
the last one only in part. It cannot go below one token per window.

When to use: inside the vision tower, for pictures with large plain areas, with mass=1.0: what is
lost without mass is counting. `mustdrop` is the whole method.

Cost: cosines within windows of 3 x 3 tokens: about 36 D multiply-adds per window. The tower is
cheaper from its second block on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..budget import Budget
from ..context import Context, Layout
from ..errors import InvalidBudget, InvalidInput, InvalidRecipe
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("mustdrop_merge")
@dataclass(frozen=True)
class MustDropMerge(Method):
    """Keeps one mean token of every window of neighbours that look alike.

    Args:
        threshold: least mean cosine of a window (with keep="auto").
        window: side of a window in tokens.
        least: with keep="auto", merge no image below this share or number of tokens.
        batch: "image" lets every image merge what qualifies, "min" as many windows as the image of
            the batch that has fewest (the released code).
    """

    threshold: float = 0.8
    window: int = 3
    least: float | int | None = None
    batch: Literal["image", "min"] = "image"

    paper: ClassVar[str] = "MustDrop, 2024, https://arxiv.org/abs/2411.10803"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector"})
    merging: ClassVar[bool] = True
    default_at: ClassVar[str] = "vision.1"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def __post_init__(self) -> None:
        if self.window < 2:
            raise InvalidRecipe(f"mustdrop_merge: window={self.window}, use 2 or more.")
        if self.least is not None:
            Budget(self.least)

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        windows, similar = [], []
        for row, layout in enumerate(ctx.layout):
            if layout is None or layout.n != ctx.counts[row]:
                raise InvalidInput(
                    f"mustdrop_merge at {ctx.site}: the grid of image {row} is not known or not "
                    f"whole ({ctx.counts[row]} tokens). Use it inside the vision tower (vision.1), "
                    f"before other steps."
                )
            windows.append(_windows(layout, self.window).to(ctx.x.device))
            similar.append(_similarity(ctx.x[row], windows[-1]))
        if k == ctx.counts:  # keep="auto"
            take = [int((s >= self.threshold).sum()) for s in similar]
            if self.least is not None:
                numbers = zip(take, ctx.counts, ctx.original, strict=True)
                least = Budget(self.least)
                take = [
                    min(t, (n - least.tokens(n, o)) // (self.window**2 - 1)) for t, n, o in numbers
                ]
            take = [min(take)] * len(take) if self.batch == "min" else take
            spare = [0] * len(take)
        else:
            gone = [n - m for n, m in zip(ctx.counts, k, strict=True)]
            take = [g // (self.window**2 - 1) for g in gone]
            spare = [g % (self.window**2 - 1) for g in gone]
        goes_to = torch.arange(ctx.x.shape[1], device=ctx.x.device).repeat(len(k), 1)
        for row, (full, rest) in enumerate(zip(take, spare, strict=True)):
            order = similar[row].argsort(descending=True, stable=True)
            if full + (rest > 0) > len(order):
                least = ctx.counts[row] - len(order) * (self.window**2 - 1)
                raise InvalidBudget(
                    f"mustdrop_merge: {k[row]} tokens asked of image {row}, but merging its "
                    f"{len(order)} windows leaves at least {least} of {ctx.counts[row]}."
                )
            merged = windows[row][order[:full]]
            goes_to[row, merged] = merged[:, -1:]
            if rest:
                part = windows[row][order[full], -rest - 1 :]
                goes_to[row, part] = part[-1]
        return _merge(ctx, goes_to)


def _windows(layout: Layout, side: int) -> Tensor:
    """[windows, side * side] places of every whole window, frame by frame, in reading order."""
    place = torch.arange(layout.frames * layout.cells, device="cpu")
    place = place.reshape(layout.frames, layout.height, layout.width)
    h, w = layout.height // side, layout.width // side
    place = place[:, : h * side, : w * side].reshape(layout.frames, h, side, w, side)
    return place.transpose(2, 3).reshape(-1, side * side)


def _similarity(x: Tensor, windows: Tensor) -> Tensor:
    """[windows] mean cosine over pairs of different tokens: |sum u|^2 - sum |u|^2 over pairs."""
    unit = F.normalize(x.float(), dim=-1)[windows]  # [windows, n, U]
    n = windows.shape[1]
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return pairs / (n * (n - 1))


def _merge(ctx: Context, goes_to: Tensor) -> Plan:
    """Tokens become the mean of those that go to them, weighted by what each stands for."""
    own = torch.arange(goes_to.shape[1], device=goes_to.device)
    plan = Plan.from_mask((goes_to == own) & ctx.visual)
    if plan.kept == ctx.counts:
        return plan
    sized = "token_size" in ctx.signals
    mass = ctx.signals["token_size"] if sized else ctx.visual.float()
    assign = torch.where(ctx.visual, plan.destination().gather(1, goes_to), -1)
    size = torch.zeros(plan.rows, plan.m, device=goes_to.device, dtype=torch.float32)
    size = size.scatter_add(1, assign.clamp(min=0), torch.where(assign >= 0, mass, 0.0))
    weight = mass / size.gather(1, assign.clamp(min=0)).clamp(min=1e-12)
    return Plan(plan.index, plan.n, plan.counts, assign, weight, size * plan.slots)
