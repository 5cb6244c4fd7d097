"""FastV: after an early layer, visual tokens that the last prompt token ignores can go.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024,
https://arxiv.org/abs/2403.06764. Score of token j before layer K: mean over heads of the attention
that the last prompt token pays to j in layer K-1 (section 4.1). Original positions are kept.
Paper defaults: K = 2, keep 50 %.

Differs from the released code: scores come from q and k at the attention function, so no attention
map is computed; the last prompt token is found per sample, so padding is allowed; the budget is
per image (`scope="sample"` ranks all images of a prompt together, as the code does). Half a token
counts as one: keep=.5 of 729 keeps 365, in the code 364.

When to use: when the question should decide which tokens stay and a small saving is enough: the
first layers see everything. A good second step behind a method in front of the language model.

Cost: one attention row of the layer before the site: about N D multiply-adds, from queries and
keys, so attention stays fused. Layers before the site still see all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..context import Context
from ..reducer import Scorer
from ..registry import register


@register("fastv")
@dataclass(frozen=True)
class FastV(Scorer):
    """Keeps the tokens that the last prompt token attends to most.

    Args:
        pool: how heads are combined, "mean" (paper) or "max".
    """

    pool: Literal["mean", "max"] = "mean"

    paper: ClassVar[str] = "FastV, ECCV 2024, https://arxiv.org/abs/2403.06764"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_last"})
    default_at: ClassVar[str] = "decoder.2"

    def places(self, depth: int, keep: float | int | None) -> dict[str, float | int]:
        """Layer 2, half of the tokens."""
        return {self.default_at: 0.5 if keep is None else keep}

    def score(self, ctx: Context) -> Tensor:
        attention = ctx.signals["attn_last"]  # [R, H, N]
        return attention.mean(1) if self.pool == "mean" else attention.amax(1)
