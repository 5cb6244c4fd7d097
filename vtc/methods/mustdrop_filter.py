"""MustDrop, prefill stage: dual-attention filtering.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
2024, https://arxiv.org/abs/2411.10803. A is the attention, mean over heads, that the text behind
the images pays to the visual tokens in the layer before the site; a_j = sum_i A_ij. Token j is
dropped when it is weak for the text as a whole, a_j < tau_g * sum_j a_j, and weak for every single
text token, max_i A_ij < tau_i, and not in the key set: the ceil(0.08 N) tokens of its tower image
that the CLS token attends to most in the block that reads the features. The paper acts after layers
2, 6, 10 and 14 of 32, so before layers 3, 7, 11, 15. Thresholds (tau_g, tau_i) by budget: 192
tokens (.001, .001), 128 (.0012, .001), 64 (.011, .01), 64 on VizWiz (.005, .001).

Differs from the released code: only the text rows of the attention are computed, from q and k;
padding, batches and several images (each with thresholds of its own) are allowed; towers without
CLS rank by the mean attention that a token receives; positions are kept (the code renumbers them
after every stage). A fixed budget is ours: the k tokens with the largest max(a_j / (tau_g sum a),
max_i A_ij / tau_i), key tokens first; where that ratio reaches 1 the paper keeps the token.

When to use: inside the language model, when any word of the question may point at something small:
a token stays when one word alone attends to it. `mustdrop` is the whole method.

Cost: attention of all T text tokens behind the images in the layer before: about T N D
multiply-adds per filter, from queries and keys, and once the CLS row of the tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Keep
from ..context import Context
from ..errors import InvalidBudget, InvalidRecipe
from ..plan import Plan
from ..reducer import Method, top_k
from ..registry import register

#: layers of 32 after which the paper filters
LAYERS, DEPTH = (2, 6, 10, 14), 32
#: lifts key tokens above every other score
KEY = 1e12


@register("mustdrop_filter")
@dataclass(frozen=True)
class MustDropFilter(Method):
    """Keeps key tokens and what the question, as a whole or any word of it, attends to.

    Args:
        tau_g: least share of the image's attention from the whole text; 1 filters all.
        tau_i: least attention from any text token; 0 filters none.
        key: share of each tower image that is never dropped.
    """

    tau_g: float = 0.001
    tau_i: float = 0.001
    key: float = 0.08

    paper: ClassVar[str] = "MustDrop, 2024, https://arxiv.org/abs/2411.10803"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_text", "cls_rank"})
    default_at: ClassVar[str] = "decoder.3"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def __post_init__(self) -> None:
        for name in ("tau_g", "tau_i", "key"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InvalidRecipe(f"mustdrop_filter: {name}={getattr(self, name)}, use 0 to 1.")

    def places(self, depth: int, keep: Keep | None) -> dict[str, Keep]:
        """After the paper's layers, scaled to the depth. A fixed budget is what the last filter
        leaves; those before it leave geometrically more, the first up to twice as much."""
        after = filtered_after(depth)
        if not after:
            raise InvalidBudget(f"mustdrop filters between layers, and this model has {depth}.")
        more = [2 ** (1 - s / max(len(after) - 1, 1)) for s in range(len(after))]
        more[-1] = 1.0
        budgets: list[Keep] = ["auto"] * len(after)
        if isinstance(keep, int):
            budgets = [round(keep * m) for m in more]
        elif isinstance(keep, float):
            budgets = [min(1.0, keep * m) for m in more]
        return {f"decoder.{layer + 1}": k for layer, k in zip(after, budgets, strict=True)}

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        attention = ctx.signals["attn_text"]  # [R, T, N]
        share, single = attention.sum(1), attention.amax(1)
        total = share.masked_fill(~ctx.visual, 0.0).sum(1, keepdim=True)
        key = ctx.signals["cls_rank"] < self.key
        if k == ctx.counts:  # keep="auto"
            weak = (share < self.tau_g * total) & (single < self.tau_i)
            keep = ctx.visual & (key | ~weak)
            keep[:, 0] |= ctx.visual.any(1) & ~keep.any(1)  # an image never vanishes altogether
            return Plan.from_mask(keep)
        score = _ratio(share, self.tau_g * total).maximum(
            _ratio(single, single.new_tensor(self.tau_i))
        )
        return top_k(score.double() + KEY * key, ctx.visual, k)


def filtered_after(depth: int) -> list[int]:
    """Layers to filter after: scaled to the depth, one apart at least, none after the last."""
    found: list[int] = []
    for layer in LAYERS:
        scaled = math.floor(layer * depth / DEPTH + 0.5)
        found.append(max(scaled, found[-1] + 1) if found else scaled)
    return [layer for layer in found if layer < depth - 1]


def _ratio(value: Tensor, threshold: Tensor) -> Tensor:
    """value / threshold; a threshold of 0 is met by everything, so only the value ranks."""
    return torch.where(threshold > 0, value / threshold.clamp(min=1e-12), value)
