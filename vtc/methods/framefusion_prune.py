"""FrameFusion, pruning: once, by the attention of the last prompt token.

Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large
Vision Language Models", ICCV 2025, https://arxiv.org/abs/2501.01986. When merging is over, tokens
with the lowest attention of the last prompt token (mean over heads) go until the compute budget is
met. keep="auto": as many stay as spend, from this layer to the last, what `cost` leaves; nothing
goes where merging has met it. Paper default: cost 0.3.

Differs from the released code: the attention is that of the layer before, so one MLP more sees all
tokens; q and k are read at the attention function, so no attention map is computed.

When to use: behind `framefusion_merge`, or alone as a FastV whose budget is compute; `framefusion`
is the whole method.

Cost: one attention row of the layer before the site: about N D multiply-adds, from queries and
keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..context import Context
from ..errors import InvalidBudget, InvalidRecipe
from ..plan import Plan
from ..reducer import Method, top_k
from ..registry import register
from .framefusion_merge import left_for


@register("framefusion_prune")
@dataclass(frozen=True)
class FrameFusionPrune(Method):
    """Keeps what the last prompt token attends to, as many as the compute budget allows.

    Args:
        cost: with keep="auto", tokens that the layers of the language model process on average, as
            a share.
    """

    cost: float = 0.3

    paper: ClassVar[str] = "FrameFusion, ICCV 2025, https://arxiv.org/abs/2501.01986"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_last"})
    default_at: ClassVar[str] = "decoder.2"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})
    frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.cost <= 1.0:
            raise InvalidRecipe(f"framefusion_prune: cost={self.cost}: a share, above 0 to 1.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        if k == ctx.counts:  # keep="auto"
            left = left_for(ctx, self.cost)
            if min(left) <= 0:
                raise InvalidBudget(
                    f"framefusion_prune at {ctx.site}: the layers before it have spent the compute "
                    f"budget cost={self.cost}. Put it earlier, merge more, or raise the cost."
                )
            k = tuple(max(1, min(n, round(m))) for n, m in zip(ctx.counts, left, strict=True))
        return top_k(ctx.signals["attn_last"].mean(1), ctx.visual, k)
