"""Image encoders on their own: tokens are dropped or merged before block i (`vision.<i>`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...context import Site
from ...errors import UnsupportedModel
from ...recipe import Recipe
from ...reducer import Host, Rewriter
from ...registry import ADAPTERS, REDUCERS
from ...session import Session
from .hooks import Hooks
from .look import look
from .reading import PREVIOUS_BLOCK_SIGNALS, Reader


@ADAPTERS.add("image_encoder")
class ImageEncoder:
    """Adapter for the plain vision transformers of timm (ViT, DeiT, DINOv2, SigLIP, EVA, DINOv3)
    and for the visual towers of open_clip."""

    name = "image_encoder"
    counts = "image encoder"

    def __init__(self, model: nn.Module) -> None:
        facts = look(model)
        if isinstance(facts, str):
            raise UnsupportedModel(f"{type(model).__name__}: looked for {facts}")
        self.model, self.facts = model, facts
        self.depth = len(facts.blocks)
        inner = [_matrices(getattr(block, "mlp", None)) for block in facts.blocks]
        self._weights = [(_matrices(b) - m, m) for b, m in zip(facts.blocks, inner, strict=True)]

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        facts = look(model)
        return facts if isinstance(facts, str) else None

    def sites(self) -> dict[str, frozenset[str]]:
        first = frozenset({"token_size"})
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

    def host(self) -> Host:
        return Host(self.depth, frozenset(self.sites()))

    def refusals(self) -> dict[str, str]:
        alone = "this is an image encoder without a language model"
        out = {"projector": alone, "decoder": alone, "cache": alone}
        out["dit"] = "this is not a diffusion transformer"
        later = "read from the block before the site, so from vision.1 on"
        return out | {name: self._unread(name) or later for name in PREVIOUS_BLOCK_SIGNALS}

    def check(self, recipe: Recipe) -> None:
        for block in self.facts.blocks:
            for hook in block._forward_pre_hooks.values():
                if isinstance(getattr(getattr(hook, "func", None), "__self__", None), Hooks):
                    raise UnsupportedModel(
                        "a vtc session is already attached to this model. Detach it first, or put "
                        "all steps in one recipe."
                    )
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
                f"does not. Use mass=0."
            )
        for step in recipe.steps:
            rewrites = issubclass(REDUCERS[step.method], Rewriter)
            if rewrites and getattr(self.facts.checkpoints, "rope", None) is not None:
                raise UnsupportedModel(
                    f"{step.method!r} writes new tokens, which have no place of their own in the "
                    f"rotary positions of this model: use a model with learned positions, or a "
                    f"method that chooses tokens."
                )
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

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        return self.facts.blocks[site.layer or 0 :]

    def install(self, session: Session) -> list[Any]:
        return Hooks(self, session).install()

    def prefill_flops(self, widths: Sequence[int], inner: Sequence[int] | None = None) -> float:
        """2 FLOPs per multiply-add: weights per token, attention of all pairs.

        widths: tokens that each block's attention sees; inner: its MLP, the same if not given.
        """
        width = self.facts.width
        return sum(
            2 * attention * n + 4 * width * n * n + 2 * mlp * m
            for (attention, mlp), n, m in zip(self._weights, widths, inner or widths, strict=True)
        )


def _matrices(module: Any) -> int:
    """Weights that every token is multiplied with."""
    if module is None:  # a block whose halves run side by side
        return 0
    return sum(w.numel() for w in module.parameters() if w.ndim >= 2)
