"""What the adapters of image encoders without a language model have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..context import Site
from ..errors import InvalidInput, InvalidRecipe, UnsupportedModel
from ..recipe import Recipe
from ..reducer import Host, Selector
from ..registry import REDUCERS
from ..session import Session
from .units import GridUnits

#: why written tokens do not go with rotary positions
ROTARY = (
    "writes new tokens, which have no place of their own in the rotary positions of this model: "
    "use a model with learned positions, or a method that chooses tokens."
)


class LoneEncoder(ABC):
    """Base of the adapters of image encoders.

    Class attributes:
        look: a model -> facts with `blocks` and `width`, or what it lacks.
        hooks: made of (adapter, session), with `install(installed)`.
    """

    counts = "image encoder"
    look: ClassVar[Callable[[nn.Module], Any]]
    hooks: ClassVar[type[Any]]

    def __init__(self, model: nn.Module) -> None:
        facts = type(self).look(model)
        if isinstance(facts, str):
            raise UnsupportedModel(f"{type(model).__name__}: looked for {facts}")
        self.model, self.facts = model, facts
        self.depth = len(facts.blocks)
        inner = [_matrices(getattr(block, "mlp", None)) for block in facts.blocks]
        self._weights = [(_matrices(b) - m, m) for b, m in zip(facts.blocks, inner, strict=True)]

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        facts = cls.look(model)
        return facts if isinstance(facts, str) else None

    @abstractmethod
    def sites(self) -> dict[str, frozenset[str]]:
        """Site -> signals offered there."""

    def host(self) -> Host:
        return Host(self.depth, frozenset(self.sites()))

    def refusals(self) -> dict[str, str]:
        alone = "this is an image encoder without a language model"
        out = {"projector": alone, "decoder": alone, "cache": alone}
        if not any(site.endswith(".mlp") for site in self.sites()):
            out["vision.<i>.mlp"] = "where the MLP of these blocks begins and ends is not known"
        return out | {"dit": "this is not a diffusion transformer"}

    def check(self, recipe: Recipe) -> None:
        """Raise when no image encoder can run this recipe."""
        for step in recipe.steps:
            if step.positions == "renumber":
                raise InvalidRecipe(
                    f"positions='renumber' at {step.at!r} is about the positions of a language "
                    f"model, and this is an image encoder alone: leave it out."
                )
            if issubclass(REDUCERS[step.method], Selector):
                raise UnsupportedModel(
                    f"{step.method!r} ranks the frames of videos for a language model, and this is "
                    f"an image encoder alone: attach it to the model that is given the videos."
                )

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        return self.facts.blocks[site.layer or 0 :]

    def install(self, session: Session) -> None:
        self.hooks(self, session).install(session.installed)

    def prefill_flops(self, widths: Sequence[int], inner: Sequence[int] | None = None) -> float:
        """2 FLOPs per multiply-add: weights per token, attention of all pairs.

        widths: tokens that the attention of each block sees that ran; inner: its MLP, the same if
            not given.
        """
        width = self.facts.width
        return sum(
            2 * attention * n + 4 * width * n * n + 2 * mlp * m
            for (attention, mlp), n, m in zip(self._weights, widths, inner or widths, strict=False)
        )

    def count(
        self,
        session: Session,
        units: GridUnits,
        widths: Sequence[int],
        inner: Sequence[int],
        beside: float,
    ) -> None:
        """Tell the session what one forward took; `widths` and `inner` as in `prefill_flops`,
        `beside`: FLOPs of a method that brings weights."""
        images, prefix, flops = len(units.counts), units.prefix, self.prefill_flops
        dense = [prefix + sum(units.original) // images] * len(inner)
        enter, leave = (images * (sum(seen) / len(seen) - prefix) for seen in (widths, inner))
        used = images * flops(widths[: len(inner)], inner) + beside
        session.count(True, images * flops(dense), used, (images, enter, leave))


def first_units(facts: Any, x: Tensor, seen: Any) -> GridUnits:
    """The patches of untouched tokens x [images, tokens, width]; `seen`: what `facts.grid` wants to
    know of the images."""
    if x.ndim != 3:
        raise UnsupportedModel(
            f"tokens of shape {tuple(x.shape)} enter the blocks, not [images, tokens, width]"
        )
    if x.shape[0] == 0:
        raise InvalidInput("an empty batch has no tokens to reduce.")
    return GridUnits(x.shape[0], facts.prefix, facts.grid(x.shape[1], seen), 1, x.device)


def _matrices(module: Any) -> int:
    """Weights that every token is multiplied with; 0 for a part that a block does not have."""
    if module is None:
        return 0
    return sum(w.numel() for w in module.parameters() if w.ndim >= 2)
