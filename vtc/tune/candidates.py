"""What `vtc tune` chooses from: methods at sites and budgets, with merge and mass or without."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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

    @cached_property
    def name(self) -> str:
        """The same for the same recipe and the same files that it names, in every run."""
        told = hashlib.sha256(json.dumps(self.recipe.to_dict(), sort_keys=True).encode())
        for path in _named(self.recipe):
            told.update(str(path).encode())
            with path.open("rb") as file:
                told.update(hashlib.file_digest(file, "sha256").digest())
        return told.hexdigest()[:16]

    @property
    def label(self) -> str:
        return loyalty.label(self.fields)


def _named(recipe: Recipe) -> Iterator[Path]:
    """Files that parameters name, such as weights, and those in folders that they name."""
    for step in recipe.steps:
        for _, value in sorted(step.params.items()):
            path = Path(value) if isinstance(value, str | Path) and value else None
            if path is not None and path.is_dir():
                yield from sorted(inside for inside in path.rglob("*") if inside.is_file())
            elif path is not None and path.is_file():
                yield path


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
