"""EVS: of every frame, the tokens that changed since the frame before.

Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM
Inference", 2025, https://arxiv.org/abs/2510.14624. Dissimilarity of a token: 1 - cosine with the
token at the same cell of the frame before; the first frame is infinitely dissimilar; over the whole
clip the k highest stay, with their positions.

Differs from the paper: tokens behind the projector are compared, as in the code of vLLM, not pixels
(so the vision tower still encodes everything). There k is at least one frame. Here any k is met: a
budget below one frame would hold nothing but a part of the first, so then the first frame competes,
each token with 1 - cosine to that frame's mean. first="score" lets it compete always: at small
budgets a first frame that is kept whole leaves too little for the others. An image is a first frame
that competes.

When to use: videos with a still background: what moves stays. The cheapest of the methods for
videos, and blind to the question. Few, distant frames have little in common, so there it gains
little.

Cost: one cosine per token: about N D multiply-adds. Reads tokens only; the vision tower still
encodes every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algorithms.frames import FrameScorer, change
from ..registry import register


@register("evs")
@dataclass(frozen=True)
class EVS(FrameScorer):
    """Keeps the tokens that differ most from the same place of the frame before.

    Args:
        first: "keep" keeps all of the first frame where the budget holds it (paper); "score" lets
            it compete by how much a token differs from that frame's mean.
    """

    first: Literal["keep", "score"] = "keep"

    paper: ClassVar[str] = "EVS, 2025, https://arxiv.org/abs/2510.14624"

    def rank(self, x: Tensor, k: tuple[int, ...]) -> Tensor:
        score = change(x)
        if self.first == "score":
            return score
        above = [float("inf") if budget >= x.shape[2] else 0.0 for budget in k]
        start = (
            score[:, :1] + torch.tensor(above, device=x.device, dtype=torch.float32)[:, None, None]
        )
        return torch.cat([start, score[:, 1:]], 1)
