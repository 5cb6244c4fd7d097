"""vtc: make vision transformers and vision-language models process fewer visual tokens.

    with vtc.attach(model, "divprune", keep=0.25) as session:
        out = model.generate(**inputs)
    print(session.report())

Importing vtc is light: no transformers, timm, diffusers or triton, and nothing is patched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "attach": "session",
    "adapters_for": "session",
    "detach": "session",
    "describe": "commands.describe",
    "Session": "session",
    "Recipe": "recipe",
    "Step": "recipe",
    "Plan": "plan",
    "Context": "context",
    "Layout": "context",
    "Site": "context",
    "Decision": "reducer",
    "Denoiser": "reducer",
    "Method": "reducer",
    "Reducer": "reducer",
    "Rewrite": "reducer",
    "Rewriter": "reducer",
    "Scorer": "reducer",
    "Selector": "reducer",
    "REDUCERS": "registry",
    "register": "registry",
    "knapsack_allocate": "algorithms.knapsack",
    "VtcError": "errors",
}

__all__ = [
    "REDUCERS",
    "Context",
    "Decision",
    "Denoiser",
    "Layout",
    "Method",
    "Plan",
    "Recipe",
    "Reducer",
    "Rewrite",
    "Rewriter",
    "Scorer",
    "Selector",
    "Session",
    "Site",
    "Step",
    "VtcError",
    "__version__",
    "adapters_for",
    "attach",
    "describe",
    "detach",
    "knapsack_allocate",
    "register",
]

if TYPE_CHECKING:
    from .algorithms.knapsack import knapsack_allocate as knapsack_allocate
    from .commands.describe import describe as describe
    from .context import Context as Context
    from .context import Layout as Layout
    from .context import Site as Site
    from .errors import VtcError as VtcError
    from .plan import Plan as Plan
    from .recipe import Recipe as Recipe
    from .recipe import Step as Step
    from .reducer import Decision as Decision
    from .reducer import Denoiser as Denoiser
    from .reducer import Method as Method
    from .reducer import Reducer as Reducer
    from .reducer import Rewrite as Rewrite
    from .reducer import Rewriter as Rewriter
    from .reducer import Scorer as Scorer
    from .reducer import Selector as Selector
    from .registry import REDUCERS as REDUCERS
    from .registry import register as register
    from .session import Session as Session
    from .session import adapters_for as adapters_for
    from .session import attach as attach
    from .session import detach as detach


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtc' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
