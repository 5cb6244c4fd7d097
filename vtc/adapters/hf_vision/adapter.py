"""Adapter of image encoders of transformers: tokens are dropped or merged before block i
(`vision.<i>`), what pools sees the short sequence, what is returned token by token is whole."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...context import Site
from ...errors import UnsupportedModel
from ...recipe import Recipe
from ...reducer import Host, Rewriter
from ...registry import ADAPTERS, REDUCERS
from ...session import Session
from ..attention import attention_of
from .facts import look
from .hooks import PREVIOUS_BLOCK_SIGNALS, ROTARY, Hooks


@ADAPTERS.add("hf_vision")
class HfImageEncoder:
    """Adapter for image encoders of transformers 5, alone, with a head or beside a text model."""

    name = "hf_vision"
    counts = "image encoder"

    def __init__(self, model: nn.Module) -> None:
        facts = look(model)
        if isinstance(facts, str):
            raise UnsupportedModel(f"{type(model).__name__}: looked for {facts}")
        self.model, self.facts = model, facts
        self.depth = len(facts.blocks)
        self._weights = [
            sum(w.numel() for w in block.parameters() if w.ndim >= 2) for block in facts.blocks
        ]

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        facts = look(model)
        return facts if isinstance(facts, str) else None

    def sites(self) -> dict[str, frozenset[str]]:
        first = frozenset({"token_size"})
        later = first | (PREVIOUS_BLOCK_SIGNALS if self._seam() else frozenset())
        return {f"vision.{i}": later if i else first for i in range(self.depth)}

    def _seam(self) -> bool:
        """Attention goes through the mapping of attention functions."""
        attention = attention_of(self.facts.blocks[0])
        return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(attention).__module__])

    def host(self) -> Host:
        return Host(self.depth, frozenset(self.sites()))

    def refusals(self) -> dict[str, str]:
        alone = "this is an image encoder without a language model"
        out = {"projector": alone, "decoder": alone, "cache": alone}
        out["dit"] = "this is not a diffusion transformer"
        why = "read from the block before the site, so from vision.1 on"
        if not self._seam():
            why = "its attention is not one of the attention functions of transformers"
        return out | dict.fromkeys(PREVIOUS_BLOCK_SIGNALS, why)

    def check(self, recipe: Recipe) -> None:
        for hook in self.facts.blocks[0]._forward_pre_hooks.values():
            if isinstance(getattr(getattr(hook, "func", None), "__self__", None), Hooks):
                raise UnsupportedModel(
                    "a vtc session is already attached to this model. Detach it first, or put "
                    "all steps in one recipe."
                )
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

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        return self.facts.blocks[site.layer or 0 :]

    def install(self, session: Session) -> list[Any]:
        return Hooks(self, session).install()

    def prefill_flops(self, widths: Sequence[int]) -> float:
        """2 FLOPs per multiply-add: weights per token, attention of all pairs."""
        width = self.facts.config.hidden_size
        return sum(
            2 * weights * n + 4 * width * n * n
            for weights, n in zip(self._weights, widths, strict=True)
        )
