"""STTS-heuristic: the ranking of STTS by change alone, a training-free stand-in for its scorer.

After Zhang et al., "Unified Spatio-Temporal Token Scoring", 2026,
https://arxiv.org/abs/2603.18004, whose temporal loss teaches scores to follow 1 - c, where c is the
cosine of a patch group with itself in the frame before. Here the score is 1 - c itself, scaled to
0..1 over the video: no weights, no bias on attention, and nothing makes a group important but that
it changed. The paper finds rankings of this kind about a point below random dropping. Everything
else is as in `stts`: the whole video is ranked, its first frame stays, tokens are dropped behind
the block at the site, images are untouched.

When to use: videos, to save in the vision tower too without training, and as the floor for `stts`.

Cost: one cosine per patch group, in one block: about N D multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..context import Context, Layout
from ..reducer import Decision, Selector
from ..registry import register
from .stts import STTS, best_of_videos


@register("stts_heuristic")
@dataclass(frozen=True)
class STTSHeuristic(Selector):
    """Keeps the patch groups of a video that changed most since the frame before.

    Args:
        frames_per_video: for models that are given frames as images (LLaVA, InternVL).
    """

    frames_per_video: int | None = None

    paper: ClassVar[str] = "stand-in for STTS, 2026, https://arxiv.org/abs/2603.18004"
    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    default_at: ClassVar[str] = STTS.default_at
    trained: ClassVar[bool] = False

    def build(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return nn.Module()

    def decide(self, module: Any, ctx: Context, k: tuple[int, ...]) -> Decision:
        return Decision(best_of_videos(ctx, k, change))


def change(x: Tensor, grid: Layout, rows: list[int]) -> Tensor:
    """1 - cosine with the frame before, of videos [V, T, P, U], scaled to 0..1: [V, T, P]."""
    changed = F.pad(1 - ops.temporal_cosine(x), (0, 0, 1, 0))
    low, high = torch.aminmax(changed[:, 1:].flatten(1), dim=1)
    scaled = (changed - low[:, None, None]) / (high - low + 1e-6)[:, None, None]
    return scaled.clamp(min=0.0)
