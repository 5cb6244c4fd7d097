"""DivPrune: keep the tokens that are most different from one another.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
2025, https://arxiv.org/abs/2503.02175. Max-min diversity problem (section 3.2), solved greedily:
distance d(i, j) = 1 - cos(x_i, x_j); the first pick is the token whose nearest other token is
farthest; then repeatedly argmax_j min_{i in S} d(i, j) until k tokens are in S.

Differs from the released code: a running minimum gives the same picks, and for N > D there is no
N x N matrix; ties go to the lowest index; distances are clamped at 0; each image of a batch is
solved on its own (the code sees one image); tokens keep their positions (the code counts those of
the shorter prompt anew: positions="renumber").

When to use: the first to try in front of a language model, and the one that gains most from merge
and mass. It needs no attention, no text and no training, so it works in every kind of model. Where
one small detail decides, what is diverse may not be what is asked for.

Cost: about N^2 D multiply-adds for the first pick, which compares all N tokens with each other;
then they are read once per pick: k N D more for k of them, one after the other, so it takes longest
where k is large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..context import Context
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Keeps the most diverse tokens (greedy max-min cosine distance)."""

    paper: ClassVar[str] = "DivPrune, CVPR 2025, https://arxiv.org/abs/2503.02175"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder", "dit"})

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        picks = ops.maxmin_tokens(ctx.x, max(k), ctx.visual)
        keep = torch.zeros_like(ctx.visual)
        if min(k) == max(k):
            return Plan.from_mask(keep.scatter(1, picks, True), k)
        for row, budget in enumerate(k):  # greedy picks are nested: a prefix is the smaller answer
            keep[row, picks[row, :budget]] = True
        return Plan.from_mask(keep, k)
