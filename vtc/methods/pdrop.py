"""PyramidDrop: drop in stages, more the deeper the layer.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", CVPR 2025, https://arxiv.org/abs/2410.17247. At the start of layers L/4, L/2
and 3L/4 the share lambda, lambda^2, lambda^3 of the ORIGINAL tokens stays (lambda = 0.5; section
3.2). Ranking at a boundary: attention row of the last instruction token, from the q and k of the
layer about to run, mean over heads.

Differs from the released code: `keep` is the share after the last stage (default 0.125, so lambda
= keep^(1/3)); original positions are kept (the code renumbers them after every stage); left padding
and several images are allowed. Half a token counts as one: a share of .5 of 729 keeps 365, in the
code 364.

When to use: when the question should decide and losing little matters more than saving much: tokens
go step by step, deep layers alone see few of them.

Cost: one attention row at each stage, and all four projections of that layer's attention once more,
of which only queries and keys are read: about 4 L D^2 multiply-adds per stage for the L tokens of
the prompt that are left. The first quarter of the layers sees all visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..context import Context
from ..errors import InvalidBudget
from ..reducer import Scorer
from ..registry import register

STAGES = 3


@register("pdrop")
@dataclass(frozen=True)
class PyramidDrop(Scorer):
    """Keeps, in three stages, what the last prompt token is about to attend to."""

    paper: ClassVar[str] = "PyramidDrop, CVPR 2025, https://arxiv.org/abs/2410.17247"
    sites: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs: ClassVar[frozenset[str]] = frozenset({"attn_ahead"})
    default_at: ClassVar[str] = "decoder.2"

    def places(self, depth: int, keep: float | int | None) -> dict[str, float | int]:
        """Three boundaries at a quarter, half and three quarters of the depth."""
        last = 0.125 if keep is None else keep
        if isinstance(last, int):
            raise InvalidBudget(
                f"pdrop: keep={last} is a token count; its pyramid needs the share that is left "
                f"after the last stage, e.g. keep=0.125, or a schedule {{layer: keep}}."
            )
        if depth <= STAGES:
            raise InvalidBudget(f"pdrop needs more than {STAGES} decoder layers, this has {depth}.")
        step = last ** (1 / STAGES)
        layers = [max(1, round(depth * (s + 1) / (STAGES + 1))) for s in range(STAGES)]
        return {f"decoder.{layer}": step ** (s + 1) for s, layer in enumerate(layers)}

    def score(self, ctx: Context) -> Tensor:
        return ctx.signals["attn_ahead"].mean(1)  # [R, H, N] -> [R, N]
