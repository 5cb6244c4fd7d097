"""STTS: a scorer inside a frame-wise vision tower, for whole videos.

Zhang et al., "Unified Spatio-Temporal Token Scoring", 2026, https://arxiv.org/abs/2603.18004.
Before block l+1 every patch group of every frame gets a score in (0, 1) (`vtc.modules.stts`). It
biases the attention of that one block, which is how gradients reach it; behind that block the
lowest groups of the whole video are dropped, the first frame stays, and dropped groups never become
tokens of the language model. The site is block l+1: the paper's l = 3 is `vision.4`.

Differs from the paper and its code: the group is whatever becomes one token of the language model
(3 x 3 patches in Molmo2, 2 x 2 in Qwen, LLaVA-OneVision and InternVL). `keep` counts exactly,
budgets smaller than the first frame drop from it too. The loss skips the first frame of every
video, not of the batch, and padding is masked. Frames lie one behind the other and attend to
themselves by segments (cu_seqlens); packing="bins" packs first-fit decreasing as published, with
`refill`, but never opens a bin for a frame that lost everything. Survivors keep their positions.
Images are untouched. Without `weights` the scorer is random: an untrained stand-in, which the
report says; `stts_heuristic` needs no weights.

When to use: videos, when you can train: it drops inside the vision tower, so tower, projector and
language model all get cheaper. Untrained it is of no use; see `stts_heuristic`.

Cost: in one block, attention of one query per patch group and an MLP on every group; dropped groups
save all blocks behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..context import Context, Layout
from ..errors import InvalidInput, InvalidRecipe
from ..modules.stts import TokenScorer, attention_bias, similarity_loss
from ..plan import Plan
from ..reducer import Decision, Selector, top_k
from ..registry import register


@register("stts")
@dataclass(frozen=True)
class STTS(Selector):
    """Keeps the patch groups of a video that a trained scorer in its vision tower ranks highest.

    Args:
        weights: safetensors file of a trained scorer (`session.modules[site].save`, or the released
            scorer's weights under their own names); None for a random one.
        bias: bias the attention of the block behind the site; weights trained with it need it.
        bias_axis: what scores are rescaled over: "row" (as published), "frame" or "video".
        detach_target: no gradient through the target of the temporal loss, for a frozen tower.
        packing: "segments", or "bins" of one frame's length; `refill`: with bins, a frame alone in
            its bin keeps all its patches to the end of the tower.
        frames_per_video: for models that are given frames as images (LLaVA, InternVL).
    """

    weights: str | None = None
    bias: bool = True
    bias_axis: Literal["row", "frame", "video"] = "row"
    detach_target: bool = False
    packing: Literal["segments", "bins"] = "segments"
    refill: bool = False
    frames_per_video: int | None = None

    paper: ClassVar[str] = "STTS, 2026, https://arxiv.org/abs/2603.18004"
    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    default_at: ClassVar[str] = "vision.4"

    def __post_init__(self) -> None:
        if self.refill and self.packing != "bins":
            raise InvalidRecipe("stts: refill=True fills bins: use packing='bins' with it.")
        if self.frames_per_video is not None and self.frames_per_video < 2:
            raise InvalidRecipe(
                f"stts: frames_per_video={self.frames_per_video}, a video has 2 or more."
            )

    def note(self, module: Any) -> str | None:
        if self.weights is None:
            return "the scorer is random unless this session trained it: give weights=path"
        return None

    def build(self, blocks: Sequence[nn.Module]) -> TokenScorer:
        scorer = TokenScorer.beside(blocks[0])
        if self.weights is not None:
            scorer.load(self.weights)
        return scorer.eval()  # training switches the temporal loss on: `.train()`

    def decide(self, module: Any, ctx: Context, k: tuple[int, ...]) -> Decision:
        bias = torch.zeros(ctx.visual.shape, device=ctx.x.device, dtype=torch.float32)
        losses: list[Tensor] = []  # of all grids, in the order of `terms`
        terms: list[int] = []

        def score(x: Tensor, grid: Layout, rows: list[int]) -> Tensor:
            groups = x.unflatten(-1, (-1, module.dim))
            scores = module(groups)
            if module.training and torch.is_grad_enabled():
                terms.append(scores[:, 1:].numel())
                losses.append(similarity_loss(scores, groups, self.detach_target) * terms[-1])
            cells = scores.unflatten(2, (grid.height, grid.width))
            bias[rows, : grid.n] = attention_bias(cells, self.bias_axis).flatten(1)
            return scores

        plan = best_of_videos(ctx, k, score)
        loss = torch.stack(losses).sum() / sum(terms) if losses else None
        lean = bias if self.bias else None
        return Decision(plan, lean, loss, self.packing == "bins", self.refill)


def best_of_videos(
    ctx: Context, k: tuple[int, ...], score: Callable[[Tensor, Layout, list[int]], Tensor]
) -> Plan:
    """The k[r] best groups of every video, over all its frames, its first frame before all others;
    images (videos of one frame) keep everything. Of groups with equal scores the last ones stay.

    score: of videos x [V, T, P, U] of one grid, which are these rows of ctx: [V, T, P].
    """
    if None in ctx.layout or ctx.counts != ctx.original:
        raise InvalidInput(
            f"whole videos of known grids are scored, but there are {ctx.counts} of {ctx.original} "
            f"tokens of the grids {ctx.layout}: drop nothing in front of it"
        )
    videos: dict[Layout, list[int]] = {}
    for row, grid in enumerate(ctx.layout):
        if grid is not None and grid.frames > 1:
            videos.setdefault(grid, []).append(row)
    ranks = torch.zeros(ctx.visual.shape, device=ctx.x.device, dtype=torch.float32)
    keep = list(ctx.counts)
    for grid, rows in videos.items():
        scores = score(ctx.x[rows, : grid.n].unflatten(1, (grid.frames, -1)), grid, rows).detach()
        first = torch.arange(grid.frames, device=ranks.device) == 0
        ranks[rows, : grid.n] = (scores + 100.0 * first[:, None].float()).flatten(1)
        for row in rows:
            keep[row] = k[row]
    places = ranks.argsort(stable=True, dim=1).argsort(1)  # the later of equal ones ranks higher
    return top_k(ranks.where(ranks.isnan(), places), ctx.visual, tuple(keep))
