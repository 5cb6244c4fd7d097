"""A method on a family of tiny models at a site: what every check is about."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..budget import Keep
from ..context import Site
from ..recipe import Recipe, Step
from ..reducer import Composite, Host, Rewriter
from ..registry import REDUCERS
from ..session import Session, adapter_for, attach
from . import families

SHARE, COUNT = 0.25, 5
MERGED: dict[str, Any] = {"merge": "nearest", "mass": 1.0}
#: families for checks that need many forwards
FEW = ("llava", "qwen2_5_vl", "qwen3_vl")
#: families for methods that compare frames: equal images as frames, images without a grid beside a
#: video that was pooled, a video as a single run, one with text between its frames
FRAMED = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
#: one site of each kind; a method's default site replaces the one of its kind
SITES = {"projector": "projector", "decoder": "decoder.1", "vision": "vision.1", "cache": "cache"}


@dataclass(frozen=True)
class Cell:
    """A method on a family of models.

    Attributes:
        method: registered name.
        family: a name of `families.FAMILIES`.
        at: site; None means where the method's paper puts it.
        keep: a share, or "auto" for methods that decide themselves.
        params: (name, value) pairs of the method.
        behind: (method, site) of a step before this one, which acts on what that one did.
    """

    method: str
    family: str
    at: str | None = None
    keep: Keep = SHARE
    params: tuple[tuple[str, Any], ...] = ()
    behind: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.method}-{self.family}-{self.at or 'default'}"

    @property
    def cls(self) -> Any:
        return REDUCERS[self.method]

    @property
    def site(self) -> str:
        return self.at or self.cls.default_at

    @property
    def auto(self) -> bool:
        """Whether the method decides how many tokens stay."""
        return self.keep == "auto"

    @property
    def composite(self) -> bool:
        return issubclass(self.cls, Composite)

    @property
    def writes(self) -> bool:
        """Whether it writes new tokens: no merge and no mass, nothing to mask."""
        return issubclass(self.cls, Rewriter)

    def options(self, **options: Any) -> dict[str, Any]:
        """Arguments of `vtc.attach`."""
        site = {} if self.at is None else {"at": self.at}
        return {"keep": self.keep, "seed": 3} | dict(self.params) | site | options

    def recipe(self, **options: Any) -> Recipe:
        """The same as a recipe."""
        given = self.options(**options)
        if self.behind is None:
            return Recipe.build(self.method, families.LAYERS, **given, host=host(self.family))
        method, at = self.behind
        first = Step(method, at, given["keep"], **{k: given[k] for k in MERGED if k in given})
        return Recipe((first, Step(self.method, self.site, "auto", params=dict(self.params))), 3)

    def attach(self, model: nn.Module, **options: Any) -> Session:
        """A session; refused before anything is touched, or not at all."""
        if self.behind is not None:
            return attach(model, self.recipe(**options))
        return attach(model, self.method, **self.options(**options))

    @property
    def merges(self) -> bool:
        """Whether mass is possible, and merge where tokens are dropped."""
        return (self.behind is not None or self.site != "cache") and not self.writes

    @property
    def drops(self) -> bool:
        """Whether a step leaves tokens over that merge can average in."""
        return not all(REDUCERS[step.method].merging for step in self.recipe().steps)

    @property
    def inside(self) -> bool:
        """Whether every step acts in the vision tower."""
        return all(step.site.kind == "vision" for step in self.recipe().steps)

    @property
    def scope(self) -> str:
        """What a row is: a method that compares frames gets the images of a prompt as a video."""
        frames = any(REDUCERS[step.method].frames for step in self.recipe().steps)
        return "video" if frames else "image"

    def merged(self, on: bool = True) -> dict[str, Any]:
        if not (on and self.merges):
            return {}
        return MERGED if self.drops else {"mass": MERGED["mass"]}

    def mass(self, merged: bool) -> float:
        """Strength of log(size), the method's own where the check asks for none."""
        return max(step.mass for step in self.recipe(**self.merged(merged)).steps)


def places(method: str) -> list[str | None]:
    """The default, and one site of every kind that the default does not cover alone."""
    cls = REDUCERS[method]
    if issubclass(cls, Composite):
        return [None]
    default = list(cls().places(families.LAYERS, SHARE))
    sites = SITES | {Site.parse(cls.default_at).kind: cls.default_at}
    found: list[str | None] = [None]
    found += [sites[kind] for kind in sorted(cls.sites - {"dit"}) if [sites[kind]] != default]
    return found


@functools.cache
def host(family: str) -> Host:
    """What composite methods may ask of a family."""
    return adapter_for(families.make(family).model).host()
