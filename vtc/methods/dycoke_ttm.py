"""DyCoke, prefill stage: in every four frames the first stays, the others keep what is new in them.

Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025,
https://arxiv.org/abs/2411.15024 (temporal token merging). Windows of four frames: frames 1 and 3
are compared with 0 and 2, frame 2 with 0, by the cosine of tokens at the same cell; of each the
floor((1 - prune) * cells) least similar tokens stay. Paper default: prune = 0.7, which leaves 47 %.
In spite of its name the stage drops; merge="nearest" makes it merge.

Differs from the released code: kept tokens stay in order; every frame belongs to a window (the code
loses a last odd frame) and the last window is compressed like the others. keep="auto" is the paper.
An exact budget gives frames shares in the paper's proportion: below 47 % the first frames of
windows shrink too, each compared with the first frame of the window before (the very first with
its own mean), above it they are whole. So a budget below a quarter still looks at all frames. An
image is one first frame.

When to use: videos in which neighbouring frames repeat, in front of the language model. It does not
look at the question, so a video can be compressed once for many.

Cost: one cosine per token of three frames in four: about N D multiply-adds. Reads tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..algorithms.frames import FrameScorer, highest, novelty, shapes, share
from ..context import Context
from ..errors import InvalidRecipe
from ..plan import Plan
from ..registry import register

WINDOW = 4


@register("dycoke_ttm")
@dataclass(frozen=True)
class DyCokeTTM(FrameScorer):
    """Keeps the first of every four frames, and of the others what differs from it.

    Args:
        prune: share of the tokens of the other frames that goes.
    """

    prune: float = 0.7

    paper: ClassVar[str] = "DyCoke, CVPR 2025, https://arxiv.org/abs/2411.15024"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.prune <= 1.0:
            raise InvalidRecipe(f"dycoke_ttm: prune={self.prune}, but it is a share, 0 to 1.")

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        if k == ctx.counts:  # keep="auto"
            k = tuple(
                sum(self._numbers(frames, cells)) + tail
                for frames, cells, tail in shapes(ctx, self.name)
            )
        return super().plan(ctx, k)

    def rank(self, x: Tensor, k: tuple[int, ...]) -> Tensor:
        rows, frames, cells = x.shape[:3]
        # frames whose number is 0 have to take what a budget above all first frames leaves
        weights = [max(n, 1e-3) for n in self._numbers(frames, cells)]
        quota = share(
            torch.tensor([weights] * rows, device=x.device, dtype=torch.float32), k, cells
        )
        return highest(newness(x), quota[..., None]).float()

    def _numbers(self, frames: int, cells: int) -> list[int]:
        """Tokens that the paper keeps of every frame."""
        few = int((1 - self.prune) * cells + 1e-9)
        return [few if frame % WINDOW else cells for frame in range(frames)]


def newness(x: Tensor) -> Tensor:
    """[R, T, C] 1 - cosine of every token of x [R, T, C, D] with its cell in the frame that its
    own is compared with."""
    score = torch.empty(x.shape[:3], device=x.device, dtype=torch.float32)
    score[:, 1::2] = 1 - ops.temporal_cosine(x)[:, ::2]  # 1 with 0, 3 with 2
    score[:, 2::2] = 1 - ops.temporal_cosine(x[:, ::2])  # 2 with 0; 4 with 2 is written over
    score[:, WINDOW::WINDOW] = 1 - ops.temporal_cosine(x[:, ::WINDOW])
    score[:, 0] = novelty(x[:, 0])
    return score
