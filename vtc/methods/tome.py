"""ToMe: merge r tokens in every block of a vision transformer, with proportional attention.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, https://arxiv.org/abs/2210.09461.
One `tome_merge` in every block (its file says what differs from the paper), and log(size) added to
the attention logits of merged tokens behind it, inside the fused attention.

Two places. "mlp" is the paper's: between attention and MLP of every block, `vision.<i>.mlp`, on the
image encoders that offer it. "block" is before every block but the first, by the keys of the block
that has just run: one MLP more sees the unmerged tokens, and the paper's merge behind the last
attention is left out. That is what vision towers of language models offer.

When to use: image encoders that answer with one label or vector, without training: the smallest
loss of the training-free methods here. Not where single places matter, as in segmentation.

Cost: in every block cosines between the two halves of n tokens over the channels C of one head's
keys: about n^2 C / 4 multiply-adds. Reads keys; attention stays fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..budget import Keep
from ..errors import InvalidBudget, InvalidRecipe, UnsupportedSite
from ..reducer import Composite, Host, Part
from ..registry import register


@register("tome")
@dataclass(frozen=True)
class ToMe(Composite):
    """Keeps means of similar tokens, merged a few at a time in every block.

    Args:
        r: tokens merged per block, at most half of what is there; 8 without r and keep (the paper:
            8 to 16 for ViT-B at 224 px). Or (r, slope) with a float from -1 to 1: from
            r (1 - slope) in the first block, rounded down, linearly to as much more or less than r
            in the last, so (r, -1.0) is the paper's decreasing schedule. Or one number for each
            block.
        place: "mlp" or "block"; by default the paper's where the model offers it.
        prop_attn: proportional attention (off for models that were trained with ToMe without it).

    Instead of r, keep=0.25 (a share) merges equally many tokens per block until that share is left.
    No token is lost, so merge="nearest" has nothing to do and is refused.
    """

    r: int | tuple[int | float, ...] | None = None
    place: Literal["mlp", "block"] | None = None
    prop_attn: bool = True

    paper: ClassVar[str] = "ToMe, ICLR 2023, https://arxiv.org/abs/2210.09461"
    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    merging: ClassVar[bool] = True
    default_at: ClassVar[str] = "vision.1"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        places = self._places(host)
        mass = 1.0 if self.prop_attn else 0.0
        if keep in (None, "auto"):
            numbers = per_block(8 if self.r is None else self.r, len(places))
            return tuple(
                Part("tome_merge", at, "auto", {"r": n}, mass)
                for at, n in zip(places, numbers, strict=True)
            )
        if self.r is not None:
            raise InvalidBudget(f"tome: give r={self.r!r} or keep={keep!r}, not both.")
        if not isinstance(keep, float):
            raise InvalidBudget(
                f"tome: keep={keep!r} is a number of tokens, which cannot be shared out over the "
                f"blocks before the image is seen: give a share such as keep=0.25, or r=13."
            )
        shares = [1 - (1 - keep) * (j + 1) / len(places) for j in range(len(places))]
        return tuple(
            Part("tome_merge", at, share, mass=mass)
            for at, share in zip(places, shares, strict=True)
        )

    def _places(self, host: Host) -> list[str]:
        offered = host.sites or [f"vision.{i}" for i in range(23)]
        inner = [site for site in offered if site.startswith("vision.") and site.endswith(".mlp")]
        outer = [s for s in offered if s.startswith("vision.") and s not in (*inner, "vision.0")]
        places = {"mlp": inner, "block": outer, None: inner or outer}[self.place]
        if not places:
            what = "" if self.place is None else f" with place={self.place!r}"
            raise UnsupportedSite(
                f"tome: this model has no vision blocks in which tokens can be merged{what}."
            )
        return sorted(places, key=lambda site: int(site.split(".")[1]))


def per_block(r: Any, blocks: int) -> list[int]:
    """Tokens to merge in each block: an int, (r, slope), or one number per block."""
    given = list(r) if isinstance(r, Sequence) else [r, 0.0]
    if len(given) == 2 and (isinstance(given[1], float) or given[1] < 0):
        first, slope = given
        if not -1 <= slope <= 1:
            raise InvalidRecipe(f"tome: slope {slope} of r={r!r}, use -1.0 (decreasing) to 1.0.")
        low, last = int(first * (1 - slope)), max(1, blocks - 1)
        given = [int(low + 2 * (first - low) * j / last) for j in range(blocks)]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in given)
    if not whole or len(given) != blocks:
        raise InvalidRecipe(
            f"tome: r={r!r}. Give a number such as 13, (r, slope) such as (13, -1.0), or whole "
            f"numbers from 0 for each of the {blocks} blocks."
        )
    return given
