"""Image features that a text model adds to its visual tokens on the way through its layers.

Two forms are known, whatever their arguments are called: a list, entry i added to what leaves layer
i, and a dict, added to what enters the layer of that number. Beside them comes a mask of the tokens
that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModel
from ...plan import Plan

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Deepstack:
    """where: [B, L] tokens that features are added to, in their order. features: layer -> [n, D],
    added to what enters it. names: of the mask and of the features among the arguments; shape: what
    the mask has beside [B, L]; bare: visual tokens enter the text model as zeros."""

    where: Tensor
    features: dict[int, Tensor]
    names: tuple[str, str]
    shape: tuple[int, ...]
    bare: bool

    @classmethod
    def among(cls, kwargs: Kwargs) -> Deepstack | None:
        """What the text model is called with, if it is."""
        name = next((k for k, v in kwargs.items() if "deepstack" in k and v is not None), None)
        if name is None or not len(kwargs[name]):
            return None
        given, size = kwargs[name], kwargs["inputs_embeds"].shape[:2]
        masks = [
            key
            for key, value in kwargs.items()
            if torch.is_tensor(value) and value.dtype == torch.bool and value.shape[:2] == size
        ]
        mask = next((key for key in masks if key != "attention_mask"), None)
        if mask is None:
            raise UnsupportedModel(
                f"the language model is given {name}, but no mask of the tokens that they are "
                f"added to, so tokens cannot be dropped before they are. Use keep=1.0."
            )
        where: Tensor = kwargs[mask]
        shape = tuple(where.shape[2:])
        where = where.flatten(2)[..., 0] if shape else where
        bare = isinstance(given, dict)
        features = given if bare else {i + 1: x for i, x in enumerate(given)}
        return cls(where, dict(features), (mask, name), shape, bare)

    def put(self, kwargs: Kwargs) -> None:
        """Call the text model with it."""
        mask, name = self.names
        where = self.where.reshape(*self.where.shape, *(1 for _ in self.shape))
        kwargs[mask] = where.expand(*self.where.shape, *self.shape)
        kwargs[name] = self.features if self.bare else list(self.features.values())

    def take_out(self, kwargs: Kwargs) -> None:
        """Call the text model without it."""
        for name in self.names:
            kwargs.pop(name)

    def check(self, plan: Plan) -> None:
        """Refuse a plan that merges, before the first layer, tokens which are not there yet."""
        if self.bare and plan.weight is not None:
            raise UnsupportedModel(
                f"visual tokens of this language model enter it as zeros and get their features "
                f"({self.names[1]}) inside, so they cannot be merged before it: use merge='none' "
                f"and a method that does not merge, or a step at decoder.{min(self.features)}."
            )

    def cut(self, keep: Tensor, index: Tensor, valid: Tensor) -> Deepstack:
        """After a drop: keep [B, L], the packed index [B, K], real columns [B, K]."""
        kept = keep[self.where]
        features = {i: x[kept] for i, x in self.features.items()}
        return replace(self, where=self.where.gather(1, index) & valid, features=features)

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """What enters `layer` [B, L, D]."""
        features = self.features.get(layer)
        if features is None:
            return hidden
        hidden = hidden.clone()
        hidden[self.where] = hidden[self.where] + features.to(hidden.dtype)
        return hidden

    def shown(self, embeds: Tensor) -> Tensor:
        """Embeddings [B, L, D] as methods before the first layer see them: visual tokens that enter
        as zeros are shown with their first features."""
        return self.add(min(self.features), embeds) if self.bare else embeds
