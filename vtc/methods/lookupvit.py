"""LookupViT inside somebody's encoder: few compressed tokens go through its blocks and look up all
the others.

Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", ECCV 2024,
https://arxiv.org/abs/2407.12753. `vtc.modules.lookupvit` is the network as published; here the
blocks of the host are its refine step, as they are, and gather, infuse and lookup MLP are side
weights: gather before each block, infuse and lookup MLP behind it.

Differs from the paper, which knows no host: prefix tokens (class, registers) stay and look up too;
the grid is resized where it enters the first block, behind a norm that stands in front of it (CLIP)
and at the resolution of units, the patches that become one token of a language model; there is no
lookup head, so the last block has no infusion. Whether the paper normalises the attention again
when lookup tokens hear back is unverified, see `infuse_norm`. Without `weights` this is a warm
start: the encoder on resized tokens, until the side weights are trained.

When to use: image encoders, and towers that keep whole grids, when you can train side weights and
want large savings at a small loss; one file of weights serves every grid.

Cost: every block attends between M compressed tokens and all N, once each way, and an MLP runs on
all N once; the blocks themselves run on M tokens. The report counts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..context import Context, Layout
from ..errors import InvalidInput, InvalidRecipe
from ..modules.lookup_side import InfuseNorm, LookupSides
from ..modules.lookupvit import resize_matrix
from ..plan import Plan
from ..reducer import Rewrite, Rewriter
from ..registry import register


@dataclass
class Streams(Rewrite):
    """Both streams in one forward: z_p goes through the blocks, z_l [R, N, D] waits beside."""

    side: LookupSides
    lookup: Tensor
    weights: Tensor | None = None  # attention of the last gather, until it is handed back

    def before(self, i: int, x: Tensor) -> Tensor:
        self.flops += len(x) * self.side[i].flops(x.shape[1], self.lookup.shape[1])
        x, self.weights = self.side[i].gather(x, self.lookup)
        return x

    def after(self, i: int, x: Tensor) -> Tensor:
        side, weights = self.side[i], self.weights
        if side.infuse and weights is not None:
            self.lookup = side.infuse_into(self.lookup, x, weights)
        self.weights = None
        return x


@register("lookupvit")
@dataclass(frozen=True)
class LookupViT(Rewriter):
    """Keeps a resized grid of compressed tokens, which look up all the others before each block.

    Args:
        grid: compressed tokens along height and width, any size up to the encoder's own.
        weights: safetensors file of trained side weights, as `session.modules[site].save` writes
            it; None for a warm start, an untrained stand-in.
        lookup_ratio: hidden width of the MLP of lookup tokens, in the encoder's width.
        infuse_norm: weights of what lookup tokens hear: "none": those that were gathered with;
            "softmax": their logits with a softmax over the compressed tokens; "col": the first,
            divided by the sum of what a lookup token receives. Weights need the one they were
            trained with.
    """

    grid: tuple[int, int] = (5, 5)
    weights: str | None = None
    lookup_ratio: float = 0.5
    infuse_norm: InfuseNorm = "none"

    paper: ClassVar[str] = "LookupViT, ECCV 2024, https://arxiv.org/abs/2407.12753"
    sites: ClassVar[frozenset[str]] = frozenset({"vision"})
    default_at: ClassVar[str] = "vision.0"

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise InvalidRecipe(f"lookupvit: grid={self.grid}, use numbers from 1 on.")

    def note(self, module: Any) -> str | None:
        if any(bool(side.gather_proj.weight.any()) for side in module.blocks):
            return None
        return "an untrained stand-in: the encoder on resized tokens until side weights are trained"

    def build(self, blocks: Sequence[nn.Module]) -> LookupSides:
        side = LookupSides(blocks, self.lookup_ratio, self.infuse_norm)
        if self.weights is not None:
            side.load(self.weights)
        return side

    def start(self, module: Any, ctx: Context) -> Rewrite:
        layout = ctx.layout[0]
        if layout is None or set(ctx.layout) != {layout} or set(ctx.counts) != {layout.n}:
            raise InvalidInput(
                f"lookupvit resizes whole grids of one size, but {set(ctx.counts)} tokens of the "
                f"grids {set(ctx.layout)} are there: let nothing drop tokens in front of it"
            )
        (height, width), plan = self.grid, self._plan(ctx, layout)
        side = math.isqrt(ctx.x.shape[-1] // module.dim)  # of the square of patches in one unit
        lookup = _patches(ctx.x, layout.height, layout.width, side)  # [R, N, D]
        tokens = ctx.x
        if (height, width) != (layout.height, layout.width):
            patches = (layout.height * side, layout.width * side)
            matrix = resize_matrix(patches, (height * side, width * side), device=ctx.x.device)
            tokens = _units(matrix.to(lookup.dtype) @ lookup, height, width, side)
        return Streams(plan, tokens, module, lookup)

    def _plan(self, ctx: Context, layout: Layout) -> Plan:
        """Each compressed token on the cell under its centre, each cell with the token whose centre
        is nearest."""
        (height, width), rows, device = self.grid, len(ctx.counts), ctx.x.device
        if layout.frames != 1 or height > layout.height or width > layout.width:
            raise InvalidInput(
                f"lookupvit: grid={self.grid} does not fit into {layout.frames} x {layout.height} "
                f"x {layout.width} tokens (frames, height, width) at {ctx.site}: give a grid of at "
                f"most that size, of single images"
            )
        (y, near_y), (x, near_x) = (
            ((2 * torch.arange(m, device=device) + 1) * n // (2 * m),
             (2 * torch.arange(n, device=device) + 1) * m // (2 * n))
            for m, n in ((height, layout.height), (width, layout.width))
        )  # fmt: skip
        index = (y[:, None] * layout.width + x).flatten().expand(rows, -1)
        assign = (near_y[:, None] * width + near_x).flatten().expand(rows, -1)
        m = height * width
        size = torch.full((rows, m), layout.n / m, device=device, dtype=torch.float32)
        return Plan(index, layout.n, assign=assign, size=size)


def _patches(x: Tensor, height: int, width: int, side: int) -> Tensor:
    """Units [R, height * width, side * side * D] -> their patches in raster order [R, ., D]."""
    x = x.unflatten(-1, (side, side, -1)).unflatten(1, (height, width))
    return x.transpose(2, 3).flatten(1, 4)


def _units(x: Tensor, height: int, width: int, side: int) -> Tensor:
    """The way back."""
    x = x.unflatten(1, (height, side, width, side)).transpose(2, 3)
    return x.flatten(3).flatten(1, 2)
