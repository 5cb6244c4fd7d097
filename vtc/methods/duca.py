"""DuCa: steps that update some tokens, as ToCa does, take turns with steps that run no block.

Zou et al., "Accelerating Diffusion Transformers with Dual Feature Caching", 2024,
https://arxiv.org/abs/2412.18911. Behind a whole step the first, third, ... are those of ToCa with
fewer tokens, at the second, fourth, ... what left the last block leaves it again. Tokens are scored
by the length of their values instead of the attention they receive, so attention stays fused.

Differs from the paper: a longer value is a higher score. For PixArt and Flux shares and raised
scores are those of ToCa; what ToCa does differently here holds too (see `vtc show toca`).

When to use: diffusion transformers, as `toca`, where speed counts more: half of its steps run
almost nothing and its scores leave attention fused. Compare with fewer sampler steps first.

Cost: at whole steps the length of every value; keeps the output of attention and MLP of every block
in memory from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..algorithms.token_cache import ARGUMENTS, TokenCache
from ..registry import register

_DIT = {"share": 0.05, "bonus": 0.8, "score": "value"}


@register("duca")
@dataclass(frozen=True)
class DuCa(TokenCache):
    """Keeps outputs of blocks from step to step as ToCa; every other such step runs no block."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    own: ClassVar[dict[str, dict[str, Any]]] = {
        "dit": _DIT,
        "dit_ddim50": _DIT,
        "dit_ddpm250": _DIT,
        "pixart": {"score": "value"},
        "flux": {"score": "value"},
    }

    paper: ClassVar[str] = "DuCa, 2024, https://arxiv.org/abs/2412.18911"

    def reuses(self, since: int) -> bool:
        return since % 2 == 0
