"""Random: every token has the same chance. The floor that any method has to beat.

Differs from common practice: draws from a generator of its own, per forward, so the same seed
gives the same tokens and the global random state is never touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..context import Context
from ..reducer import Scorer
from ..registry import register


@register("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Keeps tokens drawn uniformly, without replacement."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder"})

    def score(self, ctx: Context) -> Tensor:
        """One draw per place on the image, the same for every row, so batches change nothing."""
        generator = torch.Generator().manual_seed(ctx.seed)
        draw = torch.rand(max(ctx.original), generator=generator)
        return draw.to(ctx.x.device)[ctx.source]
