"""Token merging for diffusion: tokens merge before attention and are copied back behind it.

Bolya, Hoffman, "Token Merging for Fast Stable Diffusion", CVPR workshops 2023,
https://arxiv.org/abs/2303.17604, section 4. In every cell of 2 x 2 tokens one is drawn as a
destination; the others look for the most similar destination by the cosine of what enters the
block, and the most similar of them merge into it, as the plain mean. With ratio r of the paper,
keep = 1 - r (r = .5 by default); at most 3/4 can merge. Where tokens merge is drawn from a
generator of our own, anew at every step, alike in all samples, so that guidance pairs share it.

Differs from the paper, which is about U-Nets: it acts in every block of a diffusion transformer,
around self-attention (`dit.<i>.attn`; at `dit.<i>` whole blocks work on the merged tokens); tokens
of a prompt take no part; the merged tokens get the rotary position of their destination. All blocks
of a step share one draw (the code draws in each). Samples of an odd batch draw too (the code then
takes the first token of each cell). Tokens beside the last whole cell may merge, as in the code.

When to use: diffusion transformers at high resolution, without training and with nothing kept
between steps. Around attention it is careful and saves little, around whole blocks it saves more.

Cost: once for every block where it acts, cosines of all tokens with the destinations, a quarter of
them: about 3 N^2 D / 16 multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..algorithms.matching import merge_pairs
from ..budget import Keep
from ..context import Context, Layout
from ..errors import InvalidBudget, InvalidInput, InvalidRecipe
from ..plan import Plan
from ..reducer import Method
from ..registry import register


@register("tomesd")
@dataclass(frozen=True)
class ToMeSD(Method):
    """Keeps a token of every cell, and of the others the most different ones.

    Args:
        cell: side of a cell in tokens.
    """

    cell: int = 2

    paper: ClassVar[str] = "ToMe for SD, CVPRW 2023, https://arxiv.org/abs/2303.17604"
    sites: ClassVar[frozenset[str]] = frozenset({"dit"})
    merging: ClassVar[bool] = True
    default_at: ClassVar[str] = "dit.0.attn"

    def __post_init__(self) -> None:
        if self.cell < 2:
            raise InvalidRecipe(f"tomesd: cell={self.cell}: a side of 2 tokens or more.")

    def places(self, depth: int, keep: Keep | None) -> Mapping[str, Keep]:
        return dict.fromkeys([f"dit.{i}.attn" for i in range(depth)], 0.5 if keep is None else keep)

    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        layout, rows = ctx.layout[0], ctx.x.shape[0]
        if layout is None or layout.n != ctx.x.shape[1]:
            raise InvalidInput(
                f"tomesd at {ctx.site}: {ctx.x.shape[1]} tokens are no whole grid. It has to be "
                f"the first step that drops."
            )
        if self.cell > min(layout.height, layout.width):
            raise InvalidInput(
                f"tomesd: cell={self.cell} is wider than the grid of {layout.height} x "
                f"{layout.width} tokens: give a smaller one."
            )
        chosen = destinations(layout, self.cell, ctx.seed, ctx.x.device)
        others = torch.ones(layout.n, dtype=torch.bool, device=ctx.x.device)
        others[chosen] = False
        if min(k) < len(chosen):
            raise InvalidBudget(
                f"tomesd keeps one token of {self.cell} x {self.cell} at least, {len(chosen)} of "
                f"{layout.n}, and is asked for {min(k)}: give a higher keep or a larger cell."
            )
        ones = torch.ones(rows, layout.n, device=ctx.x.device, dtype=torch.float32)
        source = others.nonzero()[:, 0]
        return merge_pairs(ctx.x, ones, ctx.visual, ctx.counts, k, source, chosen)


def destinations(layout: Layout, cell: int, seed: int, device: torch.device) -> Tensor:
    """Ascending places of one token of every whole cell of every frame."""
    high, wide = layout.height // cell, layout.width // cell
    number = torch.arange(layout.frames * high * wide, device=device)
    pick = (ops.hash_uniform(number[None], seed)[0] * cell * cell).long().clamp(max=cell**2 - 1)
    frame, inside = number // (high * wide), number % (high * wide)
    row = inside // wide * cell + pick // cell
    column = inside % wide * cell + pick % cell
    return (frame * layout.cells + row * layout.width + column).sort().values
