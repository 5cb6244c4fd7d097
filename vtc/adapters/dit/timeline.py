"""Where a denoising run is, from the timesteps that a model is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: branches at most; a model that is called more often at one noise is not sampling
MOST = 4


@dataclass
class Branch:
    """One of the calls at every step: guidance may call the model once per prompt."""

    calls: int = 0
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Timeline:
    """Calls so far. A run begins when the images are noisier than at the last call or have another
    shape; calls with the same images at the same noise are branches. Other images at that noise are
    those of another run: an earlier one was left behind its first step."""

    noise: float = 0.0
    images: Tensor | None = None
    turn: int = 0
    branches: list[Branch] = field(default_factory=list)

    def step(self, noise: float, images: Tensor) -> Branch:
        """The branch that this call belongs to."""
        again = noise == self.noise
        turn = self.turn + 1 if again else 0
        if self._begins(noise, images, again) or turn == MOST:
            self.branches, turn = [], 0
        if turn == 0:
            self.images = images.detach().clone()  # samplers may write into theirs
        self.turn, self.noise = turn, noise
        if self.turn == len(self.branches):
            self.branches.append(Branch())
        branch = self.branches[self.turn]
        branch.calls += 1
        return branch

    def _begins(self, noise: float, images: Tensor, again: bool) -> bool:
        last = self.images
        if last is None or noise > self.noise or images.shape != last.shape:
            return True
        return again and not torch.equal(images.to(last), last)
