"""What `vtc tune` chooses from: methods at sites and budgets, with merge and mass or without."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import vtc

from ..bench import loyalty, quality
from ..bench.records import Record
from ..context import Site
from ..recipe import Recipe
from ..reducer import Composite, Denoiser, Trained
from ..registry import REDUCERS

COLUMNS = quality.SETTING_COLUMNS


@dataclass(frozen=True)
class Candidate:
    """A recipe and what a table says of it."""

    recipe: Recipe
    fields: Record

    @property
    def name(self) -> str:
        """The same for the same recipe, in every run."""
        text = json.dumps(self.recipe.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        return loyalty.label(self.fields)


def planned(
    model: Any, args: argparse.Namespace, videos: bool
) -> tuple[dict[str, Candidate], list[str]]:
    """Candidates that the model accepts, by name, and why others are refused."""
    wanted = args.methods or ([] if args.recipe else default_methods(videos))
    request = argparse.Namespace(**{**vars(args), "methods": wanted, "baselines": False})
    recipes = [(path.name, Recipe.load(path)) for path in args.recipe]
    settings, refused = loyalty.planned(model, request, recipes)
    found: dict[str, Candidate] = {}
    for setting in settings:
        recipe = setting.recipe
        if recipe is None:
            continue
        if setting.fields["keep"] is not None:  # a recipe file has a seed of its own
            recipe = dataclasses.replace(recipe, seed=args.seed)
        candidate = Candidate(recipe, setting.fields)
        found.setdefault(candidate.name, candidate)
    return found, refused


def default_methods(videos: bool) -> list[str]:
    """Those without weights that choose tokens before or in the language model, and grid."""
    out = []
    for name in vtc.REDUCERS:
        method = REDUCERS[name]
        if issubclass(method, Composite | Trained | Denoiser) or name == "random":
            continue
        here = Site.parse(method.default_at).kind in ("projector", "decoder")
        if here and "fixed" in method.budgets and (videos or not method.frames):
            out.append(name)
    return out
