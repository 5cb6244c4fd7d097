"""Random: every token has the same chance. The floor that any method has to beat.

Differs from common practice: a token's draw depends on its place on the image and on the seed only,
so batches, devices and torch.compile change nothing and the global random state is not touched.

When to use: always, beside any other method: what is not better than random is not worth its cost.
In videos and inside language models it is a strong floor.

Cost: one hash per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..context import Context
from ..reducer import Scorer
from ..registry import register


@register("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Keeps tokens drawn uniformly, without replacement."""

    paper: ClassVar[str] = "baseline"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "projector", "decoder", "cache", "dit"})

    def score(self, ctx: Context) -> Tensor:
        return ops.hash_uniform(ctx.source, ctx.seed)
