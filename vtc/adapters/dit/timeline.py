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
    the next step, as samplers of second order (Heun) take two there; at the first step, where these
    take one, they are those of another run: an earlier one was left. `doubtful`: a run that began
    so; it may as well be guidance on images of its own, and each such call begins anew."""

    noise: float = 0.0
    images: Tensor | None = None
    turn: int = 0
    doubtful: bool = False
    branches: list[Branch] = field(default_factory=list)

    def step(self, noise: float, images: Tensor) -> Branch:
        """The branch that this call belongs to."""
        again = noise == self.noise and self._same(images)
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

    def _same(self, images: Tensor) -> bool:
        last = self.images
        return (
            last is not None and images.shape == last.shape and torch.equal(images.to(last), last)
        )

    def _begins(self, noise: float, images: Tensor, again: bool) -> bool:
        if self.images is None or noise > self.noise or images.shape != self.images.shape:
            self.doubtful = False
            return True
        if again or noise < self.noise:
            return False
        self.doubtful = self.doubtful or self.branches[0].calls == 1
        return self.doubtful
