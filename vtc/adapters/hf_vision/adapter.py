"""Adapter of image encoders of transformers: tokens are dropped or merged before block i
(`vision.<i>`), what pools sees the short sequence, what is returned token by token is whole."""

from __future__ import annotations

import inspect
import sys

from ...errors import UnsupportedModel
from ...hooks import refuse_second
from ...recipe import Recipe
from ...reducer import Rewriter
from ...registry import ADAPTERS, REDUCERS
from ..attention import attention_of
from ..lone import ROTARY, LoneEncoder
from ..units import PREVIOUS_BLOCK_SIGNALS
from .facts import look
from .hooks import Hooks


@ADAPTERS.add("hf_vision")
class HfImageEncoder(LoneEncoder):
    """Adapter for image encoders of transformers 5, alone, with a head or beside a text model."""

    name = "hf_vision"
    look = staticmethod(look)
    hooks = Hooks

    def sites(self) -> dict[str, frozenset[str]]:
        first = frozenset({"token_size", "tile"})
        later = first | (PREVIOUS_BLOCK_SIGNALS if self._seam() else frozenset())
        return {f"vision.{i}": later if i else first for i in range(self.depth)}

    def _seam(self) -> bool:
        """Attention goes through the mapping of attention functions."""
        attention = attention_of(self.facts.blocks[0])
        return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(attention).__module__])

    def refusals(self) -> dict[str, str]:
        why = "read from the block before the site, so from vision.1 on"
        if not self._seam():
            why = "its attention is not one of the attention functions of transformers"
        return super().refusals() | dict.fromkeys(PREVIOUS_BLOCK_SIGNALS, why)

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        refuse_second((*self.facts.path, self.facts.blocks[0]))
        for step in recipe.steps:
            if issubclass(REDUCERS[step.method], Rewriter):
                arguments = inspect.signature(self.facts.blocks[0].forward).parameters
                if "position_embeddings" in arguments:
                    raise UnsupportedModel(f"{step.method!r} {ROTARY}")
                continue
            uneven = step.keep == "auto" and step.build().left((1,)) is None
            if not (step.mass or uneven):
                continue
            what = "mass" if step.mass else "keep='auto'"
            if not self._seam():
                raise UnsupportedModel(
                    f"{step.at}: {what} is not possible here: {self.refusals()['attn_cls']}."
                )
            if self.facts.implementation == "flex_attention":
                raise UnsupportedModel(
                    f"{step.at}: {what} is not possible with flex_attention: use sdpa or eager."
                )
