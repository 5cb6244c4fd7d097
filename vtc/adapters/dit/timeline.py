"""Where a denoising run is, from what a model is called with: timestep, images, prompt."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidInput
from ..slot import Slot

#: branches at most; a model that is called more often at one noise is not sampling
MOST = 4
#: runs that were left, of which the last images are remembered
LEFT = 8
#: where two runs began alike, images continue those that are nearer than the others by this factor
NEARER = 0.8


@dataclass
class Branch:
    """Calls with one prompt whose images get less noisy: guidance may call the model once per
    prompt, each with a branch of its own.

    Attributes:
        about: the prompt; None where the model is given none, or where nothing is kept.
        noise, images: of the last call.
        calls: so far.
        state: what methods keep from call to call.
    """

    about: Tensor | None = None
    noise: float = 1.0
    images: Tensor | None = None
    calls: int = 0
    state: dict[Any, Any] = field(default_factory=dict)

    def has(self, images: Tensor) -> bool:
        """Whether these were the images of its last call."""
        return _equal(images, self.images)

    def distance(self, images: Tensor) -> Tensor:
        assert self.images is not None
        return (images.float() - self.images.to(images.device).float()).norm()


@dataclass
class Timeline:
    """Calls so far of one thread, or of one run that the caller named.

    A run begins when the images are noisier than at the last call or have another shape. Within it
    a call goes on with the branch of its prompt; one with the same images at the same noise is one
    of several with that prompt. Other images at that noise are the next step, as samplers of second
    order (Heun) take two there; at the first step, where these take one, a run begins (`doubtful`:
    the one before may as well go on). Calls of which it cannot be said whose they are begin anew,
    or are refused where two runs began alike.
    """

    named: bool = False
    noise: float = 0.0
    shape: torch.Size | None = None
    doubtful: bool = False
    branches: list[Branch] = field(default_factory=list)
    left: deque[Branch] = field(default_factory=lambda: deque(maxlen=LEFT))

    def step(self, noise: float, images: Tensor, about: Tensor | None = None) -> Branch:
        """The branch that this call belongs to."""
        if noise > self.noise or images.shape != self.shape:
            self._leave()
            self.doubtful = False
        branch = self._next(noise, images, about)
        if branch is not None and branch.noise == noise and (branch.calls == 1 or self.doubtful):
            self._leave()
            self.doubtful, branch = not self.named, None
        elif branch is not None and not self._continues(branch, noise, images):
            self._leave()
            branch = None
        if branch is None:
            if len(self.branches) == MOST:
                self._leave()
            branch = Branch(about)
            self.branches.append(branch)
        self.noise, self.shape = noise, images.shape
        branch.noise, branch.images = noise, self._kept(images)
        branch.calls += 1
        return branch

    def _next(self, noise: float, images: Tensor, about: Tensor | None) -> Branch | None:
        """The first branch of this prompt that did not see these images yet."""
        for branch in self.branches:
            seen = branch.noise == noise and branch.has(images)
            if not seen and (about is branch.about or _equal(about, branch.about)):
                return branch
        return None

    def _kept(self, images: Tensor) -> Tensor:
        return images.detach().clone()  # samplers may write into theirs

    def _leave(self) -> None:
        for branch in self.branches:
            if branch.state.get("method"):
                self.left.append(Branch(branch.about, branch.noise, branch.images, branch.calls))
        self.branches = []

    def _continues(self, branch: Branch, noise: float, images: Tensor) -> bool:
        """Whether these images come from those of the branch, not from a run that was left and had
        the same prompt. Looks at images only where there is one."""
        if self.named or not branch.state.get("method"):
            return True
        rivals = [
            run
            for run in self.left
            if run.noise > noise
            and run.images is not None
            and run.images.shape == images.shape
            and (run.about is branch.about or _equal(run.about, branch.about))
        ]
        if not rivals:
            return True
        others = torch.stack([run.distance(images) for run in rivals]).amin()
        if not self.doubtful:  # a run may be the same as one that was left: as near is enough
            return bool(branch.distance(images) <= others)
        if bool(branch.distance(images) < NEARER * others):
            self.doubtful = False
            return True
        raise InvalidInput(
            f"two runs of the sampler began at the same noise with the same prompt, and these "
            f"images, {noise:.3f} noisy, may be of either: what is kept of one is not right for "
            f"the other. Where several pictures are denoised in turns, name the run of every call: "
            f"`with session.stream(name): model(...)`. Where the first one was left, call "
            f"session.reset() before the next one begins."
        )


class Timelines:
    """Those of a session: one for every name, and one for the calls of each thread without one."""

    def __init__(self) -> None:
        self._unnamed: Slot[Timeline | None] = Slot("vtc_dit_timeline", None)
        self._named: dict[Hashable, Timeline] = {}
        self._lock = threading.Lock()

    def of(self, name: Hashable | None) -> Timeline:
        if name is not None:
            with self._lock:
                return self._named.setdefault(name, Timeline(named=True))
        timeline = self._unnamed.get()
        if timeline is None:
            timeline = Timeline()
            self._unnamed.set(timeline)
        return timeline

    def forget(self, name: Hashable | None) -> None:
        """What is kept of this run."""
        if name is None:
            self._unnamed.set(None)
        with self._lock:
            self._named.pop(name, None)

    def clear(self) -> None:
        self._unnamed.set(None)
        with self._lock:
            self._named.clear()


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one.to(other.device), other)
