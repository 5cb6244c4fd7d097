"""Small things that all adapters need on a user's model: a method that is wrapped for a while, and
a look for sessions that are there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import UnsupportedModel


class Wrapped:
    """A method of one object that is wrapped while this lives. The instance gets an attribute, the
    class stays as it is."""

    def __init__(
        self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name)
        vars(owner)[name] = wrap(getattr(owner, name))

    def remove(self) -> None:
        if self.before is None:
            del vars(self.owner)[self.name]
        else:
            vars(self.owner)[self.name] = self.before


def refuse_second(modules: Iterable[nn.Module]) -> None:
    """Raise when hooks of a session are on one of these modules."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            owner = getattr(getattr(hook, "func", hook), "__self__", None)
            if type(owner).__module__.startswith("vtc.adapters."):
                raise UnsupportedModel(
                    "a vtc session is already attached to this model. Detach it first, or put "
                    "all steps in one recipe."
                )
