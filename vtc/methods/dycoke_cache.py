"""DyCoke, decode stage: the answer is written from the visual columns that its layers look at.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025,
https://arxiv.org/abs/2411.15024 (dynamic KV cache reduction). From layer 3 on, the share 1 - prune
of the visual columns that get most attention (mean over heads) is attended to. Paper default:
prune = 0.7, that is keep="auto"; an exact budget holds from the same layer on.

Differs from the paper, in more than detail: the paper chooses anew in every decode step, by the
attention of the new token in the layer before, and deletes nothing. Here the choice is made once,
behind the prefill, by the attention of the last prompt token, whose output the first word is; every
layer chooses by its own attention; and the other columns are deleted. So memory is saved, which a
view of the whole cache would not, and a column that only a later word would need is gone. Layers
with a sliding window keep their window.

When to use: long answers, behind a step that shortens the prefill: it saves memory and time of
decoding only. The choice suits the first word of the answer best.

Cost: one attention row, of the last prompt token, in every layer from `first` on, once behind the
prefill: about N D multiply-adds a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..context import Context
from ..errors import InvalidRecipe
from ..plan import Plan
from ..reducer import Method, top_k
from ..registry import register


@register("dycoke_cache")
@dataclass(frozen=True)
class DyCokeCache(Method):
    """Keeps, in the cache of every layer, the visual columns that the last prompt token looks at.

    Args:
        prune: with keep="auto", share of the visual columns that goes.
        first: layers before this one keep all their columns.
    """

    prune: float = 0.7
    first: int = 3

    paper: ClassVar[str] = "DyCoke, CVPR 2025, https://arxiv.org/abs/2411.15024"
    sites: ClassVar[frozenset[str]] = frozenset({"cache"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_last"})
    default_at: ClassVar[str] = "cache"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})
    frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.prune < 1.0:
            raise InvalidRecipe(f"dycoke_cache: prune={self.prune}: a share, 0 to below 1.")
        if self.first < 0:
            raise InvalidRecipe(f"dycoke_cache: first={self.first}, layers count from 0.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        if ctx.site.layer is not None and ctx.site.layer < self.first:
            return Plan.from_mask(ctx.visual, ctx.counts)
        if k == ctx.counts:  # keep="auto"
            k = tuple(max(1, int((1 - self.prune) * n + 1e-9)) for n in ctx.counts)
        return top_k(ctx.signals["attn_last"].mean(1), ctx.visual, k)
