"""FlexDiT (SparseDiT): which block does what, how many tokens there are, and the new weights.

Chang et al., "SparseDiT", NeurIPS 2025, https://arxiv.org/abs/2412.06028 (FlexDiT in its first
version)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import InvalidInput, InvalidRecipe
from ..plan import Plan
from .weights import load_weights, save_weights

Grid = tuple[int, int]
#: blocks that generate sparse tokens, work on them, recover dense ones, work on those
Group = tuple[int, int, int, int]
Hold = Literal["clean", "noisy"]
Role = Literal["pool", "generate", "sparse", "recover", "dense"]


def roles(
    depth: int, poolingformers: int, modules: int | None, group: Group, top: int | None
) -> tuple[Role, ...]:
    """What each of `depth` blocks does: poolingformers, then that many groups, then dense blocks.

    modules, top: None for as many groups as fit, and for all blocks behind them."""
    generate, sparse, recover, dense = group
    if generate != 1 or recover != 1 or min(sparse, dense, poolingformers) < 0:
        raise InvalidRecipe(
            f"flexdit: poolingformers={poolingformers} and group={group}: a group is (1, sparse, "
            f"1, dense), as it makes sparse tokens and recovers dense ones once; none is negative."
        )
    behind = depth - poolingformers
    if modules is None:
        modules = max(behind - (top or 0), 0) // sum(group)
        if not modules:
            raise InvalidRecipe(
                f"flexdit: no group of {sum(group)} blocks fits into this model of {depth} behind "
                f"{poolingformers} poolingformers: give a smaller group=, at least (1, 0, 1, 0)."
            )
    above = behind - modules * sum(group) if top is None else top
    total = poolingformers + modules * sum(group) + above
    if min(modules, above) < 0 or total != depth:
        raise InvalidRecipe(
            f"flexdit: {poolingformers} poolingformers, {modules} groups of {sum(group)} and "
            f"top={top} do not make the {depth} blocks of this model: change them, or leave "
            f"preset, modules and top out."
        )
    one: list[tuple[Role, int]]
    one = [("generate", 1), ("sparse", sparse), ("recover", 1), ("dense", dense)]
    order: list[tuple[Role, int]] = [("pool", poolingformers), *one * modules, ("dense", above)]
    return tuple(role for role, blocks in order for _ in range(blocks))


# ---------------------------------------------------------------------- how many tokens


@dataclass(frozen=True)
class Schedule:
    """Share of tokens that sparse blocks do without, by how noisy the images are.

    Attributes:
        least, most: the share for data and for noise; equal ones are a static schedule.
        hold: "clean": `least` up to a noise of 1/4, then linear to `most` at 1, as the paper says;
            "noisy": linear up to 3/4, then `most`, which gives the FLOPs that it prints.
        intervals: of equal length, in each of which training has one share, that of its middle.
    """

    least: float
    most: float
    hold: Hold = "clean"
    intervals: int = 8

    def __post_init__(self) -> None:
        if not 0.0 <= self.least <= self.most < 1.0:
            raise InvalidRecipe(
                f"flexdit: rate=({self.least}, {self.most}): shares of tokens to do without, for "
                f"data and for noise, from 0 to below 1 and not falling, such as (0.61, 0.86)."
            )
        if self.intervals < 1:
            raise InvalidRecipe(f"flexdit: intervals={self.intervals}, training has 1 or more.")

    def pruned(self, noise: float) -> float:
        """The share at a noise from 0 (data) to 1."""
        way = (4 * noise - 1) / 3 if self.hold == "clean" else 4 * noise / 3
        return self.least + (self.most - self.least) * min(max(way, 0.0), 1.0)

    def of_batch(self, noise: float, least: float, training: bool) -> float:
        """The share for samples between two noises. One noise has its own; a mixed batch, and
        training, that of an interval."""
        if self.least == self.most or (noise == least and not training):
            return self.pruned(noise)
        inside = self._interval(noise)
        if self._interval(least) != inside:
            raise InvalidInput(
                f"flexdit: samples of this batch are {least:.3f} to {noise:.3f} noisy, which is "
                f"more than one of the {self.intervals} intervals that have a number of tokens: "
                f"draw timesteps by `Schedule.draw`, or set rate to two equal numbers."
            )
        return self.pruned((inside + 0.5) / self.intervals)

    def _interval(self, noise: float) -> int:
        place = math.floor(noise * self.intervals + 1e-6)  # 1e-6: timesteps are rounded shares
        return min(max(place, 0), self.intervals - 1)

    def draw(self, batch: int, generator: torch.Generator, steps: int = 1000) -> Tensor:
        """[batch] timesteps from 0 to steps - 1 for one step of training: an interval, and every
        sample uniform inside it. All steps together are uniform."""
        if steps < self.intervals:
            raise InvalidInput(f"flexdit: {steps} timesteps for {self.intervals} intervals: raise.")
        cuts = [-(-i * steps // self.intervals) for i in range(self.intervals + 1)]
        place = int(torch.randint(steps, (), generator=generator))
        inside = max(i for i, cut in enumerate(cuts[:-1]) if cut <= place)
        return torch.randint(cuts[inside], cuts[inside + 1], (batch,), generator=generator)


def small_grid(grid: Grid, pruned: float) -> Grid:
    """Rows and columns of sparse tokens: each side by the root of the share that stays, rounded."""
    height, width = (min(max(round(n * math.sqrt(1 - pruned)), 1), n) for n in grid)
    return height, width


# ---------------------------------------------------------------------- between dense and sparse


def pooled(x: Tensor, grid: Grid, small: Grid) -> Tensor:
    """Means of cells: [R, H W, C] -> [R, h w, C]; cells share tokens where h does not divide H."""
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, small).permute(0, 2, 3, 1).flatten(1, 2)


def nearest(grid: Grid, small: Grid, rows: int, device: torch.device) -> Plan:
    """Each token of the grid in the slot of its nearest sparse token, which sits on its first."""
    (height, width), (down, across) = grid, small
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    slot = (y * down // height)[:, None] * across + x * across // width
    y, x = torch.arange(down, device=device), torch.arange(across, device=device)
    first = -(-y * height // down)[:, None] * width - (-x * width // across)
    index, assign = (t.flatten().expand(rows, -1) for t in (first, slot))
    return Plan(index, height * width, assign=assign)


class Recovery(nn.Module):
    """Dense tokens from sparse ones and those before: Up(sparse) W1 + b1 + dense W2 + b2, at the
    start the dense ones alone. W1 acts before the upsampling, where there are fewer tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.eye(width))
        self.b1, self.b2 = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, sparse: Tensor, dense: Tensor, grid: Grid, small: Grid) -> Tensor:
        """[R, h w, C] and [R, H W, C] -> [R, H W, C]."""
        up = nearest(grid, small, len(dense), dense.device)
        beside = F.linear(dense, self.w2, self.b2)
        return ops.restore(up, F.linear(sparse, self.w1, self.b1), beside)


class SparseDense(nn.Module):
    """A recovery for each group of blocks. `roles`: of all blocks of the model."""

    def __init__(self, width: int, roles: Sequence[Role]) -> None:
        super().__init__()
        self.width, self.roles = width, tuple(roles)
        self.recoveries = nn.ModuleList(Recovery(width) for r in roles if r == "recover")

    @classmethod
    def beside(cls, block: Any, roles: Sequence[Role]) -> SparseDense:
        """As wide as this block of a model, on its device, in its dtype."""
        attention = block.attn1 if hasattr(block, "attn1") else block.attn
        linear = next(m for m in attention.modules() if isinstance(m, nn.Linear))
        return cls(linear.in_features, roles).to(linear.weight.device, linear.weight.dtype)

    def recovery(self, block: int) -> Recovery:
        """That of a block that recovers."""
        found = self.recoveries[self.roles[:block].count("recover")]
        assert isinstance(found, Recovery)
        return found

    def _about(self) -> dict[str, str]:
        return {"roles": " ".join(self.roles)}

    def save(self, path: str | Path) -> None:
        """Write the weights to a safetensors file; the blocks are the model's, which has its own
        way to be saved."""
        save_weights(self, path, self._about())

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote; raises where it does not fit."""
        load_weights(self, path, self._about())
