"""ToCa: a diffusion transformer keeps what its blocks computed and updates the tokens that matter.

Zou et al., "Accelerating Diffusion Transformers with Token-wise Feature Caching", ICLR 2025,
https://arxiv.org/abs/2410.05317. A whole step keeps the outputs of attention and MLP of every block
(before their gates, which always are fresh). At the steps between, attention is as it was, and the
MLP runs for the tokens with the highest l2-normed attention received + 0.25 * age / interval, where
the highest of every cell x cell tokens is raised. With s steps left of S, counted down, s is whole
if it is a multiple of the interval: round(interval / (1.4 - 0.8 s / S)), or 2 for 0.2 S <= s < 0.4
S, as the last whole step had it. That step itself goes by it from its second block on: where it is
no multiple, the first alone is whole (2 of 50 steps, 2 of 250), as in the released code. PixArt: s
counts up, 0.8 + 0.4 s / S; Flux: the first three, then every fourth. The share of tokens varies
over the steps (it grows; PixArt's falls, as released) and over the blocks.

Differs from the paper: cross-attention to the prompt always runs, so there is no entropy of it to
score with, and text models score as DiT does. Latte's blocks over time and SD3's second attention
always run as well. Where rotary positions or text go along with the attention (SD3, Flux, Wan) the
score is the length of values; that is what "flux" stands for. The depth of a block of Flux counts
through both kinds. Where guidance puts two prompts into one batch, each chooses by itself unless
pairs=True. A share is rounded down to tokens. Where the number of steps is not given, the share of
noise stands for s / S, and a step is whole so many steps behind the last one that was.

When to use: diffusion transformers with many steps, without training. Compare with fewer sampler
steps first. Where attention is costly to read, take score="value" or `duca`.

Cost: the whole attention map at whole steps (unless score="value"), which no fused kernel gives;
keeps the output of attention and MLP of every block in memory from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..algorithms.token_cache import ARGUMENTS, TokenCache
from ..registry import register


@register("toca")
@dataclass(frozen=True)
class ToCa(TokenCache):
    """Keeps outputs of blocks from step to step; MLPs run again for tokens with high scores."""

    __doc__ = f"{__doc__}{ARGUMENTS}"

    paper: ClassVar[str] = "ToCa, ICLR 2025, https://arxiv.org/abs/2410.05317"
