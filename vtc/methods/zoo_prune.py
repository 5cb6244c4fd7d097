"""ZOO-Prune: keep tokens the projector M is sensitive to and that differ from one another.

"Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models" (CVPR
2026), https://arxiv.org/abs/2509.24837. Sensitivity, with m = 64 unit directions u_j for all tokens
and h = 0.01: S_i = mean_j ||M(x_i + h u_j) - M(x_i - h u_j)|| / 2h = E||J(x_i) u|| + O(h^2)
(proposition 3.1). S^ = (S - min) / (max - min + 1e-8) per tower image. First pick argmax S^, then
repeatedly argmax S^_i * min_{j taken} (1 - cos(z_i, z_j)) with z = M(x).

Differs from the released code:
- fp32 (`precision="fp16"` for parity). In Linear -> act -> Linear both leave the difference, the
  second as triangle of its QR (ours: same S, < 1/4 of the work). "jacobian" is ours too.
- Directions are a hash of the seed. Where S varies by < 0.1 % (a linear projector) it is ones, with
  a warning. `rank`: exact SVD of the loaded weights. Positions stay. Qwen: 2x2 tokens as a whole.
- A budget is split evenly over tiles or frames. Newlines go with their line (paper: all stay).

When to use: like `divprune`, with the projector's view of what matters.

Cost: 64 changes of every token through the projector, one closed form in mode="jacobian"; picks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import ops
from ..algorithms.tiles import share, tiles
from ..context import Context
from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel
from ..plan import Plan
from ..reducer import Method
from ..registry import register

CHOICES = {"mode": "auto zoo algebraic jacobian", "precision": "fp32 fp16"}


@register("zoo_prune")
@dataclass(frozen=True)
class ZooPrune(Method):
    """Keeps diverse tokens that the projector reacts to most (zeroth-order sensitivity).

    Args:
        mode: "zoo" = differences of any projector; for two linear layers "algebraic" = the same,
            cheaper, and "jacobian" = closed form; "auto" = algebraic where possible, else zoo.
        directions, step: m and h of the paper.
        rank: singular values of a low-rank copy of both linear layers (paper: 128 for LLaVA-NeXT).
        precision: "fp16" perturbs and projects in half precision (mode "zoo" only).
        diversity: False keeps the highest sensitivities (ablation).
    """

    mode: Literal["auto", "zoo", "algebraic", "jacobian"] = "auto"
    directions: int = 64
    step: float = 0.01
    rank: int | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    diversity: bool = True

    paper: ClassVar[str] = "ZOO-Prune, CVPR 2026, https://arxiv.org/abs/2509.24837"
    sites: ClassVar[frozenset[str]] = frozenset({"projector"})
    needs: ClassVar[frozenset[str]] = frozenset({"projector", "features", "tile"})

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed.split():
                raise InvalidRecipe(f"zoo_prune: {name}={value!r}, use one of: {allowed}.")
        for name, low in (("directions", 1), ("rank", 1), ("step", 1e-30)):
            if (value := getattr(self, name)) is not None and not low <= value < float("inf"):
                raise InvalidRecipe(f"zoo_prune: {name}={value}, use a number of {low} or more.")
        if self.precision == "fp16" and self.mode != "zoo":
            raise InvalidRecipe(f"zoo_prune: precision='fp16' needs mode='zoo', not {self.mode!r}.")

    @torch.no_grad()
    def plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        with torch.autocast(ctx.x.device.type, enabled=False):
            return (self._static if torch.compiler.is_compiling() else self._plan)(ctx, k)

    def _plan(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        keep, flat = torch.zeros_like(ctx.visual), 0
        s = torch.zeros(keep.shape, device=keep.device, dtype=torch.float32)
        s[ctx.visual] = self.sensitivity(ctx, ctx.signals["features"][ctx.visual])
        if not bool(s.isfinite().all()):
            raise InvalidInput("zoo_prune: NaN or infinite sensitivity: features are not finite.")
        for row, budget in enumerate(k):
            members, layout = tiles(ctx, row), ctx.layout[row]
            if len(members) == 1 and layout is not None and layout.frames > 1:
                frame = (ctx.source[row, members[0]] // layout.cells).clamp(max=layout.frames - 1)
                members = [members[0][frame == i] for i in frame.unique()]
            for where, n in share(budget, members):
                picks, constant = self.select(ctx.x[row, where][None], s[row, where][None], n)
                keep[row, where[picks[0]]] = True
                flat += len(where) > 1 and bool(constant)
        if flat:
            projector: Any = ctx.signals["projector"]
            left = "diversity selection" if self.diversity else "token order"
            warnings.warn(
                f"zoo_prune: the sensitivity carries no information in {flat} images or tiles "
                f"(linear projector {projector.structure}, or equal tokens): plain {left} remains.",
                stacklevel=2,
            )
        return Plan.from_mask(keep, k)

    def _static(self, ctx: Context, k: tuple[int, ...]) -> Plan:
        """Without looking at data: one group per row, or one per frame of its layout."""
        (rows, n, d), layout = ctx.x.shape, ctx.layout[0]
        if layout is None or layout.n != n or min(ctx.counts) != n or len(set(ctx.layout)) != 1:
            raise UnsupportedModel("zoo_prune: torch.compile needs images of one known, full grid.")
        size = n // layout.frames
        s = self.sensitivity(ctx, ctx.signals["features"].flatten(0, 1)).reshape(-1, size)
        quotas = [(b + f) // layout.frames for b in k for f in reversed(range(layout.frames))]
        picks, _ = self.select(ctx.x.reshape(-1, size, d), s, max(quotas))
        take = torch.arange(max(quotas), device="cpu") < torch.tensor(quotas, device="cpu")[:, None]
        keep = torch.zeros_like(s, dtype=torch.bool).scatter(1, picks, take.to(s.device))
        return Plan.from_mask(keep.reshape(rows, n), k)

    def sensitivity(self, ctx: Context, x: Tensor) -> Tensor:
        """S of the units x [n, U] -> [n] fp32."""
        projector: Any = ctx.signals["projector"]
        x = x.half() if self.precision == "fp16" else x.float()
        u = ops.unit_directions(self.directions, x.shape[1], ctx.seed, x.device)
        return projector.sensitivity(x, u, self.step, self.mode, self.rank, ctx.x.dtype)

    def select(self, x: Tensor, s: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """n picks of each group from x [G, N, D] and s [G, N], and where s is constant [G]."""
        low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
        constant = high - low <= 1e-3 * s.mean(1, keepdim=True)
        hat = torch.where(constant, 1.0, (s - low) / (high - low + 1e-8))
        if self.diversity:
            picks = ops.maxmin_tokens(x, n, hat >= 0, first=hat.argmax(1), priority=hat)
            return picks[:, :n], constant[:, 0]
        return hat.argsort(dim=1, descending=True, stable=True)[:, :n], constant[:, 0]
