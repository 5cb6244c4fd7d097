"""VidCom2: frames that stand out get more tokens, and of every frame its least typical ones stay.

Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large
Language Models", EMNLP 2025, https://arxiv.org/abs/2505.14454. x: tokens on the half of the
channels that vary least over the video, normalised. Likeness to a mean c:
g(x, c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - c|^2 / 2a). Frames: u_f = - mean of
g(x, video mean), p = softmax(u / 0.01), rate r_f = r (1 + p_f - mean p), at most 1. Tokens: the
r_f share with the lowest g(x, video mean) + g(x, frame mean). Paper default: keep 25 %.

Differs from the released code: the budget is exact (frames share k in proportion to r_f, what a
full frame cannot take goes to the others, rounding by largest remainder), so that a frame comes out
empty only where there are fewer tokens than frames; rows of newlines are what the model makes of
them, one token behind a video stays. Where the video is one image, g sees one mean twice.

When to use: videos in which some frames stand out, in front of the language model, with merge and
mass. It does not look at the question.

Cost: distances to the mean of the frame and of the video on half of the channels: about N D
multiply-adds and a few exponentials per token. Reads tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..algorithms.frames import FrameScorer, highest, share
from ..errors import InvalidRecipe
from ..registry import register

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(FrameScorer):
    """Keeps the least typical tokens, and more of frames that stand out.

    Args:
        temperature: how sharply frames that stand out are told from the others.
    """

    temperature: float = 0.01

    paper: ClassVar[str] = "VidCom2, EMNLP 2025, https://arxiv.org/abs/2505.14454"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InvalidRecipe(f"vidcom2: temperature={self.temperature}, but it is above 0.")

    def places(self, depth: int, keep: float | int | None) -> dict[str, float | int]:
        """A quarter of the tokens."""
        return {self.default_at: 0.25 if keep is None else keep}

    def rank(self, x: Tensor, k: tuple[int, ...]) -> Tensor:
        x = steady_half(x)
        video = likeness(x, x.mean((1, 2), keepdim=True))  # [R, T, C]
        frame = likeness(x, x.mean(2, keepdim=True))
        apart = torch.softmax(-video.mean(2).double() / self.temperature, 1)
        quota = share(1 + apart - apart.mean(1, keepdim=True), k, x.shape[2])
        return highest(-(video + frame), quota[..., None]).float()


def steady_half(x: Tensor) -> Tensor:
    """x [R, T, C, D] on the D / 2 channels with the lowest variance, normalised, in fp32."""
    wide = x.float()
    spread = wide.var((1, 2), correction=0)  # [R, D]
    low = spread.topk(max(1, spread.shape[1] // 2), largest=False).indices
    index = low[:, None, None].expand(-1, *x.shape[1:3], -1)
    return F.normalize(wide.gather(3, index), dim=-1)


def likeness(x: Tensor, centre: Tensor) -> Tensor:
    """g [R, T, C] of x [R, T, C, D] and centres that broadcast to it."""
    distance = (x - centre).square().sum(-1)
    return sum((torch.exp(-distance / (2 * a)) for a in WIDTHS), torch.zeros_like(distance))
