"""Bipartite soft matching of ToMe: of every second token, the most similar ones are merged away.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, https://arxiv.org/abs/2210.09461,
section 3 and appendix D. Tokens are split alternately into A and B; every token of A looks for the
most similar token of B by the cosine of attention keys (mean over heads); the r best pairs merge
into their size-weighted mean.

Differs from the paper: prefix tokens (CLS, registers, distillation) take no part, so that r is
limited to half of the patches; the second, fourth, ... patch is A, as in the paper with one CLS
token in front; tokens keep their order, so later splits differ. A budget below half of the tokens
is reached in several rounds, keys being averaged like tokens. At `vision.<i>.mlp` it acts where the
paper does, at `vision.<i>` one MLP later (see `tome`).

When to use: one merge at one block, in recipes of your own; `tome` has one in every block.

Cost: cosines between the two halves of N tokens over the channels C of one head's keys: about N^2 C
/ 4 multiply-adds, again for every further halving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import ops
from ..algorithms.matching import merge_pairs
from ..context import Context
from ..errors import InvalidRecipe
from ..plan import Plan
from ..reducer import Method
from ..registry import register

#: the tokens that are merged away, and those that they merge into
SECOND, FIRST = slice(1, None, 2), slice(0, None, 2)


@register("tome_merge")
@dataclass(frozen=True)
class ToMeMerge(Method):
    """Keeps one mean token of every most similar pair (one step of ToMe).

    Args:
        r: tokens to merge away with keep="auto", at most half of them.
    """

    r: int = 8

    paper: ClassVar[str] = "ToMe, ICLR 2023, https://arxiv.org/abs/2210.09461"
    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    merging: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"vision_keys"})
    default_at: ClassVar[str] = "vision.1"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def __post_init__(self) -> None:
        if self.r < 0:
            raise InvalidRecipe(f"tome_merge: r={self.r}, but tokens to merge are 0 or more.")

    def left(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - min(self.r, n // 2) for n in counts)

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        keys = ctx.signals["vision_keys"]
        sized = "token_size" in ctx.signals
        size = ctx.signals["token_size"] if sized else ctx.visual.float()
        plan, counts, valid = None, ctx.counts, ctx.visual
        while plan is None or counts != k:
            step = tuple(max(want, n - n // 2) for want, n in zip(k, counts, strict=True))
            now = merge_pairs(keys, size, valid, counts, step, SECOND, FIRST)
            plan, counts = now if plan is None else plan.then(now), now.kept
            if counts != k:
                keys, valid = ops.apply(now, keys), now.slots
                size = now.size if now.size is not None else size
        return plan
