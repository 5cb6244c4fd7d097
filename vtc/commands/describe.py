"""What a model supports: sites, signals and methods, and why others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..context import Site
from ..errors import VtcError
from ..recipe import Recipe
from ..reducer import Composite, Denoiser, Rewriter, Selector
from ..registry import REDUCERS
from ..session import Adapter, adapter_for, check, module_of, ranges


@dataclass(frozen=True)
class Description:
    """What a model supports: `print(vtc.describe(model))`."""

    model: str
    adapter: str
    sites: dict[str, frozenset[str]]
    refusals: dict[str, str]
    methods: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.model} (adapter {self.adapter})", "sites and signals:"]
        told = {site: signals for site, signals in self.sites.items() if signals}
        plain = [site for site in self.sites if site not in told]
        lines += [f"  {site:<12} {', '.join(sorted(s))}" for site, s in told.items()]
        lines += [f"  {ranges(plain)}: none"] * bool(plain)
        lines += ["not offered:"] * bool(self.refusals)
        same: dict[str, list[str]] = {}
        for what in sorted(self.refusals):
            same.setdefault(self.refusals[what], []).append(what)
        lines += [f"  {', '.join(names)}: {why}" for why, names in same.items()]
        lines += ["methods:"]
        lines += [f"  {name:<17} {where}" for name, where in self.methods.items()]
        return "\n".join(lines)


def describe(model: Any) -> Description:
    """Sites, signals and methods this model supports, and why the others are not."""
    model = module_of(model)
    adapter = adapter_for(model)
    sites, methods = adapter.sites(), {}
    for name in REDUCERS:
        cls = REDUCERS[name]
        if issubclass(cls, Composite | Rewriter | Denoiser):
            methods[name] = _composite(cls, adapter)
            continue
        fit = [
            s for s, have in sites.items() if Site.parse(s).kind in cls.sites and cls.needs <= have
        ]
        here = [s for s in sites if Site.parse(s).kind in cls.sites]
        refused = fit and issubclass(cls, Selector) and _refused(cls, fit[0], adapter)
        if refused:
            methods[name] = f"no: {refused}"
        elif fit and issubclass(cls, Selector):
            methods[name] = f"at {fit[0]} to {fit[-2]}"  # it drops behind the block
        elif fit:
            kinds = dict.fromkeys(Site.parse(s).kind for s in fit)
            methods[name] = "at " + ", ".join(
                next(s for s in fit if s.startswith(k))
                + (" and later" if k in ("vision", "decoder", "dit") else "")
                for k in kinds
            )
        elif here:
            missing = cls.needs - frozenset[str]().union(*(sites[s] for s in here))
            why = "; ".join(f"{m}: {adapter.refusals().get(m)}" for m in sorted(missing))
            methods[name] = f"no: signals missing ({why})"
        else:
            methods[name] = f"no: works at {', '.join(sorted(cls.sites))} only"
    return Description(type(model).__name__, adapter.name, sites, adapter.refusals(), methods)


def _refused(cls: Any, at: str, adapter: Adapter) -> str | None:
    """Why a method that is offered a site does not run there."""
    try:
        check(adapter, Recipe.build(cls.name, adapter.depth, 0.5, at, host=adapter.host()))
    except VtcError as error:
        return str(error)
    return None


def _composite(cls: Any, adapter: Adapter) -> str:
    """Where a method acts that chooses its own sites on this model, or why it does not run."""
    why, recipe = None, None
    for keep in (None, 0.5):  # its own budget may be none for a model of few layers
        try:
            recipe = Recipe.build(cls.name, adapter.depth, keep, host=adapter.host())
            check(adapter, recipe)
            break
        except VtcError as error:
            why, recipe = why or error, None
    if recipe is None:
        return f"no: {why}"
    places: dict[str, list[str]] = {}
    for step in recipe.steps:
        places.setdefault(step.method, []).append(step.at)
    return ", ".join(
        f"{name} at {', '.join(at) if len(at) < 5 else f'{at[0]}, {at[1]}, ... {at[-1]}'}"
        for name, at in places.items()
    ) + ("; say how much with keep=" if why else "")
