"""Where a denoising run is, from the timesteps that a model is called with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    shape; calls at the same noise are branches."""

    noise: float = 0.0
    shape: tuple[int, ...] = ()
    turn: int = 0
    branches: list[Branch] = field(default_factory=list)

    def step(self, noise: float, shape: tuple[int, ...]) -> Branch:
        """The branch that this call belongs to."""
        turn = self.turn + 1 if noise == self.noise else 0
        begins = not self.branches or noise > self.noise or shape != self.shape
        if begins or turn == MOST:
            self.branches, turn = [], 0
        self.turn = turn
        self.noise, self.shape = noise, shape
        if self.turn == len(self.branches):
            self.branches.append(Branch())
        branch = self.branches[self.turn]
        branch.calls += 1
        return branch
