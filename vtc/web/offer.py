"""Which methods can be attached to a model, where, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..commands.describe import Description, describe
from ..context import Site
from ..errors import VtcError
from ..recipe import Recipe
from ..reducer import Composite, Denoiser, Rewriter, Selector, summary
from ..registry import REDUCERS
from ..session import Adapter, adapter_for


@dataclass(frozen=True)
class Choice:
    """A method that fits a model.

    Attributes:
        about: what it does, one line.
        sites: where it can be put; none for methods that choose their own places.
        usual: where it goes when nothing is said, "" where that has to be said.
        share, own: whether it takes a share of tokens to keep, and whether it can go without one.
        params: further arguments of `vtc.attach`, such as its weights.
    """

    name: str
    about: str
    sites: tuple[str, ...]
    usual: str
    share: bool
    own: bool
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Offer:
    """What fits a model, and why the rest does not: method -> choice, method or site -> reason."""

    choices: Mapping[str, Choice]
    reasons: Mapping[str, str]


def offer_of(model: Any, trained: Mapping[str, Mapping[str, Any]]) -> Offer:
    """trained: method -> its arguments on this model, where there are weights for it."""
    told, adapter = describe(model), adapter_for(model)
    choices, reasons = {}, {}
    for name, where in told.methods.items():
        choice = None
        if REDUCERS[name].trained and name not in trained:
            where = "no: it needs weights trained for this model, and there are none here"
        if name in trained or not where.startswith("no:"):
            choice = _choice(name, told, adapter, trained.get(name, {}))
        if choice is not None:
            choices[name] = choice
        else:
            reasons[name] = where.removeprefix("no:").strip()
    return Offer(choices, reasons | {f"site {kind}": why for kind, why in _sites(told).items()})


def _choice(
    name: str, told: Description, adapter: Adapter, params: Mapping[str, Any]
) -> Choice | None:
    """None where no budget of ours suits the method on this model."""
    sites = _fitting(name, told)
    shared, alone = (_places(name, adapter, keep, None, params) for keep in (0.25, None))
    usual = shared or alone
    if sites and not set(usual) <= set(sites):  # where its paper puts it is not on this model
        usual = ()
        shared, alone = (_places(name, adapter, keep, sites[0], params) for keep in (0.25, None))
    if not (shared or alone):
        return None
    about, where = summary(REDUCERS[name]), ", ".join(usual)
    return Choice(name, about, sites, where, bool(shared), bool(alone), dict(params))


def _fitting(name: str, told: Description) -> tuple[str, ...]:
    """Sites where a method finds the signals it needs; none for those with places of their own."""
    cls = REDUCERS[name]
    if issubclass(cls, Composite | Denoiser | Rewriter):
        return ()
    fits = [
        site
        for site, signals in told.sites.items()
        if Site.parse(site).kind in cls.sites and cls.needs <= signals
    ]
    return tuple(fits[:-1] if issubclass(cls, Selector) else fits)  # it drops behind the block


def _places(
    name: str, adapter: Adapter, keep: float | None, at: str | None, params: Mapping[str, Any]
) -> tuple[str, ...]:
    """Sites of the recipe with that budget; none where the method refuses it."""
    try:
        recipe = Recipe.build(name, adapter.depth, keep, at, host=adapter.host(), **params)
        for step in recipe.steps:
            step.build()
    except VtcError:
        return ()
    return tuple(step.at for step in recipe.steps)


def _sites(told: Description) -> dict[str, str]:
    """Kinds of site that this model does not have."""
    kinds = ("vision", "projector", "decoder", "cache", "dit")
    there = {Site.parse(site).kind for site in told.sites}
    return {k: told.refusals[k] for k in kinds if k in told.refusals and k not in there}
