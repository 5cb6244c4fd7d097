"""DART: duplication matters more than importance. Keep what is least like a few pivots.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025, https://arxiv.org/abs/2502.11494. Before layer K (K = 2) 4 visual and 4 text
pivots with the largest L1 norm of their layer K-1 keys are taken (section 4.2); every pivot in turn
adds the m visual tokens that are least cosine-similar to it and not taken yet.

Differs from known ports: the budget is met exactly: the m per pivot are spread so that pivots and
additions make k (a port keeps 4 + 8m); pivots go in the order visual, text, each by norm (a port
iterates a Python set); features are hidden states after the model's final norm, as there; with
fewer than 4 visual tokens in the budget, or no text behind the image, there are fewer pivots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..context import Context
from ..errors import InvalidBudget
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("dart")
@dataclass(frozen=True)
class DART(Method):
    """Keeps tokens least similar to a few pivot tokens.

    Args:
        visual_pivots, text_pivots: how many of each (paper: 4 and 4).
    """

    visual_pivots: int = 4
    text_pivots: int = 4

    paper: ClassVar[str] = "DART, EMNLP 2025, https://arxiv.org/abs/2502.11494"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset(
        {"keys", "text_keys", "text_mask", "normed", "text_normed"}
    )
    default_at: ClassVar[str] = "decoder.2"

    def __post_init__(self) -> None:
        if (
            self.visual_pivots < 0
            or self.text_pivots < 0
            or self.visual_pivots + self.text_pivots < 1
        ):
            raise InvalidBudget("dart: give at least one pivot; counts cannot be negative.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        s = ctx.signals
        text_mask = s["text_mask"]
        visual = F.normalize(s["normed"].float(), dim=-1)  # [R, N, D]
        text = F.normalize(s["text_normed"].float(), dim=-1)  # [R, T, D]
        rank = _by_norm(s["keys"], ctx.visual)
        text_rank = _by_norm(s["text_keys"], text_mask)
        texts = text_mask.sum(1).tolist()
        keep = torch.zeros_like(ctx.visual)
        for row, budget in enumerate(k):
            own = rank[row, : min(self.visual_pivots, budget)]
            other = text_rank[row, : min(self.text_pivots, int(texts[row]))]
            keep[row, own] = True
            pivots = torch.cat([visual[row, own], text[row, other]])
            cosine = (pivots @ visual[row].T).masked_fill(~ctx.visual[row], float("inf"))
            left = budget - len(own)
            for i in range(len(pivots)):
                share = (i + 1) * left // len(pivots) - i * left // len(pivots)
                order = cosine[i].masked_fill(keep[row], float("inf")).argsort(stable=True)
                keep[row, order[:share]] = True
        return Plan.from_mask(keep, k)


def _by_norm(keys: Tensor, mask: Tensor) -> Tensor:
    """Token order by falling L1 norm of the keys, absent tokens last."""
    norm = keys.float().abs().sum(-1).masked_fill(~mask, float("-inf"))
    return norm.argsort(dim=1, descending=True, stable=True)
