"""FasterVLM: the tokens that the class token of the vision tower attends to.

Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
Inference Faster", 2024, https://arxiv.org/abs/2412.01818. Score: attention of the CLS token in the
layer whose features are used, mean over heads; the highest stay, in their old order. Every tile of
a tiled image gets the same share of the budget.

Differs from the paper: towers without a CLS token rank by the mean attention that a token receives;
tokens keep their positions (the released code counts those of the shorter prompt anew:
positions="renumber").
At `vision.<i>` (ours) tokens go early, ranked by the block that has just run, as image encoders
that are made faster on their own do it. Differs from the released code: what unpadding has left of
a tile is ranked, so budgets are met; a newline goes when its line has no token left (the code keeps
all); both keep newlines on top of the budget.

When to use: in front of the language model where the vision tower has a class token, when choosing
has to cost nothing; in image encoders at `vision.<i>.mlp`. It prefers what stands out in the
picture, whatever the question is.

Cost: one attention row of one block of the tower, from its queries and keys: about N D
multiply-adds. No attention map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..algorithms.tiles import top_of_tiles
from ..context import Context
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Method):
    """Keeps the tokens that the class token attends to most."""

    paper: ClassVar[str] = "FasterVLM, 2024, https://arxiv.org/abs/2412.01818"
    sites: ClassVar[frozenset[str]] = frozenset({"projector", "vision"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_cls", "tile"})

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        return top_of_tiles(ctx, ctx.signals["attn_cls"], k)
