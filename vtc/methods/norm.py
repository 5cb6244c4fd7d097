"""Feature norm: tokens with large vectors carry information (or are artefacts).

A baseline without a paper of its own; high-norm artefact tokens of large ViTs are described in
Darcet et al., "Vision Transformers Need Registers", 2024, https://arxiv.org/abs/2309.16588.

When to use: as a third floor beside `random` and `grid`: where it is ahead of them, length tells
something in that model. In image encoders it was behind both here.

Cost: one length per token: N D multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..context import Context
from ..reducer import Scorer
from ..registry import register


@register("norm")
@dataclass(frozen=True)
class Norm(Scorer):
    """Keeps the tokens with the largest L2 norm."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder", "dit"})

    def score(self, ctx: Context) -> Tensor:
        return ctx.x.float().norm(dim=-1)
