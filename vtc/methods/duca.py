"""DuCa: steps that update some tokens, as ToCa does, take turns with steps that run no block.

Zou et al., "Accelerating Diffusion Transformers with Dual Feature Caching", 2024,
https://arxiv.org/abs/2412.18911. Between two whole steps every other one is a step of ToCa with
fewer tokens; at the others what left the last block leaves it again. The code for PixArt and
Open-Sora counts up: tokens run at the first, third, ... step after a whole one. The code for DiT
counts down: they run an odd number of steps before the next whole one. Presets follow the code for
their model. Tokens are scored by the length of their values, summed over heads, instead of the
attention they receive, so attention stays fused.

Differs from the released code: a longer value is a higher score (there a shorter one is, by 1 minus
the length in each head). For Flux, which it has not, shares and raised scores are those of ToCa;
what ToCa does differently here holds too (see `vtc show toca`).

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
        "pixart": {"score": "value", "share": 0.75, "slope": 0.0},
        "flux": {"score": "value"},
    }

    paper: ClassVar[str] = "DuCa, 2024, https://arxiv.org/abs/2412.18911"

    def reuses(self, place: int) -> bool:
        return place % 2 == 0
