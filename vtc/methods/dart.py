"""DART: duplication matters more than importance. Keep what is least like a few pivots.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025, https://arxiv.org/abs/2502.11494. Before layer K (K = 2) 4 visual and 4 text
pivots with the largest L1 norm of their layer K-1 keys are taken (section 4.2); every pivot in turn
adds the m visual tokens that are least cosine-similar to it and not taken yet.

Differs from known ports: the budget is met exactly: the m per pivot are spread so that pivots and
additions make k (a port keeps 4 + 8m); pivots go in the order visual, text, each by norm (a port
iterates a Python set); features are hidden states after the model's final norm, as there; a
text pivot that does not exist (fewer than 4 text tokens behind the image) is replaced by the first
visual pivot.

When to use: inside the language model, when what repeats should go and attention should not decide.
It does not ask what the question is about, so the same tokens stay for every question.

Cost: reads keys of the layer before and hidden states; cosines of N tokens with 8 pivots, about 8 N
D multiply-adds. No attention map. Layers before the site still see all tokens."""

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
        if self.visual_pivots < 1 or self.text_pivots < 0:
            raise InvalidBudget("dart: use visual_pivots >= 1 and text_pivots >= 0.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        s, device = ctx.signals, ctx.x.device
        rows = torch.arange(len(k), device=device)[:, None]
        visual = F.normalize(s["normed"].float(), dim=-1)  # [R, N, D]
        short = max(0, self.text_pivots - s["text_mask"].shape[1])
        text = F.pad(F.normalize(s["text_normed"].float(), dim=-1), (0, 0, 0, short))  # [R, T, D]
        text_mask = F.pad(s["text_mask"], (0, short))
        text_keys = F.pad(s["text_keys"], (0, 0, 0, short))
        own = _by_norm(s["keys"], ctx.visual)[:, : self.visual_pivots]
        other = _by_norm(text_keys, text_mask)[:, : self.text_pivots]
        cosine = torch.cat([visual[rows, own], text[rows, other]], 1) @ visual.transpose(1, 2)
        absent = ~text_mask.gather(1, other)[..., None]
        cosine[:, own.shape[1] :] = torch.where(absent, cosine[:, :1], cosine[:, own.shape[1] :])
        budget = torch.tensor(k, device=device)[:, None]
        first = torch.arange(own.shape[1], device=device) < budget
        keep = torch.zeros_like(ctx.visual).scatter(1, own, first)
        left, pivots = budget - first.sum(1, keepdim=True), cosine.shape[1]
        for i in range(pivots):
            share = (i + 1) * left // pivots - i * left // pivots
            far = cosine[:, i].masked_fill(keep | ~ctx.visual, float("inf"))
            order = far.argsort(dim=1, stable=True)
            rank = torch.arange(order.shape[1], device=device)
            keep = keep | torch.zeros_like(keep).scatter(1, order, rank < share)
        return Plan.from_mask(keep, k)


def _by_norm(keys: Tensor, mask: Tensor) -> Tensor:
    """Token order by falling L1 norm of the keys, absent tokens last."""
    norm = keys.float().abs().sum(-1).masked_fill(~mask, float("-inf"))
    return norm.argsort(dim=1, descending=True, stable=True)
