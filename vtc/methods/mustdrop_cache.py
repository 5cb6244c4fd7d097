"""MustDrop, decode stage: the output-aware KV policy.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
2024, https://arxiv.org/abs/2411.10803. After the prefill every layer from the first filtered one on
(2 of 32) keeps only the columns of those visual tokens that survived the last filter; text columns
and the layers before keep everything. Nothing is evicted later. In spite of its name the stage does
not look at the output: it carries the prefill's decision over to the early layers.

Differs from the released code: new tokens keep their positions (the code counts them from each
layer's own length, so that queries stand before keys that they see), every depth is cut (the code
stops at 32 layers), sliding-window layers keep their window. Works behind any method that drops
inside the language model.

When to use: behind a method that drops inside the language model, when answers are long: early
layers then forget in the cache what later ones never saw. It saves memory and decoding time only.

Cost: none: it copies the decision of the prefill, and the columns that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..context import Context
from ..errors import InvalidRecipe
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("mustdrop_cache")
@dataclass(frozen=True)
class MustDropCache(Method):
    """Keeps, in the cache of every layer, the visual columns that survived the prefill.

    Args:
        first: layers before this one keep all their columns.
    """

    first: int = 2

    paper: ClassVar[str] = "MustDrop, 2024, https://arxiv.org/abs/2411.10803"
    sites: ClassVar[frozenset[str]] = frozenset({"cache"})
    needs: ClassVar[frozenset[str]] = frozenset({"survivors"})
    default_at: ClassVar[str] = "cache"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto"})

    def __post_init__(self) -> None:
        if self.first < 0:
            raise InvalidRecipe(f"mustdrop_cache: first={self.first}, layers count from 0.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        early = ctx.site.layer is not None and ctx.site.layer < self.first
        return Plan.from_mask(ctx.visual if early else ctx.signals["survivors"])
