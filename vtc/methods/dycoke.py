"""DyCoke: drop what repeats from frame to frame, then trim the KV cache for the answer.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025,
https://arxiv.org/abs/2411.15024. The steps are `dycoke_ttm` behind the projector and `dycoke_cache`
behind the prefill; their files say what each does differently from the paper (the second decides
once instead of in every decode step).

Budgets: without `keep` the paper's prune = 0.7 of three frames in four; `keep` is an exact number
or share for the first step. The cache step keeps the share 1 - prune_cache of what is left;
keep=1.0 keeps everything, so that step is left out.

When to use: videos with long answers: the first step shortens the prefill, the second the KV cache
that every word of the answer reads. Short answers gain from the first step alone.

Cost: that of its two steps: cosines of neighbouring frames, and in the cache one attention row per
layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import Keep
from ..errors import UnsupportedSite
from ..reducer import Composite, Host, Part
from ..registry import register


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(Composite):
    """Keeps what is new in a frame, and for the answer what the model looks at.

    Args:
        prune: share of the tokens of three frames in four that goes.
        prune_cache: share of the visual columns that goes behind the prefill.
        first: layers before this one keep all their columns.
        decode: whether the second step runs.
    """

    prune: float = 0.7
    prune_cache: float = 0.7
    first: int = 3
    decode: bool = True

    paper: ClassVar[str] = "DyCoke, CVPR 2025, https://arxiv.org/abs/2411.15024"
    sites: ClassVar[frozenset[str]] = frozenset({"projector", "cache"})
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})
    frames: ClassVar[bool] = True

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        budget = "auto" if keep is None else keep
        parts = [Part("dycoke_ttm", "projector", budget, {"prune": self.prune})]
        decode = self.decode and budget != 1.0
        if decode and not host.has("cache"):
            raise UnsupportedSite(
                "dycoke: this model has no site 'cache' for the decode stage. Leave that stage "
                "out with decode=False."
            )
        if decode:
            params = {"prune": self.prune_cache, "first": self.first}
            parts.append(Part("dycoke_cache", "cache", "auto", params))
        return tuple(parts)
