"""MustDrop: merge in the vision tower, filter in the prefill, trim the KV cache for decoding.

Liu et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
2024, https://arxiv.org/abs/2411.10803. The steps are `mustdrop_merge` (before block 1 of the
tower; behind the projector where the tower has rotary positions), `mustdrop_filter` (after layers
2, 6, 10, 14 of 32, scaled to the model's depth and at least one layer apart) and `mustdrop_cache`;
their files say what each does differently from the paper.

Budgets: `preset` takes the paper's thresholds for 192, 128 or 64 tokens. These are averages over
layers and over a data set, tuned for LLaVA-1.5, no promise for one image: session.report() shows
what was reached. `keep` is ours and exact: the last filter leaves that share or number, the
filters before it geometrically more, up to twice as many. Without either the thresholds are those
of 192 tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..budget import Keep
from ..errors import InvalidBudget, UnsupportedSite
from ..reducer import Composite, Host, Part
from ..registry import register

#: layers of 32 after which the paper filters
LAYERS, DEPTH = (2, 6, 10, 14), 32
PRESETS = {
    "192": (0.001, 0.001),
    "128": (0.0012, 0.001),
    "64": (0.011, 0.01),
    "64-vizwiz": (0.005, 0.001),
}


@register("mustdrop")
@dataclass(frozen=True)
class MustDrop(Composite):
    """Keeps less in three stages: vision tower, prefill, KV cache.

    Args:
        preset: the paper's thresholds for this many tokens, instead of keep.
        vision, prefill, decode: which stages run.
    """

    preset: Literal["192", "128", "64", "64-vizwiz"] | None = None
    vision: bool = True
    prefill: bool = True
    decode: bool = True

    paper: ClassVar[str] = "MustDrop, 2024, https://arxiv.org/abs/2411.10803"
    sites: ClassVar[frozenset[str]] = frozenset({"vision", "decoder", "cache"})
    default_at: ClassVar[str] = "vision.1"
    budgets: ClassVar[frozenset[str]] = frozenset({"auto", "fixed"})

    def parts(self, host: Host, keep: Keep | None) -> tuple[Part, ...]:
        if self.preset is not None and keep not in (None, "auto"):
            raise InvalidBudget(
                f"mustdrop: preset={self.preset!r} sets thresholds, keep={keep!r} an exact budget: "
                f"give one of them."
            )
        after = _layers(host.depth)
        if not after:
            raise InvalidBudget(f"mustdrop needs 2 or more decoder layers, this has {host.depth}.")
        parts: list[Part] = []
        if self.vision:
            at = "projector" if host.rotary_tower else "vision.1"
            if not host.has(at):
                raise UnsupportedSite(
                    f"mustdrop: this model has no site {at!r} for the vision stage. Leave that "
                    f"stage out with vision=False."
                )
            parts.append(Part("mustdrop_merge", at, 1.0 if keep == 1.0 else "auto"))
        if self.prefill:
            tau_g, tau_i = PRESETS[self.preset or "192"]
            params = {} if self.preset is None else {"tau_g": tau_g, "tau_i": tau_i}
            budgets = _budgets(keep, len(after))
            parts += [
                Part("mustdrop_filter", f"decoder.{layer + 1}", budget, params)
                for layer, budget in zip(after, budgets, strict=True)
            ]
        if self.decode and self.prefill:
            params = {} if after[0] == LAYERS[0] else {"first": after[0]}
            parts.append(Part("mustdrop_cache", "cache", "auto", params))
        if not parts:
            raise InvalidBudget("mustdrop: every stage is switched off; decode needs prefill.")
        return tuple(parts)


def _layers(depth: int) -> list[int]:
    """Layers to filter after, one apart at least; none after the last layer."""
    found: list[int] = []
    for layer in LAYERS:
        scaled = math.floor(layer * depth / DEPTH + 0.5)
        found.append(max(scaled, found[-1] + 1) if found else scaled)
    return [layer for layer in found if layer < depth - 1]


def _budgets(keep: Keep | None, stages: int) -> list[Keep]:
    """What each filter leaves: the last one `keep`, the first up to twice as much."""
    if keep is None or keep == "auto":
        return ["auto"] * stages
    more = [2 ** (1 - s / (stages - 1)) if stages > 1 else 1.0 for s in range(stages)]
    if isinstance(keep, int):
        return [round(keep * m) for m in more]
    return [min(1.0, keep * m) for m in more]
