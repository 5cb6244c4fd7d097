"""Diffusion transformers: tokens are dropped or merged before block i (`dit.<i>`) and come back
behind, or around its attention alone (`dit.<i>.attn`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...context import SIGNALS, Site
from ...errors import InvalidRecipe, UnsupportedModel
from ...hooks import refuse_second
from ...recipe import Recipe
from ...reducer import Denoiser, Host
from ...registry import ADAPTERS, REDUCERS
from ...session import Session
from .costs import Costs
from .facts import look
from .hooks import FULL, Hooks, refuse_caches

KINDS: tuple[str, ...] = ("vision", "projector", "decoder", "cache")


@ADAPTERS.add("diffusion_transformer")
class DiffusionTransformer:
    """Adapter for DiT, PixArt, Latte, SD3, Flux and Wan of diffusers, and the original DiT."""

    name = "diffusion_transformer"
    counts = "denoiser"

    def __init__(self, model: nn.Module) -> None:
        facts = look(model)
        if isinstance(facts, str):
            raise UnsupportedModel(f"{type(model).__name__}: looked for {facts}")
        self.model, self.facts = model, facts
        self.depth = len(facts.parts)
        self.costs = [Costs.of(part) for part in facts.parts]

    @classmethod
    def matches(cls, model: nn.Module) -> str | None:
        facts = look(model)
        return facts if isinstance(facts, str) else None

    def sites(self) -> dict[str, frozenset[str]]:
        none = frozenset[str]()
        blocks = [f"dit.{i}" for i in range(self.depth)]
        return dict.fromkeys([*blocks, *(f"{block}.attn" for block in blocks)], none)

    def host(self) -> Host:
        return Host(self.depth, frozenset(self.sites()))

    def refusals(self) -> dict[str, str]:
        whole = "this is a diffusion transformer: its sites are dit.<i>"
        signals = dict.fromkeys(SIGNALS, "not offered inside diffusion transformers")
        return signals | dict.fromkeys(KINDS, whole)

    def check(self, recipe: Recipe) -> None:
        refuse_second((self.facts.parts[0].block,))
        refuse_caches(self.model)
        ends: list[int] = []
        for step in recipe.steps:
            cls = REDUCERS[step.method]
            if step.mass or step.scope == "sample":
                raise UnsupportedModel(
                    f"{step.at}: mass and scope='sample' are for models that answer questions; "
                    f"leave them out."
                )
            if issubclass(cls, Denoiser):
                _check_whole(step)
                self._check_denoiser(step.build())
                continue
            self._check_end(step, ends)

    def _check_end(self, step: Any, ends: list[int]) -> None:
        """Spans of blocks have to lie in each other, or apart. `ends`: of those that began."""
        start = step.site.layer
        while ends and ends[-1] <= start:
            ends.pop()
        if step.site.part:
            return
        end = self.depth if step.end is None else step.end
        if end > self.depth:
            raise InvalidRecipe(f"until={step.until!r}: this model has {self.depth} blocks.")
        if ends and end > ends[-1]:
            raise InvalidRecipe(
                f"{step.at} until block {end} reaches beyond the end {ends[-1]} of the step before "
                f"it: let it end there or earlier."
            )
        ends.append(end)

    def _check_denoiser(self, method: Denoiser) -> None:
        if method.asks & {"mixed", "received"} and not self.facts.mixes:
            less = " Use score='value', which works here." if "received" in method.asks else ""
            raise UnsupportedModel(
                f"{method.name!r} asks the attention of blocks for queries and keys apart, which "
                f"works in DiT, PixArt, Latte and the original DiT; this is {self.facts.name}, "
                f"where text or rotary positions go along.{less}"
            )
        if method.asks and any(_fused(part.attention) for part in self.facts.parts):
            raise UnsupportedModel(
                f"{method.name!r} asks the attention of blocks for queries and keys apart, but "
                f"their projections are fused: call unfuse_qkv_projections() first."
            )
        method.fits(self.depth)

    def blocks(self, site: Site) -> Sequence[nn.Module]:
        return [part.block for part in self.facts.parts[site.layer or 0 :]]

    def install(self, session: Session) -> None:
        Hooks(self, session).install(session.installed)


def _fused(attention: Any) -> bool:
    return bool(getattr(attention, "fused_projections", False))


def _check_whole(step: Any) -> None:
    """What a method that acts in all blocks does not heed."""
    if step.until is not None or step.noise != FULL or step.merge != "none":
        raise InvalidRecipe(
            f"{step.method!r} acts in all blocks and through the whole run, and merges nothing: "
            f"leave until, noise and merge out."
        )
