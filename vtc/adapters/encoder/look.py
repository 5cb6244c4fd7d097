"""Which encoder a model is, or holds."""

from __future__ import annotations

from torch import nn

from .facts import Facts, look_timm
from .open_clip import look_open_clip, tower


def look(model: nn.Module) -> Facts | str:
    """The facts of a vision transformer of timm or open_clip, or what it lacks."""
    if tower(model) is None:
        return look_timm(model)
    return look_open_clip(model)
