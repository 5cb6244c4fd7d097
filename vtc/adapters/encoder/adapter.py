"""Image encoders on their own: tokens are dropped or merged before block i (`vision.<i>`)."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModel
from ...hooks import refuse_second
from ...recipe import Recipe
from ...reducer import Rewriter
from ...registry import ADAPTERS, REDUCERS
from ..lone import ROTARY, LoneEncoder
from ..units import PREVIOUS_BLOCK_SIGNALS
from .hooks import Hooks
from .look import look
from .reading import Reader


@ADAPTERS.add("image_encoder")
class ImageEncoder(LoneEncoder):
    """Adapter for the plain vision transformers of timm (ViT, DeiT, DINOv2, SigLIP, EVA, DINOv3)
    and for the visual towers of open_clip."""

    name = "image_encoder"
    look = staticmethod(look)
    hooks = Hooks

    def sites(self) -> dict[str, frozenset[str]]:
        first = frozenset({"token_size", "tile"})
        later = first | {name for name in PREVIOUS_BLOCK_SIGNALS if not self._unread(name)}
        sites = {f"vision.{i}": later if i else first for i in range(self.depth)}
        if self.facts.branch:
            sites |= {f"vision.{i}.mlp": later for i in range(self.depth)}
        return sites

    def _unread(self, signal: str) -> str | None:
        """Why a signal of the block before a site cannot be read."""
        block: Any = self.facts.blocks[0]
        if not hasattr(block, "attn"):
            return f"{type(block).__name__} has no attention module of its own to read"
        if signal == "attn_cls" and self.facts.pairs is not None:
            return f"{type(block).__name__} adds a bias per pair of places to its attention"
        if signal == "attn_cls" and Reader.differs(block.attn):
            return f"{type(block.attn).__name__} is a difference of two attentions"
        return Reader.missing(block.attn)

    def refusals(self) -> dict[str, str]:
        later = "read from the block before the site, so from vision.1 on"
        unread = {name: self._unread(name) or later for name in PREVIOUS_BLOCK_SIGNALS}
        return super().refusals() | unread

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        refuse_second((self.model, self.facts.model, self.facts.blocks[0]))
        inner = {step.site.layer for step in recipe.steps if step.site.mlp}
        for step in recipe.steps:
            before = (step.site.layer or 0) - 1
            reads = REDUCERS[step.method].needs & PREVIOUS_BLOCK_SIGNALS
            if reads and not step.site.mlp and before in inner:
                raise UnsupportedModel(
                    f"{step.method!r} at {step.at!r} reads the attention of block {before}, but "
                    f"the step at 'vision.{before}.mlp' changes the tokens behind it. Use "
                    f"'vision.{before + 1}.mlp'."
                )
        if any(step.mass for step in recipe.steps) and not self.facts.takes_mask:
            raise UnsupportedModel(
                f"mass needs blocks that take attn_mask; {type(self.facts.blocks[0]).__name__} "
                f"does not. Use mass=0 (tome: prop_attn=False)."
            )
        for step in recipe.steps:
            rewrites = issubclass(REDUCERS[step.method], Rewriter)
            if rewrites and getattr(self.facts.checkpoints, "rope", None) is not None:
                raise UnsupportedModel(f"{step.method!r} {ROTARY}")
            if rewrites and self.facts.pairs is not None:
                raise UnsupportedModel(
                    f"{step.method!r} writes new tokens, which have no bias per pair of places in "
                    f"this model's attention: use a method that chooses tokens."
                )
            whole = rewrites or self.facts.takes_mask and self.facts.hides_padding
            if step.keep == "auto" and step.build().left((1,)) is None and not whole:
                raise UnsupportedModel(
                    f"{step.at}: keep='auto' lets images keep different numbers of tokens, but "
                    f"this model pools all of them or takes no attn_mask. Give a share or a number."
                )
