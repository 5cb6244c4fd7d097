"""One forward of a diffusion transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...context import Layout
from ...plan import Plan
from ...reducer import Passage
from .costs import Work
from .rotary import Shared
from .running import RunningBlock
from .timeline import Branch


@dataclass
class Span:
    """Blocks that work on fewer tokens.

    Attributes:
        plan: which they are, one row per row of x; source: where they sit on the whole grid [B, K].
        whole, short: tokens before the first of these blocks, all and those that stay.
        end: block before which all are there again.
    """

    plan: Plan
    source: Tensor
    whole: Tensor
    short: Tensor
    end: int


@dataclass
class Run:
    """One forward.

    Attributes:
        layout, batch: tokens of a sample, samples.
        noise, least: share of noise in the batch, at most and at least.
        branch: what methods keep between calls.
        context: tokens of the prompt that cross-attention reads; text: beside the image's tokens.
        frames: rows of x that one sample has (Latte).
        passage: what a `Denoiser` does.
        spans: open ones, the innermost last.
        work: of each block that ran so far.
        block: the one that runs; entered: the tokens it was given.
        tables: rotary ones of all tokens; rotated: those that norms apply in place of the model.
    """

    layout: Layout
    batch: int
    noise: float
    least: float
    branch: Branch
    context: int
    text: int = 0
    frames: int = 1
    passage: Passage | None = None
    spans: list[Span] = field(default_factory=list)
    work: dict[int, Work] = field(default_factory=dict)
    block: RunningBlock | None = None
    entered: Tensor | None = None
    tables: Any = None
    rotated: Shared | None = None

    def sources(self, rows: int, count: int, device: torch.device) -> Tensor:
        """[R, N] where the tokens there are sit on the whole grid."""
        if self.spans:
            return self.spans[-1].source
        return torch.arange(count, device=device).expand(rows, -1)

    def places(self, plan: Plan) -> Tensor:
        """[R, M] the same for the tokens that a plan keeps."""
        return plan.index if not self.spans else self.spans[-1].source.gather(1, plan.index)

    def rows(self, plan: Plan) -> Plan:
        """The plan of a video for each of its frames."""
        if self.frames == 1:
            return plan
        parts = (plan.index, plan.assign, plan.weight, plan.size)
        index, *others = (x if x is None else x.repeat_interleave(self.frames, 0) for x in parts)
        assert index is not None
        return Plan(index, plan.n, None, *others)
