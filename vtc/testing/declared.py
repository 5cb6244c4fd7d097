"""What a class says about itself, and what users may not ask of it."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from ..context import Site
from ..errors import InvalidBudget, UnknownName, UnsupportedSite, VtcError
from ..registry import flaw
from .cells import Cell
from .errors import ContractBroken, require
from .runs import family, state_of


def class_is_declared(cell: Cell) -> None:
    """Fields, sites and signals, a docstring and where the method comes from."""
    cls = cell.cls
    wrong = flaw(cell.method, cls)
    require(wrong is None, f"{cls.__name__} {wrong}")
    says = f"{cls.__name__} must be frozen: @dataclass(frozen=True)."
    require(cls.__dataclass_params__.frozen, says)
    own = (cls.__dict__.get("__doc__") or "").strip()
    require(
        bool(own) and not own.startswith(f"{cls.__name__}("),
        f"{cls.__name__} needs a docstring: its first line says in tables which tokens stay.",
    )
    text = f"{sys.modules[cls.__module__].__doc__ or ''} {inspect.getdoc(cls)}"
    cited = re.findall(r"https?://\S+|doi\.org/\S+", cls.paper)
    require(
        cls.paper == "baseline" or bool(cited),
        f"paper={cls.paper!r}: give title, year and an address (https://...), or 'baseline'.",
    )
    missing = [address for address in cited if address not in text]
    says = f"the docstring of the class or its file must cite {', '.join(missing)} as `paper` does."
    require(not missing, says)


def wrong_requests_are_refused(cell: Cell) -> None:
    """Budgets, sites and parameters, with an error of the right kind, before anything changes."""
    model, cls = family(cell.family).model, cell.cls
    before = state_of(model)

    def refused(kind: type[VtcError], **options: Any) -> None:
        asked = ", ".join(f"{name}={value!r}" for name, value in options.items())
        try:
            cell.attach(model, **options).detach()
        except kind:
            require(state_of(model) == before, f"{asked} was refused, but left traces.")
            return
        raise ContractBroken(f"{asked} was accepted; expected {kind.__name__}.")

    for keep in (0, 0.0, 1.5, -1):
        refused(InvalidBudget, keep=keep)
    if "auto" not in cls.budgets and not cell.composite:
        refused(InvalidBudget, keep="auto")
    if "fixed" not in cls.budgets and not cell.composite:
        refused(InvalidBudget, keep=0.5)
    refused(UnknownName, no_such_parameter=1)
    for at in ("projector", "decoder.1", "vision.1", "cache"):
        if Site.parse(at).kind not in cls.sites and not cell.composite:
            refused(UnsupportedSite, at=at)
