"""VisionZip: dominant tokens by tower attention, the rest merged into a few contextual tokens.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
https://arxiv.org/abs/2412.04467. Dominant: highest attention of the CLS token in the layer whose
features are used (section 3.2). Contextual: of the remaining tokens every (m // c)-th is a target;
the others go to the target with the highest key cosine; token = target + mean(assigned). The paper
keeps 54 dominant and 10 contextual tokens of 64, of every tile where an image is cut into tiles:
tiles share the budget evenly, and nothing merges from one into another.

Differs from the released code: merges embeddings after the projector instead of tower features
before it (the seam that all families share); the CLS token itself is not one of the dominant tokens
(transformers drops it before the projector); towers without CLS rank by the mean attention that a
token receives, as the paper does for Qwen; contextual tokens stay at their target's place, in
reading order, instead of behind the dominant ones; all keep their positions in the prompt (the code
counts those of the shorter prompt anew: positions="renumber").

When to use: in front of the language model, where the vision tower has a class token and its
attention lies on what matters. It merges by itself and does not look at the question, so an image
can be compressed once for many.

Cost: one attention row of one block of the tower, then cosines of the others with the c contextual
tokens: about c N C multiply-adds. Reads attention and keys of the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..algorithms.tiles import best, share, tiles
from ..context import Context
from ..errors import InvalidBudget
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps tokens the vision tower attends to, merges the others into contextual tokens.

    Args:
        contextual: share of the budget that goes to contextual tokens (paper: 10 of 64).
    """

    contextual: float = 10 / 64

    paper: ClassVar[str] = "VisionZip, CVPR 2025, https://arxiv.org/abs/2412.04467"
    sites: ClassVar[frozenset[str]] = frozenset({"projector"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_cls", "vision_keys", "tile"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual < 1.0:
            raise InvalidBudget(f"visionzip: contextual={self.contextual}, use 0 <= share < 1.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        keys = F.normalize(ctx.signals["vision_keys"].float(), dim=-1)  # [R, N, C]
        keep = torch.zeros_like(ctx.visual)
        goes_to = torch.full(ctx.visual.shape, -1, device=ctx.x.device)
        for row, budget in enumerate(k):
            for places, n in share(budget, tiles(ctx, row)):
                c = min(n - 1, round(n * self.contextual))
                if n:
                    keep[row, best(ctx.signals["attn_cls"][row], places, n - c)] = True
                if not n or not c:
                    continue
                m = len(places) - n + c  # tokens that are not dominant
                rest = places[torch.argsort(keep[row, places].to(torch.uint8), stable=True)[:m]]
                target = rest[:: m // c][:c]
                keep[row, target] = True
                near = target[(keys[row, rest] @ keys[row, target].T).argmax(-1)]
                goes_to[row, rest] = near
                goes_to[row, target] = -1
        plan = Plan.from_mask(keep, k)
        slot = plan.destination()
        merged = goes_to >= 0
        assign = torch.where(merged, slot.gather(1, goes_to.clamp(min=0)), slot)
        members = torch.zeros(keep.shape[0], plan.m, device=ctx.x.device, dtype=torch.float32)
        members = members.scatter_add(1, assign.clamp(min=0), merged.float())
        part = 1 / members.gather(1, assign.clamp(min=0)).clamp(min=1)
        weight = torch.where(merged, part, (slot >= 0).float())
        size = torch.where(plan.slots, members + 1, 0.0)
        return Plan(plan.index, plan.n, plan.counts, assign, weight, size)
