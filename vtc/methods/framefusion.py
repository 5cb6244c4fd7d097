"""FrameFusion: merge what repeats between frames, then prune once by importance.

Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large
Vision Language Models", ICCV 2025, https://arxiv.org/abs/2501.01986. The steps are
`framefusion_merge` before the first layers and `framefusion_prune` behind them; their files say
what each does differently from the paper. The budget is compute: the tokens that the layers of the
language model process on average, as a share of all. Paper defaults: cost 0.3, threshold 0.6.

Differs from the released code: the number of merging layers is fixed (the code goes on until a
layer merges less than a tenth). Without `keep` how much each of them merges is up to the threshold,
and pruning meets the cost. `keep` is that cost as a fixed schedule: each merging layer and the
pruning keep the same share r of what they get, so that r + r^2 + ... over the layers averages to
`keep`.

When to use: videos, when the budget is compute: repeats go in the first layers, then what the
question ignores. With hard cuts between frames little merges, and pruning has to do all.

Cost: that of its steps: cosines of neighbours in every merging layer and one attention row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..budget import Keep
from ..errors import InvalidBudget, InvalidRecipe
from ..reducer import Composite, Host, Part
from ..registry import register


@register("framefusion")
@dataclass(frozen=True)
class FrameFusion(Composite):
    """Keeps repeated tokens once, then what the last prompt token attends to.

    Args:
        cost: with keep="auto", tokens that the layers process on average, as a share.
        threshold: with keep="auto", least similarity of tokens that merge.
        merges: layers, from the first one on, before which tokens are merged.
    """

    cost: float = 0.3
    threshold: float = 0.6
    merges: int = 2

    paper: ClassVar[str] = "FrameFusion, ICCV 2025, https://arxiv.org/abs/2501.01986"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    default_at: ClassVar[str] = "decoder.0"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})
    frames: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.merges < 1:
            raise InvalidRecipe(f"framefusion: merges={self.merges}, but it is at least 1.")

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        if isinstance(keep, int):
            raise InvalidBudget(
                f"framefusion: keep={keep} is a token count; its budget is the share of tokens "
                f"that layers process on average, e.g. keep=0.3."
            )
        if host.depth <= self.merges:
            raise InvalidBudget(
                f"framefusion: merging before {self.merges} layers leaves none to prune in; this "
                f"model has {host.depth}."
            )
        if keep in (None, "auto") and self.merges >= self.cost * host.depth:
            raise InvalidBudget(
                f"framefusion: if nothing is similar, the {self.merges} layers before pruning "
                f"alone cost {self.merges / host.depth:.0%} of all {host.depth}, and cost is "
                f"{self.cost:.0%}. Use fewer merges, a higher cost, or keep={self.cost}."
            )
        layers = range(self.merges + 1)
        budgets: Sequence[Keep] = ["auto" for _ in layers]
        shared, merging = {"cost": self.cost}, {"cost": self.cost, "threshold": self.threshold}
        if keep is not None and keep != "auto":  # a fixed schedule
            ratio = even_ratio(keep, self.merges, host.depth)
            budgets, shared, merging = [ratio ** (layer + 1) for layer in layers], {}, {}
        parts = [
            Part("framefusion_merge", f"decoder.{layer}", budgets[layer], merging)
            for layer in layers[:-1]
        ]
        return (*parts, Part("framefusion_prune", f"decoder.{layers[-1]}", budgets[-1], shared))


def even_ratio(cost: float, merges: int, depth: int) -> float:
    """r with r + r^2 + ... + r^merges + (depth - merges) * r^(merges + 1) = cost * depth."""
    low, high = 0.0, 1.0
    for _ in range(60):
        r = (low + high) / 2
        spent = sum(r ** (i + 1) for i in range(merges)) + (depth - merges) * r ** (merges + 1)
        low, high = (r, high) if spent < cost * depth else (low, r)
    return high
