"""MustDrop: merge in the vision tower, filter in the prefill, trim the KV cache for decoding.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
2024, https://arxiv.org/abs/2411.10803. The steps are `mustdrop_merge` (before block 1 of the
tower; behind the projector where the tower has rotary positions), `mustdrop_filter` (after layers
2, 6, 10, 14 of 32, scaled to the model's depth and at least one layer apart) and `mustdrop_cache`;
their files say what each does differently from the paper.

Budgets: `preset` takes the paper's thresholds for 192, 128 or 64 tokens. These are averages over
layers and over a data set, tuned for LLaVA-1.5, no promise for one image: session.report() shows
what was reached. `keep` is ours and exact: the last filter leaves that share or number, the
filters before it geometrically more, up to twice as many, and the merge stops at it. Without
either the thresholds are those of 192 tokens. Merging without `mass` costs counting questions on
our small model: docs/numbers.md says how much.

When to use: one budget for the whole way, with a smaller KV cache too. Switch the vision stage off
(`vision=False`), or add mass, where answers count things: merging in the tower costs those.

Cost: that of its stages: cosines in windows of neighbours, text rows of attention at each filter,
nothing new in the cache. The layers before the first filter see all tokens that merging left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..budget import Keep
from ..errors import InvalidBudget, UnsupportedSite
from ..reducer import Composite, Host, Part
from ..registry import register
from .mustdrop_filter import MustDropFilter, filtered_after

#: budget of the paper, in tokens -> its thresholds (tau_g, tau_i)
PRESETS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


@register("mustdrop")
@dataclass(frozen=True)
class MustDrop(Composite):
    """Keeps less in three stages: vision tower, prefill, KV cache.

    Args:
        preset: the paper's thresholds for this many tokens, instead of keep.
        tau_g, tau_i: thresholds of your own (the paper's for 64 tokens on VizWiz: .005, .001).
        vision, prefill, decode: which stages run.
    """

    preset: Literal[192, 128, 64] | None = None
    tau_g: float | None = None
    tau_i: float | None = None
    vision: bool = True
    prefill: bool = True
    decode: bool = True

    paper: ClassVar[str] = "MustDrop, 2024, https://arxiv.org/abs/2411.10803"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "decoder", "cache"})
    default_at: ClassVar[str] = "vision.1"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        if host.sites is not None and not any(s.startswith("decoder.") for s in host.sites):
            raise UnsupportedSite(
                "mustdrop: this model has no decoder layers to filter in. In an image encoder its "
                "vision stage alone is mustdrop_merge."
            )
        own = {n: v for n, v in (("tau_g", self.tau_g), ("tau_i", self.tau_i)) if v is not None}
        if (self.preset is not None or own) and keep not in (None, "auto"):
            raise InvalidBudget(
                f"mustdrop: a preset or thresholds decide how many tokens stay, keep={keep!r} is "
                f"an exact budget: give one of them."
            )
        if not self.prefill and (own or self.preset is not None or keep not in (None, "auto")):
            raise InvalidBudget(
                "mustdrop: budgets, presets and thresholds belong to the prefill stage, which is "
                "switched off."
            )
        if self.preset is not None:
            own = dict(zip(("tau_g", "tau_i"), PRESETS[self.preset], strict=True)) | own
        places = MustDropFilter(**own).places(host.depth, keep)
        parts: list[Part] = []
        if self.vision:
            at = "projector" if host.rotary_tower else "vision.1"
            if not host.has(at):
                raise UnsupportedSite(
                    f"mustdrop: this model has no site {at!r} for the vision stage. Leave that "
                    f"stage out with vision=False."
                )
            params = {} if keep in (None, "auto") else {"least": keep}
            parts.append(Part("mustdrop_merge", at, "auto", params))
        if self.prefill:
            parts += [Part("mustdrop_filter", at, budget, own) for at, budget in places.items()]
        if self.decode and self.prefill and not host.has("cache"):
            raise UnsupportedSite(
                "mustdrop: this model has no site 'cache' for the decode stage. Leave that stage "
                "out with decode=False."
            )
        if self.decode and self.prefill:
            first = {"first": filtered_after(host.depth)[0]}
            parts.append(Part("mustdrop_cache", "cache", "auto", first))
        if not parts:
            raise InvalidBudget("mustdrop: every stage is switched off; decode needs prefill.")
        return tuple(parts)
